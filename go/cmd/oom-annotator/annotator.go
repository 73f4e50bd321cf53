package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/annotate"
	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubeevents"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// name is that of the durable consumer, which all replicas share, and of the connection.
const name = "oom-annotator"

// The way down ends within five seconds of a SIGTERM, whatever hangs. The consumer takes 2 s of them, and then:
const (
	drainTime = 1500 * time.Millisecond // to publish what was decided, and settle it
	closeTime = 500 * time.Millisecond  // of the connection, and of the rest
)

// run works until ctx ends, or NATS' connection is closed for good.
func run(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	api, err := pods.Config(cfg.Annotator.Kubeconfig)
	if err != nil {
		return err
	}
	client, err := pods.NewClient(api, name+"/"+obs.Version().Version, cfg.Annotator.QPS, cfg.Annotator.Burst)
	if err != nil {
		return err
	}
	terms := annotate.Terms(&cfg)
	store := pods.NewStore(cfg.Policy.MaxEventAge + cfg.Annotator.WaitForPod)
	watcher := pods.NewWatcher(client, store, terms, log)
	metrics := annotate.NewMetrics()

	w := &works{log: log, watcher: watcher, closer: &annotate.Closer{
		Terms: terms, Lifetime: cfg.Policy.MarkLifetime, Memory: markMemory(&cfg), API: client, Marks: store, Metrics: metrics, Log: log, Now: time.Now,
	}}
	store.OnLeave = w.closer.Leave
	events := kubeevents.NewRecorder(client, hostname(), log)
	registry := obs.NewRegistry(name)
	registry.MustRegister(metrics, events, &w.brake, prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "oom_tracer_known_pods", Help: "Pods of the cluster that the annotator follows.",
	}, func() float64 { return float64(store.Len()) }))
	checks := map[string]func() error{"pods": watcher.Failing, "nats": w.natsFailing}
	ready := map[string]obs.Check{}
	for check, failing := range checks {
		ready[check] = func(context.Context) error { return failing() }
		registry.MustRegister(readyGauge(check, failing))
	}
	registry.MustRegister(prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "oom_tracer_kills_waiting", Help: "Number of OOM kills in the stream that no annotator had received when this one last received a kill, plus those that it works on.",
	}, func() float64 { return float64(w.waiting()) }), prometheus.NewCounterFunc(prometheus.CounterOpts{
		Name: "oom_tracer_pod_watch_errors_total", Help: "Number of failed attempts to list or watch the pods of the cluster.",
	}, func() float64 { return float64(watcher.Errors()) }))
	server, err := obs.Listen(cfg.Annotator.Listen, registry, obs.Checks{Ready: ready}, log)
	if err != nil {
		return fmt.Errorf("serve metrics: %w", err)
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	downstream, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var rest sync.WaitGroup
	rest.Go(func() { boundMemory(downstream, watcher.Synced()) })
	rest.Go(func() { watcher.Run(downstream) })
	rest.Go(func() {
		if err := server.Serve(downstream); err != nil {
			cancel(err)
		}
	})
	a := &annotate.Annotator{
		Policy: cfg.Policy, Terms: terms, Wait: cfg.Annotator.WaitForPod,
		API: client, Finder: store, Stale: watcher.Failing, Turns: annotate.NewTurns(cfg.Annotator.Workers), Metrics: metrics, Log: log, Now: time.Now,
	}
	if cfg.Annotator.Events {
		w.events = events
		rest.Go(func() { events.Run(downstream) })
	}
	err = w.work(ctx, cfg, a)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = errors.Join(err, cause)
	}
	stop()
	bounded(rest.Wait)
	log.Info("stopped")
	return err
}

// listMemory is what Go may use while all pods are read: 150,000 of them take some 60 MB, and ten times as much as that
// passes through. In a larger cluster Go collects garbage in half of the time until all are read.
const listMemory = 88 << 20

// boundMemory bounds the memory until all pods are read, or ctx ends.
func boundMemory(ctx context.Context, synced <-chan struct{}) {
	before := debug.SetMemoryLimit(-1)
	debug.SetMemoryLimit(min(before, listMemory))
	defer debug.SetMemoryLimit(before)
	defer debug.SetGCPercent(debug.SetGCPercent(200)) // that limit is enough: while there are few pods garbage need not be collected often
	select {
	case <-synced:
	case <-ctx.Done():
	}
}

// readyGauge shows a check of /readyz to whoever scrapes: up says only that the process answers.
func readyGauge(check string, failing func() error) prometheus.Collector {
	return prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "oom_tracer_ready", Help: "Whether a check of /readyz passes: pods (all pods are known and followed), nats (kills can be read and outcomes stored).",
		ConstLabels: prometheus.Labels{"check": check},
	}, func() float64 {
		if failing() != nil {
			return 0
		}
		return 1
	})
}

// hostname names this process where several run.
func hostname() string {
	host, err := os.Hostname()
	if err != nil {
		return name
	}
	return host
}

// bounded lets something take closeTime, and goes on without it then.
func bounded(act func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		act()
	}()
	select {
	case <-done:
	case <-time.After(closeTime):
	}
}

// works is the part that lives on NATS.
type works struct {
	log     *slog.Logger
	watcher *pods.Watcher
	closer  *annotate.Closer
	events  *kubeevents.Recorder // nil: none are written

	brake     brake
	mu        sync.Mutex
	conn      *bus.Conn // nil until there is one
	publisher *bus.Publisher
	consumer  *bus.Consumer
}

