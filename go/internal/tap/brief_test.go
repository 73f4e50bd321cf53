package tap

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
)

// briefly is what readBrief leaves of a message.
func briefly(r message) message {
	if e := r.kill; e != nil {
		kept := &event.Event{ID: e.ID, Node: event.Node{Name: e.Node.Name}, Victim: event.Victim{Comm: e.Victim.Comm}}
		if m := e.Victim.Memory; m != nil {
			kept.Victim.Memory = &event.Memory{AnonRSS: m.AnonRSS, FileRSS: m.FileRSS, ShmemRSS: m.ShmemRSS}
		}
		if e.Limit != nil {
			kept.Limit = &event.Limit{Level: e.Limit.Level, Max: e.Limit.Max}
		}
		if e.Container != nil {
			kept.Container = &event.Container{}
		}
		r.kill = kept
	}
	if o := r.outcome; o != nil {
		kept := &event.Outcome{ID: o.ID, Kill: o.Kill, Stage: o.Stage, Node: o.Node, Image: o.Image}
		if o.Pod != nil {
			kept.Pod = &event.PodRef{Namespace: o.Pod.Namespace, Name: o.Pod.Name, Owner: o.Pod.Owner}
		}
		r.outcome = kept
	}
	return r
}

// TestReadBrief: of what the programs write, readBrief reads the same as read, and no more.
func TestReadBrief(t *testing.T) {
	at := time.Date(2026, 11, 29, 8, 0, 0, 0, time.UTC)
	full, err := os.ReadFile("../../event/testdata/full.json")
	if err != nil {
		t.Fatal(err)
	}
	e, err := event.Parse(full)
	if err != nil {
		t.Fatal(err)
	}
	bare := event.Event{
		Schema: event.Schema, ID: "a", Seq: 1, Time: at, Node: event.Node{Name: "n"}, Scope: event.ScopeUnknown, Outcome: event.OutcomeUnknown,
		Victim: event.Victim{TID: 1},
	}
	outcome := event.Outcome{
		Schema: event.Schema, ID: "a/annotate", Kill: "a", Stage: event.StageAnnotate, Time: at, Result: event.ResultSkipped, Reason: event.ReasonLevel,
		Detail: "a } and a ]", Node: "n", Pod: &event.PodRef{Namespace: "shop", Name: "cart", UID: "u", Owner: "Deployment/cart"}, Image: "cart:1",
	}
	withoutPod := outcome
	withoutPod.Pod = nil
	for _, m := range []interface{ Subject() (string, error) }{&e, &bare, &outcome, &withoutPod} {
		data, err := json.MarshalIndent(m, "", "\t")
		if err != nil {
			t.Fatal(err)
		}
		compact, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		subject, err := m.Subject()
		if err != nil {
			t.Fatal(err)
		}
		for _, data := range [][]byte{data, compact} {
			want, err := read(bus.Stored{Subject: subject, Data: data})
			if err != nil {
				t.Fatal(err)
			}
			if got, err := readBrief(bus.Stored{Subject: subject, Data: data}); err != nil || !reflect.DeepEqual(got, briefly(want)) {
				t.Errorf("%s: got %+v, %v, want %+v", data, got, err, briefly(want))
			}
		}
	}
	// What it does not understand, it leaves to read: here a name with an escape.
	bare.Victim.Comm = `a"b`
	data, err := json.Marshal(&bare)
	if err != nil {
		t.Fatal(err)
	}
	if got, err := readBrief(bus.Stored{Subject: "oom.v1.kill.unknown.n", Data: data}); err != nil || !reflect.DeepEqual(*got.kill, bare) {
		t.Errorf("got %+v, %v", got.kill, err)
	}
}

// FuzzReadBrief: what read takes, readBrief takes for the same.
func FuzzReadBrief(f *testing.F) {
	files, err := filepath.Glob("../../event/testdata/*.json")
	if err != nil || len(files) == 0 {
		f.Fatal(files, err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data, false)
	}
	f.Add([]byte(`{"schema":"oom-tracer/v1","id":"a","kill":"b","stage":"annotate","time":"2026-11-29T08:00:00Z","node":"worker-1.example.com","result":"skipped","reason":"level","pod":{"namespace":"c","name":"d"}}`), true)
	f.Fuzz(func(t *testing.T, data []byte, outcome bool) {
		m := bus.Stored{Subject: "oom.v1.kill.cgroup.worker-1_example_com", Data: data}
		if outcome {
			m.Subject = "oom.v1.outcome.a_annotate.worker-1_example_com"
		}
		got, wrong := readBrief(m)
		want, err := read(m)
		if err != nil {
			return // readBrief need not see what is wrong where it does not look
		}
		if wrong != nil || !reflect.DeepEqual(briefly(got), briefly(want)) {
			t.Errorf("got %+v, %v, want %+v", got, wrong, briefly(want))
		}
	})
}
