package annotate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const (
	// closeInterval is how often marks are held against their lifetime.
	closeInterval = 5 * time.Second
	// closeWait is how long the outcome that says that a pod was annotated may come after the pod has left. It is looked for
	// every leaveInterval.
	closeWait     = 30 * time.Second
	leaveInterval = time.Second
	// maxLeaving is how many pods that leave may wait to be told of. Those above are found at the next start.
	maxLeaving = 10_000
)

// Marks knows the pods that were marked; see pods.Store.
type Marks interface {
	Hit() []*pods.Pod
	Has(uid string) bool
}

// CloserAPI is what is asked of the API server.
type CloserAPI interface {
	API
	Events(ctx context.Context, namespace, uid, reason string) ([]corev1.Event, error)
}

// evictionFailed is the reason of the Events that say why a pod was not evicted: of RemoveAnnotated, and of any descheduler
// whose policy has evictionFailureEventNotification (EvictPod in its pkg/descheduler/evictions).
const evictionFailed = "EvictionFailed"

// Closer says what became of the pods that were marked: the last word on their kills. Every replica sees what
// there is to see, and the stream keeps one word of them. It works on nothing but the pods, so that what one
// replica missed another one sees, or the next one.
type Closer struct {
	Terms    pods.Terms
	Lifetime time.Duration // of a mark, from its kill on
	Memory   time.Duration // how long after its kill the end of a mark is looked for; more than Lifetime
	API      CloserAPI
	Marks    Marks
	Last     Last
	Outlet   Outlet
	Metrics  *Metrics
	Log      *slog.Logger
	Now      func() time.Time

	mu      sync.Mutex
	leaving []leaving
	closed  map[string]struct{} // IDs of kills

	open map[string]*event.Outcome // by kill: the marks that had no end when Run began
}

// leaving is a mark that has gone, and whose end is not published yet.
type leaving struct {
	pod         *pods.Pod
	how         end
	next, until time.Time // when the stream is asked, and until when
}

