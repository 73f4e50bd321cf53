// Package e2e runs build/oom-descheduler, and the unmodified descheduler, as they ship against a real API server,
// with the shipped role and policies and the token of the shipped service account.
//
// Rule of the package: the test deletes no pod that it looks at. What was evicted, and how, stands in the API
// server's own audit log.
package e2e

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

const (
	evictMe  = "oom-tracer.alpha.kubernetes.io/evict-me"
	lastKill = "oom-tracer.alpha.kubernetes.io/last-kill"
	user     = "system:serviceaccount:oom-tracer:oom-descheduler"

	annotated = "deploy/descheduler/policy.yaml"          // for build/oom-descheduler
	upstream  = "deploy/descheduler/policy-upstream.yaml" // for build/descheduler

	// patience bounds what takes 1 or 2 s on an idle machine.
	patience = 90 * time.Second
)

func TestEndToEnd(t *testing.T) {
	c := kubetest.Start(t)
	c.Node("node-1")
	c.Node("node-2")
	for _, namespace := range []string{"shop", "bank"} {
		c.Namespace(namespace)
	}
	for name, value := range map[string]int32{"low": -100, "high": 100} {
		class := &schedulingv1.PriorityClass{ObjectMeta: metav1.ObjectMeta{Name: name}, Value: value}
		if _, err := c.Client.SchedulingV1().PriorityClasses().Create(t.Context(), class, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	account := descheduler(c)

	for name, test := range map[string]func(*rig){
		"RemoveAnnotated": func(r *rig) { testPods(r, "oom-descheduler", annotated, annotate) },
		"PodLifeTime":     func(r *rig) { testPods(r, "descheduler", upstream, condition) },
		// What deploy/docs/marking.md says of the two.
		"PodLifeTimeInOurs": func(r *rig) { testPods(r, "oom-descheduler", upstream, condition) },
		"Args":              testArgs, "Limits": testLimits, "DryRun": testDryRun, "Refused": testRefused, "Stale": testStale,
		"Interval": testInterval, "OneNode": testOneNode, "Rights": testRights,
	} {
		t.Run(name, func(t *testing.T) {
			r := &rig{T: t, c: c.In(t), account: account, began: time.Now()}
			r.begin = len(r.c.Audit())
			defer r.clear()
			test(r)
		})
	}
}

// descheduler applies deploy/manifests/descheduler/rbac.yaml and returns the client configuration of its service account, once
// the server obeys what was applied.
func descheduler(c *kubetest.Cluster) *rest.Config {
	c.Namespace("oom-tracer")
	c.Apply("deploy/manifests/descheduler/rbac.yaml")
	account := c.ServiceAccount("oom-tracer", "oom-descheduler")
	client, err := kubernetes.NewForConfig(account)
	if err != nil {
		panic(err)
	}
	for _, ask := range []authorizationv1.ResourceAttributes{
		{Verb: "create", Resource: "pods", Subresource: "eviction"},
		{Verb: "create", Group: "coordination.k8s.io", Resource: "leases", Namespace: "oom-tracer"},
		{Verb: "update", Group: "coordination.k8s.io", Resource: "leases", Namespace: "oom-tracer", Name: "descheduler"},
	} {
		c.Eventually("the descheduler has its rights", func() error {
			review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &ask}}
			got, err := client.AuthorizationV1().SelfSubjectAccessReviews().Create(context.Background(), review, metav1.CreateOptions{})
			if err == nil && !got.Status.Allowed {
				err = fmt.Errorf("%s %s: not allowed", ask.Verb, ask.Resource)
			}
			return err
		})
	}
	return account
}

// rig is one test on the cluster that all of them share.
type rig struct {
	*testing.T
	c       *kubetest.Cluster
	account *rest.Config
	begin   int // of its part of the audit log
	began   time.Time
}

// clear makes room for the next test: without a kubelet an evicted pod is Terminating for ever.
func (r *rig) clear() {
	list, err := r.c.Client.CoreV1().Pods("").List(r.Context(), metav1.ListOptions{})
	if err != nil {
		r.Fatal(err)
	}
	for _, pod := range list.Items {
		r.c.DeletePod(pod.Namespace, pod.Name)
	}
}

// pod makes a pod that runs, is ready and belongs to a ReplicaSet: one that may be evicted.
func (r *rig) pod(namespace, name, node string, changes ...func(*corev1.Pod)) *corev1.Pod {
	r.Helper()
	return r.c.Pod(namespace, name, node, append([]func(*corev1.Pod){func(pod *corev1.Pod) {
		pod.Labels, pod.Annotations = map[string]string{"app": name}, map[string]string{}
		pod.OwnerReferences = owner("apps/v1", "ReplicaSet")
		pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
	}}, changes...)...)
}

