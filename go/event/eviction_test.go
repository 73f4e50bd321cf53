package event_test

import (
	"slices"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
)

func fullEviction() event.Eviction {
	return event.Eviction{
		Schema: event.Schema, ID: event.EvictionID("5b1a7a5e-1c1d-4b6f-8a55-2b7f0c9d1e2f"),
		Time: time.Date(2026, 11, 23, 2, 3, 5, 0, time.UTC), Node: "worker-1.example.com",
		Pod:     event.PodRef{Namespace: "shop", Name: "cart-0", UID: "5b1a7a5e-1c1d-4b6f-8a55-2b7f0c9d1e2f", Owner: "StatefulSet/cart"},
		Message: "The node was low on resource: memory. Threshold quantity: 100Mi, available: 71Mi. Container cart was using 900Mi, request is 512Mi, has larger consumption of memory. ",
	}
}

// TestEvictionGolden pins the schema of evictions, and reads one back.
func TestEvictionGolden(t *testing.T) {
	golden(t, "eviction", fullEviction(), event.ParseEviction)
}

func TestParseEvictionRefuses(t *testing.T) {
	refuses(t, "eviction", fullEviction(), event.ParseEviction, "id", "time", "node", "uid=pod.uid")
}

// An eviction's subject is the pod's alone, and the stream takes it.
func TestEvictionSubject(t *testing.T) {
	e := fullEviction()
	want := "oom.v1.eviction.5b1a7a5e-1c1d-4b6f-8a55-2b7f0c9d1e2f.worker-1_example_com"
	if got, err := e.Subject(); err != nil || got != want {
		t.Errorf("%s, %v, want %s", got, err, want)
	}
	e.Pod.UID = "a.b"
	if got, err := e.Subject(); err == nil {
		t.Errorf("of a UID that is no word: %s", got)
	}
	if !slices.Contains(event.StreamSubjects(), "oom.v1.eviction.>") {
		t.Error("the stream takes no eviction")
	}
}
