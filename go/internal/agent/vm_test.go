//go:build vm

package agent

// The tests that run inside a virtual machine, as its first process's only child: tools/vm/test-vm.sh
// builds them into an initramfs. They may run the machine out of memory.
//
// Expected values come from the kernel's console and from what a scenario arranged, never from our own
// code.

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/kmsg"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
	"github.com/oom-tracer/oom-tracer/go/internal/wire"
)

// tooMuch is more than the machine has, in MiB.
const tooMuch = 4096

// observer collects events with one tier.
type observer struct {
	tier    loader.Tier
	task    bool // the tracepoint hands over the task
	stats   func() (loader.Stats, error)
	mu      sync.Mutex
	events  []event.Event
	console *kmsg.Reader
	stop    func()
}

// observe loads the program with a tier; nil, and why, where this kernel does not have it.
func observe(t *testing.T, tier loader.Tier) (*observer, error) {
	t.Helper()
	l, err := loader.Open(t.Context(), loader.Options{Tier: tier, JournalSize: 2 << 20, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		return nil, err
	}
	self, err := thisNode("vm")
	if err != nil {
		t.Fatal(err)
	}
	c := wire.Converter{Node: self, CgroupRoot: "/", PageSize: uint64(os.Getpagesize()), GFPFlags: loader.GFPFlags(), Now: now}
	o := &observer{tier: tier, task: l.Prototype() == loader.PrototypeTask, stats: l.Stats}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- l.Run(ctx, loader.Handler{
			Record: func(_ uint64, sample []byte) bool {
				r, err := wire.Decode(sample)
				if err != nil {
					t.Error(err)
					return true
				}
				o.mu.Lock()
				defer o.mu.Unlock()
				o.events = append(o.events, c.Event(r))
				return true
			},
			Lost: func(first, last uint64, _ bool) bool {
				t.Errorf("records %d to %d are lost", first, last)
				return true
			},
		})
	}()
	o.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		l.Close()
	})
	t.Cleanup(o.stop)
	return o, nil
}

// begin forgets what was, for the next scenario.
func (o *observer) begin(t *testing.T) {
	t.Helper()
	console, err := kmsg.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { console.Close() })
	o.mu.Lock()
	defer o.mu.Unlock()
	o.events, o.console = nil, console
}

// take waits until there are n events and the console has printed killed kills, gives stragglers a moment,
// and returns both. Doubles on the console (the first victim of a group) are dropped.
func (o *observer) take(t *testing.T, events, killed int) ([]event.Event, []kmsg.Kill) {
	t.Helper()
	printed := func() (kills []kmsg.Kill) {
		all, err := o.console.Read(func([]kmsg.Kill) bool { return true }, 0)
		if err != nil {
			t.Fatal(err)
		}
		for _, k := range all {
			if !slices.ContainsFunc(kills, func(other kmsg.Kill) bool { return other.PID == k.PID }) {
				kills = append(kills, k)
			}
		}
		return kills
	}
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		o.mu.Lock()
		n := len(o.events)
		o.mu.Unlock()
		if n >= events && len(printed()) >= killed || time.Now().After(deadline) {
			break
		}
	}
	time.Sleep(500 * time.Millisecond) // one too many would come now
	o.mu.Lock()
	seen := slices.Clone(o.events)
	o.mu.Unlock()
	// The console last: its line of a kill comes after the event's record.
	time.Sleep(200 * time.Millisecond)
	return seen, printed()
}

// truth is what a scenario knows beside the console.
type truth struct {
	scope   event.Scope
	trigger string // its comm
	limit   event.LimitLevel
	victim  int  // the process; 0: as the console says
	tid     bool // the marked thread is not the leader
	mixed   *mixedVictim
}

// mixedVictim is what is known beforehand of a hog that is the only process of its cgroup and so asks for the
// memory itself.
type mixedVictim struct {
	pid   int
	start uint64 // field 22 of /proc/PID/stat
	group *cgroupfs.Cgroup
}

// The hog's, in its mode "mixed". The console must say the same.
const (
	mixedUID  = 1234
	mixedAdj  = 100
	mixedFile = 4 * mib // its shared memory is twice as much
)

// hooked reports whether a tier knows what struct oom_control says.
func hooked(tier loader.Tier) bool { return tier == loader.TierFentry || tier == loader.TierKprobe }

