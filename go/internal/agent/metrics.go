package agent

import (
	"github.com/prometheus/client_golang/prometheus"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
)

const subsystem = "oom_tracer"

// metrics are the tracer's own. What the kernel program or the publisher counts is read from it at the scrape.
type metrics struct {
	events      *prometheus.CounterVec
	kills       *prometheus.CounterVec
	gaps        *prometheus.CounterVec
	neighbours  *prometheus.CounterVec
	published   prometheus.Histogram
	stateErrors prometheus.Counter

	kernel    kernelSide
	publisher interface {
		Pending() int
		Acked() uint64
	}
	conn   interface{ Connected() bool }
	unseen func() (atLeast, atMost uint64, err error) // see Counts.Unseen
}

type kernelSide interface {
	Tier() loader.Tier
	Notify() loader.Notify
	Prototype() loader.Prototype
	Stats() (loader.Stats, error)
	Received() uint64
	CaughtUp() uint64
	Counts() loader.Counts
}

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName("", subsystem, name), help, labels, nil)
}

func counter(name, help string, labels ...string) *prometheus.CounterVec {
	return prometheus.NewCounterVec(prometheus.CounterOpts{Subsystem: subsystem, Name: name, Help: help}, labels)
}

func newMetrics() *metrics {
	m := &metrics{
		events:     counter("events_total", "Number of records of the kernel tracer by stage and reason.", "stage", "reason"),
		kills:      counter("kills_total", "Number of OOM kills observed by the kernel tracer, by scope and by the level of the limit that was hit.", "scope", "level"),
		gaps:       counter("gaps_total", "Number of gap events by cause.", "cause"),
		neighbours: counter("neighbours_total", "Number of incidents by what became of the memory usage after them: read, skipped (read moments before, or the kill is old) or failed (not all could be read).", "result"),
		stateErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Subsystem: subsystem, Name: "state_file_errors_total", Help: "Number of failed writes of the state file.",
		}),
		published: prometheus.NewHistogram(prometheus.HistogramOpts{
			Subsystem: subsystem, Name: "publish_latency_seconds",
			Help:    "Time from the OOM kill in the kernel to its acknowledgement by JetStream.",
			Buckets: prometheus.ExponentialBuckets(0.00025, 4, 10),
		}),
	}
	// Every series is there from the start, so that a rate over it sees the first event.
	for stage, reasons := range map[string][]string{
		"observed":   {"kill", "exiting"},
		"identified": {"pod", "container", "host"},
		"skipped":    {"other_node", "print"},
		"error":      {"decode", "encode", "publish", "dropped"},
	} {
		for _, reason := range reasons {
			m.events.WithLabelValues(stage, reason)
		}
	}
	for _, scope := range event.Scopes() {
		for _, level := range levels(scope) {
			m.kills.WithLabelValues(string(scope), level)
		}
	}
	for _, result := range []string{"read", "skipped", "failed"} {
		m.neighbours.WithLabelValues(result)
	}
	for _, cause := range event.GapCauses() {
		if cause != event.GapOtherNode { // in which nothing is missing
			m.gaps.WithLabelValues(string(cause))
		}
	}
	return m
}

const unknownLevel = "unknown"

// levels lists the levels of the limits that kills of a scope can hit.
func levels(scope event.Scope) []string {
	if scope == event.ScopeGlobal {
		return []string{string(event.LevelNode)}
	}
	all := []string{unknownLevel}
	for _, level := range event.LimitLevels() {
		if scope == event.ScopeCgroup && level != event.LevelNode {
			all = append(all, string(level))
		}
	}
	return all
}

func (m *metrics) observe(e *event.Event) {
	m.events.WithLabelValues("observed", string(e.Kind())).Inc()
	if e.Kind() == event.KindKill {
		level := unknownLevel
		if e.Limit != nil {
			level = string(e.Limit.Level)
		}
		m.kills.WithLabelValues(string(e.Scope), level).Inc()
	}
	identified := "pod"
	if e.Container == nil {
		identified = "host"
	} else if e.Container.PodUID == "" {
		identified = "container"
	}
	m.events.WithLabelValues("identified", identified).Inc()
}

func (m *metrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, ch) }

func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range []prometheus.Collector{m.events, m.kills, m.gaps, m.neighbours, m.published, m.stateErrors} {
		c.Collect(ch)
	}
	ch <- prometheus.MustNewConstMetric(
		desc("tier_info", "Tier, notification and prototype of mark_victim in use; always 1.", "tier", "notify", "prototype"),
		prometheus.GaugeValue, 1, string(m.kernel.Tier()), string(m.kernel.Notify()), string(m.kernel.Prototype()))
	gauge := func(name, help string, value uint64) {
		ch <- prometheus.MustNewConstMetric(desc(name, help), prometheus.GaugeValue, float64(value))
	}
	counter := func(name, help string, value uint64) {
		ch <- prometheus.MustNewConstMetric(desc(name, help), prometheus.CounterValue, float64(value))
	}
	// Received before sent: a notification that arrives between the two reads must not look like one too many.
	counter("notifications_received_total", "Number of notifications that the tracer has read.", m.kernel.Received())
	tried := desc("notifications_total", "Number of notifications that the kernel program has tried to send since it was loaded, by result.", "result")
	if stats, err := m.kernel.Stats(); err != nil {
		ch <- prometheus.NewInvalidMetric(tried, err)
	} else {
		counter("records_total", "Number of records that the kernel program has written since it was loaded.", stats.Seen)
		ch <- prometheus.MustNewConstMetric(tried, prometheus.CounterValue, float64(stats.Sent), "sent")
		ch <- prometheus.MustNewConstMetric(tried, prometheus.CounterValue, float64(stats.Refused), "refused")
	}
	counter("unnotified_records_total", "Number of records that the tracer has read without a notification.", m.kernel.CaughtUp())
	counts := m.kernel.Counts()
	gauge("seq", "Sequence number of the last record in the journal.", counts.Head)
	gauge("journal_records", "Number of records in the journal that JetStream has not acknowledged.", counts.Head-min(counts.Head, counts.Acked))
	counter("lost_records_total", "Number of records that were overwritten in the journal before they were read.", counts.Lost)
	unseenMin := desc("unseen_kills_min", "Minimum number of OOM kills that the kernel counted and the tracer did not see.")
	if atLeast, atMost, err := m.unseen(); err != nil {
		ch <- prometheus.NewInvalidMetric(unseenMin, err)
	} else {
		ch <- prometheus.MustNewConstMetric(unseenMin, prometheus.GaugeValue, float64(atLeast))
		gauge("unseen_kills_max", "Maximum number of OOM kills that the kernel counted and the tracer did not see.", atMost)
	}
	gauge("nats_connected", "Whether the tracer is connected to NATS.", map[bool]uint64{true: 1}[m.conn.Connected()])
	gauge("publish_pending", "Number of events that wait for an acknowledgement by JetStream.", uint64(m.publisher.Pending()))
	counter("publish_acked_total", "Number of events that JetStream has acknowledged.", m.publisher.Acked())
}
