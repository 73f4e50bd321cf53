package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// TestChaos: real kills while all parts fail at random: the tracer, NATS, the API server and three annotators. In the end each
// kill that the kernel counts is one event or in a gap, each seq is accounted for, each event has one outcome, no pod is marked
// twice or without a kill, and no budget is exceeded.
//
// OOM_TEST_KILLS (300) is the number of kills, OOM_TEST_SEEDS (1) how often, each time with another seed. OOM_TEST_SEED is the
// first seed; with an odd one there are three NATS servers, with an even one there is one. OOM_TEST_FAULTS are the faults to choose
// from, separated by commas. OOM_TEST_BEFORE is an earlier oom-tracer, for tracer-replaced. make chaos sets OOM_TEST_SEEDS: then
// the table of all seeds is written to build/chaos.md, and a failure is tried again with fewer faults and kills.
func TestChaos(t *testing.T) {
	number := func(name string, otherwise uint64) uint64 {
		n, err := strconv.ParseUint(cmp.Or(os.Getenv(name), fmt.Sprint(otherwise)), 10, 64)
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		return n
	}
	kills, seeds, seed := int(number("OOM_TEST_KILLS", 150)), number("OOM_TEST_SEEDS", 1), number("OOM_TEST_SEED", rand.Uint64())
	faults := strings.FieldsFunc(os.Getenv("OOM_TEST_FAULTS"), func(r rune) bool { return r == ',' })
	var all []*story
	for i := range seeds {
		one := &story{seed: seed + i, kills: kills, faults: faults}
		all = append(all, one)
		ok := one.run(t, fmt.Sprint("seed ", one.seed))
		if _, made := os.LookupEnv("OOM_TEST_SEEDS"); !made {
			return
		}
		if err := os.WriteFile(oomtest.Program(t, "chaos.md"), []byte(table(t, all)), 0o644); err != nil {
			t.Fatal(err)
		}
		if !ok {
			one.shrink(t)
			break
		}
	}
	t.Logf("the table, which is in %s too:\n\n%s", oomtest.Program(t, "chaos.md"), table(t, all))
}

// program is one of ours that is ended and started again.
type program struct {
	path  string
	cfg   config.Config
	args  []string
	out   *oomtest.Output
	cmd   *exec.Cmd
	links []*link // to each NATS server
	delay atomic.Int64
}

// pipeline is all parts as they ship, and what can be done to them.
type pipeline struct {
	t        *testing.T
	c        *kubetest.Cluster
	random   *rand.Rand
	nats     []*natsd
	stores   []disk
	state    disk // of the tracer's state file
	conn     *bus.Conn
	tracer   *program
	before   string // the other version of the tracer, if there is one
	pins     string // the tracer's pin directory
	replicas []*program
	refuses  atomic.Bool // the API server, every other time

	burstable *cgroupfs.Cgroup
	pods      map[string]*corev1.Pod // by container ID
	groups    map[string]*cgroupfs.Cgroup
}

// disk is one that can be filled.
type disk struct {
	dir        string
	fill, free func()
}

func newDisk(t *testing.T, size string) (d disk) {
	t.Helper()
	d.dir, d.fill, d.free = oomtest.SmallDisk(t, size)
	return d
}

type fault struct {
	name   string
	inject func() // and take it back
}

