package report

import (
	"bytes"
	c "cmp"
	"fmt"
	"html"
	"os"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/advice"
)

var (
	until = time.Date(2026, 11, 28, 12, 0, 0, 0, time.UTC)
	from  = until.Add(-24 * time.Hour)
)

const boot = "1dd8105d-ffb3-46fb-940b-dc17365768a7"

// fake is a stream.
type fake struct {
	r    *Report
	n    int
	rows map[string]*Workload
}

func newFake(o Options) *fake {
	if o.From.IsZero() {
		o.From, o.Until = from, until
	}
	o.Made = until
	return &fake{r: New(o), rows: map[string]*Workload{}}
}

// kill adds a kill at a limit of a container, changed by each, and its outcome.
func (f *fake) kill(at time.Time, node, namespace, owner string, each func(*event.Event, *event.Outcome)) (*event.Event, *event.Outcome) {
	f.n++
	limit := uint64(512 << 20)
	pid := uint32(4000 + f.n)
	e := &event.Event{
		Schema: event.Schema, ID: event.VictimID(boot, pid, 1), Seq: uint64(f.n), Time: at, BoottimeNS: 3600e9, Node: event.Node{Name: node, BootID: boot, Tier: "fentry"},
		Scope: event.ScopeCgroup, Outcome: event.OutcomeKilled,
		Victim: event.Victim{PID: pid, TID: pid, NSPID: 1, Comm: "java", OOMScoreAdj: new(int16(968)), StartBoottimeNS: 1800e9,
			Cgroup: &event.Cgroup{Path: fmt.Sprintf("/kubepods.slice/pod%d.slice/c.scope", f.n)}, Memory: &event.Memory{AnonRSS: 490 << 20, FileRSS: 3 << 20, TotalVM: 2 << 30, PgTables: 1 << 20}},
		Trigger:   &event.Trigger{PID: pid, TID: pid, Comm: "java"},
		Limit:     &event.Limit{Cgroup: &event.Cgroup{Path: fmt.Sprintf("/kubepods.slice/pod%d.slice/c.scope", f.n)}, Level: event.LevelContainer, Max: &limit, Usage: &limit},
		Incident:  &event.Incident{ID: event.IncidentID(boot, uint64(f.n))},
		Container: &event.Container{PodUID: fmt.Sprintf("0f1e2d3c-0000-0000-0000-%012d", f.n), ContainerID: fmt.Sprintf("%064x", f.n), QoS: "burstable"},
	}
	pod := strings.ToLower(owner[strings.Index(owner, "/")+1:]) + "-5d4f7c9b8-x" + fmt.Sprint(f.n)
	o := &event.Outcome{
		Schema: event.Schema, ID: event.OutcomeID(e.ID, event.StageAnnotate), Kill: e.ID, Stage: event.StageAnnotate, Time: at.Add(80 * time.Millisecond),
		Result: event.ResultSkipped, Reason: event.ReasonLevel, Node: node, Container: "main",
		Pod: &event.PodRef{Namespace: namespace, Name: pod, UID: e.Container.PodUID, Owner: owner},
	}
	if each != nil {
		each(e, o)
	}
	name := "(no pod)"
	if e.Container == nil {
		o = nil
	} else if o.Pod != nil {
		name = o.Pod.Namespace + "/" + o.Pod.Owner
	}
	f.r.Kill(name, e, o)
	w := f.rows[name]
	if w == nil {
		w = &Workload{Name: name, Level: event.LevelContainer, Limit: &limit, Victim: e.Victim.Comm, Largest: 493 << 20}
		f.rows[name] = w
	}
	w.Kills++
	w.Last = at
	return e, o
}

func (f *fake) close(o *event.Outcome, after time.Duration, result event.Result, reason event.Reason) {
	end := *o
	end.ID, end.Stage, end.Time, end.Result, end.Reason, end.Detail = event.OutcomeID(o.Kill, event.StageClose), event.StageClose, o.Time.Add(after), result, reason, ""
	f.r.Outcome(&end)
}

