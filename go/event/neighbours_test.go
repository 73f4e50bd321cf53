package event_test

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// fullNeighbours has a value in every field.
func fullNeighbours() event.Neighbours {
	e := full()
	return event.Neighbours{
		Schema: event.Schema, ID: event.NeighboursID(e.Incident.ID), Incident: e.Incident.ID, Kill: e.ID,
		Time: time.Date(2026, 11, 23, 2, 3, 4, 9, time.UTC), ReadNS: 1_500_000, Node: e.Node, Scope: event.ScopeGlobal, Level: event.LevelNode,
		Pods: []event.PodMemory{
			{
				Victim: true, PodUID: "5b1a7a5e-1c1d-4b6f-8a55-2b7f0c9d1e2f", QoS: "burstable", Usage: 3 << 30, WorkingSet: new(uint64(2 << 30)),
				Max: new(uint64(4 << 30)), Low: new(uint64(1 << 20)), Min: new(uint64(2 << 20)), Swap: new(uint64(0)),
			},
			{PodUID: "0123456789abcdef0123456789abcdef", Static: true, QoS: "guaranteed", Usage: 1 << 20},
		},
		PodsSeen: new(uint32(17)), Incomplete: true,
		Breakdown: &event.Breakdown{
			Source: event.SourceStat, Limit: e.Limit, AfterNS: 2_000_000, Gone: true, Total: new(uint64(8 << 30)), Usage: new(uint64(500 << 20)),
			Anon: new(uint64(1)), File: new(uint64(2)), Shmem: new(uint64(3)), Slab: new(uint64(4)), SlabUnreclaimable: new(uint64(5)), KernelStack: new(uint64(6)),
			PageTables: new(uint64(7)), Sock: new(uint64(8)), Swap: new(uint64(9)), Zswap: new(uint64(0)),
			Events: &event.MemoryEvents{
				Low: new(uint64(0)), High: new(uint64(1)), Max: new(uint64(2)), OOM: new(uint64(3)), OOMKill: new(uint64(4)), OOMGroupKill: new(uint64(5)),
			},
			Pressure:     &event.Pressure{Some: &event.Stall{Avg10: 12.34, Avg60: 1, Avg300: 0.01}, Full: &event.Stall{Avg10: 100}},
			NodePressure: &event.Pressure{Some: &event.Stall{Avg60: 0.5}},
			Processes: []event.Process{
				{PID: 71, Comm: "java", RSS: 1 << 20, OOMScoreAdj: new(int16(-997)), Victim: true},
				{PID: 72, RSS: 4096},
			},
			ProcessesSeen: new(uint32(12)), Incomplete: true,
		},
	}
}

// bareNeighbours are those of a limit whose cgroup was removed at once.
func bareNeighbours() event.Neighbours {
	return event.Neighbours{
		Schema: event.Schema, ID: event.NeighboursID("i"), Incident: "i", Kill: "k", Time: time.Date(2026, 11, 23, 2, 3, 4, 0, time.UTC),
		Node: event.Node{Name: "worker-1", BootID: "b", Kernel: "k", Tier: "stack"}, Scope: event.ScopeCgroup, Breakdown: &event.Breakdown{Source: event.SourceStat, Gone: true},
	}
}

// TestNeighboursGolden pins the schema, and reads it back.
func TestNeighboursGolden(t *testing.T) {
	golden(t, "neighbours-full", fullNeighbours(), event.ParseNeighbours)
	golden(t, "neighbours-bare", bareNeighbours(), event.ParseNeighbours)
}

func TestNeighboursSubject(t *testing.T) {
	n := fullNeighbours()
	got, err := n.Subject()
	if want := "oom.v1.neighbours.global." + strings.ReplaceAll(n.Node.Name, ".", "_"); got != want || err != nil {
		t.Errorf("%s, %v, want %s", got, err, want)
	}
	if !slices.Contains(event.StreamSubjects(), "oom.v1.neighbours.>") {
		t.Error("the stream does not take them")
	}
}

func TestParseNeighboursRefuses(t *testing.T) {
	refuses(t, "neighbours", fullNeighbours(), event.ParseNeighbours, "id", "incident", "time", "name=node.name")
}

func TestBeyondPod(t *testing.T) {
	for _, tt := range []struct {
		scope event.Scope
		limit *event.Limit
		want  bool
	}{
		{event.ScopeGlobal, nil, true}, {event.ScopeCpuset, nil, true}, {event.ScopeMempolicy, nil, true}, {event.ScopeSysrq, nil, true},
		{event.ScopeUnknown, &event.Limit{Level: event.LevelNode}, false}, {event.ScopeCgroup, nil, false},
		{event.ScopeCgroup, &event.Limit{Level: event.LevelNode}, true}, {event.ScopeCgroup, &event.Limit{Level: event.LevelKubepods}, true},
		{event.ScopeCgroup, &event.Limit{Level: event.LevelQoS}, true}, {event.ScopeCgroup, &event.Limit{Level: event.LevelPod}, false},
		{event.ScopeCgroup, &event.Limit{Level: event.LevelContainer}, false}, {event.ScopeCgroup, &event.Limit{Level: event.LevelOther}, false},
	} {
		e := event.Event{Scope: tt.scope, Limit: tt.limit}
		if got := e.BeyondPod(); got != tt.want {
			t.Errorf("%s, %+v: %t", tt.scope, tt.limit, got)
		}
	}
}
