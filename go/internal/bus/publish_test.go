package bus_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// What is published is stored byte by byte, in order, under its ID, and a plain NATS subscriber sees it too.
func TestPublish(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	log, _ := newLog(t)
	c := connect(ctx, t, cfg, bus.Options{Name: "oom-tracer-node-1"}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))

	plain := connect(ctx, t, cfg, bus.Options{Name: "plain"}, log).NATS()
	sub, err := plain.SubscribeSync("oom.v1.kill.*." + node)
	check(t, err)
	check(t, plain.Flush())

	const n = 1000
	rec := newRecorder()
	p, _ := publisher(t, c, n, rec.hooks(), log)
	enqueue(t, p, 0, n)
	rec.waitAcks(ctx, t, n)

	all := stored(ctx, t, cfg)
	wantOnce(t, all, n)
	for i, m := range all {
		want := message(t, i)
		if m.Subject != want.Subject || !bytes.Equal(m.Data, want.Data) || m.Header.Get(nats.MsgIdHdr) != want.ID || m.Header.Get("ce-id") != want.ID || len(m.Header) != 6 {
			t.Fatalf("message %d is stored as %s %v %s", i, m.Subject, m.Header, m.Data)
		}
		got, err := sub.NextMsgWithContext(ctx)
		check(t, err)
		if got.Subject != want.Subject || !bytes.Equal(got.Data, want.Data) {
			t.Fatalf("subscriber got %s %s as message %d", got.Subject, got.Data, i)
		}
	}
	rec.mu.Lock()
	defer rec.mu.Unlock()
	for i, id := range rec.acks {
		if id != message(t, i).ID || rec.tags[i] != i {
			t.Fatalf("ack %d is for %s, tag %v", i, id, rec.tags[i])
		}
	}
	if got := p.Acked(); got != n || p.Pending() != 0 {
		t.Errorf("%d are acknowledged and %d pending, want %d and none", got, p.Pending(), n)
	}
	if err := p.Failing(); err != nil {
		t.Errorf("failing: %v", err)
	}
}

