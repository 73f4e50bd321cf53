// Package annotate processes the kills of the stream: it finds the pod, decides, marks the pod, and publishes the outcome.
//
// Rule of the package: every kill has an outcome, no pod but the victim's is changed, and processing a kill twice has the same
// effect as processing it once.
package annotate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/decide"
	"github.com/oom-tracer/oom-tracer/go/internal/mark"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// Delays of redeliveries. They double from firstDelay on.
const (
	firstDelay     = 250 * time.Millisecond
	maxDelay       = 15 * time.Second
	maxLookupDelay = 4 * time.Second  // while the pod or its container is not known yet
	forbiddenTime  = 30 * time.Second // how long to retry without permission: an API server that starts has no roles yet
	// containerWait bounds the wait for the name of a container. The sandbox's container is in no status.
	containerWait = 10 * time.Second
	// clockTolerance is how far a node's clock may be ahead before that is logged.
	clockTolerance = 2 * time.Second
)

// Finder finds the pod of a kill; see pods.Store.
type Finder interface {
	Find(node, uid, containerID string) (pods.Found, error)
}

// EventRecorder records kills as Kubernetes Events; see kubeevents.Recorder.
type EventRecorder interface {
	// Record takes a kill, its outcome, and the sequence of the kill in the stream.
	Record(e *event.Event, o *event.Outcome, seq uint64)
}

// Acker acknowledges a message; see bus.Delivery.
type Acker interface {
	Ack()
	Nak(delay time.Duration)
	Term(reason string)
}

// Message is one delivery of a message of the stream.
type Message struct {
	bus.Stored
	Acker
	Attempt uint64 // from 1
}

// Annotator processes kills. Its methods may be called from any goroutine.
type Annotator struct {
	Policy config.Policy
	Wait   time.Duration // for a pod that is not known yet
	Finder Finder
	// Stale returns why Finder may be out of date, and nil if it is not.
	Stale    func() error
	InFlight *InFlight
	Marker   *mark.Marker
	Outcomes *Outcomes
	Events   EventRecorder // nil: no Events are written
	Metrics  *Metrics
	Log      *slog.Logger
	Now      func() time.Time

	mu                            sync.Mutex // guards what follows
	firstForbidden, lastForbidden time.Time
}

// Handle processes one delivery. Either an outcome is published, and the message is acknowledged when the stream has stored the
// outcome; or the message is delivered again; or it has an outcome already, and is acknowledged. While another call marks the pod of
// the kill, Handle leaves the message to that one.
func (a *Annotator) Handle(ctx context.Context, m Message) {
	for left := []Message{m}; len(left) > 0; left = left[1:] {
		left = append(left, a.handle(ctx, left[0])...)
	}
}

// handle processes one delivery. It returns the messages of the pod that were left to it.
func (a *Annotator) handle(ctx context.Context, m Message) (left []Message) {
	a.Metrics.observed()
	k, refused := decide.ParseKill(m.Subject, m.Data, m.Time, a.Now())
	if refused != nil {
		a.refuse(m, refused)
		return nil
	}
	e := k.Event
	if k.Ahead > clockTolerance {
		a.Metrics.failure(clockReason)
		a.Log.Warn("clock of a node is ahead, using the time of the stream", "node", e.Node.Name, "id", e.ID, "ahead", k.Ahead)
	}
	find := func() decide.Decision {
		if e.Container != nil {
			k.Found, k.Err = a.Finder.Find(e.Node.Name, e.Container.PodUID, e.Container.ContainerID)
		}
		return decide.Decide(&a.Policy, k)
	}
	d := find()
	if a.podMayAppear(m, k) {
		a.retry(m, "pod", maxLookupDelay)
		return nil
	}
	if !d.Act && a.containerMayAppear(m, k) { // a mark does not wait for it
		a.retry(m, "container", maxLookupDelay)
		return nil
	}
	if d.Act {
		uid := k.Found.Pod.UID
		leads, follows := a.InFlight.lead(uid, m)
		switch {
		case follows:
			a.Metrics.waiting("mark")
			return nil
		case !leads:
			a.retry(m, "turn", maxDelay)
			return nil
		}
		done := false
		defer func() {
			if left = append(left, a.InFlight.done(uid)...); done {
				return
			}
			for _, m := range left { // they would fail too
				a.retry(m, "mark", maxDelay)
			}
			left = nil
		}()
		if done = !find().Act; done {
			return []Message{m} // marked a moment ago
		}
		a.Metrics.identified(k)
		if d, done = a.mark(ctx, m, k); !done {
			return nil
		}
	} else {
		a.Metrics.identified(k)
	}
	o := newOutcome(e.ID, e.Node.Name, a.Now(), d)
	if k.Found.Pod != nil {
		setPod(o, k)
		if d.Result == event.ResultAnnotated {
			key, value := a.Policy.Mark()
			o.Annotation = key + "=" + value
		}
	}
	repeated := d.Result == event.ResultAnnotated && !d.Act // an earlier attempt made the mark
	if a.publish(m, o, e, m.Ack, repeated) && a.Events != nil {
		a.Events.Record(e, o, m.Seq)
	}
	return nil
}

