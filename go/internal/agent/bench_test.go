//go:build bench

package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/cilium/ebpf"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
	"github.com/oom-tracer/oom-tracer/go/internal/wire"
)

const (
	benchKills = 1000
	benchIdle  = 60 * time.Second
)

// figures is what a run measured. Durations are in nanoseconds.
type figures struct {
	Kernel          string    `json:"kernel"`
	Kills           int       `json:"kills"`
	Refused         uint64    `json:"samples_refused"`
	CaughtUp        uint64    `json:"samples_read_from_the_journal"`
	KillsPerSecond  float64   `json:"kills_per_second"`
	KillsPerSecond0 float64   `json:"kills_per_second_untraced"`
	BPFPerKillNS    float64   `json:"bpf_ns_per_kill"`
	SampleBytes     float64   `json:"bytes_per_sample"`
	Handed          quantiles `json:"kernel_to_go_ns"`
	Acked           quantiles `json:"kernel_to_acked_ns"`
	IdleSeconds     float64   `json:"idle_seconds"`
	IdleCPUSeconds  float64   `json:"idle_cpu_seconds"`
	IdleRSS         int       `json:"idle_rss_bytes"`
	IdleAnon        uint64    `json:"idle_anon_bytes"`   // of its cgroup
	IdleKernel      uint64    `json:"idle_kernel_bytes"` // of its cgroup
	StormSeconds    float64   `json:"storm_seconds"`
	StormCPUSeconds float64   `json:"storm_cpu_seconds"`
	StormRSS        int       `json:"storm_rss_bytes"`
	StormPeakRSS    uint64    `json:"storm_peak_rss_bytes"`
}

type quantiles struct {
	P50 time.Duration `json:"p50"`
	P99 time.Duration `json:"p99"`
	Max time.Duration `json:"max"`
}

func quantilesOf(d []time.Duration) quantiles {
	slices.Sort(d)
	return quantiles{d[len(d)/2], d[len(d)*99/100], d[len(d)-1]}
}

// TestBench measures and prints; it fails only when it could not measure.
func TestBench(t *testing.T) {
	var f figures
	self, err := thisNode(testNode)
	if err != nil {
		t.Fatal(err)
	}
	f.Kernel, f.Kills = self.Kernel, benchKills
	root := oomtest.New(t, cgroupfs.Unlimited)
	group := oomtest.Child(t, root, "victims", 8*mib)
	storm := func() time.Duration {
		begun := time.Now()
		if killed := oomtest.Storm(t, group, benchKills, 16, "plain"); len(killed) != benchKills {
			t.Fatalf("%d of %d were killed", len(killed), benchKills)
		}
		return time.Since(begun)
	}
	f.KillsPerSecond0 = benchKills / storm().Seconds()
	benchPipeline(t, &f, storm)
	benchProcess(t, &f, oomtest.Child(t, root, "tracer", cgroupfs.Unlimited), storm)

	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(table, "%s\t%s\n", name, fmt.Sprintf(format, args...))
	}
	row("kernel", "%s", f.Kernel)
	row("kills", "%d, notifications refused %d, records read without one %d, %.0f bytes a record", f.Kills, f.Refused, f.CaughtUp, f.SampleBytes)
	row("kernel -> handed to Go", "p50 %s  p99 %s  max %s", f.Handed.P50, f.Handed.P99, f.Handed.Max)
	row("kernel -> acked by JetStream", "p50 %s  p99 %s  max %s", f.Acked.P50, f.Acked.P99, f.Acked.Max)
	row("kills a second", "%.0f; untraced %.0f, ratio %.2f", f.KillsPerSecond, f.KillsPerSecond0, f.KillsPerSecond/f.KillsPerSecond0)
	row("in BPF", "%.0f ns a kill", f.BPFPerKillNS)
	row("idle", "%.2f CPU seconds in %.0f s, RSS %.1f MiB; its cgroup: anon %.1f MiB, kernel %.1f MiB",
		f.IdleCPUSeconds, f.IdleSeconds, float64(f.IdleRSS)/mib, float64(f.IdleAnon)/mib, float64(f.IdleKernel)/mib)
	row("under storm", "%.2f CPU seconds in %.1f s, RSS %.1f MiB, peak %.1f MiB", f.StormCPUSeconds, f.StormSeconds, float64(f.StormRSS)/mib, float64(f.StormPeakRSS)/mib)
	if err := table.Flush(); err != nil {
		t.Fatal(err)
	}
	data, err := json.MarshalIndent(&f, "", "  ")
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(os.Getenv("OOM_TEST_BUILD"), "bench.json")
	if err := os.WriteFile(file, append(data, '\n'), 0o644); err != nil {
		t.Fatal(err)
	}
	fmt.Printf("as JSON in %s:\n%s\n", file, data)
}