// The same ID is stored once, also by another publisher.
func TestPublishSameID(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	log, _ := newLog(t)
	c := connect(ctx, t, cfg, bus.Options{}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	for i := range 2 {
		rec := newRecorder()
		p, stop := publisher(t, c, 10, rec.hooks(), log)
		enqueue(t, p, 0, 3)
		rec.waitAcks(ctx, t, 3)
		stop()
		// The publisher has stopped: nobody writes to the record.
		if want := 3 * i; len(rec.dups) != want {
			t.Errorf("publisher %d: duplicates %v reported, want %d", i, rec.dups, want)
		}
	}
	wantOnce(t, stored(ctx, t, cfg), 3)
}

// Whatever lies between two publishers of one outcome, the stream stores the first for as long as it holds that: the other was
// stopped in the middle for longer than the server remembers a message's ID, comes later, or is a newer program.
func TestPublishOnce(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	px := startProxy(t, d.listen)
	log, _ := newLog(t)
	short := streamConfig
	short.DedupWindow = 200 * time.Millisecond
	c := connect(ctx, t, d.owner(), bus.Options{}, log)
	check(t, bus.EnsureStreams(ctx, c, short))
	m := bus.Msg{ID: "boot-1-2/annotate", Subject: "oom.v1.outcome.boot-1-2_annotate.node-1", Data: []byte("first"), Once: true}
	send := func(c *bus.Conn, data string) (acked func(duplicate bool)) {
		t.Helper()
		rec := newRecorder()
		p, _ := publisher(t, c, 10, rec.hooks(), log)
		m := m
		m.Data = []byte(data)
		check(t, p.Enqueue(m))
		return func(duplicate bool) {
			t.Helper()
			rec.waitAcks(ctx, t, 1)
			if len(rec.dups) > 0 != duplicate || len(rec.retries)+len(rec.drops) > 0 {
				t.Errorf("%s: duplicates %v, want %t; retries %v, drops %v", data, rec.dups, duplicate, rec.retries, rec.drops)
			}
		}
	}
	stopped := connect(ctx, t, config.NATS{URL: "nats://" + px.addr()}, bus.Options{}, log)
	px.gate.Lock()
	late := send(stopped, "late")
	send(c, "first")(false)
	time.Sleep(3 * short.DedupWindow) // the server forgets IDs once a window
	px.gate.Unlock()
	late(true)
	d.kill()
	d.start()
	send(c, "after a restart")(true)
	all := stored(ctx, t, d.owner())
	if len(all) != 1 || string(all[0].Data) != "first" {
		t.Errorf("stored %d messages: %s", len(all), all[0].Data)
	}
	// Once the record is gone, there is nothing that a second one would contradict.
	s, err := c.JetStream().Stream(ctx, event.StreamName)
	check(t, err)
	check(t, s.DeleteMsg(ctx, 1))
	time.Sleep(3 * short.DedupWindow)
	send(c, "of a later age")(false)
}

// A server that is killed in the middle costs nothing.
func TestPublishServerKilled(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	log, _ := newLog(t)
	c := connect(ctx, t, d.owner(), bus.Options{}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))

	const n = 500
	rec, killed := newRecorder(), make(chan struct{})
	rec.onAck = func(acks int) {
		if acks == 100 {
			d.kill()
			close(killed)
		}
	}
	p := waiting(t, c, n, rec.hooks(), log)
	enqueue(t, p, 0, n)
	run(t, p)
	<-killed
	if pending := p.Pending(); pending == 0 {
		t.Fatal("nothing is pending: the server died too late")
	}
	d.start()
	rec.waitAcks(ctx, t, n)
	wantOnce(t, stored(ctx, t, d.owner()), n)
	rec.mu.Lock()
	defer rec.mu.Unlock()
	if p.Acked() != n || len(rec.drops) != 0 || p.Pending() != 0 {
		t.Errorf("%d are acknowledged, %d pending, %d dropped", p.Acked(), p.Pending(), len(rec.drops))
	}
	t.Logf("attempts for %d failed, %d messages were there already", len(rec.retries), len(rec.dups))
}

// Acknowledgements that are lost are asked for again, and nothing is stored twice.
func TestPublishAcksLost(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	log, _ := newLog(t)
	direct := connect(ctx, t, d.owner(), bus.Options{Name: "direct"}, log)
	check(t, bus.EnsureStreams(ctx, direct, streamConfig))
	px := startProxy(t, d.listen)
	c := connect(ctx, t, config.NATS{URL: "nats://" + px.addr()}, bus.Options{}, log)

	const n = 500
	rec := newRecorder()
	p := waiting(t, c, n, rec.hooks(), log)
	enqueue(t, p, 0, n)

	watch, err := direct.NATS().SubscribeSync("oom.v1.>")
	check(t, err)
	check(t, direct.NATS().Flush())
	px.set(true, false)
	run(t, p)
	for range 200 { // what a plain subscriber sees is with the server
		_, err := watch.NextMsgWithContext(ctx)
		check(t, err)
	}
	px.set(false, false)
	px.cut()
	rec.waitAcks(ctx, t, n)
	wantOnce(t, stored(ctx, t, d.owner()), n)
	rec.note(func() {
		if len(rec.dups) == 0 {
			t.Error("no duplicate was reported")
		}
	})
	if ids := idsOf(stored(ctx, t, d.owner())); !slices.IsSortedFunc(ids, func(a, b string) int { return number(a) - number(b) }) {
		t.Errorf("out of order: %v", ids)
	}
}

func number(id string) (n int) {
	fmt.Sscanf(id, "boot-%d-", &n)
	return n
}