func (p *pipeline) faults() []fault {
	replica := func() *program { return p.replicas[p.random.IntN(len(p.replicas))] }
	all := []fault{
		{"tracer-killed", func() { p.killed(p.tracer) }},
		{"tracer-stopped", func() { p.stopped(p.tracer.cmd) }},
		{"tracer-ended", func() { p.ended(p.tracer) }},
		{"pins-removed", func() { p.unpin(); p.wait(1000); p.killed(p.tracer) }},
		{"pins-removed-down", func() { p.kill(p.tracer); p.unpin(); p.wait(1000); p.run(p.tracer) }},
		{"annotator-killed", func() { p.killed(replica()) }},
		{"annotator-stopped", func() { p.stopped(replica().cmd) }},
		{"annotator-ended", func() { p.ended(replica()) }},
		{"nats-killed", func() { p.natsKilled(p.servers()) }},
		{"nats-stopped", func() { p.natsStopped(p.servers()) }},
		{"nats-full", p.natsFull},
		{"nats-cut", func() { some := p.some(); cut(some, true); p.wait(3000); cut(some, false) }},
		{"nats-slow", func() { some := p.some(); slow(some, 200*time.Millisecond); p.wait(3000); slow(some, 0) }},
		{"state-full", func() { p.state.fill(); p.wait(1500); p.killed(p.tracer); p.wait(1500); p.state.free() }},
		{"api-ended", func() { p.c.Stop(); p.wait(2000); p.c.Start() }},
		{"api-stopped", func() { thaw := p.c.Freeze(); p.wait(3000); thaw() }},
		{"api-refuses", func() { p.refuses.Store(true); p.wait(3000); p.refuses.Store(false) }},
	}
	if len(p.nats) > 1 {
		all = append(all, fault{"nats-wiped", p.natsWiped})
	}
	if p.before != "" {
		all = append(all, fault{"tracer-replaced", p.replaced})
	}
	return all
}

// servers are one of the NATS servers or all.
func (p *pipeline) servers() []*natsd {
	if p.random.IntN(2) == 0 {
		return p.nats
	}
	return []*natsd{p.nats[p.random.IntN(len(p.nats))]}
}

// some are those of our programs whose way to NATS is in trouble.
func (p *pipeline) some() []*program {
	all := append([]*program{p.tracer}, p.replicas...)
	p.random.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	return all[:1+p.random.IntN(len(all))]
}

func cut(some []*program, down bool) {
	for _, one := range some {
		for _, l := range one.links {
			l.set(down)
		}
	}
}

func slow(some []*program, delay time.Duration) {
	for _, one := range some {
		one.delay.Store(int64(delay))
	}
}

// way makes a program's links to the servers, and returns its nats.url.
func (p *pipeline) way(one *program) string {
	p.t.Helper()
	var urls []string
	for _, server := range p.nats {
		l := newLink(p.t, server.listen, func(bool) { time.Sleep(time.Duration(one.delay.Load())) })
		one.links = append(one.links, l)
		urls = append(urls, "nats://"+l.listen)
	}
	return strings.Join(urls, ",")
}

func (p *pipeline) natsKilled(servers []*natsd) {
	for _, one := range servers {
		one.kill()
	}
	p.wait(2500)
	for _, one := range servers {
		one.start()
	}
}

func (p *pipeline) natsStopped(servers []*natsd) {
	for _, one := range servers {
		p.signal(one.cmd, syscall.SIGSTOP)
	}
	p.wait(3000)
	for _, one := range servers {
		p.signal(one.cmd, syscall.SIGCONT)
	}
}

// natsFull fills a server's disk. Such a server stores nothing until it is restarted, as the kubelet does (TestNATSDiskFull).
func (p *pipeline) natsFull() {
	i := p.random.IntN(len(p.nats))
	p.stores[i].fill()
	p.wait(3000)
	p.stores[i].free()
	p.natsKilled(p.nats[i : i+1])
}

// natsWiped takes all that it has stored from one server. It gets it back from the others, if they have it all.
func (p *pipeline) natsWiped() {
	p.replicated()
	one := p.nats[p.random.IntN(len(p.nats))]
	one.kill()
	if err := os.RemoveAll(filepath.Join(one.store, "jetstream")); err != nil {
		p.t.Fatal(err)
	}
	p.wait(1000)
	one.start()
	p.replicated()
}

