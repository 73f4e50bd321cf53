package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/bus/embedded"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// pinnedConfig pins in a bpffs of the test's own. What is pinned goes with it.
func pinnedConfig(t *testing.T) config.Config {
	t.Helper()
	cfg := testConfig(t)
	cfg.Kernel.PinDir = filepath.Join(oomtest.BPFFS(t), "oom")
	return cfg
}

// process is oom-tracer as it ships.
type process struct {
	*exec.Cmd
	log bytes.Buffer
}

func startProcess(t *testing.T, cfg config.Config) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(oomtest.Program(t, "oom-tracer"), "--config", oomtest.WriteConfig(t, cfg), "--node-name", testNode)}
	p.Stderr = &p.log
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { p.kill() })
	return p
}

// kill is kill -9.
func (p *process) kill() {
	if p.ProcessState == nil {
		_ = p.Process.Kill()
		_ = p.Wait()
	}
}

// stop is SIGTERM, and must do.
func (p *process) stop(t *testing.T) {
	t.Helper()
	p.listens(t)
	if err := p.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	stuck := time.AfterFunc(time.Minute, func() { _ = p.Process.Kill() })
	defer stuck.Stop()
	if err := p.Wait(); err != nil {
		t.Errorf("after SIGTERM: %v\n%s", err, &p.log)
	}
}

// listens waits until the process knows its signals, before which any of them ends it: main ignores SIGPIPE
// right after it asks for the others.
func (p *process) listens(t *testing.T) {
	t.Helper()
	until(t, "the process knows its signals", func() bool {
		data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.Process.Pid))
		_, ignored, _ := strings.Cut(string(data), "\nSigIgn:\t")
		ignored, _, _ = strings.Cut(ignored, "\n")
		mask, err := strconv.ParseUint(ignored, 16, 64)
		return err != nil || mask&(1<<(syscall.SIGPIPE-1)) != 0 // no such line: it has ended
	})
}

// whole is everything that the stream of an embedded server holds; no tracer may run.
func whole(t *testing.T, cfg config.Config) (events []event.Event, gaps []event.Gap) {
	t.Helper()
	cfg.NATS.Embedded.Listen = "127.0.0.1:0"
	server, err := embedded.Start(cfg.NATS.Embedded, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := server.Shutdown(context.WithoutCancel(t.Context())); err != nil {
			t.Error(err)
		}
	}()
	cfg.NATS.Embedded.Listen = strings.TrimPrefix(server.ClientURL(), "nats://")
	conn := connect(t, cfg)
	defer conn.Close()
	return record(t, conn)
}

// record is every kill, mark and gap that the stream holds.
func record(t *testing.T, conn *bus.Conn) (events []event.Event, gaps []event.Gap) {
	t.Helper()
	if err := bus.Tail(t.Context(), conn, bus.TailOptions{Since: time.Unix(0, 0)}, func(m bus.Stored) error {
		switch kind, _, _, _ := event.ParseSubject(m.Subject); kind {
		case event.KindGap:
			g, err := event.ParseGap(m.Data)
			gaps = append(gaps, g)
			return err
		case event.KindNeighbours:
			return nil
		}
		e, err := parse(t, m)
		events = append(events, e)
		return err
	}); err != nil {
		t.Fatal(err)
	}
	return events, gaps
}

// sinceStart leaves out the gaps of what others on this machine killed before the first tracer of a test ran.
func sinceStart(gaps []event.Gap) []event.Gap {
	return slices.DeleteFunc(gaps, func(g event.Gap) bool { return g.Cause == event.GapBoot || g.Cause == event.GapRestart })
}

// settled waits until the pinned program has nothing that is not on NATS. No tracer may run: one is started.
func settled(t *testing.T, cfg config.Config) loader.Counts {
	t.Helper()
	tr, stop := runTracer(t, cfg, io.Discard)
	until(t, "everything is acknowledged", func() bool {
		c := tr.loader.Counts()
		return c.Acked == c.Head && tr.publisher.Pending() == 0
	})
	counts := tr.loader.Counts()
	if err := stop(); err != nil {
		t.Error(err)
	}
	return counts
}

