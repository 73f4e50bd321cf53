package bus

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// TailOptions say what to read.
type TailOptions struct {
	Stream   string    // the stream's name; empty means [event.StreamName]
	Subjects []string  // subject patterns, see event.Filter; none means everything
	Since    time.Time // when the first message to read was stored, or later; zero means only new ones
	After    uint64    // the sequence after which to begin, in place of Since
	Follow   bool      // continue with new messages; otherwise Tail ends with what was stored when it began
}

// Stored is a message as the stream has it.
type Stored struct {
	ID      string // Nats-Msg-Id; empty when the publisher sent none
	Subject string
	Data    []byte
	Seq     uint64    // the stream's own count, from 1, with holes where Subjects leave some out
	Time    time.Time // when it was stored, by the server's clock
}

func delivered(m jetstream.Msg, meta *jetstream.MsgMetadata) Stored {
	return Stored{m.Headers().Get(jetstream.MsgIDHeader), m.Subject(), m.Data(), meta.Sequence.Stream, meta.Timestamp}
}

// Tail hands what the stream holds to each, one at a time, in order and once, across reconnects and restarts of the server.
//
// With Follow it returns nil when ctx ends; else nil at the end of what was stored, or ctx's error. It returns each's error
// as it is. It fails when there is no stream or the server refuses; once it has begun, it waits for a server that is away.
func Tail(ctx context.Context, c *Conn, o TailOptions, each func(Stored) error) error {
	if o.Stream == "" {
		o.Stream = event.StreamName
	}
	t := &tail{c: c, o: o, each: each}
	failures := 0
	for {
		link, err := c.connected(ctx)
		if err == nil {
			before := t.last
			// Without this a consumer that it is forbidden to read from would look like an idle one.
			err = c.guarded(ctx, link, "$JS.API.CONSUMER.MSG.NEXT."+o.Stream+".", t.read)
			if t.last != before {
				failures = 0
			}
		}
		switch {
		case t.stop != nil, err == nil:
			return t.stop
		case ctx.Err() != nil && o.Follow:
			return nil
		case ctx.Err() != nil:
			return fmt.Errorf("tail stream %s: %w", t.o.Stream, context.Cause(ctx))
		case errors.Is(err, ErrClosed), errors.Is(err, nats.ErrPermissionViolation), !t.began && !errors.Is(err, ErrDisconnected):
			return fmt.Errorf("tail stream %s: %w", t.o.Stream, err)
		}
		c.once(slog.LevelWarn, "tail"+err.Error(), "reading the stream was interrupted, will resume after the last message", "stream", t.o.Stream, "last_seq", t.last, "error", err)
		failures++
		sleep(ctx, backoff(failures))
	}
}

// tail is one call of Tail. nats.go's ordered consumer heeds no context while it seeks a new one for a lost one.
type tail struct {
	c    *Conn
	o    TailOptions
	each func(Stored) error

	began   bool
	created time.Time // which stream of that name it is
	last    uint64    // the last sequence handed over, or the one before the first to read; 0 with Since
	end     uint64    // without Follow: the last sequence to read
	stop    error     // ends it, whatever the connection does
}

// common is the narrowest pattern that takes everything that the others take; empty for none of them. With several the server
// goes through all the subjects of a block for each message (firstMatchingMulti in its filestore.go), and each outcome has one.
func common(patterns []string) string {
	var all []string
	for _, p := range patterns {
		tokens := strings.Split(p, ".")
		if all == nil {
			all = tokens
		}
		last := min(len(all), len(tokens)) - 1
		for i := range all {
			if all[i] == ">" || tokens[i] == ">" || i == last && len(all) != len(tokens) {
				all = append(all[:i:i], ">")
				break
			}
			if all[i] != tokens[i] {
				all[i] = "*"
			}
		}
	}
	return strings.Join(all, ".")
}

// read reads through one consumer. It returns nil at the end of what was to be read.
func (t *tail) read(ctx context.Context) error {
	stream, err := t.c.stream(ctx, t.o.Stream)
	if err != nil {
		return err
	}
	info := stream.CachedInfo()
	switch {
	case !t.began:
		t.created, t.end = info.Created, info.State.LastSeq
		if t.o.After > t.end {
			t.o.After, t.o.Since = 0, time.Unix(0, 0) // it was made anew
		}
		if t.o.After > 0 {
			t.last, t.o.Since = t.o.After, time.Time{}
		} else if t.o.Since.IsZero() {
			// Not DeliverNew: that would mean another moment after a reconnect.
			t.last = info.State.LastSeq
		}
	case !t.created.Equal(info.Created):
		if !t.o.Follow {
			t.stop = fmt.Errorf("tail stream %s: the stream was deleted while it was read", t.o.Stream)
			return t.stop
		}
		t.c.log.Warn("stream was created again, reading it from its start", "stream", t.o.Stream, "last_seq", t.last)
		t.created, t.last, t.o.Since = info.Created, 0, time.Unix(0, 0)
	}

	cfg := jetstream.ConsumerConfig{
		DeliverPolicy:     jetstream.DeliverByStartSequencePolicy,
		OptStartSeq:       t.last + 1,
		AckPolicy:         jetstream.AckNonePolicy,
		FilterSubject:     common(t.o.Subjects),
		MemoryStorage:     true,
		Replicas:          1,
		InactiveThreshold: time.Minute, // the server removes it then; to ask for that would need one more permission
	}
	if !t.o.Follow {
		cfg.InactiveThreshold = 10 * time.Second // who reads often leaves many behind, and a server may bound them
	}
	if t.last == 0 && !t.o.Since.IsZero() {
		cfg.DeliverPolicy, cfg.OptStartSeq, cfg.OptStartTime = jetstream.DeliverByStartTimePolicy, 0, &t.o.Since
	}
	var consumer jetstream.Consumer
	if err := t.c.call(ctx, "$JS.API.CONSUMER.CREATE."+t.o.Stream, func(ctx context.Context) error {
		consumer, err = t.c.js.CreateConsumer(ctx, t.o.Stream, cfg)
		return err
	}); err != nil {
		return fmt.Errorf("create consumer: %w", err)
	}
	t.began = true
	if !t.o.Follow && (t.last >= t.end || consumer.CachedInfo().NumPending == 0) {
		return nil
	}

	messages, err := consumer.Messages(jetstream.PullMaxMessages(512), jetstream.PullHeartbeat(requestTimeout))
	if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	defer messages.Stop()
	for count := uint64(1); ; count++ {
		m, err := messages.Next(jetstream.NextContext(ctx))
		var meta *jetstream.MsgMetadata
		if err == nil {
			meta, err = m.Metadata()
		}
		if err != nil {
			return fmt.Errorf("read: %w", err)
		}
		if meta.Sequence.Consumer != count {
			return fmt.Errorf("read: got message %d of the consumer, want %d", meta.Sequence.Consumer, count)
		}
		if !t.o.Follow && meta.Sequence.Stream > t.end {
			return nil
		}
		if len(t.o.Subjects) < 2 || slices.ContainsFunc(t.o.Subjects, func(s string) bool { return covers(s, m.Subject()) }) {
			if t.stop = t.each(delivered(m, meta)); t.stop != nil {
				return t.stop
			}
		}
		t.last = meta.Sequence.Stream
		if !t.o.Follow && (t.last >= t.end || meta.NumPending == 0) {
			return nil
		}
	}
}
