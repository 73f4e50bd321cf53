package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"gopkg.in/yaml.v3"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/bus/embedded"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// These tests run build/oom-annotator as it ships against a real API server, with the shipped role, the
// shipped admission policy and the token of the shipped service account.

const (
	evictMe  = "oom-tracer.alpha.kubernetes.io/evict-me"
	lastKill = "oom-tracer.alpha.kubernetes.io/last-kill"
	node     = "worker-1.example.com"
)

// patience bounds what takes a moment on an idle machine.
const patience = 60 * time.Second

func TestEndToEnd(t *testing.T) {
	c := kubetest.Start(t)
	c.Node(node)
	c.Node("worker-2")
	c.Namespace("shop")
	account := c.AnnotatorWith("config.policy.protections.static=false") // for those that have it so
	for name, test := range map[string]func(*testing.T, *kubetest.Cluster, *rest.Config){
		"RealKill": testRealKill, "Reborn": testReborn, "Static": testStatic, "Replay": testReplay, "Refused": testRefused,
		"Faults": testFaults, "Watch": testWatch, "Group": testGroup, "Verbs": testVerbs, "Denied": testDenied,
		"NATS": testNATS, "Run": testRun, "Replicas": testReplicas, "Permissions": testPermissions,
		"Accounts":   testAccounts,
		"Containers": testContainers, "Hung": testHung, "Requests": testRequests, "Clocks": testClocks, "Evictions": testEvictions,
	} {
		t.Run(name, func(t *testing.T) { test(t, c.In(t), account) })
	}
	// The last ones, for they take the server away.
	t.Run("Frozen", func(t *testing.T) { testFrozen(t, c.In(t), account) })
	t.Run("Outage", func(t *testing.T) { testOutage(t, c.In(t), account) })
}

// process is a program as it ships.
type process struct {
	cmd  *exec.Cmd
	out  *oomtest.Output
	done chan struct{} // closed when it has ended
	err  error         // then

	killed atomic.Bool // by the test
}

// start runs build/<program> until the test ends.
func start(t *testing.T, program string, args ...string) *process {
	t.Helper()
	p := &process{out: &oomtest.Output{}, done: make(chan struct{})}
	p.cmd = exec.Command(oomtest.Program(t, program), args...)
	return p.start(t)
}

func (p *process) start(t *testing.T) *process {
	t.Helper()
	p.cmd.Stdout, p.cmd.Stderr = p.out, p.out
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(func() {
		p.stop(t)
		if t.Failed() {
			t.Logf("%s said:\n%s", p.cmd.Path, p.out)
		}
	})
	return p
}

// kill ends it without a warning.
func (p *process) kill() {
	p.killed.Store(true)
	_ = p.cmd.Process.Kill() // it may have ended
	<-p.done
}

func (p *process) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// stop sends SIGTERM, which ends it within five seconds, and well.
func (p *process) stop(t *testing.T) {
	t.Helper()
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.done:
		if p.err != nil && !p.killed.Load() {
			t.Errorf("%s: %v", p.cmd.Path, p.err)
		}
	case <-time.After(8 * time.Second): // five, on a machine that does other things too
		_ = p.cmd.Process.Kill()
		<-p.done
		t.Errorf("%s does not end after a SIGTERM", p.cmd.Path)
	}
}

// rig is a NATS with an annotator.
type rig struct {
	t          *testing.T
	cfg        config.Config
	configPath string
	kubeconfig string
	annotator  *process

	patience  time.Duration // more than the usual
	server    *embedded.Server
	conn      *bus.Conn
	publisher *bus.Publisher
	outcomes  chan event.Outcome
	named     chan event.Outcome // of event.StageNeighbours
	closed    chan event.Outcome // of event.StageClose
	seq       uint64
}

func freePort(t *testing.T) string {
	t.Helper()
	for {
		addr := fmt.Sprintf("127.0.0.1:%d", 15000+rand.IntN(15000))
		if l, err := net.Listen("tcp", addr); err == nil {
			l.Close()
			return addr
		}
	}
}

// newConfig writes a config file: the defaults, but without budgets of any size, and with places of its own.
func newConfig(t *testing.T, change func(*config.Config)) (config.Config, string) {
	t.Helper()
	dir := t.TempDir()
	cfg := config.Default()
	cfg.Node.StateFile, cfg.Kernel.PinDir = "", ""
	cfg.NATS.Embedded = config.Embedded{Listen: freePort(t), Dir: filepath.Join(dir, "nats")}
	// The node and the owner of a test's pods are the same. What budgets do is a test of its own.
	cfg.Policy.Budgets = config.Budgets{Window: time.Minute, Cluster: 1000}
	cfg.Annotator.Listen, cfg.Metrics.Listen = freePort(t), ""
	cfg.Log.Level = "debug"
	change(&cfg)
	data, err := yaml.Marshal(yamlOf(cfg))
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "config.yaml")
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if back, err := config.Load(path); err != nil {
		t.Fatalf("%v\n%s", err, data)
	} else {
		cfg = back
	}
	return cfg, path
}

// yamlOf is what of a config these tests change.
func yamlOf(c config.Config) map[string]any {
	return map[string]any{
		"node":   map[string]any{"cgroup_root": c.Node.CgroupRoot, "state_file": c.Node.StateFile, "name": c.Node.Name},
		"kernel": map[string]any{"pin_dir": c.Kernel.PinDir},
		"nats":   map[string]any{"url": c.NATS.URL, "stream": map[string]any{"dedup_window": c.NATS.Stream.DedupWindow.String(), "replicas": c.NATS.Stream.Replicas, "max_bytes": uint64(c.NATS.Stream.MaxBytes)}, "embedded": map[string]any{"listen": c.NATS.Embedded.Listen, "dir": c.NATS.Embedded.Dir, "sync_always": false}},
		"policy": map[string]any{
			"annotation": c.Policy.Annotation, "max_event_age": c.Policy.MaxEventAge.String(), "inferred_limits": c.Policy.InferredLimits,
			"mark_lifetime": c.Policy.MarkLifetime.String(), "condition": c.Policy.Condition,
			"namespaces":  map[string]any{"exclude": c.Policy.Namespaces.Exclude},
			"protections": map[string]any{"static": c.Policy.Protections.Static},
			"budgets": map[string]any{
				"window": c.Policy.Budgets.Window.String(), "node": c.Policy.Budgets.Node, "owner": c.Policy.Budgets.Owner,
				"cluster": c.Policy.Budgets.Cluster, "cooldown": c.Policy.Budgets.Cooldown.String(),
			},
		},
		"annotator": map[string]any{"listen": c.Annotator.Listen, "wait_for_pod": c.Annotator.WaitForPod.String()},
		"metrics":   map[string]any{"listen": c.Metrics.Listen},
		"log":       map[string]any{"level": c.Log.Level},
	}
}