// withoutHole holds the seqs of events and gaps together: each from 1 to head is in one of them.
func withoutHole(t *testing.T, events []event.Event, gaps []event.Gap, head uint64) {
	t.Helper()
	told := map[uint64]int{}
	for _, e := range events {
		told[e.Seq]++
	}
	for _, g := range gaps {
		for seq := g.FirstSeq; seq > 0 && seq <= g.LastSeq; seq++ {
			told[seq]++
		}
	}
	missing := 0
	for seq := uint64(1); seq <= head; seq++ {
		if told[seq] == 0 {
			missing++
		}
		if told[seq] > 1 {
			t.Errorf("seq %d is in %d events and gaps", seq, told[seq])
		}
	}
	if missing > 0 {
		t.Errorf("%d of %d seqs are in no event and in no gap", missing, head)
	}
}

// TestKilledInStorm: the tracer is killed with -9 at random points of a storm, ten times over, with its NATS
// in it, and every other time the next one has another size of journal, which needs a new generation of it.
// What the stream holds in the end is what the kernel killed. OOM_TEST_SEEDS (1) says how often, OOM_TEST_SEED with which seed.
func TestKilledInStorm(t *testing.T) {
	oomtest.Slow(t)
	seeds := 1
	if s := os.Getenv("OOM_TEST_SEEDS"); s != "" {
		var err error
		if seeds, err = strconv.Atoi(s); err != nil {
			t.Fatalf("OOM_TEST_SEEDS: %v", err)
		}
	}
	for range seeds {
		seed := rand.Uint64()
		if s := os.Getenv("OOM_TEST_SEED"); s != "" {
			var err error
			if seed, err = strconv.ParseUint(s, 10, 64); err != nil {
				t.Fatalf("OOM_TEST_SEED: %v", err)
			}
		}
		t.Run(fmt.Sprintf("seed %d", seed), func(t *testing.T) { killedInStorm(t, rand.New(rand.NewPCG(seed, 0))) })
	}
}

func killedInStorm(t *testing.T, random *rand.Rand) {
	const kills, rounds = 2000, 10
	cfg := pinnedConfig(t)
	group := oomtest.New(t, 8*mib)
	storm := make(chan error, 1)
	var killed []int
	hog := oomtest.Program(t, "hog")
	tracer := startProcess(t, cfg)
	var said []string
	until(t, "the first tracer runs", func() bool {
		_, err := os.Stat(filepath.Join(cfg.Kernel.PinDir, "1", "oom_mark_victim"))
		return err == nil
	})
	go func() {
		var err error
		killed, err = oomtest.RunStorm(t.Context(), group, hog, kills, 16, "plain")
		storm <- err
	}()
	for round := range rounds {
		// Evenly over the storm, by how far it has come, and then at any moment.
		until(t, "the storm goes on", func() bool {
			select {
			case err := <-storm:
				t.Fatalf("the storm is over in round %d: %v", round, err)
			default:
			}
			return oomtest.Kills(t, group) > round*kills/rounds
		})
		time.Sleep(time.Duration(random.IntN(500)) * time.Millisecond)
		tracer.kill()
		said = append(said, tracer.log.String())
		cfg.Kernel.JournalSize = []config.Bytes{2 << 20, 4 << 20}[round%2]
		tracer = startProcess(t, cfg)
	}
	if err := <-storm; err != nil {
		t.Fatal(err)
	}
	tracer.stop(t)
	said = append(said, tracer.log.String())
	counted := oomtest.Kills(t, group)
	counts := settled(t, cfg)

	events, gaps := whole(t, cfg)
	times := map[int]int{}
	ids := map[string]bool{}
	for _, e := range events {
		if ids[e.ID] { // and so dropped by whoever dedupes
			continue
		}
		ids[e.ID] = true
		if in(group, &e) {
			times[int(e.Victim.PID)]++
		}
	}
	t.Logf("%d kills, %d events, %d of them of other kills or doubles; %d were lost; seq %d", counted, len(events), len(events)-len(times), counts.Lost, counts.Head)
	for _, pid := range killed {
		if times[pid] != 1 {
			t.Errorf("process %d was killed, and is told of %d times", pid, times[pid])
		}
	}
	if counted != kills || len(killed) != kills || len(times) != kills || counts.Lost != 0 {
		t.Errorf("the cgroup counts %d kills, the hog %d, the stream %d; %d are lost", counted, len(killed), len(times), counts.Lost)
	}
	withoutHole(t, events, nil, counts.Head)
	for _, g := range sinceStart(gaps) {
		t.Errorf("a gap without a loss: %+v", g)
	}
	if t.Failed() {
		t.Logf("the tracers said:\n%s", strings.Join(said, "\n"))
	}
	if n, err := loader.Unload(t.Context(), cfg.Kernel.PinDir, false); n != 0 || err != nil {
		t.Errorf("unload: %d, %v", n, err)
	}
}

