//go:build upgrade

package agent

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"syscall"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// TestUpgrade: a tracer takes over from one of before this journal (make test-upgrade builds it), and that one from it. What
// the one before had not published is read, or is in a gap that names it.
func TestUpgrade(t *testing.T) {
	before, err := filepath.Abs(os.Getenv("OOM_TEST_BEFORE"))
	if err != nil {
		t.Fatal(err)
	}
	now := oomtest.Program(t, "oom-tracer")
	for _, tt := range []struct {
		name        string
		first, next string
		gaps        []event.GapCause // of what the first had not published
	}{
		{"upgrade", before, now, nil},
		{"rollback", now, before, []event.GapCause{event.GapWrapped, event.GapUnreadable}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := pinnedConfig(t)
			addr := oomtest.FreeAddr(t)
			cfg.NATS.URL, cfg.Metrics.Listen = "nats://"+addr, oomtest.FreeAddr(t)
			file := filepath.Join(t.TempDir(), "config.yaml")
			text := fmt.Sprintf("node: {state_file: %q}\nkernel: {pin_dir: %q}\nnats: {url: %q}\nmetrics: {listen: %q}\n", // both know these keys
				cfg.Node.StateFile, cfg.Kernel.PinDir, cfg.NATS.URL, cfg.Metrics.Listen)
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			run := func(program string) *process {
				t.Helper()
				p := &process{Cmd: exec.Command(program, "--config", file, "--node-name", testNode)}
				p.Stderr = &p.log
				if err := p.Start(); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() {
					p.kill()
					if t.Failed() {
						t.Logf("%s:\n%s", program, &p.log)
					}
				})
				until(t, "the tracer runs", func() bool { return obs.TracerRuns(t.Context(), cfg.Metrics.Listen) })
				return p
			}
			group := oomtest.New(t, 8*mib)
			first := run(tt.first)
			killed := oomtest.Storm(t, group, 20, 16, "plain") // NATS is away
			first.kill()
			killed = append(killed, oomtest.Storm(t, group, 20, 16, "plain")...)
			natsServer(t, addr, t.TempDir())
			owner := connect(t, cfg)
			if err := bus.EnsureStreams(t.Context(), owner, cfg.NATS.Stream); err != nil {
				t.Fatal(err)
			}
			next := run(tt.next)
			after := oomtest.Storm(t, group, 20, 16, "plain")
			var events []event.Event
			var gaps []event.Gap
			has := func(pids []int) bool {
				return !slices.ContainsFunc(pids, func(pid int) bool {
					return !slices.ContainsFunc(events, func(e event.Event) bool { return int(e.Victim.PID) == pid })
				})
			}
			until(t, "the later kills are stored", func() bool {
				events, gaps = record(t, owner)
				return has(after) && (len(tt.gaps) > 0 || has(killed))
			})
			if err := next.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := next.Wait(); err != nil {
				t.Errorf("%v\n%s", err, &next.log)
			}
			events, gaps = record(t, owner)
			gaps = sinceStart(gaps)
			withoutHole(t, events, gaps, uint64(len(killed)+len(after)))
			t.Logf("%d events, %d gaps", len(events), len(gaps))
			for _, g := range gaps {
				if !slices.Contains(tt.gaps, g.Cause) {
					t.Errorf("%+v", g)
				}
			}
		})
	}
}
