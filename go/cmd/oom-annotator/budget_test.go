package main

import (
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// These tests are about what may not happen too often. They run as TestEndToEnd does.

func TestBrakes(t *testing.T) {
	c := kubetest.Start(t)
	c.Node(node)
	c.Node("worker-2")
	c.Namespace("shop")
	account := c.Annotator()
	for name, test := range map[string]func(*testing.T, *kubetest.Cluster, *rest.Config){
		"Budgets": testBudgets, "CrashLoop": testCrashLoop, "Pause": testPause, "Hang": testHang,
		"Explain": testExplain, "State": testState, "Late": testLate,
	} {
		t.Run(name, func(t *testing.T) { test(t, c.In(t), account) })
	}
}

// deployed makes a pod one of a Deployment's.
func deployed(owner string) func(*corev1.Pod) {
	return func(p *corev1.Pod) {
		p.Labels = map[string]string{"pod-template-hash": "5d4f"}
		p.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: owner + "-5d4f", UID: "0f1e2d3c", Controller: new(true)}}
	}
}

func budgets(b config.Budgets) func(*config.Config) {
	return func(cfg *config.Config) { cfg.Policy.Budgets = b }
}

// marked lists the pods that carry the annotation.
func marked(t *testing.T, c *kubetest.Cluster) map[string]bool {
	t.Helper()
	list, err := c.Client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]bool{}
	for _, p := range list.Items {
		if _, ok := p.Annotations[evictMe]; ok {
			names[p.Name] = true
		}
	}
	return names
}

// testBudgets: each bound holds, over a restart and a replay, and what it refused stays refused.
func testBudgets(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, budgets(config.Budgets{Window: time.Hour, Node: 2, Owner: 1, Cluster: 3}))
	on := func(node string, pod *corev1.Pod) event.Event {
		e := r.killOf(pod, "")
		e.Node.Name = node
		return e
	}
	for _, step := range []struct {
		name, node, owner, want, detail string
	}{
		{"a-1", node, "a", "annotated/marked", ""},
		{"a-2", node, "a", "skipped/budget", "owner shop/Deployment/a: 1 of 1 within 1h0m0s"},
		{"b-1", node, "b", "annotated/marked", ""},
		{"c-1", node, "c", "skipped/budget", "node " + node + ": 2 of 2 within 1h0m0s"},
		{"d-1", "worker-2", "d", "annotated/marked", ""},
		{"e-1", "worker-2", "e", "skipped/budget", "cluster: 3 of 3 within 1h0m0s"},
	} {
		e := on(step.node, c.Pod("shop", step.name, step.node, deployed(step.owner)))
		r.publish(e)
		if o := r.want(e.ID, step.want); o.Detail != step.detail || o.Pod == nil || o.Pod.Name != step.name {
			t.Errorf("%s: detail %q, want %q", step.name, o.Detail, step.detail)
		}
	}
	r.settled()
	before := versions(t, c)

	// Another process, with nothing that it remembers; and all of the stream once more.
	r.annotator.stop(t)
	if err := r.conn.JetStream().DeleteConsumer(t.Context(), event.StreamName, name); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.ready()
	e := on("worker-2", c.Pod("shop", "f-1", "worker-2", deployed("f")))
	r.publish(e)
	r.want(e.ID, "skipped/budget")
	r.settled()
	wantSame(t, c, before)
	r.annotator.stop(t)

	// There would be room now, and the stream holds their outcomes: they stay as they are.
	r.cfg.Policy.Budgets = config.Budgets{Window: time.Hour, Cluster: 100}
	r.cfg, r.configPath = rewrite(t, r.cfg, r.configPath)
	if err := r.conn.JetStream().DeleteConsumer(t.Context(), event.StreamName, name); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.ready()
	e = on("worker-2", c.Pod("shop", "g-1", "worker-2", deployed("g")))
	r.publish(e)
	r.want(e.ID, "annotated/marked")
	r.settled()
	delete(before, "") // none
	wantSame(t, c, before)
	if _, body := r.get("/metrics"); !strings.Contains(body, `oom_tracer_events_total{reason="repeated",stage="skipped"} 7`) ||
		!strings.Contains(body, "oom_tracer_budget_limit 100") || !strings.Contains(body, "oom_tracer_paused 0") {
		t.Errorf("metrics:\n%s", body)
	}
}

