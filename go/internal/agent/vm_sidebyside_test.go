//go:build vm && sidebyside

package agent

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// reported is a kill as a tool reports it: a line of tools/sidebyside, or of oom-tap.
type reported struct {
	PID    int           `json:"pid"`
	Cgroup string        `json:"cgroup"`
	Limit  string        `json:"limit"`
	Count  bool          `json:"count"` // a metric counts it, whatever else is reported
	at     time.Duration // of CLOCK_MONOTONIC, when its line was read
}

// contender is a tool that runs beside the others.
type contender struct {
	name    string
	start   func(t *testing.T) []*exec.Cmd // the last prints the lines
	parse   func(line []byte) (reported, bool)
	errors  *bytes.Buffer // nil: they are shown elsewhere
	running []*exec.Cmd
	mu      sync.Mutex
	lines   []reported
}

func (c *contender) run(t *testing.T) {
	t.Helper()
	c.running = c.start(t)
	cmd := c.running[len(c.running)-1]
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	go func() {
		for lines := bufio.NewScanner(out); lines.Scan(); {
			at := monotonic()
			if r, ok := c.parse(lines.Bytes()); ok {
				r.at = at
				c.mu.Lock()
				c.lines = append(c.lines, r)
				c.mu.Unlock()
			}
		}
	}()
}

func (c *contender) kill() {
	for _, cmd := range slices.Backward(c.running) {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}
	c.running = nil
}

func (c *contender) seen() []reported {
	c.mu.Lock()
	defer c.mu.Unlock()
	return slices.Clone(c.lines)
}

func monotonic() time.Duration {
	var now unix.Timespec
	_ = unix.ClockGettime(unix.CLOCK_MONOTONIC, &now)
	return time.Duration(now.Nano())
}

// contenders are OOM Tracer, as it ships, and those of tools/sidebyside.
func contenders(t *testing.T) []*contender {
	config := vmConfig(t, "auto")
	known := map[string]bool{} // IDs: an oom-tap that is started again begins at the first event again
	other := func(name string, args ...string) *contender {
		errors := &bytes.Buffer{}
		return &contender{
			name:   name,
			errors: errors,
			start: func(t *testing.T) []*exec.Cmd {
				cmd := exec.Command(oomtest.Program(t, "sidebyside"), args...)
				cmd.Stderr = errors // its own words, of all its starts
				return []*exec.Cmd{cmd}
			},
			parse: func(line []byte) (r reported, ok bool) {
				return r, json.Unmarshal(line, &r) == nil
			},
		}
	}
	return []*contender{
		{
			name: "OOM Tracer",
			start: func(t *testing.T) []*exec.Cmd {
				tracer := vmTracer(t, config)
				return []*exec.Cmd{tracer.Cmd, exec.Command(oomtest.Program(t, "oom-tap"), "--config", config, "--since", "1h", "--kills", "--output", "json")}
			},
			parse: func(line []byte) (r reported, ok bool) {
				e, err := event.Parse(line)
				if err != nil || known[e.ID] {
					return r, false
				}
				known[e.ID] = true
				r.PID = int(e.Victim.PID)
				if e.Victim.Cgroup != nil {
					r.Cgroup = e.Victim.Cgroup.Path
				}
				if e.Victim.Memcg != nil {
					r.Cgroup = e.Victim.Memcg.Path
				}
				if e.Limit != nil && e.Limit.Cgroup != nil {
					r.Limit = e.Limit.Cgroup.Path
				}
				return r, true
			},
		},
		other("kmsg tailer", "oomparser"),
		other("kubelet", "kubelet"),
		other("node-problem-detector", "npd", filepath.Join(os.Getenv("OOM_TEST_BUILD"), "kernel-monitor.json")),
		other("trace_oomkill", "gadget", filepath.Join(os.Getenv("OOM_TEST_BUILD"), "trace_oomkill.bpf.o")),
	}
}

// kill is what the kernel did: a process that is known to be killed.
type kill struct {
	pid           int
	cgroup, limit string // limit: empty for the node's
}

// kind is a kind of kill.
type kind struct {
	name  string
	cause func(t *testing.T, all []*contender) []kill
	quiet time.Duration // with nothing reported: then it is over
}

