package bus

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// The bounds of a consumer.
const (
	// ackWait is after what silence the server hands a message to somebody else. Who still works on one
	// says so three times as often.
	ackWait = 30 * time.Second
	// maxUndecided is how many messages may be neither settled nor given back for good. Those that wait
	// for another attempt count: where so many wait, what they wait for is broken, and pulling more helps
	// nobody.
	maxUndecided = 20_000
	// Retry's bounds. Below the lower one a message that always fails would spin.
	retryMin = 100 * time.Millisecond
	retryMax = time.Minute
	// handlerGrace is how long handlers may go on when it is time to end, giveBackTime how long it takes to
	// return what was pulled and not handled.
	handlerGrace = 1500 * time.Millisecond
	giveBackTime = 500 * time.Millisecond
)

// ConsumeOptions say what to consume.
type ConsumeOptions struct {
	// Name is that of the durable consumer. All that consume under one name share the messages.
	Name string
	// Subjects are subject patterns that do not overlap.
	Subjects []string
	// Workers is how many messages are handled at once, at least 1.
	Workers int
}

// Delivery is a message that must be settled, once, by Ack, Retry or Term. Until then the server is told
// that it is worked on, also after its handler has returned.
type Delivery struct {
	Stored
	// Attempt counts from 1.
	Attempt uint64

	consumer *Consumer
	msg      jetstream.Msg
}

// Consumer hands the messages of [event.StreamName] to a function, each until it is settled, across
// reconnects and restarts of the server. The place is kept on the server, so that another process goes on
// where this one ends.
//
// A message may come again after it was settled, when word of that is lost. It does not come twice at a
// time to one Consumer.
type Consumer struct {
	conn *Conn
	o    ConsumeOptions

	mu        sync.Mutex
	undecided map[uint64]*Delivery // by Stored.Seq
	behind    uint64               // messages that the server had still to deliver with the last one
	failing   error
	consumed  bool  // there was a stream to consume
	unsettled error // why nothing can be settled
}

// NewConsumer makes a consumer. Nothing is asked of the server before Run.
func NewConsumer(c *Conn, o ConsumeOptions) (*Consumer, error) {
	if o.Name == "" || strings.ContainsAny(o.Name, " .*>/\\\t\r\n") || o.Workers < 1 {
		return nil, fmt.Errorf("make consumer %q: it needs a name without dots and wildcards, and at least one worker", o.Name)
	}
	return &Consumer{conn: c, o: o, undecided: map[uint64]*Delivery{}, failing: errors.New("not begun")}, nil
}

// Failing is why nothing can be consumed or settled now, and nil when it can.
func (c *Consumer) Failing() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.failing == nil {
		return c.unsettled
	}
	return c.failing
}

// Waiting is how many messages are not settled here, and how many the server had still to deliver with the last one. Those that
// were given back, to come again, do not count.
func (c *Consumer) Waiting() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.undecided) + int(c.behind)
}

func (c *Consumer) setFailing(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.failing = err
	c.consumed = c.consumed || err == nil
}

// report logs why consuming fails, once. A stream that was not made yet is no fault: on a first install its owner
// may come later.
func (c *Consumer) report(err error) {
	c.mu.Lock()
	consumed := c.consumed
	c.mu.Unlock()
	if !consumed && errors.Is(err, jetstream.ErrStreamNotFound) {
		if c.conn.isNews("waiting for " + event.StreamName) {
			c.conn.log.Info("waiting for the stream, which oom-tap setup makes", "consumer", c.o.Name, "stream", event.StreamName)
		}
		return
	}
	c.conn.once("consume"+err.Error(), "consuming is interrupted, will go on", "consumer", c.o.Name, "stream", event.StreamName, "error", err)
}

func (c *Consumer) setUnsettled(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.unsettled = err
}

// Run consumes until ctx ends, and returns nil then. Handlers have a moment more before their own context
// ends. It waits for a server, a stream and permissions that are not there yet, and fails only when the
// connection is closed for good.
//
// What was handled and not settled when it returns is Release's.
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
	c.setFailing(errors.New("ended"))
	return err
}

// sessions makes one attempt after the other to consume.
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
		c.setFailing(err)
		c.report(err)
		failures++
		pause := time.NewTimer(backoff(failures))
		select {
		case <-pause.C:
		case <-ctx.Done():
		}
		pause.Stop()
	}
}

