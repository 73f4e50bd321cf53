package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// victimMax is how much victim allocates at most: a container that has no limit after all must not take its node's memory.
const victimMax = 128 << 20

// victim uses up the memory limit of its container, once: it writes a file, and the next run, which finds the file, does
// nothing. It ends with an error if nobody kills it.
func victim(name string, stdout io.Writer) error {
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, os.ErrExist) {
		fmt.Fprintf(stdout, "killed before: %s exists\n", name)
		return nil
	}
	if err != nil {
		return fmt.Errorf("write the file of the victim: %w", err)
	}
	if err := file.Close(); err != nil {
		return fmt.Errorf("write the file of the victim: %w", err)
	}
	memory := make([]byte, victimMax) // of the kernel, page by page as it is written to
	for i := 0; i < len(memory); i += os.Getpagesize() {
		memory[i] = 1
	}
	return fmt.Errorf("still alive with %d MiB: this container has no memory limit below that, or a swap", victimMax>>20)
}

// waiting is what await has seen.
type waiting struct {
	uid      string
	outcome  bool // is waited for as well
	table    text.Table
	kills    map[string]bool // of the pod, by ID
	others   int             // kills of other pods
	outcomes map[string]bool
	failing  error // the last time that the stream could not be read
}

// await waits for the kill of a pod to be published, and with --outcome for what oom-annotator made of it. It fails when
// that did not come in time, and says what did.
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
			fmt.Fprintf(stdout, "ok: pod %s was killed, and that came back after %s\n", text.Printable(o.podUID), time.Since(began).Round(time.Millisecond))
			return nil
		}
		if ctx.Err() != nil {
			if !conn.Connected() {
				w.failing = bus.ErrDisconnected
			}
			return w.missing(time.Since(began))
		}
		// NATS or the stream may come later.
		w.failing = err
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
		}
	}
}

// take reads a message, and returns a line where it is news of the pod.
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

// done tells whether all came that is waited for.
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
		return fmt.Errorf("the kill was published, but no outcome of it within %s: see whether oom-annotator is ready, and its log", waited)
	}
	err := fmt.Errorf("no kill of pod %s was published within %s (%d kills of other pods were): see whether oom-tracer is ready on the pod's node, and its log",
		text.Printable(w.uid), waited, w.others)
	if w.failing != nil {
		err = fmt.Errorf("%w; the last error: %w", err, w.failing)
	}
	return err
}
