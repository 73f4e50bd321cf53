//go:build soak

package main

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// bounds are what a figure may grow by in a day.
var bounds = map[string]float64{
	heap:         16, // RssAnon: without what the kernel can drop, text and files
	stored:       16, // of a stream
	"goroutines": 24,
	"open files": 24,
	"pins":       1,
}

const (
	heap   = "memory, MiB"
	stored = "disk, MiB"
	// Heaps and streams fill in a shorter run. It shows that they can be measured, and judges the others.
	fills = 30 * time.Minute
)

// target is a process to sample.
type target struct {
	name   string
	pid    int
	listen string // its metrics
	begun  time.Duration
}

// soak samples all programs while they run.
type soak struct {
	begin   time.Time
	targets atomic.Pointer[[]target] // those that run
	pins    string                   // the directory
	store   string                   // JetStream's
	warmUp  time.Duration            // of each process
	mu      sync.Mutex
	samples map[[2]string][]sample // by program and figure
}

func (s *soak) add(program, figure string, at time.Duration, run int, value float64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	key := [2]string{program, figure}
	s.samples[key] = append(s.samples[key], sample{at, run, value})
}

// run samples until the context ends. What cannot be read now, for its process is stopped or away, has no sample.
func (s *soak) run(ctx context.Context) {
	client := &http.Client{Timeout: time.Second}
	for ; ctx.Err() == nil; time.Sleep(3 * time.Second) {
		at := time.Since(s.begin)
		for _, one := range *s.targets.Load() {
			if at-one.begun < s.warmUp {
				continue
			}
			for _, line := range strings.Split(readAll(fmt.Sprintf("/proc/%d/status", one.pid)), "\n") {
				if after, ok := strings.CutPrefix(line, "RssAnon:"); ok {
					kib, _ := strconv.ParseFloat(strings.Fields(after)[0], 64)
					s.add(one.name, heap, at, one.pid, kib/1024)
				}
			}
			if fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", one.pid)); err == nil {
				s.add(one.name, "open files", at, one.pid, float64(len(fds)))
			}
			if n, ok := goroutines(ctx, client, one.listen); ok {
				s.add(one.name, "goroutines", at, one.pid, n)
			}
		}
		if at < s.warmUp {
			continue
		}
		pins := 0
		if err := filepath.WalkDir(s.pins, func(_ string, entry fs.DirEntry, err error) error {
			if err == nil && !entry.IsDir() {
				pins++
			}
			return ignoreGone(err)
		}); err == nil {
			s.add("oom-tracer", "pins", at, 0, float64(pins))
		}
		streams, _ := filepath.Glob(filepath.Join(s.store, "jetstream", "*", "streams", "*"))
		for _, stream := range streams {
			if bytes, err := used(stream); err == nil {
				s.add("nats-server, stream "+filepath.Base(stream), stored, at, 0, float64(bytes)/(1<<20))
			}
		}
	}
}

func readAll(path string) string {
	data, _ := os.ReadFile(path)
	return string(data)
}

var goroutinesLine = regexp.MustCompile(`(?m)^go_goroutines (\d+)$`)

func goroutines(ctx context.Context, client *http.Client, listen string) (float64, bool) {
	if listen == "" {
		return 0, false
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+listen+"/metrics", nil)
	if err != nil {
		return 0, false
	}
	response, err := client.Do(request)
	if err != nil {
		return 0, false
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	m := goroutinesLine.FindSubmatch(body)
	if err != nil || m == nil {
		return 0, false
	}
	n, err := strconv.ParseFloat(string(m[1]), 64)
	return n, err == nil
}

// used is what the files below a directory take on the disk, in bytes.
func used(dir string) (bytes int64, err error) {
	err = filepath.WalkDir(dir, func(_ string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return ignoreGone(err)
		}
		info, err := entry.Info()
		if err == nil {
			bytes += info.Sys().(*syscall.Stat_t).Blocks * 512
		}
		return ignoreGone(err)
	})
	return bytes, err
}

