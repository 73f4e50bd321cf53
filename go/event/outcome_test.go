package event_test

import (
	"encoding/json"
	"slices"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// fullOutcome has a value in every field.
func fullOutcome() event.Outcome {
	kill := full().ID
	return event.Outcome{
		Schema: event.Schema, ID: event.OutcomeID(kill, event.StageAnnotate), Kill: kill, Stage: event.StageAnnotate,
		Time:   time.Date(2026, 11, 23, 2, 3, 5, 7, time.UTC),
		Result: event.ResultAnnotated, Reason: event.ReasonMarked, Detail: "told by a test", Node: "worker-1.example.com",
		Pod:       &event.PodRef{Namespace: "shop", Name: "cart-0", UID: "5b1a7a5e-1c1d-4b6f-8a55-2b7f0c9d1e2f"},
		Container: "cart", Image: "registry.example.com/shop/cart:1.2", Restarts: new(uint32(4)), Annotation: "oom-tracer.alpha.kubernetes.io/evict-me=true",
	}
}

// bareOutcome is that of a message that could not be read.
func bareOutcome() event.Outcome {
	return event.Outcome{
		Schema: event.Schema, ID: event.OutcomeID("OOM-17", event.StageAnnotate), Kill: "OOM-17", Stage: event.StageAnnotate,
		Time:   time.Date(2026, 11, 23, 2, 3, 5, 0, time.UTC),
		Result: event.ResultFailed, Reason: event.ReasonMalformed, Node: "worker-1",
	}
}

// TestOutcomeGolden pins the schema of outcomes, and reads them back.
func TestOutcomeGolden(t *testing.T) {
	golden(t, "outcome-full", fullOutcome(), event.ParseOutcome)
	golden(t, "outcome-bare", bareOutcome(), event.ParseOutcome)
}

func TestParseOutcomeRefuses(t *testing.T) {
	refuses(t, "outcome", fullOutcome(), event.ParseOutcome, "id", "kill", "time", "node", "result", "reason")
}

// An outcome's subject is the stage's and the kill's, whatever the result, and the stream takes it.
func TestOutcomeSubject(t *testing.T) {
	o := fullOutcome()
	want := "oom.v1.outcome." + o.Kill + "_annotate.worker-1_example_com"
	for _, o.Result = range event.Results() {
		if got, err := o.Subject(); err != nil || got != want {
			t.Errorf("%s: %s, %v, want %s", o.Result, got, err, want)
		}
	}
	bare := bareOutcome()
	if got, err := bare.Subject(); err != nil || got != "oom.v1.outcome.oom-17_annotate.worker-1" {
		t.Errorf("of a message that is no kill: %s, %v", got, err)
	}
	if got, err := event.OutcomeSubject("a.b", event.StageClose, "worker-1"); err == nil {
		t.Errorf("of a kill that is no word: %s", got)
	}
	if !slices.Contains(event.StreamSubjects(), "oom.v1.outcome.>") {
		t.Error("the stream takes no outcome")
	}
}

// Each reason belongs to one result.
func TestOutcomeResults(t *testing.T) {
	seen := map[event.Reason]event.Result{}
	reasons := event.Reasons()
	for _, result := range event.Results() {
		if len(reasons[result]) == 0 {
			t.Errorf("%s has no reason", result)
		}
		for _, reason := range reasons[result] {
			if other, ok := seen[reason]; ok {
				t.Errorf("%s is a reason of %s and of %s", reason, other, result)
			}
			seen[reason] = result
		}
	}
	if len(reasons) != len(event.Results()) {
		t.Error("a result is missing")
	}
}

func FuzzParseOutcome(f *testing.F) {
	for _, o := range []event.Outcome{fullOutcome(), bareOutcome()} {
		data, err := json.Marshal(o)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		o, err := event.ParseOutcome(data)
		if err != nil {
			return
		}
		if o.Schema != event.Schema || o.ID == "" || o.Kill == "" || o.Node == "" {
			t.Errorf("read %+v", o)
		}
	})
}