// TestStopped: while the tracer is stopped (SIGSTOP) nobody reads. What the journal holds is read
// later; what it does not is named by a gap, exactly.
func TestStopped(t *testing.T) {
	oomtest.Slow(t)
	for _, tt := range []struct {
		name  string
		size  config.Bytes
		kills int
		lost  bool
	}{
		{"smaller than the journal", 2 << 20, 1000, false},
		{"larger than the journal", 128 << 10, 600, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := pinnedConfig(t)
			cfg.Kernel.JournalSize = tt.size
			cfg.Metrics.Listen, cfg.NATS.Embedded.Listen = oomtest.FreeAddr(t), oomtest.FreeAddr(t)
			tracer := startProcess(t, cfg)
			until(t, "the tracer runs", func() bool { return obs.TracerRuns(t.Context(), cfg.Metrics.Listen) })
			if err := tracer.Process.Signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			group := oomtest.New(t, 4*mib)
			killed := oomtest.Storm(t, group, tt.kills, 8, "plain")
			if err := tracer.Process.Signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			// No further kill is needed for it.
			stored(t, cfg, group, 1)
			time.Sleep(2 * lookAgain)
			tracer.stop(t)
			counts := settled(t, cfg)
			events, gaps := whole(t, cfg)
			gaps = sinceStart(gaps)
			withoutHole(t, events, gaps, counts.Head)

			told := map[int]bool{}
			seqs := map[uint64]bool{}
			for _, e := range events {
				told[int(e.Victim.PID)] = true
				seqs[e.Seq] = true
			}
			missing := uint64(0)
			for _, g := range gaps {
				if g.Cause != event.GapWrapped || g.Count == nil || *g.Count != g.LastSeq-g.FirstSeq+1 || g.Since == nil || g.Until == nil {
					t.Errorf("%+v", g)
					continue
				}
				missing += *g.Count
				for seq := g.FirstSeq; seq <= g.LastSeq; seq++ {
					if seqs[seq] {
						t.Errorf("seq %d is in a gap and in an event", seq)
					}
				}
			}
			untold := 0
			for _, pid := range killed {
				if !told[pid] {
					untold++
				}
			}
			t.Logf("%d kills, %d events, %d gaps with %d records", len(killed), len(events), len(gaps), missing)
			if len(killed) != tt.kills || (untold > 0) != tt.lost || uint64(untold) > missing || missing != counts.Lost ||
				uint64(len(seqs))+missing != counts.Head {
				t.Errorf("%d of %d kills are untold, %d records are in gaps, %d lost of %d", untold, len(killed), missing, counts.Lost, counts.Head)
			}
		})
	}
}