// hogs runs children that are killed, and waits for them. Their parent is in the cgroup outside.
func hogs(t *testing.T, group, outside *cgroupfs.Cgroup, limit string, args ...string) []kill {
	t.Helper()
	t.Setenv("HOG_CGROUP", group.Dir)
	hog := hogProcess(t, outside, 0, args...)
	if err := hog.Wait(); err != nil {
		t.Fatalf("hog: %v", err)
	}
	said, err := os.ReadFile(hog.Stdout.(*os.File).Name())
	must(t, err)
	var kills []kill
	for _, m := range regexp.MustCompile(`(?m)^(\d+) signal 9$`).FindAllStringSubmatch(string(said), -1) {
		pid, _ := strconv.Atoi(m[1])
		kills = append(kills, kill{pid, group.Path(), limit})
	}
	if fmt.Sprint(len(kills)) != args[0] {
		t.Errorf("%d of %s children were killed:\n%s", len(kills), args[0], said)
	}
	return kills
}

// outside is a cgroup beside the pods of another.
func outside(t *testing.T, group *cgroupfs.Cgroup) *cgroupfs.Cgroup {
	t.Helper()
	root := *group
	for filepath.Dir(root.Path()) != "/" {
		root.Dir = filepath.Dir(root.Dir)
	}
	return oomtest.Child(t, &root, "outside", cgroupfs.Unlimited)
}

// kinds are in this order because client-go lets 25 Events about a node through, and then one in five minutes.
// silence is longer than the time in which the kernel says why of ten kills (oom_kill_process()).
const silence = 6 * time.Second

func kinds(version int) []kind {
	all := []kind{
		{"container limit", func(t *testing.T, _ []*contender) []kill {
			group := kubelet(t, 256*mib, 64*mib, 16*mib)
			return hogs(t, group, outside(t, group), group.Path(), "1", "64")
		}, silence},
		{"pod limit", func(t *testing.T, _ []*contender) []kill {
			group := kubelet(t, 256*mib, 16*mib, 64*mib)
			return hogs(t, group, outside(t, group), filepath.Dir(group.Path()), "1", "64")
		}, silence},
		{"child of a container's process, which lives on", func(t *testing.T, _ []*contender) []kill {
			group := kubelet(t, 256*mib, 64*mib, 16*mib)
			return hogs(t, group, group, group.Path(), "1", "64")
		}, silence},
		{"thread, its process's first has ended", func(t *testing.T, _ []*contender) []kill {
			group := kubelet(t, 256*mib, 64*mib, 16*mib)
			return hogs(t, group, outside(t, group), group.Path(), "1", "64", "threaded")
		}, silence},
		{"service of the host", func(t *testing.T, _ []*contender) []kill {
			root := oomtest.New(t, cgroupfs.Unlimited)
			group := oomtest.Child(t, oomtest.Child(t, root, "system.slice", cgroupfs.Unlimited), "database.service", 16*mib)
			return hogs(t, group, outside(t, group), group.Path(), "1", "64")
		}, silence},
		{"ten cgroups below the container", func(t *testing.T, _ []*contender) []kill {
			container := kubelet(t, 256*mib, 64*mib, 16*mib)
			leaf := container
			for i := range 10 {
				leaf = oomtest.Child(t, leaf, fmt.Sprintf("level-%d", i), cgroupfs.Unlimited)
			}
			return hogs(t, leaf, outside(t, leaf), container.Path(), "1", "64")
		}, silence},
		{"container of a node that is a container (kind)", func(t *testing.T, _ []*contender) []kill {
			container := kubelet(t, cgroupfs.Unlimited, cgroupfs.Unlimited, cgroupfs.Unlimited)
			for _, name := range []string{"kubelet", "kubepods", "burstable", "pod1f0e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"} {
				container = oomtest.Child(t, container, name, cgroupfs.Unlimited)
			}
			container = oomtest.Child(t, container, strings.Repeat("fedcba9876543210", 4), 16*mib)
			return hogs(t, container, outside(t, container), container.Path(), "1", "64")
		}, silence},
		{"node out of memory", func(t *testing.T, _ []*contender) []kill {
			group := kubelet(t, cgroupfs.Unlimited, cgroupfs.Unlimited, cgroupfs.Unlimited)
			return hogs(t, group, outside(t, group), "", "1", fmt.Sprint(tooMuch))
		}, silence},
		{"storm of 1,000", func(t *testing.T, _ []*contender) (kills []kill) {
			group := kubelet(t, 256*mib, 64*mib, 4*mib)
			besides := outside(t, group)
			for range 10 { // a hog ends by itself after five minutes
				kills = append(kills, hogs(t, group, besides, group.Path(), "100", "8")...)
			}
			return kills
		}, silence},
		{"agent down meanwhile, 20", func(t *testing.T, all []*contender) []kill {
			for _, c := range all {
				c.kill()
			}
			group := kubelet(t, 256*mib, 64*mib, 4*mib)
			kills := hogs(t, group, outside(t, group), group.Path(), "20", "8")
			for _, c := range all {
				c.run(t)
			}
			return kills
		}, 30 * time.Second}, // they take their time to start
	}
	if version == 2 {
		all = slices.Insert(all, 8, kind{"group of 20 (memory.oom.group)", func(t *testing.T, _ []*contender) []kill {
			group := kubelet(t, 256*mib, 128*mib, 64*mib)
			setGroupKill(t, group)
			var kills []kill
			for range 19 {
				kills = append(kills, kill{hogProcess(t, group, 0, "0", "1", "hold").Process.Pid, group.Path(), group.Path()})
			}
			hog := hogProcess(t, group, 0, "0", "96")
			_ = hog.Wait()
			until(t, "all are killed", func() bool { return !slices.ContainsFunc(kills, func(k kill) bool { return alive(k.pid) }) })
			return append(kills, kill{hog.Process.Pid, group.Path(), group.Path()})
		}, silence})
	}
	return all
}