func keep(*config.Config) {}

// newRig starts a NATS and an annotator that uses an account.
func newRig(t *testing.T, c *kubetest.Cluster, account *rest.Config, change func(*config.Config)) *rig {
	t.Helper()
	r := newBus(t, change)
	r.kubeconfig = c.Kubeconfig(account)
	r.start()
	return r
}

// newBus starts a NATS, and no annotator.
func newBus(t *testing.T, change func(*config.Config)) *rig {
	t.Helper()
	r := &rig{t: t}
	r.cfg, r.configPath = newConfig(t, change)
	r.startNATS()
	t.Cleanup(r.stopNATS)
	r.connect()
	if err := bus.EnsureStreams(t.Context(), r.conn, r.cfg.NATS.Stream); err != nil {
		t.Fatal(err)
	}
	r.tail()
	return r
}

func (r *rig) startNATS() {
	r.t.Helper()
	server, err := embedded.Start(r.cfg.NATS.Embedded, slog.New(slog.DiscardHandler))
	if err != nil {
		r.t.Fatal(err)
	}
	r.server = server
}

func (r *rig) stopNATS() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := r.server.Shutdown(ctx); err != nil {
		r.t.Error(err)
	}
}

// connect makes the test's own connection.
func (r *rig) connect() {
	t := r.t
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	var err error
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		if r.conn, err = bus.Connect(t.Context(), r.cfg.NATS, bus.Options{Name: "test"}, log); err == nil {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
	t.Cleanup(r.conn.Close)
	if r.publisher, err = bus.NewPublisher(r.conn, 10000, bus.Hooks{}, log); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = r.publisher.Run(ctx)
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
}

// tail reads the outcomes.
func (r *rig) tail() {
	r.outcomes, r.named, r.closed = make(chan event.Outcome, 10000), make(chan event.Outcome, 10000), make(chan event.Outcome, 10000)
	ctx, cancel := context.WithCancel(context.WithoutCancel(r.t.Context()))
	done := make(chan struct{})
	go func() {
		defer close(done)
		err := bus.Tail(ctx, r.conn, bus.TailOptions{Subjects: []string{"oom.v1.outcome.>"}, Since: time.Unix(0, 0), Follow: true}, func(m bus.Stored) error {
			o, err := event.ParseOutcome(m.Data)
			switch {
			case err != nil:
			case o.Stage == event.StageNeighbours:
				r.named <- o
			case o.Stage == event.StageClose:
				r.closed <- o
			default:
				r.outcomes <- o
			}
			return err
		})
		if err != nil {
			r.t.Errorf("tail: %v", err)
		}
	}()
	r.t.Cleanup(func() {
		cancel()
		<-done
	})
}

func (r *rig) start() {
	r.annotator = start(r.t, "oom-annotator", "--config", r.configPath, "--kubeconfig", r.kubeconfig)
}

// get reads from the annotator's own server.
func (r *rig) get(path string) (int, string) {
	resp, err := http.Get("http://" + r.cfg.Annotator.Listen + path)
	if err != nil {
		return 0, err.Error()
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	return resp.StatusCode, string(body)
}

// ready waits until the annotator works.
func (r *rig) ready() {
	r.t.Helper()
	eventually(r.t, "the annotator is ready", func() error {
		select {
		case <-r.annotator.done:
			r.t.Fatal("the annotator has ended")
		default:
		}
		if code, body := r.get("/readyz"); code != http.StatusOK {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
}

func eventually(t *testing.T, what string, try func() error) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: not after %s: %v", what, patience, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// killOf is a kill of a pod's container by the node's limit, for which the pod is marked.
func (r *rig) killOf(pod *corev1.Pod, containerID string) event.Event {
	r.seq++
	return event.Event{
		Schema: event.Schema, ID: event.VictimID(r.t.Name()[strings.LastIndexByte(r.t.Name(), '/')+1:], uint32(r.seq), 1), Seq: r.seq,
		Time: time.Now().UTC(), BoottimeNS: 1, Node: event.Node{Name: node, BootID: "boot", Kernel: "6.1", Tier: "fentry"},
		Scope: event.ScopeGlobal, Outcome: event.OutcomeKilled, Victim: event.Victim{PID: uint32(r.seq), TID: uint32(r.seq), Comm: "java"},
		Limit:     &event.Limit{Level: event.LevelNode},
		Container: &event.Container{PodUID: string(pod.UID), ContainerID: containerID, QoS: "burstable"},
	}
}

// publish puts events on the stream, as a tracer does.
func (r *rig) publish(events ...event.Event) {
	r.t.Helper()
	for i := range events {
		data, err := json.Marshal(&events[i])
		if err != nil {
			r.t.Fatal(err)
		}
		subject, err := events[i].Subject()
		if err != nil {
			r.t.Fatal(err)
		}
		r.raw(events[i].ID, subject, data)
	}
}

// neighbours publishes what the pods held after a kill, as its tracer does.
func (r *rig) neighbours(e event.Event, pods ...event.PodMemory) {
	r.t.Helper()
	r.after(e, event.Neighbours{Pods: pods, PodsSeen: new(uint32(len(pods)))})
}

// after publishes what was read after a kill.
func (r *rig) after(e event.Event, n event.Neighbours) {
	r.t.Helper()
	n.Schema, n.ID, n.Incident, n.Kill = event.Schema, event.NeighboursID(e.Incident.ID), e.Incident.ID, e.ID
	n.Time, n.ReadNS, n.Node, n.Scope, n.Level = time.Now().UTC(), 1, e.Node, e.Scope, e.Limit.Level
	data, err := json.Marshal(&n)
	if err != nil {
		r.t.Fatal(err)
	}
	subject, err := n.Subject()
	if err != nil {
		r.t.Fatal(err)
	}
	r.raw(n.ID, subject, data)
}

func (r *rig) raw(id, subject string, data []byte) {
	r.t.Helper()
	if err := r.publisher.Enqueue(bus.Msg{ID: id, Subject: subject, Data: data}); err != nil {
		r.t.Fatal(err)
	}
}

// outcome waits for the next one.
func (r *rig) outcome() event.Outcome {
	r.t.Helper()
	select {
	case o := <-r.outcomes:
		return o
	case <-r.annotator.done:
		r.t.Fatal("the annotator has ended")
	case <-time.After(max(patience, r.patience)):
		r.t.Fatal("no outcome")
	}
	return event.Outcome{}
}

// others waits for what is said of the other pods.
func (r *rig) others() event.Outcome {
	r.t.Helper()
	select {
	case o := <-r.named:
		if o.Result != event.ResultObserved || o.Reason != event.ReasonNeighbours || o.ID != o.Kill+"/neighbours" {
			r.t.Errorf("outcome %+v", o)
		}
		return o
	case <-time.After(patience):
		r.t.Fatal("nothing is said of the other pods")
	}
	return event.Outcome{}
}

// last waits for the last word on a kill.
func (r *rig) last() event.Outcome {
	r.t.Helper()
	select {
	case o := <-r.closed:
		return o
	case <-time.After(patience):
		r.t.Fatal("no last word")
	}
	return event.Outcome{}
}

// want waits for the outcome of a kill and checks it.
func (r *rig) want(id, want string) event.Outcome {
	r.t.Helper()
	o := r.outcome()
	if got := string(o.Result) + "/" + string(o.Reason); o.Kill != id || got != want {
		r.t.Errorf("outcome of %s: %s (%s), want %s of %s", o.Kill, got, o.Detail, want, id)
	}
	return o
}

// settled waits until the stream's consumer has nothing left.
func (r *rig) settled() {
	r.t.Helper()
	eventually(r.t, "every message is settled", func() error {
		consumer, err := r.conn.JetStream().Consumer(r.t.Context(), event.StreamName, name)
		if err != nil {
			return err
		}
		if info := consumer.CachedInfo(); info.NumPending > 0 || info.NumAckPending > 0 {
			return fmt.Errorf("%d pending, %d not acknowledged", info.NumPending, info.NumAckPending)
		}
		return nil
	})
}

// versions are the resource versions of all pods: whatever changes one, changes them.
func versions(t *testing.T, c *kubetest.Cluster) map[string]string {
	t.Helper()
	list, err := c.Client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	all := map[string]string{}
	for _, p := range list.Items {
		all[p.Namespace+"/"+p.Name+"/"+string(p.UID)] = p.ResourceVersion
	}
	return all
}

func wantSame(t *testing.T, c *kubetest.Cluster, before map[string]string) {
	t.Helper()
	for pod, version := range versions(t, c) {
		if was, ok := before[pod]; ok && was != version {
			t.Errorf("%s was changed", pod)
		}
	}
}

// summary is which kill a pod was marked for.
func summary(t *testing.T, pod *corev1.Pod) (s pods.Summary) {
	t.Helper()
	if err := json.Unmarshal([]byte(pod.Annotations[lastKill]), &s); err != nil {
		t.Errorf("%s: %v", pod.Name, err)
	}
	return s
}

// patchesPod tells a request to mark a pod from others, such as to update an Event.
func patchesPod(req *http.Request) bool {
	return req.Method == http.MethodPatch && strings.Contains(req.URL.Path, "/pods/")
}

func unprotected(cfg *config.Config) { cfg.Policy.Protections.Static = false }

// testRealKill: a real OOM kill of a process in a cgroup that is laid out as a kubelet's, at the limit of all
// pods together. Tracer and annotator run as they ship; the annotation appears on the pod, and on no other.
func testRealKill(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	root := oomtest.New(t, 512<<20)
	pod := c.Pod("shop", "web-0", node)
	c.Pod("shop", "web-1", node)
	before := versions(t, c)

	r := &rig{t: t, kubeconfig: c.Kubeconfig(account)}
	r.cfg, r.configPath = newConfig(t, func(cfg *config.Config) {
		cfg.Node.CgroupRoot = root.Path() // other tests' kills are none of this node's
		cfg.Policy.InferredLimits = true  // not every machine that runs the tests permits hooks
	})
	start(t, "oom-tracer", "--config", r.configPath, "--node-name", node)
	r.start()
	r.connect()
	r.tail()
	r.ready()

	id := c.ContainerID(pod, "main")
	kubepods := oomtest.Child(t, root, "kubepods", 16<<20)
	burstable := oomtest.Child(t, kubepods, "burstable", cgroupfs.Unlimited)
	container := oomtest.Child(t, oomtest.Child(t, burstable, "pod"+string(pod.UID), cgroupfs.Unlimited), id, cgroupfs.Unlimited)
	killed := oomtest.Storm(t, container, 1, 32, "plain")
	if len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	var got *corev1.Pod
	eventually(t, "the annotation is on the pod", func() error {
		if got = c.GetPod("shop", "web-0"); got.Annotations[evictMe] != "true" {
			return fmt.Errorf("annotations %v", got.Annotations)
		}
		return nil
	})
	s := summary(t, got)
	if s.PID != uint32(killed[0]) || s.Victim != "hog" || s.Container != "main" || s.Scope != "cgroup" || s.Level != "kubepods" || s.Node != node ||
		s.Limit == nil || *s.Limit != 16<<20 || s.Usage == nil || *s.Usage == 0 {
		t.Errorf("summary %s", got.Annotations[lastKill])
	}
	o := r.want(s.Event, "annotated/marked")
	if o.Pod == nil || o.Pod.Name != "web-0" || o.Pod.UID != string(pod.UID) || o.Container != "main" || o.Annotation != evictMe+"=true" {
		t.Errorf("outcome %+v, pod %+v", o, o.Pod)
	}
	delete(before, "shop/web-0/"+string(pod.UID))
	wantSame(t, c, before)
	if _, body := r.get("/metrics"); !strings.Contains(body, `oom_tracer_marked_victims_total{reason="marked",stage="marked"} 1`) ||
		!strings.Contains(body, `oom_tracer_annotate_latency_seconds_count 1`) {
		t.Errorf("metrics:\n%s", body)
	}

	// A process of the host is no pod's.
	host := oomtest.Child(t, root, "system", 8<<20)
	if killed := oomtest.Storm(t, host, 1, 16, "plain"); len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	if o := r.outcome(); o.Reason != event.ReasonHost || o.Pod != nil {
		t.Errorf("outcome %+v", o)
	}
	// A pod that hits its own limit is told of, and not moved.
	own := c.GetPod("shop", "web-1")
	limited := oomtest.Child(t, oomtest.Child(t, burstable, "pod"+string(own.UID), 8<<20), c.ContainerID(own, "main"), cgroupfs.Unlimited)
	if killed := oomtest.Storm(t, limited, 1, 16, "plain"); len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	if o := r.outcome(); o.Reason != event.ReasonLevel || o.Pod == nil || o.Pod.Name != "web-1" || o.Container != "main" {
		t.Errorf("outcome %+v, pod %+v", o, o.Pod)
	}
	wantSame(t, c, before)
}

// testReborn: between the kill and the patch the pod is replaced by one of the same name.
func testReborn(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	pod := c.Pod("shop", "db-0", node)
	other := c.Pod("shop", "elsewhere", "worker-2")
	proxy := c.Proxy()
	r := newRig(t, c, proxy.Config(account), keep)
	r.ready()
	var born atomic.Pointer[corev1.Pod]
	replace := sync.OnceFunc(func() {
		// What the proxy serves meanwhile is the annotator's; the Cluster's methods are the test's own.
		zero := int64(0)
		ctx := context.Background()
		if err := c.Client.CoreV1().Pods("shop").Delete(ctx, "db-0", metav1.DeleteOptions{GracePeriodSeconds: &zero}); err != nil {
			t.Error(err)
		}
		again, err := c.Client.CoreV1().Pods("shop").Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "db-0"},
			Spec:       corev1.PodSpec{NodeName: node, Containers: []corev1.Container{{Name: "main", Image: "example.com/main:1"}}},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Error(err)
		}
		born.Store(again)
	})
	var patches atomic.Int32
	proxy.Fault(func(req *http.Request) kubetest.Fault {
		if patchesPod(req) {
			patches.Add(1)
			replace()
		}
		return kubetest.Fault{}
	})
	e := r.killOf(pod, "")
	r.publish(e)
	o := r.want(e.ID, "skipped/reborn")
	if o.Pod == nil || o.Pod.UID != string(pod.UID) {
		t.Errorf("pod %+v", o.Pod)
	}
	now := c.GetPod("shop", "db-0")
	if now.UID == pod.UID || now.UID != born.Load().UID || now.ResourceVersion != born.Load().ResourceVersion || now.Annotations != nil {
		t.Errorf("the new pod was touched: %+v", now.ObjectMeta)
	}
	if n := patches.Load(); n != 1 {
		t.Errorf("%d patches", n)
	}
	// A second kill of the old one is of a pod that is known to be gone, by its name.
	e = r.killOf(pod, "")
	r.publish(e)
	if o := r.want(e.ID, "skipped/gone"); o.Pod == nil || o.Pod.Name != "db-0" {
		t.Errorf("pod %+v", o.Pod)
	}
	// One node's tracer does not speak for pods of another.
	e = r.killOf(other, "")
	r.publish(e)
	if o := r.want(e.ID, "skipped/other_node"); o.Pod != nil {
		t.Errorf("pod %+v", o.Pod)
	}
	if got := c.GetPod("shop", "elsewhere"); got.ResourceVersion != other.ResourceVersion {
		t.Error("the pod on another node was touched")
	}
}

// mirror makes a pod as the kubelet makes one for a static pod of that UID.
func mirror(uid string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Annotations = map[string]string{
			corev1.MirrorPodAnnotationKey: uid, "kubernetes.io/config.hash": uid, "kubernetes.io/config.source": "file",
		}
	}
}

// testStatic: the cgroup of a static pod names its hash, which repeats on every node. The mirror pod may also
// come after the kill.
func testStatic(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	const hash, late = "0123456789abcdef0123456789abcdef", "fedcba9876543210fedcba9876543210"
	c.Pod("shop", "static-worker-1", node, mirror(hash))
	c.Pod("shop", "static-worker-2", "worker-2", mirror(hash))
	before := versions(t, c)
	static := func(r *rig, uid string) event.Event {
		e := r.killOf(&corev1.Pod{ObjectMeta: metav1.ObjectMeta{}}, "")
		e.Container.PodUID, e.Container.Static = uid, true
		return e
	}
	// Protected unless asked.
	r := newRig(t, c, account, keep)
	e := static(r, hash)
	r.publish(e)
	if o := r.want(e.ID, "skipped/static"); o.Pod == nil || o.Pod.Name != "static-worker-1" {
		t.Errorf("pod %+v", o.Pod)
	}
	wantSame(t, c, before)
	r.annotator.stop(t)

	r = newRig(t, c, account, unprotected)
	r.ready()
	first, second := static(r, late), static(r, hash)
	r.publish(first)
	time.Sleep(time.Second)
	r.publish(second) // does not wait for the first
	r.want(second.ID, "annotated/marked")
	c.Pod("shop", "late", node, mirror(late))
	r.want(first.ID, "annotated/marked")
	for name, marked := range map[string]bool{"static-worker-1": true, "static-worker-2": false, "late": true} {
		if _, ok := c.GetPod("shop", name).Annotations[evictMe]; ok != marked {
			t.Errorf("%s is marked: %t", name, ok)
		}
	}
}

// testContainers: which container it was is told of every kind that a status knows; and a static pod is found
// again when its mirror pod was made anew, but not where two of them fit.
func testContainers(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, unprotected)
	r.ready()
	pod := c.Pod("shop", "kinds", node)
	status := func(name string) corev1.ContainerStatus {
		return corev1.ContainerStatus{Name: name, ContainerID: "containerd://" + kubetest.NewContainerID()}
	}
	restarted := status("main")
	restarted.LastTerminationState.Terminated = &corev1.ContainerStateTerminated{ContainerID: "containerd://" + kubetest.NewContainerID(), Reason: "OOMKilled", ExitCode: 137}
	pod.Status.InitContainerStatuses = []corev1.ContainerStatus{status("init")}
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{restarted}
	pod.Status.EphemeralContainerStatuses = []corev1.ContainerStatus{status("debug")}
	pod = c.SetStatus(pod)
	seen := r.killOf(c.Pod("shop", "kinds-after", node), "") // whose outcome comes when this pod, and so the status, is known
	seen.Limit.Level = event.LevelContainer
	r.publish(seen)
	r.want(seen.ID, "skipped/level")
	id := func(s string) string { return strings.TrimPrefix(s, "containerd://") }
	for container, want := range map[string]string{
		id(pod.Status.InitContainerStatuses[0].ContainerID):                             "init",
		id(pod.Status.ContainerStatuses[0].ContainerID):                                 "main",
		id(pod.Status.ContainerStatuses[0].LastTerminationState.Terminated.ContainerID): "main",
		id(pod.Status.EphemeralContainerStatuses[0].ContainerID):                        "debug",
		kubetest.NewContainerID():                                                       "", // the pause container's
	} {
		e := r.killOf(pod, container)
		e.Limit.Level = event.LevelContainer
		r.publish(e)
		if o := r.want(e.ID, "skipped/level"); o.Pod == nil || o.Pod.Name != "kinds" || o.Container != want {
			t.Errorf("container %q, want %q; pod %+v", o.Container, want, o.Pod)
		}
	}

	const hash = "00112233445566778899aabbccddeeff"
	old := c.Pod("shop", "again-worker-1", node, mirror(hash))
	c.DeletePod("shop", "again-worker-1")
	again := c.Pod("shop", "again-worker-1", node, mirror(hash))
	static := func(container string) event.Event {
		e := r.killOf(&corev1.Pod{}, container)
		e.Container.PodUID, e.Container.Static = hash, true
		return e
	}
	seen = r.killOf(c.Pod("shop", "again-after", node), "")
	seen.Limit.Level = event.LevelContainer
	r.publish(seen)
	r.want(seen.ID, "skipped/level")
	e := static(c.ContainerID(old, "main")) // of the one before
	r.publish(e)
	if o := r.want(e.ID, "annotated/marked"); o.Pod == nil || o.Pod.UID != string(again.UID) {
		t.Errorf("pod %+v, want %s", o.Pod, again.UID)
	}
	// For a moment both of them may be there: the container decides, where it can.
	twin := c.Pod("shop", "twin-worker-1", node, mirror(hash))
	before := versions(t, c)
	e = static(kubetest.NewContainerID())
	r.publish(e)
	if o := r.want(e.ID, "skipped/ambiguous"); o.Pod != nil {
		t.Errorf("pod %+v", o.Pod)
	}
	wantSame(t, c, before)
	e = static(c.ContainerID(twin, "main"))
	r.publish(e)
	if o := r.want(e.ID, "annotated/marked"); o.Pod == nil || o.Pod.UID != string(twin.UID) || o.Container != "main" {
		t.Errorf("pod %+v, want %s", o.Pod, twin.UID)
	}
}

// testHung: neither the API server nor NATS answers any more, and the annotator is told to end. It does, in time
// and well; the next one does what it left.
func testHung(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	proxy := c.Proxy()
	nats := newNATS(t)
	nats.start()
	r := externalRig(t, c, proxy.Config(account), config.NATS{URL: "nats://" + nats.listen}, fmt.Sprintf("nats: {url: %q}\n", "nats://"+nats.listen))
	r.ready()
	pod := c.Pod("shop", "hung", node)
	began := make(chan struct{})
	var once sync.Once
	proxy.Fault(func(req *http.Request) kubetest.Fault {
		if patchesPod(req) {
			once.Do(func() { close(began) })
			return kubetest.Fault{Hang: true}
		}
		return kubetest.Fault{}
	})
	e := r.killOf(pod, "")
	r.publish(e)
	<-began
	if err := nats.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	r.annotator.stop(t) // fails if that takes long
	if err := nats.cmd.Process.Signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	proxy.Fault(func(*http.Request) kubetest.Fault { return kubetest.Fault{} })
	r.start()
	r.patience = 2 * patience // NATS waits for the first one
	r.want(e.ID, "annotated/marked")
}

// testReplay: all that is on the stream is consumed once more, and a kill that is too old comes. No pod changes.
func testReplay(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, keep)
	marked, opted := c.Pod("shop", "again", node), c.Pod("shop", "stays", node, func(p *corev1.Pod) {
		p.Annotations = map[string]string{"oom-tracer.alpha.kubernetes.io/opt-out": "true"}
	})
	stale := c.Pod("shop", "stale", node)
	first, second, third, old := r.killOf(marked, ""), r.killOf(marked, ""), r.killOf(opted, ""), r.killOf(stale, "")
	old.Time = time.Now().Add(-11 * time.Minute)
	wants := []struct {
		e    event.Event
		want string
	}{{first, "annotated/marked"}, {second, "skipped/already"}, {third, "skipped/opt_out"}, {old, "skipped/too_old"}}
	outcomes := map[string]event.Outcome{}
	for _, w := range wants {
		r.publish(w.e)
		outcomes[w.e.ID] = r.want(w.e.ID, w.want)
	}
	r.settled()
	before := versions(t, c)
	r.annotator.stop(t)

	// Without the consumer's place on the server, everything comes again; and what is published of it is not
	// stored a second time.
	if err := r.conn.JetStream().DeleteConsumer(t.Context(), event.StreamName, name); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.ready()
	r.settled()
	if _, body := r.get("/metrics"); !strings.Contains(body, `oom_tracer_events_total{reason="kill",stage="observed"} 4`) ||
		!strings.Contains(body, `oom_tracer_events_total{reason="repeated",stage="skipped"} 4`) ||
		!strings.Contains(body, `oom_tracer_marked_victims_total{reason="marked",stage="marked"} 0`) {
		t.Errorf("metrics:\n%s", body)
	}
	select {
	case o := <-r.outcomes:
		t.Errorf("one more outcome: %+v", o)
	default:
	}
	wantSame(t, c, before)
}