// session consumes for as long as one connection, and the consumer on the server, last.
func (c *Consumer) session(ctx, link context.Context, work chan<- *Delivery) error {
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	defer context.AfterFunc(link, func() { cut(context.Cause(link)) })()
	// Without this a consumer that it is forbidden to pull from would look like an idle one, and where it is
	// forbidden to settle, each message would come again and again.
	c.setUnsettled(nil)
	defer c.conn.watch(func(d denial) {
		if strings.HasPrefix(d.subject, "$JS.ACK."+event.StreamName+".") {
			c.setUnsettled(fmt.Errorf("settle: %w", d.err))
		}
		if d.subscribe && strings.HasPrefix(d.subject, c.conn.inbox+".") || strings.HasPrefix(d.subject, "$JS.API.CONSUMER.MSG.NEXT."+event.StreamName+".") {
			cut(d.err)
		}
	})()
	err := c.pull(ctx, work)
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

func (c *Consumer) pull(ctx context.Context, work chan<- *Delivery) error {
	cfg := jetstream.ConsumerConfig{
		Durable:        c.o.Name,
		DeliverPolicy:  jetstream.DeliverAllPolicy,
		AckPolicy:      jetstream.AckExplicitPolicy,
		AckWait:        ackWait,
		MaxDeliver:     -1, // whoever consumes decides when to give up, and says so
		MaxAckPending:  maxUndecided,
		FilterSubjects: c.o.Subjects,
	}
	if len(c.o.Subjects) == 1 {
		// Puts the filter into the request's subject, where permissions can see it.
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
	defer c.giveBack(messages)
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
			d.Retry(0)
			return nil
		}
	}
}

// giveBack returns what was pulled and not looked at, so that nobody need wait for ackWait.
func (c *Consumer) giveBack(messages jetstream.MessagesContext) {
	messages.Drain()
	ctx, cancel := context.WithTimeout(context.Background(), giveBackTime)
	defer cancel()
	for {
		m, err := messages.Next(jetstream.NextContext(ctx))
		if err != nil {
			messages.Stop()
			return
		}
		if err := m.Nak(); err != nil {
			c.conn.log.Debug("message cannot be given back, it comes again later", "error", plain(err))
		}
	}
}

// take makes a Delivery of a message, none where it is being worked on already: word of that did not
// reach the server in time.
func (c *Consumer) take(m jetstream.Msg) (*Delivery, error) {
	meta, err := m.Metadata()
	if err != nil {
		return nil, err
	}
	d := &Delivery{
		Stored: Stored{
			ID:      m.Headers().Get(jetstream.MsgIDHeader),
			Subject: m.Subject(),
			Data:    m.Data(),
			Seq:     meta.Sequence.Stream,
			Time:    meta.Timestamp,
		},
		Attempt:  meta.NumDelivered,
		consumer: c,
		msg:      m,
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.behind = meta.NumPending
	if before, ok := c.undecided[d.Seq]; ok {
		if before.Time.Equal(d.Time) {
			return nil, nil
		}
		// The stream was made anew, and counts again.
	}
	c.undecided[d.Seq] = d
	return d, nil
}

// keep tells the server of what is being worked on.
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
				c.conn.log.Debug("cannot say that a message is worked on", "seq", d.Seq, "error", plain(err))
			}
		}
	}
}

// open lists what is not settled.
func (c *Consumer) open() []*Delivery {
	c.mu.Lock()
	defer c.mu.Unlock()
	all := make([]*Delivery, 0, len(c.undecided))
	for _, d := range c.undecided {
		all = append(all, d)
	}
	return all
}

// Release gives back what is not settled, for others to go on with at once. Call it when Run has returned.
func (c *Consumer) Release() (count int) {
	for _, d := range c.open() {
		d.Retry(0)
		count++
	}
	return count
}

// Ack settles the message: it is done with.
func (d *Delivery) Ack() { d.settle("ack", d.msg.Ack) }

// Term settles the message: it can never be done with. The server publishes the reason as an advisory.
func (d *Delivery) Term(reason string) {
	d.settle("term", func() error { return d.msg.TermWithReason(reason) })
}

// Retry settles this attempt: the message comes again, here or elsewhere, after about that time, which is
// held within 100 ms and a minute.
func (d *Delivery) Retry(after time.Duration) {
	d.settle("nak", func() error { return d.msg.NakWithDelay(min(max(after, retryMin), retryMax)) })
}

func (d *Delivery) settle(act string, say func() error) {
	c := d.consumer
	c.mu.Lock()
	open := c.undecided[d.Seq] == d
	if open {
		delete(c.undecided, d.Seq)
	}
	c.mu.Unlock()
	if !open {
		return
	}
	// Where it does not arrive the message comes again, which whoever consumes must bear anyway.
	if err := say(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
		c.conn.log.Debug("message cannot be settled, it comes again later", "act", act, "seq", d.Seq, "error", plain(err))
	}
}
