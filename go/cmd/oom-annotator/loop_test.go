package main

import (
	"context"
	"errors"
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
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

const descheduler = "system:serviceaccount:oom-tracer:oom-descheduler"

// TestLoop: from the kill to the eviction and to the last word on it. These tests run as TestEndToEnd does, with
// build/oom-descheduler under the shipped policy, role and account.
func TestLoop(t *testing.T) {
	c := startLoop(t)
	account := c.Annotator()
	for name, test := range map[string]func(*testing.T, *kubetest.Cluster, *rest.Config){
		"RealKill": func(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
			testLoop(t, c, account, keep, "oom-descheduler", "deploy/descheduler/policy.yaml")
		},
		"Refused": func(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
			testStays(t, c, account, keep, "oom-descheduler", "deploy/descheduler/policy.yaml", "marked pod stays: refused by an evictor plugin's filter: pod does not have any ownerRefs")
		},
		"Expired": testExpired, "Left": testLeft, "Unsaid": testUnsaid,
	} {
		t.Run(name, func(t *testing.T) { test(t, c.In(t), account) })
	}
}

// TestCondition is TestLoop with the unmodified descheduler, which evicts by the condition that the annotator sets as
// well, and with the rights for that.
func TestCondition(t *testing.T) {
	c := startLoop(t)
	account := c.AnnotatorWith("config.policy.condition=" + evictMe)
	condition := func(cfg *config.Config) { cfg.Policy.Condition = evictMe }
	t.Run("RealKill", func(t *testing.T) {
		testLoop(t, c.In(t), account, condition, "descheduler", "deploy/descheduler/policy-upstream.yaml")
	})
	t.Run("Refused", func(t *testing.T) {
		// What its DefaultEvictor refuses it keeps to itself.
		testStays(t, c.In(t), account, condition, "descheduler", "deploy/descheduler/policy-upstream.yaml", "")
	})
	t.Run("TakenBack", func(t *testing.T) { testTakenBack(t, c.In(t), account, condition) })
	t.Run("SwitchedOff", func(t *testing.T) { testSwitchedOff(t, c.In(t), condition) })
	t.Run("NoRight", func(t *testing.T) { testNoRight(t, c.In(t), condition) })
}

func startLoop(t *testing.T) *kubetest.Cluster {
	t.Helper()
	c := kubetest.Start(t)
	c.Node(node)
	c.Node("worker-2")
	c.Namespace("shop")
	c.Namespace("bank")
	c.Namespace("oom-tracer")
	c.Apply("deploy/manifests/descheduler/rbac.yaml")
	return c
}

// conditionOf is the condition of a pod that evicts it, nil if there is none.
func conditionOf(pod *corev1.Pod) *corev1.PodCondition {
	for i := range pod.Status.Conditions {
		if pod.Status.Conditions[i].Type == evictMe {
			return &pod.Status.Conditions[i]
		}
	}
	return nil
}

// replicaSet makes a pod one that a descheduler may evict.
func replicaSet(p *corev1.Pod) {
	deployed("web")(p)
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
}

// startDescheduler runs the descheduler in an interval until the test ends.
func startDescheduler(t *testing.T, c *kubetest.Cluster, program, policy, interval string) {
	t.Helper()
	policy, err := kubetest.Path(policy)
	if err != nil {
		t.Fatal(err)
	}
	out := &oomtest.Output{}
	cmd := exec.Command(oomtest.Program(t, program), "--policy-config-file", policy,
		"--kubeconfig", c.Kubeconfig(c.ServiceAccount("oom-tracer", "oom-descheduler")), "--secure-port", "0", "--descheduling-interval", interval, "--client-connection-qps", "50", "--client-connection-burst", "100", "--v", "1")
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

// guard makes a PodDisruptionBudget without a disruption left for the pods of app: guarded, as its controller would.
func guard(t *testing.T, c *kubetest.Cluster) {
	t.Helper()
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
	ctx := context.WithoutCancel(t.Context())
	t.Cleanup(func() {
		if err := pdbs.Delete(ctx, "guarded", metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
}

func guarded(p *corev1.Pod) { p.Labels["app"] = "guarded" }

// bare makes a pod one that DefaultEvictor protects: nothing would make a new one.
func bare(p *corev1.Pod) { p.OwnerReferences = nil }

// testLoop: real kills at the limit of all pods together. Tracer, annotator and descheduler run as they ship: the pod
// is evicted through the eviction subresource, and that is told. Those that must stay, stay.
func testLoop(t *testing.T, c *kubetest.Cluster, account *rest.Config, change func(*config.Config), program, policy string) {
	root := oomtest.New(t, 512<<20)
	hit := c.Pod("shop", "hit", node, replicaSet)
	c.Pod("shop", "bystander", node, replicaSet)
	// Hit as well, before it: these stay, and why.
	kills := map[*corev1.Pod]string{
		c.Pod("shop", "guarded", node, replicaSet, guarded): "annotated/marked",
		c.Pod("shop", "bare", node, replicaSet, bare):       "annotated/marked",
		c.Pod("bank", "elsewhere", node, replicaSet):        "skipped/namespace",
	}
	born := c.Pod("shop", "reborn", node, replicaSet)
	guard(t, c)
	defer func() {
		for _, name := range []string{"shop/hit", "shop/bystander", "shop/guarded", "shop/bare", "shop/reborn", "bank/elsewhere"} {
			namespace, name, _ := strings.Cut(name, "/")
			c.DeletePod(namespace, name)
		}
	}()

	r := &rig{t: t, kubeconfig: c.Kubeconfig(account)}
	r.cfg, r.configPath = newConfig(t, func(cfg *config.Config) {
		cfg.Node.CgroupRoot = root.Path()
		cfg.Policy.InferredLimits = true // not every machine that runs the tests permits hooks
		cfg.Policy.Namespaces.Exclude = []string{"bank"}
		change(cfg)
	})
	start(t, "oom-tracer", "--config", r.configPath, "--node-name", node)
	r.start()
	r.connect()
	r.tail()
	r.ready()
	kubepods := oomtest.Child(t, root, "kubepods", 16<<20)
	burstable := oomtest.Child(t, kubepods, "burstable", cgroupfs.Unlimited)
	began := time.Now()
	kill := func(pod *corev1.Pod, want string) {
		group := oomtest.Child(t, burstable, "pod"+string(pod.UID), cgroupfs.Unlimited)
		if killed := oomtest.Storm(t, oomtest.Child(t, group, c.ContainerID(pod, "main"), cgroupfs.Unlimited), 1, 32, "plain"); len(killed) != 1 {
			t.Fatalf("%d were killed", len(killed))
		}
		if o := r.outcome(); string(o.Result)+"/"+string(o.Reason) != want || o.Pod == nil || o.Pod.Name != pod.Name {
			t.Fatalf("outcome %+v, pod %+v", o, o.Pod)
		}
	}
	for pod, want := range kills {
		kill(pod, want)
	}
	// Marked, and then another pod of the same name, as a StatefulSet makes it.
	kill(born, "annotated/marked")
	c.DeletePod("shop", "reborn")
	c.Pod("shop", "reborn", node, replicaSet)
	if o := r.last(); o.Result != event.ResultEvicted || o.Reason != event.ReasonLeft || o.Pod == nil || o.Pod.UID != string(born.UID) {
		t.Errorf("outcome %+v, pod %+v", o, o.Pod)
	}
	audited := len(c.Audit())
	kill(hit, "annotated/marked")
	startDescheduler(t, c, program, policy, "1s")
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
	for name, going := range map[string]bool{"shop/hit": true, "shop/bystander": false, "shop/guarded": false, "shop/bare": false, "shop/reborn": false, "bank/elsewhere": false} {
		namespace, pod, _ := strings.Cut(name, "/")
		if pod := c.GetPod(namespace, pod); (pod.DeletionTimestamp != nil) != going {
			t.Errorf("%s goes: %t", name, !going)
		}
	}
	if _, body := r.get("/metrics"); !strings.Contains(body, `oom_tracer_marked_victims_total{reason="eviction",stage="evicted"} 1`) {
		t.Errorf("metrics:\n%s", body)
	}
}

// testStays: a descheduler comes for marked pods and may not evict them. Their marks go when their time is over, and the
// last word has the reason, where it was told: why is that of a pod without an owner.
func testStays(t *testing.T, c *kubetest.Cluster, account *rest.Config, change func(*config.Config), program, policy, why string) {
	r := newRig(t, c, account, func(cfg *config.Config) {
		cfg.Policy.MarkLifetime = time.Minute
		change(cfg)
	})
	r.ready()
	guard(t, c)
	pods := map[string]*corev1.Pod{"guarded": c.Pod("shop", "guarded", node, replicaSet, guarded), "bare": c.Pod("shop", "bare", node, replicaSet, bare)}
	startDescheduler(t, c, program, policy, "1s")
	want, kills := map[string]string{}, map[string]string{}
	for name, pod := range pods {
		defer c.DeletePod("shop", name)
		e := r.killOf(pod, "")
		e.Time = time.Now().Add(-r.cfg.Policy.MarkLifetime + 10*time.Second).UTC()
		kills[e.ID] = name
		r.publish(e)
		r.want(e.ID, "annotated/marked")
	}
	want["guarded"] = "refused/evictor: Cannot evict pod as it would violate the pod's disruption budget."
	want["bare"] = "expired/lifetime: "
	if why != "" {
		want["bare"] = "refused/evictor: " + why
	}
	for range pods {
		o := r.last()
		name := kills[o.Kill]
		got := fmt.Sprintf("%s/%s: %s", o.Result, o.Reason, o.Detail)
		if result, detail, _ := strings.Cut(want[name], ": "); !strings.HasPrefix(got, result+": ") || !strings.Contains(got, detail) || o.Pod == nil || o.Pod.Name != name {
			t.Errorf("%s: %s, want %s; %+v", name, got, want[name], o.Pod)
		}
		delete(want, name)
		now := c.GetPod("shop", name)
		if _, ok := now.Annotations[evictMe]; ok || now.Annotations[lastKill] == "" || now.DeletionTimestamp != nil {
			t.Errorf("%s has the annotations %v, deletion %v", name, now.Annotations, now.DeletionTimestamp)
		}
		eventually(t, "its condition goes too", func() error {
			if got := conditionOf(c.GetPod("shop", name)); got != nil {
				return fmt.Errorf("condition %+v", got)
			}
			return nil
		})
	}
	if _, body := r.get("/metrics"); !strings.Contains(body, `oom_tracer_marked_victims_total{reason="evictor",stage="refused"}`) {
		t.Errorf("metrics:\n%s", body)
	}
}

// testTakenBack: with a condition a mark is two things on the pod; who takes the annotation away has taken all of it.
func testTakenBack(t *testing.T, c *kubetest.Cluster, account *rest.Config, change func(*config.Config)) {
	r := newRig(t, c, account, change)
	r.ready()
	pod := c.Pod("shop", "pardoned", node, replicaSet, func(p *corev1.Pod) { p.Status.Message = "by the kubelet" })
	other := c.Pod("shop", "byhand", node, replicaSet, func(p *corev1.Pod) {
		p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: evictMe, Status: corev1.ConditionTrue, Message: "I say so"})
	})
	defer c.DeletePod("shop", "pardoned")
	defer c.DeletePod("shop", "byhand")
	e := r.killOf(pod, "")
	r.publish(e)
	r.want(e.ID, "annotated/marked")
	now := c.GetPod("shop", "pardoned")
	got := conditionOf(now)
	if got == nil || got.Status != corev1.ConditionTrue || got.Reason != "OOMKilled" || got.Message != e.ID || time.Since(got.LastTransitionTime.Time) > time.Minute ||
		now.Status.Message != "by the kubelet" || len(now.Status.Conditions) != 2 || len(now.Status.ContainerStatuses) != 1 {
		t.Fatalf("status %+v", now.Status)
	}
	c.Eventually("the annotation is taken back", func() error {
		pod := c.GetPod("shop", "pardoned")
		delete(pod.Annotations, evictMe)
		_, err := c.Client.CoreV1().Pods("shop").Update(t.Context(), pod, metav1.UpdateOptions{})
		return err
	})
	eventually(t, "the condition goes too", func() error {
		if got := conditionOf(c.GetPod("shop", "pardoned")); got != nil {
			return fmt.Errorf("condition %+v", got)
		}
		return nil
	})
	if now := c.GetPod("shop", "pardoned"); now.Status.Message != "by the kubelet" || len(now.Status.Conditions) != 1 {
		t.Errorf("status %+v", now.Status)
	}
	if got := conditionOf(c.GetPod("shop", "byhand")); got == nil || c.GetPod("shop", "byhand").ResourceVersion != other.ResourceVersion {
		t.Errorf("the condition of another hand: %+v", got)
	}
}

// testSwitchedOff: where the configuration marks no more, or by another key, the marks of before are taken back, with the rights
// that the chart gives then, and that is published. A mark by another hand stays.
func testSwitchedOff(t *testing.T, c *kubetest.Cluster, change func(*config.Config)) {
	for _, test := range []struct{ name, annotation, values string }{
		{"off", "", "dryRun=true"},
		{"renamed", "example.com/evict=now", "config.policy.annotation=example.com/evict=now"},
	} {
		t.Run(test.name, func(t *testing.T) {
			c := c.In(t)
			account := c.AnnotatorWith("config.policy.condition=" + evictMe)
			r := newRig(t, c, account, change)
			r.ready()
			pod, byHand := c.Pod("shop", test.name, node, replicaSet), c.Pod("shop", "byhand-"+test.name, node, replicaSet, func(p *corev1.Pod) {
				p.Annotations = map[string]string{evictMe: "true"}
			})
			defer c.DeletePod("shop", pod.Name)
			defer c.DeletePod("shop", byHand.Name)
			e := r.killOf(pod, "")
			r.publish(e)
			r.want(e.ID, "annotated/marked")
			eventually(t, "the pod has the condition", func() error {
				if conditionOf(c.GetPod("shop", pod.Name)) == nil {
					return errors.New("it has none")
				}
				return nil
			})
			r.annotator.stop(t)
			c.ApplyChart([]string{"config.policy.condition=" + evictMe, test.values}, "rbac.yaml", "admission.yaml")
			again := c.Pod("shop", "again-"+test.name, node, replicaSet)
			defer c.DeletePod("shop", again.Name)
			client, err := kubernetes.NewForConfig(account)
			if err != nil {
				t.Fatal(err)
			}
			c.Eventually("the server obeys the policy", func() error {
				patch := fmt.Appendf(nil, `{"metadata":{"annotations":{"example.com/evict":"now",%q:"{\"event\":\"x\",\"annotation\":\"example.com/evict\"}"}}}`, lastKill)
				_, err := client.CoreV1().Pods("shop").Patch(t.Context(), again.Name, types.MergePatchType, patch, metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
				if test.annotation == "" && err != nil && strings.Contains(err.Error(), "may not change the annotation") {
					return nil
				}
				return err
			})
			before := r.cfg
			r.cfg, r.configPath = newConfig(t, func(cfg *config.Config) {
				change(cfg)
				cfg.NATS, cfg.Annotator, cfg.Policy.Annotation = before.NATS, before.Annotator, test.annotation
			})
			r.start()
			r.ready()
			if o := r.last(); o.Kill != e.ID || o.Result != event.ResultExpired || o.Reason != event.ReasonReconfigured {
				t.Errorf("outcome %+v", o)
			}
			eventually(t, "nothing evicts the pod any more", func() error {
				now := c.GetPod("shop", pod.Name)
				if _, marked := now.Annotations[evictMe]; marked || conditionOf(now) != nil || now.Annotations[lastKill] == "" {
					return fmt.Errorf("annotations %v, condition %+v", now.Annotations, conditionOf(now))
				}
				return nil
			})
			if c.GetPod("shop", byHand.Name).Annotations[evictMe] != "true" {
				t.Error("the mark by another hand is gone")
			}
			e = r.killOf(again, "")
			r.publish(e)
			if test.annotation == "" {
				r.want(e.ID, "observed/observe_only")
			} else {
				r.want(e.ID, "annotated/marked")
			}
		})
	}
}

// testNoRight: the condition is asked for, and the role of the plain manifests does not give it. That is told.
func testNoRight(t *testing.T, c *kubetest.Cluster, change func(*config.Config)) {
	account := c.AnnotatorWith("config.policy.condition=" + evictMe)
	c.Apply("deploy/manifests/rbac.yaml")
	r := newRig(t, c, account, func(cfg *config.Config) {
		cfg.Policy.MaxEventAge = 5 * time.Second
		change(cfg)
	})
	r.ready()
	pod := c.Pod("shop", "half", node, replicaSet)
	defer c.DeletePod("shop", "half")
	e := r.killOf(pod, "")
	r.publish(e)
	o := r.want(e.ID, "failed/forbidden")
	if !strings.Contains(o.Detail, `the verb "patch" on pods/status is missing`) {
		t.Errorf("detail %q", o.Detail)
	}
}

// testUnsaid: a replica dies after it has taken an expired mark away and before it has said so: the next one says it.
func testUnsaid(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, func(cfg *config.Config) { cfg.Policy.MarkLifetime = time.Minute })
	r.ready()
	pod := c.Pod("shop", "unsaid", node)
	defer c.DeletePod("shop", "unsaid")
	e := r.killOf(pod, "")
	e.Time = time.Now().Add(-r.cfg.Policy.MarkLifetime + 10*time.Second).UTC()
	r.publish(e)
	r.want(e.ID, "annotated/marked")
	r.annotator.stop(t)
	now := c.GetPod("shop", "unsaid")
	delete(now.Annotations, evictMe)
	if _, err := c.Client.CoreV1().Pods("shop").Update(t.Context(), now, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	r.start()
	r.ready()
	if o := r.last(); o.Kill != e.ID || o.Result != event.ResultExpired || o.Reason != event.ReasonLifetime || o.Pod == nil || o.Pod.Name != "unsaid" {
		t.Errorf("outcome %+v", o)
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