// Messages that vanish on the way are not acknowledged, and are sent again.
func TestPublishMessagesLost(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	log, _ := newLog(t)
	direct := connect(ctx, t, d.owner(), bus.Options{Name: "direct"}, log)
	check(t, bus.EnsureStreams(ctx, direct, streamConfig))
	px := startProxy(t, d.listen)
	c := connect(ctx, t, config.NATS{URL: "nats://" + px.addr()}, bus.Options{}, log)

	rec := newRecorder()
	p := waiting(t, c, 100, rec.hooks(), log)
	enqueue(t, p, 0, 10)
	before := c.NATS().Stats().OutMsgs
	px.set(false, true)
	run(t, p)
	for c.NATS().Stats().OutMsgs < before+10 { // nats.go announces no write
		if ctx.Err() != nil {
			t.Fatal("nothing was sent")
		}
		time.Sleep(time.Millisecond)
	}
	px.cut()
	rec.wait(ctx, t, "10 retries", func() bool { return len(rec.retries) == 10 })
	if pending := p.Pending(); pending != 10 {
		t.Errorf("%d messages are pending, want 10", pending)
	}
	rec.mu.Lock()
	for id, errs := range rec.retries {
		if !errors.Is(errs[0], bus.ErrDisconnected) {
			t.Errorf("%s was retried because of %v", id, errs[0])
		}
	}
	rec.mu.Unlock()
	px.set(false, false)
	px.cut()
	rec.waitAcks(ctx, t, 10)
	wantOnce(t, stored(ctx, t, d.owner()), 10)
}

