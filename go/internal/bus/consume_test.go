package bus_test

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// handled keeps what a consumer's handlers saw.
type handled struct {
	mu      sync.Mutex
	times   map[string]int
	last    map[string]uint64 // the attempt
	changed chan struct{}
}

func newHandled() *handled {
	return &handled{times: map[string]int{}, last: map[string]uint64{}, changed: make(chan struct{}, 1)}
}

func (h *handled) note(d *bus.Delivery) {
	h.mu.Lock()
	h.times[d.ID]++
	h.last[d.ID] = d.Attempt
	h.mu.Unlock()
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

func (h *handled) count(id string) int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.times[id]
}

// wait waits until n different messages were seen.
func (h *handled) wait(ctx context.Context, t *testing.T, n int) {
	t.Helper()
	h.until(ctx, t, fmt.Sprintf("%d messages", n), func() bool { return len(h.times) >= n })
}

func (h *handled) until(ctx context.Context, t *testing.T, what string, cond func() bool) {
	t.Helper()
	for {
		h.mu.Lock()
		ok := cond()
		h.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-h.changed:
		case <-ctx.Done():
			t.Fatalf("waiting for %s: %v", what, ctx.Err())
		}
	}
}

// consume runs a consumer until the test ends, or the returned function is called.
func consume(t *testing.T, c *bus.Conn, workers int, handle func(context.Context, *bus.Delivery)) (consumer *bus.Consumer, stop func()) {
	t.Helper()
	consumer, err := bus.NewConsumer(c, bus.ConsumeOptions{Name: "worker", Subjects: []string{"oom.v1.kill.>"}, Workers: workers})
	check(t, err)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := consumer.Run(ctx, handle); err != nil {
			t.Errorf("consume: %v", err)
		}
	}()
	stop = sync.OnceFunc(func() {
		cancel()
		<-done
	})
	t.Cleanup(stop)
	return consumer, stop
}

// unacked is what the server's consumer has not delivered, and what it waits for the acks of.
func unacked(ctx context.Context, t *testing.T, c *bus.Conn) (pending uint64, acks int) {
	t.Helper()
	consumer, err := c.JetStream().Consumer(ctx, event.StreamName, "worker")
	check(t, err)
	info := consumer.CachedInfo()
	return info.NumPending, info.NumAckPending
}

func waitSettled(ctx context.Context, t *testing.T, c *bus.Conn) {
	t.Helper()
	for {
		pending, acks := unacked(ctx, t, c)
		if pending == 0 && acks == 0 {
			return
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			t.Fatalf("%d messages are not delivered, %d have no ack", pending, acks)
		}
	}
}

