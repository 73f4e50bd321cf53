package text

import (
	"fmt"
	"strings"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// Sentence is an incident for people who do not know the columns: which processes were killed, where and why, and
// what becomes of the pod.
type Sentence struct {
	Killed  int      // processes
	More    bool     // than that
	Victims []string // the first of them; see Victim
	RSS     *uint64  // of all of them, in bytes
	// Unproven means that the kernel chose them, and nobody knows whether it killed them.
	Unproven bool
	Where    []string // see Where
	Cause    string   // see Cause
	Fate     string   // see Fate; may be empty
	After    string   // what is known of the other pods; may be empty
}

// String is the sentence, in printable ASCII if its parts are.
func (s *Sentence) String() string {
	var b strings.Builder
	b.WriteString("OOM killer killed ")
	if s.Unproven {
		b.Reset()
		b.WriteString("OOM killer marked ")
	}
	inAll := ""
	if s.Killed > 1 || s.More {
		if s.More {
			b.WriteString("more than ")
		}
		fmt.Fprintf(&b, "%d processes: ", s.Killed)
		inAll = " in all"
	}
	b.WriteString(strings.Join(s.Victims, ", "))
	if rest := s.Killed - len(s.Victims); rest > 0 {
		fmt.Fprintf(&b, " and %d more", rest)
	}
	if s.RSS != nil {
		fmt.Fprintf(&b, " (rss %s%s)", Size(*s.RSS), inAll)
	}
	if len(s.Where) > 0 {
		b.WriteString(" in " + strings.Join(s.Where, ", "))
	}
	b.WriteString(": " + s.Cause)
	for _, part := range []string{s.Fate, s.After} {
		if part != "" {
			b.WriteString("; " + part)
		}
	}
	return b.String()
}

// restarts is how often the container of an outcome was restarted, in parentheses after a space; empty: never, or that is not known.
func restarts(o *event.Outcome) string {
	switch {
	case o.Restarts == nil || *o.Restarts == 0:
		return ""
	case *o.Restarts == 1:
		return " (1 restart)"
	}
	return fmt.Sprintf(" (%d restarts)", *o.Restarts)
}

// Where is the container of a kill and, if pod is set, its pod; empty for a process of the host.
func Where(e *event.Event, o *event.Outcome, pod bool) string {
	var parts []string
	switch {
	case o.Container != "":
		parts = append(parts, "container "+Printable(o.Container)+restarts(o))
	case e.Container != nil && e.Container.ContainerID != "":
		parts = append(parts, fmt.Sprintf("container %.12s", Printable(e.Container.ContainerID)))
	}
	if p := o.Pod; p != nil && pod {
		parts = append(parts, "pod "+Printable(p.Namespace)+"/"+Printable(p.Name))
	}
	return strings.Join(parts, " of ")
}

// Cause is why the kernel killed. The limits of a container and of its pod are both "its own": the kubelet sets both,
// and which of them a container that is alone in its pod reaches first is a matter of a few pages.
func Cause(e *event.Event) string {
	switch e.Scope {
	case event.ScopeGlobal:
		return "the node is out of memory"
	case event.ScopeCpuset:
		return "the memory of its cpuset is exhausted"
	case event.ScopeMempolicy:
		return "the memory of its memory policy is exhausted"
	case event.ScopeSysrq:
		return "somebody requested it by SysRq"
	case event.ScopeUnknown:
		return "the cause is unknown"
	}
	l := e.Limit
	if l == nil {
		return "a cgroup reached its memory limit"
	}
	var notes []string
	whose := "a cgroup reached its memory limit"
	switch l.Level {
	case event.LevelNode:
		whose = "the node reached its memory limit"
	case event.LevelKubepods:
		whose = "all pods together reached their memory limit"
	case event.LevelQoS:
		whose = "all pods of its QoS class reached their memory limit"
	case event.LevelPod, event.LevelContainer:
		whose = "it reached its own memory limit"
		notes = append(notes, string(l.Level)+" level")
	}
	if l.Inferred {
		notes = append(notes, "inferred")
	}
	if l.Max != nil {
		whose += " of " + Size(*l.Max)
	}
	if notes != nil {
		whose += " (" + strings.Join(notes, ", ") + ")"
	}
	if l.Usage != nil {
		whose += ", usage " + Size(*l.Usage)
	}
	return whose
}

// Fate is what becomes of the pod.
func Fate(o *event.Outcome) string {
	s := "not marked for eviction: "
	switch o.Result {
	case event.ResultAnnotated:
		return "marked for eviction"
	case event.ResultFailed:
		s = "marking it for eviction failed: "
	}
	s += strings.ReplaceAll(Printable(string(o.Reason)), "_", " ")
	switch {
	case o.Detail != "":
		s += " (" + Printable(o.Detail) + ")"
	case reasons[o.Reason] != "":
		s += " (" + reasons[o.Reason] + ")"
	}
	return s
}

// reasons explains the reasons whose outcomes have no detail.
var reasons = map[event.Reason]string{
	event.ReasonObserveOnly: "policy.annotation is empty",
	event.ReasonHost:        "not in a pod",
	event.ReasonUnproven:    "it may have been exiting by itself",
	event.ReasonTooOld:      "older than policy.max_event_age",
	event.ReasonScope:       "not in policy.scopes",
	event.ReasonNoLimit:     "the owner of the limit is unknown",
	event.ReasonInferred:    "policy.inferred_limits is false",
	event.ReasonLevel:       "not in policy.levels",
	event.ReasonNotFound:    "no such pod",
	event.ReasonOtherNode:   "the pod runs on another node",
	event.ReasonAmbiguous:   "several pods match",
	event.ReasonGone:        "the pod was deleted",
	event.ReasonReborn:      "another pod has its name now",
	event.ReasonFinished:    "the pod has ended or is being deleted",
	event.ReasonAlready:     "the pod is marked already",
	event.ReasonStatic:      "a static pod comes back on the same node",
	event.ReasonDaemonSet:   "a pod of a DaemonSet comes back on the same node",
	event.ReasonCritical:    "a system-critical pod",
	event.ReasonNamespace:   "policy.namespaces",
	event.ReasonSelector:    "policy.selector",
	event.ReasonOptOut:      "policy.opt_out_annotation",
	event.ReasonBudget:      "policy.budgets",
}
