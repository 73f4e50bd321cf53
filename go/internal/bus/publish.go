package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// Window is how many messages are on their way at once, at most: what a publisher is made for where the caller
// keeps what waits. It also bounds what a server in trouble is asked again and again.
const Window = 256

// refusedTime is how long a message may be refused while others are stored: then it is given up.
const refusedTime = 10 * time.Minute

// ErrFull is returned by Enqueue when as many messages wait as the publisher was made for.
var ErrFull = errors.New("publish buffer is full")

// Msg is a message for a stream. Nobody may change Data after Enqueue.
type Msg struct {
	// ID becomes Nats-Msg-Id: the stream stores one message per ID within its dedup window, so a second attempt is harmless.
	ID      string
	Subject string
	Data    []byte
	Once    bool      // has the stream store m only while it holds no message on Subject, which must then be m's alone
	Tag     any       // the caller's own. It comes back in the hooks
	Expires time.Time // when failed attempts become final, unless the connection failed; zero: never

	refused time.Time // since when it is
	settled bool      // stored or given up
}

// NATS returns m with its headers: the message ID, and those of a CloudEvent.
func (m *Msg) NATS() *nats.Msg {
	header := nats.Header(event.CloudEvent(m.Subject, m.ID))
	if header == nil {
		header = nats.Header{}
	}
	header.Set(jetstream.MsgIDHeader, m.ID)
	return &nats.Msg{Subject: m.Subject, Header: header, Data: m.Data}
}

// Hooks are called by the goroutine in Run or Drain, one at a time, and hold up publishing. Any of them may be nil.
type Hooks struct {
	OnAck   func(m Msg, duplicate bool) // called when the stream has stored m, or, with duplicate set, says that it had before
	OnRetry func(m Msg, err error)      // called when an attempt to publish m failed. It will be made again
	// OnDrop is called when m can never be stored, and is given up. What it returns, if anything, takes m's place.
	OnDrop func(m Msg, err error) *Msg
}

// Publisher publishes to JetStream in the order of Enqueue, and repeats what was not acknowledged until it is; that may be
// stored after later messages: order is by event.Event's Seq. Its methods may be called from any goroutine.
type Publisher struct {
	conn     *Conn
	js       jetstream.JetStream
	capacity int
	hooks    Hooks
	log      *slog.Logger

	running chan struct{} // holds a token while somebody runs the loop
	wake    chan struct{} // holds a token when there is something new to see

	mu         sync.Mutex
	queue      []*Msg // settled ones leave it at the end of their round
	pending    int    // what is in the queue and not settled
	closing    bool
	failing    error
	complained bool // about failing, in the log

	// Of the goroutine that publishes.
	window   int           // messages of a round: fewer where acknowledgements come late
	stored   time.Time     // when a message was, last
	patience time.Duration // refusedTime, but for tests

	acked atomic.Uint64
}

// NewPublisher makes a publisher on which at most capacity messages (at least 1) wait. Run publishes them.
func NewPublisher(c *Conn, capacity int, hooks Hooks, log *slog.Logger) (*Publisher, error) {
	if capacity < 1 {
		return nil, fmt.Errorf("make publisher: capacity %d is below 1", capacity)
	}
	// An instance of its own: acknowledgements that do not come are forgotten after ackTimeout. The
	// window is kept here; nats.go's own would stall, and then fail, behind those forgotten ones.
	js, err := jetstream.New(c.nc, jetstream.WithPublishAsyncTimeout(ackTimeout), jetstream.WithPublishAsyncMaxPending(1<<20))
	if err != nil {
		return nil, fmt.Errorf("make publisher: %w", err)
	}
	return &Publisher{
		conn: c, js: js, capacity: capacity, hooks: hooks, log: log,
		running: make(chan struct{}, 1), wake: make(chan struct{}, 1),
		window: Window, patience: refusedTime,
	}, nil
}

// Enqueue takes a message over. It never blocks. It fails with ErrFull when the buffer is full; with ErrClosed after
// Drain was called; and when m has no ID or no subject.
func (p *Publisher) Enqueue(m Msg) error {
	if m.ID == "" || m.Subject == "" {
		return fmt.Errorf("enqueue message %q for subject %q: id and subject must not be empty", m.ID, m.Subject)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closing {
		return fmt.Errorf("enqueue message %s: publisher: %w", m.ID, ErrClosed)
	}
	if p.pending >= p.capacity {
		return fmt.Errorf("enqueue message %s: %w", m.ID, ErrFull)
	}
	p.queue = append(p.queue, &m)
	p.pending++
	p.signal()
	return nil
}

func (p *Publisher) signal() {
	select {
	case p.wake <- struct{}{}:
	default:
	}
}

// Pending is how many messages wait or are on their way.
func (p *Publisher) Pending() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pending
}

// Acked is how many messages the stream has stored since the publisher was made, or had before.
func (p *Publisher) Acked() uint64 { return p.acked.Load() }