// compareKill lists what of an event is not what the console and the scenario say.
func (o *observer) compareKill(e *event.Event, k *kmsg.Kill, want truth) []string {
	var wrong []string
	check := func(field string, got, want any) {
		if got != want {
			wrong = append(wrong, fmt.Sprintf("%s: %v, want %v", field, got, want))
		}
	}
	near := func(field string, got, want uint64) {
		if max(got, want)-min(got, want) > rssSlack() {
			wrong = append(wrong, fmt.Sprintf("%s: %d, want %d", field, got, want))
		}
	}
	check("victim.tid", int(e.Victim.TID), k.PID)
	check("node.tier", e.Node.Tier, string(o.tier))
	if o.tier == loader.TierNone {
		check("scope", e.Scope, event.ScopeUnknown)
		check("outcome", e.Outcome, event.OutcomeUnknown)
		check("limit", e.Limit == nil, true)
		check("incident", e.Incident == nil, true)
	} else {
		check("scope", e.Scope, want.scope)
		check("outcome", e.Outcome, event.OutcomeKilled)
		if want.scope != event.ScopeUnknown {
			check("incident is there", e.Incident != nil, true)
		}
	}
	check("alloc is there", e.Alloc != nil, hooked(o.tier))
	if want.trigger != "" && e.Trigger != nil {
		if strings.HasSuffix(want.trigger, "*") {
			check("trigger.comm", strings.HasPrefix(e.Trigger.Comm, strings.TrimSuffix(want.trigger, "*")), true)
		} else {
			check("trigger.comm", e.Trigger.Comm, want.trigger)
		}
	}
	if k.TriggerComm != "" {
		check("trigger.comm against the console", e.Trigger.Comm, k.TriggerComm)
		if e.Alloc != nil {
			check("alloc.gfp_mask", e.Alloc.GFPMask, k.GFPMask)
			check("alloc.order", e.Alloc.Order, k.Order)
			check("alloc.total_pages is there", e.Alloc.TotalPages > 0, true)
		}
	}
	if k.Constraint != "" && o.tier != loader.TierNone && want.scope != event.ScopeSysrq && want.scope != event.ScopeUnknown {
		check("scope against the console", e.Scope, map[string]event.Scope{
			"CONSTRAINT_NONE": event.ScopeGlobal, "CONSTRAINT_MEMCG": event.ScopeCgroup,
			"CONSTRAINT_CPUSET": event.ScopeCpuset, "CONSTRAINT_MEMORY_POLICY": event.ScopeMempolicy,
		}[k.Constraint])
	}
	if l := e.Limit; l != nil {
		if want.limit != "" {
			check("limit.level", l.Level, want.limit)
		}
		if want.scope == event.ScopeCgroup {
			check("limit.inferred", l.Inferred, !hooked(o.tier))
			if l.Cgroup == nil {
				return append(wrong, "limit.cgroup is absent")
			}
			if k.OOMMemcg != "" {
				wrong = append(wrong, wrongCgroup("limit.cgroup", l.Cgroup, k.OOMMemcg)...)
			}
			var max string
			if data, err := os.ReadFile(limitFile(l.Cgroup.Path)); err == nil {
				max = strings.TrimSpace(string(data))
				check("limit.max", fmt.Sprint(*l.Max), max)
			}
		}
	} else if want.scope == event.ScopeCgroup && o.tier != loader.TierNone {
		wrong = append(wrong, "limit is absent")
	}
	if e.Victim.PID == 0 {
		// Only where the kernel hands over no task, no hook does, and the victim is not the trigger.
		if o.task || hooked(o.tier) || e.Trigger.TID == e.Victim.TID || e.Trigger.PID == e.Victim.TID {
			wrong = append(wrong, "victim.pid is absent")
		}
		return wrong
	}
	if want.victim != 0 {
		check("victim.pid", int(e.Victim.PID), want.victim)
	} else if !want.tid {
		check("victim.pid", int(e.Victim.PID), k.PID)
	}
	if want.tid {
		check("victim.pid is not its tid", e.Victim.PID != e.Victim.TID, true)
	}
	if m := want.mixed; m != nil {
		// What is wanted of the event must be far from nothing, or a field that is never read would do.
		check("console's uid", k.UID, uint32(mixedUID))
		check("console's oom_score_adj", k.OOMScoreAdj, int16(mixedAdj))
		check("console's file_rss is enough", k.FileRSS+rssSlack() >= mixedFile, true)
		check("console's shmem_rss is enough", k.ShmemRSS+2*rssSlack() >= k.FileRSS+mixedFile, true)
		check("victim.pid", int(e.Victim.PID), m.pid)
		// USER_HZ is 100.
		check("victim.start_boottime_ns in ticks", e.Victim.StartBoottimeNS/1e7, m.start)
		check("trigger.pid", int(e.Trigger.PID), m.pid)
		check("trigger.tid", int(e.Trigger.TID), m.pid)
		wrong = append(wrong, wrongCgroup("victim.cgroup", e.Victim.Cgroup, m.group.Path())...)
		wrong = append(wrong, wrongCgroup("trigger.cgroup", e.Trigger.Cgroup, m.group.Path())...)
	}
	check("victim.comm", e.Victim.Comm, k.Comm)
	check("victim.uid", *e.Victim.UID, k.UID)
	check("victim.oom_score_adj", *e.Victim.OOMScoreAdj, k.OOMScoreAdj)
	if k.TaskMemcg != "" {
		memcg := e.Victim.Cgroup
		if e.Victim.Memcg != nil {
			memcg = e.Victim.Memcg
		}
		wrong = append(wrong, wrongCgroup("victim.memcg", memcg, k.TaskMemcg)...)
	}
	m := e.Victim.Memory
	if m == nil {
		return append(wrong, "victim.memory is absent")
	}
	check("victim.memory.total_vm", m.TotalVM, k.TotalVM)
	check("victim.memory.pgtables", m.PgTables, k.PgTables)
	near("victim.memory.anon_rss", m.AnonRSS, k.AnonRSS)
	near("victim.memory.file_rss", m.FileRSS, k.FileRSS)
	near("victim.memory.shmem_rss", m.ShmemRSS, k.ShmemRSS)
	return wrong
}

// wrongCgroup compares a cgroup with the directory that is at a path of the memory controller's hierarchy.
func wrongCgroup(field string, c *event.Cgroup, path string) []string {
	h, err := cgroupfs.Find("/proc")
	if err != nil {
		return []string{err.Error()}
	}
	if c == nil {
		return []string{field + " is absent"}
	}
	var wrong []string
	if c.Path != path || c.Version != h.Version || c.Truncated {
		wrong = append(wrong, fmt.Sprintf("%s.path: %+v, want %s", field, *c, path))
	}
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(h.Mount, path), &st); err != nil {
		return append(wrong, fmt.Sprintf("%s.id: %v", field, err))
	}
	if c.ID != st.Ino {
		wrong = append(wrong, fmt.Sprintf("%s.id: %d, want %d", field, c.ID, st.Ino))
	}
	return wrong
}

// limitFile is where the kernel says a memory cgroup's limit.
func limitFile(path string) string {
	h, err := cgroupfs.Find("/proc")
	if err != nil {
		return ""
	}
	return filepath.Join(h.Mount, path, map[int]string{1: "memory.limit_in_bytes", 2: "memory.max"}[h.Version])
}

// missedKprobes is how often the kernel itself counts that it has left out a kprobe of this tracer. It does where
// the CPU is inside of a bpf(2) call on a map, this tracer's own reader's for one, that was preempted
// (bpf_prog_active in trace_call_bpf()). It counts them since Linux 6.7.
func missedKprobes(t *testing.T) (n uint64) {
	t.Helper()
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			return n
		}
		if err != nil {
			t.Fatal(err)
		}
		id = next
		program, err := ebpf.NewProgramFromID(id)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			t.Fatal(err)
		}
		info, infoErr := program.Info()
		stats, statsErr := program.Stats()
		program.Close()
		if err := errors.Join(infoErr, statsErr); err != nil {
			t.Fatal(err)
		}
		if strings.HasPrefix(info.Name, "kprobe_") {
			n += stats.RecursionMisses
		}
	}
}

// as judges events by what another tier knows.
func (o *observer) as(tier loader.Tier) *observer { return &observer{tier: tier, task: o.task} }

