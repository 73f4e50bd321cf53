package bus_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// replay reads what is stored.
func replay(ctx context.Context, t *testing.T, c *bus.Conn, since time.Time, subjects ...string) []bus.Stored {
	t.Helper()
	var all []bus.Stored
	check(t, bus.Tail(ctx, c, bus.TailOptions{Since: since, Subjects: subjects}, func(m bus.Stored) error {
		all = append(all, m)
		return nil
	}))
	return all
}

// follow reads in the background, and returns when the reader has seen a first message that marks the
// start; what comes after it goes to the channel.
func follow(ctx context.Context, t *testing.T, c *bus.Conn, o bus.TailOptions) (messages chan bus.Stored, stop func() error) {
	t.Helper()
	o.Follow = true
	ctx, cancel := context.WithCancel(ctx)
	messages = make(chan bus.Stored, 10000)
	done := make(chan error, 1)
	go func() {
		done <- bus.Tail(ctx, c, o, func(m bus.Stored) error {
			messages <- m
			return nil
		})
	}()
	return messages, func() error {
		cancel()
		return <-done
	}
}

func publish(ctx context.Context, t *testing.T, c *bus.Conn, subject, id string) {
	t.Helper()
	_, err := c.JetStream().Publish(ctx, subject, []byte("data of "+id), jetstream.WithMsgID(id))
	check(t, err)
}

func next(ctx context.Context, t *testing.T, messages chan bus.Stored) bus.Stored {
	t.Helper()
	select {
	case m := <-messages:
		return m
	case <-ctx.Done():
		t.Fatal("no message came")
		panic("unreachable")
	}
}

