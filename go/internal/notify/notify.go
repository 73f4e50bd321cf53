// Package notify sends messages about kills and gaps to receivers: Slack, Alertmanager, or any server that takes JSON.
//
// Rule of the package: a message of the stream is acknowledged when every receiver took it or it was given up, and what is given up is
// counted and logged. So each receiver gets each kill at least once.
package notify

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// maxHeld bounds the kills and gaps that are in memory until they are sent. Those above wait in the stream.
const maxHeld = 5000

// maxMessage is larger than any kill or gap: five paths of at most 4 KiB, which JSON may make six times as long.
const maxMessage = 256 << 10

// lookupTime bounds the attempts to read an outcome while NATS does not answer.
const lookupTime = 30 * time.Second

// item is a kill or a gap on its way to the receivers.
type item struct {
	kill    *event.Event
	outcome *event.Outcome // nil: not known
	gap     *event.Gap
	time    time.Time // of the kill, or when the gap was found; not after stored
	stored  time.Time // by the server's clock
	left    atomic.Int32
	finish  func() // called when the last receiver is done with it
}

// done is called once by each receiver.
func (i *item) done() {
	if i.left.Add(-1) == 0 {
		i.finish()
	}
}

// read reads a message of the stream. Its node must be that of the subject, for which the server let the publisher publish. It returns nil
// for a gap in which nothing is missing.
func read(m bus.Stored) (*item, error) {
	kind, _, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		return nil, err
	}
	if len(m.Data) > maxMessage {
		return nil, fmt.Errorf("message has %d bytes, the maximum is %d", len(m.Data), maxMessage)
	}
	i, named := &item{stored: m.Time}, ""
	switch kind {
	case event.KindKill:
		var e event.Event
		e, err = event.Parse(m.Data)
		i.kill, i.time, named = &e, e.Time, e.Node.Name
	case event.KindGap:
		var g event.Gap
		g, err = event.ParseGap(m.Data)
		i.gap, i.time, named = &g, g.Time, g.Node.Name
	default:
		err = fmt.Errorf("kind %s is neither kill nor gap", kind)
	}
	switch {
	case err != nil:
		return nil, err
	case named != node:
		return nil, fmt.Errorf("node.name is %.300q, but the subject's node is %q", named, node)
	case i.gap != nil && !i.gap.Missing():
		return nil, nil
	}
	if i.time.After(m.Time) { // the clock of the node is ahead
		i.time = m.Time
	}
	return i, nil
}

// notifier hands the messages of the stream to the receivers.
type notifier struct {
	cfg       config.Notify
	receivers []*receiver
	// last reads the last message on a subject of the stream; see bus.Conn.Last.
	last    func(ctx context.Context, subject string) ([]byte, error)
	held    chan struct{} // holds a token for each item in memory
	metrics *metrics
	log     *slog.Logger
	tooOld  sync.Once
}

// handle processes a message of the stream. It returns before the message is acknowledged.
func (n *notifier) handle(ctx context.Context, d *bus.Delivery) {
	i, err := read(d.Stored)
	switch {
	case err != nil:
		n.metrics.malformed.Inc()
		n.log.Warn("message refused", "seq", d.Seq, "subject", d.Subject, "id", d.ID, "error", err)
		d.Term("malformed")
		return
	case i == nil:
		d.Ack()
		return
	case time.Since(i.stored) > n.cfg.MaxAge:
		for _, r := range n.receivers {
			n.metrics.givenUp.WithLabelValues(r.name, reasonTooOld).Inc()
		}
		n.tooOld.Do(func() {
			n.log.Warn("kills or gaps are older than notify.max_age, no message is sent about them", "max_age", n.cfg.MaxAge, "first", i.stored)
		})
		d.Ack()
		return
	}
	select {
	case n.held <- struct{}{}:
	case <-ctx.Done(): // the next process gets it
		return
	}
	if i.kill != nil {
		i.outcome = n.outcome(ctx, i)
	}
	if ctx.Err() != nil {
		return
	}
	i.left.Store(int32(len(n.receivers)))
	i.finish = func() {
		d.Ack()
		<-n.held
	}
	for _, r := range n.receivers {
		r.add(i)
	}
}

// outcome waits for the outcome of a kill. It returns nil if there is none in time.
func (n *notifier) outcome(ctx context.Context, i *item) *event.Outcome {
	e := i.kill
	subject, err := event.OutcomeSubject(e.ID, event.StageAnnotate, e.Node.Name)
	if err != nil {
		return nil // no ID of ours
	}
	until := time.Now().Add(lookupTime)
	for wait := 250 * time.Millisecond; ctx.Err() == nil; wait = min(2*wait, 2*time.Second) {
		data, err := n.last(ctx, subject)
		left := time.Until(until)
		switch {
		case err == nil:
			// On a NATS without accounts anybody could have stored something there.
			if o, err := event.ParseOutcome(data); err == nil && o.Kill == e.ID && o.Node == e.Node.Name {
				return &o
			}
			return nil
		case errors.Is(err, bus.ErrNoMessage):
			left = n.cfg.WaitForOutcome - time.Since(i.stored)
		case left <= 0:
			n.log.Warn("could not read the outcome of the kill, the message does not name its pod", "id", e.ID, "error", err)
		}
		if left <= 0 {
			return nil
		}
		select {
		case <-time.After(min(wait, left)):
		case <-ctx.Done():
		}
	}
	return nil
}
