package tap

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
)

// countedPart is what top and advise read of a message.
func countedPart(r message) any {
	switch {
	case r.kill != nil:
		e := *r.kill
		e.Node = event.Node{Name: e.Node.Name}
		e.Victim.UID, e.Victim.Cgroup, e.Victim.Memcg, e.Trigger = nil, nil, nil, nil
		if m := e.Victim.Memory; m != nil {
			e.Victim.Memory = &event.Memory{TotalVM: m.TotalVM, AnonRSS: m.AnonRSS, FileRSS: m.FileRSS, ShmemRSS: m.ShmemRSS, Swap: m.Swap, PgTables: m.PgTables}
		}
		if l := e.Limit; l != nil {
			e.Limit = &event.Limit{Level: l.Level, Max: l.Max, Usage: l.Usage, Inferred: l.Inferred}
		}
		if a := e.Alloc; a != nil {
			e.Alloc = &event.Alloc{TotalPages: a.TotalPages}
		}
		if i := e.Incident; i != nil {
			e.Incident = &event.Incident{ID: i.ID, Group: i.Group}
		}
		if c := e.Container; c != nil {
			e.Container = &event.Container{ContainerID: c.ContainerID, QoS: c.QoS}
		}
		return e
	case r.outcome != nil:
		o := *r.outcome
		o.Annotation = ""
		return o
	}
	return nil
}

const (
	killSubject    = "oom.v1.kill.cgroup.worker-1_example_com"
	outcomeSubject = "oom.v1.outcome.k_annotate.worker-1_example_com"
)

// quickSeeds are a kill and an outcome as they are stored, and what differs from them.
func quickSeeds(t testing.TB) (all []bus.Stored) {
	e, o := sampleKill(7, 3, "worker-1.example.com")
	for subject, v := range map[string]any{killSubject: e, outcomeSubject: o} {
		data, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, bus.Stored{Subject: subject, Data: data, Time: time.Unix(0, 0)})
	}
	return all
}

// TestQuick: what quick reads is what read reads, and it reads what is stored.
func TestQuick(t *testing.T) {
	for _, m := range quickSeeds(t) {
		q := &quick{words: map[string]string{}}
		got, ok := q.read(m)
		want, err := read(m)
		if !ok || err != nil {
			t.Fatalf("%s: quick %v, %v", m.Subject, ok, err)
		}
		if diff := cmp.Diff(countedPart(want), countedPart(got)); diff != "" {
			t.Errorf("%s (-read +quick):\n%s", m.Subject, diff)
		}
	}
}

// TestQuickLeaves: what quick does not understand, and what is wrong, is left to read.
func TestQuickLeaves(t *testing.T) {
	for _, tt := range []struct {
		name, old, new string
		ok             bool
	}{
		{"as it is", "", "", true},
		{"a new field", `"seq":8,`, `"seq":8,"new":{"a":[1,"x",true,{"b":[]}],"c":{}},`, true},
		{"a field twice", `"seq":8,`, `"seq":9,"seq":8,`, true},
		{"an object twice", `"limit":{`, `"limit":{"usage":7},"limit":{`, true},
		{"another case", `"seq":8,`, `"seq":8,"Seq":9,`, false},
		{"an escape", `"java"`, `"jav\u0061"`, false},
		{"no ASCII", `"java"`, `"jävä"`, false},
		{"white space", `"seq":8,`, `"seq": 8,`, false},
		{"null", `"seq":8,`, `"seq":8,"incident":null,`, false},
		{"a leading zero", `"seq":8,`, `"seq":08,`, false},
		{"a fraction", `"seq":8,`, `"seq":8.0,`, false},
		{"too large", `"seq":8,`, `"seq":18446744073709551616,`, false},
		{"another type", `"seq":8,`, `"seq":"8",`, false},
		{"a missing field", `"seq":8,`, ``, false},
		{"another schema", `oom-tracer/v1`, `oom-tracer/v2`, false},
		{"another node", `worker-1.example.com`, `worker-2.example.com`, false},
		{"a wrong time", `"time":"2026`, `"time":"26`, false},
		{"cut off", `}}`, `}`, false},
		{"more behind it", `"qos":"burstable"}}`, `"qos":"burstable"}}x`, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			for _, m := range quickSeeds(t) {
				if m.Subject == killSubject {
					if !strings.Contains(string(m.Data), tt.old) {
						t.Fatalf("no %s in %s", tt.old, m.Data)
					}
					if ok := checkQuick(t, true, []byte(strings.Replace(string(m.Data), tt.old, tt.new, 1))); ok != tt.ok {
						t.Errorf("understood: %v", ok)
					}
				}
			}
		})
	}
}

// FuzzQuick: where quick reads a message that read reads, both read the same.
func FuzzQuick(f *testing.F) {
	for _, m := range quickSeeds(f) {
		f.Add(m.Subject == killSubject, m.Data)
	}
	f.Add(true, []byte(`{"schema":"oom-tracer/v1","id":"a","id":"b","ID":"c","seq":01,"limit":null,"limit":{"level":"pod"},"limit":{"max":1}}`))
	f.Fuzz(func(t *testing.T, kill bool, data []byte) { checkQuick(t, kill, data) })
}

