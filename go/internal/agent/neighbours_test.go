package agent

import (
	"context"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
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

	// A pod at its own limit is nobody else's news.
	if killed := oomtest.Storm(t, own, 1, 16, "plain"); len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	stored(t, cfg, own, 1)
	began := time.Now()
	if killed := oomtest.Storm(t, victim, 1, 64, "plain"); len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	e := stored(t, cfg, victim, 1)[0]
	n := neighboursStored(t, cfg, 1)[0]
	if n.Kill != e.ID || n.Incident != e.Incident.ID || n.Scope != event.ScopeCgroup || n.Level != event.LevelKubepods || n.Node.Name != testNode ||
		n.PodsSeen != 3 || len(n.Pods) != 3 || n.Incomplete || n.ReadNS == 0 || n.Time.Before(e.Time) {
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
	until(t, "it is counted", func() bool { return count("read") == 1 && count("skipped") == 0 && count("failed") == 0 })

	// In a storm the pods are read now and then.
	const storm = 100
	if killed := oomtest.Storm(t, victim, storm, 64, "plain"); len(killed) != storm {
		t.Fatalf("%d were killed", len(killed))
	}
	stored(t, cfg, victim, 1+storm)
	until(t, "all are counted", func() bool { return count("read")+count("skipped")+count("failed") == 1+storm })
	if most := 1 + int(time.Since(began)/readPause); count("read") > most || count("failed") > 0 {
		t.Errorf("read %d times in %s, want at most %d; %d failed", count("read"), time.Since(began), most, count("failed"))
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