// benchPipeline runs the tracer's own parts in this process, so that each hand-over can be timed.
func benchPipeline(t *testing.T, f *figures, storm func() time.Duration) {
	// The kernel stops counting when the descriptor is closed, however this process ends.
	stats, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		t.Fatal(err)
	}
	defer stats.Close()
	tr, err := start(t.Context(), testConfig(t), testNode, io.Discard, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	var mu sync.Mutex
	var handed, acked []time.Duration
	var sampleBytes, samples int
	since := func(boottime uint64) time.Duration {
		_, boot := now()
		return time.Duration(boot - boottime)
	}
	hooks := tr.hooks()
	onAck := hooks.OnAck
	born := map[string]uint64{}
	hooks.OnAck = func(m bus.Msg, duplicate bool) {
		mu.Lock()
		acked = append(acked, since(born[m.ID]))
		mu.Unlock()
		onAck(m, duplicate)
	}
	if tr.publisher, err = bus.NewPublisher(tr.conn, 10*benchKills, hooks, tr.log); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	published := make(chan error, 1)
	go func() { published <- tr.publisher.Run(t.Context()) }()
	read := make(chan error, 1)
	go func() {
		read <- tr.loader.Run(ctx, loader.Handler{Lost: tr.lost, Record: func(seq uint64, sample []byte) bool {
			r, err := wire.Decode(sample)
			if err != nil {
				t.Error(err)
				return true
			}
			handed = append(handed, since(r.BoottimeNS))
			sampleBytes += int(r.Size)
			samples++
			mu.Lock()
			born[tr.converter.Event(r).ID] = r.BoottimeNS
			mu.Unlock()
			return tr.record(seq, sample)
		}})
	}()
	took := storm()
	f.BPFPerKillNS = bpfPerRun(t, "oom_mark_victim")
	cancel()
	if err := <-read; err != nil {
		t.Error(err)
	}
	draining, done := context.WithTimeout(t.Context(), 30*time.Second)
	defer done()
	if left, err := tr.publisher.Drain(draining); left > 0 {
		t.Errorf("%d events left: %v", left, err)
	}
	if err := <-published; err != nil {
		t.Error(err)
	}
	counts, err := tr.loader.Stats()
	if err != nil {
		t.Fatal(err)
	}
	if err := tr.close(time.Now().Add(stopTime)); err != nil {
		t.Error(err)
	}
	if counts.Seen != benchKills || len(handed) != benchKills || len(acked) != len(handed) {
		t.Fatalf("%+v, %d handed over, %d acked", counts, len(handed), len(acked))
	}
	f.Refused, f.CaughtUp = counts.Refused, tr.loader.CaughtUp()
	f.KillsPerSecond = benchKills / took.Seconds()
	f.SampleBytes = float64(sampleBytes) / float64(samples)
	f.Handed, f.Acked = quantilesOf(handed), quantilesOf(acked)
}

// benchProcess runs the real binary, idle and under storm.
func benchProcess(t *testing.T, f *figures, group *cgroupfs.Cgroup, storm func() time.Duration) {
	cfg := pinnedConfig(t) // as it ships
	cfg.Metrics.Listen = oomtest.FreeAddr(t)
	// It begins in its cgroup, where all its memory is charged.
	tracer := exec.Command("sh", "-c", `echo $$ >"$0" && exec "$@"`, filepath.Join(group.Dir, "cgroup.procs"),
		oomtest.Program(t, "oom-tracer"), "--config", oomtest.WriteConfig(t, cfg), "--node-name", testNode)
	tracer.Stderr = t.Output()
	if err := tracer.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = tracer.Process.Kill()
		_ = tracer.Wait()
	}()
	for deadline := time.Now().Add(20 * time.Second); !obs.TracerRuns(t.Context(), cfg.Metrics.Listen); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the tracer does not come up")
		}
	}
	usage := func() (cpu float64, rss int, peak uint64) {
		p, err := procfs.NewProc(tracer.Process.Pid)
		if err != nil {
			t.Fatal(err)
		}
		s, err := p.Stat()
		if err != nil {
			t.Fatal(err)
		}
		st, err := p.NewStatus()
		if err != nil {
			t.Fatal(err)
		}
		return s.CPUTime(), s.ResidentMemory(), st.VmHWM
	}
	before, _, _ := usage()
	time.Sleep(benchIdle)
	after, rss, _ := usage()
	f.IdleSeconds, f.IdleCPUSeconds, f.IdleRSS = benchIdle.Seconds(), after-before, rss
	f.IdleAnon, f.IdleKernel = charged(t, group)

	took := storm()
	time.Sleep(time.Second) // the last acknowledgements
	stormed, rss, peak := usage()
	f.StormSeconds, f.StormCPUSeconds, f.StormRSS, f.StormPeakRSS = took.Seconds(), stormed-after, rss, peak
	if err := tracer.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := tracer.Wait(); err != nil {
		t.Error(err)
	}
}

// charged is the anonymous and the kernel memory that is charged to a cgroup, in bytes. Before Linux 5.18 memory.stat of cgroup v2 has
// no kernel.
func charged(t *testing.T, group *cgroupfs.Cgroup) (anon, kernel uint64) {
	stat, err := os.ReadFile(filepath.Join(group.Dir, "memory.stat"))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(stat)) {
		var name string
		var bytes uint64
		if _, err := fmt.Sscan(line, &name, &bytes); err != nil {
			t.Fatalf("%s: %v", line, err)
		}
		switch name {
		case "anon", "total_rss":
			anon = bytes
		case "kernel":
			kernel = bytes
		}
	}
	if data, err := os.ReadFile(filepath.Join(group.Dir, "memory.kmem.usage_in_bytes")); err == nil { // v1
		if _, err := fmt.Sscan(string(data), &kernel); err != nil {
			t.Fatal(err)
		}
	}
	return anon, kernel
}
