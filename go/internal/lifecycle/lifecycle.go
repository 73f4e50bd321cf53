// Package lifecycle follows marks to their end: the pod was evicted or left, a descheduler refused it, or the mark expired. It
// publishes that as the outcome of the stage close.
package lifecycle

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/decide"
	"github.com/oom-tracer/oom-tracer/go/internal/mark"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const (
	// checkInterval is how often marks are compared with their lifetime.
	checkInterval = 5 * time.Second
	// outcomeWait is how long after a pod has left the outcome that it was annotated may be stored. The stream is read every
	// readInterval.
	outcomeWait  = 30 * time.Second
	readInterval = time.Second
	// leftInterval is how often the pods that have left are looked at until their outcomes are published.
	leftInterval = 200 * time.Millisecond
	// maxLeft bounds the pods that have left and whose outcome is not published. Those above are found at the next start.
	maxLeft = 10_000
)

// evictionFailed is the reason of Events on pods that were not evicted: by RemoveAnnotated, and by any descheduler whose policy
// has evictionFailureEventNotification (EvictPod in its pkg/descheduler/evictions).
const evictionFailed = "EvictionFailed"

// Pods lists the pods that were marked; see pods.Store.
type Pods interface {
	Hit() []*pods.Pod
	Has(uid string) bool
}

// Tracker publishes the end of marks. Every replica runs one, and the stream stores one outcome of them. A Tracker works on
// nothing but the pods, so that another replica, or the next one, finds what it missed.
type Tracker struct {
	Lifetime  time.Duration // of a mark, from its kill on
	Retention time.Duration // how long after its kill the end of a mark is published; more than Lifetime
	Pods      Pods
	Marker    *mark.Marker
	// Events lists the Events of a reason on a pod; see pods.Client.
	Events func(ctx context.Context, namespace, uid, reason string) ([]corev1.Event, error)
	// Annotated reads the outcome of the stage annotate. It returns nil and nil if there is none.
	Annotated func(ctx context.Context, kill, node string) (*event.Outcome, error)
	Publish   func(o *event.Outcome) error
	Log       *slog.Logger
	Now       func() time.Time

	mu     sync.Mutex
	wake   chan struct{} // holds a token if a pod has left; nil before Run
	left   []leftPod
	closed map[string]struct{} // IDs of kills

	open map[string]*event.Outcome // by kill: the marks that had no end when Run began
}

// leftPod is a pod whose mark has ended, and the end is not published yet.
type leftPod struct {
	pod         *pods.Pod
	end         end
	next, until time.Time // when to read the stream next, and until when
}

// end finds out how a mark ended.
type end func() (event.Result, event.Reason, string)

// PodLeft records that a marked pod leaves; see pods.Store.OnLeave.
func (t *Tracker) PodLeft(p *pods.Pod) {
	if !decide.ValidID(p.Mark.Kill) {
		return // no annotator wrote this
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, done := t.closed[p.Mark.Kill]; !done && len(t.left) < maxLeft {
		t.left = append(t.left, leftPod{pod: p, end: left(p.Evicted)})
		select {
		case t.wake <- struct{}{}:
		default:
		}
	}
}

// Run publishes the ends of marks until ctx ends. outcomes reads the outcomes of the stream since a time: the pods that left
// while no annotator ran are in them.
func (t *Tracker) Run(ctx context.Context, outcomes func(ctx context.Context, since time.Time, each func(bus.Stored) error) error) {
	since := t.Now().Add(-t.Retention)
	for t.readOpen(ctx, since, outcomes) != nil {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return
		}
	}
	for kill, o := range t.open {
		if o.Pod != nil && !t.Pods.Has(o.Pod.UID) {
			delete(t.open, kill)
			_ = t.close(ctx, o, left(false)) // the next start finds it again
		}
	}
	wake := make(chan struct{}, 1)
	t.mu.Lock()
	t.wake = wake
	t.mu.Unlock()
	tick := time.NewTicker(checkInterval)
	defer tick.Stop()
	t.checkAll(ctx)
	for {
		var again <-chan time.Time
		if t.closeLeft(ctx) > 0 {
			again = time.After(leftInterval)
		}
		select {
		case <-wake:
		case <-again:
		case <-tick.C:
			t.checkAll(ctx)
		case <-ctx.Done():
			return
		}
	}
}

