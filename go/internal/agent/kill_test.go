package agent

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kmsg"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

const (
	mib      = 1 << 20
	testNode = "node-1.example"
)

// testConfig is the default with an embedded server of the test's own and no metrics.
func testConfig(t *testing.T) config.Config {
	t.Helper()
	cfg := config.Default()
	cfg.NATS.Embedded.Dir = filepath.Join(t.TempDir(), "nats")
	cfg.NATS.Embedded.Listen = "127.0.0.1:0"
	cfg.Metrics.Listen = ""
	cfg.Kernel.PinDir = ""
	cfg.Node.StateFile = filepath.Join(t.TempDir(), "state.json")
	// As if a tracer had ended just now: what the machine killed before is nobody's gap here.
	if err := nothingMissed(cfg.Node.StateFile, testNode); err != nil {
		t.Fatal(err)
	}
	return cfg
}

// runTracer runs a tracer until stop is called, or the test ends.
func runTracer(t *testing.T, cfg config.Config, stdout io.Writer) (*tracer, func() error) {
	t.Helper()
	log := slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: slog.LevelWarn}))
	tr, err := start(t.Context(), cfg, testNode, stdout, log)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	ended := make(chan error, 1)
	go func() { ended <- tr.run(ctx) }()
	stop := sync.OnceValue(func() error {
		cancel()
		return <-ended
	})
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Error(err)
		}
	})
	return tr, stop
}

// killSubjects are those of the events of marks, with a kill and without.
var killSubjects = []string{"oom.v1.kill.>", "oom.v1.exiting.>"}

// in reports whether an event's victim was in the cgroup. A tracer sees every kill of the machine, and
// others may cause some meanwhile. One whose cgroup is not told may be ours, and is one too many if not.
func in(group *cgroupfs.Cgroup, e *event.Event) bool {
	return e.Victim.Cgroup == nil || e.Victim.Cgroup.ID == group.ID
}

// of picks the events whose victims were in the cgroup.
func of(group *cgroupfs.Cgroup, events []event.Event) []event.Event {
	return slices.DeleteFunc(slices.Clone(events), func(e event.Event) bool { return !in(group, &e) })
}

// parse reads a stored event.
func parse(t *testing.T, m bus.Stored) (event.Event, error) {
	t.Helper()
	e, err := event.Parse(m.Data)
	if err != nil {
		return e, err
	}
	if m.ID != e.MsgID() {
		t.Errorf("message id %q of event %q", m.ID, e.ID)
	}
	if subject, err := e.Subject(); err != nil || subject != m.Subject {
		t.Errorf("subject %q, %v, of an event stored on %q", subject, err, m.Subject)
	}
	return e, nil
}

// stored reads the stream until it holds want events of victims in the cgroup, and returns them.
func stored(t *testing.T, cfg config.Config, group *cgroupfs.Cgroup, want int) []event.Event {
	t.Helper()
	conn := connect(t, cfg)
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	var events []event.Event
	enough := fmt.Errorf("enough")
	err := bus.Tail(ctx, conn, bus.TailOptions{
		Subjects: killSubjects, Since: time.Now().Add(-time.Hour), Follow: true,
	}, func(m bus.Stored) error {
		e, err := parse(t, m)
		if err != nil {
			return err
		}
		if in(group, &e) {
			events = append(events, e)
		}
		if len(events) >= want {
			return enough
		}
		return nil
	})
	if err != nil && err != enough {
		t.Fatal(err)
	}
	if len(events) != want {
		t.Fatalf("%d events of %s are stored, want %d", len(events), group.Path(), want)
	}
	return events
}

// lookAgain is longer than a record may wait in the journal for its turn.
const lookAgain = time.Second

