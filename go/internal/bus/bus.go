// Package bus is the client's side of everything that OOM Tracer does with NATS: it connects, makes
// the stream, publishes without losing anything, and reads back. The server that runs inside the
// node agent is in the package embedded below it, so that the other programs do not carry it.
//
// Rule of the package: a message is forgotten only when JetStream has acknowledged it, and whatever
// stands in the way of that is said once, in words that name the cause.
package bus

import (
	"context"
	"math/rand/v2"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// Times. All of them are upper bounds of one step, not of the whole.
const (
	dialTimeout    = 5 * time.Second  // one server: resolve, connect, TLS, log in
	requestTimeout = 5 * time.Second  // one request to the JetStream API
	ackTimeout     = 5 * time.Second  // from a publish to its acknowledgement
	closeTimeout   = 6 * time.Second  // longer than dialTimeout: nats.go dials under its own lock
	pingInterval   = 20 * time.Second // a dead peer is noticed after three of them (2 min x 3 by default)
	backoffMin     = 250 * time.Millisecond
	backoffMax     = 10 * time.Second
)

// backoff is the time to wait after the nth failure in a row (n from 1): it doubles from backoffMin to
// backoffMax, and half of it is random, so that thousands of nodes do not come back as one.
func backoff(n int) time.Duration {
	d := min(backoffMin<<min(max(n-1, 0), 16), backoffMax)
	return d/2 + rand.N(d/2)
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// TracerName names the connection of a node's tracer. The permissions of its inbox follow from it.
func TracerName(node string) string {
	token, err := event.NodeToken(node)
	if err != nil {
		token = node // nothing can be published for it either
	}
	return "oom-tracer." + token
}
