package text

import (
	"strings"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/event"
)

func TestSentence(t *testing.T) {
	size := func(n uint64) *uint64 { return &n }
	for _, tt := range []struct {
		s    Sentence
		want string
	}{
		{Sentence{Killed: 1, Victims: []string{"java[7]"}, RSS: size(5 << 19), Where: []string{"container main"}, Cause: "why", Fate: "what"},
			"OOM killer killed java[7] (rss 2.5 MiB) in container main: why; what"},
		{Sentence{Killed: 1, Victims: []string{"java[7]"}, Cause: "why"}, "OOM killer killed java[7]: why"},
		{Sentence{Killed: 1, Victims: []string{"java[7]"}, Cause: "why", Unproven: true, After: "others"}, "OOM killer marked java[7]: why; others"},
		{Sentence{Killed: 3, Victims: []string{"a[1]", "b[2]", "c[3]"}, RSS: size(3 << 20), Where: []string{"container main of pod shop/a", "pod shop/b"}, Cause: "why", Fate: "what", After: "others"},
			"OOM killer killed 3 processes: a[1], b[2], c[3] (rss 3.0 MiB in all) in container main of pod shop/a, pod shop/b: why; what; others"},
		{Sentence{Killed: 50, Victims: []string{"a[1]", "b[2]"}, Cause: "why"}, "OOM killer killed 50 processes: a[1], b[2] and 48 more: why"},
		{Sentence{Killed: 1000, More: true, Victims: []string{"a[1]"}, Cause: "why"}, "OOM killer killed more than 1000 processes: a[1] and 999 more: why"},
	} {
		if got := tt.s.String(); got != tt.want {
			t.Errorf("%s\nwant %s", got, tt.want)
		}
	}
}

func TestCause(t *testing.T) {
	limit := func(l event.LimitLevel) *event.Event {
		return &event.Event{Scope: event.ScopeCgroup, Limit: &event.Limit{Level: l, Max: new(uint64(4 << 20)), Usage: new(uint64(4<<20 - 4096))}}
	}
	inferred := limit(event.LevelPod)
	inferred.Limit.Inferred, inferred.Limit.Max, inferred.Limit.Usage = true, nil, new(uint64(10))
	other := limit(event.LevelOther)
	other.Limit.Inferred = true
	for _, tt := range []struct {
		e    *event.Event
		want string
	}{
		// Its own limit, at whichever of the two levels.
		{limit(event.LevelContainer), "it reached its own memory limit of 4.0 MiB (container level), usage 4.0 MiB"},
		{limit(event.LevelPod), "it reached its own memory limit of 4.0 MiB (pod level), usage 4.0 MiB"},
		{inferred, "it reached its own memory limit (pod level, inferred), usage 10 B"},
		{limit(event.LevelQoS), "all pods of its QoS class reached their memory limit of 4.0 MiB, usage 4.0 MiB"},
		{limit(event.LevelKubepods), "all pods together reached their memory limit of 4.0 MiB, usage 4.0 MiB"},
		{limit(event.LevelNode), "the node reached its memory limit of 4.0 MiB, usage 4.0 MiB"},
		{other, "a cgroup reached its memory limit of 4.0 MiB (inferred), usage 4.0 MiB"},
		{limit("later"), "a cgroup reached its memory limit of 4.0 MiB, usage 4.0 MiB"},
		{&event.Event{Scope: event.ScopeCgroup}, "a cgroup reached its memory limit"},
		{&event.Event{Scope: event.ScopeGlobal}, "the node is out of memory"},
		{&event.Event{Scope: event.ScopeCpuset}, "the memory of its cpuset is exhausted"},
		{&event.Event{Scope: event.ScopeMempolicy}, "the memory of its memory policy is exhausted"},
		{&event.Event{Scope: event.ScopeSysrq}, "somebody requested it by SysRq"},
		{&event.Event{Scope: event.ScopeUnknown}, "the cause is unknown"},
	} {
		if got := Cause(tt.e); got != tt.want {
			t.Errorf("%s\nwant %s", got, tt.want)
		}
	}
}

func TestWhere(t *testing.T) {
	e := &event.Event{Victim: event.Victim{PID: 7, Comm: "ja\x1bva"}, Container: &event.Container{ContainerID: "0123456789abcdef"}}
	pod := &event.PodRef{Namespace: "shop", Name: "cart"}
	for _, tt := range []struct {
		o    event.Outcome
		pod  bool
		want string
	}{
		{event.Outcome{Container: "main", Pod: pod}, true, "container main of pod shop/cart"},
		{event.Outcome{Container: "main", Pod: pod}, false, "container main"},
		{event.Outcome{Pod: pod}, true, "container 0123456789ab of pod shop/cart"},
		{event.Outcome{}, true, "container 0123456789ab"},
	} {
		if got := Where(e, &tt.o, tt.pod); got != tt.want {
			t.Errorf("%q, want %q", got, tt.want)
		}
	}
	if got := Where(&event.Event{}, &event.Outcome{}, true); got != "" {
		t.Errorf("%q, want nothing", got)
	}
	if got, want := Victim(e), `ja\x1bva[7]`; got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

func TestFate(t *testing.T) {
	for _, tt := range []struct {
		o    event.Outcome
		want string
	}{
		{event.Outcome{Result: event.ResultAnnotated, Reason: event.ReasonMarked}, "marked for eviction"},
		{event.Outcome{Result: event.ResultObserved, Reason: event.ReasonObserveOnly}, "not marked for eviction: observe only (policy.annotation is empty)"},
		{event.Outcome{Result: event.ResultSkipped, Reason: event.ReasonBudget, Detail: "node"}, "not marked for eviction: budget (node)"},
		{event.Outcome{Result: event.ResultFailed, Reason: event.ReasonForbidden, Detail: "no\n"}, `marking it for eviction failed: forbidden (no\n)`},
		{event.Outcome{Result: event.ResultSkipped, Reason: "a_new_one"}, "not marked for eviction: a new one"},
	} {
		if got := Fate(&tt.o); got != tt.want {
			t.Errorf("%s\nwant %s", got, tt.want)
		}
	}
	for _, reason := range event.Reasons()[event.ResultSkipped] {
		if got := Fate(&event.Outcome{Result: event.ResultSkipped, Reason: reason}); !strings.Contains(got, "(") {
			t.Errorf("%s is not explained", got)
		}
	}
}