// testRefused: what can never be processed is ended with a reason, and holds up nothing.
func testRefused(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, keep)
	advisories, err := r.conn.NATS().SubscribeSync("$JS.EVENT.ADVISORY.CONSUMER.MSG_TERMINATED.>")
	if err != nil {
		t.Fatal(err)
	}
	pod := c.Pod("shop", "poison", node)
	before := versions(t, c)
	subject := "oom.v1.kill.global." + strings.ReplaceAll(node, ".", "_")
	future := r.killOf(pod, "")
	future.Schema = "oom-tracer/v2"
	forged := r.killOf(pod, "")
	r.raw("poison-1", subject, []byte("{"))
	data, err := json.Marshal(future)
	if err != nil {
		t.Fatal(err)
	}
	r.raw("poison-2", subject, data)
	r.raw("poison-3", subject, bytes.Repeat([]byte("x"), 300<<10))
	if data, err = json.Marshal(forged); err != nil {
		t.Fatal(err)
	}
	r.raw("poison-4", "oom.v1.kill.global.worker-2", data)
	r.raw("poison-5", "oom.v1.kill.a.b.c.d", data)
	reasons := map[event.Reason]int{}
	for range 4 {
		o := r.outcome()
		if o.Result != event.ResultFailed || o.Detail == "" {
			t.Errorf("outcome %+v", o)
		}
		reasons[o.Reason]++
	}
	if reasons[event.ReasonMalformed] != 1 || reasons[event.ReasonSchema] != 1 || reasons[event.ReasonOversized] != 1 || reasons[event.ReasonForged] != 1 {
		t.Errorf("reasons %v", reasons)
	}
	for range 5 {
		m, err := advisories.NextMsg(patience)
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(m.Data), `"reason":"`) {
			t.Errorf("advisory %s", m.Data)
		}
	}
	wantSame(t, c, before)
	e := r.killOf(pod, "")
	r.publish(e)
	r.want(e.ID, "annotated/marked")
	r.settled()
}