// expect holds events against the console, kill by kill: none missing, none too many, none wrong.
func (o *observer) expect(t *testing.T, n int, want truth) []event.Event {
	t.Helper()
	events, kills := o.take(t, n, n)
	if len(kills) != n {
		t.Errorf("the console tells of %d kills, the scenario wanted %d", len(kills), n)
	}
	if len(events) != len(kills) {
		t.Errorf("%d events of %d kills", len(events), len(kills))
	}
	// A group has one header, above its first. Without it much would not be compared. (It names the process
	// that was chosen, and cannot be told to belong to a line that names another of its threads.)
	if len(kills) > 0 && !want.tid && (kills[0].Constraint == "" || kills[0].TriggerComm == "") {
		t.Errorf("the console does not say why: %+v", kills[0])
	}
	for i := range kills {
		at := slices.IndexFunc(events, func(e event.Event) bool { return int(e.Victim.TID) == kills[i].PID })
		if at < 0 {
			t.Errorf("no event of process %d (%s)", kills[i].PID, kills[i].Comm)
			continue
		}
		judge := o
		if o.tier == loader.TierKprobe && events[at].Node.Tier == string(loader.TierStack) {
			if n := missedKprobes(t); n > 0 {
				t.Logf("the kernel has missed kprobes %d times: the event must be right by the stack", n)
				judge = o.as(loader.TierStack)
			}
		}
		for _, w := range judge.compareKill(&events[at], &kills[i], want) {
			t.Errorf("%s[%d]: %s", kills[i].Comm, kills[i].PID, w)
		}
	}
	return events
}

// hogProcess runs tools/hog in a cgroup and returns once it was told to begin.
func hogProcess(t *testing.T, group *cgroupfs.Cgroup, adj int, args ...string) *exec.Cmd {
	t.Helper()
	hog, begin := waitingHog(t, oomtest.Program(t, "hog"), group, adj, args...)
	begin()
	return hog
}

// mixedHog runs tools/hog in its mode "mixed".
func mixedHog(t *testing.T, group *cgroupfs.Cgroup, size int) *mixedVictim {
	t.Helper()
	file := filepath.Join("/ramfs", "mixed")
	if err := os.WriteFile(file, make([]byte, mixedFile), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(file) })
	hog, begin := waitingHog(t, oomtest.Program(t, "hog"), group, mixedAdj, "0", fmt.Sprint(size), "mixed", file)
	process, err := procfs.NewProc(hog.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	stat, err := process.Stat()
	if err != nil {
		t.Fatal(err)
	}
	begin()
	return &mixedVictim{hog.Process.Pid, stat.Starttime, group}
}

// waitingHog runs tools/hog, under whatever name, in a cgroup; it begins when it is told to. What it prints
// goes to a file.
func waitingHog(t *testing.T, program string, group *cgroupfs.Cgroup, adj int, args ...string) (_ *exec.Cmd, begin func()) {
	t.Helper()
	hog := exec.Command(program, args...)
	stdout, err := os.Create(filepath.Join(t.TempDir(), "stdout"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { stdout.Close() })
	hog.Stdout = stdout
	stdin, err := hog.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := hog.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = hog.Process.Kill()
		_ = hog.Wait()
	})
	// The test itself is at -1000, and its children inherit that.
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/oom_score_adj", hog.Process.Pid), []byte(fmt.Sprint(adj)), 0); err != nil {
		t.Fatal(err)
	}
	if err := group.Add(hog.Process.Pid); err != nil {
		t.Fatal(err)
	}
	return hog, func() {
		t.Helper()
		if _, err := stdin.Write([]byte{1}); err != nil {
			t.Fatal(err)
		}
	}
}

// hold is a hog that holds mib MiB when hold returns.
func hold(t *testing.T, group *cgroupfs.Cgroup, adj, mib int) *exec.Cmd {
	t.Helper()
	hog := hogProcess(t, group, adj, "0", fmt.Sprint(mib), "hold")
	for deadline := time.Now().Add(30 * time.Second); residentMiB(hog.Process.Pid) < mib; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("process %d does not come to hold %d MiB", hog.Process.Pid, mib)
		}
	}
	return hog
}

// alive reports whether a process is there and no zombie.
func alive(pid int) bool {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, after, _ := strings.Cut(string(data), ") ")
	return err == nil && !strings.HasPrefix(after, "Z") && !strings.HasPrefix(after, "X")
}

func residentMiB(pid int) int {
	data, _ := os.ReadFile(fmt.Sprintf("/proc/%d/statm", pid))
	var size, resident int
	_, _ = fmt.Sscan(string(data), &size, &resident)
	return resident * os.Getpagesize() / mib
}

func setGroupKill(t *testing.T, group *cgroupfs.Cgroup) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(group.Dir, "memory.oom.group"), []byte("1"), 0); err != nil {
		t.Fatal(err)
	}
}

// kubelet lays out a pod's cgroups as a kubelet with the cgroupfs driver does; the limits are in bytes.
func kubelet(t *testing.T, kubepodsMax, podMax, containerMax uint64) *cgroupfs.Cgroup {
	t.Helper()
	root := oomtest.New(t, cgroupfs.Unlimited)
	kubepods := oomtest.Child(t, root, "kubepods", kubepodsMax)
	burstable := oomtest.Child(t, kubepods, "burstable", cgroupfs.Unlimited)
	pod := oomtest.Child(t, burstable, "pod0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0", podMax)
	return oomtest.Child(t, pod, strings.Repeat("0123456789abcdef", 4), containerMax)
}

// errNotHere is why a scenario cannot be had on a kernel.
type errNotHere string

func (e errNotHere) Error() string { return string(e) }

// scenario causes one OOM and holds what is told of it against the console.
type scenario struct {
	name string
	run  func(t *testing.T, o *observer)
}

// kswapdScenario is a kill by kswapd: the scope is known with every tier that has a stack.
var kswapdScenario = scenario{"kswapd", func(t *testing.T, o *observer) {
	kswapdKills(t)
	group := oomtest.New(t, cgroupfs.Unlimited)
	// Whoever asks for memory meanwhile may come first, the hog too.
	for try := 1; ; try++ {
		hogProcess(t, group, 0, "1", fmt.Sprint(tooMuch))
		events, kills := o.take(t, 1, 1)
		if len(events) != len(kills) {
			t.Fatalf("%d events, %d kills", len(events), len(kills))
		}
		if len(kills) == 1 && strings.HasPrefix(kills[0].TriggerComm, "kswapd") {
			for _, w := range o.compareKill(&events[0], &kills[0], truth{scope: event.ScopeGlobal, limit: event.LevelNode}) {
				t.Error(w)
			}
			return
		}
		if try == 3 {
			// It gives up for good after 16 turns without a page (kswapd_failures), and who comes first is chance.
			panic(errNotHere("kswapd was not the one who killed, in three tries"))
		}
		o.begin(t)
	}
}}

