package text

import (
	"fmt"
	"strings"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// Sentence is a kill and its outcome for those who do not know the columns: which process, in which container,
// why, and what becomes of its pod. With ofPod it names the pod, for where that is not clear.
func Sentence(e *event.Event, o *event.Outcome, ofPod bool) string {
	var b strings.Builder
	b.WriteString("OOM killer killed ")
	if e.Outcome != event.OutcomeKilled {
		b.Reset()
		b.WriteString("OOM killer marked ") // whether it killed is not known
	}
	fmt.Fprintf(&b, "%s (%s)", victim(e), held(e))
	switch {
	case o.Container != "":
		b.WriteString(" in container " + Printable(o.Container))
	case e.Container != nil && e.Container.ContainerID != "":
		fmt.Fprintf(&b, " in container %.12s", Printable(e.Container.ContainerID))
	}
	if p := o.Pod; p != nil && ofPod {
		b.WriteString(" of pod " + Printable(p.Namespace) + "/" + Printable(p.Name))
	}
	b.WriteString(": " + because(e) + "; " + becomes(o))
	return b.String()
}

// because is why the kernel killed.
func because(e *event.Event) string {
	switch e.Scope {
	case event.ScopeGlobal:
		return "the node is out of memory"
	case event.ScopeCpuset:
		return "the memory of its cpuset is exhausted"
	case event.ScopeMempolicy:
		return "the memory of its memory policy is exhausted"
	case event.ScopeSysrq:
		return "somebody asked for it by SysRq"
	case event.ScopeUnknown:
		return "why is not known"
	}
	l := e.Limit
	if l == nil {
		return "a cgroup is at its memory limit"
	}
	whose := map[event.LimitLevel]string{
		event.LevelNode: "the node is", event.LevelKubepods: "all pods together are", event.LevelQoS: "all pods of its QoS class are",
		event.LevelPod: "the pod is", event.LevelContainer: "the container is",
	}[l.Level]
	if whose == "" {
		whose = "a cgroup is"
	}
	s := whose + " at the memory limit"
	if l.Max != nil {
		s += " of " + Size(*l.Max)
	}
	if l.Usage != nil {
		s += ", usage " + Size(*l.Usage)
	}
	if l.Inferred {
		s += " (inferred)"
	}
	return s
}

// becomes is what becomes of the pod.
func becomes(o *event.Outcome) string {
	s := "not marked for eviction: "
	switch o.Result {
	case event.ResultAnnotated:
		return "marked for eviction"
	case event.ResultFailed:
		s = "marking it for eviction failed: "
	}
	s += strings.ReplaceAll(Printable(string(o.Reason)), "_", " ")
	if o.Detail != "" {
		s += " (" + Printable(o.Detail) + ")"
	}
	return s
}