// replicated waits until every server has everything.
func (p *pipeline) replicated() {
	p.t.Helper()
	current := func(what string, c *jetstream.ClusterInfo) error {
		if c == nil || c.Leader == "" || len(c.Replicas) != len(p.nats)-1 {
			return fmt.Errorf("%s: %+v", what, c)
		}
		for _, r := range c.Replicas {
			if !r.Current || r.Offline || r.Lag > 0 {
				return fmt.Errorf("%s: %+v", what, r)
			}
		}
		return nil
	}
	eventually(p.t, "all NATS servers have everything", func() error {
		ctx, cancel := context.WithTimeout(p.t.Context(), 5*time.Second)
		defer cancel()
		js := p.conn.JetStream()
		streams := js.ListStreams(ctx)
		for info := range streams.Info() {
			if err := current(info.Config.Name, info.Cluster); err != nil {
				return err
			}
			stream, err := js.Stream(ctx, info.Config.Name)
			if err != nil {
				return err
			}
			consumers := stream.ListConsumers(ctx)
			for info := range consumers.Info() {
				if info.Config.Durable == "" { // of a reader
					continue
				}
				if err := current(info.Name, info.Cluster); err != nil {
					return err
				}
			}
			if err := consumers.Err(); err != nil {
				return err
			}
		}
		return streams.Err()
	})
}

// wait waits for at most so many milliseconds.
func (p *pipeline) wait(most int) { time.Sleep(time.Duration(p.random.IntN(most)) * time.Millisecond) }

func (p *pipeline) run(one *program) {
	p.t.Helper()
	one.cmd = exec.Command(one.path, one.args...)
	one.cmd.Stdout, one.cmd.Stderr, one.cmd.SysProcAttr = one.out, one.out, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := one.cmd.Start(); err != nil {
		p.t.Fatal(err)
	}
}

func (p *pipeline) signal(cmd *exec.Cmd, s syscall.Signal) {
	p.t.Helper()
	if err := cmd.Process.Signal(s); err != nil {
		p.t.Fatalf("%v to %s: %v", s, cmd.Path, err)
	}
}

func (p *pipeline) kill(one *program) {
	p.t.Helper()
	p.signal(one.cmd, syscall.SIGKILL)
	_ = one.cmd.Wait()
	if one.cmd.ProcessState.Exited() {
		p.t.Errorf("%s had ended by itself: %v", one.path, one.cmd.ProcessState)
	}
}

func (p *pipeline) killed(one *program) {
	p.kill(one)
	p.wait(1000)
	p.run(one)
}

func (p *pipeline) ended(one *program) {
	p.end(one)
	p.run(one)
}

// replaced has the tracer's other version take over, as an upgrade or a downgrade does.
func (p *pipeline) replaced() {
	if p.random.IntN(2) == 0 {
		p.kill(p.tracer)
	} else {
		p.end(p.tracer)
	}
	p.tracer.path, p.before = p.before, p.tracer.path
	p.run(p.tracer)
}

// unpin removes pins: all of them, the state, journals, or links.
func (p *pipeline) unpin() {
	p.t.Helper()
	kinds := []string{"", "state", "journal-", "oom_", "fentry_", "kprobe_"}
	kind := kinds[p.random.IntN(len(kinds))]
	err := filepath.WalkDir(p.pins, func(path string, d fs.DirEntry, err error) error {
		if err != nil || d.IsDir() || !strings.HasPrefix(d.Name(), kind) {
			return err
		}
		return os.Remove(path)
	})
	if err == nil && kind == "" {
		err = os.RemoveAll(p.pins)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a tracer that begins may not have made them
		p.t.Fatalf("remove pins: %v", err)
	}
}

