package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sys/unix"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// fleet are the connections of as many tracers as there are nodes, each with the token of a pod of its own, as the chart has them: three
// servers, and two replicas of oom-auth that ask an API server.
type fleet struct {
	*tokens
	auths []*auth
	nodes []*fleetNode
}

// fleetNode is what a tracer has of NATS.
type fleetNode struct {
	name      string
	cfg       config.Config
	conn      *bus.Conn
	publisher *bus.Publisher
	seq       uint64

	mu   sync.Mutex
	sent map[string]time.Time // kills that are not acknowledged, by ID
	took []time.Duration      // of those that are
}

// TestScale: tracers of many nodes log in at once, and some of them publish a storm of kills. All lose NATS at once, and oom-auth is away for a
// while, too; with 1,000 connections and more also NATS alone. Every kill is stored once. OOM_SCALE_CONNECTIONS (200), OOM_SCALE_STORM (20 nodes) and OOM_SCALE_KILLS (10 of
// each) are the sizes; make bench-scale has larger ones.
func TestScale(t *testing.T) {
	count, storm, kills := scaleNumber(t, "OOM_SCALE_CONNECTIONS", 200), scaleNumber(t, "OOM_SCALE_STORM", 20), scaleNumber(t, "OOM_SCALE_KILLS", 10)
	figure := func(name, format string, args ...any) { t.Logf("%-44s "+format, append([]any{name}, args...)...) }
	began := time.Now()
	f := startFleet(t, count)
	figure("tokens made, s", "%d in %.1f", count, time.Since(began).Seconds())
	const authLost = "NATS and oom-auth lost"
	stormed := f.nodes[:storm]
	servers, auth := f.serverPIDs(), f.authPIDs()

	// herd waits until all are connected and each has a status stored.
	herd := func(name string, began time.Time, serverCPU, authCPU time.Duration, permitted, failed int) {
		f.allBack()
		took := time.Since(began).Seconds()
		figure(name+": all connected, s", "%.1f", took)
		figure(name+": logins a second", "%.0f", float64(count)/took)
		figure(name+": CPU of oom-auth, ms a login", "%.2f", (cpuTime(t, auth)-authCPU).Seconds()*1000/float64(count))
		figure(name+": decisions permitted, failed", "%d, %d", f.decisions("permitted")-permitted, f.decisions("failed")-failed)
		f.published(stormed)
		f.reportAll()
		figure(name+": and a status of each stored, s", "%.1f", time.Since(began).Seconds())
		figure(name+": CPU of the servers, s", "%.1f", (cpuTime(t, servers) - serverCPU).Seconds())
	}
	serverCPU, authCPU := cpuTime(t, servers), cpuTime(t, auth)
	began = time.Now()
	f.connect()
	herd("first login", began, serverCPU, authCPU, 0, 0)

	serverCPU, began = cpuTime(t, servers), time.Now()
	for _, n := range stormed {
		n.kill(t, kills)
	}
	f.published(stormed)
	figure("storm: kills acknowledged, s", "%d in %.1f", storm*kills, time.Since(began).Seconds())
	var took []time.Duration
	for _, n := range stormed {
		took = append(took, n.took...)
	}
	slices.Sort(took)
	figure("storm: to the acknowledgement, ms", "p50 %d, p99 %d", took[len(took)/2].Milliseconds(), took[len(took)*99/100].Milliseconds())
	figure("storm: CPU of the servers, s", "%.1f", (cpuTime(t, servers) - serverCPU).Seconds())
	f.holds(storm * kills)
	figure("servers: peak RSS, MiB", "%s", peakRSS(t, servers))

	rounds := []string{"NATS lost", authLost}
	if count < 1000 {
		rounds = rounds[1:]
	}
	for round, name := range rounds {
		for _, p := range f.processes {
			_ = p.Process.Kill()
		}
		for _, p := range f.processes {
			_ = p.Wait()
		}
		for _, n := range stormed {
			n.kill(t, 1)
		}
		f.wait("all have noticed", func() bool { return f.connected() == 0 })
		if name == authLost {
			for _, a := range f.auths {
				a.End(t)
			}
		}
		for i := range f.processes {
			f.start(i)
		}
		began, permitted, failed := time.Now(), 0, 0
		if name == authLost {
			time.Sleep(5 * time.Second) // logins fail: a server waits for two seconds
			for _, a := range f.auths {
				a.start(t)
			}
			began, auth, authCPU = time.Now(), f.authPIDs(), 0
		} else {
			permitted, failed, authCPU = f.decisions("permitted"), f.decisions("failed"), cpuTime(t, auth)
		}
		servers = f.serverPIDs()
		herd(name, began, 0, authCPU, permitted, failed)
		f.holds(storm * (kills + round + 1))
	}
	figure("kills: published, lost", "%d, 0", storm*(kills+len(rounds)))
	figure("servers, oom-auth: peak RSS, MiB", "%s; %s", peakRSS(t, servers), peakRSS(t, auth))
}

