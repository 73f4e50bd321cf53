// Package mark puts marks on pods and removes them. No other package patches a pod.
//
// Rule of the package: each patch names the UID and the resourceVersion of the pod on which was decided, so that the API server
// refuses it for any other pod, and for any other state of this one.
package mark

import (
	"context"
	"errors"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/decide"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

const (
	// Timeout bounds one call of Mark or Release.
	Timeout = 10 * time.Second
	// maxTries is how often one call of Mark tries to patch a pod that changes at the same time.
	maxTries = 5
)

// API is the part of the Kubernetes API that marks need; see pods.Client.
type API interface {
	Get(ctx context.Context, namespace, name string) (*corev1.Pod, error)
	// Patch and PatchStatus return the new resourceVersion.
	Patch(ctx context.Context, namespace, name string, patch []byte) (string, error)
	PatchStatus(ctx context.Context, namespace, name string, patch []byte) (string, error)
}

// Ledger grants the right to mark a pod; see budget.Ledger.
type Ledger interface {
	Claim(ctx context.Context, r budget.Request) (budget.Verdict, error)
	Release(ctx context.Context, kill string) error
}

// Marker marks pods. Its methods may be called from any goroutine.
type Marker struct {
	Policy config.Policy
	Terms  pods.Terms
	API    API
	Ledger Ledger
	// Patched is called with the pod of a kill as Mark was given it, and as it is after its mark; see pods.Store. nil: not called.
	Patched func(before, after *pods.Pod)
	Now     func() time.Time
}

// Mark marks the pod of a kill on which was decided to do so. If the pod has changed since the watch delivered it, Mark reads it,
// decides again, and updates k.Found.Pod. The decision has Act set if this call made the mark.
//
// annotated reports whether the pod carries the annotation of this kill, also when Mark fails.
func (m *Marker) Mark(ctx context.Context, k *decide.Kill) (d decide.Decision, annotated bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	a := attempts{Marker: m, kill: k, known: k.Found.Pod, pod: k.Found.Pod}
	for try := 1; ; try++ {
		d, err = a.next(ctx, try > 1 || a.pod.ResourceVersion == "")
		// The pod has changed, or another pod has its name: the next read shows it. An answer "invalid" that
		// stays is about the patch itself.
		again := apierrors.IsConflict(err) || apierrors.IsInvalid(err) && a.reads <= 1 || errors.Is(err, errContested)
		if !again || try == maxTries {
			break
		}
		if try == 1 {
			continue // what the watch has delivered was old
		}
		select {
		case <-time.After(time.Duration(10*try) * time.Millisecond):
		case <-ctx.Done():
			return d, a.annotated, ctx.Err()
		}
	}
	if a.claim != nil && a.claim.New && err == nil && d.Result != event.ResultAnnotated {
		// No patch of this kill was accepted. If this fails, the claim counts until its window ends.
		_ = m.Ledger.Release(ctx, k.Event.ID)
	}
	return d, a.annotated, err
}

// errContested means that the pod must be read before the right to mark it can be claimed.
var errContested = errors.New("another pod of the same owner on the same node was marked")

// attempts are the attempts of one call of Mark.
type attempts struct {
	*Marker
	kill      *decide.Kill
	known     *pods.Pod       // that the call began with
	pod       *pods.Pod       // its latest known state
	claim     *budget.Verdict // nil: not claimed yet
	reads     int
	annotated bool
}

// next makes one attempt.
func (a *attempts) next(ctx context.Context, read bool) (decide.Decision, error) {
	d := decide.Marked()
	d.Act = true
	if read {
		var err error
		if d, err = a.read(ctx); err != nil || !d.Act {
			return d, err
		}
	}
	id := a.kill.Event.ID
	if a.pod.Kill() != id { // else only the condition is missing
		if a.claim == nil {
			if refused, err := a.claimRight(ctx, read); err != nil || refused.Result != "" {
				return refused, err
			}
		}
		patch, err := a.annotationPatch(a.kill.Event, a.pod)
		if err != nil {
			return decide.Decision{}, err
		}
		version, err := a.API.Patch(ctx, a.pod.Namespace, a.pod.Name, patch)
		switch {
		case apierrors.IsNotFound(err):
			return decide.Skip(event.ReasonGone), nil
		case err != nil:
			return decide.Decision{}, err
		}
		a.annotated = true
		a.patched(func(p *pods.Pod) {
			key, _ := a.Policy.Mark()
			p.ResourceVersion, p.Marked, p.Mark = version, true, &pods.Mark{Kill: id, Time: a.kill.Event.Time, Annotation: key}
		})
	}
	// The annotation comes first: its summary says whose mark it is, and who removes it removes the condition too.
	if a.Terms.Condition != "" {
		version, err := a.patchCondition(ctx, a.pod, a.condition(id))
		if err == nil {
			a.patched(func(p *pods.Pod) { p.ResourceVersion, p.Condition = version, id })
		} else if !apierrors.IsNotFound(err) { // the pod may have left at once, as it should
			return decide.Decision{}, err
		}
	}
	return d, nil
}

// patched notes what a patch has changed.
func (a *attempts) patched(change func(*pods.Pod)) {
	after := *a.pod
	change(&after)
	a.pod, a.kill.Found.Pod = &after, &after
	if a.Patched != nil {
		a.Patched(a.known, &after)
	}
	a.known = &after
}

// read reads the pod and decides again.
func (a *attempts) read(ctx context.Context) (decide.Decision, error) {
	a.reads++
	read, err := a.API.Get(ctx, a.pod.Namespace, a.pod.Name)
	switch {
	case apierrors.IsNotFound(err):
		return decide.Skip(event.ReasonGone), nil
	case err != nil:
		return decide.Decision{}, err
	}
	pod := a.Terms.Read(read)
	switch {
	case pod.UID != a.pod.UID:
		return decide.Skip(event.ReasonReborn), nil
	case pod.Node != a.pod.Node:
		return decide.Skip(event.ReasonOtherNode), nil
	}
	now := *a.kill
	now.Found.Pod = pod
	d := decide.Decide(&a.Policy, &now)
	if d.Act {
		a.pod, a.kill.Found.Pod = pod, pod // its status may name the container by now
	}
	return d, nil
}

// claimRight claims the right to mark the pod. If it is refused, the decision says why; else the decision is empty.
func (a *attempts) claimRight(ctx context.Context, read bool) (decide.Decision, error) {
	e := a.kill.Event
	v, err := a.Ledger.Claim(ctx, budget.Request{Kill: e.ID, Node: e.Node.Name, Owner: a.pod.Workload(), Killed: e.Time, Read: read})
	switch {
	case err != nil:
		return decide.Decision{}, err
	case v.Paused != nil:
		return decide.Decision{Result: event.ResultObserved, Reason: event.ReasonPaused, Detail: "by " + v.Paused.By + ": " + v.Paused.Reason}, nil
	case v.Refusal != "":
		return decide.Decision{Result: event.ResultSkipped, Reason: event.ReasonBudget, Detail: string(v.Refusal)}, nil
	case v.Contested:
		return decide.Decision{}, errContested
	}
	a.claim = &v
	return decide.Decision{}, nil
}

// Release returns the budget of a mark that the API server refused permanently.
func (m *Marker) Release(ctx context.Context, kill string) error {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	return m.Ledger.Release(ctx, kill)
}

// ErrChanged means that the pod no longer has the mark that was to be removed.
var ErrChanged = errors.New("the pod has changed")

// Remove removes the annotation of a key, and the condition, from a pod that is still marked for the same kill. The summary
// stays. Where removing the condition fails, RemoveCondition is to be called later.
func (m *Marker) Remove(ctx context.Context, p *pods.Pod, key string) error {
	read, err := m.API.Get(ctx, p.Namespace, p.Name)
	if err != nil {
		return err
	}
	now := m.Terms.Read(read)
	if _, marked := read.Annotations[key]; now.UID != p.UID || !marked || now.Kill() != p.Mark.Kill || now.Finished {
		return ErrChanged
	}
	patch, err := metadataPatch(now, map[string]any{key: nil})
	if err != nil {
		return err
	}
	if now.ResourceVersion, err = m.API.Patch(ctx, p.Namespace, p.Name, patch); err == nil && now.Condition == p.Mark.Kill {
		_, _ = m.patchCondition(ctx, now, m.noCondition())
	}
	return err
}

// RemoveCondition removes the condition from a pod whose annotation is gone.
func (m *Marker) RemoveCondition(ctx context.Context, p *pods.Pod) error {
	read, err := m.API.Get(ctx, p.Namespace, p.Name)
	if err == nil {
		now := m.Terms.Read(read)
		if now.UID != p.UID || now.Marked || now.Condition != p.Mark.Kill {
			return nil
		}
		_, err = m.patchCondition(ctx, now, m.noCondition())
	}
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return err
}
