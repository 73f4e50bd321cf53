package event_test

import (
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/oom-tracer/oom-tracer/go/event"
)

var update = flag.Bool("update", false, "write the golden files anew")

const bootID = "0f4d7c1e-6b2a-4a3c-9a57-1f1d3c2b4e5f"

// full has a value in every field. Those of uid and oom_score_adj are zero, which is known and so is
// not the same as absent.
func full() event.Event {
	id := event.VictimID(bootID, 4242, 123456789)
	return event.Event{
		Schema:     event.Schema,
		ID:         id,
		Seq:        7,
		Time:       time.Date(2026, 11, 23, 2, 3, 4, 5000006, time.UTC),
		BoottimeNS: 9876543210123,
		Node:       event.Node{Name: "worker-1.example.com", BootID: bootID, Kernel: "6.12.9-amd64", Tier: "fentry", Epoch: 9876000000000},
		Scope:      event.ScopeCgroup,
		Outcome:    event.OutcomeKilled,
		Victim: event.Victim{
			PID: 4242, TID: 4243, NSPID: 17, Comm: "java",
			UID: new(uint32), OOMScoreAdj: new(int16),
			StartBoottimeNS: 123456789,
			Cgroup:          &event.Cgroup{Path: ".../cri-containerd-0123.scope/init", ID: 1001, Version: 2, Truncated: true},
			Memcg:           &event.Cgroup{Path: "/kubepods.slice", ID: 1002, Version: 2, Truncated: true},
			Memory: &event.Memory{
				TotalVM: 1 << 40, AnonRSS: 1 << 30, FileRSS: 2 << 20, ShmemRSS: 3 << 20, Swap: 4 << 20, PgTables: 5 << 12,
				Approximate: true,
				Batched:     &event.Batched{AnonRSS: 1 << 30, FileRSS: 2 << 20, ShmemRSS: 3 << 20, Swap: 4 << 20},
			},
		},
		Trigger: &event.Trigger{PID: 99, TID: 100, Comm: "dd", Cgroup: &event.Cgroup{Path: "/system.slice", ID: 1003, Version: 1, Truncated: true}},
		Limit: &event.Limit{
			Cgroup: &event.Cgroup{Path: "/kubepods.slice", ID: 1002, Version: 2, Truncated: true},
			Level:  event.LevelKubepods, Max: new(uint64(1 << 34)), Usage: new(uint64(1<<34 - 4096)),
			SwapMax: new(uint64(0)), SwapUsage: new(uint64(4096)), Inferred: true,
		},
		Alloc:    &event.Alloc{GFPMask: "0xcc0", GFPFlags: []string{"GFP_KERNEL"}, Order: 2, TotalPages: 1 << 22},
		Incident: &event.Incident{ID: event.IncidentID(bootID, 9876543210000), Group: true, Index: 3},
		Container: &event.Container{
			PodUID: "5b1a7a5e-1c1d-4b6f-8a55-2b7f0c9d1e2f", ContainerID: strings.Repeat("0123456789abcdef", 4),
			Runtime: "containerd", QoS: "burstable", Static: true,
		},
	}
}

// bare is what a tracer can say when the kernel handed over nothing but a thread's ID.
func bare() event.Event {
	return event.Event{
		Schema:     event.Schema,
		ID:         event.UnreadableID(bootID, 4243, 9876543210123),
		Seq:        1,
		Time:       time.Date(2026, 11, 23, 2, 3, 4, 0, time.UTC),
		BoottimeNS: 9876543210123,
		Node:       event.Node{Name: "worker-1", BootID: bootID, Kernel: "4.18.0", Tier: "none"},
		Scope:      event.ScopeUnknown,
		Outcome:    event.OutcomeUnknown,
		Victim:     event.Victim{TID: 4243},
	}
}

// zero is bare with everything that may be absent present, and zero where it can be.
func zero() event.Event {
	e := bare()
	e.Victim.UID, e.Victim.OOMScoreAdj = new(uint32), new(int16)
	e.Victim.Cgroup, e.Victim.Memcg = &event.Cgroup{}, &event.Cgroup{}
	e.Victim.Memory = &event.Memory{Batched: &event.Batched{}}
	e.Trigger = &event.Trigger{}
	e.Limit = &event.Limit{Max: new(uint64), Usage: new(uint64), SwapMax: new(uint64), SwapUsage: new(uint64)}
	e.Alloc, e.Incident, e.Container = &event.Alloc{}, &event.Incident{}, &event.Container{}
	return e
}

