package annotate

import (
	"encoding/json"
	"fmt"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// A dry run decides what an Annotator with the same policy would have decided.
func TestDryRun(t *testing.T) {
	store := pods.NewStore(time.Minute)
	for _, name := range []string{"a-1", "a-2", "b-1", "c-1"} {
		store.Set(&pods.Pod{Namespace: "shop", Name: name, UID: name, Node: "node-1", Owner: "Deployment/" + name[:1], Selected: true})
	}
	at := time.Unix(1000, 0).UTC()
	seq := uint64(0)
	message := func(pod string, after time.Duration, change func(*event.Event)) *bus.Stored {
		seq++
		e := kill()
		e.ID, e.Time, e.Container.PodUID = fmt.Sprintf("kill-%d", seq), at.Add(after), pod
		change(e)
		data, err := json.Marshal(e)
		if err != nil {
			t.Fatal(err)
		}
		subject, err := e.Subject()
		if err != nil {
			t.Fatal(err)
		}
		return &bus.Stored{Seq: seq, Subject: subject, Data: data, Time: at.Add(after)}
	}
	same := func(*event.Event) {}
	messages := []*bus.Stored{
		message("a-1", 0, same),
		message("a-1", time.Second, same),
		message("a-2", time.Minute, same),
		message("b-1", time.Minute, same),
		message("c-1", 2*time.Minute, same),
		message("c-1", 2*time.Hour, same),
		message("c-1", 2*time.Hour, func(e *event.Event) { e.Limit.Level = event.LevelPod }),
		message("gone", 2*time.Hour, same),
		message("gone", 2*time.Hour, func(e *event.Event) { e.Limit.Inferred = true }),
		message("", 2*time.Hour, func(e *event.Event) { e.Container = nil }),
		message("a-1", 2*time.Hour, func(e *event.Event) { e.Time = at }), // came late
		{Seq: 99, Subject: "oom.v1.kill.global.node-1", Data: []byte("{"), Time: at},
	}
	try := func(policy config.Policy) (got []string) {
		run := DryRun{Policy: policy, Finder: store}
		for _, m := range messages {
			e, o := run.Decide(m)
			if (e == nil) != (m.Seq == 99) {
				t.Errorf("message %d: kill %v", m.Seq, e)
			}
			pod := ""
			if o.Pod != nil {
				pod = o.Pod.Name
			}
			got = append(got, fmt.Sprintf("%s/%s %s %s", o.Result, o.Reason, pod, o.Detail))
		}
		return got
	}
	policy := acting()
	policy.Budgets = config.Budgets{Window: time.Hour, Node: 2, Owner: 1, Cluster: 10}
	rest := []string{
		"skipped/level c-1 ", "/gone  ", "skipped/inferred  ", "skipped/host  ", "skipped/too_old a-1 ", "failed/malformed  parse event: jsontext: unexpected EOF after offset 1",
	}
	if diff := cmp.Diff(append([]string{
		"annotated/marked a-1 ", "skipped/already a-1 ", "skipped/budget a-2 owner shop/Deployment/a: 1 of 1 within 1h0m0s",
		"annotated/marked b-1 ", "skipped/budget c-1 node node-1: 2 of 2 within 1h0m0s", "annotated/marked c-1 ",
	}, rest...), try(policy)); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	policy.Annotation = ""
	if diff := cmp.Diff(append([]string{
		"observed/observe_only a-1 ", "skipped/already a-1 ", "observed/observe_only a-2 ", "observed/observe_only b-1 ", "observed/observe_only c-1 ", "skipped/already c-1 ",
	}, rest...), try(policy)); diff != "" {
		t.Errorf("observe only (-want +got):\n%s", diff)
	}
}