// testExplain: what another config would have done, against the same stream and pods, and nothing is done.
func testExplain(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, func(cfg *config.Config) { cfg.Policy.Annotation = "" })
	r.ready()
	eventually(t, "the marks of the tests before are taken back", func() error {
		if n := len(marked(t, c)); n > 0 {
			return fmt.Errorf("%d are there", n)
		}
		return nil
	})
	first, second, gone := c.Pod("shop", "try-1", node, deployed("try")), c.Pod("shop", "try-2", node, deployed("try")), c.Pod("shop", "try-3", node)
	own := r.killOf(first, c.ContainerID(first, "main"))
	own.Limit.Level = event.LevelPod
	kills := []event.Event{own, r.killOf(first, c.ContainerID(first, "main")), r.killOf(second, ""), r.killOf(gone, "")}
	// The outcomes come behind all of the kills, so that explain has to keep kills for them.
	r.annotator.stop(t)
	r.publish(kills...)
	r.start()
	for range kills {
		o, want := r.outcome(), "observed/observe_only"
		if o.Kill == own.ID {
			want = "skipped/level"
		}
		if got := string(o.Result) + "/" + string(o.Reason); got != want {
			t.Errorf("%s: %s, want %s", o.Kill, got, want)
		}
	}
	r.settled()
	c.DeletePod("shop", "try-3")
	before := versions(t, c)
	_, tried := newConfig(t, func(cfg *config.Config) {
		cfg.NATS, cfg.Policy.Budgets = r.cfg.NATS, config.Budgets{Window: time.Hour, Owner: 1, Cluster: 10}
	})
	run := func(args ...string) (stdout, stderr string) {
		t.Helper()
		cmd := exec.CommandContext(t.Context(), oomtest.Program(t, "oom-annotator"), append([]string{"explain", "--config", tried, "--kubeconfig", r.kubeconfig}, args...)...)
		var errs strings.Builder
		cmd.Stderr = &errs
		out, err := cmd.Output()
		if err != nil {
			t.Errorf("explain: %v\n%s", err, &errs)
		}
		return string(out), errs.String()
	}
	stdout, stderr := run()
	lines := strings.Split(strings.TrimSpace(stdout), "\n")
	for i, want := range []string{
		"  skipped (level) shop/try-1 container main",
		"  annotated (marked) shop/try-1 container main  (was observed (observe_only))",
		"  skipped (budget) shop/try-2  owner shop/Deployment/try: 1 of 1 within 1h0m0s  (was observed (observe_only))",
		"  not_known (gone) shop/try-3  (was observed (observe_only))",
	} {
		if len(lines) != 4 || !strings.HasSuffix(lines[i], want) || !strings.Contains(lines[i], fmt.Sprintf("java[%d]", kills[i].Victim.PID)) {
			t.Errorf("line %d is not %q:\n%s", i, want, stdout)
			break
		}
	}
	const summary = `4 kills within 24h0m0s; nothing was marked by this. It would be:
      1  annotated (marked)
      1  not known (the pod is gone)
      1  skipped (budget)
      1  skipped (level)
`
	if stderr != summary {
		t.Errorf("summary:\n%s", stderr)
	}
	stdout, _ = run("--output", "json", "--since", "1h", "--node", node)
	var got struct {
		Kill       event.Event
		Would, Was *event.Outcome
	}
	for line := range strings.Lines(stdout) {
		if err := json.Unmarshal([]byte(line), &got); err != nil {
			t.Fatalf("%v: %s", err, line)
		}
	}
	if got.Kill.ID != kills[3].ID || got.Would == nil || got.Was == nil || got.Was.Reason != event.ReasonObserveOnly {
		t.Errorf("json:\n%s", stdout)
	}
	if stdout, _ = run("--node", "worker-2"); stdout != "" {
		t.Errorf("of another node:\n%s", stdout)
	}
	wantSame(t, c, before)
}