// Leave takes a marked pod that leaves; see pods.Store.OnLeave.
func (c *Closer) Leave(p *pods.Pod) {
	if !plainID.MatchString(p.Mark.Kill) {
		return // not written by us
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, done := c.closed[p.Mark.Kill]; done || len(c.leaving) >= maxLeaving {
		return
	}
	c.leaving = append(c.leaving, leaving{pod: p, how: left(p.Evicted)})
}

// Run closes until ctx ends. outcomes are those that the stream holds: what left while nobody watched is found in
// them.
func (c *Closer) Run(ctx context.Context, outcomes []event.Outcome) {
	c.open = map[string]*event.Outcome{}
	for i := range outcomes {
		o := &outcomes[i]
		if o.Pod != nil && !c.Marks.Has(o.Pod.UID) {
			_ = c.close(ctx, o, left(false)) // found again at the next start
		} else {
			c.open[o.Kill] = o
		}
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	next := c.Now()
	for {
		c.mu.Lock()
		all := c.leaving
		c.leaving = nil
		c.mu.Unlock()
		keep := all[:0]
		for i, l := range all {
			now := c.Now()
			if now.Before(l.next) {
				keep = append(keep, l)
				continue
			}
			done, err := c.closePod(ctx, l.pod, l.how)
			if err != nil { // it says nothing of the others either
				keep = append(keep, all[i:]...)
				break
			}
			if l.until.IsZero() {
				l.until = now.Add(closeWait)
			}
			// Where that does not come the mark is not of these annotators: another cluster's NATS, another hand.
			if l.next = now.Add(leaveInterval); !done && now.Before(l.until) {
				keep = append(keep, l)
			}
		}
		c.mu.Lock()
		c.leaving = append(keep, c.leaving...)
		c.mu.Unlock()
		if now := c.Now(); !now.Before(next) {
			next = now.Add(closeInterval)
			for _, p := range c.Marks.Hit() {
				c.look(ctx, p, now)
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// look does what is due to a pod that was marked and is still there.
func (c *Closer) look(ctx context.Context, p *pods.Pod, now time.Time) {
	age := now.Sub(p.Mark.Time)
	switch {
	case p.Finished:
	case p.Mark.Annotation != "" && p.Mark.Annotation != c.Terms.Mark:
		c.unmark(ctx, p, p.Mark.Annotation, func() (event.Result, event.Reason, string) {
			return event.ResultExpired, event.ReasonReconfigured, ""
		})
	case p.Marked:
		// Annotators before this one took over the time of a node whose clock was ahead: such a mark would never end.
		if age > c.Lifetime || age < -c.Lifetime {
			c.unmark(ctx, p, c.Terms.Mark, c.over(ctx, p))
		}
	case p.Condition != "" && p.Condition == p.Mark.Kill:
		// Somebody has taken the annotation back, or who did so at the end of its time got no further.
		c.uncondition(ctx, p)
	case c.Terms.Mark == "": // whoever only observes ends no marks of others
	case age > c.Lifetime && age < c.Memory:
		_, _ = c.closePod(ctx, p, c.over(ctx, p)) // the next look tries again
	}
}

// end finds out how a mark ended.
type end func() (event.Result, event.Reason, string)

func left(evicted bool) end {
	return func() (event.Result, event.Reason, string) {
		if evicted {
			return event.ResultEvicted, event.ReasonEvicted, ""
		}
		return event.ResultEvicted, event.ReasonLeft, ""
	}
}

// closePod publishes what became of a pod. It returns false for a mark of which the stream does not say that it was made.
func (c *Closer) closePod(ctx context.Context, p *pods.Pod, how end) (done bool, err error) {
	c.mu.Lock()
	_, done = c.closed[p.Mark.Kill]
	c.mu.Unlock()
	if done {
		return true, nil
	}
	annotated := c.open[p.Mark.Kill] // versions before published it on a subject that others share
	if annotated == nil {
		annotated, err = stored(ctx, c.Last, p.Mark.Kill, p.Node)
	}
	if err == nil && annotated != nil && annotated.Pod != nil && annotated.Pod.UID == p.UID {
		done, err = true, c.close(ctx, annotated, how)
	}
	if err != nil && ctx.Err() == nil {
		c.Log.Debug("could not publish the end of a mark, will try again", "id", p.Mark.Kill, "error", err)
	}
	return done, err
}

// close publishes what became of the pod of an outcome.
func (c *Closer) close(ctx context.Context, annotated *event.Outcome, how end) error {
	kill := annotated.Kill
	o := &event.Outcome{
		Schema: event.Schema, ID: event.OutcomeID(kill, event.StageClose), Kill: kill, Stage: event.StageClose, Time: c.Now().UTC(), Node: annotated.Node, Pod: annotated.Pod,
	}
	o.Result, o.Reason, o.Detail = how()
	o.Detail = cut(text.Printable(o.Detail), maxDetail)
	if err := ctx.Err(); err != nil {
		return err // what was found out on the way down may be wrong
	}
	if err := c.publish(o); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed == nil {
		c.closed = map[string]struct{}{}
	}
	c.closed[kill] = struct{}{}
	return nil
}

func (c *Closer) publish(o *event.Outcome) error {
	return enqueue(c.Outlet, o, &tag{settle: func() {}, stored: func(again bool) {
		if again {
			return // another replica was faster
		}
		c.Metrics.closed(o)
		c.Log.Info("mark is closed", "id", o.Kill, "pod", podName(o.Pod), "result", string(o.Result), "reason", string(o.Reason), "detail", o.Detail)
	}})
}

// errChanged means that the pod is not what it was any more.
var errChanged = errors.New("the pod has changed")

// unmark takes the mark of a key from a pod, if it is still the one that was told of. What was killed stands there still.
func (c *Closer) unmark(ctx context.Context, p *pods.Pod, key string, how end) {
	err := func() error {
		read, err := c.API.Get(ctx, p.Namespace, p.Name)
		if err != nil {
			return err
		}
		now := c.Terms.Read(read)
		if _, marked := read.Annotations[key]; now.UID != p.UID || !marked || now.Kill() != p.Mark.Kill || now.Finished {
			return errChanged
		}
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
			"uid": p.UID, "resourceVersion": read.ResourceVersion, "annotations": map[string]any{key: nil},
		}})
		if err != nil {
			return fmt.Errorf("write the patch: %w", err)
		}
		if read, err = c.API.Patch(ctx, p.Namespace, p.Name, patch); err == nil && now.Condition == p.Mark.Kill {
			c.removeCondition(ctx, read)
		}
		return err
	}()
	switch {
	case err == nil:
		if _, err := c.closePod(ctx, p, how); err != nil { // the pod no longer says how its mark ended
			c.mu.Lock()
			c.leaving = append(c.leaving, leaving{pod: p, how: how})
			c.mu.Unlock()
		}
	case errors.Is(err, errChanged), apierrors.IsNotFound(unwrap(err)), apierrors.IsConflict(unwrap(err)), ctx.Err() != nil:
		// Another replica, or it leaves: the watch tells.
	default:
		c.Log.Warn("mark cannot be removed, will try again", "pod", p.Namespace+"/"+p.Name, "annotation", key, "error", err)
	}
}

// over is the end of a mark whose time is over and whose pod is still there: refused, if somebody said why it had to stay.
func (c *Closer) over(ctx context.Context, p *pods.Pod) end {
	return func() (event.Result, event.Reason, string) {
		events, err := c.API.Events(ctx, p.Namespace, p.UID, evictionFailed)
		if err != nil {
			return event.ResultExpired, event.ReasonLifetime, "whether a descheduler refused is not known: " + err.Error()
		}
		var last *corev1.Event
		for i := range events {
			if e := &events[i]; seen(e).After(p.Mark.Time) && (last == nil || seen(e).After(seen(last))) {
				last = e
			}
		}
		if last == nil {
			return event.ResultExpired, event.ReasonLifetime, ""
		}
		return event.ResultRefused, event.ReasonEvictor, last.Message
	}
}

// seen is when an Event was seen last. Which field says so depends on who wrote it, and with which API.
func seen(e *corev1.Event) time.Time {
	last := e.LastTimestamp.Time
	if at := e.EventTime.Time; at.After(last) {
		last = at
	}
	if e.Series != nil && e.Series.LastObservedTime.After(last) {
		last = e.Series.LastObservedTime.Time
	}
	return last
}

// uncondition takes the condition from a pod that has no annotation any more.
func (c *Closer) uncondition(ctx context.Context, p *pods.Pod) {
	read, err := c.API.Get(ctx, p.Namespace, p.Name)
	if err != nil {
		if !apierrors.IsNotFound(err) && ctx.Err() == nil {
			c.Log.Warn("a condition without its annotation cannot be removed yet", "pod", p.Namespace+"/"+p.Name, "error", err)
		}
		return
	}
	if now := c.Terms.Read(read); now.UID == p.UID && !now.Marked && now.Condition == p.Mark.Kill {
		c.removeCondition(ctx, read)
	}
}

// removeCondition takes the condition from a pod as it was read. Where that fails it is seen at the next look.
func (c *Closer) removeCondition(ctx context.Context, read *corev1.Pod) {
	patch, err := statusPatch(read, map[string]any{"type": c.Terms.Condition, "$patch": "delete"})
	if err == nil {
		_, err = c.API.PatchStatus(ctx, read.Namespace, read.Name, patch)
	}
	if err != nil && !apierrors.IsNotFound(err) && !apierrors.IsConflict(err) && ctx.Err() == nil {
		c.Log.Warn("a condition without its annotation cannot be removed yet", "pod", read.Namespace+"/"+read.Name, "error", err)
	}
}