func TestTail(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	log, _ := newLog(t)
	c := connect(ctx, t, cfg, bus.Options{}, log)
	nothing := func(bus.Stored) error { t.Error("there is nothing to read"); return nil }
	if err := bus.Tail(ctx, c, bus.TailOptions{Follow: true}, nothing); !errors.Is(err, jetstream.ErrStreamNotFound) {
		t.Errorf("without a stream: %v", err)
	}
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	epoch := time.Unix(0, 0)
	if all := replay(ctx, t, c, epoch); len(all) != 0 {
		t.Errorf("an empty stream has %d messages", len(all))
	}

	a, b := subject(t, "global", "node-1"), subject(t, "cgroup", "node-2")
	const n = 1500 // several times what is fetched at once
	var middle time.Time
	for i := range n {
		s := a
		if i%3 == 0 {
			s = b
		}
		if i == 1000 {
			middle = time.Now()
		}
		publish(ctx, t, c, s, fmt.Sprint(i))
	}

	all := replay(ctx, t, c, epoch)
	if len(all) != n {
		t.Fatalf("%d messages, want %d", len(all), n)
	}
	for i, m := range all {
		if m.ID != fmt.Sprint(i) || string(m.Data) != "data of "+m.ID || m.Seq != uint64(i+1) || time.Since(m.Time).Abs() > time.Minute {
			t.Fatalf("message %d is %+v", i, m)
		}
	}
	if all := replay(ctx, t, c, middle); len(all) != 500 || all[0].ID != "1000" {
		t.Errorf("since the middle: %d messages", len(all))
	}
	if all := replay(ctx, t, c, time.Time{}); len(all) != 0 {
		t.Errorf("only new ones, not to be followed: %d messages", len(all))
	}
	if all := replay(ctx, t, c, time.Now().Add(time.Hour)); len(all) != 0 {
		t.Errorf("since the future: %d messages", len(all))
	}
	filter, err := event.Filter(event.KindKill, "", "node-2")
	check(t, err)
	if all := replay(ctx, t, c, epoch, filter); len(all) != 500 || all[1].ID != "3" || all[1].Subject != b {
		t.Errorf("of one node: %d messages", len(all))
	}
	if all := replay(ctx, t, c, epoch, "oom.v1.kill.global.*", "oom.v1.kill.cgroup.*"); len(all) != n {
		t.Errorf("of two scopes: %d messages", len(all))
	}
	if all := replay(ctx, t, c, epoch, "oom.v1.exiting.>"); len(all) != 0 {
		t.Errorf("of a kind that did not happen: %d messages", len(all))
	}
	if all := replay(ctx, t, c, epoch, "oom.v1.kill.global.*", "oom.v1.exiting.>", "oom.v1.kill.>", "oom.v1.gap.*.*"); len(all) != n {
		t.Errorf("of patterns that overlap: %d messages", len(all))
	}
	// What the server would deliver for all of them together is more.
	for _, patterns := range [][]string{{b, "oom.v1.gap.*.*"}, {"oom.v1.gap.>", "oom.v1.kill.cgroup.>"}, {"oom.v1.kill.cgroup.*", "oom.v1.exiting.>"}, {"oom.v1.kill.*.node-2", "oom.v1.outcome.*.node-2"}} {
		if all := replay(ctx, t, c, epoch, patterns...); len(all) != 500 || all[499].ID != fmt.Sprint(n-3) {
			t.Errorf("of %q: %d messages", patterns, len(all))
		}
	}

	// The caller's error comes back as it is.
	mine := errors.New("mine")
	count := 0
	if err := bus.Tail(ctx, c, bus.TailOptions{Since: epoch, Follow: true}, func(bus.Stored) error {
		if count++; count == 3 {
			return mine
		}
		return nil
	}); err != mine || count != 3 {
		t.Errorf("after %d messages: %v", count, err)
	}

	// Replay and go on.
	replayed, stop := follow(ctx, t, c, bus.TailOptions{Since: middle})
	for i := range 500 {
		if m := next(ctx, t, replayed); m.ID != fmt.Sprint(1000+i) {
			t.Fatalf("got %s as message %d", m.ID, i)
		}
	}
	publish(ctx, t, c, a, "live")
	if m := next(ctx, t, replayed); m.ID != "live" || m.Seq != n+1 {
		t.Errorf("got %+v", m)
	}
	if err := stop(); err != nil {
		t.Errorf("tail ended with %v", err)
	}

	// What matches and comes while one reads is not part of the replay, also when the last message that was
	// there does not match.
	count = 0
	check(t, bus.Tail(ctx, c, bus.TailOptions{Since: epoch, Subjects: []string{filter}}, func(m bus.Stored) error {
		if count++; count == 1 {
			publish(ctx, t, c, b, "late")
		}
		return nil
	}))
	if count != 500 {
		t.Errorf("%d messages, want the 500 that were there", count)
	}

	// An end before the end is an error, unless there is none.
	short, cancel := context.WithCancel(ctx)
	if err := bus.Tail(short, c, bus.TailOptions{Since: epoch}, func(bus.Stored) error { cancel(); return nil }); !errors.Is(err, context.Canceled) {
		t.Errorf("cut short: %v", err)
	}
}

