package agent

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const (
	victimPod   = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
	offenderPod = "1f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
)

// neighboursStored reads what the stream holds until there is one more than before.
func neighboursStored(t *testing.T, cfg config.Config, want int) (all []event.Neighbours) {
	t.Helper()
	conn := connect(t, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	enough := errors.New("enough")
	err := bus.Tail(ctx, conn, bus.TailOptions{Subjects: []string{"oom.v1.neighbours.>"}, Since: time.Unix(0, 0), Follow: true}, func(m bus.Stored) error {
		n, err := event.ParseNeighbours(m.Data)
		if err != nil {
			return err
		}
		if subject, err := n.Subject(); err != nil || subject != m.Subject || n.ID != m.ID {
			t.Errorf("%s (%v) on %s, id %s", subject, err, m.Subject, m.ID)
		}
		if all = append(all, n); len(all) == want {
			return enough
		}
		return nil
	})
	if !errors.Is(err, enough) {
		t.Fatalf("%d are stored, want %d: %v", len(all), want, err)
	}
	return all
}

// TestNeighbours: all pods together are out of memory, and the one that has it all is not the one that is killed.
func TestNeighbours(t *testing.T) {
	root := oomtest.New(t, 512*mib)
	kubepods := oomtest.Child(t, root, "kubepods", 64*mib)
	burstable := oomtest.Child(t, kubepods, "burstable", cgroupfs.Unlimited)
	container := func(pod string, limit uint64) *cgroupfs.Cgroup {
		return oomtest.Child(t, oomtest.Child(t, burstable, "pod"+pod, limit), strings.Repeat("a", 64), cgroupfs.Unlimited)
	}
	victim, offender := container(victimPod, cgroupfs.Unlimited), container(offenderPod, 128*mib)
	own := container("2f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0", 8*mib)
	for range 4 { // each of them smaller than the one that is to be killed
		oomtest.Hold(t, offender, 10)
	}
	cfg := testConfig(t)
	cfg.Node.CgroupRoot = root.Path()
	tr, _ := runTracer(t, cfg, io.Discard)
	count := func(result string) int {
		return int(testutil.ToFloat64(tr.metrics.neighbours.WithLabelValues(result)))
	}

	// At a pod's own limit the other pods are not read.
	if killed := oomtest.Storm(t, own, 1, 16, "plain"); len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	stored(t, cfg, own, 1)
	if n := neighboursStored(t, cfg, 1)[0]; n.Pods != nil || n.PodsSeen != nil || n.Breakdown == nil {
		t.Errorf("at a pod's own limit: %+v", n)
	}
	began := time.Now()
	if killed := oomtest.Storm(t, victim, 1, 64, "plain"); len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	e := stored(t, cfg, victim, 1)[0]
	n := neighboursStored(t, cfg, 2)[1]
	if n.Kill != e.ID || n.Incident != e.Incident.ID || n.Scope != event.ScopeCgroup || n.Level != event.LevelKubepods || n.Node.Name != testNode ||
		n.PodsSeen == nil || *n.PodsSeen != 3 || len(n.Pods) != 3 || n.Incomplete || n.ReadNS == 0 || n.Time.Before(e.Time) {
		t.Errorf("neighbours %+v of %s", n, e.ID)
	}
	if p := n.Pods[0]; p.PodUID != offenderPod || p.Victim || p.Usage < 40*mib || p.Usage > 64*mib || p.QoS != "burstable" || p.Max == nil || *p.Max != 128*mib ||
		p.WorkingSet == nil || *p.WorkingSet < 40*mib {
		t.Errorf("the largest is %+v", p)
	}
	for _, p := range n.Pods[1:] {
		if p.PodUID == victimPod && p.Max != nil {
			t.Errorf("the victim's pod has no limit: %+v", p)
		}
		if p.Victim != (p.PodUID == victimPod) {
			t.Errorf("pod %+v, the victim is in %s", p, victimPod)
		}
	}
	b := n.Breakdown
	if b == nil || b.Limit.Level != event.LevelKubepods || b.Gone || b.Usage == nil || *b.Usage < 40*mib || b.ProcessesSeen == nil || *b.ProcessesSeen < 4 ||
		len(b.Processes) < 4 || b.Processes[3].Comm != "hog" || b.Processes[3].RSS < 10*mib {
		t.Errorf("breakdown %+v", b)
	}
	until(t, "it is counted", func() bool { return count("read") == 2 && count("skipped") == 0 && count("failed") == 0 })

	// In a storm the pods are read now and then.
	const storm = 30
	if killed := oomtest.Storm(t, victim, storm, 64, "plain"); len(killed) != storm {
		t.Fatalf("%d were killed", len(killed))
	}
	stored(t, cfg, victim, 1+storm)
	until(t, "all are counted", func() bool { return count("read")+count("skipped")+count("failed") == 2+storm })
	if most := 2 + int(time.Since(began)/readPause); count("read") > most || count("failed") > 0 {
		t.Errorf("read %d times in %s, want at most %d; %d failed", count("read"), time.Since(began), most, count("failed"))
	}
}

// TestBreakdown: at a pod's own limit it is known what the memory was used for.
func TestBreakdown(t *testing.T) {
	root := oomtest.New(t, 512*mib)
	burstable := oomtest.Child(t, oomtest.Child(t, root, "kubepods", cgroupfs.Unlimited), "burstable", cgroupfs.Unlimited)
	pod := func(uid string) (limit, container *cgroupfs.Cgroup) {
		limit = oomtest.Child(t, burstable, "pod"+uid, 64*mib)
		return limit, oomtest.Child(t, limit, strings.Repeat("a", 64), cgroupfs.Unlimited)
	}
	anonLimit, anon := pod(victimPod)
	tmpfsLimit, tmpfs := pod(offenderPod)
	_, short := pod("2f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0")
	holder := oomtest.Hold(t, anon, 20)
	cfg := testConfig(t)
	cfg.Node.CgroupRoot = root.Path()
	tr, stop := runTracer(t, cfg, io.Discard)

	if killed := oomtest.Storm(t, anon, 1, 100, "plain"); len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	e := stored(t, cfg, anon, 1)[0]
	n := neighboursStored(t, cfg, 1)[0]
	checkBreakdown(t, &n, &e, anonLimit)
	b := n.Breakdown
	if within := func(n *uint64, least, most uint64) bool { return n != nil && *n >= least && *n <= most }; !within(b.Anon, 20*mib, 65*mib) || !within(b.Shmem, 0, 1*mib) ||
		!within(b.Usage, 20*mib, 64*mib) {
		t.Errorf("anonymous memory: %+v", b)
	}
	held := slices.IndexFunc(b.Processes, func(p event.Process) bool { return p.PID == uint32(holder.Pid) })
	if held < 0 || b.Processes[held].Victim || b.Processes[held].RSS < 20*mib || b.Processes[held].Comm != "hog" || *b.Processes[held].OOMScoreAdj != 0 {
		t.Errorf("processes %+v, want %d among them", b.Processes, holder.Pid)
	}
	for _, p := range b.Processes {
		if p.Victim != (p.PID == e.Victim.PID) {
			t.Errorf("process %+v, the victim is %d", p, e.Victim.PID)
		}
	}

	if !oomtest.FillTmpfs(t, tmpfs, 100) {
		t.Fatal("it was not killed")
	}
	e = stored(t, cfg, tmpfs, 1)[0]
	n = neighboursStored(t, cfg, 2)[1]
	checkBreakdown(t, &n, &e, tmpfsLimit)
	if b := n.Breakdown; b.Shmem == nil || *b.Shmem < 55*mib || *b.Shmem > 64*mib || b.File == nil || *b.File < *b.Shmem || b.Anon == nil || *b.Anon > 5*mib {
		t.Errorf("tmpfs: %+v", b)
	}
	if got := text.LargePart(n.Breakdown); !strings.HasPrefix(got, "of 64.0 MiB, ") || !strings.HasSuffix(got, " MiB were tmpfs or shared memory") {
		t.Errorf("%q", got)
	}
	var table text.Table
	t.Log(table.Line(&e))
	t.Log(table.NeighboursLine(&n))

	// One that is removed before it is read.
	if killed := oomtest.Storm(t, short, 1, 100, "plain"); len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	e = stored(t, cfg, short, 1)[0]
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	if err := short.Remove(); err != nil {
		t.Fatal(err)
	}
	gone := *e.Limit
	gone.Cgroup = e.Victim.Cgroup
	e.Limit, e.Time = &gone, time.Now()
	l := newNeighbourReader(cfg.Node, tr.metrics.neighbours, slog.New(slog.DiscardHandler))
	l.observe(&e)
	l.observe(&e)
	ctx, cancel := context.WithCancel(t.Context())
	var published []*event.Neighbours
	l.run(ctx, func(n *event.Neighbours) error {
		published = append(published, n)
		cancel()
		return nil
	})
	if len(published) != 1 || published[0].Breakdown == nil {
		t.Fatalf("of a removed cgroup: %+v", published)
	}
	b = published[0].Breakdown
	b.NodePressure, b.AfterNS = nil, 0
	if diff := cmp.Diff(&event.Breakdown{Source: event.SourceStat, Limit: &gone, Gone: true}, b); diff != "" {
		t.Errorf("of a removed cgroup (-want +got):\n%s", diff)
	}
}

// checkBreakdown checks what is the same for each.
func checkBreakdown(t *testing.T, n *event.Neighbours, e *event.Event, limit *cgroupfs.Cgroup) {
	t.Helper()
	b := n.Breakdown
	if n.Kill != e.ID || n.Incident != e.Incident.ID || n.Pods != nil || n.PodsSeen != nil || n.Level != event.LevelPod || n.ReadNS == 0 || b == nil {
		t.Fatalf("message %+v of %s", n, e.ID)
	}
	if b.Source != event.SourceStat || b.Gone || b.Limit.Cgroup.Path != limit.Path() || *b.Limit.Max != 64*mib || b.AfterNS == 0 || b.AfterNS > uint64(readDelay) ||
		b.ProcessesSeen == nil || b.Incomplete || b.NodePressure == nil {
		t.Errorf("breakdown %+v of %s", b, limit.Path())
	}
	if both := (b.Events != nil && b.Slab != nil); both != (limit.Version == 2) {
		t.Errorf("events %+v, slab %v on version %d", b.Events, b.Slab, limit.Version)
	}
}

// Switched off, or where there is no kubelet's tree.
func TestNeighboursNone(t *testing.T) {
	root := oomtest.New(t, 32*mib)
	cfg := testConfig(t)
	cfg.Node.CgroupRoot = root.Path()
	tr, stop := runTracer(t, cfg, io.Discard)
	if killed := oomtest.Storm(t, root, 1, 64, "plain"); len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	until(t, "the failure is counted", func() bool { return testutil.ToFloat64(tr.metrics.neighbours.WithLabelValues("failed")) == 1 })
	if err := stop(); err != nil {
		t.Fatal(err)
	}
	cfg.Node.Neighbours = 0
	tr, _ = runTracer(t, cfg, io.Discard)
	if killed := oomtest.Storm(t, root, 1, 64, "plain"); len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	stored(t, cfg, root, 2)
	for _, result := range []string{"read", "skipped", "failed"} {
		if n := testutil.ToFloat64(tr.metrics.neighbours.WithLabelValues(result)); n != 0 {
			t.Errorf("%s: %g", result, n)
		}
	}
}