// scenarios are what is caused with each tier.
var scenarios = []scenario{
	{"global", func(t *testing.T, o *observer) {
		victim := mixedHog(t, oomtest.New(t, cgroupfs.Unlimited), tooMuch)
		e := o.expect(t, 1, truth{scope: event.ScopeGlobal, trigger: "hog", limit: event.LevelNode, mixed: victim})
		if len(e) == 1 && e[0].Limit != nil && e[0].Limit.Cgroup != nil {
			t.Errorf("a global kill has the limit of %s", e[0].Limit.Cgroup.Path)
		}
	}},
	{"container-limit", func(t *testing.T, o *observer) {
		victim := mixedHog(t, kubelet(t, 128*mib, 64*mib, 16*mib), 64)
		o.expect(t, 1, truth{scope: event.ScopeCgroup, trigger: "hog", limit: event.LevelContainer, mixed: victim})
	}},
	{"pod-limit", func(t *testing.T, o *observer) {
		hogProcess(t, kubelet(t, 128*mib, 16*mib, 64*mib), 0, "1", "64")
		o.expect(t, 1, truth{scope: event.ScopeCgroup, trigger: "hog", limit: event.LevelPod})
	}},
	{"kubepods-limit", func(t *testing.T, o *observer) {
		hogProcess(t, kubelet(t, 16*mib, 64*mib, 32*mib), 0, "1", "64")
		o.expect(t, 1, truth{scope: event.ScopeCgroup, trigger: "hog", limit: event.LevelKubepods})
	}},
	{"oom.group", func(t *testing.T, o *observer) {
		group := oomtest.New(t, 96*mib)
		if group.Version == 1 {
			panic(errNotHere("version 1 has no memory.oom.group"))
		}
		setGroupKill(t, group)
		var protected *exec.Cmd
		for i := range 48 { // and the hog and its child make 50
			adj := 0
			if i == 7 {
				adj = -1000
			}
			p := hogProcess(t, group, adj, "0", "1", "hold")
			if i == 7 {
				protected = p
			}
		}
		hogProcess(t, group, 0, "1", "128")
		events := o.expect(t, 49, truth{scope: event.ScopeCgroup, trigger: "hog"})
		if protected.Process.Signal(syscall.Signal(0)) != nil {
			t.Error("the process at -1000 is gone")
		}
		if o.tier == loader.TierNone {
			return
		}
		indices := map[uint32]bool{}
		for _, e := range events {
			if e.Incident == nil || !e.Incident.Group || e.Incident.ID != events[0].Incident.ID {
				t.Errorf("incident %+v of process %d, the first has %+v", e.Incident, e.Victim.PID, events[0].Incident)
				continue
			}
			indices[e.Incident.Index] = true
		}
		if len(indices) != len(events) {
			t.Errorf("%d indices of %d events", len(indices), len(events))
		}
	}},
	{"sysrq", func(t *testing.T, o *observer) {
		victim := hold(t, oomtest.New(t, cgroupfs.Unlimited), 0, 64)
		if err := os.WriteFile("/proc/sysrq-trigger", []byte("f"), 0); err != nil {
			t.Fatal(err)
		}
		o.expect(t, 1, truth{scope: event.ScopeSysrq, trigger: "kworker*", victim: victim.Process.Pid})
	}},
	kswapdScenario,
	{"innocent-trigger", func(t *testing.T, o *observer) {
		root := oomtest.New(t, cgroupfs.Unlimited)
		a := oomtest.Child(t, root, "innocent", cgroupfs.Unlimited)
		b := oomtest.Child(t, root, "hog", cgroupfs.Unlimited)
		name := filepath.Join(t.TempDir(), "innocent")
		if err := os.Symlink(oomtest.Program(t, "hog"), name); err != nil {
			t.Fatal(err)
		}
		// Anybody may be the one whose allocation fails, this test too.
		for try := 1; ; try++ {
			free := freeMiB(t)
			victim := hold(t, b, 0, free*6/10)
			innocent, begin := waitingHog(t, name, a, -900, "0", fmt.Sprint(free*8/10), "hold")
			begin()
			events := o.expect(t, 1, truth{scope: event.ScopeGlobal, victim: victim.Process.Pid})
			if len(events) != 1 {
				return
			}
			e := &events[0]
			if e.Victim.PID != 0 && e.Victim.Cgroup.Path != b.Path() {
				t.Errorf("the victim is in %s, want %s", e.Victim.Cgroup.Path, b.Path())
			}
			// The name is the console's, too.
			if e.Trigger.Comm == "innocent" {
				if int(e.Trigger.PID) != innocent.Process.Pid || e.Trigger.Cgroup.Path != a.Path() {
					t.Errorf("the trigger is %d in %s, want %d in %s", e.Trigger.PID, e.Trigger.Cgroup.Path, innocent.Process.Pid, a.Path())
				}
				return
			}
			if int(e.Trigger.PID) == victim.Process.Pid {
				t.Errorf("the victim held still and is the trigger")
			}
			if try == 5 {
				t.Errorf("five times it was another who asked for the memory, now %s", e.Trigger.Comm)
				return
			}
			for _, p := range []*exec.Cmd{victim, innocent} {
				_ = p.Process.Kill()
				_ = p.Wait()
			}
			o.begin(t)
		}
	}},
	{"threaded", func(t *testing.T, o *observer) {
		hogProcess(t, oomtest.New(t, 16*mib), 0, "1", "64", "threaded")
		o.expect(t, 1, truth{scope: event.ScopeCgroup, trigger: "hog-thread", tid: true})
	}},
	{"already-exiting", func(t *testing.T, o *observer) {
		group := oomtest.New(t, 24*mib)
		dying := hold(t, group, 0, 20)
		oomtest.Freezer(t).Freeze(t, dying.Process.Pid)
		if err := dying.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		hogProcess(t, group, 0, "1", "16")
		events, kills := o.take(t, 1, 0)
		wantOutcome, wantScope := event.OutcomeExiting, event.ScopeCgroup
		if o.tier == loader.TierNone {
			wantOutcome, wantScope = event.OutcomeUnknown, event.ScopeUnknown
		}
		marked := 0
		for _, e := range events {
			if int(e.Victim.TID) == dying.Process.Pid {
				marked++
				if e.Outcome != wantOutcome || e.Scope != wantScope || e.Incident != nil {
					t.Errorf("outcome %s, scope %s, incident %+v", e.Outcome, e.Scope, e.Incident)
				}
				continue
			}
			// Should the dying one take its time, the kernel kills somebody after all.
			if e.Outcome == event.OutcomeKilled && !slices.ContainsFunc(kills, func(k kmsg.Kill) bool { return k.PID == int(e.Victim.TID) }) {
				t.Errorf("an event says that %d was killed, the console does not", e.Victim.TID)
			}
		}
		if marked != 1 || slices.ContainsFunc(kills, func(k kmsg.Kill) bool { return k.PID == dying.Process.Pid }) {
			t.Errorf("%d was dying; events %+v; the console tells of %+v", dying.Process.Pid, events, kills)
		}
	}},
	{"clone-vm", func(t *testing.T, o *observer) {
		// Two processes share one memory: both die, one is marked.
		hog := hogProcess(t, oomtest.New(t, 16*mib), 0, "1", "64", "shared")
		o.expect(t, 1, truth{scope: event.ScopeCgroup})
		var twin int
		said, err := os.ReadFile(hog.Stdout.(*os.File).Name())
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fmt.Sscanf(string(said), "twin %d\n", &twin); err != nil {
			t.Fatalf("the hog said %q: %v", said, err)
		}
		for deadline := time.Now().Add(5 * time.Second); alive(twin); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("the twin, %d, lives on", twin)
			}
		}
	}},
	{"ten-levels", func(t *testing.T, o *observer) {
		leaf := kubelet(t, 128*mib, 64*mib, 16*mib)
		for i := range 10 {
			leaf = oomtest.Child(t, leaf, fmt.Sprintf("level-%d", i), cgroupfs.Unlimited)
		}
		hogProcess(t, leaf, 0, "1", "64")
		events := o.expect(t, 1, truth{scope: event.ScopeCgroup, limit: event.LevelContainer})
		if len(events) == 1 && events[0].Victim.PID != 0 {
			if events[0].Victim.Cgroup.Path != leaf.Path() || events[0].Container == nil || events[0].Container.PodUID == "" {
				t.Errorf("victim in %+v, container %+v", events[0].Victim.Cgroup, events[0].Container)
			}
		}
	}},
}

