package text_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

var update = flag.Bool("update", false, "write the golden files anew")

const (
	podUID      = "5b1a7a5e-1c1d-4b6f-8a55-2b7f0c9d1e2f"
	containerID = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
)

// kill is a container that exceeded its limit.
func kill() event.Event {
	return event.Event{
		Schema: event.Schema, ID: "id", Seq: 1,
		Time:    time.Date(2026, 11, 23, 2, 3, 4, 5_600_000, time.UTC),
		Node:    event.Node{Name: "worker-1"},
		Scope:   event.ScopeCgroup,
		Outcome: event.OutcomeKilled,
		Victim: event.Victim{
			PID: 4242, TID: 4243, Comm: "java",
			Cgroup: &event.Cgroup{Path: "/kubepods.slice/kubepods-burstable.slice/cri-containerd-" + containerID + ".scope", ID: 1, Version: 2},
			Memory: &event.Memory{AnonRSS: 500 << 20, FileRSS: 10 << 20, ShmemRSS: 1 << 20},
		},
		Trigger:   &event.Trigger{PID: 4242, TID: 4250, Comm: "C2 CompilerThre"},
		Limit:     &event.Limit{Level: event.LevelContainer, Max: new(uint64(512 << 20))},
		Container: &event.Container{PodUID: podUID, ContainerID: containerID, Runtime: "containerd", QoS: "burstable"},
	}
}

func with(change func(*event.Event)) event.Event {
	e := kill()
	change(&e)
	return e
}

// ordinary are events of a cluster, and hostile those that somebody made up.
func ordinary() []event.Event {
	return []event.Event{
		kill(),
		with(func(e *event.Event) { // a Java VM of the largest size on the node with the longest name, as the rest of them must line up
			e.Node.Name = "ip-10-0-123-245.eu-central-1.compute.internal"
			e.Victim.Comm, e.Victim.PID = "kube-controller", 4194304
			e.Scope, e.Outcome = event.ScopeMempolicy, event.OutcomeExiting
			e.Victim.Memory.AnonRSS = 1023<<30 + 960<<20
			e.Limit = &event.Limit{Level: event.LevelContainer, Max: new(uint64(1023<<30 + 960<<20)), Inferred: true}
		}),
		with(func(e *event.Event) { // the node ran out
			e.Scope, e.Limit = event.ScopeGlobal, &event.Limit{Level: event.LevelNode}
			e.Trigger = &event.Trigger{PID: 1, TID: 1, Comm: "systemd"}
		}),
		with(func(e *event.Event) { // a static pod, hit in its own cgroup
			e.Container = &event.Container{PodUID: strings.Repeat("0f", 16), Static: true, QoS: "burstable"}
			e.Limit = &event.Limit{Level: event.LevelKubepods, Max: new(uint64(31 << 30))}
		}),
		with(func(e *event.Event) { // no pod
			e.Container = nil
			e.Victim.Cgroup.Path = `/system.slice/system-getty.slice/getty@tty\x2d1.service`
			e.Limit = &event.Limit{Level: event.LevelOther, Max: new(uint64(4096))}
		}),
		with(func(e *event.Event) { e.Container.PodUID = "" }), // plain docker
		with(func(e *event.Event) { e.Container = &event.Container{Runtime: "podman"} }),
		with(func(e *event.Event) { // nothing but a thread is known
			e.Victim = event.Victim{TID: 4243}
			e.Scope, e.Outcome = event.ScopeUnknown, event.OutcomeUnknown
			e.Limit, e.Container, e.Trigger = nil, nil, nil
		}),
		with(func(e *event.Event) { // nobody is named
			e.Victim.Comm, e.Victim.Memory, e.Limit.Max = "", nil, nil
			e.Trigger = &event.Trigger{PID: 7}
		}),
		with(func(e *event.Event) { e.Victim.Cgroup = nil; e.Container = nil }),
		with(func(e *event.Event) { // another time zone
			e.Time = e.Time.Truncate(time.Second).In(time.FixedZone("CET", 3600))
			e.Victim.Comm = "tmux: server"
		}),
	}
}

