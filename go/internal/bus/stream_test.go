package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

func TestEnsureStream(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	log, logged := newLog(t)
	c := connect(ctx, t, d.owner(), bus.Options{}, log)
	config := func() jetstream.StreamConfig {
		t.Helper()
		s, err := c.JetStream().Stream(ctx, event.StreamName)
		check(t, err)
		return s.CachedInfo().Config
	}

	// Several owners at once.
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if err := bus.EnsureStreams(ctx, c, streamConfig); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got := config()
	if got.Storage != jetstream.FileStorage || got.Retention != jetstream.LimitsPolicy || got.Discard != jetstream.DiscardOld ||
		got.MaxAge != streamConfig.MaxAge || got.MaxBytes != int64(streamConfig.MaxBytes) || got.Replicas != 1 ||
		got.Duplicates != streamConfig.DedupWindow || !slices.Equal(got.Subjects, event.StreamSubjects()) {
		t.Errorf("stream is %+v", got)
	}

	// Once more: nothing happens.
	before := logged.String()
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	if logged.String() != before {
		t.Errorf("something was done: %s", strings.TrimPrefix(logged.String(), before))
	}

	// Other settings, and an operator's own ones, which stay.
	operators := config()
	operators.Description, operators.Compression = "kills", jetstream.S2Compression
	operators.Subjects = append(slices.Clone(operators.Subjects), "oom.v1.later.>")
	_, err := c.JetStream().UpdateStream(ctx, operators)
	check(t, err)
	other := streamConfig
	other.MaxAge, other.MaxBytes, other.DedupWindow = 30*time.Minute, 1<<20, time.Minute
	check(t, bus.EnsureStreams(ctx, c, other))
	got = config()
	if got.MaxAge != other.MaxAge || got.MaxBytes != 1<<20 || got.Duplicates != time.Minute {
		t.Errorf("stream is %+v", got)
	}
	if got.Description != "kills" || got.Compression != jetstream.S2Compression || !slices.Equal(got.Subjects, operators.Subjects) {
		t.Errorf("the operator's settings are gone: %+v", got)
	}

	// A wider subject of the operator's covers ours, a narrower one gives way.
	operators = config()
	operators.Subjects = []string{"oom.v1.kill.global.*", "oom.v1.outcome.>", "oom.v1.exiting.>", "oom.v1.gap.*.*"}
	_, err = c.JetStream().UpdateStream(ctx, operators)
	check(t, err)
	check(t, bus.EnsureStreams(ctx, c, other))
	if got, want := config().Subjects, []string{"oom.v1.outcome.>", "oom.v1.exiting.>", "oom.v1.kill.>", "oom.v1.gap.>", "oom.v1.neighbours.>", "oom.v1.eviction.>"}; !slices.Equal(got, want) {
		t.Errorf("subjects are %q, want %q", got, want)
	}
	operators.Subjects = []string{"oom.*.kill.>", "oom.*.exiting.>", "oom.*.outcome.>", "oom.*.gap.>", "oom.*.neighbours.>", "oom.*.eviction.>"}
	_, err = c.JetStream().UpdateStream(ctx, operators)
	check(t, err)
	check(t, bus.EnsureStreams(ctx, c, other))
	if got := config().Subjects; !slices.Equal(got, operators.Subjects) {
		t.Errorf("subjects are %q", got)
	}

	// Of each node the last status is kept.
	s, err := c.JetStream().Stream(ctx, event.NodesStreamName)
	check(t, err)
	if nodes := s.CachedInfo().Config; nodes.MaxMsgsPerSubject != 1 || !slices.Equal(nodes.Subjects, event.NodesStreamSubjects()) ||
		nodes.Storage != jetstream.FileStorage || nodes.MaxAge != other.MaxAge {
		t.Errorf("the nodes' stream is %+v", nodes)
	}

	// What the server refuses.
	three := other
	three.Replicas = 3
	wantError(t, bus.EnsureStreams(ctx, c, three), "ensure stream OOM", "update", "replicas")

	// What cannot be mended.
	keepAccount(ctx, t, c)
	remake := func(s jetstream.StreamConfig) {
		t.Helper()
		check(t, c.JetStream().DeleteStream(ctx, event.StreamName))
		_, err := c.JetStream().CreateStream(ctx, s)
		check(t, err)
	}
	remake(jetstream.StreamConfig{Name: event.StreamName, Subjects: event.StreamSubjects(), Storage: jetstream.MemoryStorage, Retention: jetstream.WorkQueuePolicy, NoAck: true})
	wantError(t, bus.EnsureStreams(ctx, c, streamConfig), "back it up and delete it", "Memory, not file", "WorkQueue, not limits", "no_ack is true")

	// Another stream has the subjects.
	check(t, c.JetStream().DeleteStream(ctx, event.StreamName))
	check(t, c.JetStream().DeleteStream(ctx, event.NodesStreamName))
	_, err = c.JetStream().CreateStream(ctx, jetstream.StreamConfig{Name: "OTHER", Subjects: []string{"oom.>"}})
	check(t, err)
	wantError(t, bus.EnsureStreams(ctx, c, streamConfig), "ensure stream OOM", "create", "subjects overlap")
}