// A server that hangs is waited for, and asked again.
func TestPublishServerHangs(t *testing.T) {
	oomtest.Slow(t) // takes as long as an acknowledgement may: 5 s
	ctx := begin(t)
	d := startNatsd(t, "")
	log, logged := newLog(t)
	c := connect(ctx, t, d.owner(), bus.Options{}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	rec := newRecorder()
	p := waiting(t, c, 100, rec.hooks(), log)
	enqueue(t, p, 0, 10)
	check(t, d.cmd.Process.Signal(syscall.SIGSTOP))
	run(t, p)
	rec.wait(ctx, t, "10 retries", func() bool { return len(rec.retries) == 10 })
	rec.mu.Lock()
	for id, errs := range rec.retries {
		if !errors.Is(errs[0], jetstream.ErrAsyncPublishTimeout) {
			t.Errorf("%s was retried because of %v", id, errs[0])
		}
	}
	rec.mu.Unlock()
	check(t, d.cmd.Process.Signal(syscall.SIGCONT))
	rec.waitAcks(ctx, t, 10)
	wantOnce(t, stored(ctx, t, d.owner()), 10)
	for p.Failing() != nil { // told a moment after the last acknowledgement
		if ctx.Err() != nil {
			t.Fatal(p.Failing())
		}
		time.Sleep(time.Millisecond)
	}
	for _, text := range []string{"cannot publish, will retry", "publishing works again"} {
		if n := strings.Count(logged.String(), text); n != 1 {
			t.Errorf("%q was logged %d times", text, n)
		}
	}
}

// The agent starts while NATS is away.
func TestPublishAwayAtStart(t *testing.T) {
	ctx := begin(t)
	addr := freePort(t)
	log, logged := newLog(t)
	c := connect(ctx, t, config.NATS{URL: "nats://" + addr}, bus.Options{Background: true}, log)
	if c.Connected() {
		t.Fatal("connected to nobody")
	}
	// Nothing is buffered below the publisher, to be sent when nobody expects it any more.
	if err := c.NATS().Publish("oom.v1.kill.global.a", nil); !errors.Is(err, nats.ErrReconnectBufExceeded) {
		t.Errorf("publish while away: %v", err)
	}
	rec := newRecorder()
	p, _ := publisher(t, c, 100, rec.hooks(), log)
	enqueue(t, p, 0, 20)
	if enabled, err := c.Check(ctx); enabled || !errors.Is(err, bus.ErrDisconnected) {
		t.Errorf("JetStream is enabled: %t, %v", enabled, err)
	}

	d := &natsd{t: t, dir: t.TempDir(), listen: addr}
	d.conf = jetstreamConf(d.dir)
	d.start()
	// EnsureStreams waits for the connection, and the publisher for the stream.
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	rec.waitAcks(ctx, t, 20)
	wantOnce(t, stored(ctx, t, d.owner()), 20)
	if p.Pending() != 0 || p.Acked() != 20 {
		t.Errorf("%d are pending, %d acknowledged", p.Pending(), p.Acked())
	}
	if n := strings.Count(logged.String(), "nobody listens there"); n != 1 {
		t.Errorf("the log says %d times why there was no connection", n)
	}
}

// Without a stream nothing is lost, and somebody hears of it.
func TestPublishNoStream(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	log, logged := newLog(t)
	c := connect(ctx, t, cfg, bus.Options{}, log)
	rec := newRecorder()
	p, _ := publisher(t, c, 100, rec.hooks(), log)
	enqueue(t, p, 0, 5)
	rec.wait(ctx, t, "a second attempt", func() bool { return len(rec.retries[message(t, 4).ID]) == 2 })
	if err := p.Failing(); !errors.Is(err, jetstream.ErrNoStreamResponse) {
		t.Errorf("failing because of %v", err)
	}
	if n := strings.Count(logged.String(), "cannot publish"); n != 1 {
		t.Errorf("logged %d times", n)
	}
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	rec.waitAcks(ctx, t, 5)
	wantOnce(t, stored(ctx, t, cfg), 5)
}

// What does not fit is refused at once and counted exactly.
func TestPublishOverflow(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	log, _ := newLog(t)
	c := connect(ctx, t, cfg, bus.Options{}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	rec := newRecorder()
	p := waiting(t, c, 300, rec.hooks(), log)
	refused := 0
	for i := range 1000 {
		switch err := p.Enqueue(message(t, i)); {
		case errors.Is(err, bus.ErrFull):
			refused++
		case err != nil:
			t.Fatal(err)
		case i >= 300:
			t.Fatalf("message %d was taken", i)
		}
	}
	if refused != 700 || p.Pending() != 300 {
		t.Errorf("%d were refused, %d are pending", refused, p.Pending())
	}
	// There is room again from the first acknowledgement on, not only when all of them are there.
	rec.onAck = func(acks int) {
		if acks > 5 {
			return
		}
		if err := p.Enqueue(message(t, 299+acks)); err != nil {
			t.Error(err)
		}
	}
	run(t, p)
	rec.waitAcks(ctx, t, 305)
	wantOnce(t, stored(ctx, t, cfg), 305)
	if _, err := bus.NewPublisher(c, 0, bus.Hooks{}, log); err == nil {
		t.Error("a publisher without capacity was made")
	}
	for _, m := range []bus.Msg{{Subject: "oom.v1.kill.global.a"}, {ID: "x"}} {
		if err := p.Enqueue(m); err == nil {
			t.Errorf("%+v was taken", m)
		}
	}
}

// A message that can never be stored does not hold up the others.
func TestPublishOversize(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "max_payload: 4096")
	log, _ := newLog(t)
	c := connect(ctx, t, d.owner(), bus.Options{}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	s, err := c.JetStream().Stream(ctx, event.StreamName)
	check(t, err)
	limited := s.CachedInfo().Config
	limited.MaxMsgSize = 2048
	_, err = c.JetStream().UpdateStream(ctx, limited)
	check(t, err)

	rec := newRecorder()
	p, _ := publisher(t, c, 100, rec.hooks(), log)
	enqueue(t, p, 0, 2)
	big := func(id, subject string, size int) bus.Msg {
		return bus.Msg{ID: id, Subject: subject, Data: bytes.Repeat([]byte("x"), size)}
	}
	check(t, p.Enqueue(big("over-payload", subject(t, "global", node), 5000)))
	check(t, p.Enqueue(big("over-stream", subject(t, "global", node), 3000)))
	check(t, p.Enqueue(big("bad-subject", "oom.v1.kill.glo bal."+node, 10)))
	enqueue(t, p, 2, 4)
	rec.waitAcks(ctx, t, 4)
	wantOnce(t, stored(ctx, t, d.owner()), 4)
	rec.mu.Lock()
	defer rec.mu.Unlock()
	for id, want := range map[string]error{
		"over-payload": nats.ErrMaxPayload,
		"over-stream":  jetstream.ErrStreamMessageExceedsMaximum,
		"bad-subject":  nats.ErrBadSubject,
	} {
		if !errors.Is(rec.drops[id], want) {
			t.Errorf("%s was dropped because of %v, want %v", id, rec.drops[id], want)
		}
	}
	if len(rec.drops) != 3 || p.Acked() != 4 || len(rec.retries) != 0 || p.Pending() != 0 {
		t.Errorf("%d are acknowledged, %d pending; drops %v, retries %v", p.Acked(), p.Pending(), rec.drops, rec.retries)
	}
}

// limited is a server on which the tracer of node-1 may do what the design gives it, and no more.
func limited(t *testing.T) (d *natsd, tracer config.NATS, owner config.NATS) {
	t.Helper()
	d = startNatsd(t, fmt.Sprintf(`authorization { users: [
		{ user: owner, password: owner-secret }
		{ user: node-1, password: node-secret, permissions: { publish: "oom.v1.*.*.node-1", subscribe: "%s.>" } }
	] }`, bus.InboxPrefix("oom-tracer-node-1")))
	tracer = config.NATS{URL: d.url(), User: "node-1", PasswordFile: secret(t, "node-secret\n")}
	owner = config.NATS{URL: d.url(), User: "owner", PasswordFile: secret(t, "owner-secret")}
	return d, tracer, owner
}

// The permissions of the design suffice, and what they forbid is reported with its name.
func TestPublishPermissions(t *testing.T) {
	ctx := begin(t)
	_, tracer, owner := limited(t)
	log, logged := newLog(t)
	o := connect(ctx, t, owner, bus.Options{Name: "owner"}, log)
	check(t, bus.EnsureStreams(ctx, o, streamConfig))
	c := connect(ctx, t, tracer, bus.Options{Name: "oom-tracer-node-1"}, log)

	rec := newRecorder()
	p, _ := publisher(t, c, 100, rec.hooks(), log)
	check(t, p.Enqueue(bus.Msg{ID: "foreign", Subject: subject(t, "global", "node-2"), Data: []byte("{}")}))
	rec.wait(ctx, t, "the refusal", func() bool { return len(rec.retries["foreign"]) > 0 })
	enqueue(t, p, 0, 10)
	rec.waitAcks(ctx, t, 10)
	wantOnce(t, stored(ctx, t, owner), 10)

	rec.mu.Lock()
	err := rec.retries["foreign"][0]
	rec.mu.Unlock()
	// Not noticed only when the acknowledgement was given up.
	if !errors.Is(err, nats.ErrPermissionViolation) || errors.Is(err, jetstream.ErrAsyncPublishTimeout) {
		t.Errorf("retried because of %v", err)
	}
	wantError(t, err, "oom.v1.kill.global.node-2")
	wantError(t, p.Failing(), "oom.v1.kill.global.node-2")
	if p.Pending() != 1 {
		t.Errorf("%d are pending, want the refused one", p.Pending())
	}
	rec.wait(ctx, t, "more refusals", func() bool { return len(rec.retries["foreign"]) > 3 })
	if n := strings.Count(logged.String(), "nats denied a permission"); n != 1 {
		t.Errorf("the refusal was logged %d times", n)
	}
	if strings.Contains(logged.String(), "secret") {
		t.Error("a password was logged")
	}

	// It may ask nothing of the JetStream API, and hears so at once.
	start := time.Now()
	prompt := func(what string) {
		t.Helper()
		if took := time.Since(start); took >= timeout {
			t.Errorf("the refusal to %s took %s, as long as no answer", what, took)
		}
		start = time.Now()
	}
	enabled, err := c.Check(ctx)
	prompt("check")
	if enabled || !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("JetStream is enabled: %t, %v", enabled, err)
	}
	if err := bus.EnsureStreams(ctx, c, streamConfig); !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("ensure stream: %v", err)
	}
	prompt("ensure the stream")
	if err := bus.Tail(ctx, c, bus.TailOptions{Follow: true}, func(bus.Stored) error { return nil }); !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("tail: %v", err)
	}
	prompt("tail")
}

