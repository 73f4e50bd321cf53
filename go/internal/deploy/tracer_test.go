package deploy

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// TestTracerAlertsFire: as TestAlertsFire does, with the real tracer and real kills.
func TestTracerAlertsFire(t *testing.T) {
	s := startServers(t, "--values", root+"/deploy/examples/single-node.yaml", "--set", "nats.tracers=shared")
	group := oomtest.New(t, 512<<20)
	kubepods := oomtest.Child(t, group, "kubepods", 16<<20)
	pod := oomtest.Child(t, oomtest.Child(t, kubepods, "burstable", cgroupfs.Unlimited), "pod5b1a7a5e-1c1d-4b6f-8a55-000000000001", cgroupfs.Unlimited)
	limited := oomtest.Child(t, pod, strings.Repeat("1", 64), 8<<20)
	unlimited := oomtest.Child(t, pod, strings.Repeat("2", 64), cgroupfs.Unlimited)

	state, address, file := t.TempDir(), freeAddr(t), filepath.Join(t.TempDir(), "config.yaml")
	oomtest.Mount(t, "tmpfs", state, 0)
	if err := os.Chmod(state, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, fmt.Appendf(nil, `
node: {name: node-1, cgroup_root: %q, state_file: %s/state.json}
kernel: {pin_dir: %s/oom-tracer}
nats: {url: %q, user: oom-tracer, password_file: %s}
metrics: {listen: %q}
`, group.Path(), state, oomtest.BPFFS(t), strings.Join(s.urls, ","), s.secret("tracer"), address), 0o600); err != nil {
		t.Fatal(err)
	}
	tracer := exec.Command(oomtest.Program(t, "oom-tracer"), "--config", file)
	startLogged(t, tracer)

	const job = "oom-tracer"
	total := 0
	kills := func(in *cgroupfs.Cgroup, count int) (now exposed) {
		t.Helper()
		if killed := oomtest.Storm(t, in, count, 32, "plain"); len(killed) != count {
			t.Fatalf("%d were killed, want %d", len(killed), count)
		}
		total += count
		return until(t, "the kills", address, job, map[string]float64{`oom_tracer_events_total{reason="kill",stage="observed"}`: float64(total)})
	}
	// settled waits until NATS has stored everything. A moment before, a kill would look like one that is not stored.
	settled := func() (now exposed) {
		t.Helper()
		within(t, 30*time.Second, "every kill is stored", func() bool {
			var err error
			now, err = scrape(address)
			return err == nil && now.samples(job)["oom_tracer_publish_pending{"+target(job)+"}"] == 0
		})
		return now
	}
	until(t, "the tracer is connected", address, job, map[string]float64{"oom_tracer_nats_connected{": 1})
	kills(limited, 1)
	before := settled()
	all := []inState{{name: "a kill", job: job, scrapes: []exposed{before, before}, after: 12}}
	on := func(labels ...string) map[string]string {
		all := map[string]string{"node": "node-1", "severity": "warning"}
		for i := 0; i < len(labels); i += 2 {
			all[labels[i]] = labels[i+1]
		}
		return all
	}
	labels := []string{"instance", "a", "job", job}

	kills(limited, 12)
	after := settled()
	all = append(all, inState{name: "many kills", job: job, scrapes: []exposed{before, after}, after: 12, want: []fires{
		{"OOMKillsOnNode", "12 OOM kills on node-1 within an hour", on()},
	}})

	if err := unix.Mount("", state, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	kills(limited, 1)
	until(t, "the state file cannot be written", address, job, map[string]float64{"oom_tracer_state_file_errors_total{": 1})
	before, after = after, settled()
	all = append(all, inState{name: "state file on a read-only disk", job: job, scrapes: []exposed{before, after}, after: 12, want: []fires{
		{"OOMTracerStateFile", "The tracer on node-1 cannot read or write its state file", on(labels...)},
	}})

	owner := s.owner()
	stream, err := owner.js.Stream(t.Context(), event.StreamName)
	if err != nil {
		t.Fatal(err)
	}
	cfg := stream.CachedInfo().Config
	cfg.MaxMsgSize = 700 // fewer bytes than a kill has, more than a gap
	if _, err := owner.js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	before = settled()
	kills(limited, 1)
	until(t, "a gap", address, job, map[string]float64{`oom_tracer_gaps_total{cause="dropped"}`: 1, `oom_tracer_events_total{reason="dropped",stage="error"}`: 1})
	after = settled()
	all = append(all, inState{name: "NATS refuses the kill", job: job, scrapes: []exposed{before, after}, after: 12, want: []fires{
		{"OOMTracerGap", "OOM kills on node-1 were not recorded, or may not have been (gap: dropped)", on(append(labels, "cause", "dropped")...)},
		{"OOMTracerErrors", "The tracer on node-1 could not publish an OOM kill (dropped)", on(append(labels, "stage", "error", "reason", "dropped")...)},
	}})

	if err := owner.js.DeleteStream(t.Context(), event.StreamName); err != nil {
		t.Fatal(err)
	}
	before = after
	kills(limited, 1)
	after = until(t, "a kill waits", address, job, map[string]float64{"oom_tracer_publish_pending{": 1})
	all = append(all, inState{name: "no stream", job: job, scrapes: []exposed{before, after}, after: 22, want: []fires{
		{"OOMTracerNotStored", "The tracer on node-1 is connected to NATS, but NATS has not stored its OOM kills for 10 minutes", on(labels...)},
	}})

	s.stop(0)
	within(t, 30*time.Second, "NATS is away", func() bool {
		now, err := scrape(address)
		before, after = after, now
		return err == nil && now.samples(job)["oom_tracer_nats_connected{"+target(job)+"}"] == 0
	})
	away := fires{"OOMTracerNATSAway", "The tracer on node-1 is not connected to NATS: OOM kills wait on the node", on(labels...)}
	all = append(all, inState{name: "NATS away", job: job, scrapes: []exposed{before, after}, after: 12, want: []fires{away}})

	// The last state: this alert also fires where a first scrape has such a kill.
	before, after = after, kills(unlimited, 1)
	all = append(all, inState{name: "all pods reach their limit", job: job, scrapes: []exposed{before, after}, after: 12, want: []fires{
		away, {"OOMNodeOutOfMemory", "Node node-1 ran out of memory, or its pods together reached their limit", on()},
	}})

	all = append(all, inState{name: "tracer ended", job: job, scrapes: []exposed{before, ended(t, tracer, address)}, after: 12, want: []fires{
		{"OOMTracerNodeNotWatched", "The OOM tracer on node-1 does not answer: OOM kills there may not be recorded", on(labels...)},
	}})
	fireAll(t, all, func(alert string) bool { return slices.Contains(ofTracer, alert) })
}
