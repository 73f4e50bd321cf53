//go:build vm

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// vmConfig is a config file for oom-tracer with the shipped pin directory; what the kernel killed before is
// nobody's gap. What a test leaves pinned is unloaded. The tier may be followed by other keys.
func vmConfig(t *testing.T, tier string) string {
	t.Helper()
	dir := t.TempDir()
	file, state := filepath.Join(dir, "config.yaml"), filepath.Join(dir, "state.json")
	text := fmt.Sprintf("node: {state_file: %s}\nkernel: {tier: %s}\nnats: {embedded: {listen: \"127.0.0.1:4222\", dir: %s/nats}}\nmetrics: {listen: \"127.0.0.1:9105\"}\n", state, tier, dir)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := nothingMissed(state, "vm"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if out, err := exec.Command(oomtest.Program(t, "oom-tracer"), "unload", "--force", "--config", file).CombinedOutput(); err != nil {
			t.Errorf("unload: %v\n%s", err, out)
		}
	})
	return file
}

// vmTracer starts oom-tracer and waits until it runs.
func vmTracer(t *testing.T, config string) *process {
	t.Helper()
	p := &process{Cmd: exec.Command(oomtest.Program(t, "oom-tracer"), "--config", config, "--node-name", "vm")}
	p.Stderr = &p.log
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.kill()
		if t.Failed() {
			t.Logf("the tracer's log:\n%s", &p.log)
		}
	})
	until(t, "the tracer runs", func() bool { return obs.TracerRuns(t.Context(), "127.0.0.1:9105") })
	return p
}

// eventOf waits until the stream has the event of a process.
func eventOf(t *testing.T, config string, pid int) event.Event {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	tap := exec.CommandContext(ctx, oomtest.Program(t, "oom-tap"), "--config", config, "--since", "1h", "--kills", "--output", "json")
	out, err := tap.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := tap.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tap.Process.Kill(); _ = tap.Wait() }()
	for lines := json.NewDecoder(out); ; {
		var e event.Event
		if err := lines.Decode(&e); err != nil {
			t.Fatalf("no event of process %d: %v", pid, err)
		}
		if int(e.Victim.PID) == pid || int(e.Victim.TID) == pid {
			return e
		}
	}
}

// metric reads one figure of the tracer's.
func metric(t *testing.T, series string) string {
	t.Helper()
	response, err := http.Get("http://127.0.0.1:9105/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	found := regexp.MustCompile(`(?m)^` + regexp.QuoteMeta(series) + ` (\S+)$`).FindSubmatch(body)
	if found == nil {
		t.Fatalf("no %s in\n%s", series, body)
	}
	return string(found[1])
}

// TestVMJournalVictim: the tracer itself is killed by the global OOM. The next one reads the kill of the one
// before from the journal, with all that the pinned hooks knew of it.
func TestVMJournalVictim(t *testing.T) {
	config := vmConfig(t, "auto")
	first := vmTracer(t, config)
	tier := regexp.MustCompile(`msg="tracing oom kills".* tier=(\w+)`).FindStringSubmatch(first.log.String())[1]
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", first.Process.Pid), []byte("1000"), 0); err != nil {
		t.Fatal(err)
	}
	hog := hogProcess(t, oomtest.New(t, cgroupfs.Unlimited), 0, "0", fmt.Sprint(tooMuch))
	if err := first.Wait(); err == nil || !strings.Contains(err.Error(), "killed") {
		t.Fatalf("the tracer ended with %v", err)
	}
	_ = hog.Wait() // the next one
	vmTracer(t, config)
	for _, pid := range []int{first.Process.Pid, hog.Process.Pid} {
		e := eventOf(t, config, pid)
		if e.Scope != event.ScopeGlobal || e.Outcome != event.OutcomeKilled || e.Node.Tier != tier || e.Limit == nil || e.Limit.Level != event.LevelNode {
			t.Errorf("%+v", e)
		}
	}
	if lost := metric(t, "oom_tracer_lost_records_total"); lost != "0" {
		t.Errorf("%s are lost", lost)
	}
	fmt.Printf("TABLE %s journal-victim ok\n", tier)
}

