package bus_test

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
)

func tell(ctx context.Context, t *testing.T, c *bus.Conn, id string) {
	t.Helper()
	subject, err := event.Subject(event.KindOutcome, "skipped", node)
	check(t, err)
	_, err = c.JetStream().Publish(ctx, subject, []byte("{}"), jetstream.WithMsgID(id))
	check(t, err)
}

func TestTold(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	c := connect(ctx, t, cfg, bus.Options{}, quiet())
	told := bus.NewTold(c)
	has := func(id string, since time.Time, fresh time.Duration, want bool) {
		t.Helper()
		if got, err := told.Has(ctx, id, since, fresh); err != nil || got != want {
			t.Errorf("has %s: %t, %v, want %t", id, got, err, want)
		}
	}
	// Nothing is read before it is asked: without a stream that would fail.
	if _, err := told.Has(ctx, "a", time.Now(), 0); err == nil {
		t.Error("without a stream it knows what there is")
	}
	short := streamConfig
	short.DedupWindow = time.Second
	check(t, bus.EnsureStreams(ctx, c, short))
	keepAccount(ctx, t, c)

	begun := time.Now()
	tell(ctx, t, c, "a")
	time.Sleep(1100 * time.Millisecond) // the server has forgotten by then
	middle := time.Now()
	tell(ctx, t, c, "b")
	has("b", middle, 0, true)
	has("a", middle, 0, false) // it was stored before
	has("a", begun, time.Hour, true)
	has("b", middle, time.Hour, true)
	has("c", begun, 0, false)

	// What was read lately is not read again, and no longer than that.
	tell(ctx, t, c, "c")
	has("c", begun, time.Hour, false)
	has("c", begun, 0, true)
	// However many there are.
	for _, n := range []int{1, 31, 32, 33, 100} {
		for i := range n {
			tell(ctx, t, c, fmt.Sprintf("%d of %d", i, n))
			if i == n/2 {
				_, err := c.JetStream().Publish(ctx, "oom.v1.kill.global."+node, []byte("{}"))
				check(t, err)
			}
		}
		for i := range n {
			has(fmt.Sprintf("%d of %d", i, n), begun, time.Duration(i)*time.Hour, true)
		}
		has("none", begun, 0, false)
	}
	// Doubles, that the server no longer takes for such.
	tell(ctx, t, c, "a")
	has("a", begun, 0, true)

	// What was held lately counts, and of a stream that was made anew everything is read, even where it holds
	// more messages than were read of the one before.
	check(t, c.JetStream().DeleteStream(ctx, event.StreamName))
	check(t, bus.EnsureStreams(ctx, c, short))
	for i := range 9 {
		tell(ctx, t, c, fmt.Sprint("new-", i))
	}
	has("a", begun, 0, true)
	for i := range 9 {
		has(fmt.Sprint("new-", i), begun, time.Hour, true)
	}
}

// A reading that was cut short, wherever, proves nothing.
func TestToldInterrupted(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	c := connect(ctx, t, cfg, bus.Options{}, quiet())
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	begun := time.Now()
	const n = 500
	for i := range n {
		tell(ctx, t, c, fmt.Sprint(i))
	}
	time.Sleep(10 * time.Millisecond)
	later := time.Now()
	last := fmt.Sprint(n - 1)
	interrupted := 0
	for delay := 100 * time.Microsecond; delay < 100*time.Millisecond; delay = delay * 5 / 4 {
		told := bus.NewTold(c)
		if got, err := told.Has(ctx, last, later, 0); err != nil || got {
			t.Fatalf("before: %t, %v", got, err)
		}
		cut, cancel := context.WithTimeout(ctx, delay)
		got, err := told.Has(cut, last, begun, time.Hour)
		cancel()
		if err == nil {
			if !got {
				t.Errorf("read whole within %s, and it is not there", delay)
			}
			break
		}
		interrupted++
		if got, err := told.Has(ctx, last, begun, time.Hour); err != nil || !got {
			t.Errorf("after a reading that was cut short after %s: %t, %v", delay, got, err)
		}
	}
	if interrupted < 3 {
		t.Errorf("only %d readings were cut short", interrupted)
	}
}

// What is stored while it reads is found, at the latest when fresh is over.
func TestToldWhileStoring(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	c := connect(ctx, t, cfg, bus.Options{}, quiet())
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	begun := time.Now()
	var stored atomic.Int64
	const n = 300
	done := make(chan struct{})
	go func() {
		defer close(done)
		for i := range n {
			tell(ctx, t, c, fmt.Sprint(i))
			stored.Store(int64(i))
		}
	}()
	told := bus.NewTold(c)
	for last := int64(0); last < n-1; {
		last = stored.Load()
		if last == 0 {
			continue
		}
		if got, err := told.Has(ctx, fmt.Sprint(last), begun, 0); err != nil || !got {
			t.Fatalf("has %d: %t, %v", last, got, err)
		}
	}
	<-done
}