// kswapdKills makes kswapd the one that runs out of memory: the multi-generational LRU does not reclaim what was
// used in the last hour, and so nothing (Documentation/admin-guide/mm/multigen_lru.rst).
func kswapdKills(t *testing.T) {
	t.Helper()
	const lru = "/sys/kernel/mm/lru_gen/"
	for file, value := range map[string]string{lru + "enabled": "y", lru + "min_ttl_ms": "3600000"} {
		before, err := os.ReadFile(file)
		if errors.Is(err, os.ErrNotExist) {
			panic(errNotHere("no multi-generational LRU before Linux 6.1"))
		}
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(value), 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := os.WriteFile(file, bytes.TrimSpace(before), 0); err != nil {
				t.Error(err)
			}
		})
	}
}

// freeMiB is what can still be had.
func freeMiB(t *testing.T) int {
	t.Helper()
	file, err := os.Open("/proc/meminfo")
	if err != nil {
		t.Fatal(err)
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	for lines.Scan() {
		var kib int
		if n, _ := fmt.Sscanf(lines.Text(), "MemAvailable: %d kB", &kib); n == 1 {
			return kib >> 10
		}
	}
	t.Fatal("no MemAvailable")
	return 0
}

var vmTiers = []loader.Tier{loader.TierFentry, loader.TierKprobe, loader.TierStack, loader.TierNone}

// row prints a line of the table that tools/vm/test-vm.sh makes.
func row(tier loader.Tier, scenario, result, detail string) {
	fmt.Printf("TABLE %s %s %s %s\n", tier, scenario, result, strings.ReplaceAll(detail, "\n", " "))
}

// TestVM causes every scenario with every tier.
func TestVM(t *testing.T) {
	self, err := thisNode("vm")
	if err != nil {
		t.Fatal(err)
	}
	fmt.Printf("BOOTED %s\n", self.Kernel)
	for _, tier := range vmTiers {
		runTier(t, tier, scenarios)
	}
}

// try runs a scenario as a subtest. It returns why it is not to be had on this kernel, if so.
func (s scenario) try(t *testing.T, o *observer) (ok bool, why string) {
	ok = t.Run(s.name, func(t *testing.T) {
		defer func() {
			if p := recover(); p != nil {
				here, ok := p.(errNotHere)
				if !ok {
					panic(p)
				}
				why = string(here)
			}
		}()
		o.begin(t)
		s.run(t, o)
	})
	return ok, why
}

// runTier loads the program once with a tier, runs scenarios and prints a row for each.
func runTier(t *testing.T, tier loader.Tier, scenarios []scenario) {
	t.Run(string(tier), func(t *testing.T) {
		o, err := observe(t, tier)
		if err != nil {
			// Another kernel than the stock ones need not have the tier.
			result := "n/a"
			if stock, fentry := stockKernel(t); stock && (fentry || tier != loader.TierFentry) {
				result = "FAIL"
				t.Error(err)
			}
			for _, s := range scenarios {
				row(tier, s.name, result, err.Error())
			}
			return
		}
		verified(t, tier)
		for _, s := range scenarios {
			ok, why := s.try(t, o)
			switch {
			case !ok:
				row(tier, s.name, "FAIL", "")
			case why != "":
				row(tier, s.name, "n/a", why)
			default:
				row(tier, s.name, "ok", "")
			}
		}
		o.stop()
	})
}

// maxVerified is how many instructions the verifier may go through in one program, in any kernel: a quarter of what it
// permits (BPF_COMPLEXITY_LIMIT_INSNS).
const maxVerified = 250_000

// verified checks what the verifier went through in the largest of the loaded programs, and prints it.
func verified(t *testing.T, tier loader.Tier) {
	t.Helper()
	var most uint32
	var name string
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		must(t, err)
		id = next
		p, err := ebpf.NewProgramFromID(id)
		must(t, err)
		info, err := p.Info()
		must(t, errors.Join(err, p.Close()))
		if n, _ := info.VerifiedInstructions(); strings.HasPrefix(info.Name, "oom_") && n > most {
			most, name = n, info.Name
		}
	}
	switch {
	case most == 0:
		row(tier, "verifier", "n/a", "the kernel does not say it before 5.16")
	case most > maxVerified:
		t.Errorf("the verifier goes through %d instructions in %s, more than %d", most, name, maxVerified)
		row(tier, "verifier", "FAIL", fmt.Sprint(most))
	default:
		row(tier, "verifier", "ok", fmt.Sprintf("%d %s", most, name))
	}
}