// TestVMJournalCounts: with hooks the kernel's count and ours are the same to the last kill, over a group of
// processes of which the kernel counts the first one twice, and over a restart. Where the hooks cannot be pinned (kprobes
// before v5.15), a kill without a tracer leaves open whether the kernel counted one twice.
func TestVMJournalCounts(t *testing.T) {
	config := vmConfig(t, "auto")
	first := vmTracer(t, config)
	root := oomtest.New(t, cgroupfs.Unlimited)
	kill := func(name string) {
		group := oomtest.Child(t, root, name, 48*mib)
		if group.Version == 2 {
			setGroupKill(t, group)
		}
		for range 10 {
			hogProcess(t, group, 0, "0", "1", "hold")
		}
		before := oomtest.Kills(t, group)
		hogProcess(t, group, 0, "1", "64")
		until(t, "the kernel kills", func() bool { return oomtest.Kills(t, group) > before })
		time.Sleep(time.Second)
	}
	exact := func(bounds ...string) {
		t.Helper()
		for _, bound := range bounds {
			if n := metric(t, "oom_tracer_unseen_kills_"+bound); n != "0" {
				t.Errorf("%s %s kills are unseen", bound, n)
			}
		}
	}
	pinned := !strings.Contains(first.log.String(), "cannot pin a hook")
	kill("with-tracer")
	exact("min", "max")
	first.kill()
	kill("without-tracer")
	vmTracer(t, config)
	exact("min")
	if pinned {
		exact("max")
	}
	for _, cause := range event.GapCauses() {
		if cause == event.GapOtherNode { // no gap of kills
			continue
		}
		if n := metric(t, `oom_tracer_gaps_total{cause="`+string(cause)+`"}`); n != "0" {
			t.Errorf("%s gaps of cause %s", n, cause)
		}
	}
}

// TestVMJournalKprobe: where hooks cannot be pinned (kprobes before v5.15), a kill that happens while no tracer
// runs is told with what the stack proves, and never with an older context.
func TestVMJournalKprobe(t *testing.T) {
	config := vmConfig(t, "kprobe")
	first := vmTracer(t, config)
	pinned := !strings.Contains(first.log.String(), "cannot pin a hook")
	group := oomtest.New(t, 8*mib)
	// At 0: this test is at -1000, and its children inherit that.
	with := hogProcess(t, group, 0, "0", "32")
	before := eventOf(t, config, with.Process.Pid)
	if before.Node.Tier != string(loader.TierKprobe) || before.Alloc == nil {
		t.Errorf("%+v", before)
	}
	first.kill()
	without := hogProcess(t, group, 0, "0", "32")
	_ = without.Wait()
	vmTracer(t, config)
	e := eventOf(t, config, without.Process.Pid)
	want := loader.TierStack
	if pinned {
		want = loader.TierKprobe
	}
	if e.Node.Tier != string(want) || (e.Alloc != nil) != pinned || e.Scope != event.ScopeCgroup || e.Outcome != event.OutcomeKilled || e.Limit == nil || e.Limit.Inferred == pinned {
		t.Errorf("hooks pinned: %t; %+v", pinned, e)
	}
	fmt.Printf("TABLE kprobe journal-unhooked ok hooks can be pinned: %t\n", pinned)
}

// TestVMJournalClock: the wall clock is set by hours and years, and every kill is told with its time, and has taken as long as
// it took.
func TestVMJournalClock(t *testing.T) {
	config := vmConfig(t, "auto")
	vmTracer(t, config)
	group := oomtest.New(t, 8*mib)
	began, start := time.Now(), boottime(t)
	clock := func(step time.Duration) {
		t.Helper()
		now := unix.NsecToTimespec(began.Add(step + boottime(t) - start).UnixNano())
		if err := unix.ClockSettime(unix.CLOCK_REALTIME, &now); err != nil {
			t.Fatal(err)
		}
	}
	defer clock(0)
	const year = 365 * 24 * time.Hour
	steps := []time.Duration{0, time.Hour, -time.Hour, year, -year, 0}
	for _, step := range steps {
		clock(step)
		hog := hogProcess(t, group, 0, "0", "32")
		_ = hog.Wait()
		killed := time.Now()
		until(t, "it is acknowledged", func() bool { return metric(t, "oom_tracer_journal_records") == "0" })
		if step != 0 {
			continue
		}
		if e := eventOf(t, config, hog.Process.Pid); killed.Sub(e.Time).Abs() > 10*time.Second {
			t.Errorf("killed at %s, the event says %s", killed, e.Time)
		}
	}
	if n := metric(t, "oom_tracer_publish_latency_seconds_count"); n != fmt.Sprint(len(steps)) {
		t.Errorf("%s of %d kills are published", n, len(steps))
	}
	if sum, err := strconv.ParseFloat(metric(t, "oom_tracer_publish_latency_seconds_sum"), 64); err != nil || sum <= 0 || sum > 300 {
		t.Errorf("they took %v s together (%v)", sum, err)
	}
}

// boottime reads CLOCK_BOOTTIME.
func boottime(t *testing.T) time.Duration {
	t.Helper()
	_, ns := now()
	return time.Duration(ns)
}