// natsFailing is why kills cannot be read or outcomes not be stored now.
func (w *works) natsFailing() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.conn == nil || !w.conn.Connected():
		return bus.ErrDisconnected
	case w.consumer == nil:
		return errors.New("nothing is consumed before the pods are known")
	}
	return errors.Join(w.consumer.Failing(), w.publisher.Failing())
}

// waiting is how many kills wait to be decided.
func (w *works) waiting() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.consumer == nil {
		return 0
	}
	return w.consumer.Waiting()
}

// work consumes kills until ctx ends.
func (w *works) work(ctx context.Context, cfg config.Config, a *annotate.Annotator) error {
	conn, err := w.connect(ctx, cfg.NATS)
	if err != nil || conn == nil {
		return err
	}
	defer bounded(conn.Close) // it may wait for a server that does not answer
	publisher, err := bus.NewPublisher(conn, bus.Window, a.Hooks(), w.log)
	if err != nil {
		return fmt.Errorf("make the publisher: %w", err)
	}
	ledger := &budget.Ledger{Cell: conn.Cell(budget.Key), Limits: cfg.Policy.Budgets, Keep: cfg.Policy.MaxEventAge, Now: time.Now}
	a.Outlet, a.Ledger, a.Last = publisher, ledger, conn.Last
	consumer, err := bus.NewConsumer(conn, bus.ConsumeOptions{
		Name: name, Subjects: []string{"oom.v1." + string(event.KindKill) + ".>"},
		// Of these that many are left for kills that need no API server, whatever the others wait for.
		Workers: (annotate.Waiting + 2) * cfg.Annotator.Workers,
	})
	if err != nil {
		return err
	}
	w.mu.Lock()
	w.conn, w.publisher = conn, publisher
	w.mu.Unlock()

	key, value := cfg.Policy.Mark()
	w.log.Info("annotating", "version", obs.Version().Version, "annotation", key, "value", value, "observe_only", key == "",
		"scopes", cfg.Policy.Scopes, "levels", cfg.Policy.Levels)
	go w.brake.follow(ctx, ledger, w.log)
	// Who knows no pods would take each for one that does not exist.
	select {
	case <-w.watcher.Synced():
	case <-ctx.Done():
		return nil
	}
	w.mu.Lock()
	w.consumer = consumer
	w.mu.Unlock()

	downstream, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	published := make(chan error, 1)
	go func() { published <- publisher.Run(downstream) }()
	w.closer.Outlet, w.closer.Last = publisher, conn.Last
	closing := make(chan struct{})
	go func() {
		defer close(closing)
		w.close(ctx, conn, cfg)
	}()
	enriched := make(chan struct{})
	if w.events == nil {
		close(enriched)
	} else {
		enricher := kubeevents.NewEnricher(w.events, w.log)
		enricher.Last, enricher.Find, enricher.Publish = conn.Last, a.Finder.Find, a.PublishMore
		a.Events = enricher
		go func() {
			defer close(enriched)
			enricher.Run(downstream)
		}()
	}
	err = consumer.Run(ctx, func(ctx context.Context, d *bus.Delivery) {
		a.Handle(ctx, annotate.Message{Stored: d.Stored, Attempt: d.Attempt, Settler: d})
	})
	bounded(func() { <-closing })
	draining, drained := context.WithTimeout(downstream, drainTime)
	defer drained()
	if left, err := publisher.Drain(draining); left > 0 {
		w.log.Warn("not every outcome is published, another replica decides again", "left", left, "error", err)
	}
	if n := consumer.Release(); n > 0 {
		w.log.Info("kills are given back", "count", n)
	}
	stop()
	bounded(func() { <-enriched })
	return errors.Join(err, <-published)
}

// markMemory is how long after its kill the end of a mark is looked for.
func markMemory(cfg *config.Config) time.Duration {
	return 2*cfg.Policy.MarkLifetime + cfg.Policy.MaxEventAge
}

// close says what becomes of marked pods until ctx ends. It begins with those that left while nobody watched.
func (w *works) close(ctx context.Context, conn *bus.Conn, cfg config.Config) {
	since := time.Now().Add(-markMemory(&cfg))
	for {
		open := map[string]event.Outcome{}
		err := bus.Outcomes(ctx, conn, since, func(m bus.Stored) error {
			o, err := event.ParseOutcome(m.Data)
			switch {
			case err != nil: // nothing of ours
			case o.Stage == event.StageClose:
				delete(open, o.Kill)
			case o.Stage == event.StageAnnotate && o.Result == event.ResultAnnotated:
				open[o.Kill] = o
			}
			return nil
		})
		if err == nil {
			w.closer.Run(ctx, slices.Collect(maps.Values(open)))
			return
		}
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return
		}
	}
}

// connect waits for a NATS that is not there yet. It returns nil and nil when ctx ends.
func (w *works) connect(ctx context.Context, cfg config.NATS) (*bus.Conn, error) {
	for said := false; ; {
		conn, err := bus.Connect(ctx, cfg, bus.Options{Name: name, Background: true}, w.log)
		switch {
		case ctx.Err() != nil:
			if conn != nil {
				conn.Close()
			}
			return nil, nil
		case err == nil:
			return conn, nil
		case cfg.URL != "" || !errors.Is(err, fs.ErrNotExist):
			return nil, err
		}
		// The embedded server makes its files when it starts for the first time, which may be now.
		if !said {
			w.log.Info("waiting for the embedded nats of oom-tracer", "error", err)
			said = true
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return nil, nil
		}
	}
}