// Two replicas share the messages; one that hangs and one that fails hold up nobody; a poisoned one does
// not come again, and the server tells why.
func TestConsume(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	log, _ := newLog(t)
	c := connect(ctx, t, cfg, bus.Options{Name: "owner"}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	advisories := make(chan *nats.Msg, 10)
	sub, err := c.NATS().ChanSubscribe("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.>", advisories)
	check(t, err)
	defer sub.Unsubscribe()

	const n = 200
	seen, release := newHandled(), make(chan struct{})
	both := map[int]int{}
	var mu sync.Mutex
	for replica := range 2 {
		rc := connect(ctx, t, cfg, bus.Options{Name: fmt.Sprint("replica-", replica)}, log)
		consume(t, rc, 4, func(ctx context.Context, d *bus.Delivery) {
			mu.Lock()
			both[replica]++
			mu.Unlock()
			seen.note(d)
			switch {
			case d.ID == message(t, 0).ID:
				select {
				case <-release:
				case <-ctx.Done():
				}
				d.Ack()
			case d.ID == message(t, 1).ID && d.Attempt < 3:
				d.Nak(0)
			case d.ID == message(t, 2).ID:
				d.Term("it is poison")
				d.Ack() // too late
			default:
				d.Ack()
			}
		})
	}
	p, _ := publisher(t, c, n, bus.Hooks{}, log)
	enqueue(t, p, 0, n)
	seen.wait(ctx, t, n)
	seen.until(ctx, t, "the third attempt", func() bool { return seen.last[message(t, 1).ID] == 3 })
	select {
	case m := <-advisories:
		if !strings.Contains(string(m.Data), "it is poison") {
			t.Errorf("advisory %s", m.Data)
		}
	case <-ctx.Done():
		t.Fatal("no advisory")
	}
	close(release)
	waitSettled(ctx, t, c)
	for i := range n {
		want := 1
		if i == 1 {
			want = 3
		}
		if got := seen.count(message(t, i).ID); got != want {
			t.Errorf("message %d was handled %d times, want %d", i, got, want)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if both[0] == 0 || both[1] == 0 {
		t.Errorf("the replicas' shares are %v", both)
	}
}

// The server is killed again and again: nothing is missed, and another process goes on where the first ended.
func TestConsumeServerKilled(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	log, _ := newLog(t)
	c := connect(ctx, t, d.owner(), bus.Options{Name: "owner"}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	p, _ := publisher(t, c, 1000, bus.Hooks{}, log)
	seen := newHandled()
	handle := func(_ context.Context, d *bus.Delivery) {
		time.Sleep(time.Millisecond)
		seen.note(d)
		d.Ack()
	}
	_, stop := consume(t, c, 4, handle)
	for round := range 3 {
		enqueue(t, p, 100*round, 100*(round+1))
		seen.wait(ctx, t, 100*round+20)
		d.kill()
		d.start()
	}
	seen.wait(ctx, t, 300)
	// A second one takes over, with nothing left to do but what comes.
	stop()
	again := newHandled()
	consumer, _ := consume(t, c, 4, func(_ context.Context, d *bus.Delivery) { again.note(d); d.Ack() })
	enqueue(t, p, 300, 310)
	again.until(ctx, t, "the new ones", func() bool {
		n := 0
		for i := 300; i < 310; i++ {
			n += again.times[message(t, i).ID]
		}
		return n >= 10
	})
	if err := consumer.Failing(); err != nil {
		t.Error(err)
	}
}

// Before the stream exists the consumer waits for it, and logs that without a warning. A stream that is deleted later is logged as one.
func TestConsumeNoStream(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	log, logged := newLog(t)
	c := connect(ctx, t, cfg, bus.Options{}, log)
	seen := newHandled()
	consumer, _ := consume(t, c, 1, func(_ context.Context, d *bus.Delivery) { seen.note(d); d.Ack() })
	logs := func(what string) {
		t.Helper()
		for !strings.Contains(logged.String(), what) {
			if ctx.Err() != nil {
				t.Fatalf("nothing is said of %q:\n%s", what, logged)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}
	logs("waiting for the stream")
	wantError(t, consumer.Failing(), "make consumer", "stream not found")
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	p, _ := publisher(t, c, 10, bus.Hooks{}, log)
	enqueue(t, p, 0, 1)
	seen.wait(ctx, t, 1)
	if err := consumer.Failing(); err != nil {
		t.Error(err)
	}
	if strings.Contains(logged.String(), "level=WARN") {
		t.Errorf("a warning:\n%s", logged)
	}
	check(t, c.JetStream().DeleteStream(ctx, event.StreamName))
	logs("consuming is interrupted")
}

// What a replica leaves undone when it ends, another does at once.
func TestConsumeRelease(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	log, _ := newLog(t)
	c := connect(ctx, t, cfg, bus.Options{}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	first, second := newHandled(), newHandled()
	consumer, stop := consume(t, c, 1, func(ctx context.Context, d *bus.Delivery) {
		first.note(d)
		if len(d.Data) > 0 && d.ID == message(t, 1).ID {
			<-ctx.Done() // hangs until its context ends
		}
	})
	p, _ := publisher(t, c, 10, bus.Hooks{}, log)
	enqueue(t, p, 0, 4) // one is kept, one hangs, two are pulled
	first.wait(ctx, t, 2)
	began := time.Now()
	stop()
	if n := consumer.Release(); n != 2 {
		t.Errorf("%d are released, want 2", n)
	}
	consume(t, c, 1, func(_ context.Context, d *bus.Delivery) { second.note(d); d.Ack() })
	second.wait(ctx, t, 4)
	if took := time.Since(began); took > 20*time.Second { // the server's own patience is 30 s
		t.Errorf("it took %s", took)
	}
	waitSettled(ctx, t, c)
}

// Messages that take longer than the server's patience, and those that were pulled meanwhile, do not come a second time.
func TestConsumeLong(t *testing.T) {
	oomtest.Slow(t) // takes as long as the server waits for an acknowledgement: 30 s
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	log, _ := newLog(t)
	c := connect(ctx, t, cfg, bus.Options{}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	seen := newHandled()
	hang := make(chan struct{})
	const workers, messages = 2, 20
	consume(t, c, workers, func(_ context.Context, d *bus.Delivery) {
		seen.note(d)
		<-hang
		d.Ack()
	})
	p, _ := publisher(t, c, messages, bus.Hooks{}, log)
	enqueue(t, p, 0, messages)
	seen.wait(ctx, t, workers)
	time.Sleep(35 * time.Second)
	close(hang)
	waitSettled(ctx, t, c)
	for i := range messages {
		if n := seen.count(message(t, i).ID); n != 1 {
			t.Errorf("message %d came %d times", i, n)
		}
	}
}

// These permissions are all that a consumer needs, and a missing permission to pull is reported.
func TestConsumePermissions(t *testing.T) {
	ctx := begin(t)
	inbox := bus.InboxPrefix("oom-annotator")
	create, next, ack := "$JS.API.CONSUMER.CREATE.OOM.worker.oom.v1.kill.>", "$JS.API.CONSUMER.MSG.NEXT.OOM.worker", "$JS.ACK.OOM.worker.>"
	d := startNatsd(t, fmt.Sprintf(`authorization { users: [
		{ user: owner, password: owner-secret }
		{ user: good, password: good-secret, permissions: { publish: [%q, %q, %q], subscribe: "%s.>" } }
		{ user: bad, password: bad-secret, permissions: { publish: [%q, %q], subscribe: "%s.>" } }
	] }`, create, next, ack, inbox, create, ack, inbox))
	log, _ := newLog(t)
	owner := d.owner()
	owner.User, owner.PasswordFile = "owner", secret(t, "owner-secret")
	c := connect(ctx, t, owner, bus.Options{Name: "owner"}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	p, _ := publisher(t, c, 10, bus.Hooks{}, log)
	enqueue(t, p, 0, 3)

	bad := d.owner()
	bad.User, bad.PasswordFile = "bad", secret(t, "bad-secret")
	bc := connect(ctx, t, bad, bus.Options{Name: "oom-annotator"}, log)
	consumer, stop := consume(t, bc, 1, func(_ context.Context, d *bus.Delivery) { t.Error("handled"); d.Ack() })
	for !errors.Is(consumer.Failing(), nats.ErrPermissionViolation) {
		if ctx.Err() != nil {
			t.Fatalf("failing: %v", consumer.Failing())
		}
		time.Sleep(5 * time.Millisecond)
	}
	wantError(t, consumer.Failing(), next)
	stop()

	good := d.owner()
	good.User, good.PasswordFile = "good", secret(t, "good-secret")
	gc := connect(ctx, t, good, bus.Options{Name: "oom-annotator"}, log)
	seen := newHandled()
	consume(t, gc, 1, func(_ context.Context, d *bus.Delivery) { seen.note(d); d.Ack() })
	seen.wait(ctx, t, 3)
	waitSettled(ctx, t, c)
}

func TestNewConsumerRefuses(t *testing.T) {
	for _, o := range []bus.ConsumeOptions{{Workers: 1}, {Name: "a.b", Workers: 1}, {Name: "a*", Workers: 1}, {Name: "a"}} {
		if _, err := bus.NewConsumer(nil, o); err == nil {
			t.Errorf("%+v is taken", o)
		}
	}
}