// until waits for something that must come.
func until(t *testing.T, what string, here func() bool) {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); !here(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

func connect(t *testing.T, cfg config.Config) *bus.Conn {
	t.Helper()
	conn, err := bus.Connect(t.Context(), cfg.NATS, bus.Options{Name: "test"}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

// compareWithConsole holds an event against what the kernel printed of the same kill.
func compareWithConsole(t *testing.T, e *event.Event, k *kmsg.Kill) {
	t.Helper()
	check := func(field string, got, want any) {
		if got != want {
			t.Errorf("%s: %s: %v, the console says %v", e.ID, field, got, want)
		}
	}
	near := func(field string, got, want uint64) {
		if max(got, want)-min(got, want) > rssSlack() {
			t.Errorf("%s: %s: %d, the console says %d", e.ID, field, got, want)
		}
	}
	check("victim.tid", int(e.Victim.TID), k.PID)
	check("victim.comm", e.Victim.Comm, k.Comm)
	check("victim.uid", *e.Victim.UID, k.UID)
	check("victim.oom_score_adj", *e.Victim.OOMScoreAdj, k.OOMScoreAdj)
	check("victim.memory.total_vm", e.Victim.Memory.TotalVM, k.TotalVM)
	check("victim.memory.pgtables", e.Victim.Memory.PgTables, k.PgTables)
	near("victim.memory.anon_rss", e.Victim.Memory.AnonRSS, k.AnonRSS)
	near("victim.memory.file_rss", e.Victim.Memory.FileRSS, k.FileRSS)
	near("victim.memory.shmem_rss", e.Victim.Memory.ShmemRSS, k.ShmemRSS)
	if k.Constraint != "" { // the header line is rate-limited
		check("scope", e.Scope, map[string]event.Scope{"CONSTRAINT_MEMCG": event.ScopeCgroup, "CONSTRAINT_NONE": event.ScopeGlobal}[k.Constraint])
		check("victim.cgroup.path", e.Victim.Cgroup.Path, k.TaskMemcg)
		check("limit.cgroup.path", e.Limit.Cgroup.Path, k.OOMMemcg)
	}
}

// percpuRSS reports whether this kernel counts a process's memory per CPU (since v6.2, see
// core_fixes.bpf.h). Only these counts can be summed exactly.
func percpuRSS(t *testing.T) bool {
	t.Helper()
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	var mm *btf.Struct
	if err := kernel.TypeByName("mm_struct", &mm); err != nil {
		t.Fatal(err)
	}
	members := mm.Members
	for len(members) > 0 {
		m := members[0]
		members = members[1:]
		if m.Name == "rss_stat" {
			_, percpu := m.Type.(*btf.Array) // else struct mm_rss_stat
			return percpu
		}
		if inner, ok := m.Type.(*btf.Struct); ok && m.Name == "" {
			members = append(members, inner.Members...)
		}
	}
	t.Fatal("struct mm_struct has no rss_stat")
	return false
}

// inferred reports whether a tier can but infer whose limit was hit: the hooks are told.
func inferred(tier loader.Tier) bool { return tier == loader.TierStack }

// TestStorm: a thousand kills. The cgroup's own counter says how many there were; every one of them is
// in the stream, once; and what the console printed of them is what the events say.
func TestStorm(t *testing.T) {
	oomtest.Slow(t)
	const kills = 1000
	cfg := testConfig(t)
	tr, stop := runTracer(t, cfg, io.Discard)
	cfg.NATS.Embedded.Listen = strings.TrimPrefix(tr.server.ClientURL(), "nats://")
	console, err := kmsg.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	type readout struct {
		kills []kmsg.Kill
		err   error
	}
	read, over := make(chan readout, 1), make(chan struct{})
	go func() {
		// All along, for the kernel's buffer is smaller than the storm.
		kills, err := console.Read(func([]kmsg.Kill) bool {
			select {
			case <-over:
				return true
			default:
				return false
			}
		}, 5*time.Minute)
		read <- readout{kills, err}
	}()
	group := oomtest.New(t, 8*mib)
	killed := oomtest.Storm(t, group, kills, 16, "plain")
	counted := oomtest.Kills(t, group)
	if counted != kills || len(killed) != kills {
		t.Fatalf("the cgroup counts %d kills and the hog %d of %d", counted, len(killed), kills)
	}
	stored(t, cfg, group, counted)
	if err := stop(); err != nil {
		t.Error(err)
	}
	all, _ := whole(t, cfg)
	events := of(group, all)

	exact := percpuRSS(t)
	byTID := map[uint32]*event.Event{}
	ids, seqs := map[string]bool{}, map[uint64]bool{}
	// The victim asks for the memory that is not there, but now and then, on a busy machine, its parent is the
	// one: what it writes after the fork are pages that it shared.
	parents := map[uint32]int{}
	for i := range all {
		seqs[all[i].Seq] = true
	}
	for i := range events {
		e := &events[i]
		ids[e.ID] = true
		if e.Trigger.PID != e.Victim.PID {
			parents[e.Trigger.PID]++
		}
		byTID[e.Victim.TID] = e
		if e.Scope != event.ScopeCgroup || e.Outcome != event.OutcomeKilled || e.Node.Name != testNode ||
			e.Victim.Cgroup == nil || *e.Limit.Max != 8*mib || e.Limit.Cgroup.ID != group.ID ||
			e.Trigger.Comm != "hog" || e.Trigger.Cgroup.ID != group.ID || e.Incident.Group || e.Incident.Index != 0 ||
			e.Victim.Memory.Approximate == exact || (e.Victim.Memory.Batched != nil) != exact ||
			e.Node.Tier != string(tr.loader.Tier()) || e.Limit.Inferred != inferred(tr.loader.Tier()) {
			text, _ := json.Marshal(e)
			t.Errorf("%s", text)
		}
	}
	if len(events) != counted || len(ids) != counted || len(seqs) != len(all) || !seqs[1] || !seqs[uint64(len(all))] {
		t.Errorf("%d events and %d ids of %d kills; %d seqs of %d events", len(events), len(ids), counted, len(seqs), len(all))
	}
	for pid, kills := range parents {
		if len(parents) > 1 || kills > counted/10 || byTID[pid] != nil {
			t.Errorf("process %d triggered %d kills of others", pid, kills)
		}
	}
	for _, pid := range killed {
		if byTID[uint32(pid)] == nil {
			t.Errorf("process %d was killed and no event says so", pid)
		}
	}
	close(over)
	said := <-read
	if said.err != nil {
		t.Error(said.err)
	}
	printed := said.kills
	compared, headers := 0, 0
	for i := range printed {
		if e := byTID[uint32(printed[i].PID)]; e != nil {
			compareWithConsole(t, e, &printed[i])
			compared++
			if printed[i].Constraint != "" {
				headers++
			}
		}
	}
	t.Logf("%d kills, %d events, %d of others; %d compared with the console, %d of them with the header line; console lost lines: %t",
		counted, len(ids), len(all)-len(events), compared, headers, console.Lost)
	if compared < kills*9/10 || headers == 0 {
		t.Errorf("only %d of %d kills could be compared with the console, %d with the header line", compared, kills, headers)
	}
}

// TestThreadedVictim: the leader has exited, another thread allocates: the process is named, not the
// thread.
func TestThreadedVictim(t *testing.T) {
	cfg := testConfig(t)
	tr, _ := runTracer(t, cfg, io.Discard)
	cfg.NATS.Embedded.Listen = strings.TrimPrefix(tr.server.ClientURL(), "nats://")
	group := oomtest.New(t, 8*mib)
	killed := oomtest.Storm(t, group, 3, 32, "threaded")
	if len(killed) != 3 {
		t.Fatalf("%d of 3 were killed", len(killed))
	}
	for i, e := range stored(t, cfg, group, 3) {
		if int(e.Victim.PID) != killed[i] || e.Victim.TID == e.Victim.PID || e.Victim.Comm != "hog-thread" ||
			e.Victim.NSPID != e.Victim.PID || e.Victim.Memory == nil || !strings.Contains(e.ID, fmt.Sprintf("-%d-", killed[i])) {
			t.Errorf("process %d: %+v", killed[i], e.Victim)
		}
	}
}

// TestAlreadyExiting: the biggest process of a full cgroup is dying anyway (a frozen task cannot act on its
// SIGKILL). The kernel marks it and does not kill it, and the event says the same.
func TestAlreadyExiting(t *testing.T) {
	freezer := oomtest.Freezer(t)
	cfg := testConfig(t)
	tr, stop := runTracer(t, cfg, io.Discard)
	cfg.NATS.Embedded.Listen = strings.TrimPrefix(tr.server.ClientURL(), "nats://")
	group := oomtest.New(t, 32*mib)
	dying := oomtest.Hold(t, group, 20)
	freezer.Freeze(t, dying.Pid)
	if err := dying.Kill(); err != nil {
		t.Fatal(err)
	}
	// exit_mmap() sets MMF_OOM_SKIP before the pages that it has unmapped are given back: whoever
	// charges in between finds a full cgroup without the dying one, and the kernel kills after all.
	killed := oomtest.Storm(t, group, 1, 16, "plain")
	if kills := oomtest.Kills(t, group); kills != len(killed) {
		t.Fatalf("the kernel killed %v, and counts %d", killed, kills)
	}
	stored(t, cfg, group, 1+len(killed))
	if err := stop(); err != nil {
		t.Error(err)
	}
	all, _ := whole(t, cfg)
	marked := 0
	for _, e := range of(group, all) {
		if len(killed) == 1 && int(e.Victim.PID) == killed[0] {
			if e.Outcome != event.OutcomeKilled || e.Kind() != event.KindKill {
				t.Errorf("killed: %+v", e)
			}
			continue
		}
		marked++
		if int(e.Victim.PID) != dying.Pid || e.Outcome != event.OutcomeExiting || e.Scope != event.ScopeCgroup || e.Kind() != event.KindExiting ||
			!strings.HasSuffix(e.ID, fmt.Sprintf("-exit-%d", dying.Pid)) || e.Incident != nil {
			t.Errorf("%+v", e)
		}
	}
	if marked != 1 {
		t.Errorf("%d events of the dying process %d", marked, dying.Pid)
	}
	others := 0
	for _, e := range all {
		if !in(group, &e) && e.Kind() == event.KindKill && e.Scope == event.ScopeCgroup {
			others++
		}
	}
	kills := 0.0
	for _, level := range levels(event.ScopeCgroup) {
		kills += testutil.ToFloat64(tr.metrics.kills.WithLabelValues("cgroup", level))
	}
	if int(kills) != len(killed)+others {
		t.Errorf("%v kills are counted, the kernel killed %v, and %d elsewhere", kills, killed, others)
	}
}

// TestNested: the limit is two levels above the victim's cgroup, which is laid out as a kubelet does.
func TestNested(t *testing.T) {
	const (
		uid = "0f1e2d3c-4b5a-6978-8796-a5b4c3d2e1f0"
		id  = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	)
	cfg := testConfig(t)
	tr, _ := runTracer(t, cfg, io.Discard)
	cfg.NATS.Embedded.Listen = strings.TrimPrefix(tr.server.ClientURL(), "nats://")

	root := oomtest.New(t, 512*mib)
	if root.Version == 1 {
		// Siblings of the limit that have more room must not be taken for its owner.
		t.Log("cgroup v1")
	}
	kubepods := oomtest.Child(t, root, "kubepods", 256*mib)
	burstable := oomtest.Child(t, kubepods, "burstable", cgroupfs.Unlimited)
	pod := oomtest.Child(t, burstable, "pod"+uid, 8*mib)
	container := oomtest.Child(t, pod, id, 64*mib)
	leaf := container
	for level := range 10 {
		leaf = oomtest.Child(t, leaf, fmt.Sprintf("level-%d", level), cgroupfs.Unlimited)
	}
	console, err := kmsg.Open()
	if err != nil {
		t.Fatal(err)
	}
	defer console.Close()
	killed := oomtest.Storm(t, leaf, 1, 16, "plain")
	if len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	e := stored(t, cfg, leaf, 1)[0]
	if e.Victim.Cgroup.Path != leaf.Path() || e.Victim.Cgroup.ID != leaf.ID || e.Victim.Cgroup.Truncated {
		t.Errorf("victim in %+v, want %s", e.Victim.Cgroup, leaf.Path())
	}
	if e.Limit.Cgroup.Path != pod.Path() || e.Limit.Cgroup.ID != pod.ID || *e.Limit.Max != 8*mib || e.Limit.Level != event.LevelPod ||
		e.Limit.Inferred != inferred(tr.loader.Tier()) {
		t.Errorf("limit %+v %+v, want %s", e.Limit, e.Limit.Cgroup, pod.Path())
	}
	want := event.Container{PodUID: uid, ContainerID: id, QoS: "burstable"}
	if e.Container == nil || *e.Container != want {
		t.Errorf("container %+v, want %+v", e.Container, want)
	}
	isKilled := func(k kmsg.Kill) bool { return k.PID == killed[0] }
	printed, err := console.Read(func(k []kmsg.Kill) bool { return slices.ContainsFunc(k, isKilled) }, 5*time.Second)
	i := slices.IndexFunc(printed, isKilled)
	if err != nil || i < 0 {
		t.Fatalf("the console says %v, %v", printed, err)
	}
	compareWithConsole(t, &e, &printed[i])
}

// TestDeepPath: a path that does not fit is cut where it says so, and names no pod.
func TestDeepPath(t *testing.T) {
	cfg := testConfig(t)
	tr, _ := runTracer(t, cfg, io.Discard)
	cfg.NATS.Embedded.Listen = strings.TrimPrefix(tr.server.ClientURL(), "nats://")
	name := strings.Repeat("x", 250)
	group := oomtest.New(t, 8*mib)
	leaf := group
	for range 16 {
		leaf = oomtest.Child(t, leaf, name, cgroupfs.Unlimited)
	}
	oomtest.Storm(t, leaf, 1, 16, "plain")
	e := stored(t, cfg, leaf, 1)[0]
	c := e.Victim.Cgroup
	if !c.Truncated || !strings.HasPrefix(c.Path, ".../xxx") || !strings.HasSuffix(leaf.Path(), strings.TrimPrefix(c.Path, "...")) || c.ID != leaf.ID {
		t.Errorf("%+v, want the end of %s", c, leaf.Path())
	}
	if e.Container != nil {
		t.Errorf("a cut path names %+v", e.Container)
	}
}

// TestPlainSubscriber: whoever subscribes with any NATS client sees the stored bytes on the same subject.
func TestPlainSubscriber(t *testing.T) {
	cfg := testConfig(t)
	var lines bytes.Buffer
	tr, stop := runTracer(t, cfg, &lines)
	password, err := bus.ReadEmbeddedPassword(cfg.NATS.Embedded.Dir)
	if err != nil {
		t.Fatal(err)
	}
	nc, err := nats.Connect(tr.server.ClientURL(), nats.UserInfo(bus.EmbeddedUser, password))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	sub, err := nc.SubscribeSync("oom.v1.kill.>")
	if err != nil {
		t.Fatal(err)
	}
	if err := nc.Flush(); err != nil {
		t.Fatal(err)
	}
	group := oomtest.New(t, 8*mib)
	killed := oomtest.Storm(t, group, 1, 16, "plain")
	var msg *nats.Msg
	var e event.Event
	for ours := false; !ours; ours = err != nil || in(group, &e) {
		if msg, err = sub.NextMsg(10 * time.Second); err != nil {
			t.Fatal(err)
		}
		e, err = event.Parse(msg.Data)
	}
	if err != nil || int(e.Victim.PID) != killed[0] || msg.Subject != "oom.v1.kill.cgroup.node-1_example" {
		t.Errorf("%s: %s, %v", msg.Subject, msg.Data, err)
	}
	cfg.NATS.Embedded.Listen = strings.TrimPrefix(tr.server.ClientURL(), "nats://")
	again, err := json.Marshal(stored(t, cfg, group, 1)[0])
	if err != nil || !bytes.Equal(again, msg.Data) {
		t.Errorf("stored %s, heard %s", again, msg.Data)
	}
	if err := stop(); err != nil {
		t.Error(err)
	}
	all, gaps := whole(t, cfg)
	if line := lines.String(); strings.Count(line, "\n") != len(all)+len(gaps) || strings.Count(line, fmt.Sprintf("hog[%d]", killed[0])) != 1 {
		t.Errorf("printed %q of %d events and %d gaps", line, len(all), len(gaps))
	}
}

// TestMalformedSamples: rubbish of every length is counted, and the next kill comes through.
func TestMalformedSamples(t *testing.T) {
	cfg := testConfig(t)
	var log bytes.Buffer
	tr, err := start(t.Context(), cfg, testNode, io.Discard, slog.New(slog.NewTextHandler(&log, nil)))
	if err != nil {
		t.Fatal(err)
	}
	publishing, published := context.WithCancel(t.Context())
	ran := make(chan error, 1)
	go func() { ran <- tr.publisher.Run(publishing) }()
	const samples = 600
	for n := range samples { // of up to 4,193 bytes
		until(t, "it is taken", func() bool { return tr.record(uint64(1_000_000+n), bytes.Repeat([]byte{0xff}, 7*n)) })
	}
	published()
	if err := <-ran; err != nil {
		t.Error(err)
	}
	if got := testutil.ToFloat64(tr.metrics.events.WithLabelValues("error", "decode")); got != samples {
		t.Errorf("%v of %d bad samples are counted", got, samples)
	}
	if strings.Count(log.String(), "cannot decode a record") != samples {
		t.Error("not every bad sample is logged")
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- tr.run(ctx) }()
	group := oomtest.New(t, 8*mib)
	oomtest.Storm(t, group, 1, 16, "plain")
	cfg.NATS.Embedded.Listen = strings.TrimPrefix(tr.server.ClientURL(), "nats://")
	stored(t, cfg, group, 1)
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}

// TestOtherNode: on a kernel that several nodes share, the kills of the others are theirs.
func TestOtherNode(t *testing.T) {
	cfg := testConfig(t)
	cfg.Node.CgroupRoot = "/docker/somebody-else"
	tr, stop := runTracer(t, cfg, io.Discard)
	group := oomtest.New(t, 8*mib)
	oomtest.Storm(t, group, 2, 16, "plain")
	if err := stop(); err != nil {
		t.Error(err)
	}
	// Of the machine's other kills, those whose path is cut are everybody's, and the rest are skipped too.
	all, gaps := whole(t, cfg)
	gaps = sinceStart(gaps)
	skipped := testutil.ToFloat64(tr.metrics.events.WithLabelValues("skipped", "other_node"))
	if read := tr.loader.Counts().Head; skipped < 2 || int(skipped)+len(all) != int(read) {
		t.Errorf("%v of %d records were left to the other node, 2 kills were its; %d are published", skipped, read, len(all))
	}
	for _, e := range all {
		if in(group, &e) || !e.Victim.Cgroup.Truncated {
			t.Errorf("published: %+v in %+v", e.Victim, e.Victim.Cgroup)
		}
	}
	withoutHole(t, all, gaps, tr.loader.Counts().Head)
	for _, g := range gaps {
		if g.Cause != event.GapOtherNode || g.Missing() {
			t.Errorf("%+v", g)
		}
	}
}

// TestTwoNodes: of two nodes on one kernel each tells of its own kills, and names all others as the other's.
func TestTwoNodes(t *testing.T) {
	root := oomtest.New(t, cgroupfs.Unlimited)
	groups := []*cgroupfs.Cgroup{oomtest.Child(t, root, "a", 8*mib), oomtest.Child(t, root, "b", 8*mib)}
	type node struct {
		cfg    config.Config
		tr     *tracer
		stop   func() error
		killed []int
	}
	var nodes []*node
	for _, group := range groups {
		n := &node{cfg: pinnedConfig(t)}
		n.cfg.Node.CgroupRoot = group.Path()
		n.tr, n.stop = runTracer(t, n.cfg, io.Discard)
		nodes = append(nodes, n)
	}
	for range 3 {
		for i, n := range nodes {
			n.killed = append(n.killed, oomtest.Storm(t, groups[i], 5, 16, "plain")...)
		}
	}
	for i, n := range nodes {
		until(t, "everything is acknowledged", func() bool { return n.tr.loader.Counts().Acked == n.tr.loader.Counts().Head })
		head := n.tr.loader.Counts().Head
		if err := n.stop(); err != nil {
			t.Error(err)
		}
		events, gaps := whole(t, n.cfg)
		gaps = sinceStart(gaps)
		withoutHole(t, events, gaps, head)
		var told []int
		for _, e := range events {
			if e.Victim.Cgroup != nil && !e.Victim.Cgroup.Truncated { // those that are cut are everybody's
				told = append(told, int(e.Victim.PID))
			}
		}
		if !slices.Equal(told, n.killed) || len(gaps) < 15 {
			t.Errorf("node %d: killed were %v, told are %v; %d gaps", i, n.killed, told, len(gaps))
		}
	}
}

// TestRefused: what NATS refuses for good is in a gap, and holds up nothing.
func TestRefused(t *testing.T) {
	addr := oomtest.FreeAddr(t)
	file := filepath.Join(t.TempDir(), "nats.conf")
	if err := os.WriteFile(file, []byte("max_payload: 900\n"), 0o600); err != nil { // a kill takes more, a gap less
		t.Fatal(err)
	}
	cfg := testConfig(t)
	cfg.NATS.URL = "nats://" + addr
	natsServer(t, addr, t.TempDir(), "-c", file)
	if err := bus.EnsureStreams(t.Context(), connect(t, cfg), cfg.NATS.Stream); err != nil {
		t.Fatal(err)
	}
	tr, stop := runTracer(t, cfg, io.Discard)
	group := oomtest.New(t, 4*mib)
	oomtest.Storm(t, group, bus.Window+50, 8, "plain") // more than may be on their way
	until(t, "everything is acknowledged", func() bool { return tr.loader.Counts().Acked == tr.loader.Counts().Head })
	head := tr.loader.Counts().Head
	if err := stop(); err != nil {
		t.Error(err)
	}
	events, gaps := record(t, connect(t, cfg))
	gaps = sinceStart(gaps)
	withoutHole(t, events, gaps, head)
	dropped := 0
	for _, g := range gaps {
		if g.Cause == event.GapDropped && g.Count != nil && *g.Count == 1 && g.FirstSeq == g.LastSeq {
			dropped++
		}
	}
	if dropped < bus.Window+50 {
		t.Errorf("%d kills are told as dropped, of %d events and %d gaps", dropped, len(events), len(gaps))
	}
}

// natsServer runs a nats-server process on addr with its store in dir.
func natsServer(t *testing.T, addr, dir string, args ...string) *exec.Cmd {
	t.Helper()
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		t.Fatal(err)
	}
	server := exec.Command(oomtest.Program(t, "nats-server"), append([]string{"-a", host, "-p", port, "-js", "-sd", dir}, args...)...)
	server.Stderr = t.Output()
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = server.Process.Kill()
		_ = server.Wait()
	})
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("tcp", addr); err == nil {
			c.Close()
			return server
		}
		if time.Now().After(deadline) {
			t.Fatal("nats-server does not come up")
		}
	}
}