func (f *fake) usage(e *event.Event, pods bool) {
	n := &event.Neighbours{
		Schema: event.Schema, ID: event.NeighboursID(e.Incident.ID), Incident: e.Incident.ID, Kill: e.ID, Time: e.Time, Node: e.Node, Scope: e.Scope,
		Breakdown: &event.Breakdown{
			Source: event.SourceStat, Limit: e.Limit, AfterNS: 11_000_000, Usage: new(uint64(505 << 20)), Anon: new(uint64(300 << 20)), File: new(uint64(190 << 20)), Shmem: new(uint64(170 << 20)),
			Slab: new(uint64(9 << 20)), SlabUnreclaimable: new(uint64(6 << 20)), KernelStack: new(uint64(1 << 20)), PageTables: new(uint64(2 << 20)),
			Processes: []event.Process{{PID: e.Victim.PID, Comm: e.Victim.Comm, RSS: 493 << 20, Victim: true}, {PID: 77, Comm: "sidecar", RSS: 9 << 20}}, ProcessesSeen: new(uint32(7)),
		},
	}
	if pods {
		n.Breakdown.Source, n.Breakdown.Limit = event.SourceMeminfo, nil
		n.Breakdown.Total, n.Breakdown.Usage, n.Breakdown.Anon = new(uint64(4<<30)), new(uint64(3900<<20)), new(uint64(3100<<20))
		n.Pods = []event.PodMemory{{PodUID: e.Container.PodUID, Usage: 1 << 30, Victim: true}, {PodUID: "abc", Usage: 2 << 30}}
	}
	f.r.Neighbours(n)
}

func (f *fake) node(name string, state string) {
	f.r.Node(Node{Name: name, Since: from.Add(-48 * time.Hour), Heard: until.Add(-time.Minute), State: state, Watched: state == "watched"})
}

func (f *fake) write(t testing.TB, s Stream) string {
	t.Helper()
	var top []Workload
	for _, w := range f.rows {
		w := *w
		w.Trend = "rising"
		if w.Advice.Rule == "" {
			w.Advice = advice.Advice{Rule: advice.LimitTooSmall, Clause: "raise the limit to 640Mi", Sentence: "container main has reached its own limit of 512.0 MiB 9 times, 30 s after its start: raise the limit to 640Mi (20% or 100 MiB more, as VPA does after an OOM kill), and look again"}
		}
		top = append(top, w)
	}
	// As oom-tap top has them.
	slices.SortFunc(top, func(a, b Workload) int { return c.Or(c.Compare(b.Kills, a.Kills), c.Compare(a.Name, b.Name)) })
	var out strings.Builder
	if err := f.r.Write(&out, s, top); err != nil {
		t.Fatal(err)
	}
	return out.String()
}