// testFaults: whatever the server, or what stands before it, answers at first: the pod is marked, and once.
func testFaults(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	t.Run("token", func(t *testing.T) {
		t.Parallel()
		testToken(t, c.In(t), account)
	})
	for name, fault := range map[string]kubetest.Fault{
		"401": {Code: 401}, "403": {Code: 403}, "409": {Code: 409}, "429": {Code: 429, RetryAfter: time.Second}, "500": {Code: 500},
		"503": {Code: 503, RetryAfter: time.Second}, "504": {Code: 504}, "hang": {Hang: true}, "lost": {Lost: true}, "slow": {Delay: time.Second},
	} {
		for _, method := range []string{http.MethodGet, http.MethodPatch} {
			t.Run(name+method, func(t *testing.T) {
				t.Parallel()
				c := c.In(t)
				pod := c.Pod("shop", "fault-"+name+"-"+strings.ToLower(method), node)
				proxy := c.Proxy()
				r := newRig(t, c, proxy.Config(account), keep)
				r.ready()
				var served, faults, stale atomic.Int32
				proxy.Fault(func(req *http.Request) kubetest.Fault {
					if !strings.HasSuffix(req.URL.Path, "/"+pod.Name) {
						return kubetest.Fault{}
					}
					if method == http.MethodGet && patchesPod(req) && stale.Add(1) == 1 {
						return kubetest.Fault{Code: http.StatusConflict} // what the watch has delivered is old: the pod is read
					}
					if req.Method == method && faults.Add(1) <= 2 {
						if method == http.MethodPatch && fault.Code == 0 && !fault.Hang {
							served.Add(1) // late, or without an answer
						}
						return fault
					}
					if patchesPod(req) {
						served.Add(1)
					}
					return kubetest.Fault{}
				})
				e := r.killOf(pod, "")
				r.publish(e)
				r.want(e.ID, "annotated/marked")
				r.settled()
				if c.GetPod("shop", pod.Name).Annotations[evictMe] != "true" {
					t.Error("the pod is not marked")
				}
				if n := served.Load(); n != 1 || faults.Load() == 0 {
					t.Errorf("%d patches were served, %d times %s", n, faults.Load(), method)
				}
			})
		}
	}
}