// TestRestart: without pins nothing is recorded between two tracers. The kernel's own count says how much.
func TestRestart(t *testing.T) {
	oomtest.Slow(t)
	group := oomtest.New(t, 8*mib)
	first := func(t *testing.T, cfg config.Config) {
		t.Helper()
		_, stop := runTracer(t, cfg, io.Discard)
		oomtest.Storm(t, group, 2, 16, "plain")
		stored(t, cfg, group, 2)
		if err := stop(); err != nil {
			t.Error(err)
		}
	}
	again := func(t *testing.T, cfg config.Config) []event.Gap {
		t.Helper()
		tr, stop := runTracer(t, cfg, io.Discard)
		until(t, "the gaps are published", func() bool { return tr.publisher.Pending() == 0 })
		if err := stop(); err != nil {
			t.Error(err)
		}
		_, gaps := whole(t, cfg)
		return gaps
	}
	// The last one of a cause: what others on this machine kill may have made one at the first start as well.
	last := func(t *testing.T, gaps []event.Gap, cause event.GapCause) event.Gap {
		t.Helper()
		var found []event.Gap
		for _, g := range gaps {
			if g.Cause == cause {
				found = append(found, g)
			}
		}
		if len(found) == 0 {
			t.Fatalf("no gap of cause %s among %+v", cause, gaps)
		}
		g := found[len(found)-1]
		if g.Since == nil || g.Until == nil || !g.Since.Before(*g.Until) || g.Node.Name != testNode || g.ID == "" {
			t.Errorf("%+v", g)
		}
		return g
	}
	t.Run("clean", func(t *testing.T) {
		cfg := withListen(t, testConfig(t))
		first(t, cfg)
		oomtest.Storm(t, group, 3, 16, "plain")
		if g := last(t, again(t, cfg), event.GapRestart); g.Count == nil || *g.Count < 3 || g.CountMax != nil || *g.Count > 1000 {
			t.Errorf("%+v", g)
		}
	})
	t.Run("not clean", func(t *testing.T) {
		cfg := withListen(t, testConfig(t))
		first(t, cfg)
		change(t, cfg, func(r *savedState) { r.Clean = false })
		oomtest.Storm(t, group, 3, 16, "plain")
		if g := last(t, again(t, cfg), event.GapRestart); g.Count != nil || g.CountMax == nil || *g.CountMax < 3 {
			t.Errorf("%+v", g)
		}
	})
	t.Run("died with records", func(t *testing.T) {
		cfg := withListen(t, testConfig(t))
		first(t, cfg)
		change(t, cfg, func(r *savedState) { r.Head, r.Acked = 20, 15 })
		if g := last(t, again(t, cfg), event.GapRestart); g.FirstSeq != 16 || g.LastSeq != 20 || g.CountMax == nil || *g.CountMax < 5 {
			t.Errorf("%+v", g)
		}
	})
	t.Run("reboot", func(t *testing.T) {
		cfg := withListen(t, testConfig(t))
		change(t, cfg, func(r *savedState) { r.BootID, r.Clean, r.Time = "another boot", false, time.Unix(1, 0) })
		gaps := again(t, cfg)
		if g := last(t, gaps, event.GapReboot); g.Count != nil || g.CountMax != nil || !g.Since.Equal(time.Unix(1, 0)) {
			t.Errorf("%+v", g)
		}
		// And this machine has killed before this tracer came.
		if g := last(t, gaps, event.GapBoot); g.Count == nil || *g.Count == 0 {
			t.Errorf("%+v", g)
		}
	})
	t.Run("reboot, and the clock set back", func(t *testing.T) {
		cfg := withListen(t, testConfig(t))
		change(t, cfg, func(r *savedState) { r.BootID, r.Clean, r.Time = "another boot", false, time.Now().Add(time.Hour) })
		gaps := again(t, cfg)
		i := slices.IndexFunc(gaps, func(g event.Gap) bool { return g.Cause == event.GapReboot })
		if i < 0 || gaps[i].Since != nil || gaps[i].Until == nil {
			t.Errorf("%+v", gaps)
		}
	})
	t.Run("reboot after a clean stop", func(t *testing.T) {
		cfg := withListen(t, testConfig(t))
		change(t, cfg, func(r *savedState) { r.BootID = "another boot" })
		for _, g := range again(t, cfg) {
			if g.Cause == event.GapReboot {
				t.Errorf("%+v", g)
			}
		}
	})
	for name, text := range map[string]string{"rubbish": "{nonsense", "emptied": "", "another's": "{}", "zeros": string(make([]byte, 300))} {
		t.Run(name, func(t *testing.T) {
			cfg := withListen(t, testConfig(t))
			first(t, cfg)
			if err := os.WriteFile(cfg.Node.StateFile, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			gaps := again(t, cfg)
			if g := found(t, gaps, event.GapStateLost); g.Count != nil || g.CountMax != nil || g.Since != nil || g.Until == nil {
				t.Errorf("%+v", g)
			}
			// The first one has published some of what this boot has killed.
			if g := found(t, gaps, event.GapBoot); g.Count != nil || g.CountMax == nil || *g.CountMax < 2 {
				t.Errorf("%+v", g)
			}
			if data, err := os.ReadFile(cfg.Node.StateFile + ".bad"); err != nil || string(data) != text {
				t.Errorf("kept: %q, %v", data, err)
			}
			// The next one is none the wiser, and has nothing to add.
			if more := again(t, cfg); len(more) != len(gaps) {
				t.Errorf("%+v", more[len(gaps):])
			}
		})
	}
}

// TestStoreDamaged: a power cut has emptied a file of the embedded NATS. What it had acknowledged is gone, and a gap says so, once.
func TestStoreDamaged(t *testing.T) {
	cfg := withListen(t, pinnedConfig(t))
	group := oomtest.New(t, 8*mib)
	lost := func() (found []event.Gap) {
		t.Helper()
		tr, stop := runTracer(t, cfg, io.Discard)
		until(t, "everything is published", func() bool { return tr.publisher.Pending() == 0 && !tr.state.outdated(tr.loader.Counts()) })
		must(t, stop())
		_, gaps := whole(t, cfg)
		for _, g := range gaps {
			if g.Cause == event.GapStoreLost {
				found = append(found, g)
			}
		}
		return found
	}
	_, stop := runTracer(t, cfg, io.Discard)
	oomtest.Storm(t, group, 3, 16, "plain")
	stored(t, cfg, group, 3)
	must(t, stop())
	if gaps := lost(); len(gaps) > 0 {
		t.Fatalf("gaps of a store that is whole: %+v", gaps)
	}
	must(t, os.Truncate(filepath.Join(cfg.NATS.Embedded.Dir, "jetstream/$G/streams/OOM/msgs/1.blk"), 0))
	for range 2 {
		gaps := lost()
		if len(gaps) != 1 || gaps[0].CountMax == nil || *gaps[0].CountMax < 3 || gaps[0].Count != nil || !gaps[0].Missing() ||
			gaps[0].Since == nil || !gaps[0].Since.Before(*gaps[0].Until) {
			t.Errorf("%+v", gaps)
		}
	}
}

// found is the last gap of a cause.
func found(t *testing.T, gaps []event.Gap, cause event.GapCause) event.Gap {
	t.Helper()
	for _, g := range slices.Backward(gaps) {
		if g.Cause == cause {
			return g
		}
	}
	t.Fatalf("no gap of cause %s among %+v", cause, gaps)
	return event.Gap{}
}

// TestStateFileAway: a state file that cannot be written stops neither the start nor the work. It is said once, counted,
// tried again, and healed.
func TestStateFileAway(t *testing.T) {
	oomtest.Slow(t)
	for name, tt := range map[string]struct {
		breakIt, mend func(t *testing.T, dir string)
	}{
		"a full disk": {
			func(t *testing.T, dir string) {
				if err := unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k,mode=0700"); err != nil {
					t.Fatal(err)
				}
				t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
				if err := os.WriteFile(dir+"/fill", make([]byte, 64<<10), 0o600); err != nil {
					t.Fatal(err)
				}
			},
			func(t *testing.T, dir string) {
				if err := os.Remove(dir + "/fill"); err != nil {
					t.Fatal(err)
				}
			},
		},
		"a read-only disk": {
			func(t *testing.T, dir string) {
				must(t, unix.Mount("tmpfs", dir, "tmpfs", unix.MS_RDONLY, "mode=0700"))
				t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
			},
			func(t *testing.T, dir string) { must(t, unix.Mount("", dir, "tmpfs", unix.MS_REMOUNT, "")) },
		},
		"a file in the place of the directory": {
			func(t *testing.T, dir string) {
				must(t, os.Remove(dir))
				must(t, os.WriteFile(dir, nil, 0o600))
			},
			func(t *testing.T, dir string) { must(t, os.Remove(dir)) },
		},
		"another user's directory": {
			func(t *testing.T, dir string) {
				if err := os.Chown(dir, oomtest.Nobody, oomtest.Nobody); err != nil {
					t.Fatal(err)
				}
			},
			func(t *testing.T, dir string) {
				if err := os.Chown(dir, 0, 0); err != nil {
					t.Fatal(err)
				}
			},
		},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := withListen(t, testConfig(t))
			dir := t.TempDir()
			cfg.Node.StateFile = filepath.Join(dir, "state.json")
			cfg.Metrics.Listen = oomtest.FreeAddr(t)
			tt.breakIt(t, dir)
			tracer := startProcess(t, cfg)
			until(t, "the tracer runs", func() bool { return obs.TracerRuns(t.Context(), cfg.Metrics.Listen) })
			group := oomtest.New(t, 8*mib)
			oomtest.Storm(t, group, 3, 16, "plain")
			stored(t, cfg, group, 3)
			time.Sleep(4 * time.Second) // and some tries
			if _, err := os.Stat(cfg.Node.StateFile); err == nil {
				t.Error("the state file is there")
			}
			tt.mend(t, dir)
			until(t, "the state file is written", func() bool { _, err := os.Stat(cfg.Node.StateFile); return err == nil })
			metrics := scrape(t, cfg.Metrics.Listen)
			tracer.stop(t)
			log := tracer.log.String()
			if n := strings.Count(log, "cannot write state file"); n != 1 || !strings.Contains(log, "state file can be written again") {
				t.Errorf("said %d times:\n%s", n, log)
			}
			_, value, _ := strings.Cut(metrics, "\noom_tracer_state_file_errors_total ")
			value, _, _ = strings.Cut(value, "\n")
			if n, err := strconv.Atoi(value); err != nil || n < 2 || n > 10 {
				t.Errorf("%q failed writes are counted", value)
			}
			if s := openStateFile(cfg.Node.StateFile, slog.New(slog.DiscardHandler)); s.previous == nil || !s.previous.Clean {
				t.Errorf("the file says %+v", s.previous)
			}
			entries, err := os.ReadDir(dir)
			if err != nil || len(entries) != 1 {
				t.Errorf("beside the state file: %v, %v", entries, err)
			}
		})
	}
}