func owner(version, kind string) []metav1.OwnerReference {
	controller := true
	return []metav1.OwnerReference{{APIVersion: version, Kind: kind, Name: "web", UID: "0f1e2d3c", Controller: &controller}}
}

// annotate marks as oom-annotator does with the default annotation, for a kill of a minute ago.
func annotate(pod *corev1.Pod, value string) {
	pod.Annotations[evictMe] = value
	hit(time.Minute)(pod)
}

// hit is the summary of a kill of some time ago, as oom-annotator writes it.
func hit(ago time.Duration) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		summary, err := json.Marshal(pods.Summary{Event: "boot-4711-1", Time: time.Now().UTC().Add(-ago), Scope: "global", Node: pod.Spec.NodeName})
		if err != nil {
			panic(err)
		}
		pod.Annotations[lastKill] = string(summary)
	}
}

// condition marks for the unmodified descheduler: deploy/descheduler/policy-upstream.yaml says how.
func condition(pod *corev1.Pod, value string) {
	status := corev1.ConditionFalse
	if value == "true" {
		status = corev1.ConditionTrue
	}
	pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{
		Type: evictMe, Status: status, Reason: "OOMKilled", Message: "boot-4711-1", LastTransitionTime: metav1.Now(),
	})
}

func marked(pod *corev1.Pod) { annotate(pod, "true") }

