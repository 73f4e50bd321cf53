package annotate

import (
	"errors"
	"math"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/decide"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// Metrics count what an Annotator does.
type Metrics struct {
	events  *prometheus.CounterVec
	victims *prometheus.CounterVec
	latency prometheus.Histogram

	workloads    *prometheus.CounterVec // nil: not wanted
	limits       *prometheus.GaugeVec   // with it
	maxWorkloads int
	mu           sync.Mutex
	known        map[[5]string]struct{} // series of workloads, at most maxWorkloads
}

const (
	// clockReason is the reason of a kill whose node's clock is ahead of the stream's.
	clockReason = "clock"
	// repeatedReason is the reason of a mark that an earlier attempt made, and of a kill that has an outcome.
	repeatedReason = "repeated"
)

// NewMetrics registers the metrics. But for those of workloads, of which at most maxWorkloads have series of their own, every series is
// there from the start, so that a rate includes the first event.
func NewMetrics(registerer prometheus.Registerer, maxWorkloads int) *Metrics {
	const subsystem = "oom_tracer"
	register := promauto.With(registerer)
	m := &Metrics{
		events: register.NewCounterVec(prometheus.CounterOpts{
			Subsystem: subsystem, Name: "events_total",
			Help: "Number of attempts to process an OOM kill, by stage (observed, identified, skipped, error) and reason.",
		}, []string{"stage", "reason"}),
		victims: register.NewCounterVec(prometheus.CounterOpts{
			Subsystem: subsystem, Name: "marked_victims_total",
			Help: "Number of outcomes of OOM kills, by result (stage) and reason.",
		}, []string{"stage", "reason"}),
		latency: register.NewHistogram(prometheus.HistogramOpts{
			Subsystem: subsystem, Name: "annotate_latency_seconds",
			Help:    "Time from the OOM kill in the kernel to the annotation on the pod.",
			Buckets: prometheus.ExponentialBuckets(0.002, 2, 16),
		}),
	}
	if m.maxWorkloads = maxWorkloads; maxWorkloads > 0 {
		m.known = map[[5]string]struct{}{}
		labels := []string{"namespace", "owner_kind", "owner", "container", "level"}
		m.workloads = register.NewCounterVec(prometheus.CounterOpts{
			Subsystem: subsystem, Name: "workload_kills_total",
			Help: "Number of OOM kills in pods, by the workload that would replace the pod and by the level of the limit that was hit.",
		}, labels)
		m.limits = register.NewGaugeVec(prometheus.GaugeOpts{
			Subsystem: subsystem, Name: "workload_limit_bytes",
			Help: "Memory limit that was hit at the last OOM kill in the workload, in bytes.",
		}, labels)
		m.workloads.WithLabelValues(other, other, other, other, other)
		m.limits.WithLabelValues(other, other, other, other, other).Set(math.NaN()) // they have many
	}
	for stage, reasons := range map[string][]string{
		"observed":   {"kill"},
		"identified": {"pod", "gone", "host", "not_found", "refused"},
		"skipped":    {"wait_pod", "wait_container", "wait_mark", "wait_turn", repeatedReason},
		"error":      {"publish", "dropped", clockReason}, // and those of failed outcomes, below
	} {
		for _, reason := range reasons {
			m.events.WithLabelValues(stage, reason)
		}
	}
	for result, reasons := range event.Reasons() {
		for _, reason := range reasons {
			if reason == event.ReasonNeighbours {
				continue // not about the victim
			}
			m.victims.WithLabelValues(stageOf(result), string(reason))
			if result == event.ResultFailed {
				m.events.WithLabelValues("error", string(reason))
			}
		}
	}
	m.victims.WithLabelValues(stageOf(event.ResultAnnotated), repeatedReason)
	return m
}

// stageOf is the value of the label stage.
func stageOf(r event.Result) string {
	if r == event.ResultAnnotated {
		return "marked"
	}
	return string(r)
}

func (m *Metrics) observed()             { m.events.WithLabelValues("observed", "kill").Inc() }
func (m *Metrics) failure(reason string) { m.events.WithLabelValues("error", reason).Inc() }
func (m *Metrics) repeated()             { m.events.WithLabelValues("skipped", repeatedReason).Inc() }
func (m *Metrics) waiting(what string)   { m.events.WithLabelValues("skipped", "wait_"+what).Inc() }

// identified counts whether the kill hit a pod.
func (m *Metrics) identified(k *decide.Kill) {
	reason := "pod"
	switch {
	case !k.InPod():
		reason = "host"
	case k.Found.Gone:
		reason = "gone"
	case errors.Is(k.Err, pods.ErrUnknown):
		reason = "not_found"
	case k.Err != nil:
		reason = "refused"
	}
	m.events.WithLabelValues("identified", reason).Inc()
}

// other is each label of the workloads that have no series of their own.
const other = "other"

// workload counts a kill in a pod. Its exemplar is the kill's ID.
func (m *Metrics) workload(o *event.Outcome, e *event.Event) {
	if m.workloads == nil || o.Pod == nil {
		return
	}
	kind, owner, ok := strings.Cut(o.Pod.Owner, "/")
	if !ok {
		kind, owner = "Pod", o.Pod.Name
	}
	level := "unknown"
	if e.Limit != nil {
		level = string(e.Limit.Level)
	}
	series := [5]string{o.Pod.Namespace, kind, owner, o.Container, level}
	m.mu.Lock()
	_, known := m.known[series]
	if !known && len(m.known) < m.maxWorkloads {
		m.known[series], known = struct{}{}, true
	}
	m.mu.Unlock()
	if !known {
		series = [5]string{other, other, other, other, other}
	} else if e.Limit != nil && e.Limit.Max != nil {
		m.limits.WithLabelValues(series[:]...).Set(float64(*e.Limit.Max))
	}
	counter := m.workloads.WithLabelValues(series[:]...)
	if utf8.RuneCountInString(o.Kill) > prometheus.ExemplarMaxRunes-len("kill") {
		counter.Inc() // not an ID of ours
		return
	}
	counter.(prometheus.ExemplarAdder).AddWithExemplar(1, prometheus.Labels{"kill": o.Kill})
}

// closed counts the end of a mark.
func (m *Metrics) closed(o *event.Outcome) {
	m.victims.WithLabelValues(stageOf(o.Result), string(o.Reason)).Inc()
}

// decided counts an outcome.
func (m *Metrics) decided(o *event.Outcome, repeated bool, latency time.Duration) {
	if repeated {
		m.victims.WithLabelValues(stageOf(o.Result), repeatedReason).Inc()
		return
	}
	m.victims.WithLabelValues(stageOf(o.Result), string(o.Reason)).Inc()
	if o.Result == event.ResultAnnotated {
		m.latency.Observe(latency.Seconds())
	}
}
