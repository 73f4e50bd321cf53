package annotate

import (
	"errors"
	"fmt"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// Trial decides on kills of the past under a policy, as an Annotator would have, and does nothing. It is told of
// them in the order of the stream.
//
// It knows the pods as they are now. Read them without Terms.Mark and Terms.Summary: what was marked in truth
// is not marked by the policy on trial.
type Trial struct {
	Policy config.Policy
	Finder Finder

	state  budget.State
	marked map[string]struct{} // UIDs of pods
}

// Decide returns the kill in a message and what would become of it. The kill is nil where the message is none. Of
// a pod that is gone since nothing can be said: the result is then empty, and the reason event.ReasonGone.
func (t *Trial) Decide(m *bus.Stored) (*event.Event, *event.Outcome) {
	o := &event.Outcome{Schema: event.Schema, Kill: fmt.Sprintf("%s-%d", event.StreamName, m.Seq), Stage: event.StageAnnotate, Time: m.Time}
	e, refused := read(m)
	if refused != nil {
		o.Result, o.Reason, o.Detail = event.ResultFailed, refused.reason, refused.err.Error()
		return nil, o
	}
	o.Kill, o.Node = e.ID, e.Node.Name
	c := newCase(e, m, m.Time)
	if e.Container != nil {
		c.Found, c.Err = t.Finder.Find(e.Node.Name, e.Container.PodUID, e.Container.ContainerID)
	}
	d := Decide(&t.Policy, &c)
	p := c.Found.Pod
	if p != nil {
		o.Pod = &event.PodRef{Namespace: p.Namespace, Name: p.Name, UID: p.UID}
		o.Container = p.Container(e.Container.ContainerID)
	}
	switch {
	case errors.Is(c.Err, pods.ErrUnknown) && d.Reason == event.ReasonNotFound:
		d = Decision{Reason: event.ReasonGone}
	case d.Act:
		d = t.act(&c, m.Time)
	case d.Reason == event.ReasonObserveOnly:
		if _, ok := t.marked[p.UID]; ok {
			d = skip(event.ReasonAlready)
		}
		t.mark(p)
	}
	o.Result, o.Reason, o.Detail = d.Result, d.Reason, d.Detail
	return e, o
}

// act is what would become of a pod that is to be marked.
func (t *Trial) act(c *Case, now time.Time) Decision {
	p := c.Found.Pod
	if _, ok := t.marked[p.UID]; ok {
		return skip(event.ReasonAlready)
	}
	m := budget.Mark{Kill: c.Event.ID, Node: c.Event.Node.Name, Owner: ownerOf(p), Time: now}
	if refusal := t.state.Claim(t.Policy.Budgets, m, c.Event.Time, t.Policy.MaxEventAge); refusal != "" {
		return Decision{Result: event.ResultSkipped, Reason: event.ReasonBudget, Detail: string(refusal)}
	}
	t.mark(p)
	return marked
}

func (t *Trial) mark(p *pods.Pod) {
	if t.marked == nil {
		t.marked = map[string]struct{}{}
	}
	t.marked[p.UID] = struct{}{}
}