// TestNATSAway: kills that happen while NATS is not there yet, and while it is gone, arrive when it comes.
// They wait in the journal; nothing counts as published before it is.
func TestNATSAway(t *testing.T) {
	oomtest.Slow(t)
	addr, store := oomtest.FreeAddr(t), t.TempDir()
	cfg := testConfig(t)
	cfg.NATS.URL = "nats://" + addr
	tr, _ := runTracer(t, cfg, io.Discard)
	if err := tr.natsReady(t.Context()); err == nil {
		t.Error("ready without nats")
	}
	group := oomtest.New(t, 8*mib)
	killed := oomtest.Storm(t, group, 7, 16, "plain") // before the first connection

	server := natsServer(t, addr, store)
	until(t, "connected", tr.conn.Connected)
	owner := connect(t, cfg)
	if err := bus.EnsureStreams(t.Context(), owner, cfg.NATS.Stream); err != nil {
		t.Fatal(err)
	}
	until(t, "everything is acknowledged", func() bool { return tr.loader.Counts().Acked == tr.loader.Counts().Head })
	before := tr.loader.Counts()

	if err := server.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = server.Wait()
	killed = append(killed, oomtest.Storm(t, group, 400, 16, "plain")...)
	until(t, "no more may be on their way", func() bool { return tr.publisher.Pending() == bus.Window })
	time.Sleep(2 * lookAgain)
	if err := tr.loader.Alive(t.Context()); err != nil {
		t.Error(err)
	}
	if now := tr.loader.Counts(); now.Acked != before.Acked || now.Head < before.Head+400 {
		t.Errorf("with nats away: %+v, before it went %+v", now, before)
	}
	natsServer(t, addr, store)
	var told []int
	for _, e := range stored(t, cfg, group, len(killed)) {
		told = append(told, int(e.Victim.PID))
	}
	if !slices.Equal(told, killed) {
		t.Errorf("killed were %v, events tell of %v", killed, told)
	}
	if lost := tr.loader.Counts().Lost; lost != 0 {
		t.Errorf("%d are lost", lost)
	}
	until(t, "everything is acknowledged", func() bool { return tr.loader.Counts().Acked == tr.loader.Counts().Head })
}