func scaleNumber(t *testing.T, name string, shipped int) int {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return shipped
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// startFleet has a token for each node, and nobody connected.
func startFleet(t *testing.T, count int) *fleet {
	t.Helper()
	f := &fleet{tokens: startTokens(t)}
	f.auths = []*auth{f.auth(), f.auth()}
	dir := t.TempDir()
	errs := make(chan error, 16)
	for w := range 16 {
		go func() {
			for i := w; i < count; i += 16 {
				if err := f.issueTo(fmt.Sprint("scale-", i), filepath.Join(dir, fmt.Sprint(i))); err != nil {
					errs <- err
					return
				}
			}
			errs <- nil
		}()
	}
	for range 16 {
		if err := <-errs; err != nil {
			t.Fatal(err)
		}
	}
	for i := range count {
		n := &fleetNode{name: fmt.Sprint("scale-", i), sent: map[string]time.Time{}}
		n.cfg = config.Default()
		n.cfg.NATS.URL, n.cfg.NATS.TokenFile = strings.Join(f.urls, ","), filepath.Join(dir, fmt.Sprint(i))
		f.nodes = append(f.nodes, n)
	}
	return f
}

// issueTo makes the pod of a node's tracer, and writes its token to a file.
func (f *fleet) issueTo(node, file string) error {
	ctx := f.t.Context()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: "oom-tracer-" + node},
		Spec:       corev1.PodSpec{NodeName: node, ServiceAccountName: "oom-tracer", Containers: []corev1.Container{{Name: "main", Image: "example.com/main:1"}}},
	}
	pod, err := f.c.Client.CoreV1().Pods(namespace).Create(ctx, pod, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	request := &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences:      []string{f.audience},
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: pod.Name, UID: pod.UID},
	}}
	issued, err := f.c.Client.CoreV1().ServiceAccounts(namespace).CreateToken(ctx, "oom-tracer", request, metav1.CreateOptions{})
	if err != nil {
		return err
	}
	return os.WriteFile(file, []byte(issued.Status.Token), 0o600)
}

// connect has all connect at once, and publish a status at each interval as the tracer does. What each does ends with the test.
func (f *fleet) connect() {
	f.t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	var connecting, running sync.WaitGroup
	errs := make(chan error, len(f.nodes))
	for _, n := range f.nodes {
		connecting.Go(func() { errs <- n.connect(ctx) })
	}
	f.t.Cleanup(func() {
		stop()
		running.Wait()
		for _, n := range f.nodes {
			if n.conn != nil {
				running.Go(n.conn.Close)
			}
		}
		running.Wait()
	})
	connecting.Wait()
	for range f.nodes {
		if err := <-errs; err != nil {
			f.t.Fatal(err)
		}
	}
	for _, n := range f.nodes {
		running.Go(func() { _ = n.publisher.Run(ctx) })
		running.Go(func() { n.report(ctx) })
	}
}

func (n *fleetNode) connect(ctx context.Context) (err error) {
	quiet := slog.New(slog.DiscardHandler)
	if n.conn, err = bus.Connect(ctx, n.cfg.NATS, bus.Options{Name: bus.TracerName(n.name), Background: true}, quiet); err != nil {
		return err
	}
	n.publisher, err = bus.NewPublisher(n.conn, bus.Window, bus.Hooks{OnAck: func(m bus.Msg, _ bool) {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.took = append(n.took, time.Since(n.sent[m.ID]))
		delete(n.sent, m.ID)
	}}, quiet)
	return err
}

// report publishes statuses as agent.report does.
func (n *fleetNode) report(ctx context.Context) {
	for {
		pause := n.cfg.Node.StatusInterval*9/10 + rand.N(n.cfg.Node.StatusInterval/5)
		if n.status(ctx) != nil {
			pause = 10 * time.Second
		}
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return
		}
	}
}

// status makes one attempt.
func (n *fleetNode) status(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	now := time.Now().UTC()
	s := event.NodeStatus{
		Schema: event.Schema, ID: fmt.Sprintf("%s-status-%d", n.name, now.UnixNano()), Time: now, Phase: event.PhaseAlive, Version: "scale", Prototype: "task", Pinned: true,
		Node: event.Node{Name: n.name, BootID: n.name, Kernel: "6.12.38+deb13-amd64", Tier: "fentry", Epoch: 1}, Since: now, Due: &now, Unseen: &event.Bounds{},
	}
	data, err := json.Marshal(&s)
	if err != nil {
		return err
	}
	m := bus.Msg{ID: s.ID, Subject: "oom.v1.node.status." + n.name, Data: data}
	_, err = n.conn.JetStream().PublishMsg(ctx, m.NATS(), jetstream.WithRetryAttempts(0))
	return err
}

