package event_test

import (
	"bytes"
	"encoding/json"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
)

func fullGap() event.Gap {
	since, until := time.Date(2026, 11, 23, 2, 0, 0, 0, time.UTC), time.Date(2026, 11, 23, 2, 3, 4, 5, time.UTC)
	return event.Gap{
		Schema: event.Schema, ID: event.SeqGapID(bootID, 9876, 17, 19), Time: until, Node: full().Node, Cause: event.GapWrapped,
		Since: &since, Until: &until, FirstSeq: 17, LastSeq: 19, Count: new(uint64(3)), CountMax: new(uint64(3)),
	}
}

func bareGap() event.Gap {
	return event.Gap{
		Schema: event.Schema, ID: event.GapID(bootID, event.GapReboot, 9876, 0), Time: time.Date(2026, 11, 23, 2, 3, 4, 0, time.UTC),
		Node: bare().Node, Cause: event.GapReboot,
	}
}

func fullStatus() event.NodeStatus {
	now := time.Date(2026, 11, 23, 2, 3, 4, 5, time.UTC)
	due, last := now.Add(5*time.Minute), now.Add(-time.Hour)
	return event.NodeStatus{
		Schema: event.Schema, ID: bootID + "-status-1", Time: now, Node: full().Node, Phase: event.PhaseAlive, Version: "v1.2.3", Prototype: "task",
		Pinned: true, Since: now.Add(-2 * time.Hour), Due: &due, Seq: 7, Acked: 6, Lost: 1, Unseen: &event.Bounds{AtLeast: 1, AtMost: 2}, LastKill: &last,
	}
}

func bareStatus() event.NodeStatus {
	now := time.Date(2026, 11, 23, 2, 3, 4, 5, time.UTC)
	return event.NodeStatus{
		Schema: event.Schema, ID: bootID + "-status-1", Time: now, Node: bare().Node, Phase: event.PhaseStop, Version: "unknown", Prototype: "pid", Since: now,
	}
}

// TestGapGolden pins the schema of gaps and statuses, as TestGolden does that of events, and reads them back.
func TestGapGolden(t *testing.T) {
	golden(t, "gap-full", fullGap(), event.ParseGap)
	golden(t, "gap-bare", bareGap(), event.ParseGap)
	golden(t, "status-full", fullStatus(), event.ParseNodeStatus)
	golden(t, "status-bare", bareStatus(), event.ParseNodeStatus)
}

func TestParseGapRefuses(t *testing.T) {
	refuses(t, "gap", fullGap(), event.ParseGap, "id", "time", "cause", "name=node.name")
	refuses(t, "node status", fullStatus(), event.ParseNodeStatus, "id", "time", "phase", "name=node.name")
	data, err := json.Marshal(fullGap())
	if err != nil {
		t.Fatal(err)
	}
	if _, err := event.ParseGap(bytes.Replace(data, []byte(`"count":3`), []byte(`"count":-3`), 1)); err == nil {
		t.Error("a negative count is read")
	}
}

func TestGapSubjects(t *testing.T) {
	for _, cause := range event.GapCauses() {
		g := fullGap()
		g.Cause = cause
		want := "oom.v1.gap." + string(cause) + ".worker-1_example_com"
		if got, err := g.Subject(); err != nil || got != want {
			t.Errorf("%s: %s, %v", cause, got, err)
		}
	}
	s := fullStatus()
	if got, err := s.Subject(); err != nil || got != "oom.v1.node.status.worker-1_example_com" {
		t.Errorf("%s, %v", got, err)
	}
}

// Messages of the other kinds are read whole or refused, and what was read can be written and read again.
func FuzzParseOthers(f *testing.F) {
	for _, seed := range []string{
		`{"schema":"oom-tracer/v1","id":"a","time":"2026-01-01T00:00:00Z","node":{"name":"n"},"cause":"wrapped","count":1}`,
		`{"schema":"oom-tracer/v1","id":"a","time":"2026-01-01T00:00:00Z","node":{"name":"n"},"phase":"alive","unseen":{"at_least":1}}`,
		`{"schema":"oom-tracer/v1","id":"a","incident":"i","time":"2026-01-01T00:00:00Z","node":{"name":"n"},"pods":[{"pod_uid":"u","usage":1}]}`,
		`{"schema":"oom-tracer/v1","id":"a","time":"2026-01-01T00:00:00Z","node":"n","pod":{"namespace":"n","name":"p","uid":"u"},"message":"m"}`,
		`{"schema":"oom-tracer/v2"}`, `[]`,
	} {
		f.Add([]byte(seed))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		again := func(v any, err error, parse func([]byte) error) {
			if err != nil {
				return
			}
			text, err := json.Marshal(v)
			if err != nil {
				t.Fatalf("what was read cannot be written: %v", err)
			}
			if err := parse(text); err != nil {
				t.Errorf("what was written cannot be read: %v", err)
			}
		}
		g, err := event.ParseGap(data)
		again(g, err, func(b []byte) error { _, err := event.ParseGap(b); return err })
		s, err := event.ParseNodeStatus(data)
		again(s, err, func(b []byte) error { _, err := event.ParseNodeStatus(b); return err })
		n, err := event.ParseNeighbours(data)
		again(n, err, func(b []byte) error { _, err := event.ParseNeighbours(b); return err })
		e, err := event.ParseEviction(data)
		again(e, err, func(b []byte) error { _, err := event.ParseEviction(b); return err })
	})
}