// sparse has the parts that have optional members, without those.
func sparse() event.Event {
	e := bare()
	e.Victim.Memory = &event.Memory{}
	e.Limit = &event.Limit{}
	return e
}

// TestGolden pins the schema: names, order, what is absent and what is zero. Within v1 a line may be
// added to full.json and zero.json; every other change breaks somebody's consumer.
func TestGolden(t *testing.T) {
	for name, e := range map[string]event.Event{"full": full(), "bare": bare(), "zero": zero(), "sparse": sparse()} {
		golden(t, name, e, event.Parse)
	}
}

// golden holds a message against its file, and what is read back against the message.
func golden[M any](t *testing.T, name string, message M, parse func([]byte) (M, error)) {
	t.Helper()
	t.Run(name, func(t *testing.T) {
		got, err := json.MarshalIndent(message, "", "  ")
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, '\n')
		file := filepath.Join("testdata", name+".json")
		if *update {
			if err := os.WriteFile(file, got, 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(string(want), string(got)); diff != "" {
			t.Errorf("json (-golden +got; -update writes it):\n%s", diff)
		}
		back, err := parse(want)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(message, back); diff != "" {
			t.Errorf("read back (-want +got):\n%s", diff)
		}
	})
}

// TestFullIsFull makes a new field fail until full, and with it the golden, has it.
func TestFullIsFull(t *testing.T) {
	var walk func(path string, v reflect.Value)
	walk = func(path string, v reflect.Value) {
		if v.IsZero() {
			t.Errorf("full() leaves %s zero", path)
			return
		}
		if v.Kind() == reflect.Pointer {
			if v = v.Elem(); v.Kind() != reflect.Struct {
				return // a pointer that is set says enough: it may well point to zero
			}
		}
		if v.Kind() != reflect.Struct || v.Type() == reflect.TypeFor[time.Time]() {
			return
		}
		for i := range v.NumField() {
			walk(path+"."+v.Type().Field(i).Name, v.Field(i))
		}
	}
	walk("Event", reflect.ValueOf(full()))
}

// refuses demands that parse refuses a message of another schema, and one without a key. A key is "key", or "key=path" where an error
// names it by its path.
func refuses[M any](t *testing.T, what string, message M, parse func([]byte) (M, error), keys ...string) {
	t.Helper()
	data, err := json.Marshal(message)
	if err != nil {
		t.Fatal(err)
	}
	whole := string(data)
	want := map[string]string{
		"": "", "[]": "", "{}": ": schema is missing", strings.Replace(whole, "/v1", "/v2", 1): "unknown schema",
	}
	for _, key := range keys {
		key, path, named := strings.Cut(key, "=")
		if !named {
			path = key
		}
		want[strings.Replace(whole, `"`+key+`":`, `"no `+key+`":`, 1)] = ": " + path + " is missing"
	}
	for text, want := range want {
		if _, err := parse([]byte(text)); err == nil || !strings.HasPrefix(err.Error(), "parse "+what) || !strings.Contains(err.Error(), want) ||
			errors.Is(err, event.ErrSchema) != (want == "unknown schema") {
			t.Errorf("%s: %v, want %q", text, err, want)
		}
	}
}

// edited is full() as JSON with one field set to the JSON text, or without it where that is empty. The
// field is a path with dots.
func edited(t *testing.T, field, text string) []byte {
	t.Helper()
	data, err := json.Marshal(full())
	if err != nil {
		t.Fatal(err)
	}
	var root map[string]any
	if err := json.Unmarshal(data, &root); err != nil {
		t.Fatal(err)
	}
	at := root
	path := strings.Split(field, ".")
	for _, name := range path[:len(path)-1] {
		at = at[name].(map[string]any)
	}
	last := path[len(path)-1]
	if text == "" {
		if _, ok := at[last]; !ok {
			t.Fatalf("%s is not there", field)
		}
		delete(at, last)
	} else {
		at[last] = json.RawMessage(text)
	}
	if data, err = json.Marshal(root); err != nil {
		t.Fatal(err)
	}
	return data
}

func TestParseRefuses(t *testing.T) {
	for _, tt := range []struct {
		field, text string
		want        string // in the error
	}{
		{"schema", "", "schema is missing"},
		{"schema", `""`, "schema is missing"},
		{"schema", `1`, `Go string within "/schema"`},
		{"schema", `"oom-tracer/v2"`, `schema "oom-tracer/v2": unknown schema (this build reads oom-tracer/v1)`},
		{"schema", `"\u001b[2J"`, `schema "\x1b[2J": unknown schema (this build reads oom-tracer/v1)`},
		{"id", "", "id is missing"},
		{"id", `""`, "id is missing"},
		{"seq", "", "seq is missing"},
		{"seq", `0`, "seq is missing"},
		{"seq", `-1`, `Go uint64 within "/seq"`},
		{"time", "", "time is missing"},
		{"time", `"0001-01-01T00:00:00Z"`, "time is missing"},
		{"time", `"yesterday"`, `parsing time "yesterday"`},
		{"node", "", "node.name is missing"},
		{"node.name", "", "node.name is missing"},
		{"scope", "", "scope is missing"},
		{"outcome", "", "outcome is missing"},
		{"victim", "", "victim.tid is missing"},
		{"victim.tid", "", "victim.tid is missing"},
		{"victim.pid", `"1"`, `Go uint32 within "/victim/pid"`},
		{"victim.oom_score_adj", `40000`, "number 40000"},
		{"limit", `[]`, `event.Limit within "/limit"`},
	} {
		t.Run(tt.field+" "+tt.text, func(t *testing.T) {
			e, err := event.Parse(edited(t, tt.field, tt.text))
			if err == nil {
				t.Fatal("no error")
			}
			if !strings.HasPrefix(err.Error(), "parse event: ") || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error\n%s, want\n%s", err, tt.want)
			}
			if diff := cmp.Diff(event.Event{}, e); diff != "" {
				t.Errorf("an event comes with the error: %s", diff)
			}
			if future := strings.Contains(tt.text, "v2") || strings.Contains(tt.text, "2J"); errors.Is(err, event.ErrSchema) != future {
				t.Errorf("errors.Is(%v, ErrSchema) is %v", err, !future)
			}
		})
	}
	for text, want := range map[string]string{
		"":                  "unexpected EOF",
		"null":              "schema is missing",
		"{}":                "schema is missing",
		"[]":                "unmarshal JSON array",
		"\x1b[2J":           `invalid character '\x1b'`,
		"{} {}":             "after top-level value",
		`{"schema":`:        `unexpected EOF within "/schema"`,
		`{"seq":1,"seq":2}`: `duplicate object member name "seq"`,
		"{\"id\":\"\xff\"}": "invalid UTF-8",
	} {
		if _, err := event.Parse([]byte(text)); err == nil || !strings.HasPrefix(err.Error(), "parse event: ") || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: error %v, want %s", text, err, want)
		}
	}
}

