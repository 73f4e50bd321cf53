package event_test

import (
	"slices"
	"strings"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// longest is a node name of 253 characters.
var longest = strings.Repeat("a23456789.", 25) + "xyz"

func TestSubject(t *testing.T) {
	for _, tt := range []struct {
		kind        event.Kind
		class, node string
		want        string
	}{
		{event.KindKill, "global", "node-1", "oom.v1.kill.global.node-1"},
		{event.KindKill, "cgroup", "ip-10-0-0-1.eu-central-1.compute.internal", "oom.v1.kill.cgroup.ip-10-0-0-1_eu-central-1_compute_internal"},
		{event.KindExiting, "unknown", "0", "oom.v1.exiting.unknown.0"},
		{event.KindKill, "mempolicy", longest, "oom.v1.kill.mempolicy." + strings.ReplaceAll(longest, ".", "_")},
		{"outcome", "already_exiting", "a.b", "oom.v1.outcome.already_exiting.a_b"},
		{"gap", "journal-wrapped", "a.b", "oom.v1.gap.journal-wrapped.a_b"},
	} {
		got, err := event.Subject(tt.kind, tt.class, tt.node)
		if err != nil || got != tt.want {
			t.Errorf("Subject(%q, %q, %q) is %q, %v, want %q", tt.kind, tt.class, tt.node, got, err, tt.want)
		}
		kind, class, node, err := event.ParseSubject(got)
		if err != nil || kind != tt.kind || class != tt.class || node != tt.node {
			t.Errorf("ParseSubject(%q) is %q, %q, %q, %v", got, kind, class, node, err)
		}
	}
}

// badNodes are no DNS-1123 subdomains.
var badNodes = []string{
	"", " ", "A", "Node-1", "node_1", "-a", "a-", ".a", "a.", "a..b", "a.-b", "a-.b", "a b", "a\n", "\na", "a\x00",
	"*", ">", "a.*", "a.>", "ä", "node/1", longest + "x",
}

// badWords are no kinds and no classes.
var badWords = []string{"", "a.b", ">", "a*", "a b", "Kill", "kill\n", "ä", "\x1b"}

func TestSubjectRefuses(t *testing.T) {
	for _, node := range badNodes {
		if got, err := event.NodeToken(node); err == nil || got != "" || !strings.Contains(err.Error(), "is not a DNS-1123 subdomain") {
			t.Errorf("NodeToken(%q) is %q, %v", node, got, err)
		}
		if got, err := event.Subject(event.KindKill, "global", node); err == nil || got != "" {
			t.Errorf("the subject of node %q is %q, %v", node, got, err)
		}
		if got, err := event.Filter(event.KindKill, "global", node); node != "" && (err == nil || got != "") {
			t.Errorf("the filter of node %q is %q, %v", node, got, err)
		}
	}
	for _, word := range append(badWords, "*") {
		if got, err := event.Subject(event.Kind(word), "global", "n"); err == nil || got != "" {
			t.Errorf("the subject of kind %q is %q, %v", word, got, err)
		}
		if got, err := event.Subject(event.KindKill, word, "n"); err == nil || got != "" {
			t.Errorf("the subject of class %q is %q, %v", word, got, err)
		}
		if word == "" || word == "*" {
			continue
		}
		if got, err := event.Filter(event.Kind(word), "global", "n"); err == nil || got != "" {
			t.Errorf("the filter of kind %q is %q, %v", word, got, err)
		}
		if got, err := event.Filter(event.KindKill, word, "n"); err == nil || got != "" {
			t.Errorf("the filter of class %q is %q, %v", word, got, err)
		}
	}
}

func TestParseSubjectRefuses(t *testing.T) {
	for _, s := range []string{
		"", "oom", "oom.v1", "oom.v1.", "oom.v1.kill", "oom.v1.kill.global", "oom.v1.kill.global.", "oom.v1.kill..n", "oom.v1..global.n",
		"oom.v1.kill.global.a.b", "oom.v2.kill.global.n", "OOM.v1.kill.global.n", "xoom.v1.kill.global.n", "oom.v1kill.global.n",
		"oom.v1.kill.global.*", "oom.v1.kill.*.n", "oom.v1.*.global.n", "oom.v1.kill.>", "oom.v1.kill.global.>",
		"oom.v1.kill.global.N", "oom.v1.kill.global._a", "oom.v1.kill.global.a__b", "oom.v1.kill.global.n\n", "oom.v1.kill.global.\x1b",
		"oom.v1.Kill.global.n", "oom.v1.kill.glo bal.n",
	} {
		kind, class, node, err := event.ParseSubject(s)
		if err == nil || kind != "" || class != "" || node != "" {
			t.Errorf("ParseSubject(%q) is %q, %q, %q, %v", s, kind, class, node, err)
		}
		if err != nil && strings.ContainsAny(err.Error(), "\n\x1b") {
			t.Errorf("the error of %q is not quoted", s)
		}
	}
}

func TestFilter(t *testing.T) {
	for _, tt := range []struct {
		kind        event.Kind
		class, node string
		want        string
	}{
		{event.KindKill, "global", "a.b", "oom.v1.kill.global.a_b"},
		{event.KindKill, "", "", "oom.v1.kill.*.*"},
		{event.KindKill, "*", "", "oom.v1.kill.*.*"},
		{"*", "", "a.b", "oom.v1.*.*.a_b"},
		{"", "", "", "oom.v1.*.*.*"},
		{"", "cgroup", "", "oom.v1.*.cgroup.*"},
	} {
		if got, err := event.Filter(tt.kind, tt.class, tt.node); err != nil || got != tt.want {
			t.Errorf("Filter(%q, %q, %q) is %q, %v, want %q", tt.kind, tt.class, tt.node, got, err, tt.want)
		}
	}
}

// A mark without a kill is no kill; what is not known counts as one.
func TestEventSubject(t *testing.T) {
	for outcome, want := range map[event.KillOutcome]string{
		event.OutcomeKilled:  "oom.v1.kill.cgroup.worker-1_example_com",
		event.OutcomeUnknown: "oom.v1.kill.cgroup.worker-1_example_com",
		"of a later version": "oom.v1.kill.cgroup.worker-1_example_com",
		event.OutcomeExiting: "oom.v1.exiting.cgroup.worker-1_example_com",
	} {
		e := full()
		e.Outcome = outcome
		if got, err := e.Subject(); err != nil || got != want {
			t.Errorf("the subject of outcome %q is %q, %v, want %q", outcome, got, err, want)
		}
	}
	for _, spoil := range []func(*event.Event){
		func(e *event.Event) { e.Scope = "" },
		func(e *event.Event) { e.Scope = "a.b" },
		func(e *event.Event) { e.Node.Name = "Worker" },
	} {
		e := full()
		spoil(&e)
		if got, err := e.Subject(); err == nil || got != "" {
			t.Errorf("subject %q, %v", got, err)
		}
	}
}

// The stream takes everything but the nodes' status, which has a stream of its own.
func TestStreamSubjects(t *testing.T) {
	if event.StreamName != "OOM" {
		t.Errorf("the stream is %s", event.StreamName)
	}
	want := []string{"oom.v1.kill.>", "oom.v1.exiting.>", "oom.v1.outcome.>", "oom.v1.gap.>", "oom.v1.neighbours.>", "oom.v1.eviction.>"}
	if got := event.StreamSubjects(); !slices.Equal(got, want) {
		t.Errorf("subjects %q, want %q", got, want)
	}
}

func FuzzParseSubject(f *testing.F) {
	for _, s := range []string{
		"oom.v1.kill.global.node-1", "oom.v1.exiting.cgroup.a_b_c", "oom.v1.outcome.already_exiting.0", "oom.v1.kill.global.*", "oom.v1.kill.global.a__b",
		"oom.v1.kill.>", "oom.v1....", "oom.v1.kill.global.a-_b", "oom.v2.kill.global.n", "",
	} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		kind, class, node, err := event.ParseSubject(s)
		if err != nil {
			return
		}
		if back, err := event.Subject(kind, class, node); err != nil || back != s {
			t.Errorf("%q, %q, %q make the subject %q, %v", kind, class, node, back, err)
		}
		if filter, err := event.Filter(kind, class, node); err != nil || filter != s {
			t.Errorf("%q, %q, %q make the filter %q, %v", kind, class, node, filter, err)
		}
		if strings.ContainsAny(s, "*> \t\r\n") {
			t.Errorf("%q is no subject", s)
		}
	})
}

func FuzzNodeToken(f *testing.F) {
	for _, node := range append([]string{"node-1", "a.b.c", longest}, badNodes...) {
		f.Add(node)
	}
	f.Fuzz(func(t *testing.T, node string) {
		token, err := event.NodeToken(node)
		if err != nil {
			return
		}
		_, _, back, err := event.ParseSubject("oom.v1.kill.global." + token)
		if err != nil || back != node {
			t.Errorf("%q becomes %q and then %q, %v", node, token, back, err)
		}
	})
}