// testWatch: the watch is cut, and then its version has expired. What changed meanwhile is known afterwards.
func testWatch(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	proxy := c.Proxy()
	r := newRig(t, c, proxy.Config(account), keep)
	r.ready()
	gone := c.Pod("shop", "cut-gone", node)
	for i, code := range []int{503, 410} {
		var refuse atomic.Bool
		refuse.Store(true)
		once := atomic.Bool{}
		proxy.Fault(func(req *http.Request) kubetest.Fault {
			if req.URL.Query().Get("watch") == "" {
				return kubetest.Fault{}
			}
			if code == 410 && !once.Swap(true) || refuse.Load() && code != 410 {
				return kubetest.Fault{Code: code}
			}
			return kubetest.Fault{}
		})
		proxy.Cut()
		eventually(t, "the annotator notices", func() error {
			if code == 410 && once.Load() {
				return nil
			}
			if status, _ := r.get("/readyz"); status == http.StatusOK {
				return fmt.Errorf("ready")
			}
			return nil
		})
		pod := c.Pod("shop", fmt.Sprint("cut-", i), node)
		if i == 1 {
			c.DeletePod("shop", gone.Name)
		}
		e := r.killOf(pod, c.ContainerID(pod, "main"))
		r.publish(e)
		if code != 410 {
			time.Sleep(500 * time.Millisecond)
			select {
			case o := <-r.outcomes:
				t.Errorf("decided without knowing: %+v", o)
			default:
			}
		}
		refuse.Store(false)
		if o := r.want(e.ID, "annotated/marked"); o.Container != "main" {
			t.Errorf("container %q", o.Container)
		}
	}
	e := r.killOf(gone, "")
	r.publish(e)
	r.want(e.ID, "skipped/gone")
}