// rewrite writes a config anew where it stands.
func rewrite(t *testing.T, cfg config.Config, path string) (config.Config, string) {
	t.Helper()
	want, from := newConfig(t, func(c *config.Config) { *c = cfg })
	if err := os.Rename(from, path); err != nil {
		t.Fatal(err)
	}
	return want, path
}

// testCrashLoop: a pod runs out of memory again and again. Whoever it is for evicts it when it is marked, and its
// controller puts another in its place.
func testCrashLoop(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	const cooldown = 4 * time.Second
	proxy := c.Proxy()
	r := newRig(t, c, proxy.Config(account), budgets(config.Budgets{Window: time.Minute, Cluster: 1000, Cooldown: cooldown}))
	r.ready()
	var events, patches atomic.Int32
	proxy.Fault(func(req *http.Request) kubetest.Fault {
		switch {
		case strings.Contains(req.URL.Path, "/events"):
			events.Add(1)
		case req.Method == http.MethodPatch:
			patches.Add(1)
		}
		return kubetest.Fault{}
	})
	pod := c.Pod("shop", "loop-0", node, deployed("loop"))
	began := time.Now()
	var times []time.Time
	incarnations := 1
	for range 100 {
		e := r.killOf(pod, c.ContainerID(pod, "main"))
		r.publish(e)
		if o := r.outcome(); o.Result == event.ResultAnnotated {
			times = append(times, o.Time)
			c.DeletePod("shop", "loop-0")
			pod = c.Pod("shop", "loop-0", node, deployed("loop"))
			incarnations++
		} else if o.Reason != event.ReasonBudget {
			t.Errorf("outcome %s/%s %s", o.Result, o.Reason, o.Detail)
		}
		time.Sleep(100 * time.Millisecond)
	}
	lasted := time.Since(began)
	// By the time of the claims: the API server may take long for a patch.
	state, err := (&budget.Ledger{Entry: r.conn.KVEntry(budget.Key)}).State(t.Context())
	if err != nil || len(state.Marks) != len(times) {
		t.Errorf("%d marks, and %d claims in the shared state (%v)", len(times), len(state.Marks), err)
	}
	for i := 1; i < len(state.Marks); i++ {
		if d := state.Marks[i].Time.Sub(state.Marks[i-1].Time); d < cooldown {
			t.Errorf("marked again after %s", d)
		}
	}
	if most := int(lasted/cooldown) + 1; len(times) < 2 || len(times) > most || int(patches.Load()) < len(times) {
		t.Errorf("%d marks, %d patches of pods in %s, want at most %d", len(times), patches.Load(), lasted, most)
	}
	// Of each incarnation one Event, and one on the node, each written once and at most once a minute more.
	if most := int32((incarnations + 1) * (2 + int(lasted/time.Minute))); events.Load() > most {
		t.Errorf("%d writes of Events for %d pods in %s, want at most %d", events.Load(), incarnations, lasted, most)
	}
}