// mark marks the pod. It returns false if the message was acknowledged, or will be delivered again.
func (a *Annotator) mark(ctx context.Context, m Message, k *decide.Kill) (d decide.Decision, ok bool) {
	if !a.InFlight.acquire(ctx) {
		a.retry(m, "turn", maxDelay)
		return d, false
	}
	defer a.InFlight.release()
	// A kill that was decided before is not decided again, whatever would be decided now.
	before, err := a.Outcomes.Find(ctx, k.Event.ID, k.Event.Node.Name)
	switch {
	case err != nil:
		if ctx.Err() == nil {
			a.Log.Warn("could not read an earlier outcome of the kill, will try again", "id", k.Event.ID, "error", err)
			a.Metrics.failure(string(event.ReasonUnavailable))
		}
		m.Nak(delay(m.Attempt, maxDelay))
		return d, false
	case before != nil:
		a.Metrics.repeated()
		m.Ack()
		return d, false
	}
	d, annotated, err := a.Marker.Mark(ctx, k)
	if err != nil {
		return a.failed(ctx, m, k, annotated, err)
	}
	return d, true
}

// failed decides whether an error of the API server or of the budget is retried. If not, the decision is the failure.
func (a *Annotator) failed(ctx context.Context, m Message, k *decide.Kill, annotated bool, err error) (d decide.Decision, ok bool) {
	d = decide.Decision{Result: event.ResultFailed, Detail: err.Error()}
	after, left := delay(m.Attempt, maxDelay), a.Policy.MaxEventAge-k.Age
	switch {
	case apierrors.IsForbidden(err):
		d.Reason = event.ReasonForbidden
		since := a.forbiddenSince()
		if m.Time.After(since) {
			since = m.Time
		}
		left = min(left, forbiddenTime-a.Now().Sub(since))
	case apierrors.IsConflict(err), pods.Transient(err):
		d.Reason = event.ReasonUnavailable
	default:
		d.Reason = event.ReasonRejected
		left = 0
	}
	if seconds, ok := apierrors.SuggestsClientDelay(err); ok {
		after = max(after, time.Duration(seconds)*time.Second)
	}
	a.Metrics.failure(string(d.Reason))
	if ctx.Err() != nil {
		m.Nak(0) // shutdown: another replica continues
		return d, false
	}
	if after < left {
		a.Log.Warn("could not mark the pod, will try again", "id", k.Event.ID, "pod", k.Found.Pod.Namespace+"/"+k.Found.Pod.Name,
			"attempt", m.Attempt, "after", after, "error", err)
		m.Nak(after)
		return d, false
	}
	if d.Reason != event.ReasonUnavailable && !annotated { // else the mark may be there
		if err := a.Marker.Release(ctx, k.Event.ID); err != nil {
			a.Log.Warn("could not return the budget of a refused mark, will try again", "id", k.Event.ID, "error", err)
			m.Nak(delay(m.Attempt, maxDelay))
			return d, false
		}
	}
	return d, true
}

// forbiddenSince is when the API server began to forbid. A kill may have waited for it for long before that.
func (a *Annotator) forbiddenSince() time.Time {
	now := a.Now()
	a.mu.Lock()
	defer a.mu.Unlock()
	if now.Sub(a.lastForbidden) > 2*forbiddenTime {
		a.firstForbidden = now
	}
	a.lastForbidden = now
	return a.firstForbidden
}

// podMayAppear reports whether a pod that is not known may be one that the watch has not delivered yet.
func (a *Annotator) podMayAppear(m Message, k *decide.Kill) bool {
	if !errors.Is(k.Err, pods.ErrUnknown) || k.Event.Container.PodUID == "" || k.Age > a.Policy.MaxEventAge {
		return false
	}
	return a.Now().Sub(m.Time) < a.Wait || a.Stale() != nil
}