func ignoreGone(err error) error {
	if os.IsNotExist(err) {
		return nil
	}
	return err
}

// TestSoak runs all parts for OOM_TEST_MINUTES, with kills, restarts, faults and pods that are replaced all the time, and fits what their
// processes hold.
func TestSoak(t *testing.T) {
	minutes, err := strconv.ParseFloat(cmp.Or(os.Getenv("OOM_TEST_MINUTES"), "120"), 64)
	if err != nil || minutes < 4 {
		t.Fatalf("OOM_TEST_MINUTES: at least 4, not %q", os.Getenv("OOM_TEST_MINUTES"))
	}
	long := time.Duration(minutes * float64(time.Minute))
	seed := rand.Uint64()
	p := newPipeline(t, seed, 1, func(cfg *config.Config) {
		// It is full before the warm-up ends: then it must not grow.
		cfg.NATS.Stream.MaxBytes = 1 << 20
		cfg.Policy.Budgets = config.Budgets{Window: time.Minute, Cluster: 1000}
		cfg.Log.Level = "error"
	})
	s := &soak{begin: time.Now(), pins: p.pins, store: p.nats[0].store, warmUp: min(10*time.Minute, long/6), samples: map[[2]string][]sample{}}
	// One annotator is never ended, or a slow leak would go with its process each time.
	steady := p.replicas[0]
	p.replicas = p.replicas[1:]
	begun := map[int]time.Duration{}
	look := func() {
		var targets []target
		add := func(name, listen string, pid int) {
			if _, ok := begun[pid]; !ok {
				begun[pid] = time.Since(s.begin)
			}
			targets = append(targets, target{name, pid, listen, begun[pid]})
		}
		add("oom-tracer", p.tracer.cfg.Metrics.Listen, p.tracer.cmd.Process.Pid)
		add("oom-annotator, never ended", steady.cfg.Annotator.Listen, steady.cmd.Process.Pid)
		for i, one := range p.replicas {
			add(fmt.Sprint("oom-annotator ", i+2), one.cfg.Annotator.Listen, one.cmd.Process.Pid)
		}
		add("nats-server", "", p.nats[0].cmd.Process.Pid)
		s.targets.Store(&targets)
	}
	look()
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { s.run(ctx) })

	var mu sync.Mutex // of the pods: none is replaced while it is killed
	var kills atomic.Int64
	hog, aside := oomtest.Program(t, "hog"), rand.New(rand.NewPCG(seed, 1))
	running.Go(func() {
		for ctx.Err() == nil {
			mu.Lock()
			ids := slices.Sorted(maps.Keys(p.groups))
			killed, err := oomtest.RunStorm(ctx, p.groups[ids[aside.IntN(len(ids))]], hog, 1+aside.IntN(5), 32, "plain")
			mu.Unlock()
			if err != nil && ctx.Err() == nil {
				t.Error(err)
				return
			}
			kills.Add(int64(len(killed)))
			time.Sleep(time.Duration(200+aside.IntN(400)) * time.Millisecond)
		}
	})
	t.Cleanup(func() { // also after a failure
		cancel()
		running.Wait()
	})

	// After one of these a process is another one, with a heap to fill: they come in turn, and seldom.
	var ending, passing []fault
	for _, f := range p.faults() {
		_, how, _ := strings.Cut(f.name, "-")
		if slices.Contains([]string{"stopped", "cut", "slow", "refuses"}, how) {
			passing = append(passing, f)
		} else {
			ending = append(ending, f)
		}
	}
	injected := map[string]int{}
	roll := long / 12
	for i, nextRoll := 0, roll; time.Since(s.begin) < long; i++ {
		one := passing[p.random.IntN(len(passing))]
		if time.Since(s.begin) > nextRoll {
			one, nextRoll = ending[int(nextRoll/roll-1)%len(ending)], nextRoll+roll
		}
		one.inject()
		injected[one.name]++
		look()
		p.wait(5000)
		mu.Lock()
		p.replace(i)
		mu.Unlock()
		injected["pod replaced"]++
	}
	cancel()
	running.Wait()
	s.report(t, p, long, fmt.Sprintf("seed %d, %d kills, %v", seed, kills.Load(), injected))
}

