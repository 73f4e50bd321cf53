package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// story is one run of TestChaos.
type story struct {
	seed   uint64
	kills  int
	faults []string // to choose from; none means all

	injected map[string]int
	counted  int // kills, by the kernel
	got      *ledger
	marks    int
	took     time.Duration
	failed   bool
}

func (s *story) run(t *testing.T, name string) (ok bool) {
	begun := time.Now()
	s.injected, s.got = map[string]int{}, &ledger{}
	ok = t.Run(name, s.chaos)
	s.took, s.failed = time.Since(begun), !ok
	t.Logf("seed %d: outcomes %v; %d events were stored more than once\n%s", s.seed, s.got.results, s.got.doubles, table(t, []*story{s}))
	return ok
}

// shrink tells a seed that failed again, with one half of its faults, then with half as many kills, as long as it fails.
func (s *story) shrink(t *testing.T) {
	last := &story{seed: s.seed, kills: s.kills, faults: slices.Sorted(maps.Keys(s.injected))}
	fails := func(kills int, faults []string) bool {
		one := &story{seed: s.seed, kills: kills, faults: faults}
		if one.run(t, fmt.Sprintf("again with %d kills and %s", kills, strings.Join(faults, ","))) {
			return false
		}
		last = one
		return true
	}
	for n := len(last.faults); n > 1; n = len(last.faults) {
		if half := n / 2; !fails(last.kills, last.faults[:half]) && !fails(last.kills, last.faults[half:]) {
			break
		}
	}
	for last.kills >= 100 && fails(last.kills/2, last.faults) {
	}
	t.Logf("the smallest run that failed: make chaos SEEDS=1 SEED=%d KILLS=%d FAULTS=%s", last.seed, last.kills, strings.Join(last.faults, ","))
}

// table is for people.
func table(t *testing.T, all []*story) string {
	t.Helper()
	version, err := exec.Command(oomtest.Program(t, "oom-tracer"), "--version").Output()
	if err != nil {
		t.Fatal(err)
	}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%s, Linux %s, %s, %d processors.\n\n", strings.TrimSpace(string(version)), unix.ByteSliceToString(uts.Release[:]), runtime.GOARCH, runtime.NumCPU())
	b.WriteString("| seed | kills | events | in gaps | at most more | gaps | marks | took | result | faults |\n|---|---|---|---|---|---|---|---|---|---|\n")
	for _, s := range all {
		result := map[bool]string{false: "ok", true: "FAILED"}[s.failed]
		fmt.Fprintf(&b, "| %d | %d | %d | %d | %d | %s | %d | %s | %s | %s |\n", s.seed, s.counted, len(s.got.kills), s.got.missing, s.got.maybe,
			counts(s.got.sizes()), s.marks, s.took.Round(time.Second), result, counts(s.injected))
	}
	return b.String()
}

func counts(of map[string]int) string {
	var all []string
	for _, name := range slices.Sorted(maps.Keys(of)) {
		all = append(all, fmt.Sprintf("%s %d", name, of[name]))
	}
	return strings.Join(all, ", ")
}

// How many there are of each, and how many pods may be marked.
const (
	owners, podsOfEach, replicas = 12, 3, 3
	clusterBudget                = 8
)

// newPipeline starts all parts, with so many NATS servers. change is for what else their configuration is to have.
func newPipeline(t *testing.T, seed uint64, servers int, change func(*config.Config)) *pipeline {
	t.Helper()
	leavesNothing(t)
	c := kubetest.Start(t)
	c.Node(node)
	c.Namespace("shop")
	p := &pipeline{
		t: t, c: c, random: rand.New(rand.NewPCG(seed, 0)),
		before: os.Getenv("OOM_TEST_BEFORE"), pins: filepath.Join(oomtest.BPFFS(t), "oom-tracer"), state: newDisk(t, "1m"),
		pods: map[string]*corev1.Pod{}, groups: map[string]*cgroupfs.Cgroup{},
	}
	var urls, stores []string
	for range servers {
		p.stores = append(p.stores, newDisk(t, "512m"))
		stores = append(stores, p.stores[len(p.stores)-1].dir)
	}
	p.nats = newCluster(t, stores...)
	for _, one := range p.nats {
		one.start()
		urls = append(urls, "nats://"+one.listen)
	}
	root := oomtest.New(t, 512<<20)
	prepare := func(one *program, more func(*config.Config)) *program {
		cfg, path := newConfig(t, func(cfg *config.Config) {
			cfg.NATS.URL, cfg.NATS.Stream.Replicas = p.way(one), len(p.nats)
			cfg.Node.Name, cfg.Node.CgroupRoot, cfg.Node.StateFile, cfg.Kernel.PinDir = node, root.Path(), filepath.Join(p.state.dir, "state.json"), p.pins
			cfg.Policy.InferredLimits = true // not every machine that runs the tests permits hooks
			change(cfg)
			more(cfg)
		})
		one.cfg, one.out, one.args = cfg, &oomtest.Output{}, append([]string{"--config", path}, one.args...)
		return one
	}
	kubeconfig := c.Kubeconfig(p.proxy(c.Annotator()))
	p.tracer = prepare(&program{path: oomtest.Program(t, "oom-tracer")}, func(cfg *config.Config) { cfg.Metrics.Listen = freePort(t) })
	for range replicas {
		p.replicas = append(p.replicas, prepare(&program{path: oomtest.Program(t, "oom-annotator"), args: []string{"--kubeconfig", kubeconfig}}, keep))
	}
	r := &rig{t: t, cfg: p.tracer.cfg}
	r.cfg.NATS.URL = strings.Join(urls, ",")
	r.connect()
	p.conn = r.conn
	eventually(t, "streams", func() error { return bus.EnsureStreams(t.Context(), r.conn, r.cfg.NATS.Stream) })
	for _, one := range append(p.replicas, p.tracer) {
		p.run(one)
		t.Cleanup(func() {
			_ = one.cmd.Process.Kill() // stopped, maybe
			_ = one.cmd.Wait()
			if t.Failed() {
				t.Logf("%s said, at the end:\n%s", one.path, tail(one.out.String(), 20_000))
			}
		})
	}
	p.burstable = oomtest.Child(t, oomtest.Child(t, root, "kubepods", 16<<20), "burstable", cgroupfs.Unlimited)
	for i := range owners * podsOfEach {
		p.pod(fmt.Sprint("pod-", i), fmt.Sprint("owner-", i%owners))
	}
	eventually(t, "the tracer records", func() error {
		_, err := os.Stat(filepath.Join(p.pins, "1", "oom_mark_victim"))
		return err
	})
	return p
}