// TestSelftest runs it alone and beside a running tracer.
func TestSelftest(t *testing.T) {
	t.Run("alone", func(t *testing.T) {
		cfg := testConfig(t)
		var out bytes.Buffer
		// In this process the victim would be the test binary: the real one is run.
		checkSelftest(t, cfg, &out)
		if !strings.Contains(out.String(), "no tracer runs") {
			t.Error(out.String())
		}
	})
	t.Run("beside", func(t *testing.T) {
		cfg := testConfig(t)
		cfg.NATS.Embedded.Listen = oomtest.FreeAddr(t)
		cfg.Metrics.Listen = oomtest.FreeAddr(t)
		tracer := exec.Command(oomtest.Program(t, "oom-tracer"), "--config", oomtest.WriteConfig(t, cfg), "--node-name", testNode)
		tracer.Stderr = t.Output()
		lines, err := tracer.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := tracer.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = tracer.Process.Kill(); _ = tracer.Wait() }()
		for deadline := time.Now().Add(20 * time.Second); !obs.TracerRuns(t.Context(), cfg.Metrics.Listen); time.Sleep(20 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the tracer does not come up")
			}
		}
		var out bytes.Buffer
		checkSelftest(t, cfg, &out)
		if !strings.Contains(out.String(), "using the tracer that runs") {
			t.Error(out.String())
		}
		begun := time.Now()
		if err := tracer.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		defer time.AfterFunc(time.Minute, func() { _ = tracer.Process.Kill() }).Stop()
		printed, _ := io.ReadAll(lines)
		if err := tracer.Wait(); err != nil {
			t.Errorf("after SIGTERM: %v", err)
		}
		if took := time.Since(begun); took > 5*time.Second {
			t.Errorf("it took %s to end", took)
		}
		victim := regexp.MustCompile(`oom-selftest\[\d+\]`).FindString(out.String())
		if victim == "" || strings.Count(string(printed), victim) != 1 {
			t.Errorf("of %q the tracer printed %q", victim, printed)
		}
	})
}

