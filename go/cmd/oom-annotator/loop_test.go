package main

import (
	"context"
	"fmt"
	"net/http"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/scratch"
	"github.com/oom-tracer/oom-tracer/go/internal/scratch/scratchtest"
)

const descheduler = "system:serviceaccount:oom-tracer:oom-descheduler"

// TestLoop: from the kill to the eviction and to the last word on it. These tests run as TestEndToEnd does, with
// build/oom-descheduler under the shipped policy, role and account.
func TestLoop(t *testing.T) {
	c := kubetest.Start(t)
	c.Node(node)
	c.Node("worker-2")
	c.Namespace("shop")
	account := c.Annotator()
	c.Apply("deploy/descheduler/rbac.yaml")
	for name, test := range map[string]func(*testing.T, *kubetest.Cluster, *rest.Config){
		"RealKill": testLoop, "Expired": testExpired, "Left": testLeft,
	} {
		t.Run(name, func(t *testing.T) { test(t, c.In(t), account) })
	}
}

// replicaSet makes a pod one that a descheduler may evict.
func replicaSet(p *corev1.Pod) {
	deployed("web")(p)
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
}

// startDescheduler runs the descheduler in an interval until the test ends.
func startDescheduler(t *testing.T, c *kubetest.Cluster, interval string) {
	t.Helper()
	policy, err := kubetest.Path("deploy/descheduler/policy.yaml")
	if err != nil {
		t.Fatal(err)
	}
	out := &output{}
	cmd := exec.Command(scratchtest.Program(t, "oom-descheduler"), "--policy-config-file", policy,
		"--kubeconfig", c.Kubeconfig(c.ServiceAccount("oom-tracer", "oom-descheduler")), "--secure-port", "0", "--descheduling-interval", interval, "--v", "1")
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = out, out, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		kill := time.AfterFunc(10*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		kill.Stop()
		if t.Failed() {
			t.Logf("the descheduler said:\n%s", out)
		}
	})
}