// stockKernel reports whether this is one of Debian's kernels, which have every tier, and whether fentry is among them:
// on arm64 ftrace has direct calls since v6.4 (commit 2aa6ac03516d).
func stockKernel(t *testing.T) (stock, fentry bool) {
	t.Helper()
	self, err := thisNode("vm")
	must(t, err)
	stock = regexp.MustCompile(`-(cloud-` + runtime.GOARCH + `|arm64-16k)$`).MatchString(self.Kernel)
	var major, minor int
	if _, err := fmt.Sscanf(self.Kernel, "%d.%d", &major, &minor); err != nil {
		t.Fatalf("%s: %v", self.Kernel, err)
	}
	return stock, runtime.GOARCH != "arm64" || major > 6 || major == 6 && minor >= 4
}

// hookTiers are the tiers with hooks that a stock kernel has, from the best down.
func hookTiers(t *testing.T) []loader.Tier {
	t.Helper()
	if _, fentry := stockKernel(t); !fentry {
		return []loader.Tier{loader.TierKprobe}
	}
	return []loader.Tier{loader.TierFentry, loader.TierKprobe}
}

// TestVMAuto: the best tier is chosen.
func TestVMAuto(t *testing.T) {
	l, err := loader.Open(t.Context(), loader.Options{Tier: loader.TierAuto, JournalSize: 128 << 10, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if want := hookTiers(t)[0]; l.Tier() != want {
		t.Errorf("tier %s, want %s", l.Tier(), want)
	}
}

// TestVMConstrained runs on a machine with two NUMA nodes: what binds is a cpuset or a memory policy, and
// without a hook nobody can tell.
func TestVMConstrained(t *testing.T) {
	nodes, err := os.ReadFile("/sys/devices/system/node/has_memory")
	if err != nil || strings.TrimSpace(string(nodes)) != "0-1" {
		for _, tier := range vmTiers {
			for _, name := range []string{"cpuset", "mempolicy", "global-numa"} {
				row(tier, name, "n/a", "this machine has one NUMA node")
			}
		}
		return
	}
	scopeFor := func(tier loader.Tier, scope event.Scope) event.Scope {
		if hooked(tier) {
			return scope
		}
		return event.ScopeUnknown
	}
	constrained := []scenario{
		{"cpuset", func(t *testing.T, o *observer) {
			group := oomtest.New(t, cgroupfs.Unlimited)
			if err := os.WriteFile(filepath.Join(group.Dir, "cpuset.mems"), []byte("1"), 0); err != nil {
				t.Fatal(err)
			}
			hogProcess(t, group, 0, "1", fmt.Sprint(tooMuch))
			o.expect(t, 1, truth{scope: scopeFor(o.tier, event.ScopeCpuset)})
		}},
		{"mempolicy", func(t *testing.T, o *observer) {
			hogProcess(t, oomtest.New(t, cgroupfs.Unlimited), 0, "1", fmt.Sprint(tooMuch), "bind1")
			o.expect(t, 1, truth{scope: scopeFor(o.tier, event.ScopeMempolicy)})
		}},
		{"global-numa", func(t *testing.T, o *observer) {
			hogProcess(t, oomtest.New(t, cgroupfs.Unlimited), 0, "1", fmt.Sprint(tooMuch))
			o.expect(t, 1, truth{scope: scopeFor(o.tier, event.ScopeGlobal)})
		}},
	}
	for _, tier := range vmTiers {
		runTier(t, tier, constrained)
	}
}

// faultFields are what src/faults.bpf.h breaks, by number.
var faultFields = map[int]string{
	1: "victim.pid", 2: "no event of process", 3: "victim.start_boottime_ns", 4: "victim.comm", 5: "victim.uid",
	6: "victim.oom_score_adj", 7: "victim.cgroup.id", 8: "victim.memcg.path", 9: "scope", 10: "outcome",
	11: "victim.memory.total_vm", 12: "victim.memory.anon_rss", 13: "victim.memory.file_rss",
	14: "victim.memory.shmem_rss", 15: "victim.memory.pgtables", 16: "limit.max", 17: "limit.cgroup.id",
	18: "alloc.gfp_mask", 19: "alloc.order", 20: "trigger.pid", 21: "trigger.comm",
	// The file's and the shared pages swapped, the victim's path as the limit's, and what was never read.
	22: "victim.memory.shmem_rss", 23: "limit.cgroup.path", 24: "victim.uid", 25: "victim.oom_score_adj",
	26: "trigger.tid",
}

// TestVMFaults: one wrong field in the BPF program at a time is found by the comparison with the console.
func TestVMFaults(t *testing.T) {
	for number := 1; number <= len(faultFields); number++ {
		field := faultFields[number]
		t.Run(fmt.Sprintf("%d-%s", number, strings.ReplaceAll(field, " ", "-")), func(t *testing.T) {
			t.Setenv("OOM_TRACER_FAULT", fmt.Sprint(number))
			o, err := observe(t, loader.TierAuto)
			if err != nil {
				t.Fatal(err)
			}
			o.tier = hookTiers(t)[0]
			o.begin(t)
			// The limit is not the victim's own cgroup's.
			victim := mixedHog(t, oomtest.Child(t, oomtest.New(t, 16*mib), "leaf", cgroupfs.Unlimited), 64)
			events, kills := o.take(t, 1, 1)
			if len(events) != 1 || len(kills) != 1 {
				t.Fatalf("%d events, %d kills", len(events), len(kills))
			}
			var wrong []string
			if int(events[0].Victim.TID) != kills[0].PID {
				wrong = append(wrong, "no event of process")
			}
			wrong = append(wrong, o.compareKill(&events[0], &kills[0], truth{scope: event.ScopeCgroup, mixed: victim})...)
			if !strings.Contains(strings.Join(wrong, "\n"), field) {
				t.Errorf("fault %d (%s) goes unnoticed: %q", number, field, wrong)
				return
			}
			fmt.Printf("FAULT %d %s found: %s\n", number, field, wrong[0])
		})
	}
}

// TestVMMissedHook: no single hook that is missed half of the time makes events that know less, or one that
// tells what is not so.
func TestVMMissedHook(t *testing.T) {
	for number, hook := range map[int]string{101: "out_of_memory", 102: "oom_kill_process", 103: "__oom_kill_process"} {
		t.Run(hook, func(t *testing.T) {
			t.Setenv("OOM_TRACER_FAULT", fmt.Sprint(number))
			o, err := observe(t, loader.TierAuto)
			if err != nil {
				t.Fatal(err)
			}
			o.begin(t)
			group := oomtest.New(t, 8*mib)
			const kills = 20
			hogProcess(t, group, 0, fmt.Sprint(kills), "32")
			events, printed := o.take(t, kills, kills)
			if len(events) != kills || len(printed) != kills {
				t.Fatalf("%d events, %d on the console", len(events), len(printed))
			}
			less := 0
			for _, e := range events {
				if e.Scope != event.ScopeCgroup && e.Scope != event.ScopeUnknown || e.Outcome != event.OutcomeKilled && e.Outcome != event.OutcomeUnknown {
					t.Errorf("scope %s, outcome %s", e.Scope, e.Outcome)
				}
				if e.Limit != nil && *e.Limit.Max != 8*mib {
					t.Errorf("limit %d", *e.Limit.Max)
				}
				if e.Node.Tier != string(hookTiers(t)[0]) {
					less++
				}
			}
			fmt.Printf("MISSED %s half of the time: %d of %d events without the hooks' context\n", hook, less, len(events))
			// What the one does not see the other does, or the stack.
			if less > 0 {
				t.Error("a single missed hook costs the context")
			}
		})
	}
}

// TestVMHooksAlone: the kernel stack is read only for marks that the hooks do not explain. What the program costs is
// printed.
func TestVMHooksAlone(t *testing.T) {
	counting, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		t.Fatal(err)
	}
	defer counting.Close()
	for _, tier := range append(hookTiers(t), loader.TierStack) {
		t.Run(string(tier), func(t *testing.T) {
			o, err := observe(t, tier)
			if err != nil {
				fmt.Printf("TABLE\t%s\thooks-alone\tn/a\t%v\n", tier, err)
				return
			}
			o.begin(t)
			const kills = 20
			hogProcess(t, oomtest.New(t, 8*mib), 0, fmt.Sprint(kills), "32")
			events, _ := o.take(t, kills, 0)
			stats, err := o.stats()
			want := uint64(kills)
			if tier != loader.TierStack {
				want = 0
				for _, e := range events {
					if e.Outcome != event.OutcomeKilled {
						want++
					}
				}
			}
			if err != nil || len(events) != kills || stats.Seen != kills || stats.Unwound != want {
				t.Errorf("%d events, %+v: %v", len(events), stats, err)
			}
			fmt.Printf("BENCH %s: %.0f ns a kill, %+v\n", tier, bpfPerRun(t, "oom_mark_victim"), stats)
			o.stop()
		})
	}
}

// TestVMMissedHookAlternating: one thread goes to and fro between two cgroups, runs the one out of memory
// without a kill and the other with one, each hook is missed half of the time, and no event tells of the
// other's limit or allocation.
func TestVMMissedHookAlternating(t *testing.T) {
	for _, tier := range hookTiers(t) {
		t.Run(string(tier), func(t *testing.T) {
			t.Setenv("OOM_TRACER_FAULT", "104")
			o, err := observe(t, tier)
			if err != nil {
				t.Fatal(err)
			}
			time.Sleep(6 * time.Second) // the kills of an earlier test may have used up the console's ten
			o.begin(t)
			parent := oomtest.New(t, cgroupfs.Unlimited)
			a := oomtest.Child(t, parent, "a", 16*mib)
			b := oomtest.Child(t, parent, "b", 24*mib)
			const rounds = 24
			hog := hogProcess(t, a, -1000, fmt.Sprint(rounds), "1", "alternate", a.Dir, b.Dir)
			if err := hog.Wait(); err != nil {
				t.Errorf("the hog ended with %v", err)
			}
			events, kills := o.take(t, rounds, rounds)
			if len(events) != rounds || len(kills) != rounds {
				t.Errorf("%d events, %d on the console", len(events), len(kills))
			}
			told, tiers, masks := map[string]int{}, map[string]bool{}, map[string]bool{}
			for _, e := range events {
				at := slices.IndexFunc(kills, func(k kmsg.Kill) bool { return k.PID == int(e.Victim.TID) })
				if at < 0 {
					t.Errorf("no kill of process %d, outcome %s", e.Victim.TID, e.Outcome)
					continue
				}
				if kills[at].TriggerComm == "" {
					t.Errorf("the console does not say why: %+v", kills[at])
				}
				// What is told must be right, whatever it comes from.
				told[e.Node.Tier+" "+kills[at].GFPMask]++
				tiers[e.Node.Tier], masks[kills[at].GFPMask] = true, true
				for _, w := range o.as(loader.Tier(e.Node.Tier)).compareKill(&e, &kills[at], truth{scope: event.ScopeCgroup}) {
					t.Errorf("%s[%d] in %s, tier %s: %s", kills[at].Comm, kills[at].PID, kills[at].OOMMemcg, e.Node.Tier, w)
				}
			}
			if len(tiers) != 2 || len(masks) < 2 { // a process may also die in an allocation of another kind
				t.Errorf("tiers and allocations are not mixed: %v", told)
			}
			fmt.Printf("MISSED alternating %s: %v\n", tier, told)
		})
	}
}

// hideAddresses makes kallsyms, and so the stack, unreadable for whoever looks now.
func hideAddresses(t *testing.T) {
	t.Helper()
	const restrict = "/proc/sys/kernel/kptr_restrict"
	before, err := os.ReadFile(restrict)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(restrict, []byte("2"), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(restrict, before, 0); err != nil {
			t.Error(err)
		}
	})
}

