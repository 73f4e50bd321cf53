package text

import (
	"testing"

	"github.com/oom-tracer/oom-tracer/go/event"
)

func TestSentence(t *testing.T) {
	kill := func(change func(*event.Event)) *event.Event {
		e := &event.Event{
			Outcome: event.OutcomeKilled, Scope: event.ScopeCgroup,
			Victim: event.Victim{PID: 7, Comm: "ja\x1bva", Memory: &event.Memory{AnonRSS: 1 << 20, FileRSS: 1 << 20, ShmemRSS: 1 << 19}},
			Limit:  &event.Limit{Level: event.LevelContainer, Max: new(uint64(4 << 20))}, Container: &event.Container{ContainerID: "0123456789abcdef"},
		}
		change(e)
		return e
	}
	same := func(*event.Event) {}
	level := func(l event.LimitLevel) func(*event.Event) { return func(e *event.Event) { e.Limit.Level = l } }
	scope := func(s event.Scope) func(*event.Event) { return func(e *event.Event) { e.Scope = s } }
	skipped := event.Outcome{Result: event.ResultSkipped, Reason: event.ReasonLevel}
	pod := &event.PodRef{Namespace: "shop", Name: "cart"}
	const who = `OOM killer killed ja\x1bva[7] (rss 2.5 MiB) in container 0123456789ab`
	for _, tt := range []struct {
		e     *event.Event
		o     event.Outcome
		ofPod bool
		want  string
	}{
		{kill(same), event.Outcome{Result: event.ResultAnnotated, Container: "main", Pod: pod}, true,
			`OOM killer killed ja\x1bva[7] (rss 2.5 MiB) in container main of pod shop/cart: the container is at the memory limit of 4.0 MiB; marked for eviction`},
		{kill(same), event.Outcome{Result: event.ResultObserved, Reason: event.ReasonObserveOnly, Pod: pod}, false,
			who + ": the container is at the memory limit of 4.0 MiB; not marked for eviction: observe only"},
		{kill(same), event.Outcome{Result: event.ResultFailed, Reason: event.ReasonForbidden, Detail: "no\n"}, false,
			who + `: the container is at the memory limit of 4.0 MiB; marking it for eviction failed: forbidden (no\n)`},
		{kill(level(event.LevelPod)), skipped, false, who + ": the pod is at the memory limit of 4.0 MiB; not marked for eviction: level"},
		{kill(level(event.LevelQoS)), skipped, false, who + ": all pods of its QoS class are at the memory limit of 4.0 MiB; not marked for eviction: level"},
		{kill(level(event.LevelKubepods)), skipped, false, who + ": all pods together are at the memory limit of 4.0 MiB; not marked for eviction: level"},
		{kill(level("later")), skipped, false, who + ": a cgroup is at the memory limit of 4.0 MiB; not marked for eviction: level"},
		{kill(func(e *event.Event) { e.Limit.Inferred, e.Limit.Max, e.Limit.Usage = true, nil, new(uint64(10)) }), skipped, false,
			who + ": the container is at the memory limit, usage 10 B (inferred); not marked for eviction: level"},
		{kill(func(e *event.Event) { e.Limit = nil }), skipped, false, who + ": a cgroup is at its memory limit; not marked for eviction: level"},
		{kill(scope(event.ScopeGlobal)), skipped, false, who + ": the node is out of memory; not marked for eviction: level"},
		{kill(scope(event.ScopeCpuset)), skipped, false, who + ": the memory of its cpuset is exhausted; not marked for eviction: level"},
		{kill(scope(event.ScopeMempolicy)), skipped, false, who + ": the memory of its memory policy is exhausted; not marked for eviction: level"},
		{kill(scope(event.ScopeSysrq)), skipped, false, who + ": somebody asked for it by SysRq; not marked for eviction: level"},
		{kill(func(e *event.Event) {
			e.Scope, e.Outcome, e.Container, e.Victim.Memory = event.ScopeUnknown, event.OutcomeUnknown, nil, nil
		}), skipped, false,
			`OOM killer marked ja\x1bva[7] (rss ?): why is not known; not marked for eviction: level`},
	} {
		if got := Sentence(tt.e, &tt.o, tt.ofPod); got != tt.want {
			t.Errorf("%s\nwant %s", got, tt.want)
		}
	}
}