// Failing is why the last attempt failed, and nil when it did not.
func (p *Publisher) Failing() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.failing
}

// Run publishes until ctx ends or Drain is called, and then returns nil. It fails only when the
// connection is closed for good. What was not acknowledged then stays for Drain, or for another Run.
func (p *Publisher) Run(ctx context.Context) error {
	if err := p.loop(ctx); err != nil && ctx.Err() == nil {
		return fmt.Errorf("publish: %w", err)
	}
	return nil
}

// Drain takes no more messages and publishes what is left, once Run has returned. It returns how many are left when ctx ends
// or the connection is closed for good, and why; 0 and nil: all were stored or dropped.
func (p *Publisher) Drain(ctx context.Context) (left int, err error) {
	p.mu.Lock()
	p.closing = true
	p.mu.Unlock()
	p.signal()
	err = p.loop(ctx)
	if left = p.Pending(); left == 0 {
		return 0, nil
	}
	return left, fmt.Errorf("drain publisher: %d messages left: %w", left, err)
}

// loop publishes, once no other does, until there is nothing left to come, ctx ends or the connection is closed.
func (p *Publisher) loop(ctx context.Context) error {
	select {
	case p.running <- struct{}{}:
		defer func() { <-p.running }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	failures := 0
	for {
		batch, finished := p.batch()
		if finished {
			return nil
		}
		if len(batch) == 0 {
			select {
			case <-p.wake:
				continue
			case <-ctx.Done():
				return context.Cause(ctx)
			}
		}
		// No buffering in the client: what waits, waits here.
		link, err := p.conn.connected(ctx)
		if err != nil {
			return err
		}
		progress, err := p.round(ctx, batch)
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		p.note(err)
		if progress {
			failures = 0
		}
		if err == nil {
			continue
		}
		failures++
		select {
		case <-time.After(backoff(failures)):
		case <-link.Done(): // the next connection deserves a fresh start
			failures = 0
		case <-ctx.Done():
		}
	}
}

// batch returns what to publish next; finished when Drain was called and nothing is left.
func (p *Publisher) batch() (batch []*Msg, finished bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	// A copy: round writes to the queue, and Enqueue may move it.
	return slices.Clone(p.queue[:min(len(p.queue), p.window)]), p.closing && len(p.queue) == 0
}

// round publishes a batch and waits for what becomes of each message. It returns whether any message left
// the queue, and the first failure that calls for another attempt.
func (p *Publisher) round(ctx context.Context, batch []*Msg) (progress bool, failure error) {
	late := false
	defer func() {
		p.mu.Lock()
		p.queue = slices.DeleteFunc(p.queue, func(m *Msg) bool { return m.settled })
		p.mu.Unlock()
		// A server that cannot keep up must not be sent again what it has not come to.
		if late {
			p.window = max(1, p.window/2)
		} else if progress {
			p.window = min(Window, p.window*2)
		}
	}()

	// The server reports a forbidden subject apart from the message, and sends no acknowledgement.
	subjects := map[string]bool{}
	for _, m := range batch {
		subjects[m.Subject] = true
	}
	denials := make(chan denial, len(batch)) // one for each message
	defer p.conn.watch(func(d denial) {
		if d.subscribe || !subjects[d.subject] {
			return
		}
		select {
		case denials <- d:
		default: // of an earlier attempt as well
		}
	})()
	denied := map[string]error{}

	// settle makes room at once: a slow one in the same round must not cost others their place.
	settle := func(m *Msg) {
		p.mu.Lock()
		defer p.mu.Unlock()
		m.settled, progress = true, true
		p.pending--
	}
	ack := func(m *Msg, duplicate bool) {
		settle(m)
		p.stored = time.Now()
		p.acked.Add(1)
		if p.hooks.OnAck != nil {
			p.hooks.OnAck(*m, duplicate)
		}
	}
	drop := func(m *Msg, err error) {
		p.log.Error("message dropped: nats can never store it", "id", m.ID, "subject", m.Subject, "bytes", len(m.Data), "error", err)
		var instead *Msg
		if p.hooks.OnDrop != nil {
			instead = p.hooks.OnDrop(*m, err)
		}
		if instead == nil {
			settle(m)
			return
		}
		*m, progress = *instead, true
	}
	retry := func(m *Msg, err error) {
		switch {
		case !m.Expires.IsZero() && time.Now().After(m.Expires) && !errors.Is(err, ErrDisconnected):
			drop(m, fmt.Errorf("expired: %w", err))
			return
		case p.hopeless(m, err):
			drop(m, fmt.Errorf("refused for %s: %w", p.patience, err))
			return
		}
		if failure == nil {
			failure = fmt.Errorf("publish %s: %w", m.Subject, err)
		}
		if p.hooks.OnRetry != nil {
			p.hooks.OnRetry(*m, err)
		}
	}

	futures := make([]jetstream.PubAckFuture, len(batch))
	for i, m := range batch {
		options := []jetstream.PublishOpt{jetstream.WithRetryAttempts(0)} // retries are ours: nats.go's would overtake each other
		if m.Once {
			options = append(options, jetstream.WithExpectLastSequencePerSubject(0))
		}
		future, err := p.js.PublishMsgAsync(m.NATS(), options...)
		if err == nil {
			futures[i] = future
		} else if permanent(err) {
			drop(m, err)
		} else {
			retry(m, plain(err))
			break // the rest would fail alike, or, worse, overtake this one
		}
	}
	// await returns what the stream says of a message, or why it says nothing.
	await := func(m *Msg, future jetstream.PubAckFuture) (*jetstream.PubAck, error) {
		for {
			select { // what is already here goes before what is said of the subject
			case stored := <-future.Ok():
				return stored, nil
			default:
			}
			if err := denied[m.Subject]; err != nil {
				return nil, err
			}
			select {
			case stored := <-future.Ok():
				return stored, nil
			case err := <-future.Err():
				return nil, err
			case d := <-denials:
				denied[d.subject] = d.err
			case <-ctx.Done():
				return nil, context.Cause(ctx)
			}
		}
	}
	for i, m := range batch {
		if futures[i] == nil {
			continue
		}
		stored, err := await(m, futures[i])
		noReply := p.conn.inboxDenied()
		switch {
		case err == nil:
			ack(m, stored.Duplicate)
		case ctx.Err() != nil:
			return progress, failure
		case m.Once && taken(err):
			ack(m, true)
		case permanent(err):
			drop(m, err)
		case errors.Is(err, jetstream.ErrAsyncPublishTimeout) && noReply != nil:
			retry(m, fmt.Errorf("%w: acknowledgements cannot arrive: %w", err, noReply))
		default:
			late = late || errors.Is(err, jetstream.ErrAsyncPublishTimeout)
			retry(m, plain(err))
		}
	}
	return progress, failure
}

// hopeless: the message was refused for a long time, and it alone, or its like take the room of all others.
func (p *Publisher) hopeless(m *Msg, err error) bool {
	switch {
	case errors.Is(err, ErrDisconnected):
		m.refused = time.Time{}
		return false
	case m.refused.IsZero():
		m.refused = time.Now()
	}
	alone := p.stored.After(m.refused) || errors.Is(err, nats.ErrPermissionViolation) && p.Pending() >= p.capacity
	return alone && time.Since(m.refused) > p.patience
}

// note remembers whether publishing works, and logs a change. Conn logs that the connection is gone.
func (p *Publisher) note(err error) {
	p.mu.Lock()
	before, complained := p.failing, p.complained
	complain := err != nil && !errors.Is(err, ErrDisconnected) && (before == nil || before.Error() != err.Error())
	p.failing, p.complained = err, err != nil && (complained || complain)
	p.mu.Unlock()
	switch {
	case complain:
		p.log.Warn("cannot publish, will retry", "pending", p.Pending(), "error", err)
	case err == nil && complained:
		p.log.Info("publishing works again", "pending", p.Pending())
	}
}

// Error codes of JetStream (server/errors.json) that nats.go has no name for.
const (
	codeStoreFailed        jetstream.ErrorCode = 10077 // with the store's own words
	codeHeaderExceedsLimit jetstream.ErrorCode = 10097
)

// PublishOnce stores m, unless the stream holds a message on m's subject, which must be m's alone. It waits for a connection until ctx
// ends, and makes one attempt. After an error, m may have been stored.
func (c *Conn) PublishOnce(ctx context.Context, m Msg) (duplicate bool, err error) {
	var stored *jetstream.PubAck
	err = c.call(ctx, m.Subject, func(ctx context.Context) (err error) {
		stored, err = c.js.PublishMsg(ctx, m.NATS(), jetstream.WithExpectLastSequencePerSubject(0), jetstream.WithRetryAttempts(0))
		return err
	})
	if err != nil && !taken(err) {
		return false, fmt.Errorf("publish %s: %w", m.Subject, err)
	}
	return err != nil || stored.Duplicate, nil
}

// taken tells whether the stream holds a message on the subject. The server then names its sequence; 0: it could not look. A
// replicated stream names none where another publisher's message is not stored yet, and may never be.
func taken(err error) bool {
	var api *jetstream.APIError
	return errors.As(err, &api) && api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence && !strings.HasSuffix(api.Description, ": 0")
}

// permanent tells errors that the same message always meets from those that pass, or that an operator can mend.
func permanent(err error) bool {
	if errors.Is(err, nats.ErrMaxPayload) || errors.Is(err, nats.ErrBadSubject) || errors.Is(err, jetstream.ErrStreamMessageExceedsMaximum) {
		return true
	}
	var api *jetstream.APIError
	return errors.As(err, &api) && (api.ErrorCode == codeHeaderExceedsLimit ||
		// "maximum bytes exceeded", "no space left on device" and their like pass.
		api.ErrorCode == codeStoreFailed && strings.Contains(api.Description, "message too large"))
}
