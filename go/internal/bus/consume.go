package bus

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
)

const (
	// ackWait is after how long without a word the server delivers a message to another consumer. Messages that are being
	// processed are reported as in progress three times as often.
	ackWait = 30 * time.Second
	// maxAckPending bounds the messages without ack. Those that wait for a redelivery count: if so many wait, what they wait for
	// is broken, and pulling more does not help.
	maxAckPending = 20_000
	// The bounds of Nak's delay. Below the lower one, a message that always fails would loop.
	nakMin = 100 * time.Millisecond
	nakMax = time.Minute
	// At shutdown handlers have handlerGrace to finish. Messages that were not handled are returned within returnTime.
	handlerGrace = 1500 * time.Millisecond
	returnTime   = 500 * time.Millisecond
	// maxFinished is how many acknowledged messages are known: what waited here longer than ackWait is delivered again.
	maxFinished = 4096
)

// ConsumeOptions configure a consumer.
type ConsumeOptions struct {
	Name     string   // the name of the durable consumer. Processes that use the same name share the messages
	Subjects []string // subject patterns that do not overlap
	Workers  int      // how many messages are handled at once, at least 1
}

// Delivery is a delivery of a message. Ack, Nak or Term must be called once. Until then the message is reported as in
// progress, also after its handler has returned.
type Delivery struct {
	Stored
	Attempt uint64 // from 1

	consumer *Consumer
	msg      jetstream.Msg
}

// Consumer calls a function with the messages of [event.StreamName], each until it is acknowledged, across reconnects and
// restarts of the server. The server keeps the position, so that another process continues where this one ends.
//
// One Consumer never has two deliveries of a message at a time. A message that is delivered again after its ack is acknowledged again. It is
// handled again only if another process gets it, or maxFinished others were acknowledged since.
type Consumer struct {
	conn *Conn
	o    ConsumeOptions

	mu         sync.Mutex
	pending    map[uint64]*Delivery // without ack, by Stored.Seq
	finished   map[uint64]time.Time // the last ones with ack: Stored.Time by Stored.Seq
	order      []uint64             // the keys of finished, the oldest first
	numPending uint64               // messages that the server had not delivered yet, at the last delivery
	failing    error
	consumed   bool  // the stream existed
	ackErr     error // why acks are refused
}

// NewConsumer makes a consumer. Nothing is requested from the server before Run.
func NewConsumer(c *Conn, o ConsumeOptions) (*Consumer, error) {
	if o.Name == "" || strings.ContainsAny(o.Name, " .*>/\\\t\r\n") || o.Workers < 1 {
		return nil, fmt.Errorf("make consumer %q: the name must have no dots, spaces or wildcards, and at least one worker is needed", o.Name)
	}
	return &Consumer{conn: c, o: o, pending: map[uint64]*Delivery{}, finished: map[uint64]time.Time{}, failing: errors.New("not started")}, nil
}

// Failing returns why messages cannot be consumed or acknowledged now, and nil if they can.
func (c *Consumer) Failing() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return cmp.Or(c.failing, c.ackErr)
}

// Waiting is how many messages are in progress here, plus how many the server had not delivered yet at the last delivery. Those
// that wait for a redelivery do not count.
func (c *Consumer) Waiting() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.pending) + int(c.numPending)
}

// setFailing reports whether consuming has ever worked.
func (c *Consumer) setFailing(err error) (consumed bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failing = err
	c.consumed = c.consumed || err == nil
	return c.consumed
}

// failed notes and logs once why consuming fails. On a first install, the stream may not be there yet: oom-tap setup runs later.
func (c *Consumer) failed(err error) {
	if !c.setFailing(err) && errors.Is(err, jetstream.ErrStreamNotFound) {
		c.conn.once(slog.LevelInfo, "waiting", "waiting for the stream, oom-tap setup creates it", "consumer", c.o.Name, "stream", event.StreamName)
		return
	}
	c.conn.once(slog.LevelWarn, "consume"+err.Error(), "consuming is interrupted, will try again", "consumer", c.o.Name, "stream", event.StreamName, "error", err)
}

func (c *Consumer) setAckErr(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ackErr = err
}

// Run consumes until ctx ends, and returns nil then. The context of the handlers ends a moment later. It waits for servers,
// streams and permissions, and fails only if the connection is closed permanently. Call Release after it.
func (c *Consumer) Run(ctx context.Context, handle func(context.Context, *Delivery)) error {
	handling, cut := context.WithCancel(context.WithoutCancel(ctx))
	defer cut()
	work := make(chan *Delivery)
	var workers sync.WaitGroup
	for range c.o.Workers {
		workers.Go(func() {
			for d := range work {
				handle(handling, d)
			}
		})
	}
	alive, stop := context.WithCancel(context.WithoutCancel(ctx))
	var keeper sync.WaitGroup
	keeper.Go(func() { c.keep(alive) })

	err := c.sessions(ctx, work)
	close(work)
	grace := time.AfterFunc(handlerGrace, cut)
	workers.Wait()
	grace.Stop()
	stop()
	keeper.Wait()
	c.setFailing(errors.New("stopped"))
	return err
}

func (c *Consumer) sessions(ctx context.Context, work chan<- *Delivery) error {
	failures := 0
	for {
		link, err := c.conn.connected(ctx)
		if err == nil {
			began := time.Now()
			err = c.session(ctx, link, work)
			if time.Since(began) > backoffMax {
				failures = 0
			}
		}
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrClosed):
			return fmt.Errorf("consume %s: %w", c.o.Name, err)
		}
		c.failed(err)
		failures++
		sleep(ctx, backoff(failures))
	}
}

