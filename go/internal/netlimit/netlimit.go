// Package netlimit bounds how many connections a server has at a time, in such a way that whoever opens many of them
// keeps nobody else out.
package netlimit

import (
	"container/list"
	"net"
	"sync"
	"time"
)

// Listener has at most a fixed number of connections. One more takes the place of the oldest that nobody holds: a
// client that has not asked for anything yet, or that has had its answer. It is turned away where all are held.
type Listener struct {
	net.Listener
	max   int
	grace time.Duration

	mu     sync.Mutex
	freed  *sync.Cond // a connection was closed, or the listener
	closed bool
	count  int       // of open connections
	free   list.List // of *Conn that nobody holds, the oldest first
}

// New bounds the connections of l. None gives way before it was there for the time of grace: long enough to log in or to
// ask for something, and so short that whoever waits in the kernel's queue behind a flood comes in time.
func New(l net.Listener, max int, grace time.Duration) *Listener {
	b := &Listener{Listener: l, max: max, grace: grace}
	b.freed = sync.NewCond(&b.mu)
	return b
}

// Accept returns a *Conn.
func (l *Listener) Accept() (net.Conn, error) {
	for {
		conn, err := l.Listener.Accept()
		if err != nil {
			return nil, err
		}
		if c := l.admit(conn); c != nil {
			return c, nil
		}
		conn.Close()
	}
}

// admit makes room for a connection, or returns nil. It returns once the server has let go of the one that gave way,
// with all that the server kept for it.
func (l *Listener) admit(conn net.Conn) *Conn {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.count >= l.max {
		oldest := l.free.Front()
		if oldest == nil {
			return nil
		}
		if wait := l.grace - time.Since(oldest.Value.(*Conn).since); wait > 0 && !l.closed {
			l.mu.Unlock()
			time.Sleep(wait)
			l.mu.Lock()
			continue
		}
		victim := l.free.Remove(oldest).(*Conn)
		victim.place, victim.gone = nil, true
		victim.Conn.Close() // the server finds out, and calls Close
		for l.count >= l.max && !l.closed {
			l.freed.Wait()
		}
		break
	}
	c := &Conn{Conn: conn, listener: l, since: time.Now()}
	c.place = l.free.PushBack(c)
	l.count++
	return c
}

// Close implements net.Listener.
func (l *Listener) Close() error {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	l.freed.Broadcast()
	return l.Listener.Close()
}

// Conn is a connection of a Listener.
type Conn struct {
	net.Conn
	listener *Listener
	once     sync.Once
	place    *list.Element // in listener.free; nil: held or gone
	gone     bool          // closed, or gave way
	since    time.Time     // nobody has held it
}

// Hold keeps the connection until Release or Close, whoever comes.
func (c *Conn) Hold() {
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	c.remove()
}

// Release undoes Hold.
func (c *Conn) Release() {
	c.listener.mu.Lock()
	defer c.listener.mu.Unlock()
	c.remove()
	if !c.gone {
		c.since = time.Now()
		c.place = c.listener.free.PushBack(c)
	}
}

func (c *Conn) remove() {
	if c.place != nil {
		c.listener.free.Remove(c.place)
		c.place = nil
	}
}

// Close implements net.Conn.
func (c *Conn) Close() error {
	err := c.Conn.Close()
	c.once.Do(func() {
		c.listener.mu.Lock()
		c.remove()
		c.gone = true
		c.listener.count--
		c.listener.mu.Unlock()
		c.listener.freed.Signal()
	})
	return err
}
