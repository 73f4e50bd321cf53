package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/annotate"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/decide"
	"github.com/oom-tracer/oom-tracer/go/internal/fifo"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// listTime bounds the listing of all pods, for explain.
const listTime = 2 * time.Minute

// trialOptions are the flags of explain.
type trialOptions struct {
	since  time.Duration
	node   string
	output string
}

// maxWaiting bounds the kills whose outcomes are waited for. An outcome follows its kill within seconds.
const maxWaiting = 10_000

// tried is a kill with what would become of it, and what did.
type tried struct {
	e          *event.Event
	raw        []byte // for JSON
	would, was *event.Outcome
}

// explain prints what the config would do about the kills of the stream.
func explain(ctx context.Context, cfg config.Config, o trialOptions, log *slog.Logger, stdout, stderr io.Writer) error {
	conn, err := bus.Connect(ctx, cfg.NATS, bus.Options{Name: name + "-explain"}, log)
	if err != nil {
		return err
	}
	defer conn.Close()
	store, err := podsNow(ctx, cfg, log)
	if err != nil {
		return err
	}
	var patterns []string
	for _, kind := range []event.Kind{event.KindKill, event.KindOutcome} {
		pattern, err := event.Filter(kind, "", o.node)
		if err != nil {
			return err
		}
		patterns = append(patterns, pattern)
	}

	var table text.Table
	counts, total := map[string]int{}, 0
	write := func(t *tried) error {
		counts[verdict(t.would)]++
		total++
		line := []byte(explained(&table, t.e, t.would, t.was))
		if o.output == "json" {
			kill := json.RawMessage(t.raw)
			if !json.Valid(kill) {
				kill = nil
			}
			if line, err = json.Marshal(map[string]any{"kill": kill, "would": t.would, "was": t.was}); err != nil {
				return fmt.Errorf("write: %w", err)
			}
		}
		if _, err := fmt.Fprintf(stdout, "%s\n", line); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		return nil
	}
	// An outcome comes after its kill, and other kills in between: at most maxWaiting kills wait, and are written in their order. A kill
	// that comes again is known for as long as it is among the last ones.
	known := fifo.New[*tried](2 * maxWaiting)
	var order []*tried
	flush := func(most int) error {
		for len(order) > most || len(order) > 0 && order[0].was != nil {
			if err := write(order[0]); err != nil {
				return err
			}
			order = order[1:]
		}
		return nil
	}
	dryRun := annotate.DryRun{Policy: cfg.Policy, Finder: store}
	err = bus.Tail(ctx, conn, bus.TailOptions{Subjects: patterns, Since: time.Now().Add(-o.since)}, func(m bus.Stored) error {
		if strings.HasPrefix(m.Subject, "oom.v1."+string(event.KindOutcome)+".") {
			o, err := event.ParseOutcome(m.Data)
			if err != nil || o.Stage != event.StageAnnotate {
				return nil // what is none is no kill's
			}
			if t, ok := known.Get(o.Kill); ok && t.was == nil {
				t.was = &o
			}
			return flush(maxWaiting)
		}
		e, would := dryRun.Decide(&m)
		t := &tried{e: e, would: would}
		if !known.AddNew(would.Kill, t) {
			return nil
		}
		if o.output == "json" {
			t.raw = m.Data
		}
		order = append(order, t)
		return flush(maxWaiting)
	})
	if err == nil {
		err = flush(0)
	}
	switch {
	case errors.Is(err, syscall.EPIPE):
		return nil
	case err != nil:
		return err
	}
	summary := fmt.Sprintf("%d kills within %s; nothing was marked by this. It would be:\n", total, o.since)
	for _, v := range slices.Sorted(maps.Keys(counts)) {
		summary += fmt.Sprintf("%7d  %s\n", counts[v], v)
	}
	fmt.Fprint(stderr, summary)
	return nil
}

// podsNow reads all pods, but not what they were marked for.
func podsNow(ctx context.Context, cfg config.Config, log *slog.Logger) (*pods.Store, error) {
	api, err := pods.Config(cfg.Annotator.Kubeconfig)
	if err != nil {
		return nil, err
	}
	client, err := pods.NewClient(api, name+"-explain/"+obs.Version().Version, cfg.Annotator.QPS, cfg.Annotator.Burst)
	if err != nil {
		return nil, err
	}
	terms := decide.Terms(&cfg)
	terms.Mark, terms.Summary = "", ""
	store := pods.NewStore(0)
	watcher := pods.NewWatcher(client, store, terms, log)
	ctx, cancel := context.WithTimeout(ctx, listTime)
	var running sync.WaitGroup
	running.Go(func() { watcher.Run(ctx) })
	defer running.Wait()
	defer cancel()
	select {
	case <-watcher.Synced():
		return store, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("list pods: %w: %w", context.Cause(ctx), watcher.Failing())
	}
}

// verdict is a result and its reason.
func verdict(o *event.Outcome) string {
	if o.Result == "" {
		return "not known (the pod is gone)"
	}
	return string(o.Result) + " (" + string(o.Reason) + ")"
}

// explained is a kill with what would become of it, and what did where that is something else.
func explained(table *text.Table, e *event.Event, would, was *event.Outcome) string {
	shown := *would
	if shown.Result == "" {
		shown.Result, shown.Reason = "not_known", event.ReasonGone
		if was != nil {
			shown.Pod, shown.Container = was.Pod, was.Container
		}
	}
	line := table.OutcomeLine(e, &shown)
	switch {
	case was == nil:
		line += "  (no outcome so far)"
	case was.Result != would.Result || was.Reason != would.Reason:
		line += "  (was " + text.Printable(verdict(was)) + ")"
	}
	return line
}