// testGroup: a group kill is many events, and one patch.
func testGroup(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	proxy := c.Proxy()
	var patched atomic.Int32
	r := newRig(t, c, proxy.Config(account), keep)
	pod := c.Pod("shop", "group", node)
	r.ready()
	proxy.Fault(func(req *http.Request) kubetest.Fault {
		if patchesPod(req) {
			patched.Add(1)
		}
		return kubetest.Fault{}
	})
	var all []event.Event
	for range 50 {
		all = append(all, r.killOf(pod, ""))
	}
	r.publish(all...)
	reasons := map[event.Reason]int{}
	for range all {
		reasons[r.outcome().Reason]++
	}
	if reasons[event.ReasonMarked] != 1 || reasons[event.ReasonAlready] != 49 {
		t.Errorf("outcomes %v", reasons)
	}
	got := c.GetPod("shop", "group")
	if n := len(got.ManagedFields); n == 0 || got.Annotations[evictMe] != "true" {
		t.Errorf("pod %+v", got.ObjectMeta)
	}
	// Those that were on their way at the same time were refused by the server: their version was not its.
	if n := patched.Load(); n > 16 {
		t.Errorf("%d patches were sent", n)
	}
}

// testVerbs: each verb of the role is needed, and its lack is told by its name.
func testVerbs(t *testing.T, c *kubetest.Cluster, _ *rest.Config) {
	objects, err := kubetest.Manifests("deploy/manifests/rbac.yaml")
	if err != nil {
		t.Fatal(err)
	}
	verbs := map[string][]string{}
	for _, o := range objects {
		if o.GetKind() == "ClusterRole" {
			for _, rule := range o.Object["rules"].([]any) {
				rule := rule.(map[string]any)
				resource := rule["resources"].([]any)[0].(string)
				for _, v := range rule["verbs"].([]any) {
					verbs[resource] = append(verbs[resource], v.(string))
				}
			}
		}
	}
	if len(verbs) != 2 || len(verbs["pods"]) != 4 || !slices.Equal(verbs["events"], []string{"create", "patch", "list"}) {
		t.Fatalf("verbs %v", verbs)
	}
	t.Run("events-list", func(t *testing.T) {
		t.Parallel()
		c := c.In(t)
		account := withoutVerb(t, c, "without-events-list", verbs, "events", "list")
		pod := c.Pod("shop", "without-events-list", node)
		r := newRig(t, c, account, func(cfg *config.Config) { cfg.Policy.MarkLifetime = time.Minute })
		r.ready()
		e := r.killOf(pod, "")
		e.Time = time.Now().Add(-50 * time.Second).UTC()
		r.publish(e)
		r.want(e.ID, "annotated/marked")
		if o := r.last(); o.Kill != e.ID || o.Result != event.ResultExpired || !strings.Contains(o.Detail, `the verb "list" on events is missing`) {
			t.Errorf("outcome %+v", o)
		}
	})
	for _, missing := range []string{"create", "patch"} {
		t.Run("events-"+missing, func(t *testing.T) {
			t.Parallel()
			c := c.In(t)
			who := "without-events-" + missing
			account := withoutVerb(t, c, who, verbs, "events", missing)
			pod := c.Pod("shop", who, node)
			r := newRig(t, c, account, keep)
			r.ready()
			word := fmt.Sprintf("the verb %q on events is missing", missing)
			for range 2 { // the second is a patch of the first one's Event, on the way down
				e := r.killOf(pod, "")
				r.publish(e)
				if o := r.outcome(); o.Pod == nil || o.Pod.Name != who {
					t.Errorf("outcome %+v", o) // what it is for goes on
				}
				eventually(t, "the Event is written, or it is said why not", func() error {
					_, body := r.get("/metrics")
					if !strings.Contains(body, "oom_tracer_kubernetes_event_writes_total 2") {
						return fmt.Errorf("metrics:\n%s", body)
					}
					return nil
				})
			}
			r.annotator.stop(t)
			if !strings.Contains(r.annotator.out.String(), strings.ReplaceAll(word, `"`, `\"`)) {
				t.Error("the log does not name the verb")
			}
		})
	}
	for _, missing := range verbs["pods"] {
		t.Run(missing, func(t *testing.T) {
			t.Parallel()
			c := c.In(t)
			who := "without-" + missing
			account := withoutVerb(t, c, who, verbs, "pods", missing)
			pod := c.Pod("shop", who, node)
			proxy := c.Proxy()
			if missing == "get" { // a pod is read when what the watch has delivered is old
				proxy.Fault(func(req *http.Request) kubetest.Fault {
					if patchesPod(req) {
						return kubetest.Fault{Code: http.StatusConflict}
					}
					return kubetest.Fault{}
				})
			}
			r := newRig(t, c, proxy.Config(account), keep)
			e := r.killOf(pod, "")
			word := fmt.Sprintf("the verb %q on pods is missing", missing)
			if missing == "list" { // for servers before Kubernetes 1.34: this one streams
				r.ready()
				r.publish(e)
				r.want(e.ID, "annotated/marked")
				return
			}
			if missing == "watch" {
				eventually(t, "the annotator is not ready and says why", func() error {
					if code, body := r.get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, word) {
						return fmt.Errorf("%d %s", code, body)
					}
					return nil
				})
				return
			}
			r.ready()
			r.publish(e)
			if o := r.want(e.ID, "failed/forbidden"); !strings.Contains(o.Detail, word) {
				t.Errorf("detail %q", o.Detail)
			}
			if !strings.Contains(r.annotator.out.String(), strings.ReplaceAll(word, `"`, `\"`)) {
				t.Error("the log does not name the verb")
			}
		})
	}
}

