package netlimit_test

import (
	"io"
	"net"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/netlimit"
)

// pair is one connection, as both of its ends see it.
type pair struct {
	client net.Conn
	server *netlimit.Conn
}

func listen(t *testing.T, max int, grace time.Duration) (l *netlimit.Listener, dial func() pair) {
	t.Helper()
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l = netlimit.New(inner, max, grace)
	t.Cleanup(func() { l.Close() })
	accepted := make(chan *netlimit.Conn, 100)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			conn := c.(*netlimit.Conn)
			go func() { // a server reads, and closes what ends
				_, _ = io.Copy(io.Discard, conn)
				conn.Close()
			}()
			accepted <- conn
		}
	}()
	return l, func() pair {
		t.Helper()
		client, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { client.Close() })
		select {
		case server := <-accepted:
			return pair{client, server}
		case <-time.After(time.Second):
			return pair{client, nil}
		}
	}
}

// open reports whether the server has not closed the connection.
func (p pair) open(t *testing.T) bool {
	t.Helper()
	if err := p.client.SetReadDeadline(time.Now().Add(100 * time.Millisecond)); err != nil {
		t.Fatal(err)
	}
	_, err := p.client.Read(make([]byte, 1))
	netErr, ok := err.(net.Error)
	return ok && netErr.Timeout()
}

// The oldest that nobody holds gives way; what is held stays; where all are held a new one is turned away.
func TestLimit(t *testing.T) {
	_, dial := listen(t, 3, 0)
	a, b, c := dial(), dial(), dial()
	a.server.Hold()
	d := dial() // in b's place
	if !a.open(t) || b.open(t) || !c.open(t) || !d.open(t) {
		t.Errorf("open: %v %v %v %v", a.open(t), b.open(t), c.open(t), d.open(t))
	}
	c.server.Hold()
	d.server.Hold()
	d.server.Hold() // as good as once
	if e := dial(); e.server != nil || e.open(t) {
		t.Error("a fourth one is open beside three that are held")
	}
	c.server.Release()
	a.server.Release() // now c is the older one
	f := dial()
	if !a.open(t) || c.open(t) || !d.open(t) || !f.open(t) {
		t.Errorf("open: %v %v %v %v", a.open(t), c.open(t), d.open(t), f.open(t))
	}
	// One that ends makes room.
	d.client.Close()
	time.Sleep(100 * time.Millisecond)
	g := dial()
	if !a.open(t) || !f.open(t) || !g.open(t) {
		t.Errorf("open: %v %v %v", a.open(t), f.open(t), g.open(t))
	}
	// One that ended while it was held does not stand for an open one when it is released.
	a.server.Hold()
	a.server.Close()
	a.server.Release()
	h := dial()
	i := dial() // in f's place
	if f.open(t) || !g.open(t) || !h.open(t) || !i.open(t) {
		t.Errorf("open: %v %v %v %v", f.open(t), g.open(t), h.open(t), i.open(t))
	}
}

// Accept ends when the listener is closed, also while it waits for the server to let go of a connection.
func TestClose(t *testing.T) {
	inner, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := netlimit.New(inner, 1, 0)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			if _, err := l.Accept(); err != nil { // and never closes it
				return
			}
		}
	}()
	for range 2 {
		c, err := net.Dial("tcp", inner.Addr().String())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
	}
	time.Sleep(100 * time.Millisecond)
	l.Close()
	select {
	case <-done:
	case <-time.After(5 * time.Second):
		t.Error("accept hangs")
	}
}

// A connection has its time before it gives way.
func TestGrace(t *testing.T) {
	const grace = 300 * time.Millisecond
	_, dial := listen(t, 1, grace)
	first := dial()
	begun := time.Now()
	second := dial() // accepted once the first one has had its time
	if took := time.Since(begun); first.open(t) || !second.open(t) || took < grace-50*time.Millisecond {
		t.Errorf("after %s; open: %v %v", took, first.open(t), second.open(t))
	}
}