// console reads when the kernel printed that it killed a process: of all that report it the last thing that it does itself.
type console struct {
	mu sync.Mutex
	at map[int]time.Duration // of CLOCK_MONOTONIC, by PID of the marked thread
}

var killedLine = regexp.MustCompile(`^\d+,\d+,(\d+),.*;.*Killed process (\d+) \(`)

// watchConsole begins at what is printed from now on. The kernel's clock of messages is sched_clock(): the first message, the
// test's, says how far it is from CLOCK_MONOTONIC.
func watchConsole(t *testing.T) *console {
	t.Helper()
	file, err := os.OpenFile("/dev/kmsg", os.O_RDWR, 0)
	must(t, err)
	_, err = file.Seek(0, 2)
	must(t, err)
	offset := monotonic()
	_, err = file.WriteString("side by side\n")
	must(t, err)
	c := &console{at: map[int]time.Duration{}}
	ready := make(chan struct{})
	go func() {
		buffer, first := make([]byte, 8192), true
		for {
			n, err := unix.Read(int(file.Fd()), buffer)
			if err == syscall.EPIPE || err == syscall.EINTR {
				continue
			}
			if err != nil {
				return
			}
			line := string(buffer[:n])
			if first && strings.Contains(line, "side by side") {
				us, _ := strconv.ParseInt(strings.Split(line, ",")[2], 10, 64)
				offset -= time.Duration(us) * time.Microsecond
				first = false
				close(ready)
			}
			if m := killedLine.FindStringSubmatch(line); m != nil {
				us, _ := strconv.ParseInt(m[1], 10, 64)
				pid, _ := strconv.Atoi(m[2])
				c.mu.Lock()
				if _, ok := c.at[pid]; !ok {
					c.at[pid] = time.Duration(us)*time.Microsecond + offset
				}
				c.mu.Unlock()
			}
		}
	}()
	<-ready
	return c
}

func count(all []*contender) (n int) {
	for _, c := range all {
		n += len(c.seen())
	}
	return n
}

// warmUp waits until each tool has reported a kill, but for the kubelet: it reports some kinds only.
func warmUp(t *testing.T, all []*contender) {
	t.Helper()
	group := kubelet(t, 256*mib, 64*mib, 16*mib)
	besides := outside(t, group)
	for deadline := time.Now().Add(3 * time.Minute); slices.ContainsFunc(all, func(c *contender) bool { return c.name != "kubelet" && len(c.seen()) == 0 }); time.Sleep(15 * time.Second) {
		if time.Now().After(deadline) {
			t.Fatal("not all tools report a kill")
		}
		hogs(t, group, besides, group.Path(), "1", "64")
	}
}

