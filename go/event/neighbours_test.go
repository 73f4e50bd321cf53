package event_test

import (
	"encoding/json"
	"errors"
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
		PodsSeen: 17, Incomplete: true,
	}
}

// bareNeighbours are those of a node without pods.
func bareNeighbours() event.Neighbours {
	return event.Neighbours{
		Schema: event.Schema, ID: event.NeighboursID("i"), Incident: "i", Kill: "k", Time: time.Date(2026, 11, 23, 2, 3, 4, 0, time.UTC),
		Node: event.Node{Name: "worker-1", BootID: "b", Kernel: "k", Tier: "stack"}, Scope: event.ScopeGlobal, Pods: []event.PodMemory{},
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
	data, err := json.Marshal(fullNeighbours())
	if err != nil {
		t.Fatal(err)
	}
	text := string(data)
	for _, tt := range []struct{ text, want string }{
		{"", "parse neighbours"},
		{"{}", "parse neighbours: schema is missing"},
		{strings.Replace(text, `"id"`, `"id2"`, 1), "parse neighbours: id is missing"},
		{strings.Replace(text, `"incident"`, `"incident2"`, 1), "parse neighbours: incident is missing"},
		{strings.Replace(text, `"time"`, `"time2"`, 1), "parse neighbours: time is missing"},
		{strings.Replace(text, `"name"`, `"name2"`, 1), "parse neighbours: node.name is missing"},
	} {
		if _, err := event.ParseNeighbours([]byte(tt.text)); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.text, err, tt.want)
		}
	}
	if _, err := event.ParseNeighbours([]byte(strings.Replace(text, "v1", "v2", 1))); !errors.Is(err, event.ErrSchema) {
		t.Errorf("another schema: %v", err)
	}
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