// A later schema may look like nothing that this build knows: it is told by its version all the same.
func TestParseFutureSchema(t *testing.T) {
	for _, text := range []string{
		`{"schema":"oom-tracer/v2"}`,
		`{"schema":"oom-tracer/v2","time":17,"victim":[{"pid":"x"}],"seq":"one"}`,
	} {
		if _, err := event.Parse([]byte(text)); !errors.Is(err, event.ErrSchema) {
			t.Errorf("%s: %v", text, err)
		}
	}
}

// Within v1 fields and values are added.
func TestParseForward(t *testing.T) {
	for _, tt := range []struct{ field, text string }{
		{"pressure", `{"full":{"avg10":99.5}}`},
		{"victim.threads", `[1,2,3]`},
		{"node.zone", `"eu-central-1a"`},
		{"limit.cgroup.labels", `null`},
	} {
		e, err := event.Parse(edited(t, tt.field, tt.text))
		if err != nil {
			t.Errorf("%s: %v", tt.field, err)
		}
		if diff := cmp.Diff(full(), e); diff != "" {
			t.Errorf("%s changes what is known (-want +got):\n%s", tt.field, diff)
		}
	}
	for field, text := range map[string]string{"scope": `"zone"`, "outcome": `"reaped"`, "limit.level": `"numa"`, "node.tier": `"kfunc"`} {
		e, err := event.Parse(edited(t, field, text))
		if err != nil {
			t.Errorf("%s: %v", field, err)
		}
		if got := cmp.Diff(full(), e); !strings.Contains(got, text) {
			t.Errorf("%s is not %s", field, text)
		}
	}
}

