package tap

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// message is a message of a stream: what one of the pointers points to.
type message struct {
	id, node   string
	kill       *event.Event // or a task that was already exiting
	outcome    *event.Outcome
	gap        *event.Gap
	neighbours *event.Neighbours
	eviction   *event.Eviction
	status     *event.NodeStatus
}

// read reads a message. Its node must be that of the subject, for which the server let the publisher publish: one node's
// tracer must not report kills of another.
func read(m bus.Stored) (message, error) {
	kind, _, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		return message{}, err
	}
	r, named := message{node: node}, ""
	switch kind {
	case event.KindOutcome:
		o, wrong := event.ParseOutcome(m.Data)
		r.outcome, r.id, named, err = &o, o.ID, o.Node, wrong
	case event.KindGap:
		g, wrong := event.ParseGap(m.Data)
		r.gap, r.id, named, err = &g, g.ID, g.Node.Name, wrong
	case event.KindNeighbours:
		n, wrong := event.ParseNeighbours(m.Data)
		r.neighbours, r.id, named, err = &n, n.ID, n.Node.Name, wrong
	case event.KindEviction:
		e, wrong := event.ParseEviction(m.Data)
		r.eviction, r.id, named, err = &e, e.ID, e.Node, wrong
	case event.KindNode:
		s, wrong := event.ParseNodeStatus(m.Data)
		r.status, r.id, named, err = &s, s.ID, s.Node.Name, wrong
	default:
		e, wrong := event.Parse(m.Data)
		r.kill, r.id, named, err = &e, e.ID, e.Node.Name, wrong
	}
	if err == nil && named != node {
		err = fmt.Errorf("node is %q, the subject's node %q", named, node)
	}
	return r, err
}

// line is the message as a line of the table. It is empty where there is nothing to show.
func (m *message) line(table *text.Table) string {
	switch {
	case m.outcome != nil:
		return table.OutcomeLine(nil, m.outcome)
	case m.gap != nil && !m.gap.Missing():
		return ""
	case m.gap != nil:
		return table.GapLine(m.gap)
	case m.neighbours != nil:
		return table.NeighboursLine(m.neighbours)
	case m.eviction != nil:
		return table.EvictionLine(m.eviction)
	}
	return table.Line(m.kill)
}

// each calls do with each message of a stream, in its order. A message that cannot be read is reported and skipped. An error of do
// ends the reading.
func each(ctx context.Context, conn *bus.Conn, t bus.TailOptions, stderr io.Writer, do func(bus.Stored, message) error) error {
	take := func(m bus.Stored, r message, err error) error {
		if err != nil {
			fmt.Fprintf(stderr, "oom-tap: message %d on %s skipped: %s\n", m.Seq, text.Printable(m.Subject), text.Printable(err.Error()))
			return nil
		}
		return do(m, r)
	}
	if !t.Follow {
		return inBatches(ctx, conn, t, take)
	}
	return bus.Tail(ctx, conn, t, func(m bus.Stored) error {
		r, err := read(m)
		return take(m, r, err)
	})
}

const (
	batchSize  = 64 // messages
	maxBatches = 8  // that wait
	readers    = 2  // more than these, and the server is what takes the time
)

// batch is some messages, and what was read of each once done is closed.
type batch struct {
	stored []bus.Stored
	read   []message
	errs   []error
	done   chan struct{}
}

// inBatches has messages fetched, read and taken at the same time.
func inBatches(ctx context.Context, conn *bus.Conn, t bus.TailOptions, take func(bus.Stored, message, error) error) error {
	toRead, toTake := make(chan *batch, maxBatches), make(chan *batch, maxBatches)
	for range readers {
		go func() {
			for b := range toRead {
				for i, m := range b.stored {
					b.read[i], b.errs[i] = read(m)
				}
				close(b.done)
			}
		}()
	}
	var failure error // once stopped is closed
	stopped, taken := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(taken)
		for b := range toTake {
			<-b.done
			for i := 0; i < len(b.stored) && failure == nil; i++ {
				if failure = take(b.stored[i], b.read[i], b.errs[i]); failure == nil && ctx.Err() != nil {
					failure = fmt.Errorf("tail stream %s: %w", cmp.Or(t.Stream, event.StreamName), context.Cause(ctx))
				}
				if failure != nil {
					close(stopped)
				}
			}
		}
	}()
	var stored []bus.Stored
	send := func() {
		b := &batch{stored, make([]message, len(stored)), make([]error, len(stored)), make(chan struct{})}
		stored = nil
		toTake <- b
		toRead <- b
	}
	err := bus.Tail(ctx, conn, t, func(m bus.Stored) error {
		select {
		case <-stopped:
			return failure
		default:
		}
		if stored = append(stored, m); len(stored) == batchSize {
			send()
		}
		return nil
	})
	send()
	close(toRead)
	close(toTake)
	<-taken
	return cmp.Or(failure, err)
}

// errEnough ends a command with success: --count is reached, or the reader of the output (head, grep -m) has exited.
var errEnough = errors.New("enough")

// printer writes messages to standard output, as lines of its table or as JSON.
type printer struct {
	out            io.Writer
	table          text.Table
	json, terminal bool
	printed, count int // count 0: no limit
}

func newPrinter(out io.Writer, o options) *printer {
	file, ok := out.(*os.File)
	if ok {
		info, err := file.Stat()
		ok = err == nil && info.Mode()&os.ModeCharDevice != 0
	}
	plain := os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb"
	return &printer{
		out: out, json: o.output == "json", terminal: ok, count: o.count,
		table: text.Table{Color: o.color == "always" || o.color == "auto" && ok && !plain},
	}
}

// print writes a message: its line, or its data. An empty line is not written.
func (p *printer) print(line string, data []byte) error {
	out := []byte(line)
	switch {
	case p.json && p.terminal:
		out = text.JSON(data)
	case p.json:
		out = oneLine(data)
	case line == "":
		return nil
	}
	switch _, err := fmt.Fprintf(p.out, "%s\n", out); {
	case errors.Is(err, syscall.EPIPE):
		return errEnough
	case err != nil:
		return fmt.Errorf("write: %w", err)
	}
	if p.printed++; p.printed == p.count {
		return errEnough
	}
	return nil
}

// oneLine is the stored bytes, unless somebody else published JSON of several lines.
func oneLine(data []byte) []byte {
	var compact bytes.Buffer
	if !bytes.ContainsAny(data, "\r\n") || json.Compact(&compact, data) != nil {
		return data
	}
	return compact.Bytes()
}
