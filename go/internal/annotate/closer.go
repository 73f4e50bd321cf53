package annotate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

const (
	// closeInterval is how often marks are held against their lifetime.
	closeInterval = 5 * time.Second
	// closeWait is how long the outcome that says that a pod was annotated may come after the pod has left.
	closeWait = 30 * time.Second
	// maxLeaving is how many pods that leave may wait to be told of. Those above are found at the next start.
	maxLeaving = 10_000
)

// Marks knows the marked pods; see pods.Store.
type Marks interface {
	Marked() []*pods.Pod
	Has(uid string) bool
}

// Closer says what became of the pods that were marked: the last word on their kills. Every replica sees what
// there is to see, and the stream keeps one word of them. It works on nothing but the pods, so that what one
// replica missed another one sees, or the next one.
type Closer struct {
	Terms    pods.Terms
	Lifetime time.Duration // of a mark, from its kill on
	API      API
	Marks    Marks
	Told     Told
	Outlet   Outlet
	Metrics  *Metrics
	Log      *slog.Logger
	Now      func() time.Time

	mu      sync.Mutex
	leaving []leaving
	closed  map[string]struct{} // IDs of kills
}

type leaving struct {
	pod   *pods.Pod
	heard time.Time
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
	c.leaving = append(c.leaving, leaving{p, c.Now()})
}

// Run closes until ctx ends. outcomes are those that the stream holds: what left while nobody watched is found in
// them.
func (c *Closer) Run(ctx context.Context, outcomes []event.Outcome) {
	for i := range outcomes {
		o := &outcomes[i]
		if o.Pod != nil && !c.Marks.Has(o.Pod.UID) {
			c.close(ctx, o.Kill, o.Node, o.Time, o.Pod, event.ResultEvicted, event.ReasonLeft)
		}
	}
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	next := c.Now()
	for {
		c.mu.Lock()
		left := c.leaving
		c.leaving = nil
		c.mu.Unlock()
		for _, l := range left {
			reason := event.ReasonLeft
			if l.pod.Evicted {
				reason = event.ReasonEvicted
			}
			// Where that does not come the mark is not of these annotators: another cluster's NATS, another hand.
			if !c.close(ctx, l.pod.Mark.Kill, l.pod.Node, l.pod.Mark.Time, ref(l.pod), event.ResultEvicted, reason) && c.Now().Sub(l.heard) < closeWait {
				c.mu.Lock()
				c.leaving = append(c.leaving, l)
				c.mu.Unlock()
			}
		}
		if now := c.Now(); !now.Before(next) {
			next = now.Add(closeInterval)
			for _, p := range c.Marks.Marked() {
				if now.Sub(p.Mark.Time) > c.Lifetime && !p.Finished {
					c.expire(ctx, p)
				}
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

func ref(p *pods.Pod) *event.PodRef {
	return &event.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID}
}

// close tells what became of a pod, unless that is told. It returns false where that cannot be done now, and for a kill
// of which the stream does not say that its pod was annotated.
func (c *Closer) close(ctx context.Context, kill, node string, since time.Time, pod *event.PodRef, result event.Result, reason event.Reason) bool {
	c.mu.Lock()
	_, done := c.closed[kill]
	c.mu.Unlock()
	if done {
		return true
	}
	o := &event.Outcome{
		Schema: event.Schema, ID: event.OutcomeID(kill, event.StageClose), Kill: kill, Stage: event.StageClose, Time: c.Now().UTC(),
		Result: result, Reason: reason, Node: node, Pod: pod,
	}
	since = since.Add(-c.Lifetime) // the clocks of a node and of NATS need not agree
	// As of a second ago: marks by another hand, which may be many, must not have the stream read for each look.
	ours, err := c.Told.Has(ctx, event.OutcomeID(kill, event.StageAnnotate), since, time.Second)
	if err == nil && !ours {
		return false
	}
	told := false
	if err == nil {
		told, err = c.Told.Has(ctx, o.ID, since, closeInterval) // read a moment ago
	}
	if err == nil && !told {
		err = c.publish(o, since)
	}
	if err != nil {
		if ctx.Err() == nil {
			c.Log.Debug("the end of a mark cannot be told now, will try again", "id", kill, "error", err)
		}
		return false
	}
	c.mu.Lock()
	if c.closed == nil {
		c.closed = map[string]struct{}{}
	}
	c.closed[kill] = struct{}{}
	c.mu.Unlock()
	return true
}

func (c *Closer) publish(o *event.Outcome, killed time.Time) error {
	subject, err := o.Subject()
	if err != nil {
		return err
	}
	data, err := json.Marshal(o)
	if err != nil {
		return err
	}
	return c.Outlet.Enqueue(bus.Msg{ID: o.ID, Subject: subject, Data: data, Tag: tag{settle: func() {}, killed: killed, stored: func() {
		c.Metrics.closed(o)
		c.Log.Info("mark is closed", "id", o.Kill, "pod", podName(o.Pod), "result", string(o.Result), "reason", string(o.Reason))
	}}})
}

// errChanged means that the pod is not what it was any more.
var errChanged = errors.New("the pod has changed")

// expire takes the mark from a pod, if it is still the one that was told of. What was killed stands there still.
func (c *Closer) expire(ctx context.Context, p *pods.Pod) {
	err := func() error {
		read, err := c.API.Get(ctx, p.Namespace, p.Name)
		if err != nil {
			return err
		}
		now := c.Terms.Read(read)
		if now.UID != p.UID || !now.Marked || now.Kill() != p.Mark.Kill || now.Finished {
			return errChanged
		}
		patch, err := json.Marshal(map[string]any{"metadata": map[string]any{
			"uid": p.UID, "resourceVersion": read.ResourceVersion, "annotations": map[string]any{c.Terms.Mark: nil},
		}})
		if err != nil {
			return fmt.Errorf("write the patch: %w", err)
		}
		_, err = c.API.Patch(ctx, p.Namespace, p.Name, patch)
		return err
	}()
	switch {
	case err == nil:
		c.close(ctx, p.Mark.Kill, p.Node, p.Mark.Time, ref(p), event.ResultExpired, event.ReasonLifetime)
	case errors.Is(err, errChanged), apierrors.IsNotFound(unwrap(err)), apierrors.IsConflict(unwrap(err)), ctx.Err() != nil:
		// Another replica, or it leaves: the watch tells.
	default:
		c.Log.Warn("a mark whose time is over cannot be removed yet", "pod", p.Namespace+"/"+p.Name, "error", err)
	}
}