// day is a day of a small cluster: a leak, a node that ran out of memory, a group kill, a gap, a node that is not watched.
func day(t testing.TB) string {
	f := newFake(Options{})
	at := from.Add(90 * time.Minute)
	for n := range 9 {
		e, _ := f.kill(at.Add(time.Duration(n)*97*time.Minute), "worker-2.example.com", "shop", "Deployment/cart", nil)
		f.usage(e, false)
	}
	var oom []*event.Outcome
	night := from.Add(14*time.Hour + 3*time.Minute)
	for n, of := range []struct{ ns, owner, comm string }{{"search", "StatefulSet/index", "java"}, {"search", "StatefulSet/index", "java"}, {"jobs", "Job/import", "python3"}, {"shop", "Deployment/web", "node"}} {
		e, o := f.kill(night.Add(time.Duration(n)*1300*time.Millisecond), "worker-1.example.com", of.ns, of.owner, func(e *event.Event, o *event.Outcome) {
			e.Scope, e.Victim.Comm, e.Trigger = event.ScopeGlobal, of.comm, &event.Trigger{PID: 99, TID: 99, Comm: "kubelet"}
			e.Limit = &event.Limit{Level: event.LevelNode}
			o.Result, o.Reason, o.Annotation = event.ResultAnnotated, event.ReasonMarked, "oom-tracer.alpha.kubernetes.io/evict-me=true"
			if n == 2 {
				o.Result, o.Reason, o.Detail = event.ResultSkipped, event.ReasonBudget, "node: 2 of 2"
			}
		})
		if n == 0 {
			f.usage(e, true)
			held := *o
			held.Stage, held.Detail = event.StageNeighbours, "other pods then used: jobs/import-7x2kq 2.1 GiB (no request), monitoring/prometheus-0 900.0 MiB (request 512.0 MiB)"
			f.r.Outcome(&held)
		}
		oom = append(oom, o)
	}
	f.close(oom[0], 2*time.Minute, event.ResultEvicted, event.ReasonEvicted)
	f.close(oom[1], 30*time.Minute, event.ResultExpired, event.ReasonLifetime)
	group := from.Add(18 * time.Hour)
	for n := range 25 {
		f.kill(group.Add(time.Duration(n)*time.Millisecond), "worker-2.example.com", "batch", "CronJob/report", func(e *event.Event, _ *event.Outcome) {
			e.Limit.Cgroup = &event.Cgroup{Path: "/kubepods.slice/pod-group.slice"}
			e.Incident = &event.Incident{ID: event.IncidentID(boot, 9_000_000), Group: true, Index: uint32(n)}
			e.Container.PodUID, e.Container.ContainerID, e.Victim.Comm = "g", strings.Repeat("a", 64), "postgres"
		})
	}
	f.kill(from.Add(20*time.Hour), "edge-1", "", "", func(e *event.Event, o *event.Outcome) {
		e.Container, e.Trigger, e.Limit = nil, nil, &event.Limit{Level: event.LevelOther, Max: new(uint64(64 << 20)), Inferred: true}
		e.Victim.Comm, e.Victim.Cgroup = "backup", &event.Cgroup{Path: "/system.slice/backup.service"}
	})
	for _, n := range []string{"worker-1.example.com", "worker-2.example.com", "worker-3.example.com", "edge-1"} {
		f.node(n, "watched")
	}
	f.r.Node(Node{Name: "worker-4.example.com", Since: from.Add(-time.Hour), Heard: from.Add(9 * time.Hour), State: "QUIET"})
	f.r.Node(Node{Name: "worker-5.example.com", Since: from.Add(7 * time.Hour), Heard: until, State: "watched", Watched: true})
	f.r.Gap(&event.Gap{ID: "g", Time: from.Add(7 * time.Hour), Node: event.Node{Name: "worker-5.example.com"}, Cause: event.GapReboot, Since: new(from.Add(5 * time.Hour)), Until: new(from.Add(7 * time.Hour))}, from.Add(7*time.Hour))
	f.r.Gap(&event.Gap{ID: "g2", Time: from.Add(11 * time.Hour), Node: event.Node{Name: "edge-1"}, Cause: event.GapWrapped, Count: new(uint64(17)), Since: new(from.Add(10*time.Hour + 50*time.Minute)), Until: new(from.Add(11 * time.Hour))}, from.Add(11*time.Hour))
	return f.write(t, Stream{Messages: 83})
}

// hostile is a report in which every string that a message can have is this one.
func hostile(t testing.TB, s string) string {
	f := newFake(Options{Namespace: s, Node: s, Incident: s})
	e, o := f.kill(from.Add(time.Hour), s, s, s+"/"+s, func(e *event.Event, o *event.Outcome) {
		e.ID, e.Node, e.Scope, e.Victim.Comm = s, event.Node{Name: s, BootID: s, Kernel: s, Tier: s}, event.ScopeCgroup, s
		e.Victim.Cgroup = &event.Cgroup{Path: s}
		e.Trigger = &event.Trigger{PID: 1, Comm: s}
		e.Limit.Level, e.Limit.Cgroup = event.LimitLevel(s), &event.Cgroup{Path: s}
		e.Incident.ID = s
		e.Container = &event.Container{PodUID: s, ContainerID: s, QoS: s, Runtime: s}
		o.Kill, o.Node, o.Detail, o.Container, o.Annotation, o.Result, o.Reason = s, s, s, s, s, event.Result(s), event.Reason(s)
		o.Pod = &event.PodRef{Namespace: s, Name: s, UID: s, Owner: s}
	})
	f.usage(e, true)
	// Without an outcome, and of another scope.
	other := *e
	other.ID, other.Scope, other.Incident = "2", event.Scope(s), &event.Incident{ID: "2"}
	f.r.Kill(s, &other, nil)
	f.r.Neighbours(&event.Neighbours{Incident: "2", Kill: "2", Time: e.Time, Node: e.Node, Breakdown: &event.Breakdown{
		Source: event.Source(s), Limit: e.Limit, Processes: []event.Process{{PID: 1, Comm: s}}}, Pods: []event.PodMemory{{PodUID: s, QoS: s}}})
	held := *o
	held.Stage = event.StageNeighbours
	f.r.Outcome(&held)
	end := *o
	end.Stage = event.StageClose
	f.r.Outcome(&end)
	f.r.Node(Node{Name: s, State: s, Since: from, Heard: from.Add(time.Hour)})
	f.r.Gap(&event.Gap{ID: s, Time: until, Node: event.Node{Name: s}, Cause: event.GapCause(s)}, until)
	for _, w := range f.rows {
		w.Level, w.Victim, w.Advice = event.LimitLevel(s), s, advice.Advice{Rule: advice.Leak, Clause: s, Sentence: s}
	}
	return f.write(t, Stream{})
}