// scrape reads the metrics of a running tracer.
func scrape(t *testing.T, addr string) string {
	t.Helper()
	response, err := http.Get("http://" + addr + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

// withListen gives the embedded server an address that is known before it runs.
func withListen(t *testing.T, cfg config.Config) config.Config {
	cfg.NATS.Embedded.Listen = oomtest.FreeAddr(t)
	return cfg
}

// change rewrites the file of a tracer that has ended.
func change(t *testing.T, cfg config.Config, edit func(*savedState)) {
	t.Helper()
	s := openStateFile(cfg.Node.StateFile, slog.New(slog.DiscardHandler))
	edit(s.previous)
	if err := s.write(*s.previous); err != nil {
		t.Fatal(err)
	}
}

// TestGapOutlivesTracer: a gap that is found while NATS is away is told by the next tracer, however this one ends.
func TestGapOutlivesTracer(t *testing.T) {
	cfg := testConfig(t)
	change(t, cfg, func(r *savedState) { r.BootID, r.Clean, r.Time = "another boot", false, time.Unix(1, 0) })
	away := cfg
	away.NATS.URL = "nats://" + oomtest.FreeAddr(t)
	away.Metrics.Listen = oomtest.FreeAddr(t)
	for range 2 { // and the second one passes it on
		tracer := startProcess(t, away)
		until(t, "the tracer runs", func() bool { return obs.TracerRuns(t.Context(), away.Metrics.Listen) })
		tracer.kill()
	}
	tr, stop := runTracer(t, cfg, io.Discard)
	until(t, "the gaps are published", func() bool { return tr.publisher.Pending() == 0 })
	if err := stop(); err != nil {
		t.Error(err)
	}
	s := openStateFile(cfg.Node.StateFile, slog.New(slog.DiscardHandler))
	if s.previous == nil || len(s.previous.Unpublished) != 0 || !s.previous.Clean {
		t.Errorf("the file says %+v", s.previous)
	}
	_, gaps := whole(t, cfg)
	count := map[event.GapCause]int{}
	for _, g := range gaps {
		count[g.Cause]++
		if g.Cause == event.GapReboot && !g.Since.Equal(time.Unix(1, 0)) {
			t.Errorf("%+v", g)
		}
	}
	if count[event.GapReboot] != 1 || count[event.GapBoot] != 1 {
		t.Errorf("gaps %+v", gaps)
	}
}

// TestOtherVersion: after a pinned state of another version, what was not published is in a gap that names its seqs, also where the
// kernel's count misses nothing.
func TestOtherVersion(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(*savedState)
		cause  event.GapCause
	}{
		{"counted", func(*savedState) {}, event.GapRestart},
		{"nothing missing by the kernel's count", func(r *savedState) { *r.Kernel += 100 }, event.GapRestart},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := pinnedConfig(t)
			head := settled(t, cfg).Head
			oomtest.Storm(t, oomtest.New(t, 8*mib), 5, 16, "plain")
			state, err := ebpf.LoadPinnedMap(filepath.Join(cfg.Kernel.PinDir, "state"), nil)
			if err != nil {
				t.Fatal(err)
			}
			defer state.Close()
			value := make([]byte, state.ValueSize())
			if err := state.Lookup(uint32(0), value); err != nil {
				t.Fatal(err)
			}
			value[4]++ // struct oom_state.version
			if err := state.Put(uint32(0), value); err != nil {
				t.Fatal(err)
			}
			change(t, cfg, tt.change)
			settled(t, cfg)
			_, gaps := whole(t, cfg)
			g := found(t, gaps, tt.cause)
			if g.FirstSeq != head+1 || g.LastSeq < head+5 {
				t.Errorf("seqs %d to %d, of 5 after %d: %+v", g.FirstSeq, g.LastSeq, head, g)
			}
			n := g.LastSeq - head
			if exact := g.Count != nil && *g.Count == n; !exact && (g.CountMax == nil || *g.CountMax != n) {
				t.Errorf("of %d records: %+v", n, g)
			}
		})
	}
}

