package annotate

import (
	"context"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/mark"
)

// QueueFactor is how many kills may wait for each one that uses the API server.
const QueueFactor = 8

// InFlight bounds how many kills use the API server at once, and how many wait for that: an API server that does not answer must
// not delay the kills that do not need it. The zero value has no bounds.
type InFlight struct{ queued, running chan struct{} }

// NewInFlight makes an InFlight of n kills at once.
func NewInFlight(n int) InFlight {
	return InFlight{queued: make(chan struct{}, QueueFactor*n), running: make(chan struct{}, n)}
}

// acquire waits until fewer kills are in flight. It returns false if too many wait already, or after mark.Timeout.
func (f InFlight) acquire(ctx context.Context) bool {
	if f.running == nil {
		return true
	}
	select {
	case f.queued <- struct{}{}:
	default:
		return false
	}
	defer func() { <-f.queued }()
	timeout := time.NewTimer(mark.Timeout)
	defer timeout.Stop()
	select {
	case f.running <- struct{}{}:
		return true
	case <-timeout.C:
	case <-ctx.Done():
	}
	return false
}

func (f InFlight) release() {
	if f.running != nil {
		<-f.running
	}
}