// TestVMMissedHookUnreadable: where hooks are missed and the stack cannot be read, a kill is never taken for
// the mark of an exiting task.
func TestVMMissedHookUnreadable(t *testing.T) {
	hideAddresses(t)
	for _, tier := range hookTiers(t) {
		t.Run(string(tier), func(t *testing.T) {
			t.Setenv("OOM_TRACER_FAULT", "104")
			o, err := observe(t, tier)
			if err != nil {
				t.Fatal(err)
			}
			o.begin(t)
			const rounds = 24
			hogProcess(t, oomtest.New(t, 8*mib), 0, fmt.Sprint(rounds), "32")
			events, kills := o.take(t, rounds, rounds)
			if len(events) != rounds || len(kills) != rounds {
				t.Fatalf("%d events, %d on the console", len(events), len(kills))
			}
			outcomes := map[string]int{}
			for _, e := range events {
				outcomes[fmt.Sprint(e.Scope, " ", e.Outcome)]++
				if e.Outcome == event.OutcomeExiting || e.Scope != event.ScopeCgroup && e.Scope != event.ScopeUnknown {
					t.Errorf("outcome %s, scope %s", e.Outcome, e.Scope)
				}
				if e.Limit != nil && *e.Limit.Max != 8*mib {
					t.Errorf("limit %d", *e.Limit.Max)
				}
			}
			fmt.Printf("MISSED unreadable %s: %v\n", tier, outcomes)
		})
	}
}