// checkAll ends the marks of pods that are still there and due.
func (t *Tracker) checkAll(ctx context.Context) {
	now := t.Now()
	for _, p := range t.Pods.Hit() {
		t.check(ctx, p, now)
	}
}

// readOpen reads the marks without an end.
func (t *Tracker) readOpen(ctx context.Context, since time.Time, outcomes func(context.Context, time.Time, func(bus.Stored) error) error) error {
	t.open = map[string]*event.Outcome{}
	return outcomes(ctx, since, func(m bus.Stored) error {
		o, err := event.ParseOutcome(m.Data)
		switch {
		case err != nil: // not an outcome
		case o.Stage == event.StageClose:
			delete(t.open, o.Kill)
		case o.Stage == event.StageAnnotate && o.Result == event.ResultAnnotated:
			t.open[o.Kill] = &o
		}
		return nil
	})
}

// closeLeft publishes the end of the marks whose pods have left. It returns how many are not published yet.
func (t *Tracker) closeLeft(ctx context.Context) int {
	t.mu.Lock()
	all := t.left
	t.left = nil
	t.mu.Unlock()
	keep := all[:0]
	for i, l := range all {
		now := t.Now()
		if now.Before(l.next) {
			keep = append(keep, l)
			continue
		}
		done, err := t.closePod(ctx, l.pod, l.end)
		if err != nil { // the others would fail too
			keep = append(keep, all[i:]...)
			break
		}
		if l.until.IsZero() {
			l.until = now.Add(outcomeWait)
		}
		// Without that outcome the mark is not from these annotators, but from another cluster's NATS or from somebody else.
		if l.next = now.Add(readInterval); !done && now.Before(l.until) {
			keep = append(keep, l)
		}
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.left = append(keep, t.left...)
	return len(t.left)
}

// check ends the mark of a pod that is still there, if it is due.
func (t *Tracker) check(ctx context.Context, p *pods.Pod, now time.Time) {
	age := now.Sub(p.Mark.Time)
	switch {
	case p.Finished:
	case p.Mark.Annotation != "" && p.Mark.Annotation != t.Marker.Terms.Mark:
		t.unmark(ctx, p, p.Mark.Annotation, func() (event.Result, event.Reason, string) {
			return event.ResultExpired, event.ReasonReconfigured, ""
		})
	case p.Marked:
		// Earlier versions took over the time of a node whose clock was ahead: such a mark would never end.
		if age > t.Lifetime || age < -t.Lifetime {
			t.unmark(ctx, p, t.Marker.Terms.Mark, t.expired(ctx, p))
		}
	case p.Condition != "" && p.Condition == p.Mark.Kill:
		// Somebody removed the annotation, or unmark failed after it.
		if err := t.Marker.RemoveCondition(ctx, p); err != nil && ctx.Err() == nil {
			t.Log.Warn("could not remove the condition of a pod without annotation, will try again", "pod", p.Namespace+"/"+p.Name, "error", err)
		}
	case t.Marker.Terms.Mark == "": // observe-only: the marks are not ours
	case age > t.Lifetime && age < t.Retention:
		_, _ = t.closePod(ctx, p, t.expired(ctx, p)) // the next check tries again
	}
}

// unmark removes the annotation of a key from a pod, and publishes the end of its mark.
func (t *Tracker) unmark(ctx context.Context, p *pods.Pod, key string, how end) {
	err := t.Marker.Remove(ctx, p, key)
	switch {
	case err == nil:
		if _, err := t.closePod(ctx, p, how); err != nil { // the pod no longer shows how its mark ended
			t.mu.Lock()
			defer t.mu.Unlock()
			t.left = append(t.left, leftPod{pod: p, end: how})
		}
	case errors.Is(err, mark.ErrChanged), apierrors.IsNotFound(err), apierrors.IsConflict(err), ctx.Err() != nil:
		// Another replica was faster, or the pod leaves: the watch will show it.
	default:
		t.Log.Warn("could not remove a mark, will try again", "pod", p.Namespace+"/"+p.Name, "annotation", key, "error", err)
	}
}

// closePod publishes the end of the mark of a pod. It returns false if no outcome in the stream says that the mark was made.
func (t *Tracker) closePod(ctx context.Context, p *pods.Pod, how end) (done bool, err error) {
	t.mu.Lock()
	_, done = t.closed[p.Mark.Kill]
	t.mu.Unlock()
	if done {
		return true, nil
	}
	annotated := t.open[p.Mark.Kill] // earlier versions published it on another subject
	if annotated == nil {
		annotated, err = t.Annotated(ctx, p.Mark.Kill, p.Node)
	}
	if err == nil && annotated != nil && annotated.Pod != nil && annotated.Pod.UID == p.UID {
		done, err = true, t.close(ctx, annotated, how)
	}
	if err != nil && ctx.Err() == nil {
		t.Log.Debug("could not publish the end of a mark, will try again", "id", p.Mark.Kill, "error", err)
	}
	return done, err
}

// close publishes the end of a mark.
func (t *Tracker) close(ctx context.Context, annotated *event.Outcome, how end) error {
	kill := annotated.Kill
	o := &event.Outcome{
		Schema: event.Schema, ID: event.OutcomeID(kill, event.StageClose), Kill: kill, Stage: event.StageClose, Time: t.Now().UTC(), Node: annotated.Node, Pod: annotated.Pod,
	}
	o.Result, o.Reason, o.Detail = how()
	o.Detail = text.Detail(o.Detail)
	if err := ctx.Err(); err != nil {
		return err // during shutdown the reads may have failed, and the result may be wrong
	}
	if err := t.Publish(o); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.closed == nil {
		t.closed = map[string]struct{}{}
	}
	t.closed[kill] = struct{}{}
	return nil
}

// left is the end of a mark whose pod has left.
func left(evicted bool) end {
	reason := event.ReasonLeft
	if evicted {
		reason = event.ReasonEvicted
	}
	return func() (event.Result, event.Reason, string) { return event.ResultEvicted, reason, "" }
}

// expired is the end of a mark that was too old while its pod was still there: refused, if an Event says why the pod had to stay.
func (t *Tracker) expired(ctx context.Context, p *pods.Pod) end {
	return func() (event.Result, event.Reason, string) {
		events, err := t.Events(ctx, p.Namespace, p.UID, evictionFailed)
		if err != nil {
			return event.ResultExpired, event.ReasonLifetime, "whether a descheduler refused is not known: " + err.Error()
		}
		var last *corev1.Event
		for i := range events {
			if e := &events[i]; lastSeen(e).After(p.Mark.Time) && (last == nil || lastSeen(e).After(lastSeen(last))) {
				last = e
			}
		}
		if last == nil {
			return event.ResultExpired, event.ReasonLifetime, ""
		}
		return event.ResultRefused, event.ReasonEvictor, last.Message
	}
}

// lastSeen is when an Event was last seen. Which field has that depends on its writer and the API that it used.
func lastSeen(e *corev1.Event) time.Time {
	last := e.LastTimestamp.Time
	if e.EventTime.After(last) {
		last = e.EventTime.Time
	}
	if e.Series != nil && e.Series.LastObservedTime.After(last) {
		last = e.Series.LastObservedTime.Time
	}
	return last
}