// testPause: what oom-tap pause does holds for every replica at once, and over their restarts.
func testPause(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, keep)
	r.ready()
	second := &rig{t: t, kubeconfig: r.kubeconfig}
	second.cfg, second.configPath = newConfig(t, func(cfg *config.Config) { cfg.NATS = r.cfg.NATS })
	second.start()
	second.ready()
	n := 0
	kills := func(want string) {
		t.Helper()
		ids := map[string]bool{}
		for range 10 { // some for each
			n++
			e := r.killOf(c.Pod("shop", fmt.Sprint("pause-", n), node), "")
			ids[e.ID] = true
			r.publish(e)
		}
		for range 10 {
			o := r.outcome()
			if got := string(o.Result) + "/" + string(o.Reason); !ids[o.Kill] || got != want {
				t.Errorf("outcome %s of %s (%s), want %s", got, o.Kill, o.Detail, want)
			}
		}
	}
	kills("annotated/marked")
	ledger := &budget.Ledger{Entry: r.conn.KVEntry(budget.Key), Limits: r.cfg.Policy.Budgets, Now: time.Now}
	pause := &budget.Pause{Reason: "roll-out", By: "ann@host", Since: time.Now()}
	if _, err := ledger.SetPause(t.Context(), pause); err != nil {
		t.Fatal(err)
	}
	kills("observed/paused")
	for _, r := range []*rig{r, second} {
		eventually(t, "the replica says that it is paused", func() error {
			if _, body := r.get("/metrics"); !strings.Contains(body, "oom_tracer_paused 1") || !strings.Contains(r.annotator.out.String(), "marking is paused") {
				return fmt.Errorf("metrics:\n%s", body)
			}
			return nil
		})
	}
	r.annotator.stop(t)
	r.start()
	r.ready()
	second.annotator.stop(t)
	second.start()
	second.ready()
	kills("observed/paused")
	if _, err := ledger.SetPause(t.Context(), nil); err != nil {
		t.Fatal(err)
	}
	kills("annotated/marked")
	// One that ends by itself.
	until := time.Now().Add(2 * time.Second)
	if _, err := ledger.SetPause(t.Context(), &budget.Pause{Reason: "a moment", By: "ann@host", Since: time.Now(), Until: &until}); err != nil {
		t.Fatal(err)
	}
	kills("observed/paused")
	time.Sleep(time.Until(until))
	kills("annotated/marked")
}

// testState: where the shared state was replaced nothing is marked, and log and metric say so. What waited is marked once the state
// is restored.
func testState(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, keep)
	r.ready()
	first := r.killOf(c.Pod("shop", "refused-1", node), "")
	r.publish(first)
	r.want(first.ID, "annotated/marked")
	entry := r.conn.KVEntry(budget.Key)
	// A publisher named the state as the reply subject of its message.
	if err := entry.Update(t.Context(), func([]byte) ([]byte, error) { return []byte(`{"stream":"OOM","seq":1}`), nil }); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the annotator says that the state is refused", func() error {
		if _, body := r.get("/metrics"); !strings.Contains(body, "oom_tracer_budget_state_refused 1") || !strings.Contains(r.annotator.out.String(), "oom-tap restore") {
			return fmt.Errorf("metrics:\n%s", body)
		}
		return nil
	})
	second := r.killOf(c.Pod("shop", "refused-2", node), "")
	r.publish(second)
	time.Sleep(3 * time.Second)
	if marked(t, c)["refused-2"] {
		t.Error("a pod was marked")
	}
	out, err := exec.CommandContext(t.Context(), oomtest.Program(t, "oom-tap"), "restore", "--config", r.configPath).CombinedOutput()
	if err != nil || !strings.Contains(string(out), "restored the state of") {
		t.Fatalf("oom-tap restore: %v\n%s", err, out)
	}
	r.want(second.ID, "annotated/marked")
	state, err := (&budget.Ledger{Entry: entry}).State(t.Context())
	if err != nil || len(state.Marks) != 2 {
		t.Errorf("restored to %+v, %v", state, err)
	}
	eventually(t, "the metric is back", func() error {
		if _, body := r.get("/metrics"); !strings.Contains(body, "oom_tracer_budget_state_refused 0") {
			return fmt.Errorf("metrics:\n%s", body)
		}
		return nil
	})
}