// TestWrappedAway: what was written over while no tracer ran is said to have happened then, and not at the start
// that finds it.
func TestWrappedAway(t *testing.T) {
	oomtest.Slow(t)
	cfg := pinnedConfig(t)
	cfg.Kernel.JournalSize = 128 << 10
	settled(t, cfg)
	begun := time.Now()
	oomtest.Storm(t, oomtest.New(t, 8*mib), 500, 16, "plain")
	ended := time.Now()
	settled(t, cfg)
	_, gaps := whole(t, cfg)
	gaps = sinceStart(gaps)
	if len(gaps) != 1 || gaps[0].Cause != event.GapWrapped || gaps[0].Since == nil || !gaps[0].Since.Before(begun) ||
		begun.Sub(*gaps[0].Since) > time.Minute || gaps[0].Until == nil || gaps[0].Until.Before(ended.Add(-time.Second)) {
		t.Errorf("%+v, the storm was from %s to %s", gaps, begun, ended)
	}
}

// TestReconciled: over a storm, and a group of processes where there are such, the kernel's count and ours are
// the same, or bound it; and what the program really did not see is told.
func TestReconciled(t *testing.T) {
	cfg := withListen(t, pinnedConfig(t))
	tr, stop := runTracer(t, cfg, io.Discard)
	group := oomtest.New(t, 8*mib)
	oomtest.Storm(t, group, 50, 16, "plain")
	counts, kernel, err := tr.stable()
	if atLeast, _ := counts.Unseen(kernel); err != nil || atLeast != 0 || counts.Killed+counts.Unknown < 50 {
		t.Errorf("%+v, the kernel counts %d", counts, kernel)
	}
	// As if the program had been switched off for three kills.
	tr.reconciled.kernel -= 3
	tr.loader.SetKernelBase(counts.KernelBase - 3)
	tr.unseen(t.Context())
	if atLeast, _ := tr.reconciled.bounds(tr.loader.Counts(), kernel); atLeast != 0 {
		t.Errorf("%d are still unseen after they were told", atLeast)
	}
	until(t, "the gap is published", func() bool { return tr.publisher.Pending() == 0 })
	if err := stop(); err != nil {
		t.Error(err)
	}
	_, gaps := whole(t, cfg)
	gaps = sinceStart(gaps)
	if len(gaps) != 1 || gaps[0].Cause != event.GapUnseen || gaps[0].Count == nil && (gaps[0].CountMax == nil || *gaps[0].CountMax < 3) {
		t.Errorf("%+v", gaps)
	}
}