// start runs a program until ctx ends, and then gives it time to end well.
func start(ctx context.Context, t *testing.T, program string, args ...string) (*exec.Cmd, *oomtest.Output) {
	t.Helper()
	out := &oomtest.Output{}
	cmd := exec.CommandContext(ctx, oomtest.Program(t, program), args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, out
}

// cycle runs a program for one cycle, and returns its log.
func (r *rig) cycle(program, policy string, args ...string) string {
	r.Helper()
	return r.cycleAs(r.account, program, policy, args...)
}

func (r *rig) cycleAs(account *rest.Config, program, policy string, args ...string) string {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	cmd, out := start(ctx, r.T, program, append(r.args(account, policy), append([]string{"--descheduling-interval", "0"}, args...)...)...)
	if err := cmd.Wait(); err != nil {
		r.Fatalf("%s: %v\n%s", program, err, out)
	}
	if strings.Contains(out.String(), "forbidden") {
		r.Errorf("%s lacks a right:\n%s", program, out)
	}
	r.Cleanup(func() {
		if r.Failed() {
			r.Logf("%s said:\n%s", program, out)
		}
	})
	return out.String()
}

func (r *rig) args(account *rest.Config, policy string) []string {
	r.Helper()
	path, err := kubetest.Path(policy)
	if err != nil {
		r.Fatal(err)
	}
	return []string{"--policy-config-file", path, "--kubeconfig", r.c.Kubeconfig(account), "--secure-port", "0", "--v", "1"}
}

// policy writes a policy with RemoveAnnotated: top is what stands at its top level.
func (r *rig) policy(top, args string) string {
	r.Helper()
	return writePolicy(r.T, top, args)
}

func writePolicy(t *testing.T, top, args string) string {
	t.Helper()
	text := fmt.Sprintf(`apiVersion: descheduler/v1alpha2
kind: DeschedulerPolicy
%s
profiles:
  - name: oom
    pluginConfig: [{name: RemoveAnnotated, args: %s}]
    plugins: {deschedule: {enabled: [RemoveAnnotated]}}
`, top, args)
	path := filepath.Join(t.TempDir(), "policy.yaml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// want checks what became of the pods: those that are named were evicted, by the descheduler and through the eviction
// subresource, and the others are as they were. refused are those whose eviction the API server refused with 429.
func (r *rig) want(evicted, refused []string) {
	r.Helper()
	var got, gotRefused []string
	for _, e := range r.c.Audit()[r.begin:] {
		name := e.ObjectRef.Namespace + "/" + e.ObjectRef.Name
		if e.User.Username != user || e.Verb != "create" || e.ObjectRef.Subresource != "eviction" {
			r.Errorf("%s asked for %s of %s, subresource %q", e.User.Username, e.Verb, name, e.ObjectRef.Subresource)
		}
		switch e.ResponseStatus.Code {
		case http.StatusCreated:
			got = append(got, name)
		case http.StatusTooManyRequests:
			gotRefused = append(gotRefused, name)
		default:
			r.Errorf("eviction of %s: %d", name, e.ResponseStatus.Code)
		}
	}
	for what, lists := range map[string][2][]string{"evicted": {got, evicted}, "refused": {gotRefused, refused}} {
		got, want := slices.Sorted(slices.Values(lists[0])), slices.Sorted(slices.Values(lists[1]))
		if !slices.Equal(got, want) {
			r.Errorf("%s by the audit log: %v, want %v", what, got, want)
		}
	}
	list, err := r.c.Client.CoreV1().Pods("").List(r.Context(), metav1.ListOptions{})
	if err != nil {
		r.Fatal(err)
	}
	for _, pod := range list.Items {
		name := pod.Namespace + "/" + pod.Name
		if going := pod.DeletionTimestamp != nil; going != slices.Contains(evicted, name) {
			r.Errorf("%s is on its way out: %t", name, going)
		}
	}
}

// stays checks that the log and an Event on it have the reason why a marked pod stays.
func (r *rig) stays(log, pod, why string) {
	r.Helper()
	r.logged(log, pod, why)
	for _, e := range r.events(pod) {
		if strings.Contains(e, why) {
			return
		}
	}
	r.Errorf("no Event says why %s stays: %q", pod, r.events(pod))
}

// staysForNow checks the log as stays does, and that there is no Event.
func (r *rig) staysForNow(log, pod, why string) {
	r.Helper()
	r.logged(log, pod, why)
	if events := r.events(pod); len(events) > 0 {
		r.Errorf("Events on %s: %q", pod, events)
	}
}

// events are what the Events say on why a pod, as it is now, was not evicted.
func (r *rig) events(pod string) (notes []string) {
	r.Helper()
	namespace, name, _ := strings.Cut(pod, "/")
	list, err := r.c.Client.EventsV1().Events(namespace).List(r.Context(), metav1.ListOptions{})
	if err != nil {
		r.Fatal(err)
	}
	for _, e := range list.Items {
		if e.Regarding.Name == name && e.Reason == "EvictionFailed" && e.EventTime.After(r.began) {
			notes = append(notes, e.Note)
		}
	}
	return notes
}

func (r *rig) logged(log, pod, why string) {
	r.Helper()
	for line := range strings.Lines(log) {
		if strings.Contains(line, `"Marked pod stays"`) && strings.Contains(line, `pod="`+pod+`"`) {
			if !strings.Contains(line, why) {
				r.Errorf("%s stays for another reason than %q: %s", pod, why, line)
			}
			return
		}
	}
	r.Errorf("the log does not say why %s stays", pod)
}

// budget makes a PodDisruptionBudget for the pods of app, with so many disruptions left, as its controller would.
func (r *rig) budget(namespace, app string, left int32) {
	r.Helper()
	budgets := r.c.Client.PolicyV1().PodDisruptionBudgets(namespace)
	pdb, err := budgets.Create(r.Context(), &policyv1.PodDisruptionBudget{
		ObjectMeta: metav1.ObjectMeta{GenerateName: app + "-"},
		Spec:       policyv1.PodDisruptionBudgetSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": app}}},
	}, metav1.CreateOptions{})
	if err != nil {
		r.Fatal(err)
	}
	pdb.Status = policyv1.PodDisruptionBudgetStatus{ObservedGeneration: pdb.Generation, DisruptionsAllowed: left, CurrentHealthy: 2, DesiredHealthy: 2 - left, ExpectedPods: 2}
	if _, err := budgets.UpdateStatus(r.Context(), pdb, metav1.UpdateOptions{}); err != nil {
		r.Fatal(err)
	}
	ctx := context.WithoutCancel(r.Context())
	r.Cleanup(func() {
		if err := budgets.Delete(ctx, pdb.Name, metav1.DeleteOptions{}); err != nil {
			r.Error(err)
		}
	})
}

// testPods: which pods go and which stay, with a policy as it ships. mark marks a pod with a value.
func testPods(r *rig, program, policy string, mark func(pod *corev1.Pod, value string)) {
	marked := func(changes ...func(*corev1.Pod)) func(*corev1.Pod) {
		return func(pod *corev1.Pod) {
			mark(pod, "true")
			for _, change := range changes {
				change(pod)
			}
		}
	}
	r.pod("shop", "web-1", "node-1", marked())
	r.pod("bank", "web-2", "node-2", marked())
	r.pod("shop", "pending", "node-2", marked(func(pod *corev1.Pod) { pod.Status.Phase = corev1.PodPending }))

	r.pod("shop", "unmarked", "node-1")
	r.pod("shop", "no", "node-1", func(pod *corev1.Pod) { mark(pod, "false") })
	r.pod("shop", "succeeded", "node-1", marked(func(pod *corev1.Pod) { pod.Status.Phase = corev1.PodSucceeded }))
	r.pod("shop", "failed", "node-1", marked(func(pod *corev1.Pod) { pod.Status.Phase = corev1.PodFailed }))

	protected := map[string]struct {
		change func(*corev1.Pod)
		why    string // in DefaultEvictor's own words
	}{
		"bare":      {func(pod *corev1.Pod) { pod.OwnerReferences = nil }, "pod does not have any ownerRefs"},
		"mirror":    {func(pod *corev1.Pod) { pod.Annotations["kubernetes.io/config.mirror"] = "0f1e2d3c" }, "pod is a mirror pod"},
		"static":    {func(pod *corev1.Pod) { pod.Annotations["kubernetes.io/config.source"] = "file" }, "pod is a static pod"},
		"daemonset": {func(pod *corev1.Pod) { pod.OwnerReferences = owner("apps/v1", "DaemonSet") }, "daemonset pods are protected against eviction"},
		"critical":  {func(pod *corev1.Pod) { pod.Spec.PriorityClassName = "system-node-critical" }, "pod has system critical priority"},
		"storage": {func(pod *corev1.Pod) {
			pod.Spec.Volumes = []corev1.Volume{{Name: "cache", VolumeSource: corev1.VolumeSource{EmptyDir: &corev1.EmptyDirVolumeSource{}}}}
		}, "pod has local storage and is protected against eviction"},
	}
	for name, p := range protected {
		r.pod("shop", name, "node-1", marked(p.change))
	}
	r.pod("shop", "pinned", "node-1", marked(func(pod *corev1.Pod) { pod.Spec.NodeSelector = map[string]string{corev1.LabelHostname: "node-1"} }))

	// A budget without a disruption left, and one with one for two pods.
	r.budget("shop", "guarded", 0)
	r.pod("shop", "guarded", "node-2", marked())
	r.budget("bank", "pair", 1)
	for _, name := range []string{"pair-1", "pair-2"} {
		r.pod("bank", name, "node-2", marked(func(pod *corev1.Pod) { pod.Labels["app"] = "pair" }))
	}

	log := r.cycle(program, policy)
	// Which of the two went is as it may be.
	went, stayed := "bank/pair-1", "bank/pair-2"
	if r.c.GetPod("bank", "pair-1").DeletionTimestamp == nil {
		went, stayed = stayed, went
	}
	r.want([]string{"shop/web-1", "bank/web-2", "shop/pending", went}, []string{"shop/guarded", stayed})

	// Each eviction says who wanted it and why.
	plugin := "oom/PodLifeTime: "
	if policy == annotated {
		plugin = "oom/RemoveAnnotated: " + evictMe
		for name, p := range protected {
			r.stays(log, "shop/"+name, "refused by an evictor plugin's filter: "+p.why)
		}
		r.stays(log, "shop/pinned", "refused by an evictor plugin's filter: pod does not fit on any other node")
		r.stays(log, "shop/guarded", "Cannot evict pod as it would violate the pod's disruption budget")
		r.stays(log, stayed, "Cannot evict pod as it would violate the pod's disruption budget")
	}
	for _, e := range r.c.Audit()[r.begin:] {
		if !strings.Contains(string(e.RequestObject), `"reason":"triggered by `+plugin+`"`) {
			r.Errorf("the eviction of %s does not say why: %s", e.ObjectRef.Name, e.RequestObject)
		}
	}
}

// testArgs: each arg, on pods of its own.
func testArgs(r *rig) {
	set := func(key, value string) func(*corev1.Pod) {
		return func(pod *corev1.Pod) { pod.Annotations[key] = value }
	}
	mark := set(evictMe, "true")
	type pod struct {
		name    string // with the namespace
		changes []func(*corev1.Pod)
		why     string // it stays; empty: it is evicted
	}
	is := func(name, why string, changes ...func(*corev1.Pod)) pod { return pod{name, changes, why} }
	const unread = "the time of its kill is unknown"
	for name, test := range map[string]struct {
		args string
		pods []pod
	}{
		"Defaults": {"{}", []pod{
			is("shop/true", "", mark), is("shop/empty", "", set(evictMe, "")), is("bank/yes", "", set(evictMe, "yes")),
			is("shop/false", "unmarked", set(evictMe, "false")), is("shop/other", "unmarked", set(evictMe+"2", "true")),
		}},
		"Key":     {"{annotationKey: example.com/go}", []pod{is("shop/ours", "unmarked", mark), is("shop/theirs", "", set("example.com/go", "now"))}},
		"Values":  {`{values: ["yes", "false"]}`, []pod{is("shop/true", "unmarked", mark), is("shop/yes", "", set(evictMe, "yes")), is("shop/false", "", set(evictMe, "false"))}},
		"Include": {"{namespaces: {include: [bank]}}", []pod{is("bank/in", "", mark), is("shop/out", "its namespace is not included", mark)}},
		"Exclude": {"{namespaces: {exclude: [bank]}}", []pod{is("shop/in", "", mark), is("bank/out", "its namespace is excluded", mark)}},
		"Selector": {"{labelSelector: {matchExpressions: [{key: app, operator: NotIn, values: [out]}]}}",
			[]pod{is("shop/in", "", mark), is("shop/out", "its labels do not match", mark)}},
		"MinAge": {"{minAge: 10m}", []pod{
			is("shop/old", "", mark, hit(11*time.Minute)),
			is("shop/young", "less than minAge, 10m0s", mark, hit(9*time.Minute)),
			is("shop/ahead", "hit in the future", mark, hit(-time.Hour)),
			is("shop/silent", "it has no annotation "+lastKill, mark),
			is("shop/text", unread, mark, set(lastKill, "yesterday")),
			is("shop/object", unread, mark, set(lastKill, "{}")),
			is("shop/type", unread, mark, set(lastKill, `{"time":1}`)),
		}},
		"MaxAge": {"{maxAge: 10m}", []pod{
			is("shop/young", "", mark, hit(9*time.Minute)),
			is("shop/old", "longer ago than maxAge, 10m0s", mark, hit(11*time.Minute)),
			is("shop/ahead", "hit in the future", mark, hit(-time.Hour)),
			is("shop/silent", "it has no annotation "+lastKill, mark),
		}},
		"Between": {"{minAge: 10m, maxAge: 20m}", []pod{
			is("shop/young", "less than minAge", mark, hit(9*time.Minute)), is("shop/right", "", mark, hit(15*time.Minute)),
			is("shop/old", "longer ago than maxAge", mark, hit(21*time.Minute)),
		}},
		"SummaryKey": {"{minAge: 10m, summaryAnnotationKey: example.com/kill}", []pod{
			is("shop/theirs", "", mark, set("example.com/kill", `{"time":"2026-01-01T00:00:00Z"}`)),
			is("shop/ours", "it has no annotation example.com/kill", mark, hit(11*time.Minute)),
		}},
	} {
		r.Run(name, func(t *testing.T) {
			r := &rig{T: t, c: r.c.In(t), account: r.account, began: time.Now()}
			r.begin = len(r.c.Audit())
			defer r.clear()
			var evicted []string
			for _, pod := range test.pods {
				namespace, name, _ := strings.Cut(pod.name, "/")
				r.pod(namespace, name, "node-1", pod.changes...)
				if pod.why == "" {
					evicted = append(evicted, pod.name)
				}
			}
			log := r.cycle("oom-descheduler", r.policy("", test.args))
			r.want(evicted, nil)
			for _, pod := range test.pods {
				switch {
				case strings.HasPrefix(pod.why, "less than minAge"), strings.HasPrefix(pod.why, "its "):
					r.staysForNow(log, pod.name, pod.why)
				case pod.why != "" && pod.why != "unmarked":
					r.stays(log, pod.name, pod.why)
				}
			}
		})
	}
}

// testLimits: no more pods go than the policy allows, those of the lowest priority first.
func testLimits(r *rig) {
	class := func(name string) func(*corev1.Pod) {
		return func(pod *corev1.Pod) { pod.Spec.PriorityClassName = name }
	}
	for limit, test := range map[string]struct {
		evicted []string
		why     string
	}{
		"PerNode":      {[]string{"bank/low-1", "bank/low-2"}, "maximum number of evicted pods per node reached"},
		"PerNamespace": {[]string{"bank/low-1", "shop/middle-1"}, "maximum number of evicted pods per namespace reached"},
		"Total":        {[]string{"bank/low-1"}, "maximum number of evicted pods per a descheduling cycle reached"},
	} {
		r.Run(limit, func(t *testing.T) {
			r := &rig{T: t, c: r.c.In(t), account: r.account, began: time.Now()}
			r.begin = len(r.c.Audit())
			defer r.clear()
			r.pod("shop", "high-1", "node-1", marked, class("high"))
			r.pod("shop", "middle-1", "node-1", marked)
			r.pod("bank", "low-1", "node-1", marked, class("low"))
			if limit == "PerNode" {
				r.pod("bank", "low-2", "node-2", marked, class("low"))
				r.pod("bank", "high-2", "node-2", marked, class("high"))
			}
			log := r.cycle("oom-descheduler", r.policy("maxNoOfPodsToEvict"+limit+": 1", "{}"))
			r.want(test.evicted, nil)
			r.stays(log, "shop/high-1", test.why)
			if limit == "Total" {
				r.stays(log, "shop/middle-1", test.why)
			}
		})
	}
}

// testDryRun: nothing is asked of the API server, and the log tells what would have been.
func testDryRun(r *rig) {
	r.pod("shop", "web-1", "node-1", marked)
	r.pod("shop", "bare", "node-1", marked, func(pod *corev1.Pod) { pod.OwnerReferences = nil })
	// The first cycle may come before the descheduler's simulation of the cluster is filled: so in v0.36.
	var log string
	r.c.Eventually("a dry run sees the pods", func() error {
		if log = r.cycle("oom-descheduler", annotated, "--dry-run"); !strings.Contains(log, "shop/web-1") {
			return fmt.Errorf("nothing of them in\n%s", log)
		}
		return nil
	})
	r.want(nil, nil)
	if !strings.Contains(log, `"Evicted pod in dry run mode" pod="shop/web-1" reason="`+evictMe+`" strategy="RemoveAnnotated"`) {
		r.Error("the log does not tell of the pod that would have been evicted")
	}
	r.staysForNow(log, "shop/bare", "refused by an evictor plugin's filter: pod does not have any ownerRefs") // nothing is written
}

// testRefused: what the API server answers to one pod does not stop the rest.
func testRefused(r *rig) {
	for _, name := range []string{"a", "b", "c", "d"} {
		r.pod("shop", name, "node-1", marked)
	}
	proxy := r.c.Proxy()
	proxy.Fault(func(req *http.Request) kubetest.Fault {
		switch {
		case req.Method == http.MethodPost && strings.HasSuffix(req.URL.Path, "/pods/b/eviction"):
			return kubetest.Fault{Code: http.StatusInternalServerError}
		case req.Method == http.MethodGet && strings.HasSuffix(req.URL.Path, "/pods/c"):
			return kubetest.Fault{Code: http.StatusForbidden}
		}
		return kubetest.Fault{}
	})
	ctx, cancel := context.WithTimeout(r.Context(), patience)
	defer cancel()
	args := append(r.args(proxy.Config(r.account), annotated), "--descheduling-interval", "0")
	cmd, out := start(ctx, r.T, "oom-descheduler", args...)
	if err := cmd.Wait(); err != nil {
		r.Errorf("%v\n%s", err, out)
	}
	r.want([]string{"shop/a", "shop/d"}, nil)
	r.stays(out.String(), "shop/b", "the test's proxy answers 500")
	r.staysForNow(out.String(), "shop/c", "could not read it again: the test's proxy answers 403")
}

// testStale: between the list and the eviction a pod is replaced by one of the same name, another loses its mark, and
// another begins to leave.
func testStale(r *rig) {
	r.pod("shop", "db-0", "node-1", marked)
	r.pod("shop", "pardoned", "node-1", marked)
	r.pod("shop", "gone", "node-1", marked)
	r.pod("shop", "leaving", "node-1", marked)
	born := r.c.Pod("bank", "spare", "node-2") // not looked at
	r.begin = len(r.c.Audit())

	proxy := r.c.Proxy()
	var once sync.Once
	proxy.Fault(func(req *http.Request) kubetest.Fault {
		if req.Method == http.MethodGet && strings.Contains(req.URL.Path, "/namespaces/shop/pods/") {
			once.Do(func() {
				r.c.DeletePod("shop", "db-0")
				r.c.DeletePod("shop", "gone")
				if err := r.c.Client.CoreV1().Pods("shop").Delete(context.Background(), "leaving", metav1.DeleteOptions{}); err != nil {
					r.Error(err)
				}
				born = r.pod("shop", "db-0", "node-1", marked)
				pod := r.c.GetPod("shop", "pardoned")
				delete(pod.Annotations, evictMe)
				if _, err := r.c.Client.CoreV1().Pods("shop").Update(context.Background(), pod, metav1.UpdateOptions{}); err != nil {
					r.Error(err)
				}
			})
		}
		return kubetest.Fault{}
	})
	log := r.cycleAs(proxy.Config(r.account), "oom-descheduler", annotated)
	for _, e := range r.c.Audit()[r.begin:] {
		if e.User.Username == user {
			r.Errorf("%s of %s was asked for", e.Verb, e.ObjectRef.Name)
		}
	}
	if pod := r.c.GetPod("shop", "db-0"); pod.UID != born.UID || pod.DeletionTimestamp != nil {
		r.Errorf("the reborn pod: %v", pod)
	}
	r.staysForNow(log, "shop/db-0", "another pod has its name now")
	r.staysForNow(log, "shop/pardoned", "its mark was removed")
	r.staysForNow(log, "shop/gone", "not found")
	r.staysForNow(log, "shop/leaving", "it is being deleted")
}

// testInterval: as it is deployed, with a lease: a pod that is marked later goes too, an Event says so, and it ends well.
func testInterval(r *rig) {
	r.pod("shop", "web-1", "node-1", marked)
	web2 := r.pod("shop", "web-2", "node-2")

	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	cmd, out := start(ctx, r.T, "oom-descheduler", append(r.args(r.account, annotated), "--descheduling-interval", "1s",
		"--leader-elect", "--leader-elect-resource-namespace", "oom-tracer")...)
	evicted := func(name string) {
		r.c.Eventually(name+" is evicted", func() error {
			if r.c.GetPod("shop", name).DeletionTimestamp == nil {
				return fmt.Errorf("not yet:\n%s", out)
			}
			return nil
		})
	}
	evicted("web-1")
	web2.Annotations = map[string]string{} // the server leaves out what is empty
	annotate(web2, "true")
	if _, err := r.c.Client.CoreV1().Pods("shop").Update(r.Context(), web2, metav1.UpdateOptions{}); err != nil {
		r.Fatal(err)
	}
	evicted("web-2")
	r.c.Eventually("the Event is there", func() error {
		list, err := r.c.Client.EventsV1().Events("shop").List(r.Context(), metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, e := range list.Items {
			if e.Regarding.UID == web2.UID && e.Reason == evictMe && e.Action == "Descheduled" {
				return nil
			}
		}
		return fmt.Errorf("%d Events, none of it", len(list.Items))
	})
	cancel()
	if err := cmd.Wait(); err != nil && ctx.Err() == nil {
		r.Errorf("it ended with %v", err)
	}
	if strings.Contains(out.String(), "forbidden") {
		r.Errorf("it lacks a right:\n%s", out)
	}
	r.want([]string{"shop/web-1", "shop/web-2"}, nil)
}

// testRights takes each verb out of the role in turn: then something is forbidden, and says so. The policy uses all that
// DefaultEvictor and RemoveAnnotated can ask for.
func testRights(r *rig) {
	roles, objects := r.c.Client.RbacV1(), map[string]func(change func([]rbacv1.PolicyRule)) error{}
	objects["ClusterRole"] = func(change func([]rbacv1.PolicyRule)) error {
		role, err := roles.ClusterRoles().Get(r.Context(), "oom-descheduler", metav1.GetOptions{})
		if err == nil {
			change(role.Rules)
			_, err = roles.ClusterRoles().Update(r.Context(), role, metav1.UpdateOptions{})
		}
		return err
	}
	objects["Role"] = func(change func([]rbacv1.PolicyRule)) error {
		role, err := roles.Roles("oom-tracer").Get(r.Context(), "oom-descheduler", metav1.GetOptions{})
		if err == nil {
			change(role.Rules)
			_, err = roles.Roles("oom-tracer").Update(r.Context(), role, metav1.UpdateOptions{})
		}
		return err
	}
	policy := filepath.Join(r.TempDir(), "policy.yaml")
	if err := os.WriteFile(policy, []byte(`apiVersion: descheduler/v1alpha2
kind: DeschedulerPolicy
evictionFailureEventNotification: true
profiles:
  - name: oom
    pluginConfig:
      - name: DefaultEvictor
        args:
          nodeFit: true
          namespaceLabelSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: Exists}]}
          priorityThreshold: {name: high}
          podProtections: {extraEnabled: [PodsWithPVC], config: {PodsWithPVC: {protectedStorageClasses: [{name: fast}]}}}
      - {name: RemoveAnnotated, args: {}}
    plugins: {deschedule: {enabled: [RemoveAnnotated]}}
`), 0o600); err != nil {
		r.Fatal(err)
	}
	for _, name := range []string{"web-1", "web-2"} {
		r.pod("shop", name, "node-1", marked, func(pod *corev1.Pod) { pod.Labels["app"] = "web" })
	}
	r.budget("shop", "web", 0)
	manifest, err := kubetest.Manifests("deploy/manifests/descheduler/rbac.yaml")
	if err != nil {
		r.Fatal(err)
	}
	// Who lacks a right may not give the lease back either.
	unlease := func() {
		err := r.c.Client.CoordinationV1().Leases("oom-tracer").Delete(r.Context(), "descheduler", metav1.DeleteOptions{})
		if err != nil && !apierrors.IsNotFound(err) {
			r.Fatal(err)
		}
	}
	defer func() {
		unlease()
		descheduler(r.c) // the next test has all of them again
	}()
	verbs := 0
	for _, object := range manifest {
		update := objects[object.GetKind()]
		if update == nil {
			continue
		}
		for i, rule := range object.Object["rules"].([]any) {
			rule := rule.(map[string]any)
			for _, resource := range rule["resources"].([]any) {
				for _, verb := range rule["verbs"].([]any) {
					verbs++
					want := fmt.Sprintf("cannot %s resource %q", verb, resource)
					err := update(func(rules []rbacv1.PolicyRule) {
						rules[i].Verbs[slices.Index(rules[i].Verbs, verb.(string))] = "none" // a rule must have one
					})
					if err != nil {
						r.Fatal(err)
					}
					unlease()
					// Of a server that streams what there is, it lists nothing.
					r.Setenv("KUBE_FEATURE_WatchListClient", fmt.Sprint(verb != "list"))
					var flags []string
					if verb != "get" && (resource == "priorityclasses" || resource == "poddisruptionbudgets") {
						flags = append(flags, "--dry-run")
					}
					r.said(policy, want, flags...)
					r.c.Apply("deploy/manifests/descheduler/rbac.yaml")
				}
			}
		}
	}
	r.Logf("%d verbs", verbs)
}

// said runs the descheduler until it says something.
func (r *rig) said(policy, want string, flags ...string) {
	r.Helper()
	ctx, cancel := context.WithTimeout(r.Context(), 6*time.Second)
	defer cancel()
	flags = append(flags, "--descheduling-interval", "200ms", "--leader-elect", "--leader-elect-resource-namespace", "oom-tracer")
	cmd, out := start(ctx, r.T, "oom-descheduler", append(r.args(r.account, policy), flags...)...)
	for !strings.Contains(strings.ReplaceAll(out.String(), `\"`, `"`), want) && ctx.Err() == nil {
		time.Sleep(20 * time.Millisecond)
	}
	if ctx.Err() != nil {
		r.Errorf("nothing says: %s", want)
	}
	cancel()
	_ = cmd.Wait()
}

// testOneNode: where a pod could only come back to, nothing is evicted, and the log says so.
func testOneNode(r *rig) {
	nodes := r.c.Client.CoreV1().Nodes()
	ready := func(status corev1.ConditionStatus) {
		node, err := nodes.Get(r.Context(), "node-2", metav1.GetOptions{})
		if err != nil {
			r.Fatal(err)
		}
		node.Status.Conditions[0].Status = status
		if _, err := nodes.UpdateStatus(r.Context(), node, metav1.UpdateOptions{}); err != nil {
			r.Fatal(err)
		}
	}
	r.pod("shop", "web-1", "node-1", marked)
	ready(corev1.ConditionFalse)
	defer ready(corev1.ConditionTrue)
	log := r.cycle("oom-descheduler", annotated)
	r.want(nil, nil)
	if !strings.Contains(log, "requires >=2 nodes") {
		r.Error("the log does not say that the cycle was skipped")
	}
}

// TestBadArgs: what is wrong is named, and the program ends with an error before it does anything.
func TestBadArgs(t *testing.T) {
	kubeconfig := filepath.Join(t.TempDir(), "kubeconfig")
	if err := os.WriteFile(kubeconfig, []byte(`{apiVersion: v1, kind: Config, current-context: a, clusters: [{name: a, cluster: {server: "http://127.0.0.1:1"}}],
		contexts: [{name: a, context: {cluster: a, user: a}}], users: [{name: a, user: {}}]}`), 0o600); err != nil {
		t.Fatal(err)
	}
	for args, want := range map[string]string{
		"{annotationkey: a}":                        `unknown field \"annotationkey\"`,
		"{maxage: 1h}":                              `unknown field \"maxage\"`,
		"{namespaces: {only: [a]}}":                 `unknown field \"namespaces.only\"`,
		"{values: true}":                            "RemoveAnnotatedArgs.values of type []string",
		"{minAge: 5}":                               "RemoveAnnotatedArgs.minAge of type string",
		"{minAge: 5x}":                              `in profile oom: RemoveAnnotated: minAge: \"5x\" is not a positive duration`,
		"{annotationKey: -a/b, maxAge: 0s}":         `RemoveAnnotated: maxAge: \"0s\" is not a positive duration`,
		"{labelSelector: {matchLabels: {a: '-'}}}":  "RemoveAnnotated: labelSelector: ",
		"{namespaces: {include: [a], exclude: [b]}": "did not find expected", // of the YAML itself
	} {
		t.Run(args, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			cmd, out := start(ctx, t, "oom-descheduler", "--policy-config-file", writePolicy(t, "", args), "--kubeconfig", kubeconfig,
				"--secure-port", "0", "--descheduling-interval", "0")
			if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(out.String(), want) {
				t.Errorf("%v, want status 1 and %q in\n%s", err, want, out)
			}
		})
	}
}