// fixture reads a message that package event has recorded.
func fixture[T any](t *testing.T, name string, parse func([]byte) (T, error)) *T {
	t.Helper()
	data, err := os.ReadFile("../../event/testdata/" + name)
	if err != nil {
		t.Fatal(err)
	}
	v, err := parse(data)
	if err != nil {
		t.Fatal(err)
	}
	return &v
}

// shows checks that a page has these texts, in this order.
func shows(t *testing.T, page string, texts ...string) {
	t.Helper()
	page = html.UnescapeString(page)
	at := 0
	for _, text := range texts {
		n := strings.Index(page[at:], text)
		if n < 0 {
			t.Fatalf("no %q after what is before it, in\n%.3000s", text, page[max(at, strings.Index(page, "<body>")):])
		}
		at += n + len(text)
	}
}

// TestStory: the recorded messages of one kill make its story.
func TestStory(t *testing.T) {
	e, o := fixture(t, "full.json", event.Parse), fixture(t, "outcome-full.json", event.ParseOutcome)
	n := fixture(t, "neighbours-full.json", event.ParseNeighbours)
	for _, usageFirst := range []bool{false, true} {
		r := New(Options{From: e.Time.Add(-time.Hour), Until: e.Time.Add(time.Hour), Made: e.Time.Add(2 * time.Hour)})
		if usageFirst {
			r.Neighbours(n)
		}
		r.Kill("shop/StatefulSet/cart", e, o)
		if !usageFirst {
			r.Neighbours(n)
		}
		end := *o
		end.Stage, end.Time, end.Result, end.Reason, end.Detail = event.StageClose, o.Time.Add(time.Minute), event.ResultEvicted, event.ReasonEvicted, ""
		r.Outcome(&end)
		var out strings.Builder
		top := []Workload{{Name: "shop/StatefulSet/cart", Kills: 1, Last: e.Time, Advice: advice.Advice{Rule: advice.Leak, Clause: "leak: find it", Sentence: "find the leak"}}}
		if err := r.Write(&out, Stream{Messages: 4}, top); err != nil {
			t.Fatal(err)
		}
		shows(t, out.String(),
			"In these 2h the stream has 1 OOM kill in 1 incident, on 1 of 1 node and in 1 namespace.",
			"In 1 the node, or several of its pods together, ran out of memory.",
			"1 kill led to a mark for eviction: 1 left its node.",
			"On 1 of 1 node kills may be missing (worker-1.example.com): silence proves nothing there.",
			`href="#incident-1"`, "shop/StatefulSet/cart", "Find the leak.",
			`<a href="#incident-1">2026-11-23 02:03:04</a>`, "1 process, evicted",
			`<article id="incident-1">`,
			"OOM killer killed java[4242] (rss 1.0 GiB) in container cart (4 restarts) of pod shop/cart-0: all pods together reached their memory limit of 16.0 GiB (inferred), usage 16.0 GiB.",
			"memory.oom.group",
			"dd[99], and not the victim.",
			"Kubepods level, 16.0 GiB, of which 16.0 GiB were used, cgroup /kubepods.slice (inferred: the kernel did not name the owner).",
			"Of the limit of 16.0 GiB: 8 B network buffers, 7 B page tables",
			"2ms after the kill, of the limit of 16.0 GiB, 500.0 MiB were used. The cgroup was removed before all of it was read.",
			"The largest processes then: java[71] 1.0 MiB (a victim), ?[72] 4.0 KiB (of 12).",
			"Of the pods then used: the pod with the UID 5b1a7a5e-1c1d-4b6f-8a55-2b7f0c9d1e2f 3.0 GiB of 4.0 GiB (a victim)",
			"02:03:04.005  java[4242], rss 1.0 GiB (anon 1.0 GiB, file 2.0 MiB, shared 3.0 MiB), swap 4.0 MiB, in container cart (4 restarts) of pod shop/cart-0, oom_score_adj 0",
			"02:03:05.000 shop/cart-0: marked for eviction", "02:04:05.000 shop/cart-0: evicted, through the API",
			`<a href="#workload-1">shop/StatefulSet/cart</a>: Leak: find it.`,
			"4 messages read.", "The stream has the whole range.",
		)
	}
}