func hostile() []event.Event {
	const evil = "\x1b[2J\r\n\u009b1m"
	return []event.Event{
		with(func(e *event.Event) { e.Victim.Comm, e.Trigger = evil, &event.Trigger{PID: 1, Comm: evil} }),
		with(func(e *event.Event) {
			e.Container, e.Victim.Cgroup.Path = nil, "/a  asked by systemd[1]\x00\x7f\u202e\xff\ufffd\"\\"
		}),
		with(func(e *event.Event) { e.Victim.Comm = "日本語ファ" }),
		with(func(e *event.Event) {
			e.Node.Name, e.Scope, e.Outcome, e.Limit.Level = evil, evil, evil, evil
			e.Container.PodUID, e.Container.ContainerID = evil, evil
		}),
		with(func(e *event.Event) {
			e.Node.Name = strings.Repeat("n", 70)
			e.Victim.Memory = &event.Memory{AnonRSS: 1<<64 - 1}
			e.Limit.Max = new(uint64(1<<64 - 1))
		}),
		with(func(e *event.Event) {}), // and a plain one after them
	}
}

// golden compares got with a file in testdata.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := "testdata/" + name
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-golden +got; -update writes it):\n%s", name, diff)
	}
}

func TestGolden(t *testing.T) {
	for name, events := range map[string][]event.Event{"ordinary": ordinary(), "hostile": hostile()} {
		var plain text.Table
		color := text.Table{Color: true}
		var lines, painted strings.Builder
		for _, e := range events {
			fmt.Fprintln(&lines, plain.Line(&e))
			// Quoted, so that the file can be read.
			fmt.Fprintf(&painted, "%q\n", color.Line(&e))
		}
		golden(t, name+".golden", lines.String())
		golden(t, name+"-color.golden", painted.String())
	}
}

