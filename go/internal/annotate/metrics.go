package annotate

import (
	"errors"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// Metrics count what an Annotator does.
type Metrics struct {
	events  *prometheus.CounterVec
	victims *prometheus.CounterVec
	latency prometheus.Histogram
}

// The reasons of events_total{stage="error"} that are no reasons of an outcome.
var errorReasons = []string{"publish", "dropped", clockReason}

// clockReason is that of a kill whose node's clock is ahead of the stream's.
const clockReason = "clock"

// repeatedReason is that of a mark that an attempt before had made, and of a kill whose outcome was told.
const repeatedReason = "repeated"

// NewMetrics makes the metrics, with every series from the start, so that a rate sees the first event.
func NewMetrics() *Metrics {
	const subsystem = "oom_tracer"
	m := &Metrics{
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Subsystem: subsystem, Name: "events_total",
			Help: "What became of the messages of the stream, by stage and reason; an attempt counts each time.",
		}, []string{"stage", "reason"}),
		victims: prometheus.NewCounterVec(prometheus.CounterOpts{
			Subsystem: subsystem, Name: "marked_victims_total",
			Help: "The outcomes of kills, by result (stage) and reason.",
		}, []string{"stage", "reason"}),
		latency: prometheus.NewHistogram(prometheus.HistogramOpts{
			Subsystem: subsystem, Name: "annotate_latency_seconds",
			Help:    "From the kill in the kernel to the annotation on the pod.",
			Buckets: prometheus.ExponentialBuckets(0.002, 2, 16),
		}),
	}
	for stage, reasons := range map[string][]string{
		"observed":   {"kill"},
		"identified": {"pod", "gone", "host", "not_found", "refused"},
		"skipped":    {"wait_pod", "wait_container", "wait_turn", repeatedReason},
		"error":      errorReasons,
	} {
		for _, reason := range reasons {
			m.events.WithLabelValues(stage, reason)
		}
	}
	for result, reasons := range event.Reasons() {
		for _, reason := range reasons {
			if reason == event.ReasonNeighbours {
				continue // says nothing of the victim
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

// stageOf is the result in the metric's words.
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

// identified counts whose the kill was.
func (m *Metrics) identified(c *Case) {
	reason := "pod"
	switch {
	case !ofPod(c.Event, c.Found.Pod):
		reason = "host"
	case c.Found.Gone:
		reason = "gone"
	case errors.Is(c.Err, pods.ErrUnknown):
		reason = "not_found"
	case c.Err != nil:
		reason = "refused"
	}
	m.events.WithLabelValues("identified", reason).Inc()
}

// closed counts what became of a marked pod.
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

// Describe implements prometheus.Collector.
func (m *Metrics) Describe(ch chan<- *prometheus.Desc) {
	m.events.Describe(ch)
	m.victims.Describe(ch)
	m.latency.Describe(ch)
}

// Collect implements prometheus.Collector.
func (m *Metrics) Collect(ch chan<- prometheus.Metric) {
	m.events.Collect(ch)
	m.victims.Collect(ch)
	m.latency.Collect(ch)
}
