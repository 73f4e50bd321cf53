package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"syscall"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// maxWaiting is how many kills are kept for their outcomes.
const maxWaiting = 10_000

// killed is a kill that waits for its outcome.
type killed struct {
	event event.Event
	raw   []byte
}

// joiner puts kills and their outcomes together: in the stream the outcome comes after its kill, some time
// later.
type joiner struct {
	o        options
	table    *text.Table
	stdout   io.Writer
	terminal bool

	seen    *recent
	waiting map[string]killed
	order   []string // of waiting, and of what is no longer in it
	shown   int
}

// take takes a kill or an outcome, in the stream's order.
func (j *joiner) take(m bus.Stored) error {
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
		if err != nil {
			return err
		}
		if j.seen.add(e.ID) {
			j.wait(killed{e, m.Data})
		}
		return nil
	case event.KindOutcome:
		o, err := event.ParseOutcome(m.Data)
		if err == nil && o.Node != node {
			err = fmt.Errorf("node is %q, the subject's node %q", o.Node, node)
		}
		if err != nil {
			return err
		}
		k, known := j.waiting[o.Kill]
		if !j.seen.add(o.ID) || !j.wanted(&o, known) {
			return nil
		}
		delete(j.waiting, o.Kill)
		if !known {
			return j.print(nil, &o, nil, m.Data)
		}
		return j.print(&k.event, &o, k.raw, m.Data)
	}
	shownAs, id, err := parse(m, j.table)
	if err != nil || !j.seen.add(id) {
		return err
	}
	return j.line([]byte(shownAs), m.Data)
}

func (j *joiner) wait(k killed) {
	j.waiting[k.event.ID] = k
	j.order = append(j.order, k.event.ID)
	for len(j.waiting) > maxWaiting || len(j.order) > 2*maxWaiting {
		delete(j.waiting, j.order[0])
		j.order = j.order[1:]
	}
}

// wanted tells whether the flags select an outcome. Its scope is that of its kill.
func (j *joiner) wanted(o *event.Outcome, known bool) bool {
	if !known && len(j.o.scopes) > 0 {
		return false
	}
	if j.o.namespace == "" && j.o.pod == "" {
		return true
	}
	return o.Pod != nil && (j.o.namespace == "" || o.Pod.Namespace == j.o.namespace) && (j.o.pod == "" || o.Pod.Name == j.o.pod)
}

// rest shows the kills that have no outcome.
func (j *joiner) rest() error {
	if j.o.namespace != "" || j.o.pod != "" {
		return nil // nobody has said whose they are
	}
	for _, id := range j.order {
		if k, ok := j.waiting[id]; ok {
			delete(j.waiting, id)
			if err := j.print(&k.event, nil, k.raw, nil); err != nil {
				return err
			}
		}
	}
	return nil
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

// outcomes prints kills with what became of them; see tail.
func outcomes(ctx context.Context, conn *bus.Conn, o options, t bus.TailOptions, table *text.Table, stdout, stderr io.Writer) error {
	j := &joiner{o: o, table: table, stdout: stdout, terminal: isTerminal(stdout), seen: newRecent(2 * maxWaiting), waiting: map[string]killed{}}
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
	if err == nil && o.noFollow {
		err = j.rest()
	}
	return err
}