// TestVMSideBySide causes each kind of kill while OOM Tracer and what a user would pick instead run on the same machine, and
// prints what each of them reported, as Markdown.
func TestVMSideBySide(t *testing.T) {
	h, err := cgroupfs.Find("/proc")
	must(t, err)
	self, err := thisNode("vm")
	must(t, err)
	all := contenders(t)
	for _, c := range all {
		c.run(t)
		t.Cleanup(func() {
			c.kill()
			if c.errors != nil {
				lines := strings.SplitAfter(c.errors.String(), "\n")
				t.Logf("%s, at last:\n%s", c.name, strings.Join(lines[max(0, len(lines)-10):], ""))
			}
		})
	}
	if !t.Run("warm-up", func(t *testing.T) { warmUp(t, all) }) {
		return
	}
	heading, rule := "| kind of kill ", "|---"
	for _, c := range all {
		heading, rule = heading+"| "+c.name+" ", rule+"|---"
	}
	fmt.Printf("SIDE \nSIDE #### Linux %s, cgroup v%d\nSIDE \nSIDE %s|\nSIDE %s|\n", self.Kernel, h.Version, heading, rule)
	for _, kind := range kinds(h.Version) {
		t.Run(kind.name, func(t *testing.T) {
			console := watchConsole(t)
			before := map[*contender]int{}
			for _, c := range all {
				before[c] = len(c.seen())
			}
			began := time.Now()
			kills := kind.cause(t, all)
			took := time.Since(began)
			for n, since := count(all), time.Now(); time.Since(since) < kind.quiet; time.Sleep(100 * time.Millisecond) {
				if now := count(all); now != n {
					n, since = now, time.Now()
				}
			}
			line := "| " + kind.name
			if len(kills) > 1 {
				line += fmt.Sprintf(", in %.1f s", took.Seconds())
			}
			for i, c := range all {
				j := c.judge(kills, console, before[c])
				line += " | " + j.String()
				// Those it has: the others' figures are theirs.
				if i == 0 && (j.named != len(kills) || j.limits != len(kills)) {
					t.Errorf("OOM Tracer: %v", j)
				}
			}
			fmt.Printf("SIDE %s |\n", line)
		})
	}
}

// judgement is how well a tool did with a kind of kill.
type judgement struct {
	of, reported, pids, named, limits int // kills: reported at all, with their PID, with their cgroup, with the cgroup of the limit
	again                             int // reports of a kill that it had reported
	counted                           int // by a metric
	median, last                      time.Duration
}

func (j judgement) String() string {
	if j.reported == 0 && j.counted == 0 {
		return "–"
	}
	text := fmt.Sprintf("%d of %d", j.reported, j.of)
	if j.counted > 0 {
		text += fmt.Sprintf(" (its metric: %d)", j.counted)
	}
	if j.reported == 0 {
		return text
	}
	for _, part := range []struct {
		what string
		n    int
	}{{"PID", j.pids}, {"cgroup", j.named}, {"limit", j.limits}} {
		switch part.n {
		case 0:
			if part.what == "PID" {
				text += ", another PID"
			} else {
				text += ", no " + part.what
			}
		case j.reported:
			text += ", " + part.what
		default:
			text += fmt.Sprintf(", %s of %d", part.what, part.n)
		}
	}
	if j.median > 0 {
		text += fmt.Sprintf("; %d ms", j.median.Milliseconds())
		if j.of > 1 {
			text += fmt.Sprintf(", last %d ms", j.last.Milliseconds())
		}
	}
	if j.again > 0 {
		text += fmt.Sprintf("; %d again", j.again)
	}
	return text
}

func (c *contender) judge(kills []kill, console *console, before int) judgement {
	console.mu.Lock()
	defer console.mu.Unlock()
	lines := c.seen()
	j := judgement{of: len(kills)}
	var strangers int
	var delays []time.Duration
	done := map[int]bool{}
	for _, r := range lines[:before] {
		done[r.PID] = true
	}
	for _, r := range lines[before:] {
		if r.Count {
			j.counted++
			continue
		}
		at := slices.IndexFunc(kills, func(k kill) bool { return k.pid == r.PID })
		switch {
		case done[r.PID]:
			j.again++
			continue
		case at < 0:
			strangers++
			continue
		}
		done[r.PID] = true
		j.pids++
		if r.Cgroup == kills[at].cgroup {
			j.named++
			if r.Limit == kills[at].limit || r.Limit == "/" && kills[at].limit == "" {
				j.limits++
			}
		}
		if printed, ok := console.at[r.PID]; ok {
			delays = append(delays, r.at-printed)
		}
	}
	j.reported = min(j.pids+strangers, j.of)
	if len(delays) > 0 {
		slices.Sort(delays)
		j.median, j.last = delays[len(delays)/2], delays[len(delays)-1]
	}
	return j
}