// kill has kills published.
func (n *fleetNode) kill(t *testing.T, kills int) {
	t.Helper()
	for range kills {
		n.seq++
		limit := uint64(256 << 20)
		cgroup := &event.Cgroup{Path: "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0f1e2d3c_4b5a_6978_8796_000000000000.slice", ID: n.seq, Version: 2}
		e := event.Event{
			Schema: event.Schema, ID: event.VictimID(n.name, uint32(n.seq), 1), Seq: n.seq, Time: time.Now().UTC(), BoottimeNS: 1,
			Node:  event.Node{Name: n.name, BootID: n.name, Kernel: "6.12.38+deb13-amd64", Tier: "fentry", Epoch: 1},
			Scope: event.ScopeCgroup, Outcome: event.OutcomeKilled,
			Victim: event.Victim{PID: uint32(n.seq), TID: uint32(n.seq), Comm: "java", Cgroup: cgroup, Memory: &event.Memory{TotalVM: 4 * limit, AnonRSS: limit}},
			Limit:  &event.Limit{Cgroup: cgroup, Level: event.LevelPod, Max: &limit, Usage: &limit},
		}
		data, err := json.Marshal(&e)
		if err != nil {
			t.Fatal(err)
		}
		n.mu.Lock()
		n.sent[e.ID] = time.Now()
		n.mu.Unlock()
		if err := n.publisher.Enqueue(bus.Msg{ID: e.ID, Subject: "oom.v1.kill.cgroup." + n.name, Data: data}); err != nil {
			t.Fatal(err)
		}
	}
}

// connected is how many are.
func (f *fleet) connected() (n int) {
	for _, node := range f.nodes {
		if node.conn.Connected() {
			n++
		}
	}
	return n
}

// wait waits for something that takes the longer, the more nodes there are.
func (f *fleet) wait(what string, done func() bool) {
	f.t.Helper()
	within(f.t, time.Minute+time.Duration(len(f.nodes))*50*time.Millisecond, what, done)
}

func (f *fleet) allBack() {
	f.t.Helper()
	f.wait("all are connected", func() bool { return f.connected() == len(f.nodes) })
}

// published waits until nodes have no kill left.
func (f *fleet) published(nodes []*fleetNode) {
	f.t.Helper()
	f.wait("the kills are acknowledged", func() bool {
		return !slices.ContainsFunc(nodes, func(n *fleetNode) bool { return n.publisher.Pending() > 0 })
	})
}

// reportAll has each node publish a status, until it is stored.
func (f *fleet) reportAll() {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.t.Context(), 5*time.Minute)
	defer cancel()
	var reporting sync.WaitGroup
	var failed atomic.Int64
	for _, n := range f.nodes {
		reporting.Go(func() {
			for n.status(ctx) != nil {
				if ctx.Err() != nil {
					failed.Add(1)
					return
				}
				time.Sleep(rand.N(time.Second))
			}
		})
	}
	reporting.Wait()
	if failed.Load() > 0 {
		f.t.Errorf("%d nodes have no status stored", failed.Load())
	}
}

// holds checks that the stream has as many kills, and of each node the last status, by counting messages.
func (f *fleet) holds(kills int) {
	f.t.Helper()
	owner := f.owner()
	defer owner.nc.Close()
	for name, want := range map[string]int{event.StreamName: kills, event.NodesStreamName: len(f.nodes)} {
		eventually(f.t, "stream "+name, func() error {
			stream, err := owner.js.Stream(f.t.Context(), name)
			if err != nil {
				return err
			}
			if got := stream.CachedInfo().State.Msgs; got != uint64(want) {
				return fmt.Errorf("%d messages, want %d", got, want)
			}
			return nil
		})
	}
}

// serverPIDs and authPIDs are the processes of now.
func (f *fleet) serverPIDs() (pids []int) {
	for _, p := range f.processes {
		pids = append(pids, p.Process.Pid)
	}
	return pids
}

func (f *fleet) authPIDs() (pids []int) {
	for _, a := range f.auths {
		pids = append(pids, a.PID())
	}
	return pids
}

// cpuTime is what processes have used, in user space and in the kernel.
func cpuTime(t *testing.T, pids []int) (sum time.Duration) {
	t.Helper()
	for _, pid := range pids {
		var used unix.Timespec
		if err := unix.ClockGettime(int32(^pid)<<3|2, &used); err != nil { // MAKE_PROCESS_CPUCLOCK in include/linux/posix-timers.h
			t.Fatal(err)
		}
		sum += time.Duration(used.Nano())
	}
	return sum
}

// peakRSS lists the peak of each process, in MiB.
func peakRSS(t *testing.T, pids []int) string {
	t.Helper()
	var all []string
	for _, pid := range pids {
		_, rest, _ := strings.Cut(readFile(t, fmt.Sprintf("/proc/%d/status", pid)), "VmHWM:")
		var kib int
		if _, err := fmt.Sscan(rest, &kib); err != nil {
			t.Fatal(err)
		}
		all = append(all, strconv.Itoa(kib>>10))
	}
	return strings.Join(all, ", ")
}

// decisions are those of all replicas of oom-auth.
func (f *fleet) decisions(result string) (sum int) {
	f.t.Helper()
	for _, a := range f.auths {
		sum += int(a.decided(f.t, result))
	}
	return sum
}