// A client with another's inbox learns why no acknowledgement arrives.
func TestPublishInboxDenied(t *testing.T) {
	oomtest.Slow(t) // takes as long as an acknowledgement may: 5 s
	ctx := begin(t)
	_, tracer, owner := limited(t)
	log, _ := newLog(t)
	o := connect(ctx, t, owner, bus.Options{Name: "owner"}, log)
	check(t, bus.EnsureStreams(ctx, o, streamConfig))
	c := connect(ctx, t, tracer, bus.Options{Name: "oom-tracer-node-2"}, log)
	rec := newRecorder()
	p, _ := publisher(t, c, 100, rec.hooks(), log)
	enqueue(t, p, 0, 1)
	rec.wait(ctx, t, "a retry", func() bool { return len(rec.retries) == 1 })
	rec.mu.Lock()
	err := rec.retries[message(t, 0).ID][0]
	rec.mu.Unlock()
	if !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("retried because of %v", err)
	}
	wantError(t, err, "acknowledgements cannot arrive", "_INBOX_oom-tracer-node-2")
}

func TestDrain(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	log, _ := newLog(t)
	c := connect(ctx, t, d.owner(), bus.Options{}, log)
	check(t, bus.EnsureStreams(ctx, c, streamConfig))

	t.Run("while running", func(t *testing.T) {
		p, _ := publisher(t, c, 1000, bus.Hooks{}, log)
		enqueue(t, p, 0, 600)
		left, err := p.Drain(ctx)
		if left != 0 || err != nil {
			t.Errorf("%d left, %v", left, err)
		}
		if err := p.Enqueue(message(t, 0)); !errors.Is(err, bus.ErrClosed) {
			t.Errorf("enqueue after drain: %v", err)
		}
		wantOnce(t, stored(ctx, t, d.owner()), 600)
	})
	t.Run("after running", func(t *testing.T) {
		p, stop := publisher(t, c, 1000, bus.Hooks{}, log)
		stop()
		enqueue(t, p, 600, 1000)
		if left, err := p.Drain(ctx); left != 0 || err != nil {
			t.Errorf("%d left, %v", left, err)
		}
		wantOnce(t, stored(ctx, t, d.owner()), 1000)
		if left, err := p.Drain(ctx); left != 0 || err != nil { // again
			t.Errorf("%d left, %v", left, err)
		}
	})
	t.Run("server away", func(t *testing.T) {
		p, stop := publisher(t, c, 1000, bus.Hooks{}, log)
		d.kill()
		enqueue(t, p, 1000, 1007)
		short, cancel := context.WithTimeout(ctx, 300*time.Millisecond)
		defer cancel()
		start := time.Now()
		left, err := p.Drain(short)
		if left != 7 || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%d left, %v", left, err)
		}
		if took := time.Since(start); took > 20*time.Second { // ctx has a minute
			t.Errorf("drain took %s", took)
		}
		stop()
		// The connection is closed: no reason to wait for ctx.
		c.Close()
		left, err = p.Drain(ctx)
		if left != 7 || !errors.Is(err, bus.ErrClosed) {
			t.Errorf("%d left, %v", left, err)
		}
		if err := p.Run(ctx); !errors.Is(err, bus.ErrClosed) {
			t.Errorf("run on a closed connection: %v", err)
		}
	})
}

