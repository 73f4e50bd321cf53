package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"syscall"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const (
	// maxKills is how many kills are kept for their outcomes.
	maxKills = 10_000
	// outcomeWait is how long a kill waits for its outcome before it is shown without one.
	outcomeWait = 5 * time.Second
)

// killed is a kill that the stream has shown.
type killed struct {
	event  *event.Event // nil once it was shown with an outcome
	raw    []byte
	stored time.Time // by the server's clock
	shown  bool      // without an outcome
}

// joiner joins kills with their outcomes, which come some time later in the stream.
type joiner struct {
	o        options
	table    *text.Table
	stdout   io.Writer
	terminal bool

	mu    sync.Mutex
	seen  *recent
	kills map[string]*killed // by ID
	order []string           // of kills
	next  int                // of order: the first that may have to be shown without an outcome
	shown int

	last time.Time // when the newest message was stored
	came time.Time // when it came here
}

// take takes a kill or an outcome, in the stream's order.
func (j *joiner) take(m bus.Stored) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.last, j.came = m.Time, time.Now()
	if err := j.overdue(m.Time); err != nil {
		return err
	}
	kind, _, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		return err
	}
	switch kind {
	case event.KindKill:
		e, err := event.Parse(m.Data)
		if err == nil {
			err = sameNode(e.Node.Name, node)
		}
		if err == nil && j.seen.add(e.ID) {
			err = j.wait(e.ID, &killed{event: &e, raw: m.Data, stored: m.Time})
		}
		return err
	case event.KindOutcome:
		o, err := event.ParseOutcome(m.Data)
		if err == nil && o.Node != node {
			err = fmt.Errorf("node is %q, the subject's node %q", o.Node, node)
		}
		if err != nil {
			return err
		}
		k := j.kills[o.Kill]
		if !j.seen.add(o.ID) {
			return nil
		}
		if k == nil {
			k = &killed{}
			// The scope of an outcome is its kill's, and this kill is of another one, or of before --since.
			if len(j.o.scopes) > 0 {
				return nil
			}
		}
		e, raw := k.event, k.raw
		k.event, k.raw = nil, nil
		if !j.wanted(&o) {
			return nil
		}
		return j.print(e, &o, raw, m.Data)
	}
	shownAs, id, err := parse(m, j.table)
	if err != nil || !j.seen.add(id) {
		return err
	}
	return j.line([]byte(shownAs), m.Data)
}

// wait keeps a kill. If that is one too many, the oldest is dropped, and shown if it had no outcome.
func (j *joiner) wait(id string, k *killed) error {
	j.kills[id] = k
	if j.order = append(j.order, id); len(j.order) <= maxKills {
		return nil
	}
	oldest := j.kills[j.order[0]]
	delete(j.kills, j.order[0])
	j.order = j.order[1:]
	if j.next > 0 {
		j.next--
		return nil
	}
	return j.without(oldest)
}

// overdue shows the kills that have waited too long for an outcome, at a time of the server's clock. With --no-follow they
// are shown at the end.
func (j *joiner) overdue(now time.Time) error {
	for ; !j.o.noFollow && j.next < len(j.order); j.next++ {
		k := j.kills[j.order[j.next]]
		if now.Sub(k.stored) <= outcomeWait {
			return nil
		}
		if err := j.without(k); err != nil {
			j.next++
			return err
		}
	}
	return nil
}

// idle calls overdue while no message comes.
func (j *joiner) idle() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.last.IsZero() {
		return nil
	}
	return j.overdue(j.last.Add(time.Since(j.came)))
}

// rest shows all kills that have no outcome.
func (j *joiner) rest() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for ; j.next < len(j.order); j.next++ {
		if err := j.without(j.kills[j.order[j.next]]); err != nil {
			return err
		}
	}
	return nil
}

// without shows a kill that has no outcome. Its pod is not known yet, so it may be of the pod that is asked for, unless it was
// outside of all pods.
func (j *joiner) without(k *killed) error {
	if k.event == nil || k.shown || k.event.Container == nil && j.o.ofPods() {
		return nil
	}
	k.shown = true
	return j.print(k.event, nil, k.raw, nil)
}

// wanted reports whether the flags select an outcome.
func (j *joiner) wanted(o *event.Outcome) bool {
	return !j.o.ofPods() || o.Pod != nil && (j.o.namespace == "" || o.Pod.Namespace == j.o.namespace) && (j.o.pod == "" || o.Pod.Name == j.o.pod)
}

// print writes a kill and its outcome as one line. Either may be unknown.
func (j *joiner) print(e *event.Event, o *event.Outcome, kill, outcome []byte) error {
	if j.o.output != "json" {
		return j.line([]byte(j.table.OutcomeLine(e, o)), nil)
	}
	null := []byte("null")
	if kill == nil {
		kill = null
	}
	if outcome == nil {
		outcome = null
	}
	var both bytes.Buffer
	fmt.Fprintf(&both, `{"kill":%s,"outcome":%s}`, kill, outcome)
	return j.line(nil, both.Bytes())
}

func (j *joiner) line(line, data []byte) error {
	if j.o.output == "json" {
		line = rendered(data, j.terminal)
	}
	switch _, err := fmt.Fprintf(j.stdout, "%s\n", line); {
	case errors.Is(err, syscall.EPIPE):
		return errEnough
	case err != nil:
		return writeError{fmt.Errorf("write: %w", err)}
	}
	if j.shown++; j.shown == j.o.count {
		return errEnough
	}
	return nil
}

// writeError ends the tail; other errors are about one message.
type writeError struct{ error }

// outcomes prints kills with their outcomes; see tail.
func outcomes(ctx context.Context, conn *bus.Conn, o options, t bus.TailOptions, table *text.Table, stdout, stderr io.Writer) error {
	j := &joiner{o: o, table: table, stdout: stdout, terminal: isTerminal(stdout), seen: newRecent(4 * maxKills), kills: map[string]*killed{}}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			if !conn.Connected() {
				continue // the outcomes may be there
			}
			if err := j.idle(); err != nil {
				cancel(err)
				return
			}
		}
	}()
	err := bus.Tail(ctx, conn, t, func(m bus.Stored) error {
		err := j.take(m)
		var write writeError
		switch {
		case errors.Is(err, errEnough), errors.As(err, &write):
			return err
		case err != nil:
			skip(stderr, m, err)
		}
		return nil
	})
	cause := context.Cause(ctx)
	cancel(nil)
	<-ended
	var write writeError
	if errors.Is(cause, errEnough) || errors.As(cause, &write) {
		return cause
	}
	if err == nil && o.noFollow {
		err = j.rest()
	}
	return err
}