// TestBareStory: what is not known is said.
func TestBareStory(t *testing.T) {
	e := fixture(t, "bare.json", event.Parse)
	r := New(Options{From: e.Time.Add(-time.Hour), Until: e.Time.Add(time.Hour)})
	r.Kill("(no pod)", e, nil)
	var out strings.Builder
	if err := r.Write(&out, Stream{}, nil); err != nil {
		t.Fatal(err)
	}
	shows(t, out.String(), "In 1 something else, or something that is not proven, was the cause.", "cause unknown", "a place that is not known: the cause is unknown",
		"Not known: the kernel's hooks did not show it.", "Not known.", "Not known: nothing was read after the kill.", "Of 1 kill no outcome is known")
}

// TestSilence: silence is proven only where the node was watched all the time, without a gap.
func TestSilence(t *testing.T) {
	watched := func() *Node {
		return &Node{Name: "n", Since: from.Add(-time.Hour), Heard: until.Add(-time.Minute), State: "watched", Watched: true}
	}
	for _, tt := range []struct {
		name    string
		node    func(*Node) *Node
		gap     *event.Gap
		stream  Stream
		kills   int
		options Options
		want    string
		proven  bool
	}{
		{name: "watched", want: "Watched all the time, no gap: nothing was killed", proven: true},
		{name: "with kills", kills: 1, want: "Watched all the time, no gap", proven: true},
		{name: "of a namespace", options: Options{Namespace: "shop"}, want: "Watched all the time, no gap: no kill in this namespace is known", proven: true},
		{name: "quiet", node: func(n *Node) *Node { n.Watched, n.State = false, "QUIET"; return n }, want: "Silent, which proves nothing: QUIET, last heard at 2026-11-28 11:59:00"},
		{name: "quiet later", node: func(n *Node) *Node { n.Watched, n.State, n.Heard = false, "QUIET", until.Add(time.Minute); return n }, want: "Watched all the time, no gap: nothing was killed", proven: true},
		{name: "began later", node: func(n *Node) *Node { n.Since = from.Add(time.Hour); return n }, kills: 1, want: "Kills may be missing: recording began at 2026-11-27 13:00:00"},
		{name: "not published", node: func(n *Node) *Node { n.Unpublished = 2; return n }, want: "Silent, which proves nothing: 2 records not published yet"},
		{name: "no status", node: func(*Node) *Node { return nil }, want: "Silent, which proves nothing: 1 gap; no status of it is known", gap: &event.Gap{Time: until}},
		{name: "gap", gap: &event.Gap{Time: until, Since: &from}, want: "Silent, which proves nothing: 1 gap"},
		{name: "gap by a clock that is behind", gap: &event.Gap{Time: from.Add(-time.Minute)}, want: "Silent, which proves nothing: 1 gap"},
		{name: "gap after", gap: &event.Gap{Time: until.Add(time.Hour), Since: new(until.Add(time.Minute))}, want: "Watched all the time, no gap: nothing was killed", proven: true},
		{name: "not in the stream", stream: Stream{Begin: from.Add(time.Hour)}, want: "Silent, which proves nothing: not in the stream any more before 2026-11-27 13:00:00"},
		{name: "older is not in the stream", stream: Stream{Begin: from.Add(-time.Hour)}, want: "Watched all the time, no gap: nothing was killed", proven: true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFake(tt.options)
			node := watched()
			if tt.node != nil {
				node = tt.node(node)
			}
			if node != nil {
				f.r.Node(*node)
			}
			if tt.gap != nil {
				tt.gap.Node.Name = "n"
				f.r.Gap(tt.gap, tt.gap.Time)
			}
			for range tt.kills {
				f.kill(until.Add(-time.Hour), "n", "shop", "Job/x", nil)
			}
			page := f.write(t, tt.stream)
			shows(t, page, tt.want+".<")
			if proven := strings.Contains(page, "was watched all the time, without a gap."); proven != tt.proven {
				t.Errorf("proven %v, want %v", proven, tt.proven)
			}
			if unknown := strings.Contains(page, `<rect class="unknown" x="0" y=".5"`) || strings.Contains(page, `<rect class="unknown" x="99`) || strings.Contains(page, `<rect class="gap" x="0" `); unknown == tt.proven && tt.name != "not published" {
				t.Errorf("the timeline shows what is not known: %v", unknown)
			}
		})
	}
}