// What expires is not in the way for ever: here no stream takes its subject. What does not, waits for one.
func TestPublishExpires(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, "")
	c := connect(ctx, t, d.owner(), bus.Options{}, quiet())
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	dropped, acked := make(chan string, 10), make(chan string, 10)
	p, err := bus.NewPublisher(c, 10, bus.Hooks{
		OnDrop: func(m bus.Msg, err error) *bus.Msg {
			dropped <- m.ID
			return nil
		},
		OnAck: func(m bus.Msg, _ bool) { acked <- m.ID },
	}, quiet())
	check(t, err)
	go func() { _ = p.Run(ctx) }()
	for _, m := range []bus.Msg{
		{ID: "late", Subject: "later.a", Expires: time.Now().Add(300 * time.Millisecond)},
		{ID: "patient", Subject: "later.b"},
		{ID: "kill", Subject: "oom.v1.kill.global.node-1", Expires: time.Now()},
	} {
		m.Data = []byte("{}")
		check(t, p.Enqueue(m))
	}
	for want, from := range map[string]chan string{"late": dropped, "kill": acked} {
		select {
		case id := <-from:
			if id != want {
				t.Errorf("%s, want %s", id, want)
			}
		case <-ctx.Done():
			t.Fatalf("nothing became of %s", want)
		}
	}
	if n := p.Pending(); n != 1 {
		t.Errorf("%d wait", n)
	}
}