func TestIDs(t *testing.T) {
	victim := event.VictimID(bootID, 4242, 18446744073709551615)
	for _, tt := range []struct{ got, want string }{
		{victim, bootID + "-4242-18446744073709551615"},
		{event.ExitingID(victim, 4294967295), bootID + "-4242-18446744073709551615-exit-4294967295"},
		{event.UnreadableID(bootID, 4243, 17), bootID + "-tid-4243-17"},
		{event.IncidentID(bootID, 17), bootID + "-incident-17"},
	} {
		if tt.got != tt.want {
			t.Errorf("got %s, want %s", tt.got, tt.want)
		}
	}
	// One number too many or too few in common must not make one ID of two things.
	ids := []string{
		event.VictimID(bootID, 1, 23), event.VictimID(bootID, 12, 3), event.VictimID("other", 1, 23),
		event.ExitingID(event.VictimID(bootID, 1, 23), 1), event.ExitingID(event.VictimID(bootID, 1, 23), 2),
		event.UnreadableID(bootID, 1, 23), event.UnreadableID(bootID, 12, 3),
		event.IncidentID(bootID, 1), event.IncidentID(bootID, 23),
	}
	seen := map[string]bool{}
	for _, id := range ids {
		if seen[id] {
			t.Errorf("%s names two things", id)
		}
		seen[id] = true
	}
}

func TestScopes(t *testing.T) {
	want := []event.Scope{"global", "cgroup", "cpuset", "mempolicy", "sysrq", "unknown"}
	if diff := cmp.Diff(want, event.Scopes()); diff != "" {
		t.Error(diff)
	}
	for _, s := range event.Scopes() {
		if _, err := event.Subject(event.KindKill, string(s), "n"); err != nil {
			t.Error(err)
		}
	}
}

func FuzzParse(f *testing.F) {
	for _, e := range []event.Event{full(), bare(), zero()} {
		data, err := json.Marshal(e)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte(`{"schema":"oom-tracer/v1"}`))
	f.Add([]byte(`{"schema":"oom-tracer/v2","seq":"x"}`))
	f.Add([]byte(`{"schema":"oom-tracer/v1","id":"a","seq":1,"time":"2026-01-01T00:00:00.1+01:00","node":{"name":"n"},"scope":"s","outcome":"o","victim":{"tid":1},"alloc":{"gfp_flags":[]}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		e, err := event.Parse(data)
		if err != nil {
			if !strings.HasPrefix(err.Error(), "parse event: ") {
				t.Errorf("error %q does not say what was done", err)
			}
			return
		}
		if e.Schema != event.Schema || e.ID == "" || e.Seq == 0 || e.Time.IsZero() || e.Node.Name == "" || e.Scope == "" || e.Outcome == "" || e.Victim.TID == 0 {
			t.Errorf("taken without what it must have: %+v", e)
		}
		again, err := json.Marshal(e)
		if err != nil {
			t.Fatalf("what was read cannot be written: %v", err)
		}
		back, err := event.Parse(again)
		if err != nil {
			t.Fatalf("what was written cannot be read: %v", err)
		}
		// An empty list of flags is none.
		if e.Alloc != nil && len(e.Alloc.GFPFlags) == 0 {
			e.Alloc.GFPFlags = nil
		}
		if diff := cmp.Diff(e, back); diff != "" {
			t.Errorf("a second reading differs (-first +second):\n%s", diff)
		}
	})
}

// TestMsgID: the kernel may mark a second thread of a process that is killed again. Both marks are stored, and are one kill.
func TestMsgID(t *testing.T) {
	id := event.VictimID("boot", 7, 100)
	leader := event.Event{ID: id, Victim: event.Victim{PID: 7, TID: 7}}
	thread := event.Event{ID: id, Victim: event.Victim{PID: 7, TID: 9}}
	exiting := event.Event{ID: event.ExitingID(id, 9), Outcome: event.OutcomeExiting, Victim: event.Victim{PID: 7, TID: 9}}
	unreadable := event.Event{ID: event.UnreadableID("boot", 9, 100), Victim: event.Victim{TID: 9}}
	for _, e := range []event.Event{leader, exiting, unreadable} {
		if e.MsgID() != e.ID {
			t.Errorf("%s is published as %s", e.ID, e.MsgID())
		}
	}
	if thread.MsgID() != id+"-9" {
		t.Errorf("the thread's mark is published as %s", thread.MsgID())
	}
}
