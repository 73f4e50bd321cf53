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

// brakeInterval is how often the shared state is looked at to say what holds. Whoever is about to mark a pod
// reads it anew in any case.
const brakeInterval = time.Second

// firstStateTime is how long after the start a state that is absent is not logged: oom-tap setup may be about to write it.
const firstStateTime = 10 * time.Second

var (
	pausedDesc  = prometheus.NewDesc("oom_tracer_paused", "1 while all marking is paused (oom-tap pause), else 0.", nil, nil)
	usedDesc    = prometheus.NewDesc("oom_tracer_budget_used", "Pods marked within policy.budgets.window, by all replicas.", nil, nil)
	refusedDesc = prometheus.NewDesc("oom_tracer_budget_state_refused", "1 while the shared state of budgets and pause is absent or not valid, so that nothing is marked, else 0.", nil, nil)
	limitDesc   = prometheus.NewDesc("oom_tracer_budget_limit", "The bound of that: policy.budgets.cluster.", nil, nil)
)

// brake shows the shared state, as it was a moment ago: nothing while it is not known.
type brake struct {
	now atomic.Pointer[reading]
}

type reading struct {
	refused     bool // nothing else is known then
	paused      bool
	used, limit int
}

// follow looks at the state until ctx ends, and says when marking is paused and when it goes on.
func (b *brake) follow(ctx context.Context, ledger *budget.Ledger, log *slog.Logger) {
	tick := time.NewTicker(brakeInterval)
	defer tick.Stop()
	failing, known, begun := "", false, time.Now()
	for paused := false; ; {
		state, err := ledger.State(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			b.now.Store(nil)
			if errors.Is(err, budget.ErrState) || errors.Is(err, jetstream.ErrBucketNotFound) {
				b.now.Store(&reading{refused: true})
			}
			// The first state follows the bucket in a moment.
			if !known && errors.Is(err, budget.ErrAbsent) && begun.Add(firstStateTime).After(time.Now()) {
				break
			}
			switch {
			case err.Error() == failing:
			case !known && errors.Is(err, jetstream.ErrBucketNotFound):
				// On a first install its owner may come later.
				log.Info("waiting for the bucket of budgets and pause, which oom-tap setup makes", "bucket", bus.BucketName)
			default:
				log.Warn("budgets and pause cannot be read, nothing is marked", "error", err)
			}
			failing = err.Error()
		default:
			failing, known = "", true
			now := time.Now()
			p := state.Paused(now)
			b.now.Store(&reading{false, p != nil, len(state.Since(now.Add(-ledger.Limits.Window))), ledger.Limits.Cluster})
			if p != nil && !paused {
				log.Warn("marking is paused", "by", p.By, "reason", p.Reason, "since", p.Since, "until", p.Until)
			} else if p == nil && paused {
				log.Info("marking goes on")
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
func (b *brake) Describe(ch chan<- *prometheus.Desc) {
	ch <- pausedDesc
	ch <- refusedDesc
	ch <- usedDesc
	ch <- limitDesc
}

// Collect implements prometheus.Collector.
func (b *brake) Collect(ch chan<- prometheus.Metric) {
	r := b.now.Load()
	if r == nil {
		return
	}
	refused, paused := 0.0, 0.0
	if r.refused {
		refused = 1
	}
	ch <- prometheus.MustNewConstMetric(refusedDesc, prometheus.GaugeValue, refused)
	if r.refused {
		return
	}
	if r.paused {
		paused = 1
	}
	ch <- prometheus.MustNewConstMetric(pausedDesc, prometheus.GaugeValue, paused)
	ch <- prometheus.MustNewConstMetric(usedDesc, prometheus.GaugeValue, float64(r.used))
	ch <- prometheus.MustNewConstMetric(limitDesc, prometheus.GaugeValue, float64(r.limit))
}
