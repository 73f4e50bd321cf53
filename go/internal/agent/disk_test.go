package agent

import (
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// probe asks a probe's URL.
func probe(t *testing.T, addr, path string) (ok bool, body string) {
	t.Helper()
	response, err := http.Get("http://" + addr + path)
	must(t, err)
	defer response.Body.Close()
	data, err := io.ReadAll(response.Body)
	must(t, err)
	return response.StatusCode == http.StatusOK, string(data)
}

// TestDiskFull: the disk of the embedded NATS and of the state file is full, at the start or later, and then free again.
// All kills are stored within 30 s, by the same process, and the probes say what is so: not ready, but no reason for a
// restart.
func TestDiskFull(t *testing.T) {
	oomtest.Slow(t)
	for name, atStart := range map[string]bool{"later": false, "at the start": true} {
		t.Run(name, func(t *testing.T) {
			disk, fill, free := oomtest.SmallDisk(t, "12m")
			cfg := withListen(t, pinnedConfig(t))
			cfg.NATS.Embedded.Dir = filepath.Join(disk, "nats")
			cfg.Node.StateFile = filepath.Join(disk, "state.json")
			must(t, nothingMissed(cfg.Node.StateFile, testNode))
			cfg.Metrics.Listen = oomtest.FreeAddr(t)
			if atStart {
				fill()
			}
			tracer := startProcess(t, cfg)
			until(t, "the tracer runs", func() bool { return obs.TracerRuns(t.Context(), cfg.Metrics.Listen) })
			group := oomtest.New(t, 8*mib)
			if !atStart {
				oomtest.Storm(t, group, 3, 16, "plain")
				stored(t, cfg, group, 3)
				fill()
			}
			oomtest.Storm(t, group, 3, 16, "plain")
			until(t, "it is not ready", func() bool {
				ok, body := probe(t, cfg.Metrics.Listen, "/readyz")
				return !ok && strings.Contains(body, "no space left on device")
			})
			time.Sleep(10 * time.Second)
			if ok, body := probe(t, cfg.Metrics.Listen, "/readyz"); ok || !strings.Contains(body, "no space left on device") {
				t.Errorf("/readyz says %s", body)
			}
			if ok, body := probe(t, cfg.Metrics.Listen, "/healthz"); !ok {
				t.Errorf("/healthz says %s", body)
			}
			free()
			start := time.Now()
			want := 6
			if atStart {
				want = 3
			}
			until(t, "it is ready", func() bool { ok, _ := probe(t, cfg.Metrics.Listen, "/readyz"); return ok })
			stored(t, cfg, group, want)
			if took := time.Since(start); took > 30*time.Second {
				t.Errorf("all was stored after %s", took)
			} else {
				t.Logf("all was stored after %s", took)
			}
			tracer.stop(t)
			counts := settled(t, cfg)
			events, gaps := whole(t, cfg)
			withoutHole(t, events, gaps, counts.Head)
			for _, g := range sinceStart(gaps) {
				if g.Cause != event.GapStateLost { // at the start nothing could be known
					t.Errorf("a gap without a loss: %+v", g)
				}
			}
			if t.Failed() {
				t.Logf("the tracer said:\n%s", &tracer.log)
			}
		})
	}
}
