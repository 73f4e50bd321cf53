// Package mark puts marks on pods and removes them. No other package patches a pod.
//
// Rule of the package: each patch names the UID and the resourceVersion of the pod that was read, so that the API server refuses
// it for any other pod, and for any other state of this one.
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
	// maxTries is how often one call of Mark reads a pod that changes at the same time.
	maxTries = 5
)

// API is the part of the Kubernetes API that marks need; see pods.Client.
type API interface {
	Get(ctx context.Context, namespace, name string) (*corev1.Pod, error)
	Patch(ctx context.Context, namespace, name string, patch []byte) (*corev1.Pod, error)
	PatchStatus(ctx context.Context, namespace, name string, patch []byte) (*corev1.Pod, error)
}

// Ledger grants the right to mark a pod; see budget.Ledger.
type Ledger interface {
	Claim(ctx context.Context, kill, node, owner string, killed time.Time) (budget.Verdict, error)
	Release(ctx context.Context, kill string) error
}

// Marker marks pods. Its methods may be called from any goroutine.
type Marker struct {
	Policy config.Policy
	Terms  pods.Terms
	API    API
	Ledger Ledger
	Now    func() time.Time
}

// Mark marks the pod of a kill. The watch may be behind, so Mark reads the pod, decides again, and updates k.Found.Pod. The
// decision has Act set if this call made the mark.
//
// annotated reports whether the pod carries the annotation of this kill, also when Mark fails.
func (m *Marker) Mark(ctx context.Context, k *decide.Kill) (d decide.Decision, annotated bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, Timeout)
	defer cancel()
	for try := 1; ; try++ {
		var wrote bool
		d, wrote, err = m.attempt(ctx, k, try == 1)
		annotated = annotated || wrote
		// The pod has changed, or another pod has its name: the next read shows it. An answer "invalid" that
		// stays is about the patch itself.
		again := apierrors.IsConflict(err) || apierrors.IsInvalid(err) && try == 1
		if !again || try == maxTries {
			return d, annotated, err
		}
		select {
		case <-time.After(time.Duration(10*try) * time.Millisecond):
		case <-ctx.Done():
			return d, annotated, ctx.Err()
		}
	}
}

func (m *Marker) attempt(ctx context.Context, k *decide.Kill, first bool) (d decide.Decision, annotated bool, err error) {
	known := k.Found.Pod
	read, err := m.API.Get(ctx, known.Namespace, known.Name)
	switch {
	case apierrors.IsNotFound(err):
		return decide.Skip(event.ReasonGone), false, nil
	case err != nil:
		return decide.Decision{}, false, err
	}
	pod := m.Terms.Read(read)
	switch {
	case pod.UID != known.UID:
		return decide.Skip(event.ReasonReborn), false, nil
	case pod.Node != known.Node:
		return decide.Skip(event.ReasonOtherNode), false, nil
	}
	now := *k
	now.Found.Pod = pod
	if d = decide.Decide(&m.Policy, &now); !d.Act {
		return d, false, nil
	}
	k.Found.Pod = pod               // its status may name the container by now
	if pod.Kill() != now.Event.ID { // else only the condition is missing
		if first {
			if refused, err := m.claim(ctx, &now); err != nil || refused.Result != "" {
				return refused, false, err
			}
		}
		patch, err := m.annotationPatch(now.Event, pod, read.ResourceVersion)
		if err != nil {
			return decide.Decision{}, false, err
		}
		read, err = m.API.Patch(ctx, pod.Namespace, pod.Name, patch)
		switch {
		case apierrors.IsNotFound(err):
			return decide.Skip(event.ReasonGone), false, nil
		case err != nil:
			return decide.Decision{}, false, err
		}
	}
	// The annotation comes first: its summary says whose mark it is, and who removes it removes the condition too.
	if m.Terms.Condition != "" {
		err = m.patchCondition(ctx, read, m.condition(now.Event.ID))
		if err != nil && !apierrors.IsNotFound(err) { // the pod may have left at once, as it should
			return decide.Decision{}, true, err
		}
	}
	return d, true, nil
}

// claim claims the right to mark the pod. If it is refused, the decision says why; else the decision is empty.
func (m *Marker) claim(ctx context.Context, k *decide.Kill) (decide.Decision, error) {
	v, err := m.Ledger.Claim(ctx, k.Event.ID, k.Event.Node.Name, k.Found.Pod.Workload(), k.Event.Time)
	switch {
	case err != nil:
		return decide.Decision{}, err
	case v.Paused != nil:
		return decide.Decision{Result: event.ResultObserved, Reason: event.ReasonPaused, Detail: "by " + v.Paused.By + ": " + v.Paused.Reason}, nil
	case v.Refusal != "":
		return decide.Decision{Result: event.ResultSkipped, Reason: event.ReasonBudget, Detail: string(v.Refusal)}, nil
	}
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
	patch, err := metadataPatch(p.UID, read.ResourceVersion, map[string]any{key: nil})
	if err != nil {
		return err
	}
	if read, err = m.API.Patch(ctx, p.Namespace, p.Name, patch); err == nil && now.Condition == p.Mark.Kill {
		_ = m.patchCondition(ctx, read, m.noCondition())
	}
	return err
}

// RemoveCondition removes the condition from a pod whose annotation is gone.
func (m *Marker) RemoveCondition(ctx context.Context, p *pods.Pod) error {
	read, err := m.API.Get(ctx, p.Namespace, p.Name)
	if err == nil {
		if now := m.Terms.Read(read); now.UID != p.UID || now.Marked || now.Condition != p.Mark.Kill {
			return nil
		}
		err = m.patchCondition(ctx, read, m.noCondition())
	}
	if apierrors.IsNotFound(err) || apierrors.IsConflict(err) {
		return nil
	}
	return err
}