// withoutVerb makes an account that may do all of these verbs but one.
func withoutVerb(t *testing.T, c *kubetest.Cluster, who string, verbs map[string][]string, resource, missing string) *rest.Config {
	t.Helper()
	account := c.ServiceAccount("shop", who)
	role := &rbacv1.ClusterRole{ObjectMeta: metav1.ObjectMeta{Name: who}}
	for r, all := range verbs {
		left := slices.DeleteFunc(slices.Clone(all), func(v string) bool { return r == resource && v == missing })
		role.Rules = append(role.Rules, rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{r}, Verbs: left})
	}
	if _, err := c.Client.RbacV1().ClusterRoles().Create(t.Context(), role, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	binding := &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: who}, RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: who},
		Subjects: []rbacv1.Subject{{Kind: "ServiceAccount", Namespace: "shop", Name: who}},
	}
	if _, err := c.Client.RbacV1().ClusterRoleBindings().Create(t.Context(), binding, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return account
}

// testDenied: the shipped admission policy lets the shipped account write no other annotation, and so a
// config that names one fails and says why.
func testDenied(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	pod := c.Pod("shop", "denied", node)
	r := newRig(t, c, account, func(cfg *config.Config) { cfg.Policy.Annotation = "example.com/other=true" })
	e := r.killOf(pod, "")
	r.publish(e)
	if o := r.want(e.ID, "failed/rejected"); !strings.Contains(o.Detail, "example.com/other") {
		t.Errorf("detail %q", o.Detail)
	}
	if got := c.GetPod("shop", "denied"); got.ResourceVersion != pod.ResourceVersion {
		t.Error("the pod was changed")
	}
}

