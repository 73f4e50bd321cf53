package annotate

import (
	"context"
	"sync"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/mark"
)

const (
	// QueueFactor is how many kills may wait for each one that uses the API server.
	QueueFactor = 8
	// maxFollowing is how many kills may wait until a mark on their pod is decided, some 5 MB.
	maxFollowing = 2000
)

// InFlight bounds how many kills use the API server at once, and how many wait for that: an API server that does not answer must
// not delay the kills that do not need it. Of the kills in one pod only one uses the API server at a time. Where n is 0 in NewInFlight,
// nothing bounds how many do.
type InFlight struct {
	queued, running chan struct{}

	mu        sync.Mutex
	following map[string][]Message // by the UID of a pod that is being marked: the further kills in it
	count     int                  // of those
}

// NewInFlight makes an InFlight of n kills at once.
func NewInFlight(n int) *InFlight {
	f := &InFlight{following: map[string][]Message{}}
	if n > 0 {
		f.queued, f.running = make(chan struct{}, QueueFactor*n), make(chan struct{}, n)
	}
	return f
}

// lead begins to mark a pod. If another kill has begun that, m follows it: the other one's call of done returns m. It returns false for
// both if too many follow.
func (f *InFlight) lead(uid string, m Message) (leads, follows bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	all, marking := f.following[uid]
	switch {
	case !marking:
		f.following[uid] = nil
		return true, false
	case f.count >= maxFollowing:
		return false, false
	}
	f.following[uid] = append(all, m)
	f.count++
	return false, true
}

// done ends what lead began, and returns the kills that followed.
func (f *InFlight) done(uid string) []Message {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := f.following[uid]
	delete(f.following, uid)
	f.count -= len(all)
	return all
}

// acquire waits until fewer kills are in flight. It returns false if too many wait already, or after mark.Timeout.
func (f *InFlight) acquire(ctx context.Context) bool {
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

func (f *InFlight) release() {
	if f.running != nil {
		<-f.running
	}
}