// unpublished is how many records the tracer has that NATS does not have; -1 while the tracer does not answer.
func (p *pipeline) unpublished(metrics string) int {
	_, text := (&rig{cfg: config.Config{Annotator: config.Annotator{Listen: metrics}}}).get("/metrics")
	all := regexp.MustCompile(`(?m)^oom_tracer_(?:journal_records|publish_pending) (\d+)$`).FindAllStringSubmatch(text, -1)
	if len(all) != 2 {
		return -1
	}
	sum := 0
	for _, one := range all {
		n, err := strconv.Atoi(one[1])
		if err != nil {
			p.t.Fatal(err)
		}
		sum += n
	}
	return sum
}

func (p *pipeline) stopped(cmd *exec.Cmd) {
	p.signal(cmd, syscall.SIGSTOP)
	p.wait(3000)
	p.signal(cmd, syscall.SIGCONT)
}

func (p *pipeline) end(one *program) {
	p.t.Helper()
	p.signal(one.cmd, syscall.SIGTERM)
	stuck := time.AfterFunc(patience, func() { _ = one.cmd.Process.Kill() })
	// One that has just begun does not know the signal yet.
	if err := one.cmd.Wait(); err != nil && one.cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() != syscall.SIGTERM {
		p.t.Errorf("%s after SIGTERM: %v", one.path, err)
	}
	stuck.Stop()
}

func tail(s string, n int) string { return s[max(0, len(s)-n):] }

// proxy is the way of the annotators to the API server.
func (p *pipeline) proxy(account *rest.Config) *rest.Config {
	proxy := p.c.Proxy()
	var requests atomic.Uint32
	proxy.Fault(func(req *http.Request) kubetest.Fault {
		if !p.refuses.Load() || !strings.Contains(req.URL.Path, "/pods/") {
			return kubetest.Fault{}
		}
		switch requests.Add(1) % 6 {
		case 0:
			return kubetest.Fault{Code: http.StatusTooManyRequests, RetryAfter: time.Second}
		case 2:
			return kubetest.Fault{Code: http.StatusInternalServerError}
		case 4:
			return kubetest.Fault{Lost: true}
		}
		return kubetest.Fault{}
	})
	return proxy.Config(account)
}

// ledger is what the stream has of pods' kills.
type ledger struct {
	kills    map[string]event.Event     // by ID
	outcomes map[string][]event.Outcome // of event.StageAnnotate, by the kill's ID
	seqs     map[uint64]map[uint64]int  // by epoch: in how many events and gaps of an exact count each is
	handed   map[uint64]map[uint64]bool // by epoch: those in gaps that know no exact count, because they may be events too
	gaps     []event.Gap                // of this test, in which kills are missing
	missing  int                        // kills in gaps
	maybe    int                        // at most as many more are in gaps that know no exact count
	doubles  int                        // events that were stored more than once
	marks    map[string]int             // by the pod's UID
	results  map[string]int
}