// pod makes a pod and its cgroups.
func (p *pipeline) pod(name, owner string) {
	p.t.Helper()
	pod := p.c.Pod("shop", name, node, deployed(owner))
	id := p.c.ContainerID(pod, "main")
	p.pods[id] = pod
	p.groups[id] = oomtest.Child(p.t, oomtest.Child(p.t, p.burstable, "pod"+string(pod.UID), cgroupfs.Unlimited), id, cgroupfs.Unlimited)
}

func (s *story) chaos(t *testing.T) {
	p := newPipeline(t, s.seed, int(1+2*(s.seed%2)), func(cfg *config.Config) {
		cfg.NATS.Stream.DedupWindow = time.Second
		cfg.Policy.Budgets = config.Budgets{Window: time.Hour, Owner: 1, Cluster: clusterBudget}
	})
	c, pods, groups, metrics := p.c, p.pods, p.groups, p.tracer.cfg.Metrics.Listen
	ids := slices.Sorted(maps.Keys(groups))
	bystander := c.Pod("shop", "bystander", node, deployed("owner-0"))
	pods["of a pod without a kill"] = bystander
	changes := p.changes(bystander)

	ended, hog, aside := make(chan error, 1), oomtest.Program(t, "hog"), rand.New(rand.NewPCG(s.seed, 1))
	go func() {
		ended <- func() error {
			for n := 0; n < s.kills; {
				killed, err := oomtest.RunStorm(t.Context(), groups[ids[aside.IntN(len(ids))]], hog, min(1+aside.IntN(5), s.kills-n), 32, "plain")
				if err != nil {
					return err
				}
				n += len(killed)
				time.Sleep(time.Duration(aside.IntN(100)) * time.Millisecond)
			}
			return nil
		}()
	}()
	all := p.faults()
	if len(s.faults) > 0 {
		all = slices.DeleteFunc(all, func(f fault) bool { return !slices.Contains(s.faults, f.name) })
		if len(all) != len(s.faults) {
			t.Fatalf("not all of %q are faults here: nats-wiped needs an odd seed, with which there are three NATS servers, and tracer-replaced OOM_TEST_BEFORE", s.faults)
		}
	}
	for going := true; going; {
		one := all[p.random.IntN(len(all))]
		s.injected[one.name]++
		one.inject()
		p.wait(1000)
		select {
		case err := <-ended:
			if err != nil {
				t.Fatal(err)
			}
			going = false
		default:
		}
	}

	counted := 0 // by the kernel
	for _, group := range groups {
		counted += oomtest.Kills(t, group)
	}
	var got *ledger
	deadline := time.Now().Add(2 * patience)
	for ; ; time.Sleep(time.Second) {
		got = readLedger(t, p.conn)
		if len(got.kills)+got.missing+got.maybe >= counted && len(got.outcomes) >= len(got.kills) && p.unpublished(metrics) == 0 {
			break
		}
		if time.Now().After(deadline) {
			tracer := &rig{cfg: config.Config{Annotator: config.Annotator{Listen: metrics}}}
			_, text := tracer.get("/metrics")
			t.Errorf("after %v; the tracer's metrics:\n%s", 2*patience, regexp.MustCompile(`(?m)^(#|go_|process_|promhttp).*\n`).ReplaceAllString(text, ""))
			break
		}
	}
	got.check(t, pods)
	s.counted, s.got = counted, got
	if n := len(got.kills) + got.missing; n > counted || n+got.maybe < counted || counted != s.kills {
		t.Errorf("the kernel counts %d kills, the hogs %d; %d are events, %d in gaps, and at most %d more are", counted, s.kills, len(got.kills), got.missing, got.maybe)
	}
	if got.maybe > 0 && s.injected["pins-removed"]+s.injected["pins-removed-down"] == 0 {
		t.Errorf("at most %d kills are missing, although no pin was removed", got.maybe)
	}

	// What the API server has, and what it had.
	marks, changed, ofOwner := marked(t, c), changes(), map[string]int{}
	for _, pod := range pods {
		was := got.marks[string(pod.UID)]
		if marks[pod.Name] != (was == 1) || changed[pod.Name] != was {
			t.Errorf("%s is marked: %v, and was changed %d times; outcomes that say so: %d", pod.Name, marks[pod.Name], changed[pod.Name], was)
		}
		ofOwner[pod.OwnerReferences[0].Name] += changed[pod.Name]
	}
	for owner, n := range ofOwner {
		if n > 1 {
			t.Errorf("%d pods of %s were marked", n, owner)
		}
	}
	if len(changed) == 0 || len(changed) > clusterBudget {
		t.Errorf("%d pods were marked, at most %d may be", len(changed), clusterBudget)
	}
	s.marks = len(changed)

	p.end(p.tracer)
	if out, err := exec.Command(oomtest.Program(t, "oom-tracer"), append([]string{"unload"}, p.tracer.args...)...).CombinedOutput(); err != nil {
		t.Errorf("unload: %v: %s", err, out)
	}
	if _, err := os.Stat(p.pins); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after unload %s is there: %v", p.pins, err)
	}
}

