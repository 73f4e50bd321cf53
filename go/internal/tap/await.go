package tap

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
	outcome  bool            // is awaited too
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
		err := each(ctx, conn, bus.TailOptions{Subjects: []string{"oom.v1." + string(event.KindKill) + ".>", "oom.v1." + string(event.KindOutcome) + ".>"}, Since: from, Follow: true}, stderr, func(_ bus.Stored, r message) error {
			if w.take(&r) {
				fmt.Fprintln(stdout, r.line(&text.Table{}))
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

// take takes a message, and reports whether it is new and of the pod.
func (w *waiting) take(r *message) bool {
	switch {
	case r.outcome != nil:
		ours := r.outcome.Stage == event.StageAnnotate && w.kills[r.outcome.Kill]
		if ours {
			w.outcomes[r.outcome.Kill] = true
		}
		return ours
	case w.kills[r.id]:
		return false
	case r.kill.Container == nil || r.kill.Container.PodUID != w.uid:
		w.others++
		return false
	}
	w.kills[r.id] = true
	return true
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
