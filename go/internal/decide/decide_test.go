package decide

import (
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

const mark = "oom-tracer.alpha.kubernetes.io/evict-me"

// acting is the shipped policy with the annotation set.
func acting() config.Policy {
	p := config.Default().Policy
	p.Annotation = mark + "=true"
	return p
}

// kill is an event for which the pod is marked.
func kill() *event.Event {
	return &event.Event{
		Schema: event.Schema, ID: "boot-1-2", Seq: 1, Time: time.Unix(1000, 0).UTC(), Node: event.Node{Name: "node-1"},
		Scope: event.ScopeGlobal, Outcome: event.OutcomeKilled, Victim: event.Victim{PID: 1, TID: 1, Comm: "java"},
		Limit:     &event.Limit{Level: event.LevelNode},
		Container: &event.Container{PodUID: "uid-1", ContainerID: "c"},
	}
}

func TestDecide(t *testing.T) {
	type input struct {
		policy config.Policy
		c      Kill
		e      *event.Event
		pod    *pods.Pod
	}
	act := Decision{Result: event.ResultAnnotated, Reason: event.ReasonMarked, Act: true}
	for _, tt := range []struct {
		name   string
		change func(in *input)
		want   Decision
	}{
		{"marked", func(in *input) {}, act},
		{"just young enough", func(in *input) { in.c.Age = 10 * time.Minute }, act},
		{"kubepods", func(in *input) { in.e.Scope, in.e.Limit.Level = event.ScopeCgroup, event.LevelKubepods }, act},
		{"its own limit, if asked for", func(in *input) {
			in.policy.Levels, in.e.Scope, in.e.Limit.Level = []string{"own"}, event.ScopeCgroup, event.LevelPod
		}, act},
		{"inferred, if asked for", func(in *input) { in.policy.InferredLimits, in.e.Limit.Inferred = true, true }, act},
		{"included", func(in *input) { in.policy.Namespaces.Include = []string{"a", "shop"} }, act},
		{"unprotected", func(in *input) {
			in.policy.Protections = config.Protections{}
			in.pod.Mirror, in.pod.DaemonSet, in.pod.Critical, in.e.Container.Static = true, true, true, true
		}, act},
		{"found by its container alone", func(in *input) { in.e.Container.PodUID = "" }, act},
		{"marked for another kill and unmarked again", func(in *input) { in.pod.Mark = &pods.Mark{Kill: "boot-0-0"} }, act},

		{"observe only", func(in *input) { in.policy.Annotation = "" }, Decision{Result: event.ResultObserved, Reason: event.ReasonObserveOnly}},

		{"own work", func(in *input) { in.pod.Mark, in.pod.Marked = &pods.Mark{Kill: in.e.ID}, true }, Marked()},
		{"own work, whatever holds now", func(in *input) {
			in.pod.Mark, in.pod.OptOut, in.pod.Finished = &pods.Mark{Kill: in.e.ID}, true, true
			in.c.Age, in.policy.Annotation, in.e.Scope = time.Hour, "", event.ScopeUnknown
		}, Marked()},
		{"own work on a pod that is gone", func(in *input) { in.pod.Mark, in.c.Found.Gone = &pods.Mark{Kill: in.e.ID}, true }, Skip(event.ReasonGone)},

		{"host", func(in *input) { in.e.Container, in.pod = nil, nil }, Skip(event.ReasonHost)},
		{"no pod's container", func(in *input) { in.e.Container.PodUID, in.pod, in.c.Err = "", nil, pods.ErrUnknown }, Skip(event.ReasonHost)},
		{"old and host", func(in *input) { in.e.Container, in.pod, in.c.Age = nil, nil, time.Hour }, Skip(event.ReasonHost)},
		{"other node", func(in *input) { in.pod, in.c.Err, in.c.Age = nil, pods.ErrOtherNode, time.Hour }, Skip(event.ReasonOtherNode)},
		{"ambiguous", func(in *input) { in.pod, in.c.Err = nil, pods.ErrAmbiguous }, Skip(event.ReasonAmbiguous)},
		{"no kill", func(in *input) { in.e.Outcome = event.OutcomeExiting }, Skip(event.ReasonUnproven)},
		{"not known to be a kill", func(in *input) { in.e.Outcome = event.OutcomeUnknown }, Skip(event.ReasonUnproven)},
		{"outcome of a later version", func(in *input) { in.e.Outcome = "maimed" }, Skip(event.ReasonUnproven)},
		{"too old", func(in *input) { in.c.Age = 10*time.Minute + 1 }, Skip(event.ReasonTooOld)},
		{"too old and not found", func(in *input) { in.c.Age, in.pod, in.c.Err = time.Hour, nil, pods.ErrUnknown }, Skip(event.ReasonTooOld)},
		{"scope", func(in *input) { in.e.Scope = event.ScopeSysrq }, Skip(event.ReasonScope)},
		{"scope unknown", func(in *input) { in.e.Scope = event.ScopeUnknown }, Skip(event.ReasonScope)},
		{"no limit", func(in *input) { in.e.Limit = nil }, Skip(event.ReasonNoLimit)},
		{"inferred", func(in *input) { in.e.Limit.Inferred = true }, Skip(event.ReasonInferred)},
		{"level", func(in *input) { in.e.Limit.Level = event.LevelPod }, Skip(event.ReasonLevel)},
		{"not found", func(in *input) { in.pod, in.c.Err = nil, pods.ErrUnknown }, Skip(event.ReasonNotFound)},
		{"gone", func(in *input) { in.c.Found.Gone = true }, Skip(event.ReasonGone)},
		{"finished", func(in *input) { in.pod.Finished = true }, Skip(event.ReasonFinished)},
		{"already", func(in *input) { in.pod.Marked, in.pod.Mark = true, &pods.Mark{Kill: "boot-0-0"} }, Skip(event.ReasonAlready)},
		{"marked by hand", func(in *input) { in.pod.Marked = true }, Skip(event.ReasonAlready)},
		{"mirror", func(in *input) { in.pod.Mirror = true }, Skip(event.ReasonStatic)},
		{"static by its path", func(in *input) { in.e.Container.Static = true }, Skip(event.ReasonStatic)},
		{"daemonset", func(in *input) { in.pod.DaemonSet = true }, Skip(event.ReasonDaemonSet)},
		{"critical", func(in *input) { in.pod.Critical = true }, Skip(event.ReasonCritical)},
		{"not included", func(in *input) { in.policy.Namespaces.Include = []string{"a"} }, Skip(event.ReasonNamespace)},
		{"excluded", func(in *input) { in.policy.Namespaces.Exclude = []string{"shop"} }, Skip(event.ReasonNamespace)},
		{"not selected", func(in *input) { in.pod.Selected = false }, Skip(event.ReasonSelector)},
		{"opted out", func(in *input) { in.pod.OptOut = true }, Skip(event.ReasonOptOut)},
		{"opted out, observe only", func(in *input) { in.pod.OptOut, in.policy.Annotation = true, "" }, Skip(event.ReasonOptOut)},
	} {
		in := input{policy: acting(), e: kill(), pod: &pods.Pod{Namespace: "shop", Name: "cart", UID: "uid-1", Node: "node-1", Selected: true}}
		tt.change(&in)
		in.c.Event, in.c.Found.Pod = in.e, in.pod
		if got := Decide(&in.policy, &in.c); got != tt.want {
			t.Errorf("%s: %+v, want %+v", tt.name, got, tt.want)
		}
	}
}

// Every reason that a decision can have is tried above, but that of the budgets, and belongs to its result.
func TestDecideIsTotal(t *testing.T) {
	reasons := event.Reasons()
	in := Kill{Event: kill(), Found: pods.Found{Pod: &pods.Pod{}}}
	policy := acting()
	if d := Decide(&policy, &in); d.Reason != event.ReasonSelector || len(reasons[event.ResultSkipped]) != 21 {
		t.Errorf("%+v; %d reasons to skip: does TestDecide know them all?", d, len(reasons[event.ResultSkipped]))
	}
}
