package bus_test

import (
	"context"
	"fmt"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
)

// What the stream holds is known beyond the time for which the server refuses it, and after the stream was made
// anew.
func TestTold(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	c := connect(ctx, t, d.owner(), bus.Options{}, quiet())
	short := streamConfig
	short.DedupWindow = time.Second
	check(t, bus.EnsureStreams(ctx, c, short))
	store := func(id string) time.Time {
		t.Helper()
		ack, err := c.JetStream().Publish(ctx, "oom.v1.outcome.skipped.node-1", []byte("{}"), jetstream.WithMsgID(id))
		check(t, err)
		s, err := c.JetStream().Stream(ctx, event.StreamName)
		check(t, err)
		m, err := s.GetMsg(ctx, ack.Sequence)
		check(t, err)
		return m.Time
	}
	told := bus.NewTold(c)
	has := func(id string, since time.Time, fresh time.Duration, want bool) {
		t.Helper()
		got, err := told.Has(ctx, id, since, fresh)
		if err != nil || got != want {
			t.Errorf("%s since %s: %t, %v", id, since.Format(time.StampNano), got, err)
		}
	}
	first := store("a")
	time.Sleep(10 * time.Millisecond)
	second := store("b")
	has("b", second, time.Hour, true)
	has("c", second, time.Hour, false)
	// What came before was not read, until that is asked for.
	has("a", second, time.Hour, false)
	has("a", first, time.Hour, true)
	has("b", first, time.Hour, true)
	// What comes is not seen while what is known is fresh enough.
	store("c")
	has("c", first, time.Hour, false)
	has("c", first, 0, true)
	for i := range 300 { // more than one request brings
		store(fmt.Sprint("many-", i))
	}
	has("many-299", first, 0, true)
	has("many-0", first, time.Hour, true)

	check(t, c.JetStream().DeleteStream(ctx, event.StreamName))
	if got, err := told.Has(ctx, "d", first, 0); err == nil {
		t.Errorf("without a stream: %t", got)
	}
	check(t, bus.EnsureStreams(ctx, c, short))
	store("d")
	has("d", first, 0, true)
	has("a", first, 0, true) // it was told, though it is gone

	// A server that is away is no answer.
	d.kill()
	away, cancel := context.WithTimeout(ctx, 500*time.Millisecond)
	defer cancel()
	if got, err := told.Has(away, "a", first, 0); err == nil {
		t.Errorf("without a server: %t", got)
	}
}