func checkSelftest(t *testing.T, cfg config.Config, out io.Writer) {
	t.Helper()
	run := exec.Command(oomtest.Program(t, "oom-tracer"), "selftest", "--config", oomtest.WriteConfig(t, cfg), "--node-name", testNode)
	run.Stdout, run.Stderr = out, t.Output()
	temp := t.TempDir()
	run.Env = append(os.Environ(), "TMPDIR="+temp)
	if err := run.Run(); err != nil {
		t.Errorf("selftest: %v\n%s", err, out)
	}
	h, err := cgroupfs.Find("/proc")
	if err != nil {
		t.Fatal(err)
	}
	groups, _ := filepath.Glob(filepath.Join(h.Mount, fmt.Sprintf("oom-tracer-selftest-%d*", run.Process.Pid)))
	files, err := os.ReadDir(temp)
	if len(groups)+len(files) > 0 || err != nil {
		t.Errorf("left behind: %v %v, %v", groups, files, err)
	}
}

// TestSelftestSeesFaults: each fact of the event that is wrong is found.
func TestSelftestSeesFaults(t *testing.T) {
	adj, uid, limit := int16(1000), uint32(0), uint64(selftestLimit)
	good := func() *event.Event {
		c := func() *event.Cgroup { return &event.Cgroup{Path: "/x/oom-tracer-selftest-1", ID: 99, Version: 2} }
		adj, uid, limit := adj, uid, limit
		return &event.Event{
			Node: event.Node{Tier: "stack"}, Scope: event.ScopeCgroup, Outcome: event.OutcomeKilled,
			Victim: event.Victim{
				PID: 7, TID: 7, Comm: victimComm, UID: &uid, OOMScoreAdj: &adj, StartBoottimeNS: 123456789, Cgroup: c(),
				Memory: &event.Memory{TotalVM: 100 * mib, AnonRSS: 31 * mib, FileRSS: mib, PgTables: 4096},
			},
			Trigger: &event.Trigger{PID: 7, TID: 8, Comm: "exe", Cgroup: c()},
			Limit:   &event.Limit{Cgroup: c(), Level: event.LevelOther, Max: &limit, Inferred: true},
		}
	}
	want := &expectation{
		pid: 7, comm: victimComm, startTick: 12, cgroup: "/oom-tracer-selftest-1", id: 99, version: 2, limit: selftestLimit,
		console: &kmsg.Kill{TotalVM: 100 * mib, AnonRSS: 31*mib - 4096, FileRSS: mib, PgTables: 4096},
	}
	if wrong := want.compare(good()); wrong != nil {
		t.Fatal(wrong)
	}
	for field, change := range map[string]func(*event.Event){
		"outcome":                          func(e *event.Event) { e.Outcome = event.OutcomeExiting },
		"scope":                            func(e *event.Event) { e.Scope = event.ScopeGlobal },
		"victim.pid":                       func(e *event.Event) { e.Victim.PID++ },
		"victim.tid":                       func(e *event.Event) { e.Victim.TID++ },
		"victim.comm":                      func(e *event.Event) { e.Victim.Comm = "exe" },
		"victim.start":                     func(e *event.Event) { e.Victim.StartBoottimeNS += 1e7 },
		"victim.uid":                       func(e *event.Event) { *e.Victim.UID = 1 },
		"victim.uid is absent":             func(e *event.Event) { e.Victim.UID = nil },
		"victim.oom_score_adj":             func(e *event.Event) { *e.Victim.OOMScoreAdj = 999 },
		"victim.oom_score_adj is absent":   func(e *event.Event) { e.Victim.OOMScoreAdj = nil },
		"victim.cgroup is absent":          func(e *event.Event) { e.Victim.Cgroup = nil },
		"victim.cgroup.id":                 func(e *event.Event) { e.Victim.Cgroup.ID = 1 },
		"victim.cgroup.version":            func(e *event.Event) { e.Victim.Cgroup.Version = 1 },
		"victim.cgroup.path":               func(e *event.Event) { e.Victim.Cgroup.Path = "/x" },
		"trigger is absent":                func(e *event.Event) { e.Trigger = nil },
		"trigger.pid":                      func(e *event.Event) { e.Trigger.PID = 1 },
		"trigger.cgroup.path":              func(e *event.Event) { e.Trigger.Cgroup.Path = "/" },
		"limit is absent":                  func(e *event.Event) { e.Limit = nil },
		"limit.max":                        func(e *event.Event) { *e.Limit.Max++ },
		"limit.cgroup.id":                  func(e *event.Event) { e.Limit.Cgroup.ID = 1 },
		"victim.memory is absent":          func(e *event.Event) { e.Victim.Memory = nil },
		"victim.memory.total_vm":           func(e *event.Event) { e.Victim.Memory.TotalVM += 4096 },
		"victim.memory.anon_rss":           func(e *event.Event) { e.Victim.Memory.AnonRSS += mib },
		"victim.memory.file_rss":           func(e *event.Event) { e.Victim.Memory.FileRSS += mib },
		"victim.memory.shmem_rss":          func(e *event.Event) { e.Victim.Memory.ShmemRSS += mib },
		"victim.memory.pgtables":           func(e *event.Event) { e.Victim.Memory.PgTables += 4096 },
		"victim.memory.anon_rss: 16777216": func(e *event.Event) { e.Victim.Memory.AnonRSS = 16 * mib },
	} {
		e := good()
		change(e)
		if wrong := strings.Join(want.compare(e), "\n"); !strings.Contains(wrong, field) {
			t.Errorf("a wrong %s goes unnoticed: %q", field, wrong)
		}
	}
}