// testLoop: a real kill at the limit of all pods together. Tracer, annotator and descheduler run as they ship: the pod
// is evicted through the eviction subresource, and that is told. Those that must stay, stay.
func testLoop(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	root := scratchtest.New(t, 512<<20)
	hit := c.Pod("shop", "hit", node, replicaSet)
	c.Pod("shop", "bystander", node, replicaSet)
	guarded := c.Pod("shop", "guarded", node, replicaSet, func(p *corev1.Pod) { p.Labels["app"] = "guarded" })
	pdbs := c.Client.PolicyV1().PodDisruptionBudgets("shop")
	pdb, err := pdbs.Create(t.Context(), &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{Name: "guarded"},
		Spec:       policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "guarded"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	pdb.Status = policyv1.PodDisruptionBudgetStatus{ObservedGeneration: pdb.Generation, CurrentHealthy: 1, DesiredHealthy: 1, ExpectedPods: 1}
	if _, err := pdbs.UpdateStatus(t.Context(), pdb, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	audited := len(c.Audit())

	r := &rig{t: t, kubeconfig: c.Kubeconfig(account)}
	r.cfg, r.configPath = newConfig(t, func(cfg *config.Config) {
		cfg.Node.CgroupRoot = root.Path()
		cfg.Policy.InferredLimits = true // not every machine that runs the tests permits hooks
	})
	start(t, "oom-tracer", "--config", r.configPath, "--node-name", node)
	r.start()
	r.connect()
	r.tail()
	r.ready()
	kubepods := scratchtest.Child(t, root, "kubepods", 16<<20)
	burstable := scratchtest.Child(t, kubepods, "burstable", scratch.Unlimited)
	began := time.Now()
	for _, pod := range []*corev1.Pod{hit, guarded} {
		group := scratchtest.Child(t, burstable, "pod"+string(pod.UID), scratch.Unlimited)
		if killed := scratchtest.Storm(t, scratchtest.Child(t, group, c.ContainerID(pod, "main"), scratch.Unlimited), 1, 32, "plain"); len(killed) != 1 {
			t.Fatalf("%d were killed", len(killed))
		}
		if o := r.outcome(); o.Result != event.ResultAnnotated || o.Pod == nil || o.Pod.Name != pod.Name {
			t.Fatalf("outcome %+v, pod %+v", o, o.Pod)
		}
	}
	startDescheduler(t, c, "1s")
	o := r.last()
	if o.Result != event.ResultEvicted || o.Reason != event.ReasonEvicted || o.Stage != event.StageClose || o.ID != o.Kill+"/close" ||
		o.Pod == nil || o.Pod.UID != string(hit.UID) || o.Node != node {
		t.Errorf("outcome %+v, pod %+v", o, o.Pod)
	}
	t.Logf("from the first kill to the last word on it: %s, with a descheduler that comes every second", time.Since(began).Round(time.Millisecond))

	// By the server's own account; and the one under the budget was asked for, and stays.
	eventually(t, "the guarded pod's eviction is refused", func() error {
		for _, e := range c.Audit()[audited:] {
			if e.ObjectRef.Name == "guarded" && e.ResponseStatus.Code == http.StatusTooManyRequests {
				return nil
			}
		}
		return fmt.Errorf("not yet")
	})
	evicted := 0
	for _, e := range c.Audit()[audited:] {
		switch {
		case e.User.Username != descheduler || e.Verb != "create" || e.ObjectRef.Subresource != "eviction":
			t.Errorf("%s asked for %s of %s, subresource %q", e.User.Username, e.Verb, e.ObjectRef.Name, e.ObjectRef.Subresource)
		case e.ResponseStatus.Code == http.StatusCreated:
			evicted++
			if e.ObjectRef.Name != "hit" {
				t.Errorf("%s was evicted", e.ObjectRef.Name)
			}
		}
	}
	if evicted != 1 {
		t.Errorf("%d evictions", evicted)
	}
	for name, going := range map[string]bool{"hit": true, "bystander": false, "guarded": false} {
		if pod := c.GetPod("shop", name); (pod.DeletionTimestamp != nil) != going {
			t.Errorf("%s goes: %t", name, !going)
		}
	}
	if _, body := r.get("/metrics"); !strings.Contains(body, `oom_tracer_marked_victims_total{reason="eviction",stage="evicted"} 1`) {
		t.Errorf("metrics:\n%s", body)
	}
}

// testExpired: nobody comes for a marked pod in time. Its mark goes, once, and that is told; what was killed stays
// written there.
func testExpired(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, func(cfg *config.Config) { cfg.Policy.MarkLifetime = time.Minute })
	r.ready()
	pod := c.Pod("shop", "forgotten", node)
	fresh := c.Pod("shop", "fresh", node)
	// A kill that is a moment younger than too old, of a mark that is older than its lifetime a moment later.
	lifetime := r.cfg.Policy.MarkLifetime
	e := r.killOf(pod, "")
	e.Time = time.Now().Add(-lifetime + 8*time.Second).UTC()
	r.publish(e)
	r.want(e.ID, "annotated/marked")
	other := r.killOf(fresh, "")
	r.publish(other)
	r.want(other.ID, "annotated/marked")
	o := r.last()
	if o.Kill != e.ID || o.Result != event.ResultExpired || o.Reason != event.ReasonLifetime || o.Pod == nil || o.Pod.Name != "forgotten" {
		t.Errorf("outcome %+v", o)
	}
	now := c.GetPod("shop", "forgotten")
	if _, ok := now.Annotations[evictMe]; ok || now.Annotations[lastKill] == "" {
		t.Errorf("annotations %v", now.Annotations)
	}
	if c.GetPod("shop", "fresh").Annotations[evictMe] != "true" {
		t.Error("the other mark went too")
	}
	// It goes later: that is not news of this kill any more.
	c.DeletePod("shop", "forgotten")
	c.DeletePod("shop", "fresh")
	if o := r.last(); o.Kill != other.ID || o.Result != event.ResultEvicted || o.Reason != event.ReasonLeft {
		t.Errorf("outcome %+v", o)
	}
	select {
	case o := <-r.closed:
		t.Errorf("one more outcome: %+v", o)
	case <-time.After(2 * time.Second):
	}
}

// testLeft: marked pods leave while no annotator watches, and one that is evicted while it is asleep. Each has its last
// word, and one.
func testLeft(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, keep)
	r.ready()
	second := &rig{t: t, kubeconfig: r.kubeconfig}
	second.cfg, second.configPath = newConfig(t, func(cfg *config.Config) { cfg.NATS = r.cfg.NATS })
	gone, evicted, both := c.Pod("shop", "gone", node), c.Pod("shop", "evicted", node), c.Pod("shop", "both", node)
	ids := map[string]string{}
	for _, pod := range []*corev1.Pod{gone, evicted, both} {
		e := r.killOf(pod, "")
		ids[pod.Name] = e.ID
		r.publish(e)
		r.want(e.ID, "annotated/marked")
	}
	r.annotator.stop(t)
	c.DeletePod("shop", "gone")
	if err := c.Client.CoreV1().Pods("shop").EvictV1(context.Background(), &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "evicted"}}); err != nil {
		t.Fatal(err)
	}
	r.start()
	second.start()
	r.ready()
	second.ready()
	got := map[string]string{}
	for range 2 {
		o := r.last()
		got[o.Kill] += fmt.Sprintf("%s/%s ", o.Result, o.Reason)
	}
	if got[ids["gone"]] != "evicted/left " || got[ids["evicted"]] != "evicted/eviction " {
		t.Errorf("outcomes %v of %v", got, ids)
	}
	// Both see it, and the stream has one word of it.
	c.DeletePod("shop", "both")
	if o := r.last(); o.Kill != ids["both"] || o.Result != event.ResultEvicted {
		t.Errorf("outcome %+v", o)
	}
	// Nor is it told again by who starts later.
	second.annotator.stop(t)
	second.start()
	second.ready()
	select {
	case o := <-r.closed:
		t.Errorf("one more outcome: %+v", o)
	case <-time.After(2 * time.Second):
	}
}
