package agent

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
)

const subsystem = "oom_tracer"

// metrics are the tracer's own. Those that something else counts (the kernel program, the publisher)
// are read where they are counted, at the scrape.
type metrics struct {
	events *prometheus.CounterVec
	kills  *prometheus.CounterVec
	gaps   *prometheus.CounterVec
	// neighbours counts incidents after which the memory usage is read.
	neighbours *prometheus.CounterVec
	published  prometheus.Histogram
	// stateErrors counts failed writes of the state file.
	stateErrors prometheus.Counter

	kernel    kernelSide
	publisher interface{ Stats() bus.Stats }
	conn      interface{ Connected() bool }
	vmstat    procRoot
	bounds    func(c loader.Counts, kernel uint64) (atLeast, atMost uint64)
}

// kernelSide is what is shown of a loader.Loader.
type kernelSide interface {
	Tier() loader.Tier
	Notify() loader.Notify
	Prototype() loader.Prototype
	Stats() (loader.Stats, error)
	Received() uint64
	CaughtUp() uint64
	Counts() loader.Counts
}

// The metrics that are read at the scrape.
var (
	tierDesc      = desc("tier_info", "Tier, notification and prototype of mark_victim in use; always 1.", "tier", "notify", "prototype")
	samplesDesc   = desc("samples_total", "Number of records (seen), of notifications (sent, refused, received), and of records read without a notification (caught_up), since the program was loaded.", "state")
	seqDesc       = desc("seq", "Sequence number of the last record in the journal.")
	journalDesc   = desc("journal_records", "Number of records in the journal that JetStream has not acknowledged.")
	lostDesc      = desc("lost_records_total", "Number of records that were overwritten in the journal before they were read.")
	unseenDesc    = desc("unseen_kills", "Number of OOM kills that the kernel counted and the tracer did not see, as a lower bound (at_least) and an upper bound (at_most).", "bound")
	connectedDesc = desc("nats_connected", "Whether the tracer is connected to NATS.")
	pendingDesc   = desc("publish_pending", "Number of events that wait for an acknowledgement by JetStream.")
	ackedDesc     = desc("publish_acked_total", "Number of events that JetStream has acknowledged.")
)

func desc(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName("", subsystem, name), help, labels, nil)
}