// TestQuickMutations is FuzzQuick for a moment: a fuzzer needs all packages built anew.
func TestQuickMutations(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	understood := 0
	for _, m := range quickSeeds(t) {
		for range 4_000 {
			data := slices.Clone(m.Data)
			for range 1 + random.IntN(3) {
				at := random.IntN(len(data))
				switch random.IntN(4) {
				case 0:
					data[at] = byte(random.IntN(128))
				case 1:
					data[at] = `{}[]",:0123456789-.eEntfalsrue\ `[random.IntN(32)]
				case 2:
					data = slices.Delete(data, at, min(at+1+random.IntN(20), len(data)))
				case 3:
					from := random.IntN(len(data))
					data = slices.Insert(data, at, slices.Clone(data[from:min(from+random.IntN(40), len(data))])...)
				}
				if len(data) == 0 {
					data = []byte("{}")
				}
			}
			if checkQuick(t, m.Subject == killSubject, data) {
				understood++
			}
		}
	}
	if understood < 200 {
		t.Errorf("only %d mutations were understood", understood)
	}
}

// checkQuick reports whether quick understood a message.
func checkQuick(t *testing.T, kill bool, data []byte) bool {
	t.Helper()
	m := bus.Stored{Subject: outcomeSubject, Data: data}
	if kill {
		m.Subject = killSubject
	}
	got, ok := (&quick{words: map[string]string{}}).read(m)
	if !ok {
		return false
	}
	want, err := read(m)
	if err != nil {
		return false // wrong in a part that is not counted
	}
	if diff := cmp.Diff(countedPart(want), countedPart(got)); diff != "" {
		t.Errorf("%s (-read +quick):\n%s", data, diff)
	}
	return true
}

// sampleKill is the ith kill and its outcome, as the tracer and the annotator write them.
func sampleKill(i, workload int, node string) (*event.Event, *event.Outcome) {
	at := time.Date(2026, 11, 23, 2, 3, 4, i, time.UTC)
	uid := fmt.Sprintf("0f1e2d3c-4b5a-6978-8796-%012x", i%50_000)
	id := event.VictimID("1dd8105d-ffb3-46fb-940b-dc17365768a7", uint32(i%4_000_000+1000), uint64(8_011_705_978_461+i))
	path := "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + strings.ReplaceAll(uid, "-", "_") + ".slice"
	containerID := fmt.Sprintf("%064x", i)
	cgroup := &event.Cgroup{Path: path + "/cri-containerd-" + containerID + ".scope", ID: uint64(48974 + i), Version: 2}
	limit := uint64(256<<20) << (workload % 4)
	pid := uint32(i%4_000_000 + 1000)
	return &event.Event{
			Schema: event.Schema, ID: id, Seq: uint64(i + 1), Time: at, BoottimeNS: 8_011_711_672_087 + uint64(i),
			Node:  event.Node{Name: node, BootID: "1dd8105d-ffb3-46fb-940b-dc17365768a7", Kernel: "6.12.38+deb13-amd64", Tier: "fentry", Epoch: 8_003_411_067_203},
			Scope: event.ScopeCgroup, Outcome: event.OutcomeKilled,
			Victim: event.Victim{
				PID: pid, TID: pid, NSPID: 1, Comm: "java", UID: new(uint32(1000)), OOMScoreAdj: new(int16(968)), StartBoottimeNS: 8_011_705_978_461 + uint64(i),
				Cgroup: cgroup, Memory: &event.Memory{TotalVM: 4 * limit, AnonRSS: limit - 1<<20, FileRSS: 90112, PgTables: 57344, Batched: &event.Batched{AnonRSS: limit - 1<<20, FileRSS: 139264}},
			},
			Trigger:   &event.Trigger{PID: pid, TID: pid, Comm: "java", Cgroup: cgroup},
			Limit:     &event.Limit{Cgroup: &event.Cgroup{Path: path, ID: 48941, Version: 2}, Level: event.LevelPod, Max: &limit, Usage: &limit, SwapUsage: new(uint64)},
			Alloc:     &event.Alloc{GFPMask: "0xcc0", GFPFlags: []string{"GFP_KERNEL"}, TotalPages: limit / 4096},
			Incident:  &event.Incident{ID: event.IncidentID("1dd8105d-ffb3-46fb-940b-dc17365768a7", 8_011_711_672_087+uint64(i))},
			Container: &event.Container{PodUID: uid, ContainerID: containerID, Runtime: "containerd", QoS: "burstable"},
		}, &event.Outcome{
			Schema: event.Schema, ID: event.OutcomeID(id, event.StageAnnotate), Kill: id, Stage: event.StageAnnotate, Time: at,
			Result: event.ResultSkipped, Reason: event.ReasonLevel, Detail: "the limit is the pod's own", Node: node,
			Pod:       &event.PodRef{Namespace: fmt.Sprintf("team-%d", workload%40), Name: fmt.Sprintf("service-%d-5d4f7c9b8-x%d", workload, i%1000), UID: uid, Owner: fmt.Sprintf("Deployment/service-%d", workload)},
			Container: "main",
		}
}

// BenchmarkRead compares both readers, of a kill and its outcome.
func BenchmarkRead(b *testing.B) {
	seeds := quickSeeds(b)
	q := &quick{words: map[string]string{}}
	for name, one := range map[string]func(bus.Stored) bool{
		"full":  func(m bus.Stored) bool { _, err := read(m); return err == nil },
		"quick": func(m bus.Stored) bool { _, ok := q.read(m); return ok },
	} {
		b.Run(name, func(b *testing.B) {
			for b.Loop() {
				for _, m := range seeds {
					if !one(m) {
						b.Fatal("not read")
					}
				}
			}
		})
	}
}
