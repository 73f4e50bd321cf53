package main

import (
	"context"
	"errors"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"github.com/prometheus/client_golang/prometheus"

	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
)

// pollInterval is how often the state is read for metrics and the log. Claims do not depend on it.
const pollInterval = time.Second

// setupTime is how long after the start an absent state is not logged: oom-tap setup may be about to write it.
const setupTime = 10 * time.Second

var (
	pausedDesc  = prometheus.NewDesc("oom_tracer_paused", "Whether all marking is paused (oom-tap pause).", nil, nil)
	usedDesc    = prometheus.NewDesc("oom_tracer_budget_used", "Number of pods marked within policy.budgets.window, by all replicas.", nil, nil)
	refusedDesc = prometheus.NewDesc("oom_tracer_budget_state_refused", "Whether the shared state of budgets and pause is absent or not valid, so that nothing is marked.", nil, nil)
	limitDesc   = prometheus.NewDesc("oom_tracer_budget_limit", "Maximum of oom_tracer_budget_used: policy.budgets.cluster.", nil, nil)
)

// budgetCollector collects the metrics of the state of budgets and pause. While the state is unknown there are none.
type budgetCollector struct {
	state atomic.Pointer[budgetState]
}

type budgetState struct {
	refused     bool // nothing else is known then
	paused      bool
	used, limit int
}

// poll reads the state until ctx ends, and logs when marking is paused and when it resumes.
func (b *budgetCollector) poll(ctx context.Context, ledger *budget.Ledger, log *slog.Logger) {
	tick := time.NewTicker(pollInterval)
	defer tick.Stop()
	failing, known, begun := "", false, time.Now()
	for paused := false; ; {
		state, err := ledger.State(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			b.state.Store(nil)
			if errors.Is(err, budget.ErrState) || errors.Is(err, jetstream.ErrBucketNotFound) {
				b.state.Store(&budgetState{refused: true})
			}
			// Setup writes the first state a moment after it creates the bucket.
			if !known && errors.Is(err, budget.ErrAbsent) && begun.Add(setupTime).After(time.Now()) {
				break
			}
			switch {
			case err.Error() == failing:
			case !known && errors.Is(err, jetstream.ErrBucketNotFound):
				// On a first install, oom-tap setup may run later.
				log.Info("waiting for the bucket of budgets and pause, oom-tap setup creates it", "bucket", bus.BucketName)
			default:
				log.Warn("could not read budgets and pause, nothing is marked", "error", err)
			}
			failing = err.Error()
		default:
			failing, known = "", true
			now := time.Now()
			p := state.Paused(now)
			b.state.Store(&budgetState{false, p != nil, len(state.Since(now.Add(-ledger.Limits.Window))), ledger.Limits.Cluster})
			if p != nil && !paused {
				log.Warn("marking is paused", "by", p.By, "reason", p.Reason, "since", p.Since, "until", p.Until)
			} else if p == nil && paused {
				log.Info("marking resumed")
			}
			paused = p != nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// Describe implements prometheus.Collector.
func (b *budgetCollector) Describe(ch chan<- *prometheus.Desc) {
	for _, desc := range []*prometheus.Desc{pausedDesc, refusedDesc, usedDesc, limitDesc} {
		ch <- desc
	}
}

// Collect implements prometheus.Collector.
func (b *budgetCollector) Collect(ch chan<- prometheus.Metric) {
	s := b.state.Load()
	if s == nil {
		return
	}
	send := func(desc *prometheus.Desc, value float64) {
		ch <- prometheus.MustNewConstMetric(desc, prometheus.GaugeValue, value)
	}
	send(refusedDesc, gauge(s.refused))
	if !s.refused {
		send(pausedDesc, gauge(s.paused))
		send(usedDesc, float64(s.used))
		send(limitDesc, float64(s.limit))
	}
}