// Only what is new, and nothing twice or never, over a server that is killed and one that is cut off.
func TestTailReconnect(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	log, _ := newLog(t)
	owner := connect(ctx, t, d.owner(), bus.Options{Name: "owner"}, log)
	check(t, bus.EnsureStreams(ctx, owner, streamConfig))
	a := subject(t, "global", node)
	publish(ctx, t, owner, a, "before")

	px := startProxy(t, d.listen)
	c := connect(ctx, t, config.NATS{URL: "nats://" + px.addr()}, bus.Options{}, log)
	fresh, stopFresh := follow(ctx, t, c, bus.TailOptions{})
	all, stopAll := follow(ctx, t, c, bus.TailOptions{Since: time.Unix(0, 0), Subjects: []string{"oom.v1.kill.>"}})
	next(ctx, t, all)
	// The reader of new ones is there when it gets one. IDs that are new each time: they are no duplicates.
	started := 0
	for len(fresh) == 0 {
		started++
		publish(ctx, t, owner, a, fmt.Sprintf("start-%d", started))
		select {
		case <-ctx.Done():
			t.Fatal("the reader does not start")
		case <-time.After(20 * time.Millisecond):
		}
	}
	first := next(ctx, t, fresh)
	if first.ID == "before" {
		t.Error("an old message is not new")
	}
	drain := func(messages chan bus.Stored) {
		for len(messages) > 0 {
			<-messages
		}
	}
	publish(ctx, t, owner, a, "go")
	for _, ch := range []chan bus.Stored{fresh, all} {
		for next(ctx, t, ch).ID != "go" {
		}
		drain(ch)
	}

	want := []string{}
	send := func(i int) {
		id := fmt.Sprintf("m-%d", i)
		want = append(want, id)
		publish(ctx, t, owner, a, id)
	}
	for i := range 300 {
		switch i {
		case 50, 150: // the readers alone are cut off; the owner goes on
			px.cut()
		case 100: // what the server says is lost, then the connection
			px.set(true, false)
		case 110:
			px.set(false, false)
			px.cut()
		case 200: // the server dies, and the consumers, which live in its memory, with it
			d.kill()
			d.start()
			// The owner's connection must be back to publish.
			check(t, bus.EnsureStreams(ctx, owner, streamConfig))
		}
		send(i)
	}
	for name, ch := range map[string]chan bus.Stored{"fresh": fresh, "all": all} {
		var got []string
		for range want {
			got = append(got, next(ctx, t, ch).ID)
		}
		if !slices.Equal(got, want) {
			t.Errorf("%s: got %v", name, got)
		}
	}

	// While nobody listens, the end is prompt.
	d.kill()
	start := time.Now()
	for _, stop := range []func() error{stopFresh, stopAll} {
		if err := stop(); err != nil {
			t.Errorf("tail ended with %v", err)
		}
	}
	if took := time.Since(start); took >= timeout {
		t.Errorf("the end took %s", took)
	}
	if len(fresh)+len(all) != 0 {
		t.Errorf("%d messages too many", len(fresh)+len(all))
	}
}

// A replay that is cut off goes on where it was, and ends where it should.
func TestTailReplayReconnect(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	log, _ := newLog(t)
	owner := connect(ctx, t, d.owner(), bus.Options{Name: "owner"}, log)
	check(t, bus.EnsureStreams(ctx, owner, streamConfig))
	a := subject(t, "global", node)
	for i := range 600 {
		publish(ctx, t, owner, a, fmt.Sprint(i))
	}
	px := startProxy(t, d.listen)
	c := connect(ctx, t, config.NATS{URL: "nats://" + px.addr()}, bus.Options{}, log)
	var got []bus.Stored
	check(t, bus.Tail(ctx, c, bus.TailOptions{Since: time.Unix(0, 0)}, func(m bus.Stored) error {
		if got = append(got, m); len(got) == 300 {
			px.cut()
			publish(ctx, t, owner, a, "too late")
		}
		return nil
	}))
	if len(got) != 600 {
		t.Fatalf("%d messages", len(got))
	}
	for i, m := range got {
		if m.ID != fmt.Sprint(i) {
			t.Fatalf("message %d is %s", i, m.ID)
		}
	}
}

// A stream that was deleted and made again begins anew, and so does who follows it.
func TestTailStreamMadeAnew(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	log, logged := newLog(t)
	c := connect(ctx, t, cfg, bus.Options{}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	keepAccount(ctx, t, c)
	a := subject(t, "global", node)
	publish(ctx, t, c, a, "old")
	messages, stop := follow(ctx, t, c, bus.TailOptions{Since: time.Unix(0, 0)})
	next(ctx, t, messages)
	check(t, c.JetStream().DeleteStream(ctx, event.StreamName))
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	publish(ctx, t, c, a, "new")
	if m := next(ctx, t, messages); m.ID != "new" || m.Seq != 1 {
		t.Errorf("got %+v", m)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	if !strings.Contains(logged.String(), "stream was created again") {
		t.Error("nothing was said of it")
	}
}
