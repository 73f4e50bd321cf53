// Package annotate turns a kill into a mark on its pod, or into the reason why not.
//
// Rule of the package: every kill has an outcome, no pod but the victim's is ever changed, and whatever is
// done twice has the effect of once.
package annotate

import (
	"errors"
	"slices"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// Case is all that a decision depends on.
type Case struct {
	Event *event.Event
	Ahead time.Duration // by how much the clock of its node was ahead of the stream's, which the event has now
	Age   time.Duration
	// Found is the pod of the kill. Err, of pods.Store.Find, is why there is none.
	Found pods.Found
	Err   error

	annotated bool // by this attempt, or one before
}

// Decision is what is to become of a kill.
type Decision struct {
	Result event.Result
	Reason event.Reason
	Detail string // for people
	// Act means that the pod is still to be marked, for the result to be true.
	Act bool
}

func skip(reason event.Reason) Decision { return Decision{Result: event.ResultSkipped, Reason: reason} }

// marked is the decision of a kill whose mark is there.
var marked = Decision{Result: event.ResultAnnotated, Reason: event.ReasonMarked}

// Decide holds a case against the policy. It depends on nothing else, and changes nothing.
func Decide(policy *config.Policy, c *Case) Decision {
	e, pod := c.Event, c.Found.Pod
	// Whose it is. What is not in order here is told before all else, for it is news about the reporter.
	switch {
	case !ofPod(e, pod):
		return skip(event.ReasonHost)
	case errors.Is(c.Err, pods.ErrOtherNode):
		return skip(event.ReasonOtherNode)
	case errors.Is(c.Err, pods.ErrAmbiguous):
		return skip(event.ReasonAmbiguous)
	case pod != nil && !c.Found.Gone && pod.Kill() == e.ID:
		// By an attempt before this one, whatever holds now; it may have come no further than the annotation.
		d := marked
		d.Act = policy.Condition != "" && pod.Marked && !pod.Finished && pod.Condition != e.ID
		return d
	}
	// What happened.
	switch limit := e.Limit; {
	case e.Outcome != event.OutcomeKilled:
		return skip(event.ReasonUnproven)
	case c.Age > policy.MaxEventAge:
		return skip(event.ReasonTooOld)
	case !slices.Contains(policy.Scopes, string(e.Scope)):
		return skip(event.ReasonScope)
	case limit == nil:
		return skip(event.ReasonNoLimit)
	case limit.Inferred && !policy.InferredLimits:
		return skip(event.ReasonInferred)
	case !policy.OnLevel(limit.Level):
		return skip(event.ReasonLevel)
	}
	// Whom it hit.
	namespaces, protections := &policy.Namespaces, &policy.Protections
	switch {
	case pod == nil:
		return skip(event.ReasonNotFound)
	case c.Found.Gone:
		return skip(event.ReasonGone)
	case pod.Finished:
		return skip(event.ReasonFinished)
	case pod.Marked:
		return skip(event.ReasonAlready)
	case protections.Static && (pod.Mirror || e.Container.Static):
		return skip(event.ReasonStatic)
	case protections.DaemonSet && pod.DaemonSet:
		return skip(event.ReasonDaemonSet)
	case protections.SystemCritical && pod.Critical:
		return skip(event.ReasonCritical)
	case len(namespaces.Include) > 0 && !slices.Contains(namespaces.Include, pod.Namespace),
		slices.Contains(namespaces.Exclude, pod.Namespace):
		return skip(event.ReasonNamespace)
	case !pod.Selected:
		return skip(event.ReasonSelector)
	case pod.OptOut:
		return skip(event.ReasonOptOut)
	case policy.Annotation == "":
		return Decision{Result: event.ResultObserved, Reason: event.ReasonObserveOnly}
	}
	return Decision{Result: event.ResultAnnotated, Reason: event.ReasonMarked, Act: true}
}

// ofPod tells a kill in a pod from one on the host. A container whose cgroup names no pod is a pod's only
// where one was found.
func ofPod(e *event.Event, pod *pods.Pod) bool {
	return e.Container != nil && (e.Container.PodUID != "" || pod != nil)
}
