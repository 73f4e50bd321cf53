package bus_test

import (
	"context"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
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
	if got, want := config().Subjects, []string{"oom.v1.outcome.>", "oom.v1.exiting.>", "oom.v1.kill.>", "oom.v1.gap.>", "oom.v1.neighbours.>"}; !slices.Equal(got, want) {
		t.Errorf("subjects are %q, want %q", got, want)
	}
	operators.Subjects = []string{"oom.*.kill.>", "oom.*.exiting.>", "oom.*.outcome.>", "oom.*.gap.>", "oom.*.neighbours.>"}
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
	h := c.Check(ctx)
	if !h.Connected || !h.JetStream || h.Stream || !errors.Is(h.Err, jetstream.ErrStreamNotFound) {
		t.Errorf("without a stream: %+v", h)
	}
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	if h := c.Check(ctx); h != (bus.Health{Connected: true, JetStream: true, Stream: true}) {
		t.Errorf("with everything: %+v", h)
	}

	d := startNatsd(t, "accounts { A { users: [ { user: a, password: b } ] } }\nno_auth_user: a")
	c = connect(ctx, t, d.owner(), bus.Options{}, quiet())
	h = c.Check(ctx)
	if !h.Connected || h.JetStream || h.Stream {
		t.Errorf("without JetStream: %+v", h)
	}
	wantError(t, h.Err, "check jetstream", "not enabled")
	wantError(t, bus.EnsureStreams(ctx, c, streamConfig), "not enabled")
}
