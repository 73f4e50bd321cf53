package report

import (
	"fmt"
	"strings"
	"testing"
	"time"

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
	for i := range top {
		for j := range top[i:] {
			if a, b := top[i], top[i+j]; b.Kills > a.Kills || b.Kills == a.Kills && b.Name < a.Name {
				top[i], top[i+j] = b, a
			}
		}
	}
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
	f.r.Gap(&event.Gap{ID: "g", Time: from.Add(7 * time.Hour), Node: event.Node{Name: "worker-5.example.com"}, Cause: event.GapReboot, Since: new(from.Add(5 * time.Hour)), Until: new(from.Add(7 * time.Hour))})
	f.r.Gap(&event.Gap{ID: "g2", Time: from.Add(11 * time.Hour), Node: event.Node{Name: "edge-1"}, Cause: event.GapWrapped, Count: new(uint64(17)), Since: new(from.Add(10*time.Hour + 50*time.Minute)), Until: new(from.Add(11 * time.Hour))})
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
	f.r.Gap(&event.Gap{ID: s, Time: until, Node: event.Node{Name: s}, Cause: event.GapCause(s)})
	for _, w := range f.rows {
		w.Level, w.Victim, w.Advice = event.LimitLevel(s), s, advice.Advice{Rule: advice.Leak, Clause: s, Sentence: s}
	}
	return f.write(t, Stream{})
}