// TestShutdownUnderLoad: told to end in the middle of a storm, with nobody reading what it prints, the
// tracer ends in order and in time; what it had read is stored without a hole.
func TestShutdownUnderLoad(t *testing.T) {
	cfg := testConfig(t)
	cfg.Metrics.Listen = oomtest.FreeAddr(t)
	cfg.NATS.Embedded.Listen = oomtest.FreeAddr(t)
	tracer := exec.Command(oomtest.Program(t, "oom-tracer"), "--config", oomtest.WriteConfig(t, cfg), "--node-name", testNode)
	var log bytes.Buffer
	tracer.Stderr = &log
	// Nobody reads its standard output.
	reader, writer, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer reader.Close()
	tracer.Stdout = writer
	if err := tracer.Start(); err != nil {
		t.Fatal(err)
	}
	writer.Close()
	defer func() { _ = tracer.Process.Kill() }()
	for deadline := time.Now().Add(20 * time.Second); !obs.TracerRuns(t.Context(), cfg.Metrics.Listen); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the tracer does not come up")
		}
	}
	storm := make(chan error, 1)
	group := oomtest.New(t, 8*mib)
	const kills = 200
	hog := oomtest.Program(t, "hog")
	go func() {
		_, err := oomtest.RunStorm(t.Context(), group, hog, kills, 16, "plain")
		storm <- err
	}()
	for deadline := time.Now().Add(20 * time.Second); oomtest.Kills(t, group) < 20; time.Sleep(5 * time.Millisecond) {
		select {
		case err := <-storm:
			if err != nil {
				t.Fatal(err)
			}
			storm <- nil
		default:
		}
		if time.Now().After(deadline) {
			t.Fatal("the storm does not begin")
		}
	}
	begun := time.Now()
	if err := tracer.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	defer time.AfterFunc(time.Minute, func() { _ = tracer.Process.Kill() }).Stop()
	err = tracer.Wait()
	if took := time.Since(begun); err != nil || took > 5*time.Second {
		t.Errorf("it ended after %s: %v\n%s", took, err, log.String())
	}
	if err := <-storm; err != nil {
		t.Error(err)
	}
	// What it read before the end is all there, without a hole.
	all, _ := whole(t, cfg)
	seqs := map[uint64]bool{}
	var last uint64
	for _, e := range all {
		seqs[e.Seq], last = true, max(last, e.Seq)
	}
	if ours := len(of(group, all)); ours < 20 || uint64(len(seqs)) != last {
		t.Errorf("%d events, %d of the storm; the last has seq %d", len(seqs), ours, last)
	}
}