func newMetrics() *metrics {
	m := &metrics{
		events: prometheus.NewCounterVec(prometheus.CounterOpts{
			Subsystem: subsystem, Name: "events_total",
			Help: "Number of records of the kernel tracer by stage and reason.",
		}, []string{"stage", "reason"}),
		kills: prometheus.NewCounterVec(prometheus.CounterOpts{
			Subsystem: subsystem, Name: "kills_total",
			Help: "Number of OOM kills observed by the kernel tracer, by scope and by the level of the limit that was hit.",
		}, []string{"scope", "level"}),
		gaps: prometheus.NewCounterVec(prometheus.CounterOpts{
			Subsystem: subsystem, Name: "gaps_total",
			Help: "Number of gap events by cause.",
		}, []string{"cause"}),
		neighbours: prometheus.NewCounterVec(prometheus.CounterOpts{
			Subsystem: subsystem, Name: "neighbours_total",
			Help: "Number of incidents by what became of the memory usage after them: read, skipped (read moments before, or the kill is old) or failed (not all could be read).",
		}, []string{"result"}),
		stateErrors: prometheus.NewCounter(prometheus.CounterOpts{
			Subsystem: subsystem, Name: "state_file_errors_total",
			Help: "Number of failed writes of the state file.",
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
	switch scope {
	case event.ScopeGlobal:
		return []string{string(event.LevelNode)}
	case event.ScopeCgroup:
		all := []string{unknownLevel}
		for _, level := range event.LimitLevels() {
			if level != event.LevelNode {
				all = append(all, string(level))
			}
		}
		return all
	}
	return []string{unknownLevel}
}

// watch names what is read at the scrape.
func (m *metrics) watch(l *loader.Loader, p *bus.Publisher, c *bus.Conn, vmstat procRoot, r *reconciled) {
	m.kernel, m.publisher, m.conn, m.vmstat, m.bounds = l, p, c, vmstat, r.bounds
}

// observe counts an event that was read.
func (m *metrics) observe(e *event.Event) {
	m.events.WithLabelValues("observed", string(e.Kind())).Inc()
	if e.Kind() == event.KindKill {
		level := unknownLevel
		if e.Limit != nil {
			level = string(e.Limit.Level)
		}
		m.kills.WithLabelValues(string(e.Scope), level).Inc()
	}
	switch {
	case e.Container == nil:
		m.events.WithLabelValues("identified", "host").Inc()
	case e.Container.PodUID == "":
		m.events.WithLabelValues("identified", "container").Inc()
	default:
		m.events.WithLabelValues("identified", "pod").Inc()
	}
}

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) {
	for _, c := range []prometheus.Collector{m.events, m.kills, m.gaps, m.neighbours, m.published, m.stateErrors} {
		c.Describe(ch)
	}
	for _, d := range []*prometheus.Desc{tierDesc, samplesDesc, seqDesc, journalDesc, lostDesc, unseenDesc, connectedDesc, pendingDesc, ackedDesc} {
		ch <- d
	}
}

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	for _, c := range []prometheus.Collector{m.events, m.kills, m.gaps, m.neighbours, m.published, m.stateErrors} {
		c.Collect(ch)
	}
	ch <- prometheus.MustNewConstMetric(tierDesc, prometheus.GaugeValue, 1, string(m.kernel.Tier()), string(m.kernel.Notify()), string(m.kernel.Prototype()))
	// Received before sent: a notification that arrives between the two reads must not look like one too many.
	received := m.kernel.Received()
	stats, err := m.kernel.Stats()
	if err != nil {
		ch <- prometheus.NewInvalidMetric(samplesDesc, err)
	} else {
		for state, n := range map[string]uint64{
			"seen": stats.Seen, "sent": stats.Sent, "refused": stats.Refused, "received": received, "caught_up": m.kernel.CaughtUp(),
		} {
			ch <- prometheus.MustNewConstMetric(samplesDesc, prometheus.CounterValue, float64(n), state)
		}
	}
	counts := m.kernel.Counts()
	ch <- prometheus.MustNewConstMetric(seqDesc, prometheus.GaugeValue, float64(counts.Head))
	ch <- prometheus.MustNewConstMetric(journalDesc, prometheus.GaugeValue, float64(counts.Head-min(counts.Head, counts.Acked)))
	ch <- prometheus.MustNewConstMetric(lostDesc, prometheus.CounterValue, float64(counts.Lost))
	if atLeast, atMost, err := m.unseen(counts); err != nil {
		ch <- prometheus.NewInvalidMetric(unseenDesc, err)
	} else {
		ch <- prometheus.MustNewConstMetric(unseenDesc, prometheus.GaugeValue, float64(atLeast), "at_least")
		ch <- prometheus.MustNewConstMetric(unseenDesc, prometheus.GaugeValue, float64(atMost), "at_most")
	}
	connected := 0.0
	if m.conn.Connected() {
		connected = 1
	}
	ch <- prometheus.MustNewConstMetric(connectedDesc, prometheus.GaugeValue, connected)
	publish := m.publisher.Stats()
	ch <- prometheus.MustNewConstMetric(pendingDesc, prometheus.GaugeValue, float64(publish.Pending))
	ch <- prometheus.MustNewConstMetric(ackedDesc, prometheus.CounterValue, float64(publish.Acked))
}

// unseen holds the program's counts against the kernel's. Between the kernel's count of a kill and the mark
// of its victim there are some microseconds: what is left over is looked at again.
func (m *metrics) unseen(counts loader.Counts) (atLeast, atMost uint64, err error) {
	for range 3 {
		kernel, err := obs.KernelOOMKills(string(m.vmstat))
		if err != nil {
			return 0, 0, err
		}
		if atLeast, atMost = m.bounds(counts, kernel); atMost == 0 {
			break
		}
		time.Sleep(10 * time.Millisecond)
		counts = m.kernel.Counts()
	}
	return atLeast, atMost, nil
}