// containerMayAppear reports whether the pod's status may still name the container. The kubelet reports a container seconds
// after its start, and an init container can be killed within milliseconds.
func (a *Annotator) containerMayAppear(m Message, k *decide.Kill) bool {
	if k.Found.Pod == nil || k.Found.Gone || k.Age > a.Policy.MaxEventAge {
		return false
	}
	return k.Found.Pod.Unnamed(k.Event.Container.ContainerID) && a.Now().Sub(m.Time) < min(a.Wait, containerWait)
}

// retry has the message delivered again.
func (a *Annotator) retry(m Message, missing string, most time.Duration) {
	a.Metrics.waiting(missing)
	m.Nak(delay(m.Attempt, most))
}

// delay is the time until the next attempt: it doubles with each attempt, and half of it is random.
func delay(attempt uint64, most time.Duration) time.Duration {
	d := most
	if attempt < 16 {
		d = min(firstDelay<<max(attempt, 1)>>1, most)
	}
	return d/2 + rand.N(d/2)
}

// refuse ends a message that can never be processed.
func (a *Annotator) refuse(m Message, r *decide.Refusal) {
	a.Metrics.failure(string(r.Reason))
	a.Log.Warn("message refused", "seq", m.Seq, "subject", m.Subject, "id", m.ID, "reason", string(r.Reason), "error", r.Err)
	term := func() { m.Term(string(r.Reason)) }
	_, _, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		term() // an outcome needs a node
		return
	}
	o := newOutcome(unparsedID(&m.Stored), node, a.Now(), decide.Decision{Result: event.ResultFailed, Reason: r.Reason, Detail: fmt.Sprintf("message id %q: %v", m.ID, r.Err)})
	a.publish(m, o, nil, term, false)
}

// unparsedID identifies a message that is no valid kill. Its own ID may be that of another kill.
func unparsedID(m *bus.Stored) string { return fmt.Sprintf("%s-%d", event.StreamName, m.Seq) }

// publish publishes the outcome of a kill, or of a message that is none (e is nil), and acknowledges the message when the stream has
// stored it. It returns false if the message will be delivered again.
func (a *Annotator) publish(m Message, o *event.Outcome, e *event.Event, ack func(), repeated bool) bool {
	var latency time.Duration
	if e != nil {
		latency = a.Now().Sub(e.Time)
	}
	err := a.Outcomes.publish(o, ack, func(duplicate bool) {
		if duplicate {
			a.Metrics.repeated()
			return
		}
		a.Metrics.decided(o, repeated, latency)
		if e != nil {
			a.Metrics.workload(o, e)
		}
	})
	if err != nil {
		if !errors.Is(err, bus.ErrClosed) { // closed: shutdown, another replica continues
			a.Log.Warn("could not publish the outcome, will try again", "id", o.ID, "error", err)
			a.Metrics.failure("publish")
		}
		m.Nak(time.Second)
		return false
	}
	level := slog.LevelDebug
	switch o.Result {
	case event.ResultAnnotated:
		level = slog.LevelInfo
	case event.ResultFailed:
		level = slog.LevelError
	}
	a.Log.Log(context.Background(), level, "kill", "id", o.Kill, "node", o.Node, "result", string(o.Result), "reason", string(o.Reason),
		"pod", podName(o.Pod), "container", o.Container, "detail", o.Detail)
	return true
}

func newOutcome(kill, node string, now time.Time, d decide.Decision) *event.Outcome {
	return &event.Outcome{
		Schema: event.Schema, ID: event.OutcomeID(kill, event.StageAnnotate), Kill: kill, Stage: event.StageAnnotate,
		Time: now.UTC(), Result: d.Result, Reason: d.Reason, Detail: text.Detail(d.Detail), Node: node,
	}
}

// setPod sets the pod and the container of an outcome.
func setPod(o *event.Outcome, k *decide.Kill) {
	p := k.Found.Pod
	o.Pod = &event.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID, Owner: p.Owner}
	if c := p.Container(k.Event.Container.ContainerID); c != nil {
		spec := c.Spec.Value()
		o.Container, o.Image, o.Restarts = spec.Name, spec.Image, &c.Restarts
	}
}

func podName(p *event.PodRef) string {
	if p == nil {
		return ""
	}
	return p.Namespace + "/" + p.Name
}