// keepAccount makes another stream. When the last stream of an account is deleted, nats-server 2.15.2
// removes the account's directory some time later, and a stream made in between fails.
func keepAccount(ctx context.Context, t *testing.T, c *bus.Conn) {
	t.Helper()
	_, err := c.JetStream().CreateStream(ctx, jetstream.StreamConfig{Name: "KEEP", Subjects: []string{"keep"}})
	check(t, err)
}

func TestCheck(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	c := connect(ctx, t, cfg, bus.Options{}, quiet())
	if enabled, err := c.Check(ctx); !enabled || !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("without a stream: %t, %v", enabled, err)
	}
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	if enabled, err := c.Check(ctx); !enabled || err != nil {
		t.Errorf("with everything: %t, %v", enabled, err)
	}

	d := startNatsd(t, "accounts { A { users: [ { user: a, password: b } ] } }\nno_auth_user: a")
	c = connect(ctx, t, d.owner(), bus.Options{}, quiet())
	enabled, err := c.Check(ctx)
	if enabled {
		t.Error("JetStream is enabled")
	}
	wantError(t, err, "check jetstream", "not enabled")
	wantError(t, bus.EnsureStreams(ctx, c, streamConfig), "not enabled")
}

// The next message on a subject, from a sequence on.
func TestNext(t *testing.T) {
	ctx := begin(t)
	log, _ := newLog(t)
	c := connect(ctx, t, startNatsd(t, "").owner(), bus.Options{}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	for n, subject := range []string{"oom.v1.kill.global.a", "oom.v1.kill.global.b", "oom.v1.kill.global.a", "oom.v1.kill.global.b"} {
		_, err := c.JetStream().Publish(ctx, subject, fmt.Append(nil, n+1))
		check(t, err)
	}
	for from, want := range map[uint64]string{0: "1 1", 1: "1 1", 2: "3 3", 3: "3 3", 4: "0 "} {
		data, seq, err := c.Next(ctx, "oom.v1.kill.global.a", from)
		if got := fmt.Sprintf("%d %s", seq, data); got != want || (err != nil) != (seq == 0) {
			t.Errorf("from %d: %s, %v, want %s", from, got, err, want)
		}
	}
}

func TestHeldLost(t *testing.T) {
	at := time.Now()
	ago := func(d time.Duration) time.Time { return at.Add(-d) }
	cfg := config.Stream{MaxAge: time.Hour, MaxBytes: 1 << 20}
	before := bus.Held{FirstSeq: 11, FirstTime: ago(50 * time.Minute), LastSeq: 30, LastTime: ago(10 * time.Minute), Bytes: 1 << 10}
	with := func(h bus.Held, change func(*bus.Held)) bus.Held { change(&h); return h }
	for name, tt := range map[string]struct {
		before, now bus.Held
		want        uint64
	}{
		"the same":                 {before, before, 0},
		"more":                     {before, with(before, func(h *bus.Held) { h.LastSeq = 40 }), 0},
		"was empty":                {bus.Held{FirstSeq: 31, LastSeq: 30}, bus.Held{FirstSeq: 31, LastSeq: 30}, 0},
		"was new":                  {bus.Held{}, before, 0},
		"made anew":                {before, bus.Held{}, 20},
		"made anew, and used":      {before, bus.Held{FirstSeq: 1, LastSeq: 3}, 20},
		"its end":                  {before, with(before, func(h *bus.Held) { h.LastSeq = 25 }), 5},
		"its middle":               {before, with(before, func(h *bus.Held) { h.Deleted = 4 }), 4},
		"its middle, as before":    {with(before, func(h *bus.Held) { h.Deleted = 4 }), with(before, func(h *bus.Held) { h.Deleted = 4 }), 0},
		"its beginning":            {before, with(before, func(h *bus.Held) { h.FirstSeq = 14 }), 3},
		"all":                      {before, with(before, func(h *bus.Held) { h.FirstSeq = 31 }), 20},
		"all, then more":           {before, with(before, func(h *bus.Held) { h.FirstSeq, h.LastSeq = 31, 33 }), 20},
		"its beginning may be old": {with(before, func(h *bus.Held) { h.FirstTime = ago(2 * time.Hour) }), with(before, func(h *bus.Held) { h.FirstSeq = 14 }), 0},
		"all, though not all old":  {with(before, func(h *bus.Held) { h.FirstTime = ago(2 * time.Hour) }), with(before, func(h *bus.Held) { h.FirstSeq = 31 }), 20},
		"all is old": {with(before, func(h *bus.Held) { h.FirstTime, h.LastTime = ago(2*time.Hour), ago(time.Hour) }),
			with(before, func(h *bus.Held) { h.FirstSeq = 31 }), 0},
		"it was full": {with(before, func(h *bus.Held) { h.Bytes = 1<<19 + 1 }), with(before, func(h *bus.Held) { h.FirstSeq = 14 }), 0},
	} {
		if got := tt.before.Lost(tt.now, cfg, at); got != tt.want {
			t.Errorf("%s: %d, want %d", name, got, tt.want)
		}
	}
}

// What expires is not lost; what somebody purges is.
func TestHeld(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	log, _ := newLog(t)
	c := connect(ctx, t, d.owner(), bus.Options{}, log)
	cfg := streamConfig
	cfg.MaxAge, cfg.DedupWindow = 2*time.Second, time.Second
	check(t, bus.EnsureStreams(ctx, c, cfg))
	fill := func() bus.Held {
		t.Helper()
		for range 3 {
			_, err := c.JetStream().Publish(ctx, "oom.v1.kill.global.n", []byte("{}"))
			check(t, err)
		}
		held, err := c.Held(ctx)
		check(t, err)
		return held
	}
	before := fill()
	if before.FirstSeq != 1 || before.LastSeq != 3 || before.FirstTime.IsZero() || before.LastTime.Before(before.FirstTime) || before.Bytes == 0 {
		t.Fatalf("%+v", before)
	}
	for {
		held, err := c.Held(ctx)
		check(t, err)
		if lost := before.Lost(held, cfg, time.Now()); lost > 0 {
			t.Fatalf("%d lost: %+v", lost, held)
		}
		if held.FirstSeq == 4 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	before = fill()
	s, err := c.JetStream().Stream(ctx, event.StreamName)
	check(t, err)
	check(t, s.Purge(ctx))
	held, err := c.Held(ctx)
	check(t, err)
	if lost := before.Lost(held, cfg, before.LastTime); lost != 3 {
		t.Errorf("%d lost: %+v", lost, held)
	}
}