// The columns of all that is met in practice line up, once the longest node name was seen.
func TestAligned(t *testing.T) {
	var table text.Table
	events := ordinary()
	for _, e := range events {
		table.Line(&e)
	}
	first := table.Line(&events[0])
	for _, e := range events {
		line := table.Line(&e)
		for _, value := range []string{"worker-1", "killed", "cgroup", "java[", "rss ", "limit ", "pod "} {
			at := strings.Index(first, value)
			if line[at-2:at] != "  " || line[at] == ' ' {
				t.Errorf("no column begins at %d, where the first line has %q:\n%s\n%s", at, value, first, line)
			}
		}
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[uint64]string{
		0: "0 B", 1: "1 B", 1023: "1023 B", 1024: "1.0 KiB", 1536: "1.5 KiB",
		1<<20 - 1: "1.0 MiB", 1023 << 10: "1023.0 KiB", 1023<<10 + 972: "1023.9 KiB", 1023<<10 + 973: "1.0 MiB", 1 << 20: "1.0 MiB",
		512 << 20: "512.0 MiB", 1<<30 - 1: "1.0 GiB", 1<<40 - 1: "1.0 TiB", 1 << 50: "1.0 PiB", 1 << 60: "1.0 EiB", 1<<64 - 1: "16.0 EiB",
	} {
		e := with(func(e *event.Event) { e.Limit.Max = &n })
		if line := text.Line(&e, false); !strings.Contains(line, "limit container "+want+" ") {
			t.Errorf("%d is not %s: %s", n, want, line)
		}
	}
}

func TestPrintable(t *testing.T) {
	for in, want := range map[string]string{
		"":                   "",
		"java":               "java",
		"tmux: server":       "tmux: server",
		`getty@tty\x2d1`:     `getty@tty\x2d1`,
		`say "no"\`:          `say "no"\`,
		"a\tb\nc\rd\x00e":    `a\tb\nc\rd\x00e`,
		"\\\x1b[31m":         `\\x1b[31m`,
		"\x7f\u009b\u202e":   `\x7f\u009b\u202e`,
		"\xff\xc3(\ufffd":    `\xff\xc3(\ufffd`,
		"é\u0301日\U0001f4a5": `\u00e9\u0301\u65e5\U0001f4a5`,
	} {
		if got := text.Printable(in); got != want {
			t.Errorf("Printable(%q) is %s, want %s", in, got, want)
		}
	}
}

func TestJSON(t *testing.T) {
	for in, want := range map[string]string{
		`{"a":"java"}`:           `{"a":"java"}`,
		"{\r\n\t\"a\": 1\n}\n":   `{   "a": 1 } `,
		"\"\u009b2J\x7f\u00e9\"": `"\u009b2J\u007f\u00e9"`,
		"\"\U0001f4a5\"":         `"\ud83d\udca5"`,
		"\"\xff\"":               `"\ufffd"`,
		`"\u001b\\"`:             `"\u001b\\"`,
	} {
		if got := string(text.JSON([]byte(in))); got != want {
			t.Errorf("JSON(%q) is %q, want %q", in, got, want)
		}
	}
}

// printableASCII is what a terminal does nothing about.
var printableASCII = regexp.MustCompile(`^[ -~]*$`)

// sgr is what color may add.
var sgr = regexp.MustCompile("\x1b\\[[0-9;]+m")

func FuzzLine(f *testing.F) {
	for _, s := range []string{"java", "\x1b[2J", "\u009b\u202e\u0301", "\xff\n\r\x00\x7f", `\x1b"\`, "日本語"} {
		f.Add(s, uint64(len(s)), uint32(len(s)))
	}
	f.Fuzz(func(t *testing.T, s string, n uint64, pid uint32) {
		for _, e := range []event.Event{
			{
				Node: event.Node{Name: s}, Scope: event.Scope(s), Outcome: event.KillOutcome(s), Time: time.Unix(int64(n>>20), 0),
				Victim:  event.Victim{PID: pid, TID: pid, Comm: s, Cgroup: &event.Cgroup{Path: s}, Memory: &event.Memory{AnonRSS: n}},
				Trigger: &event.Trigger{PID: 1, Comm: s},
				Limit:   &event.Limit{Level: event.LimitLevel(s), Max: &n},
			},
			{Container: &event.Container{PodUID: s, ContainerID: s, Runtime: s, QoS: s, Static: pid%2 == 0}, Limit: &event.Limit{Inferred: true}},
		} {
			plain := text.Line(&e, false)
			if !printableASCII.MatchString(plain) {
				t.Errorf("not printable: %q", plain)
			}
			if color := text.Line(&e, true); sgr.ReplaceAllString(color, "") != plain {
				t.Errorf("color adds more than color:\n%q\n%q", plain, color)
			}
		}
		if got := text.Printable(s); printableASCII.MatchString(s) && got != s {
			t.Errorf("%q needs no change and becomes %q", s, got)
		}
	})
}

func FuzzJSON(f *testing.F) {
	for _, s := range []string{`{"a": [1, "\u001b", null]}`, "\"\u009b\U0001f4a5\xff\x7f\"", " \t\r\n1 ", "\"\\ud83d\xf0\x9f\""} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		var want any
		if json.Unmarshal(data, &want) != nil {
			return
		}
		got := text.JSON(data)
		if !utf8.Valid(got) || !printableASCII.Match(got) {
			t.Errorf("not printable: %q", got)
		}
		var back any
		if err := json.Unmarshal(got, &back); err != nil {
			t.Fatalf("%q: %v", got, err)
		}
		if diff := cmp.Diff(want, back); diff != "" {
			t.Errorf("%q is another value (-in +out):\n%s", got, diff)
		}
	})
}

// A gap's line has the columns of an event's; what is not known is said to be so.
func TestGapLine(t *testing.T) {
	at := time.Date(2026, 11, 23, 2, 3, 4, 5_600_000, time.UTC)
	since := at.Add(-time.Hour)
	gap := func(change func(*event.Gap)) event.Gap {
		g := event.Gap{Schema: event.Schema, ID: "id", Time: at, Node: event.Node{Name: "worker-1"}, Cause: event.GapWrapped, Since: &since, Until: &at}
		change(&g)
		return g
	}
	for _, tt := range []struct {
		gap  event.Gap
		want string
	}{
		{gap(func(g *event.Gap) { g.FirstSeq, g.LastSeq, g.Count = 17, 19, new(uint64(3)) }),
			"2026-11-23T02:03:04.005Z  worker-1  GAP              wrapped    3 kills missing, seq 17..19, from 2026-11-23T01:03:04.005Z to 2026-11-23T02:03:04.005Z"},
		{gap(func(g *event.Gap) { g.Cause, g.CountMax = event.GapUnseen, new(uint64(5)); g.Since = nil }),
			"2026-11-23T02:03:04.005Z  worker-1  GAP              unseen     at most 5 kills missing"},
		{gap(func(g *event.Gap) { g.Cause = event.GapReboot }),
			"2026-11-23T02:03:04.005Z  worker-1  GAP              reboot     an unknown number of kills missing, from 2026-11-23T01:03:04.005Z to 2026-11-23T02:03:04.005Z"},
		{gap(func(g *event.Gap) { g.Cause, g.Node.Name, g.Since = "a\x1b[2J", "n\n", nil }),
			`2026-11-23T02:03:04.005Z  n\n  GAP              a\x1b[2J   an unknown number of kills missing`},
	} {
		if got := text.GapLine(&tt.gap, false); got != tt.want {
			t.Errorf("got\n%s\nwant\n%s", got, tt.want)
		}
		if got := text.GapLine(&tt.gap, true); !strings.Contains(got, "\x1b[1;33mGAP") {
			t.Errorf("without color: %q", got)
		}
	}
}

func TestOutcomeLine(t *testing.T) {
	e := kill()
	o := event.Outcome{
		Time: e.Time, Kill: "boot-1-2", Node: "worker-1", Result: event.ResultAnnotated, Reason: event.ReasonMarked,
		Pod: &event.PodRef{Namespace: "shop", Name: "cart-0"}, Container: "cart",
	}
	failed := o
	failed.Result, failed.Reason, failed.Pod, failed.Detail = event.ResultFailed, event.ReasonMalformed, nil, "\x1b[31m"
	hostile := o
	hostile.Pod = &event.PodRef{Namespace: "a b", Name: "\n"}
	for _, tt := range []struct {
		e    *event.Event
		o    *event.Outcome
		want string
	}{
		{&e, &o, text.Line(&e, false) + "  annotated (marked) shop/cart-0 container cart"},
		{&e, nil, text.Line(&e, false) + "  no outcome"},
		{nil, &o, "2026-11-23T02:03:04.005Z  worker-1  kill boot-1-2  annotated (marked) shop/cart-0 container cart"},
		{nil, &failed, `2026-11-23T02:03:04.005Z  worker-1  kill boot-1-2  failed (malformed)  \x1b[31m`},
		{nil, &hostile, `2026-11-23T02:03:04.005Z  worker-1  kill boot-1-2  annotated (marked) a\x20b/\n container cart`},
	} {
		table := text.Table{}
		if got := table.OutcomeLine(tt.e, tt.o); got != tt.want {
			t.Errorf("got  %s\nwant %s", got, tt.want)
		}
	}
	table := text.Table{Color: true}
	if got := table.OutcomeLine(nil, &failed); !strings.Contains(got, "\x1b[1;31mfailed (malformed)\x1b[0m") {
		t.Errorf("%q", got)
	}
}