// replace deletes a pod, as an eviction does, and makes the next one of its owner.
func (p *pipeline) replace(i int) {
	p.t.Helper()
	ids := slices.Sorted(maps.Keys(p.pods))
	id := ids[i%len(ids)]
	pod, group := p.pods[id], p.groups[id]
	p.c.DeletePod(pod.Namespace, pod.Name)
	delete(p.pods, id)
	delete(p.groups, id)
	above := *group
	above.Dir = filepath.Dir(above.Dir)
	for _, one := range []interface{ Remove() error }{group, &above} {
		if err := one.Remove(); err != nil {
			p.t.Error(err)
		}
	}
	p.pod(fmt.Sprint("next-", i), strings.TrimSuffix(pod.OwnerReferences[0].Name, "-5d4f"))
}

// report writes the table, and fails the test for each figure that grows.
func (s *soak) report(t *testing.T, p *pipeline, long time.Duration, what string) {
	t.Helper()
	var kernel unix.Utsname
	_ = unix.Uname(&kernel)
	var text strings.Builder
	fmt.Fprintf(&text, "# Soak\n\n%v on Linux %s, %d processors, OOM Tracer %s: %s.\n\n", long.Round(time.Second), unix.ByteSliceToString(kernel.Release[:]), runtime.NumCPU(), os.Getenv("OOM_TEST_VERSION"), what)
	fmt.Fprintf(&text, "The slope is fitted by least squares to all processes of a program, each without its first %v, by means of %v; ± is three standard errors.\n"+
		"A figure that grows by more than the bound, less the ±, fails.\n\n", s.warmUp, long/24)
	fmt.Fprint(&text, "| program | figure | processes | samples | least | median | most | growth in 24 h | bound | |\n|---|---|---|---|---|---|---|---|---|---|\n")
	for _, key := range slices.SortedFunc(maps.Keys(s.samples), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		samples := s.samples[key]
		values, runs := []float64{}, map[int]bool{}
		for _, one := range samples {
			values = append(values, one.value)
			runs[one.run] = true
		}
		slices.Sort(values)
		growth, verdict := "too short to tell", ""
		if got, ok := fit(samples, long/24); ok {
			growth, verdict = fmt.Sprintf("%+.1f ± %.1f", got.perDay, 3*got.deviation), "flat"
			switch {
			case long < fills && (key[1] == heap || key[1] == stored):
				verdict = "short run: not judged"
			case got.beyond(bounds[key[1]]):
				verdict = "**grows**"
				t.Errorf("%s: %s grow by %s in 24 h, more than %v", key[0], key[1], growth, bounds[key[1]])
			}
		}
		fmt.Fprintf(&text, "| %s | %s | %d | %d | %.1f | %.1f | %.1f | %s | %v | %s |\n", key[0], key[1], len(runs), len(samples),
			values[0], values[len(values)/2], values[len(values)-1], growth, bounds[key[1]], verdict)
	}
	// A figure that is never sampled does not grow.
	for _, want := range [][2]string{{"oom-tracer", heap}, {"oom-tracer", "goroutines"}, {"oom-tracer", "open files"}, {"oom-tracer", "pins"}, {"oom-annotator, never ended", "goroutines"}, {"nats-server", heap}, {"nats-server, stream " + event.StreamName, stored}} {
		if len(s.samples[want]) < 10 {
			t.Errorf("%s: %d samples of %s", want[0], len(s.samples[want]), want[1])
		}
	}
	fmt.Println(text.String())
	if err := os.WriteFile(filepath.Join(os.Getenv("OOM_TEST_BUILD"), "soak.md"), []byte(text.String()), 0o644); err != nil {
		t.Error(err)
	}
}
