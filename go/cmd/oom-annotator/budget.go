package main

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
)

// readTime bounds the time in which the state is read for a scrape.
const readTime = time.Second

// setupTime is how long after the start an absent state is not logged: oom-tap setup may be about to write it.
const setupTime = 10 * time.Second

var (
	pausedDesc  = prometheus.NewDesc("oom_tracer_paused", "Whether all marking is paused (oom-tap pause).", nil, nil)
	usedDesc    = prometheus.NewDesc("oom_tracer_budget_used", "Number of pods marked within policy.budgets.window, by all replicas.", nil, nil)
	refusedDesc = prometheus.NewDesc("oom_tracer_budget_state_refused", "Whether the shared state of budgets and pause is absent or not valid, so that nothing is marked.", nil, nil)
	limitDesc   = prometheus.NewDesc("oom_tracer_budget_limit", "Maximum of oom_tracer_budget_used: policy.budgets.cluster.", nil, nil)
)

// budgetCollector collects the metrics of the state of budgets and pause. It reads the state at each scrape, and logs what has changed
// since the last one. While the state is unknown there are no metrics.
type budgetCollector struct {
	conn   *bus.Conn
	ledger *budget.Ledger
	log    *slog.Logger
	begun  time.Time

	mu            sync.Mutex
	failing       string
	known, paused bool
}

// read reads the state, and logs why that fails, when marking is paused and when it resumes.
func (b *budgetCollector) read(ctx context.Context) (budget.State, error) {
	s, err := b.ledger.State(ctx)
	b.mu.Lock()
	defer b.mu.Unlock()
	switch {
	case err == nil:
		b.failing, b.known = "", true
		p := s.Paused(time.Now())
		if p != nil && !b.paused {
			b.log.Warn("marking is paused", "by", p.By, "reason", p.Reason, "since", p.Since, "until", p.Until)
		} else if p == nil && b.paused {
			b.log.Info("marking resumed")
		}
		b.paused = p != nil
	case !errors.Is(err, context.Canceled): // else this process ends
		b.failed(err)
	}
	return s, err
}

// failed logs once why the state cannot be read.
func (b *budgetCollector) failed(err error) {
	switch {
	case err.Error() == b.failing:
	case !b.known && errors.Is(err, budget.ErrAbsent) && time.Since(b.begun) < setupTime:
		return // setup writes the first state a moment after it creates the bucket
	case !b.known && errors.Is(err, jetstream.ErrBucketNotFound):
		// On a first install, oom-tap setup may run later.
		b.log.Info("waiting for the bucket of budgets and pause, oom-tap setup creates it", "bucket", bus.BucketName)
	default:
		b.log.Warn("could not read budgets and pause, nothing is marked", "error", err)
	}
	b.failing = err.Error()
}

// Describe implements prometheus.Collector.
func (b *budgetCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{pausedDesc, refusedDesc, usedDesc, limitDesc} {
		ch <- desc
	}
}

// Collect implements prometheus.Collector.
func (b *budgetCollector) Collect(ch chan<- prometheus.Metric) {
	send := func(desc *prometheus.Desc, value float64) {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value)
	}
	if !b.conn.Connected() {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), readTime)
	defer cancel()
	s, err := b.read(ctx)
	switch {
	case errors.Is(err, budget.ErrState), errors.Is(err, jetstream.ErrBucketNotFound):
		send(refusedDesc, 1)
	case err == nil:
		now := time.Now()
		send(refusedDesc, 0)
		send(pausedDesc, map[bool]float64{true: 1}[s.Paused(now) != nil])
		send(usedDesc, float64(len(s.Since(now.Add(-b.ledger.Limits.Window)))))
		send(limitDesc, float64(b.ledger.Limits.Cluster))
	}
}