// testHang: a replica hangs in the middle of a patch for longer than NATS waits for it. Another one does its
// work, with the same right; and when it comes back it does nothing more.
func testHang(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	proxy := c.Proxy()
	began := make(chan struct{})
	var patches atomic.Int32
	proxy.Fault(func(req *http.Request) kubetest.Fault {
		if patchesPod(req) && patches.Add(1) == 1 {
			close(began)
			return kubetest.Fault{Delay: 3 * time.Second}
		}
		return kubetest.Fault{}
	})
	limits := config.Budgets{Window: time.Hour, Cluster: 1}
	r := newRig(t, c, proxy.Config(account), budgets(limits))
	r.ready()
	e := r.killOf(c.Pod("shop", "hang", node), "")
	r.publish(e)
	<-began
	stopped := r.annotator.cmd.Process
	if err := stopped.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	resume := func() { _ = stopped.Signal(syscall.SIGCONT) }
	t.Cleanup(resume)
	second := &rig{t: t, kubeconfig: c.Kubeconfig(account)}
	second.cfg, second.configPath = newConfig(t, func(cfg *config.Config) { cfg.NATS, cfg.Policy.Budgets = r.cfg.NATS, limits })
	second.start()
	second.ready()
	// NATS waits for half a minute.
	r.patience = 2 * patience
	o := r.want(e.ID, "annotated/marked")
	version := c.GetPod("shop", "hang").ResourceVersion
	resume()
	other := r.killOf(c.Pod("shop", "hang-2", node), "")
	r.publish(other)
	r.want(other.ID, "skipped/budget")
	r.settled()
	if got := c.GetPod("shop", "hang"); got.Annotations[evictMe] != "true" || got.ResourceVersion != version {
		t.Errorf("the pod was changed after the outcome at %s: %v", o.Time, got.Annotations)
	}
	select {
	case o := <-r.outcomes:
		t.Errorf("one more outcome: %+v", o)
	case <-time.After(time.Second):
	}
}

// testLate: what a replica publishes arrives at NATS after another one has published the outcome of the same kill, and long after
// NATS has forgotten that one's ID.
func testLate(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	nats := newNATS(t)
	nats.start()
	proxy := c.Proxy()
	r := &rig{t: t, kubeconfig: c.Kubeconfig(proxy.Config(account)), patience: 2 * patience}
	through := func(url string) func(*config.Config) {
		return func(cfg *config.Config) {
			cfg.NATS.URL, cfg.NATS.Stream.DedupWindow = url, time.Second
			keep(cfg)
		}
	}
	var gate sync.Mutex // while it is locked, what the replica says waits
	r.cfg, r.configPath = newConfig(t, through("nats://"+newLink(t, nats.listen, func(fromClient bool) {
		if fromClient {
			gate.Lock()
			defer gate.Unlock()
		}
	}).listen))
	r.cfg.NATS.URL = "nats://" + nats.listen
	r.connect()
	if err := bus.EnsureStreams(t.Context(), r.conn, r.cfg.NATS.Stream); err != nil {
		t.Fatal(err)
	}
	r.tail()
	r.start()
	r.ready()
	var once sync.Once
	proxy.Fault(func(req *http.Request) kubetest.Fault {
		if patchesPod(req) {
			once.Do(gate.Lock)
		}
		return kubetest.Fault{}
	})
	pod := c.Pod("shop", "late", node)
	e := r.killOf(pod, "")
	r.publish(e)
	eventually(t, "the pod is marked", func() error {
		if !marked(t, c)["late"] {
			return fmt.Errorf("it is not")
		}
		return nil
	})
	second := &rig{t: t, kubeconfig: c.Kubeconfig(account)}
	second.cfg, second.configPath = newConfig(t, through(r.cfg.NATS.URL))
	second.start()
	// NATS waits for half a minute.
	r.want(e.ID, "annotated/marked")
	time.Sleep(3 * time.Second)
	gate.Unlock()
	r.settled()
	other := r.killOf(c.Pod("shop", "late-2", node), "")
	r.publish(other)
	r.want(other.ID, "annotated/marked")
	select {
	case o := <-r.outcomes:
		t.Errorf("one more outcome: %+v", o)
	case <-time.After(7 * time.Second): // longer than an attempt to publish
	}
}