// changes watches the pods from now on, past each restart of the API server. What it returns ends that, and returns how often each pod
// was changed. Where a server that has started does not know what was before, several changes of a pod count as one.
func (p *pipeline) changes(last *corev1.Pod) func() map[string]int {
	p.t.Helper()
	const end = "end"
	pods, changed, seen := p.c.Client.CoreV1().Pods(last.Namespace), map[string]int{}, map[string]string{}
	watched := func(pod *corev1.Pod) {
		if was := seen[pod.Name]; was != "" && was != pod.ResourceVersion && pod.Name != end {
			changed[pod.Name]++
		}
		seen[pod.Name] = pod.ResourceVersion
	}
	list := func(ctx context.Context) (version string, err error) {
		all, err := pods.List(ctx, metav1.ListOptions{})
		if err != nil {
			return "", err
		}
		for i := range all.Items {
			watched(&all.Items[i])
		}
		return all.ResourceVersion, nil
	}
	follow := func(ctx context.Context) error {
		version, err := list(ctx)
		if err != nil {
			return err
		}
		stream, err := pods.Watch(ctx, metav1.ListOptions{ResourceVersion: version})
		if err != nil {
			return err
		}
		defer stream.Stop()
		for e := range stream.ResultChan() {
			if pod, ok := e.Object.(*corev1.Pod); ok {
				watched(pod)
			}
		}
		return errors.New("the watch of the pods has ended")
	}
	if _, err := list(p.t.Context()); err != nil {
		p.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(p.t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil && seen[end] == "" {
			_ = follow(ctx) // the API server is away
			time.Sleep(200 * time.Millisecond)
		}
	}()
	return func() map[string]int {
		p.t.Helper()
		p.c.Pod(last.Namespace, end, node)
		time.AfterFunc(2*time.Second, cancel)
		<-done
		if seen[end] == "" {
			p.t.Error("the watch of the pods has not seen the last one")
		}
		return changed
	}
}

// leavesNothing checks, when all else has been taken down, that no process, mount or BPF program of the test is left. Cgroups
// and files that cannot be removed are errors of the helpers that made them.
func leavesNothing(t *testing.T) {
	before := present(t)
	t.Cleanup(func() {
		eventually(t, "nothing is left behind", func() error { // the kernel frees a program a moment after its last reference
			if more := slices.DeleteFunc(present(t), func(one string) bool { return slices.Contains(before, one) }); len(more) > 0 {
				return fmt.Errorf("%q", more)
			}
			return nil
		})
	})
}

func present(t *testing.T) (all []string) {
	t.Helper()
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		all = append(all, "mount "+strings.Fields(line)[4])
	}
	tasks, err := filepath.Glob("/proc/self/task/*/children")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range tasks {
		children, err := os.ReadFile(file)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for _, pid := range strings.Fields(string(children)) {
			all = append(all, "process "+pid)
		}
	}
	for id, err := ebpf.ProgramGetNextID(0); err == nil; id, err = ebpf.ProgramGetNextID(id) {
		program, err := ebpf.NewProgramFromID(id)
		if err != nil { // it has just gone
			continue
		}
		info, err := program.Info()
		program.Close()
		if err != nil {
			t.Fatal(err)
		}
		for _, prefix := range []string{"oom_", "fentry_", "kprobe_"} {
			if strings.HasPrefix(info.Name, prefix) {
				all = append(all, fmt.Sprintf("BPF program %d %s", id, info.Name))
			}
		}
	}
	return all
}
