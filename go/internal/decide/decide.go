// Package decide holds a kill and its pod against the policy. It has no side effects.
package decide

import (
	"errors"
	"slices"

	corev1 "k8s.io/api/core/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// Decision is the outcome of a kill.
type Decision struct {
	Result event.Result
	Reason event.Reason
	Detail string // for people
	// Act is set if the pod must be marked before the outcome is true.
	Act bool
}

// Skip is the decision to leave the pod alone.
func Skip(reason event.Reason) Decision { return Decision{Result: event.ResultSkipped, Reason: reason} }

// Marked is the decision on a kill whose pod is marked for it.
func Marked() Decision { return Decision{Result: event.ResultAnnotated, Reason: event.ReasonMarked} }

// Terms returns what a configuration reads from a pod.
func Terms(cfg *config.Config) pods.Terms {
	mark, _ := cfg.Policy.Mark()
	return pods.Terms{
		Mark: mark, Summary: cfg.Annotator.SummaryAnnotation, Condition: corev1.PodConditionType(cfg.Policy.Condition),
		OptOut: cfg.Policy.OptOutAnnotation, Selector: cfg.Policy.Selector,
	}
}

// Decide decides on a kill.
func Decide(policy *config.Policy, k *Kill) Decision {
	e, pod := k.Event, k.Found.Pod
	// Whose kill it is. A mismatch comes before every other reason: it says something about the reporting node.
	switch {
	case !k.InPod():
		return Skip(event.ReasonHost)
	case errors.Is(k.Err, pods.ErrOtherNode):
		return Skip(event.ReasonOtherNode)
	case errors.Is(k.Err, pods.ErrAmbiguous):
		return Skip(event.ReasonAmbiguous)
	case pod != nil && !k.Found.Gone && pod.Kill() == e.ID:
		// An earlier attempt marked the pod. It may have failed between the annotation and the condition.
		d := Marked()
		d.Act = policy.Condition != "" && pod.Marked && !pod.Finished && pod.Condition != e.ID
		return d
	}
	// What happened.
	switch limit := e.Limit; {
	case e.Outcome != event.OutcomeKilled:
		return Skip(event.ReasonUnproven)
	case k.Age > policy.MaxEventAge:
		return Skip(event.ReasonTooOld)
	case !slices.Contains(policy.Scopes, string(e.Scope)):
		return Skip(event.ReasonScope)
	case limit == nil:
		return Skip(event.ReasonNoLimit)
	case limit.Inferred && !policy.InferredLimits:
		return Skip(event.ReasonInferred)
	case !policy.OnLevel(limit.Level):
		return Skip(event.ReasonLevel)
	}
	// Whom it hit.
	namespaces, protections := &policy.Namespaces, &policy.Protections
	switch {
	case pod == nil:
		return Skip(event.ReasonNotFound)
	case k.Found.Gone:
		return Skip(event.ReasonGone)
	case pod.Finished:
		return Skip(event.ReasonFinished)
	case pod.Marked:
		return Skip(event.ReasonAlready)
	case protections.Static && (pod.Mirror || e.Container.Static):
		return Skip(event.ReasonStatic)
	case protections.DaemonSet && pod.DaemonSet:
		return Skip(event.ReasonDaemonSet)
	case protections.SystemCritical && pod.Critical:
		return Skip(event.ReasonCritical)
	case len(namespaces.Include) > 0 && !slices.Contains(namespaces.Include, pod.Namespace),
		slices.Contains(namespaces.Exclude, pod.Namespace):
		return Skip(event.ReasonNamespace)
	case !pod.Selected:
		return Skip(event.ReasonSelector)
	case pod.OptOut:
		return Skip(event.ReasonOptOut)
	case policy.Annotation == "":
		return Decision{Result: event.ResultObserved, Reason: event.ReasonObserveOnly}
	}
	d := Marked()
	d.Act = true
	return d
}
