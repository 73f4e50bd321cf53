//go:build vm

package main

import (
	"bufio"
	"cmp"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// TestVMChaos is TestChaos for what would harm this host: the node is out of memory, its clock is stepped by hours, and it is
// reset. The tracer runs in a machine, whose disk outlives it; NATS, the API server and an annotator are the host's.
//
// OOM_TEST_SEED is the seed, OOM_TEST_BOOTS (3) how often the machine is booted, OOM_TEST_KILLS (40) the kills of each boot.
func TestVMChaos(t *testing.T) {
	number := func(name string, otherwise uint64) uint64 {
		n, err := strconv.ParseUint(cmp.Or(os.Getenv(name), fmt.Sprint(otherwise)), 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return n
	}
	seed, boots, kills := number("OOM_TEST_SEED", rand.Uint64()), int(number("OOM_TEST_BOOTS", 3)), int(number("OOM_TEST_KILLS", 40))
	kernels := strings.Fields(os.Getenv("OOM_TEST_KERNELS"))
	if len(kernels) != 2 { // a name and a directory
		t.Fatal("OOM_TEST_KERNELS does not say which kernel to boot: run the test with make chaos-vm")
	}
	t.Logf("seed %d, Linux %s", seed, kernels[0])
	p := newVMPipeline(t, seed)
	disk := filepath.Join(t.TempDir(), "disk")
	if out, err := exec.Command("mkfs.ext4", "-q", disk, "64M").CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	var all []*boot
	for i := range boots {
		b := &boot{clean: p.random.IntN(3) == 0 || i == boots-1}
		all = append(all, b)
		p.boot(kernels[1], disk, b, kills)
	}
	p.judge(all)
}

// boot is one boot of the machine.
type boot struct {
	id       string
	kills    int  // by the kernel
	clean    bool // it is shut down, not reset
	complete bool // NATS has everything
	faults   map[string]int
}

func newVMPipeline(t *testing.T, seed uint64) *pipeline {
	t.Helper()
	c := kubetest.Start(t)
	c.Node(node)
	c.Namespace("shop")
	p := &pipeline{t: t, c: c, random: rand.New(rand.NewPCG(seed, 0)), nats: newCluster(t, t.TempDir()), pods: map[string]*corev1.Pod{}}
	p.nats[0].start()
	for i := range owners * podsOfEach {
		pod := c.Pod("shop", fmt.Sprint("pod-", i), node, deployed(fmt.Sprint("owner-", i%owners)))
		p.pods[c.ContainerID(pod, "main")] = pod
	}
	one := &program{path: oomtest.Program(t, "oom-annotator"), out: &oomtest.Output{}}
	cfg, path := newConfig(t, func(cfg *config.Config) {
		cfg.NATS.URL = p.way(one)
		cfg.NATS.Stream.DedupWindow = time.Second
		// More than the clock is stepped by: the lifetime of a mark counts from its kill.
		cfg.Policy.MaxEventAge, cfg.Policy.MarkLifetime = 24*time.Hour, 48*time.Hour
		cfg.Policy.Budgets = config.Budgets{Window: time.Hour, Owner: 1, Cluster: clusterBudget}
	})
	one.args = []string{"--config", path, "--kubeconfig", c.Kubeconfig(c.Annotator())}
	p.replicas = []*program{one}
	r := &rig{t: t, cfg: cfg}
	r.cfg.NATS.URL = "nats://" + p.nats[0].listen
	r.connect()
	p.conn = r.conn
	eventually(t, "streams", func() error { return bus.EnsureStreams(t.Context(), p.conn, cfg.NATS.Stream) })
	p.run(one)
	t.Cleanup(func() {
		p.end(one)
		if t.Failed() {
			t.Logf("%s said, at the end:\n%s", one.path, tail(one.out.String(), 20_000))
		}
	})
	return p
}

// guest is a machine with a shell for the test.
type guest struct {
	*machine
	t     *testing.T
	port  net.Conn
	lines *bufio.Scanner
}

func newGuest(t *testing.T, kernel, disk string) *guest {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "shell")
	g := &guest{t: t, machine: startMachine(t, kernel, "oom.shell=ttyS2", "-chardev", "socket,id=shell,server=on,path="+socket, "-device", "pci-serial,chardev=shell",
		"-drive", "id=disk,if=none,format=raw,file="+disk, "-device", "nvme,serial=disk,drive=disk")}
	eventually(t, "QEMU listens", func() (err error) { // and it waits for this
		g.port, err = net.Dial("unix", socket)
		return err
	})
	t.Cleanup(func() { g.port.Close() })
	g.lines = bufio.NewScanner(g.port)
	// A script that comes before the shell reads is lost.
	for deadline := time.Now().Add(machineTime); ; time.Sleep(time.Second) {
		if data, _ := os.ReadFile(filepath.Join(g.dir, "output.log")); strings.Contains(string(data), "SHELL") {
			break
		}
		if g.ended() || time.Now().After(deadline) {
			t.Fatalf("the machine does not come up:\n%s", g.said())
		}
	}
	return g
}

// do runs a script in the machine, and returns what it prints.
func (g *guest) do(script string) string {
	g.t.Helper()
	const end = "STATUS-OF-THE-SCRIPT "
	if err := g.port.SetDeadline(time.Now().Add(machineTime)); err != nil {
		g.t.Fatal(err)
	}
	if _, err := fmt.Fprintf(g.port, "{\n%s\n} </dev/null; echo %s$?\n", script, end); err != nil {
		g.t.Fatal(err)
	}
	var said strings.Builder
	for g.lines.Scan() {
		line := g.lines.Text()
		if text, status, ok := strings.Cut(line, end); ok {
			said.WriteString(text)
			if status != "0" {
				g.t.Fatalf("in the machine: %s: status %s: %s", script, status, said.String())
			}
			return said.String()
		}
		said.WriteString(line + "\n")
	}
	g.t.Fatalf("in the machine: %s: no answer: %v\n%s", script, g.lines.Err(), g.machine.said())
	return ""
}

// number is what a script prints.
func (g *guest) number(script string) int {
	g.t.Helper()
	n, err := strconv.Atoi(strings.TrimSpace(g.do(script)))
	if err != nil {
		g.t.Fatalf("%s: %v", script, err)
	}
	return n
}

const (
	runTracer  = `oom-tracer --config /tmp/config.yaml --node-name ` + node + ` >>/tmp/tracer.log 2>&1 & tracer=$!`
	inKernel   = `sed -n 's/^oom_kill //p' /proc/vmstat`
	unread     = `wget -qO - http://127.0.0.1:9105/metrics 2>/dev/null | awk '/^oom_tracer_(journal_records|publish_pending) / { n += $2; seen++ } END { print seen == 2 ? n : -1 }'`
	tracerUp   = `until wget -qO /dev/null http://127.0.0.1:9105/readyz 2>/dev/null; do kill -0 $tracer || break; sleep 1; done`
	killTracer = `kill -9 $tracer; wait $tracer 2>/dev/null; true`
)

// boot boots the machine, has processes killed there, and resets it or shuts it down.
func (p *pipeline) boot(kernel, disk string, b *boot, kills int) {
	p.t.Helper()
	g := newGuest(p.t, kernel, disk)
	_, port, err := net.SplitHostPort(p.nats[0].listen)
	if err != nil {
		p.t.Fatal(err)
	}
	g.do(`mkdir -p /disk && mount -t ext4 /dev/nvme0n1 /disk`)
	g.do(fmt.Sprintf(`echo '{nats: {url: "nats://10.0.2.2:%s"}, node: {state_file: /disk/state.json}}' >/tmp/config.yaml`, port))
	g.do(runTracer)
	g.do(tracerUp)
	b.id, b.faults = strings.TrimSpace(g.do("cat /proc/sys/kernel/random/boot_id")), map[string]int{}
	ids := slices.Sorted(maps.Keys(p.pods))
	faults := []fault{
		{"tracer-killed", func() { g.do(killTracer); p.wait(1000); g.do(runTracer) }},
		{"tracer-stopped", func() { g.do("kill -STOP $tracer"); p.wait(3000); g.do("kill -CONT $tracer") }},
		{"clock-stepped", func() { // by at most six hours in all
			hours := p.random.IntN(13) - 6
			g.do(fmt.Sprintf("date -s @%d", time.Now().Add(time.Duration(hours)*time.Hour).Unix()))
		}},
		{"nats-killed", func() { p.natsKilled(p.nats) }},
		{"annotator-killed", func() { p.killed(p.replicas[0]) }},
		{"node-out-of-memory", func() {
			g.do("wait $hogs; echo max >$memory/kubepods/memory.max")
			id := ids[p.random.IntN(len(ids))]
			g.do(fmt.Sprintf(`hog "$(container %s/%s)" 4096; echo 32M >$memory/kubepods/memory.max`, p.pods[id].UID, id))
			kills--
		}},
	}
	g.do(`container x/x >/dev/null && echo 32M >$memory/kubepods/memory.max`)
	for kills > 0 {
		id, n := ids[p.random.IntN(len(ids))], min(1+p.random.IntN(5), kills)
		g.do(fmt.Sprintf(`dir=$(container %s/%s); for i in $(seq %d); do hog "$dir" 64; done >/dev/null & hogs=$!`, p.pods[id].UID, id, n))
		kills -= n
		one := faults[p.random.IntN(len(faults))]
		b.faults[one.name]++
		one.inject()
		g.do("wait $hogs; true")
	}
	if b.clean || p.random.IntN(2) == 0 {
		eventually(p.t, "NATS has everything", func() error {
			if n := g.number(unread); n != 0 {
				return fmt.Errorf("%d records are not published", n)
			}
			return nil
		})
		b.complete = true
	}
	b.kills = g.number(inKernel)
	if b.clean {
		g.do("kill $tracer; wait $tracer; sync")
		fmt.Fprintln(g.port, "exit")
		<-g.done
	} else {
		g.kill()
	}
	p.t.Logf("boot %s: %d kills, shut down %t, all published %t, %s", b.id, b.kills, b.clean, b.complete, counts(b.faults))
}

// judge compares NATS and the API server with what the kernel counted.
func (p *pipeline) judge(boots []*boot) {
	p.t.Helper()
	want := 0 // at least
	for _, b := range boots {
		if b.complete {
			want += b.kills
		}
	}
	var l *ledger
	eventually(p.t, "each event has an outcome", func() error {
		l = readLedger(p.t, p.conn)
		if len(l.kills) < want || len(l.outcomes) < len(l.kills) {
			return fmt.Errorf("%d events of %d kills at least, %d outcomes", len(l.kills), want, len(l.outcomes))
		}
		return nil
	})
	events, resets := map[string]int{}, map[string]int{} // by boot
	for _, e := range l.kills {
		events[e.Node.BootID]++
	}
	l.gaps = slices.DeleteFunc(l.gaps, func(g event.Gap) bool {
		if g.Cause != event.GapReboot {
			return false
		}
		// Its seqs are of the boot before.
		for seq := g.FirstSeq; seq > 0 && seq <= g.LastSeq; seq++ {
			if l.seqs[g.Node.Epoch][seq]--; l.seqs[g.Node.Epoch][seq] == 0 {
				delete(l.seqs[g.Node.Epoch], seq)
			}
		}
		if g.Until == nil || g.Since != nil && g.Since.After(*g.Until) { // where the clock was set back since is not known
			p.t.Errorf("a gap from %v to %v", g.Since, g.Until)
		}
		resets[g.Node.BootID]++
		return true
	})
	l.check(p.t, p.pods)
	for i, b := range boots {
		if got := events[b.id]; got > b.kills || b.complete && got != b.kills {
			p.t.Errorf("boot %d: the kernel counts %d kills, NATS has %d events; all published: %t", i, b.kills, got, b.complete)
		}
		if after := i > 0 && !boots[i-1].clean; after && resets[b.id] != 1 || !after && resets[b.id] != 0 {
			p.t.Errorf("boot %d: %d gaps say that the node was reset before", i, resets[b.id])
		}
	}
	if len(l.gaps) > 0 {
		p.t.Errorf("%d gaps, although the program was pinned all the time", len(l.gaps))
	}
	marks := marked(p.t, p.c)
	for _, pod := range p.pods {
		if marks[pod.Name] != (l.marks[string(pod.UID)] == 1) {
			p.t.Errorf("%s is marked: %t, and outcomes that say so: %d", pod.Name, marks[pod.Name], l.marks[string(pod.UID)])
		}
	}
	if len(marks) == 0 || len(marks) > clusterBudget {
		p.t.Errorf("%d pods were marked, at most %d may be", len(marks), clusterBudget)
	}
	p.t.Logf("outcomes %v; %d events were stored more than once", l.results, l.doubles)
}