// TestVMMissedHookAlone: where a kernel has no entry of the other two, out_of_memory alone tells as much, with
// the outcome from the stack; and without a stack the outcome is unknown.
func TestVMMissedHookAlone(t *testing.T) {
	t.Setenv("OOM_TRACER_LACKS", "oom_kill_process,__oom_kill_process")
	for _, tier := range hookTiers(t) {
		t.Run(string(tier), func(t *testing.T) {
			o, err := observe(t, tier)
			if err != nil {
				t.Fatal(err)
			}
			for _, s := range scenarios {
				if _, why := s.try(t, o); why != "" {
					t.Logf("%s: n/a: %s", s.name, why)
				}
			}
			o.stop()
			t.Run("unreadable", func(t *testing.T) {
				hideAddresses(t)
				o, err := observe(t, tier)
				if err != nil {
					t.Fatal(err)
				}
				o.begin(t)
				mixedHog(t, kubelet(t, 128*mib, 64*mib, 16*mib), 64)
				events, kills := o.take(t, 1, 1)
				if len(events) != 1 || len(kills) != 1 {
					t.Fatalf("%d events, %d on the console", len(events), len(kills))
				}
				e, k := &events[0], &kills[0]
				if e.Node.Tier != string(tier) || e.Outcome != event.OutcomeUnknown || e.Scope != event.ScopeCgroup || e.Incident != nil ||
					e.Alloc == nil || e.Alloc.GFPMask != k.GFPMask || e.Limit == nil || e.Limit.Inferred || e.Limit.Cgroup.Path != k.OOMMemcg {
					t.Errorf("event %+v, limit %+v, allocation %+v; the console says %+v", e, e.Limit, e.Alloc, k)
				}
			})
		})
	}
}

// selftestVM runs oom-tracer selftest, and returns its first line.
func selftestVM(t *testing.T, config string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 90*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, oomtest.Program(t, "oom-tracer"), "selftest", "--config", config, "--node-name", "vm").CombinedOutput()
	if err != nil || !bytes.Contains(out, []byte("selftest: ok")) {
		t.Errorf("selftest: %v\n%s", err, out)
	}
	first, _, _ := strings.Cut(string(out), "\n")
	return first
}

// biggest returns the process that holds most memory, of all but this one, which is at -1000.
func biggest(t *testing.T) (pid, size int) {
	t.Helper()
	processes, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range processes {
		n, err := strconv.Atoi(filepath.Base(dir))
		if err != nil || n == os.Getpid() {
			continue
		}
		if resident := residentMiB(n); resident > size {
			pid, size = n, resident
		}
	}
	return pid, size
}

// TestVMTracer runs the tracer itself, the second biggest process of the machine, through a global OOM, and
// reads the event back with oom-tap. Before that the selftest runs, alone and beside the tracer.
func TestVMTracer(t *testing.T) {
	file := vmConfig(t, "auto")
	if said := selftestVM(t, file); !strings.Contains(said, "no tracer runs") {
		t.Errorf("the selftest alone says %q", said)
	}
	// This test is at -1000, and its children inherit that: the tracer must protect itself.
	tracer := exec.Command("/bin/sh", "-c", "echo 0 >/proc/self/oom_score_adj; exec \"$@\"", "sh",
		oomtest.Program(t, "oom-tracer"), "--config", file, "--node-name", "vm")
	var lines, log bytes.Buffer
	tracer.Stdout, tracer.Stderr = &lines, &log
	if err := tracer.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = tracer.Process.Kill() }()
	for deadline := time.Now().Add(60 * time.Second); !obs.TracerRuns(t.Context(), "127.0.0.1:9105"); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the tracer does not come up: %s", log.String())
		}
	}
	if adj, err := os.ReadFile(fmt.Sprintf("/proc/%d/oom_score_adj", tracer.Process.Pid)); err != nil || strings.TrimSpace(string(adj)) != fmt.Sprint(cli.OOMScoreAdj) {
		t.Errorf("the tracer is at %s, %v", adj, err)
	}
	if said := selftestVM(t, file); !strings.Contains(said, "using the tracer that runs") {
		t.Errorf("the selftest beside the tracer says %q", said)
	}
	// All but the hog are smaller, which has nothing yet.
	second, size := biggest(t)
	if second != tracer.Process.Pid {
		t.Errorf("process %d is bigger than the tracer, %d: %d MiB", second, tracer.Process.Pid, size)
	}
	console, err := kmsg.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	group := oomtest.New(t, cgroupfs.Unlimited)
	hogProcess(t, group, 0, "1", fmt.Sprint(tooMuch))
	kills, err := console.Read(func(kills []kmsg.Kill) bool { return len(kills) > 0 }, 60*time.Second)
	if err != nil || len(kills) != 1 || kills[0].Comm != "hog" || kills[0].AnonRSS < uint64(size)*mib {
		t.Errorf("the console tells of %+v, %v", kills, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	out, err := exec.CommandContext(ctx, oomtest.Program(t, "oom-tap"), "--config", file, "--since", "1h", "--count", "1", "--kills", "--scope", "global", "--output", "json").Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			t.Logf("oom-tap: %s", exit.Stderr)
		}
		t.Fatalf("oom-tap: %v\n%s", err, log.String())
	}
	e, err := event.Parse(out)
	if err != nil || e.Victim.Comm != "hog" || e.Scope != event.ScopeGlobal || e.Outcome != event.OutcomeKilled {
		t.Errorf("oom-tap says %s, %v", out, err)
	}
	if err := tracer.Process.Signal(os.Interrupt); err != nil {
		t.Errorf("the tracer did not survive: %v", err)
	}
	if err := tracer.Wait(); err != nil {
		t.Errorf("the tracer ended with %v: %s", err, log.String())
	}
	// The selftest's kill and the global one; the kill of the selftest before is a gap.
	if strings.Count(lines.String(), "  killed  ") != 2 || strings.Count(lines.String(), "  GAP  ") != 1 {
		t.Errorf("the tracer printed %q", lines.String())
	}
	fmt.Printf("TRACER survived as the second biggest, with %d MiB: %s", size, lines.String())
}
