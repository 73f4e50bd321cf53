package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// waiting is what await has received.
type waiting struct {
	uid      string
	outcome  bool // is awaited too
	table    text.Table
	kills    map[string]bool // of the pod, by ID
	others   int             // kills of other pods
	outcomes map[string]bool
	failing  error // the last time that the stream could not be read
}

// await waits until the kill of a pod is published, and with --outcome its outcome. If that does not come in time, the
// error names what did come.
func await(ctx context.Context, conn *bus.Conn, o options, stdout, stderr io.Writer) error {
	w := &waiting{uid: o.podUID, outcome: o.outcome, kills: map[string]bool{}, outcomes: map[string]bool{}}
	began := time.Now()
	from := began.Add(-o.since)
	ctx, cancel := context.WithTimeout(ctx, o.timeout)
	defer cancel()
	for {
		err := bus.Tail(ctx, conn, bus.TailOptions{Subjects: []string{"oom.v1." + string(event.KindKill) + ".>", "oom.v1." + string(event.KindOutcome) + ".>"}, Since: from, Follow: true}, func(m bus.Stored) error {
			line, err := w.take(m)
			if err != nil {
				skip(stderr, m, err)
			}
			if line != "" {
				fmt.Fprintln(stdout, line)
			}
			if w.done() {
				return errEnough
			}
			return nil
		})
		if errors.Is(err, errEnough) {
			fmt.Fprintf(stdout, "ok: pod %s was killed, received from NATS after %s\n", text.Printable(o.podUID), time.Since(began).Round(time.Millisecond))
			return nil
		}
		if ctx.Err() != nil {
			if !conn.Connected() {
				w.failing = bus.ErrDisconnected
			}
			return w.missing(time.Since(began))
		}
		// NATS may start later, and the stream be created later.
		w.failing = err
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

// take reads a message, and returns a line if it is new and of the pod.
func (w *waiting) take(m bus.Stored) (string, error) {
	kind, _, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		return "", err
	}
	if kind == event.KindOutcome {
		o, err := event.ParseOutcome(m.Data)
		if err == nil {
			err = sameNode(o.Node, node)
		}
		if err != nil || o.Stage != event.StageAnnotate {
			return "", err
		}
		if !w.kills[o.Kill] {
			return "", nil
		}
		w.outcomes[o.Kill] = true
		return w.table.OutcomeLine(nil, &o), nil
	}
	e, err := event.Parse(m.Data)
	if err == nil {
		err = sameNode(e.Node.Name, node)
	}
	if err != nil || w.kills[e.ID] {
		return "", err
	}
	if e.Container == nil || e.Container.PodUID != w.uid {
		w.others++
		return "", nil
	}
	w.kills[e.ID] = true
	return w.table.Line(&e), nil
}

// done reports whether all that is awaited came.
func (w *waiting) done() bool {
	for id := range w.kills {
		if w.outcomes[id] || !w.outcome {
			return true
		}
	}
	return false
}

func (w *waiting) missing(waited time.Duration) error {
	waited = waited.Round(time.Second)
	if len(w.kills) > 0 {
		return fmt.Errorf("the kill was published, but not its outcome within %s: check that oom-annotator is ready, and its log", waited)
	}
	err := fmt.Errorf("no kill of pod %s was published within %s (%d kills of other pods were): check that oom-tracer is ready on the pod's node, and its log",
		text.Printable(w.uid), waited, w.others)
	if w.failing != nil {
		err = fmt.Errorf("%w; the last error: %w", err, w.failing)
	}
	return err
}