func readLedger(t *testing.T, conn *bus.Conn) *ledger {
	t.Helper()
	l := &ledger{kills: map[string]event.Event{}, outcomes: map[string][]event.Outcome{}, seqs: map[uint64]map[uint64]int{}, handed: map[uint64]map[uint64]bool{}, marks: map[string]int{}, results: map[string]int{}}
	seen := map[string]bool{}
	count := func(epoch, from, to uint64, exact bool) {
		if l.seqs[epoch] == nil {
			l.seqs[epoch], l.handed[epoch] = map[uint64]int{}, map[uint64]bool{}
		}
		for seq := from; seq <= to; seq++ {
			if exact {
				l.seqs[epoch][seq]++
			} else {
				l.handed[epoch][seq] = true
			}
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	err := bus.Tail(ctx, conn, bus.TailOptions{Since: time.Unix(0, 0)}, func(m bus.Stored) error {
		switch kind, _, _, _ := event.ParseSubject(m.Subject); kind {
		case event.KindOutcome:
			o, err := event.ParseOutcome(m.Data)
			if err == nil && o.Stage == event.StageAnnotate {
				l.outcomes[o.Kill] = append(l.outcomes[o.Kill], o)
			}
			return err
		case event.KindGap:
			g, err := event.ParseGap(m.Data)
			if err != nil || seen[g.ID] || !g.Missing() || g.Cause == event.GapBoot { // of before the test
				return err
			}
			seen[g.ID] = true
			l.gaps = append(l.gaps, g)
			if g.FirstSeq > 0 && g.Cause != event.GapRestart {
				count(g.Node.Epoch, g.FirstSeq, g.LastSeq, g.Count != nil)
			}
			if g.Count != nil {
				l.missing += int(*g.Count)
			} else if g.CountMax != nil {
				l.maybe += int(*g.CountMax)
			}
			return nil
		case event.KindNeighbours:
			return nil
		}
		e, err := event.Parse(m.Data)
		switch {
		case err != nil:
			return err
		case seen[e.ID]:
			l.doubles++
			return nil
		}
		seen[e.ID] = true
		count(e.Node.Epoch, e.Seq, e.Seq, true)
		if e.Container != nil {
			l.kills[e.ID] = e
		}
		return nil
	})
	if err != nil {
		t.Logf("read the stream: %v", err)
	}
	return l
}

// check holds the events against the outcomes. pods are by container ID.
func (l *ledger) check(t *testing.T, pods map[string]*corev1.Pod) {
	t.Helper()
	for epoch, seqs := range l.seqs {
		handed := l.handed[epoch]
		for seq := uint64(1); seq <= slices.Max(slices.Concat(slices.Collect(maps.Keys(seqs)), slices.Collect(maps.Keys(handed)))); seq++ {
			if n := seqs[seq]; n > 1 || n == 0 && !handed[seq] && !l.lostWithEpoch(epoch, seq) {
				t.Errorf("epoch %d: seq %d is in %d events and gaps", epoch, seq, n)
			}
		}
	}
	for kill := range l.outcomes {
		if _, ok := l.kills[kill]; !ok {
			t.Errorf("an outcome of %s, which is no kill of a pod", kill)
		}
	}
	for id, e := range l.kills {
		pod := pods[e.Container.ContainerID]
		all := l.outcomes[id]
		if pod == nil || len(all) != 1 || all[0].Pod == nil || all[0].Pod.UID != string(pod.UID) {
			t.Errorf("kill %s in container %s has the outcomes %+v", id, e.Container.ContainerID, all)
			continue
		}
		o := all[0]
		l.results[string(o.Result)+"/"+string(o.Reason)]++
		switch {
		case o.Result == event.ResultAnnotated:
			l.marks[o.Pod.UID]++
		case o.Reason != event.ReasonBudget && o.Reason != event.ReasonAlready && o.Reason != event.ReasonUnavailable:
			t.Errorf("outcome %+v", o)
		}
	}
	for uid, n := range l.marks {
		if n > 1 {
			t.Errorf("pod %s was marked %d times", uid, n)
		}
	}
	for _, g := range l.gaps {
		t.Logf("gap: epoch %d, %s, seq %d..%d", g.Node.Epoch, g.Cause, g.FirstSeq, g.LastSeq)
		if g.Count == nil && g.CountMax == nil {
			t.Errorf("a gap of an unknown size: %+v", g)
		}
	}
}

// lostWithEpoch reports whether the gap at the beginning of the next epoch names a seq of this one. Some of those that it names may
// have been published.
func (l *ledger) lostWithEpoch(epoch, seq uint64) bool {
	return slices.ContainsFunc(l.gaps, func(g event.Gap) bool {
		for other := range l.seqs {
			if epoch < other && other < g.Node.Epoch {
				return false
			}
		}
		return g.Cause == event.GapRestart && epoch < g.Node.Epoch && g.FirstSeq <= seq && seq <= g.LastSeq
	})
}

// sizes are the gaps for people.
func (l *ledger) sizes() map[string]int {
	all := map[string]int{}
	for _, g := range l.gaps {
		all[string(g.Cause)]++
	}
	return all
}
