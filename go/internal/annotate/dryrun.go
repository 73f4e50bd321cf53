package annotate

import (
	"errors"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/decide"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// DryRun decides on past kills under a policy, as an Annotator would have, without side effects. Kills must come in the order of
// the stream.
//
// It uses the pods as they are now. Read them without Terms.Mark and Terms.Summary: a pod that was marked under another policy is
// not marked under this one.
type DryRun struct {
	Policy config.Policy
	Finder Finder

	state  budget.State
	marked map[string]struct{} // UIDs of pods
}

// Decide returns the kill in a message and its outcome. The kill is nil if the message is not a valid kill. If the pod is gone,
// the result is empty, and the reason is event.ReasonGone.
func (r *DryRun) Decide(m *bus.Stored) (*event.Event, *event.Outcome) {
	o := &event.Outcome{Schema: event.Schema, Kill: unparsedID(m), Stage: event.StageAnnotate, Time: m.Time}
	k, refused := decide.ParseKill(m.Subject, m.Data, m.Time, m.Time)
	if refused != nil {
		o.Result, o.Reason, o.Detail = event.ResultFailed, refused.Reason, refused.Err.Error()
		return nil, o
	}
	e := k.Event
	o.Kill, o.Node = e.ID, e.Node.Name
	if e.Container != nil {
		k.Found, k.Err = r.Finder.Find(e.Node.Name, e.Container.PodUID, e.Container.ContainerID)
	}
	if k.Found.Pod != nil {
		setPod(o, k)
	}
	d := decide.Decide(&r.Policy, k)
	switch {
	case errors.Is(k.Err, pods.ErrUnknown) && d.Reason == event.ReasonNotFound:
		d = decide.Decision{Reason: event.ReasonGone}
	case d.Act, d.Reason == event.ReasonObserveOnly:
		d = r.mark(k, d, m.Time)
	}
	o.Result, o.Reason, o.Detail = d.Result, d.Reason, d.Detail
	return e, o
}

// mark takes note of a pod that would be marked, or observed.
func (r *DryRun) mark(k *decide.Kill, d decide.Decision, now time.Time) decide.Decision {
	p := k.Found.Pod
	if _, ok := r.marked[p.UID]; ok {
		return decide.Skip(event.ReasonAlready)
	}
	if d.Act {
		m := budget.Mark{Kill: k.Event.ID, Node: k.Event.Node.Name, Owner: p.Workload(), Time: now}
		if refusal := r.state.Claim(r.Policy.Budgets, m, k.Event.Time, r.Policy.MaxEventAge); refusal != "" {
			return decide.Decision{Result: event.ResultSkipped, Reason: event.ReasonBudget, Detail: string(refusal)}
		}
	}
	if r.marked == nil {
		r.marked = map[string]struct{}{}
	}
	r.marked[p.UID] = struct{}{}
	return d
}