// TestNodeStatus: a node says that it is watched, at the start, in between and at the end, and what it says is
// so; oom-tap nodes shows it.
func TestNodeStatus(t *testing.T) {
	cfg := withListen(t, pinnedConfig(t))
	cfg.Node.StatusInterval = time.Second
	tr, stop := runTracer(t, cfg, io.Discard)
	group := oomtest.New(t, 8*mib)
	oomtest.Storm(t, group, 2, 16, "plain")
	statuses := make(chan event.NodeStatus, 100)
	conn := connect(t, cfg)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	go func() {
		err := bus.Tail(ctx, conn, bus.TailOptions{Stream: event.NodesStreamName, Since: time.Unix(0, 0), Follow: true}, func(m bus.Stored) error {
			s, err := event.ParseNodeStatus(m.Data)
			if subject, subjectErr := s.Subject(); subjectErr != nil || subject != m.Subject || m.ID != s.ID {
				t.Errorf("%q on %s: %s, %v", m.ID, m.Subject, subject, subjectErr)
			}
			statuses <- s
			return err
		})
		if err != nil {
			t.Error(err)
		}
	}()
	next := func(phase event.Phase) event.NodeStatus {
		t.Helper()
		for {
			select {
			case s := <-statuses:
				if s.Phase == phase {
					return s
				}
			case <-time.After(30 * time.Second):
				t.Fatalf("no status of phase %s comes", phase)
			}
		}
	}
	until(t, "the kills are published", func() bool { c := tr.loader.Counts(); return c.Acked == c.Head && c.Head >= 2 })
	acked := tr.loader.Counts().Acked
	for {
		s := next(event.PhaseAlive)
		if s.Acked < acked {
			continue // said before
		}
		if s.Node.Name != testNode || s.Node.Tier != string(tr.loader.Tier()) || s.Node.Epoch != tr.loader.EpochNS() || !s.Pinned || s.Version == "" ||
			s.Seq < 2 || s.Lost != 0 || s.LastKill == nil || time.Since(*s.LastKill) > time.Minute || s.Since.After(*s.LastKill) ||
			s.Due == nil || !s.Due.After(s.Time) || s.Unseen == nil || s.Unseen.AtLeast != 0 || s.Prototype != string(tr.loader.Prototype()) {
			text, _ := json.Marshal(s)
			t.Errorf("%s", text)
		}
		break
	}
	tap := func() string {
		t.Helper()
		out, err := exec.Command(oomtest.Program(t, "oom-tap"), "nodes", "--config", oomtest.WriteConfig(t, cfg)).CombinedOutput()
		if err != nil {
			t.Fatalf("oom-tap nodes: %v\n%s", err, out)
		}
		return string(out)
	}
	if out := tap(); !strings.Contains(out, testNode+"  watched  ") || strings.Count(out, "\n") != 2 {
		t.Errorf("oom-tap nodes:\n%s", out)
	}
	cancel()
	if err := stop(); err != nil {
		t.Error(err)
	}
	// The last word stays.
	server, err := embedded.Start(cfg.NATS.Embedded, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = server.Shutdown(context.WithoutCancel(t.Context())) }()
	if out := tap(); !strings.Contains(out, "stopped, kernel records") {
		t.Errorf("oom-tap nodes:\n%s", out)
	}
}