// testNATS: NATS goes away in the middle of a patch, and comes back. The outcome is told, the mark made once.
func testNATS(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	proxy := c.Proxy()
	r := newRig(t, c, proxy.Config(account), keep)
	r.ready()
	pod, after := c.Pod("shop", "nats-1", node), c.Pod("shop", "nats-2", node)
	var patches atomic.Int32
	began, release := make(chan struct{}), make(chan struct{})
	proxy.Fault(func(req *http.Request) kubetest.Fault {
		if patchesPod(req) && patches.Add(1) == 1 {
			close(began)
			<-release
		}
		return kubetest.Fault{}
	})
	e := r.killOf(pod, "")
	r.publish(e)
	<-began
	r.stopNATS()
	close(release)
	eventually(t, "the annotator says that nats is away", func() error {
		if code, body := r.get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "nats") {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
	r.startNATS()
	r.want(e.ID, "annotated/marked")
	e = r.killOf(after, "")
	r.publish(e)
	r.want(e.ID, "annotated/marked")
	if n := patches.Load(); n != 2 {
		t.Errorf("%d patches", n)
	}
	r.settled()
}

// testRun: KUBECONFIG=... make run starts both, in whatever order they become ready, and ends both.
func testRun(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := &rig{t: t, kubeconfig: c.Kubeconfig(account)}
	r.cfg, r.configPath = newConfig(t, func(cfg *config.Config) { cfg.Metrics.Listen = freePort(t) })
	root, err := filepath.Abs("../../..")
	if err != nil {
		t.Fatal(err)
	}
	p := &process{out: &oomtest.Output{}, done: make(chan struct{}), cmd: exec.Command(filepath.Join(root, "tools/run.sh"), r.configPath)}
	p.cmd.Dir = root
	p.cmd.Env = append(os.Environ(), "KUBECONFIG="+r.kubeconfig, "NODE_NAME="+node)
	r.annotator = p.start(t)
	r.ready()
	began := time.Now()
	p.stop(t)
	for _, addr := range []string{r.cfg.Annotator.Listen, r.cfg.Metrics.Listen, r.cfg.NATS.Embedded.Listen} {
		l, err := net.Listen("tcp", addr)
		if err != nil {
			t.Errorf("%s after the end: %v", time.Since(began), err)
			continue
		}
		l.Close()
	}
}

// testToken: the token is one that the server does not take, until the file holds another. client-go reads it
// anew once a minute.
func testToken(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	file := filepath.Join(t.TempDir(), "token")
	write := func(token string) {
		if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write("expired")
	rotated := rest.CopyConfig(account)
	rotated.BearerToken, rotated.BearerTokenFile = "", file
	r := newRig(t, c, rotated, keep)
	eventually(t, "the annotator says that its token is not taken", func() error {
		if code, body := r.get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "refuses the token") {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
	pod := c.Pod("shop", "token", node)
	e := r.killOf(pod, "")
	r.publish(e)
	write(account.BearerToken)
	r.patience = 2 * patience
	r.want(e.ID, "annotated/marked")
}

// testFrozen: the API server is stopped in the middle of everything. Kills that do not need it are decided as fast as ever,
// and those that do are marked once it goes on.
func testFrozen(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	const marks, others = 40, 400
	var all []*corev1.Pod
	for i := range marks {
		all = append(all, c.Pod("shop", fmt.Sprint("frozen-", i), node))
	}
	r := newRig(t, c, account, func(cfg *config.Config) {
		keep(cfg)
		cfg.Annotator.Workers = 2
	})
	r.ready()
	thaw := c.Freeze()
	frozen := true
	defer func() {
		if frozen {
			thaw()
		}
	}()
	want := map[string]bool{}
	for _, pod := range all {
		e := r.killOf(pod, "")
		want[e.ID] = true
		r.publish(e)
	}
	time.Sleep(time.Second)
	began := time.Now()
	for i := range others {
		e := r.killOf(all[i%marks], "")
		e.Limit.Level = event.LevelContainer // its own limit: nothing to do
		r.publish(e)
	}
	for range others {
		if o := r.outcome(); want[o.Kill] || o.Result != event.ResultSkipped || o.Reason != event.ReasonLevel {
			t.Fatalf("outcome %+v", o)
		}
	}
	if took := time.Since(began); took > 10*time.Second {
		t.Errorf("%d kills that need no API server took %s while it was frozen", others, took)
	} else {
		t.Logf("%d kills that need no API server took %s while it was frozen", others, took)
	}
	thaw()
	frozen = false
	for range marks {
		if o := r.outcome(); !want[o.Kill] || o.Result != event.ResultAnnotated {
			t.Errorf("outcome %+v", o)
		}
	}
}

// testOutage: the API server is away when the kills come, and when the annotator starts.
func testOutage(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	pod := c.Pod("shop", "outage-1", node)
	second := c.Pod("shop", "outage-2", node)
	r := newRig(t, c, account, keep)
	r.ready()
	pods := func(want string) error { // what an alert goes by
		if _, body := r.get("/metrics"); !strings.Contains(body, `oom_tracer_ready{check="pods"} `+want) {
			return fmt.Errorf("not %s", want)
		}
		return nil
	}
	if err := pods("1"); err != nil {
		t.Error(err)
	}
	c.Stop()
	eventually(t, "oom_tracer_ready of pods", func() error { return pods("0") })
	e := r.killOf(pod, "")
	r.publish(e)
	eventually(t, "the annotator says that the server is away", func() error {
		if code, body := r.get("/readyz"); code != http.StatusServiceUnavailable {
			return fmt.Errorf("%d %s", code, body)
		}
		return nil
	})
	// Another one starts meanwhile, with nothing that it knows.
	r.annotator.stop(t)
	r.start()
	e2 := r.killOf(second, "")
	r.publish(e2)
	time.Sleep(time.Second)
	c.Start()
	want := map[string]bool{e.ID: true, e2.ID: true}
	for range 2 {
		o := r.outcome()
		if o.Result != event.ResultAnnotated || !want[o.Kill] {
			t.Errorf("outcome %+v", o)
		}
		delete(want, o.Kill)
	}
	for _, name := range []string{"outage-1", "outage-2"} {
		if c.GetPod("shop", name).Annotations[evictMe] != "true" {
			t.Errorf("%s is not marked", name)
		}
	}
}