// TestTogether: which kills are one incident.
func TestTogether(t *testing.T) {
	at := from.Add(time.Hour)
	global := func(e *event.Event, _ *event.Outcome) {
		e.Scope, e.Limit = event.ScopeGlobal, &event.Limit{Level: event.LevelNode}
	}
	limit := func(path string) func(*event.Event, *event.Outcome) {
		return func(e *event.Event, _ *event.Outcome) { e.Limit.Cgroup = &event.Cgroup{Path: path} }
	}
	group := func(e *event.Event, _ *event.Outcome) { e.Incident = &event.Incident{ID: "group", Group: true} }
	type k struct {
		at   time.Duration
		node string
		each func(*event.Event, *event.Outcome)
	}
	for _, tt := range []struct {
		name  string
		kills []k
		want  int
	}{
		{"the node within seconds", []k{{0, "a", global}, {20 * time.Second, "a", global}, {40 * time.Second, "a", global}}, 1},
		{"the node, a minute later", []k{{0, "a", global}, {time.Minute, "a", global}}, 2},
		{"two nodes", []k{{0, "a", global}, {0, "b", global}}, 2},
		{"one limit", []k{{0, "a", limit("/x")}, {time.Second, "a", limit("/x")}}, 1},
		{"two limits", []k{{0, "a", limit("/x")}, {0, "a", limit("/y")}}, 2},
		{"a limit and the node", []k{{0, "a", limit("/x")}, {0, "a", global}}, 2},
		{"one decision, however long", []k{{0, "a", group}, {time.Hour, "a", group}}, 1},
		{"an older kill comes later", []k{{0, "a", global}, {time.Hour, "a", global}, {10 * time.Second, "a", global}}, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			f := newFake(Options{})
			for _, k := range tt.kills {
				f.kill(at.Add(k.at), k.node, "shop", "Job/x", k.each)
			}
			if got := strings.Count(f.write(t, Stream{}), "<article "); got != tt.want {
				t.Errorf("%d incidents, want %d", got, tt.want)
			}
		})
	}
}

