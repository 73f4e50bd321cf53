package notify

import (
	"context"
	"errors"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// The delays after failures. They double from backoffMin on.
const (
	backoffMin = time.Second
	backoffMax = time.Minute
)

func backoff(failures int) time.Duration {
	d := min(backoffMin<<min(failures-1, 16), backoffMax)
	return d/2 + rand.N(d/2+1)
}

// receiver sends the items to one receiver, one message at a time. What belongs together is one message.
type receiver struct {
	name    string
	cfg     config.Notify
	format  *format
	post    func(ctx context.Context, body []byte) error
	metrics *metrics
	log     *slog.Logger
	wake    chan struct{} // holds a token if an item was added

	mu     sync.Mutex
	groups map[groupKey]*group
	err    error // of the last message; nil: it was taken

	// Only run uses these.
	free     time.Time // when the next message may be sent, of whatever group
	failures int       // in a row
}

// group is what belongs together: the kills of one owner, or the gaps of one cause.
type group struct {
	items    []*item
	due      time.Time // when the next message about it may be sent
	failures int       // of this message
}

func newReceiver(name string, cfg config.Notify, f *format, post func(context.Context, []byte) error, m *metrics, log *slog.Logger) *receiver {
	return &receiver{
		name: name, cfg: cfg, format: f, post: post, metrics: m, log: log.With("receiver", name),
		wake: make(chan struct{}, 1), groups: map[groupKey]*group{},
	}
}

// failing returns why the receiver did not take the last message, and nil if it did.
func (r *receiver) failing() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.err
}

// add adds an item to its group.
func (r *receiver) add(i *item) {
	key, now := keyOf(i), time.Now()
	r.mu.Lock()
	g := r.groups[key]
	if g == nil {
		g = &group{due: now}
		r.groups[key] = g
	}
	if len(g.items) == 0 && !now.Before(g.due) {
		g.due = now.Add(r.cfg.GroupWait)
	}
	g.items = append(g.items, i)
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// run sends messages until ctx ends. A message that is on its way then has until sending ends.
func (r *receiver) run(ctx, sending context.Context) {
	for ctx.Err() == nil {
		key, g, wait := r.next(time.Now())
		if g != nil {
			r.send(sending, key, g)
			continue
		}
		timer := time.NewTimer(wait)
		select {
		case <-r.wake:
		case <-timer.C:
		case <-ctx.Done():
		}
		timer.Stop()
	}
}

// next returns the group that is due for the longest time, or how long to wait for one. Groups without items are removed when a further
// item may begin a new one.
func (r *receiver) next(now time.Time) (key groupKey, first *group, wait time.Duration) {
	wait = time.Minute
	r.mu.Lock()
	defer r.mu.Unlock()
	for k, g := range r.groups {
		switch {
		case len(g.items) == 0 && !now.Before(g.due):
			delete(r.groups, k)
		case len(g.items) > 0 && (first == nil || g.due.Before(first.due)):
			key, first = k, g
		}
	}
	if first == nil {
		return key, nil, wait
	}
	at := first.due
	if r.free.After(at) {
		at = r.free
	}
	if at.After(now) {
		return key, nil, at.Sub(now)
	}
	return key, first, 0
}

// send sends one message about a group.
func (r *receiver) send(ctx context.Context, key groupKey, g *group) {
	now := time.Now()
	r.mu.Lock()
	items := slices.Clone(g.items)
	lastErr := r.err
	r.mu.Unlock()

	var old []*item
	items = slices.DeleteFunc(items, func(i *item) bool {
		tooOld := now.Sub(i.stored) > r.cfg.MaxAge
		if tooOld {
			old = append(old, i)
		}
		return tooOld
	})
	if len(old) > 0 {
		r.giveUp(key, g, old, reasonTooOld, lastErr)
	}
	if len(items) == 0 {
		return
	}

	n := newNotification(key, items, r.format.escape)
	n.Link = r.cfg.Link
	body, err := r.format.body(n, now.Add(r.cfg.ResolveAfter))
	if err != nil {
		r.metrics.templates.WithLabelValues(r.name).Inc()
		r.log.Warn("template failed, sending the default text", "key", "notify."+r.name+".template", "title", n.Title, "error", err)
	}
	err = r.post(ctx, body)
	if ctx.Err() != nil && err != nil {
		return // shutdown: the next process sends it
	}
	now = time.Now()
	r.free = now.Add(r.cfg.MinInterval)
	switch {
	case err == nil:
		r.failures = 0
		r.metrics.messages.WithLabelValues(r.name, resultSent).Inc()
		r.metrics.notified.WithLabelValues(r.name, n.Kind).Add(float64(len(items)))
		r.log.Info("message sent", "title", n.Title, "count", len(items))
		r.ended(g, nil, now.Add(r.cfg.GroupInterval))
		r.remove(g, items)
	case refused(err):
		r.failures = 0
		r.metrics.messages.WithLabelValues(r.name, resultRefused).Inc()
		r.ended(g, err, now.Add(r.cfg.GroupInterval))
		r.giveUp(key, g, items, reasonRefused, err)
	default:
		r.failures++
		g.failures++
		pause := backoff(r.failures)
		if a, ok := errors.AsType[*answerError](err); ok {
			pause = max(pause, a.retryAfter)
		}
		r.free = now.Add(max(pause, r.cfg.MinInterval))
		r.metrics.messages.WithLabelValues(r.name, resultFailed).Inc()
		r.log.Warn("could not send the message, will try again", "title", n.Title, "count", len(items), "attempt", g.failures, "after", pause, "error", err)
		r.mu.Lock()
		g.due, r.err = now.Add(backoff(g.failures)), err
		r.mu.Unlock()
	}
}

// ended ends a message: the next one about its group may be sent at due.
func (r *receiver) ended(g *group, err error, due time.Time) {
	r.mu.Lock()
	defer r.mu.Unlock()
	g.due, g.failures, r.err = due, 0, err
}

// remove takes items out of a group. Only run removes any, and add adds at the end.
func (r *receiver) remove(g *group, items []*item) {
	gone := make(map[*item]bool, len(items))
	for _, i := range items {
		gone[i] = true
	}
	r.mu.Lock()
	g.items = slices.DeleteFunc(g.items, func(i *item) bool { return gone[i] })
	r.mu.Unlock()
	for _, i := range items {
		i.done()
	}
}

// giveUp ends items without a message.
func (r *receiver) giveUp(key groupKey, g *group, items []*item, reason string, err error) {
	r.metrics.givenUp.WithLabelValues(r.name, reason).Add(float64(len(items)))
	r.log.Error("message given up", "about", key.String(), "count", len(items), "reason", reason, "error", err)
	r.remove(g, items)
}