// session consumes until the connection or the consumer on the server ends.
func (c *Consumer) session(ctx, link context.Context, work chan<- *Delivery) error {
	// NATS reports missing permissions asynchronously. Without this, a consumer that may not pull would look idle, and one
	// that may not ack would receive every message again and again.
	c.setAckErr(nil)
	defer c.conn.watch(func(d denial) {
		if strings.HasPrefix(d.subject, "$JS.ACK."+event.StreamName+".") {
			c.setAckErr(fmt.Errorf("ack: %w", d.err))
		}
	})()
	return c.conn.guarded(ctx, link, "$JS.API.CONSUMER.MSG.NEXT."+event.StreamName+".", func(ctx context.Context) error {
		return c.pull(ctx, work)
	})
}

func (c *Consumer) pull(ctx context.Context, work chan<- *Delivery) error {
	cfg := jetstream.ConsumerConfig{
		Durable:        c.o.Name,
		DeliverPolicy:  jetstream.DeliverAllPolicy,
		AckPolicy:      jetstream.AckExplicitPolicy,
		AckWait:        ackWait,
		MaxDeliver:     -1, // the handler decides when to give up, and publishes that
		MaxAckPending:  maxAckPending,
		FilterSubjects: c.o.Subjects,
	}
	if len(c.o.Subjects) == 1 {
		// The filter becomes part of the request's subject, where permissions apply to it.
		cfg.FilterSubject, cfg.FilterSubjects = c.o.Subjects[0], nil
	}
	var consumer jetstream.Consumer
	if err := c.conn.call(ctx, "$JS.API.CONSUMER.CREATE."+event.StreamName, func(ctx context.Context) (err error) {
		consumer, err = c.conn.js.CreateOrUpdateConsumer(ctx, event.StreamName, cfg)
		return err
	}); err != nil {
		return fmt.Errorf("make consumer: %w", err)
	}
	messages, err := consumer.Messages(jetstream.PullMaxMessages(2*c.o.Workers), jetstream.PullHeartbeat(requestTimeout))
	if err != nil {
		return fmt.Errorf("pull: %w", err)
	}
	defer c.returnPulled(messages)
	c.setFailing(nil)
	for {
		m, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			return fmt.Errorf("pull: %w", err)
		}
		d, err := c.take(m)
		if err != nil {
			return fmt.Errorf("pull: %w", err)
		}
		if d == nil {
			continue
		}
		select {
		case work <- d:
		case <-ctx.Done():
			d.Nak(0)
			return context.Cause(ctx)
		}
	}
}

// returnPulled returns the messages that were pulled and not handled, so that nobody has to wait for ackWait.
func (c *Consumer) returnPulled(messages jetstream.MessagesContext) {
	messages.Drain()
	ctx, cancel := context.WithTimeout(context.Background(), returnTime)
	defer cancel()
	for {
		m, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			messages.Stop()
			return
		}
		if err := m.Nak(); err != nil {
			c.conn.log.Debug("could not return a message, it is delivered again later", "error", plain(err))
		}
	}
}

// take makes a Delivery of a message: nil if it is in progress here, or was acknowledged and the server did not know.
func (c *Consumer) take(m jetstream.Msg) (*Delivery, error) {
	meta, err := m.Metadata()
	if err != nil {
		return nil, err
	}
	d := &Delivery{Stored: delivered(m, meta), Attempt: meta.NumDelivered, consumer: c, msg: m}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.numPending = meta.NumPending
	// A stream that was created again begins with the same sequences, at another time.
	if before, ok := c.pending[d.Seq]; ok && before.Time.Equal(d.Time) {
		return nil, nil
	}
	if stored, ok := c.finished[d.Seq]; ok && stored.Equal(d.Time) {
		return nil, m.Ack()
	}
	c.pending[d.Seq] = d
	return d, nil
}

func (c *Consumer) keep(ctx context.Context) {
	tick := time.NewTicker(ackWait / 3)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
		if !c.conn.Connected() {
			continue
		}
		for _, d := range c.open() {
			if err := d.msg.InProgress(); err != nil {
				c.conn.log.Debug("could not report a message as in progress", "seq", d.Seq, "error", plain(err))
			}
		}
	}
}

func (c *Consumer) open() []*Delivery {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Collect(maps.Values(c.pending))
}

// Release returns the deliveries without ack, so that other replicas receive them at once. Call it when Run has returned.
func (c *Consumer) Release() (count int) {
	open := c.open()
	for _, d := range open {
		d.Nak(0)
	}
	return len(open)
}

// Ack acknowledges the message: it is processed.
func (d *Delivery) Ack() { d.finish("ack", d.msg.Ack) }

// Term ends the message: it can never be processed. The server publishes the reason as an advisory.
func (d *Delivery) Term(reason string) {
	d.finish("term", func() error { return d.msg.TermWithReason(reason) })
}

// Nak has the message delivered again, here or to another replica, after a delay between 100 ms and a minute.
func (d *Delivery) Nak(delay time.Duration) {
	d.finish("nak", func() error { return d.msg.NakWithDelay(min(max(delay, nakMin), nakMax)) })
}

func (d *Delivery) finish(kind string, send func() error) {
	c := d.consumer
	c.mu.Lock()
	open := c.pending[d.Seq] == d
	if open {
		delete(c.pending, d.Seq)
		if kind != "nak" {
			c.finished[d.Seq], c.order = d.Time, append(c.order, d.Seq)
		}
		if len(c.order) > maxFinished {
			delete(c.finished, c.order[0])
			c.order = c.order[1:]
		}
	}
	c.mu.Unlock()
	if !open {
		return
	}
	// If the ack is lost the message is delivered again, which every handler must expect.
	if err := send(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
		c.conn.log.Debug("could not acknowledge a message, it is delivered again later", "kind", kind, "seq", d.Seq, "error", plain(err))
	}
}