// TestBounded: of very many incidents the largest have a story, the others are counted, and little is kept.
func TestBounded(t *testing.T) {
	f := newFake(Options{})
	big := from.Add(time.Minute)
	for range 3_000 {
		f.kill(big, "big", "shop", "Job/big", func(e *event.Event, _ *event.Outcome) { e.Scope, e.Limit = event.ScopeGlobal, nil })
	}
	const single = 20_000
	for n := range single {
		f.kill(from.Add(time.Duration(n)*4*time.Second), fmt.Sprintf("node-%d", n%12_000), fmt.Sprintf("team-%d", n%11_000), fmt.Sprintf("Job/j-%d", n), nil)
	}
	if n := len(f.r.incidents); n > maxKept+1 || len(f.r.byKill) > 2*maxKept || len(f.r.decisions) > 2*maxKept || len(f.r.open) > maxKept+1 || len(f.r.nodes) > maxNames+1 || len(f.r.workloads) > maxNames+1 {
		t.Errorf("%d incidents are kept", n)
	}
	page := f.write(t, Stream{})
	if n := strings.Count(page, "<article "); n != maxIncidents {
		t.Errorf("%d stories, want %d", n, maxIncidents)
	}
	if len(page) > 3<<20 {
		t.Errorf("%d bytes", len(page))
	}
	shows(t, page, "In these 24h the stream has 23000 OOM kills in 20001 incidents", "And 9971 more nodes with kills.", "more namespaces.",
		"19501 incidents with 19501 kills more are counted above and have no story: these 500 have the most kills.", `id="incident-1"`, "big", "And 2990 more.")
}

// TestInjection: whatever a name is, the page has the same elements and attributes.
func TestInjection(t *testing.T) {
	tag := regexp.MustCompile(`<[^<>]*>`)
	value := regexp.MustCompile(`"[^"]*"`)
	shape := func(page string) string {
		tags := tag.FindAllString(page, -1)
		for i := range tags {
			tags[i] = value.ReplaceAllStringFunc(tags[i], func(v string) string {
				if strings.HasPrefix(v, `"#`) {
					return v
				}
				return `""`
			})
		}
		return strings.Join(tags, "\n")
	}
	want := shape(hostile(t, "x"))
	for _, s := range []string{
		`</svg><script>alert(1)</script>`, `</title></svg><script>alert(1)</script>`, `" onload="alert(1)`, `' onload='alert(1)`, `</style><script>`, `--><script>`, `]]><script>`,
		`javascript:alert(1)`, `{{.}}`, `&lt;script&gt;`, "\x00\x1b[31m\u202e\u2028", "`${alert(1)}`", `}</style><img src=x onerror=alert(1)>`,
	} {
		page := hostile(t, s)
		if diff := cmp.Diff(want, shape(page)); diff != "" {
			t.Errorf("%q (-x +hostile):\n%s", s, diff)
		}
		for _, r := range page {
			if r > 0x7e || r < 0x20 && r != '\n' {
				t.Fatalf("%q: the page has the character %U", s, r)
			}
		}
	}
}

// Whatever the messages of a stream say, the report is written, and nothing of them becomes an element of the page.
func FuzzWrite(f *testing.F) {
	var all []byte
	for _, name := range []string{"full", "bare", "outcome-full", "outcome-bare", "neighbours-full", "neighbours-bare", "gap-full", "gap-bare"} {
		data, err := os.ReadFile("../../event/testdata/" + name + ".json")
		if err != nil {
			f.Fatal(err)
		}
		all = append(append(all, bytes.ReplaceAll(data, []byte("\n"), nil)...), '\n')
	}
	f.Add(all)
	f.Add(bytes.ReplaceAll(all, []byte("cart"), []byte("<script>")))
	f.Fuzz(func(t *testing.T, messages []byte) {
		from := time.Date(2026, 11, 23, 2, 0, 0, 0, time.UTC)
		r := New(Options{From: from, Until: from.Add(time.Hour), Made: from.Add(2 * time.Hour)})
		for data := range bytes.Lines(messages) {
			if e, err := event.Parse(data); err == nil {
				r.Kill("shop/StatefulSet/"+e.Victim.Comm, &e, nil)
			}
			if o, err := event.ParseOutcome(data); err == nil {
				r.Outcome(&o)
			}
			if n, err := event.ParseNeighbours(data); err == nil {
				r.Neighbours(&n)
			}
			if g, err := event.ParseGap(data); err == nil {
				r.Gap(&g, from)
			}
		}
		var out strings.Builder
		if err := r.Write(&out, Stream{}, nil); err != nil {
			t.Fatal(err)
		}
		if page := out.String(); strings.Contains(page, "<script") || !strings.HasSuffix(strings.TrimSpace(page), "</html>") {
			t.Error(page)
		}
	})
}