// TestUnloadCommand: oom-tracer unload ends what a tracer has left recording, and says what it does.
func TestUnloadCommand(t *testing.T) {
	cfg := pinnedConfig(t)
	unload := func(flags ...string) (string, error) {
		out, err := exec.Command(oomtest.Program(t, "oom-tracer"), append([]string{"unload", "--config", oomtest.WriteConfig(t, cfg)}, flags...)...).CombinedOutput()
		return string(out), err
	}
	if out, err := unload(); err != nil || out != fmt.Sprintf("nothing is pinned in %s\n", cfg.Kernel.PinDir) {
		t.Errorf("%q, %v", out, err)
	}
	settled(t, cfg)
	group := oomtest.New(t, 8*mib)
	oomtest.Storm(t, group, 2, 16, "plain")
	if out, err := unload(); err == nil || !strings.Contains(out, "records in "+cfg.Kernel.PinDir+" are not published yet") {
		t.Errorf("%q, %v", out, err)
	}
	settled(t, cfg)
	if events, _ := whole(t, cfg); len(of(group, events)) != 2 {
		t.Errorf("%d events of 2 kills while no tracer ran", len(of(group, events)))
	}
	if out, err := unload("--force"); err != nil || !strings.HasPrefix(out, "unloaded") {
		t.Errorf("%q, %v", out, err)
	}
	if _, err := os.Stat(cfg.Kernel.PinDir); !os.IsNotExist(err) {
		t.Errorf("left behind: %v", err)
	}
}

// TestStoppedAtStart: told to end at any moment of its start, it ends cleanly.
func TestStoppedAtStart(t *testing.T) {
	oomtest.Slow(t)
	cfg := pinnedConfig(t)
	for range 12 {
		tracer := startProcess(t, cfg)
		tracer.listens(t)
		time.Sleep(time.Duration(rand.IntN(600)) * time.Millisecond)
		tracer.stop(t)
	}
	if _, err := loader.Unload(t.Context(), cfg.Kernel.PinDir, true); err != nil {
		t.Error(err)
	}
}
