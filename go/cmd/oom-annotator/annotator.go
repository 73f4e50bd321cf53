package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"runtime/debug"
	"runtime/metrics"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/annotate"
	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/decide"
	"github.com/oom-tracer/oom-tracer/go/internal/evictions"
	"github.com/oom-tracer/oom-tracer/go/internal/kubeevents"
	"github.com/oom-tracer/oom-tracer/go/internal/lifecycle"
	"github.com/oom-tracer/oom-tracer/go/internal/mark"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// name is the name of the durable consumer, which all replicas share, and of the connection.
const name = "oom-annotator"

// maxOutcomes is how many outcomes may wait until they are published. The kills above are delivered again a second later.
const maxOutcomes = 16 * bus.Window

// A shutdown takes at most five seconds. The consumer takes 2 s of them, and then:
const (
	drainTime = 1500 * time.Millisecond // to publish outcomes and ack their messages
	closeTime = 500 * time.Millisecond  // to close the connection, and for the rest
)

// run works until ctx ends, or NATS' connection is closed permanently.
func run(ctx context.Context, cfg config.Config, log *slog.Logger) error {
	api, err := pods.Config(cfg.Annotator.Kubeconfig)
	if err != nil {
		return err
	}
	client, err := pods.NewClient(api, name+"/"+obs.Version().Version, cfg.Annotator.QPS, cfg.Annotator.Burst)
	if err != nil {
		return err
	}
	terms := decide.Terms(&cfg)
	store := pods.NewStore(cfg.Policy.MaxEventAge + cfg.Annotator.WaitForPod)
	watcher := pods.NewWatcher(client, store, terms, log)
	marker := &mark.Marker{Policy: cfg.Policy, Terms: terms, API: client, Patched: store.Patched, Now: time.Now}
	tracker := &lifecycle.Tracker{
		Lifetime: cfg.Policy.MarkLifetime, Retention: 2*cfg.Policy.MarkLifetime + cfg.Policy.MaxEventAge,
		Pods: store, Marker: marker, Events: client.Events, Log: log, Now: time.Now,
	}
	store.OnLeave = tracker.PodLeft
	registry := obs.NewRegistry(name)
	counters := annotate.NewMetrics(registry, cfg.Annotator.WorkloadMetrics)
	events := kubeevents.NewRecorder(client, hostname(), log, registry)
	evicted := evictions.New(registry, cfg.NATS.Stream.MaxAge, log)
	store.OnLowMemory = evicted.Add
	w := &worker{
		log: log, watcher: watcher, tracker: tracker, evictions: evicted, registry: registry,
		annotator: &annotate.Annotator{
			Policy: cfg.Policy, Wait: cfg.Annotator.WaitForPod, Finder: store, Stale: watcher.Failing, InFlight: annotate.NewInFlight(cfg.Annotator.Workers),
			Marker: marker, Outcomes: &annotate.Outcomes{Metrics: counters, Log: log}, Metrics: counters, Log: log, Now: time.Now,
		},
	}
	ready := w.register(store)
	server, err := obs.Listen(cfg.Annotator.Listen, registry, obs.Checks{Ready: ready}, log)
	if err != nil {
		return fmt.Errorf("serve metrics: %w", err)
	}

	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	downstream, stop := context.WithCancel(context.WithoutCancel(ctx))
	defer stop()
	var rest sync.WaitGroup
	rest.Go(func() {
		boundMemory(downstream, watcher.Synced())
		if os.Getenv("GOGC") == "" {
			tuneGC(downstream)
		}
	})
	rest.Go(func() { watcher.Run(downstream) })
	rest.Go(func() {
		if err := server.Serve(downstream); err != nil {
			cancel(err)
		}
	})
	if cfg.Annotator.Events {
		w.events = events
		rest.Go(func() { events.Run(downstream) })
	}
	err = w.run(ctx, cfg)
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		err = errors.Join(err, cause)
	}
	stop()
	bounded(rest.Wait)
	log.Info("stopped")
	return err
}

// register registers the metrics of the worker, and returns the checks of /readyz.
func (w *worker) register(store *pods.Store) map[string]obs.Check {
	register := promauto.With(w.registry)
	register.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "oom_tracer_known_pods", Help: "Number of pods of the cluster that the annotator follows.",
	}, func() float64 { return float64(store.Len()) })
	register.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "oom_tracer_kills_waiting", Help: "Number of OOM kills in the stream that no annotator had received when this one last received a kill, plus those that it works on.",
	}, func() float64 { return float64(w.waiting()) })
	register.NewCounterFunc(prometheus.CounterOpts{
		Name: "oom_tracer_pod_watch_errors_total", Help: "Number of failed attempts to list or watch the pods of the cluster.",
	}, func() float64 { return float64(w.watcher.Errors()) })
	return obs.ReadyChecks(w.registry, "pods (all pods are known and followed), nats (kills can be read and outcomes stored).",
		map[string]func() error{"pods": w.watcher.Failing, "nats": w.natsFailing})
}

// listMemory is the memory limit while all pods are read: 150,000 of them take some 60 MB, and reading them allocates ten times as
// much. In a larger cluster Go collects garbage in half of the time until all are read.
const listMemory = 88 << 20

// boundMemory bounds the memory until all pods are read, or ctx ends.
func boundMemory(ctx context.Context, synced <-chan struct{}) {
	before := debug.SetMemoryLimit(-1)
	debug.SetMemoryLimit(min(before, listMemory))
	defer debug.SetMemoryLimit(before)
	defer debug.SetGCPercent(debug.SetGCPercent(200)) // the limit above suffices while there are few pods
	select {
	case <-synced:
	case <-ctx.Done():
	}
}