// What NATS refuses for good is given up after a time, once others were stored or when it takes the room of all others; not
// while NATS stores nothing at all.
func TestPublishRefused(t *testing.T) {
	oomtest.Slow(t)
	ctx := begin(t)
	_, tracer, owner := limited(t)
	o := connect(ctx, t, owner, bus.Options{Name: "owner"}, quiet())
	c := connect(ctx, t, tracer, bus.Options{Name: "oom-tracer-node-1"}, quiet())
	const patience = 500 * time.Millisecond
	dropped, acked := make(chan string, 100), make(chan string, 100)
	p, err := bus.NewPublisher(c, 10, bus.Hooks{
		OnDrop: func(m bus.Msg, err error) *bus.Msg {
			dropped <- m.ID
			return nil
		},
		OnAck: func(m bus.Msg, _ bool) { acked <- m.ID },
	}, quiet())
	check(t, err)
	bus.SetPatience(p, patience)
	go func() { _ = p.Run(ctx) }()
	expect := func(from chan string, want string) {
		t.Helper()
		select {
		case id := <-from:
			if id != want {
				t.Errorf("%s, want %s", id, want)
			}
		case <-ctx.Done():
			t.Fatalf("nothing became of %s", want)
		}
	}
	none := func(what string) {
		t.Helper()
		select {
		case id := <-dropped:
			t.Fatalf("%s: %s was dropped", what, id)
		case <-time.After(3 * patience):
		}
	}
	mine, foreign := subject(t, "global", "node-1"), subject(t, "global", "node-2")
	// The operator makes the stream later.
	check(t, p.Enqueue(bus.Msg{ID: "early", Subject: mine, Data: []byte("{}")}))
	none("without a stream")
	check(t, bus.EnsureStreams(ctx, o, streamConfig))
	expect(acked, "early")

	check(t, p.Enqueue(bus.Msg{ID: "foreign", Subject: foreign, Data: []byte("{}")}))
	none("nothing else is to be stored")
	check(t, p.Enqueue(bus.Msg{ID: "next", Subject: mine, Data: []byte("{}")}))
	expect(acked, "next")
	expect(dropped, "foreign")

	for i := range 10 {
		check(t, p.Enqueue(bus.Msg{ID: "foreign", Subject: foreign, Data: []byte(fmt.Sprint(i))}))
	}
	expect(dropped, "foreign")
	check(t, p.Enqueue(bus.Msg{ID: "last", Subject: mine, Data: []byte("{}")}))
	expect(acked, "last")
}