// tuneGC has garbage grow to minGarbage, or to half of the memory in use if that is more, until ctx ends. In a small cluster, half of the
// memory in use is so little that a third of the CPU time of a kill would be the garbage collector's.
func tuneGC(ctx context.Context) {
	const minGarbage = 16 << 20
	live := []metrics.Sample{{Name: "/gc/heap/live:bytes"}}
	for {
		metrics.Read(live)
		debug.SetGCPercent(int(max(50, min(100*minGarbage/max(live[0].Value.Uint64(), 1), 400))))
		select {
		case <-time.After(10 * time.Second):
		case <-ctx.Done():
			return
		}
	}
}

// hostname names this process where several run.
func hostname() string {
	host, err := os.Hostname()
	if err != nil {
		return name
	}
	return host
}

// bounded waits for act for at most closeTime.
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

// worker consumes kills from NATS.
type worker struct {
	log       *slog.Logger
	watcher   *pods.Watcher
	tracker   *lifecycle.Tracker
	evictions *evictions.Publisher
	registry  prometheus.Registerer
	annotator *annotate.Annotator
	events    *kubeevents.Recorder // nil: no Events are written

	mu        sync.Mutex
	conn      *bus.Conn // nil until connected
	publisher *bus.Publisher
	consumer  *bus.Consumer
}

// natsFailing returns why kills cannot be read or outcomes not be stored now.
func (w *worker) natsFailing() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	switch {
	case w.conn == nil || !w.conn.Connected():
		return bus.ErrDisconnected
	case w.consumer == nil:
		return errors.New("waiting for the list of pods before consuming kills")
	}
	return errors.Join(w.consumer.Failing(), w.publisher.Failing())
}

// waiting is how many kills wait for their outcome.
func (w *worker) waiting() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.consumer == nil {
		return 0
	}
	return w.consumer.Waiting()
}

// run consumes kills until ctx ends.
func (w *worker) run(ctx context.Context, cfg config.Config) error {
	conn, err := w.connect(ctx, cfg.NATS)
	if err != nil || conn == nil {
		return err
	}
	defer bounded(conn.Close) // it may wait for a server that does not answer
	a := w.annotator
	publisher, err := bus.NewPublisher(conn, maxOutcomes, a.Outcomes.Hooks(), w.log)
	if err != nil {
		return fmt.Errorf("make the publisher: %w", err)
	}
	ledger := &budget.Ledger{Entry: conn.KVEntry(budget.Key), Limits: cfg.Policy.Budgets, Keep: cfg.Policy.MaxEventAge, Now: time.Now}
	a.Marker.Ledger = ledger
	a.Outcomes.Publisher, a.Outcomes.Last = publisher, conn.Last
	consumer, err := bus.NewConsumer(conn, bus.ConsumeOptions{
		Name: name, Subjects: []string{"oom.v1." + string(event.KindKill) + ".>"},
		// At most QueueFactor+1 times Workers use the API server or wait for it. The rest is for the other kills.
		Workers: (annotate.QueueFactor + 2) * cfg.Annotator.Workers,
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
	budgets := &budgetCollector{conn: conn, ledger: ledger, log: w.log, begun: time.Now()}
	w.registry.MustRegister(budgets)
	go func() { _, _ = budgets.read(ctx) }() // for the log
	// Before the pods are listed, every pod would look like one that does not exist.
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
	var tracking, enriching sync.WaitGroup
	w.evictions.Store = conn.PublishOnce
	tracking.Go(func() { w.evictions.Run(ctx) })
	w.tracker.Annotated, w.tracker.Publish = a.Outcomes.Find, a.Outcomes.Publish
	tracking.Go(func() { w.tracker.Run(ctx, conn.Outcomes) })
	if w.events != nil {
		enricher := kubeevents.NewEnricher(w.events, w.log)
		enricher.Next, enricher.Find, enricher.Publish = conn.Next, a.Finder.Find, a.Outcomes.Publish
		a.Events = enricher
		enriching.Go(func() { enricher.Run(downstream) })
	}
	err = consumer.Run(ctx, func(ctx context.Context, d *bus.Delivery) {
		a.Handle(ctx, annotate.Message{Stored: d.Stored, Acker: d, Attempt: d.Attempt})
	})
	bounded(tracking.Wait)
	draining, drained := context.WithTimeout(downstream, drainTime)
	defer drained()
	if left, err := publisher.Drain(draining); left > 0 {
		w.log.Warn("not every outcome is published, another replica decides again", "left", left, "error", err)
	}
	if n := consumer.Release(); n > 0 {
		w.log.Info("kills returned to the stream", "count", n)
	}
	stop()
	bounded(enriching.Wait)
	return errors.Join(err, <-published)
}

// connect waits for a NATS that is not there yet. It returns nil and nil when ctx ends.
func (w *worker) connect(ctx context.Context, cfg config.NATS) (*bus.Conn, error) {
	for logged := false; ; {
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
		// The embedded server creates its files when it starts for the first time, which may be now.
		if !logged {
			w.log.Info("waiting for the embedded nats of oom-tracer", "error", err)
			logged = true
		}
		select {
		case <-time.After(500 * time.Millisecond):
		case <-ctx.Done():
			return nil, nil
		}
	}
}
