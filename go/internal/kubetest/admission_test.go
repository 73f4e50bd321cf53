package kubetest

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/validation"
	"k8s.io/client-go/kubernetes"

	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

const (
	condition = "example.com/evict-me"
	optOut    = "oom-tracer.alpha.kubernetes.io/opt-out"
)

// summary is what the annotator writes with a mark; see annotate.Annotator.
func summary(kill, mark string) string {
	return fmt.Sprintf(`{"event":%q,"annotation":%q,"time":"2026-01-02T03:04:05Z","scope":"global","victim":"x\"annotation\":\"team\"","node":"node-1"}`, kill, mark)
}

// annotations is a merge patch of annotations.
func annotations(keysAndValues ...string) string {
	var all []string
	for i := 0; i < len(keysAndValues); i += 2 {
		value := "null"
		if v := keysAndValues[i+1]; v != "" {
			value = fmt.Sprintf("%q", v)
		}
		all = append(all, fmt.Sprintf("%q:%s", keysAndValues[i], value))
	}
	return `{"metadata":{"annotations":{` + strings.Join(all, ",") + `}}}`
}

func with(annotations ...string) func(*corev1.Pod) {
	return func(pod *corev1.Pod) {
		for i := 0; i < len(annotations); i += 2 {
			pod.Annotations[annotations[i]] = annotations[i+1]
		}
	}
}

var (
	mark    = annotations(evictMe, "true", lastKill, summary("boot-1-2", evictMe))
	unmark  = annotations(evictMe, "")
	marked  = with(evictMe, "true", lastKill, summary("boot-1-2", evictMe))
	ours    = `{"type":"` + condition + `","status":"True","reason":"OOMKilled","message":"boot-1-2","lastTransitionTime":"2026-01-02T03:04:05Z"}`
	setTrue = `{"status":{"conditions":[` + ours + `]}}`
	remove  = `{"status":{"conditions":[{"type":"` + condition + `","$patch":"delete"}]}}`
)

// write is one try of whoever holds the annotator's token.
type write struct {
	name   string
	change func(*corev1.Pod) // of the pod, before
	body   string            // a merge patch; of the status, a strategic one
	want   string            // of the policy's refusal; empty: it goes through
	status bool
	kind   types.PatchType
	// nobody leaves out the field manager, as a program does that is none of ours.
	nobody bool
	in     string // the namespace; empty: shop
}

// TestAdmission is the table of what the admission policy lets through, for each kind of values that the chart makes it from. It
// has what the annotator itself writes, and what whoever stole its token may try.
func TestAdmission(t *testing.T) {
	c := Start(t)
	for _, name := range []string{"oom-tracer", "shop", "bank"} {
		c.Namespace(name)
	}
	token := newClient(t, c.ServiceAccount("oom-tracer", "oom-annotator"))
	critical := func(pod *corev1.Pod) { pod.Spec.PriorityClassName = "system-cluster-critical" }
	daemon := func(pod *corev1.Pod) {
		yes := true
		pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "DaemonSet", Name: "d", UID: "0f1e2d3c", Controller: &yes}}
	}
	mirror := with("kubernetes.io/config.mirror", "0f1e2d3c", "kubernetes.io/config.hash", "0f1e2d3c")
	for _, variant := range []struct {
		name   string
		values []string
		writes []write // the first one differs from the variants before
	}{
		{"default", nil, []write{
			{name: "system-critical", body: mark, change: critical, want: "may not mark a pod with the priority of system components"},
			{name: "mark", body: mark},
			{name: "mark by a strategic patch", body: mark, kind: types.StrategicMergePatchType},
			{name: "mark by another program", body: mark, nobody: true, want: "may not change what metadata.managedFields says of others"},
			{name: "mark again, after the mark before was taken back", body: annotations(evictMe, "true", lastKill, summary("boot-1-3", evictMe)),
				change: with(lastKill, summary("boot-1-2", evictMe))},
			{name: "unmark", body: unmark, change: marked},
			{name: "unmark what was marked by another key", body: annotations("example.com/old", ""), change: with("example.com/old", "x", lastKill, summary("boot-1-2", "example.com/old"))},
			{name: "mark, and unmark by the key before", body: annotations(evictMe, "true", lastKill, summary("boot-1-3", evictMe), "example.com/old", ""),
				change: with("example.com/old", "x", lastKill, summary("boot-1-2", "example.com/old"))},
			{name: "nothing", body: `{"metadata":{"annotations":{"team":"shop"}}}`},
			{name: "nothing of a marked pod", body: mark, change: marked},
			{name: "opted in", body: mark, change: with(optOut, "false")},
			{name: "a DaemonSet that is no controller", body: mark, change: func(pod *corev1.Pod) {
				daemon(pod)
				pod.OwnerReferences[0].Controller = nil
			}},
			{name: "a DaemonSet of somebody else's API", body: mark, change: func(pod *corev1.Pod) {
				daemon(pod)
				pod.OwnerReferences[0].APIVersion = "example.com/v1"
			}},
			{name: "high priority", body: mark, change: func(pod *corev1.Pod) { pod.Spec.PriorityClassName = "high" }},

			{name: "opted out", body: mark, change: with(optOut, "true"), want: "may not mark a pod that is opted out"},
			{name: "opted out with nothing", body: mark, change: with(optOut, ""), want: "may not mark a pod that is opted out"},
			{name: "opt-out removed with the mark", body: strings.Replace(mark, `{"annotations":{`, `{"annotations":{"`+optOut+`":null,`, 1),
				change: with(optOut, "true"), want: "may not change the annotation " + optOut},
			{name: "opt-out changed with the mark", body: strings.Replace(mark, `{"annotations":{`, `{"annotations":{"`+optOut+`":"false",`, 1),
				change: with(optOut, "true"), want: "may not change the annotation " + optOut},
			{name: "DaemonSet", body: mark, change: daemon, want: "may not mark a pod of a DaemonSet"},
			{name: "static", body: mark, change: mirror, want: "may not mark a static pod"},
			{name: "on no node", body: mark, change: func(pod *corev1.Pod) { pod.Spec.NodeName = "" }, want: "may not mark a pod that runs on no node"},
			{name: "has ended", body: mark, change: func(pod *corev1.Pod) { pod.Status.Phase = corev1.PodFailed }, want: "may not mark a pod that has ended"},
			{name: "mark without the summary", body: annotations(evictMe, "true"), want: "may only mark a pod together with"},
			{name: "mark with the summary of the kill before", body: annotations(evictMe, "true"), change: with(lastKill, summary("boot-1-2", evictMe)), want: "may only mark a pod together with"},
			{name: "summary without the mark", body: annotations(lastKill, summary("boot-1-2", evictMe)), want: "may only mark a pod together with"},
			{name: "summary of a marked pod", body: annotations(lastKill, summary("boot-1-3", evictMe)), change: marked, want: "may only mark a pod together with"},
			{name: "summary removed", body: annotations(lastKill, ""), change: marked, want: "may not change the annotation " + lastKill},
			{name: "summary that is none", body: annotations(evictMe, "true", lastKill, "{}"), want: "may only mark a pod together with"},
			{name: "summary that names another mark", body: annotations(evictMe, "true", lastKill, summary("boot-1-2", "team")), want: "may only mark a pod together with"},
			{name: "summary that names two", want: "may only mark a pod together with",
				body: annotations(evictMe, "true", lastKill, `{"event":"boot-1-2","annotation":"`+evictMe+`","annotation":"team"}`)},
			{name: "another value", body: annotations(evictMe, "yes", lastKill, summary("boot-1-2", evictMe)), want: "may mark a pod with the value of policy.annotation only"},
			{name: "a mark by another hand", body: annotations(evictMe, "true", lastKill, summary("boot-1-2", evictMe)), change: with(evictMe, "no"), want: "may not change the mark of a pod"},
			{name: "a mark by another hand removed", body: unmark, change: with(evictMe, "true"), want: "may not change the annotation " + evictMe},
			{name: "annotation of others removed", body: annotations("team", ""), change: marked, want: "may not change the annotation team"},
			{name: "annotation that the victim's name holds", body: annotations("team", ""), change: marked, want: "may not change the annotation team"},
		}},
		{"condition", []string{"config.policy.condition=" + condition}, []write{
			{name: "condition", body: setTrue, status: true, change: marked},
			{name: "mark", body: mark},
			{name: "condition again", body: setTrue, status: true, change: func(pod *corev1.Pod) {
				marked(pod)
				pod.Status.Conditions = []corev1.PodCondition{{Type: condition, Status: corev1.ConditionTrue, Message: "boot-1-1"}}
			}},
			{name: "condition removed", body: remove, status: true, change: func(pod *corev1.Pod) {
				pod.Status.Conditions = []corev1.PodCondition{{Type: condition, Status: corev1.ConditionTrue, Message: "boot-1-2"}}
			}},
			{name: "condition without the mark", body: setTrue, status: true, want: "may set its condition only on a pod that is marked"},
			{name: "condition of another kill", body: strings.Replace(setTrue, "boot-1-2", "boot-1-3", 1), status: true, change: marked, want: "may set its condition only on a pod that is marked"},
			{name: "condition of no kill", body: strings.Replace(setTrue, "boot-1-2", "", 1), status: true, change: marked, want: "may set its condition only on a pod that is marked"},
			{name: "condition that is false", body: strings.Replace(setTrue, "True", "False", 1), status: true, change: marked, want: "may set its condition only on a pod that is marked"},
			{name: "mark through the status", body: mark, status: true, change: critical, want: "may not mark a pod with the priority of system components"},
		}},
		{"another policy", []string{"config.policy.annotation=example.com/evict=<\\,'\"", "config.annotator.summary_annotation=example.com/kill", "config.policy.opt_out_annotation=example.com/stay",
			"config.policy.namespaces.exclude={kube-system,bank}", "config.policy.selector.app=web"}, []write{
			{name: "mark", body: annotations("example.com/evict", `<,'"`, "example.com/kill", summary("boot-1-2", "example.com/evict"))},
			{name: "by the key before", body: mark, want: "may not change the annotation "},
			{name: "opted out by the key before", body: annotations("example.com/evict", `<,'"`, "example.com/kill", summary("boot-1-2", "example.com/evict")), change: with(optOut, "true")},
			{name: "opted out", body: annotations("example.com/evict", `<,'"`, "example.com/kill", summary("boot-1-2", "example.com/evict")), change: with("example.com/stay", "true"), want: "may not mark a pod that is opted out"},
			{name: "namespace", body: annotations("example.com/evict", `<,'"`, "example.com/kill", summary("boot-1-2", "example.com/evict")), in: "bank", want: "may not mark a pod of policy.namespaces.exclude"},
			{name: "label", body: annotations("example.com/evict", `<,'"`, "example.com/kill", summary("boot-1-2", "example.com/evict")), change: func(pod *corev1.Pod) { pod.Labels["app"] = "db" }, want: "may not mark a pod without the labels of policy.selector"},
			{name: "no label", body: annotations("example.com/evict", `<,'"`, "example.com/kill", summary("boot-1-2", "example.com/evict")), change: func(pod *corev1.Pod) { pod.Labels = nil }, want: "may not mark a pod without the labels of policy.selector"},
		}},
		{"no protection", []string{"config.policy.protections.static=false", "config.policy.protections.daemonset=false", "config.policy.protections.system_critical=false",
			"config.policy.opt_out_annotation=", "config.policy.namespaces.include={shop}"}, []write{
			{name: "system-critical", body: mark, change: critical},
			{name: "DaemonSet", body: mark, change: daemon},
			{name: "static", body: mark, change: mirror},
			{name: "opted out", body: mark, change: with(optOut, "true")},
			{name: "namespace", body: mark, in: "bank", want: "may not mark a pod outside of policy.namespaces.include"},
		}},
		{"dryRun", []string{"dryRun=true", "config.policy.condition=" + condition}, []write{
			{name: "mark", body: mark, want: "may not change the annotation " + evictMe},
			{name: "summary", body: annotations(lastKill, summary("boot-1-2", evictMe)), want: "may not mark pods"},
			{name: "unmark", body: unmark, change: marked},
			{name: "condition", body: setTrue, status: true, change: marked, want: "may not mark pods"},
			{name: "condition removed", body: remove, status: true, change: func(pod *corev1.Pod) {
				pod.Status.Conditions = []corev1.PodCondition{{Type: condition, Status: corev1.ConditionTrue, Message: "boot-1-2"}}
			}},
			{name: "a mark by another hand", body: unmark, change: with(evictMe, "true"), want: "may not change the annotation " + evictMe},
		}},
	} {
		t.Run(variant.name, func(t *testing.T) {
			c := c.In(t)
			c.priorityClass("high", 1_000_000_000)
			c.ApplyChart(variant.values, "rbac.yaml", "admission.yaml")
			for i, w := range variant.writes {
				try := func() error { return c.tryWrite(token, fmt.Sprintf("pod-%d", i), w) }
				if i == 0 {
					c.Eventually("the server obeys", try)
				} else if err := try(); err != nil {
					t.Errorf("%s: %v", w.name, err)
				}
			}
		})
	}
}

// tryWrite makes the pod that a write is about and tries it. Its error is that the answer was another one.
func (c *Cluster) tryWrite(client kubernetes.Interface, name string, w write) error {
	c.t.Helper()
	namespace := w.in
	if namespace == "" {
		namespace = "shop"
	}
	before := c.Pod(namespace, name, "node-1", func(pod *corev1.Pod) {
		pod.Annotations, pod.Labels = map[string]string{"team": "shop"}, map[string]string{"app": "web"}
		if w.change != nil {
			w.change(pod)
		}
	})
	defer c.DeletePod(namespace, name)
	err := w.do(client, namespace, name)
	switch {
	case w.want == "" && err != nil:
		return fmt.Errorf("refused: %w", err)
	case w.want != "" && !denied(err, w.want):
		return fmt.Errorf("got %w, want the policy's refusal: %s", errOrDone(err), w.want)
	case w.want != "" && c.GetPod(namespace, name).ResourceVersion != before.ResourceVersion:
		return fmt.Errorf("refused, and the pod is another one")
	}
	return nil
}

func (w *write) do(client kubernetes.Interface, namespace, name string) error {
	kind, subresources := types.MergePatchType, []string{}
	if w.status {
		kind, subresources = types.StrategicMergePatchType, []string{"status"}
	}
	if w.kind != "" {
		kind = w.kind
	}
	opts := metav1.PatchOptions{FieldManager: pods.FieldManager}
	if w.nobody {
		opts.FieldManager = ""
	}
	_, err := client.CoreV1().Pods(namespace).Patch(context.Background(), name, kind, []byte(w.body), opts, subresources...)
	return err
}

func errOrDone(err error) error {
	if err == nil {
		return fmt.Errorf("no error")
	}
	return err
}

func (c *Cluster) priorityClass(name string, value int) {
	c.t.Helper()
	class := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": map[string]any{"name": name}, "value": int64(value),
	}}
	c.applyAll([]*unstructured.Unstructured{class})
}

// mutations is what somebody else's admission does to each update of a pod.
const mutations = `
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {name: others}
spec:
  failurePolicy: Fail
  reinvocationPolicy: Never
  matchConstraints:
    resourceRules:
      - {apiGroups: [""], apiVersions: [v1], operations: [UPDATE], resources: [pods, pods/status]}
  matchConditions:
    - {name: not-the-admin, expression: "request.userInfo.username != 'admin'"}
  mutations:
    - patchType: JSONPatch
      jsonPatch:
        expression: >-
          [JSONPatch{op: "add", path: "/metadata/labels/seen", value: "yes"},
          JSONPatch{op: "add", path: "/metadata/labels/app", value: "changed"},
          JSONPatch{op: "add", path: "/metadata/annotations/example.com~1seen", value: "yes"},
          JSONPatch{op: "add", path: "/metadata/annotations/team", value: "changed"},
          JSONPatch{op: "replace", path: "/spec/containers/0/image", value: "mirror.example.com/main:1"}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {name: others}
spec: {policyName: others}
`

// TestAdmissionOfOthers: what other admission adds to the annotator's patch is not taken for its own, and hides nothing of it.
func TestAdmissionOfOthers(t *testing.T) {
	c := Start(t)
	c.Namespace("shop")
	client := newClient(t, c.AnnotatorWith("config.policy.condition="+condition))
	objects, err := Parse(strings.NewReader(mutations))
	if err != nil {
		t.Fatal(err)
	}
	c.applyAll(objects)
	c.Pod("shop", "probe", "node-1", func(pod *corev1.Pod) {
		pod.Annotations, pod.Labels = map[string]string{"team": "x"}, map[string]string{"app": "x"}
	})
	c.Eventually("the other admission is there", func() error {
		opts := metav1.PatchOptions{FieldManager: pods.FieldManager, DryRun: []string{metav1.DryRunAll}}
		pod, err := client.CoreV1().Pods("shop").Patch(t.Context(), "probe", types.MergePatchType, []byte(mark), opts)
		if err == nil && pod.Labels["seen"] != "yes" {
			err = fmt.Errorf("labels %v", pod.Labels)
		}
		return err
	})
	for i, w := range []write{
		{name: "mark", body: mark},
		{name: "unmark", body: unmark, change: marked},
		{name: "condition", body: setTrue, status: true, change: marked},
		{name: "condition removed", body: remove, status: true, change: func(pod *corev1.Pod) {
			pod.Status.Conditions = []corev1.PodCondition{{Type: condition, Status: corev1.ConditionTrue, Message: "boot-1-2"}}
		}},
		{name: "mark by a program that does not say who it is", body: mark, nobody: true, want: "may not change the annotation"},
		{name: "label", body: `{"metadata":{"labels":{"x":"y"}}}`, want: "may not change a pod's labels"},
		{name: "label that the other admission sets", body: `{"metadata":{"labels":{"seen":"no"}}}`, want: "may not change a pod's labels"},
		{name: "label with the mark", body: strings.Replace(mark, `{"metadata":{`, `{"metadata":{"labels":{"x":"y"},`, 1), want: "may not change a pod's labels"},
		{name: "labels removed", body: strings.Replace(mark, `{"metadata":{`, `{"metadata":{"labels":{"tier":null},`, 1),
			change: func(pod *corev1.Pod) { pod.Labels["tier"] = "x" }, want: "may not change a pod's labels"},
		{name: "annotation with the mark", body: strings.Replace(mark, `{"annotations":{`, `{"annotations":{"x":"y",`, 1), want: "may not change the annotation x"},
		{name: "image with the mark", body: `{"metadata":{"annotations":` + mark[len(`{"metadata":{"annotations":`):len(mark)-2] + `},"spec":{"containers":[{"name":"main","image":"example.com/evil:1"}]}}`,
			kind: types.StrategicMergePatchType, want: "may not change a pod's spec"},
		{name: "system-critical", body: mark, change: func(pod *corev1.Pod) { pod.Spec.PriorityClassName = "system-cluster-critical" }, want: "may not mark a pod with the priority"},
	} {
		if err := c.tryWrite(client, fmt.Sprintf("pod-%d", i), w); err != nil {
			t.Errorf("%s: %v", w.name, err)
		}
	}
}

// TestAdmissionManagers: whoever has the token can neither clear nor forge what the server writes down about others, and so
// cannot pass a change of its own off as another admission's.
func TestAdmissionManagers(t *testing.T) {
	c := Start(t)
	c.Namespace("shop")
	client := newClient(t, c.AnnotatorWith("config.policy.condition="+condition))
	future := time.Now().Add(24 * time.Hour).UTC().Format(time.RFC3339)
	entry := func(manager, operation, at string) string {
		return fmt.Sprintf(`{"manager":%q,"operation":%q,"apiVersion":"v1","time":%q,"fieldsType":"FieldsV1","fieldsV1":{"f:metadata":{"f:labels":{"f:x-%s":{}}}}}`, manager, operation, at, manager)
	}
	managers := func(entries ...string) string { return `"managedFields":[` + strings.Join(entries, ",") + `]` }
	var many []string // the server puts all but ten together, the oldest ones
	for i := range 12 {
		many = append(many, entry(fmt.Sprint("m", i), "Update", future))
	}
	for i, test := range []struct {
		name    string
		fields  string // of the patch, beside the mark
		more    string // likewise
		manager string
	}{
		{name: "cleared", fields: managers("{}")},
		{name: "cleared, as another", fields: managers("{}"), manager: "kubelet"},
		{name: "replaced", fields: managers(entry("me", "Update", future))},
		{name: "added to", fields: managers(many...)},
		{name: "a label behind many others", fields: managers(many...), more: `,"labels":{"x":"y"}`},
		{name: "a label behind those put together", fields: managers(entry("ancient-changes", "Update", future)), more: `,"labels":{"x":"y"}`},
		{name: "a label as another", more: `,"labels":{"x":"y"}`, manager: "kubelet"},
	} {
		name := fmt.Sprint("pod-", i)
		before := c.Pod("shop", name, "node-1", func(pod *corev1.Pod) { pod.Labels = map[string]string{"app": "web"} })
		if len(before.ManagedFields) == 0 {
			t.Fatal("the server writes nothing down")
		}
		for _, marks := range []bool{false, true} {
			body := `{"metadata":{` + strings.Trim(test.fields+test.more, ",") + `}}`
			if marks {
				body = strings.Replace(mark, `{"metadata":{`, body[:len(body)-2]+`,`, 1)
			}
			opts := metav1.PatchOptions{FieldManager: pods.FieldManager}
			if test.manager != "" {
				opts.FieldManager = test.manager
			}
			_, err := client.CoreV1().Pods("shop").Patch(t.Context(), name, types.MergePatchType, []byte(body), opts)
			if !apierrors.IsInvalid(err) || !strings.Contains(err.Error(), "ValidatingAdmissionPolicy 'oom-annotator'") {
				t.Errorf("%s, with the mark %t: got %v, want a refusal", test.name, marks, errOrDone(err))
			}
		}
		if after := c.GetPod("shop", name); after.ResourceVersion != before.ResourceVersion {
			t.Errorf("%s: changed\n%v", test.name, after.ManagedFields)
		}
	}

	// What the server itself does to them is no fault of ours.
	for name, before := range map[string]func(name string){
		"eleven": func(name string) {
			for i := range 11 {
				c.label(name, fmt.Sprint("m", i), fmt.Sprint("l", i))
			}
		},
		"thirty": func(name string) {
			for i := range 30 {
				c.label(name, fmt.Sprint("m", i), fmt.Sprint("l", i))
			}
		},
		"none": func(name string) {
			if err := patch(c.Client, "shop", name, types.MergePatchType, `{"metadata":{"managedFields":[{}]}}`); err != nil {
				t.Fatal(err)
			}
		},
		"duplicates": func(string) {},
	} {
		c.Pod("shop", name, "node-1", func(pod *corev1.Pod) {
			if name == "duplicates" {
				pod.Spec.Containers[0].Env = []corev1.EnvVar{{Name: "A", Value: "1"}, {Name: "A", Value: "2"}}
			}
		})
		before(name)
		for _, w := range []write{{body: mark}, {body: setTrue, status: true}, {body: unmark}, {body: remove, status: true}, {body: annotations(evictMe, "true", lastKill, summary("boot-1-3", evictMe))}} {
			if err := w.do(client, "shop", name); err != nil {
				t.Errorf("%s managers: %s: %v", name, w.body, err)
			}
		}
	}
	// By hand somebody has set the same annotations and condition before: the server takes them over.
	c.Pod("shop", "byhand", "node-1")
	for _, body := range []string{mark, unmark} {
		if err := patch(c.Client, "shop", "byhand", types.MergePatchType, body); err != nil {
			t.Fatal(err)
		}
	}
	if err := patch(c.Client, "shop", "byhand", types.StrategicMergePatchType, strings.Replace(setTrue, "boot-1-2", "boot-1-1", 1), "status"); err != nil {
		t.Fatal(err)
	}
	for _, w := range []write{{body: annotations(evictMe, "true", lastKill, summary("boot-1-4", evictMe))}, {body: strings.Replace(setTrue, "boot-1-2", "boot-1-4", 1), status: true}, {body: unmark}, {body: remove, status: true}} {
		if err := w.do(client, "shop", "byhand"); err != nil {
			t.Errorf("after another hand: %s: %v", w.body, err)
		}
	}
}

func (c *Cluster) label(pod, manager, key string) {
	c.t.Helper()
	if _, err := c.Client.CoreV1().Pods("shop").Patch(c.t.Context(), pod, types.MergePatchType, fmt.Appendf(nil, `{"metadata":{"labels":{%q:"x"}}}`, key),
		metav1.PatchOptions{FieldManager: manager}); err != nil {
		c.t.Fatal(err)
	}
}

// TestAdmissionEvents: the annotator writes Events of its own, and changes no others.
func TestAdmissionEvents(t *testing.T) {
	c := Start(t)
	c.Namespace("shop")
	client := newClient(t, c.Annotator())
	event := func(name string, change func(*corev1.Event)) *corev1.Event {
		e := &corev1.Event{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: name}, InvolvedObject: corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: "web"},
			Type: corev1.EventTypeWarning, Reason: "OOMKilled", Message: "m", Count: 1, Source: corev1.EventSource{Component: "oom-tracer"},
			ReportingController: "oom-tracer", ReportingInstance: "host-1",
		}
		change(e)
		return e
	}
	for i, test := range []struct {
		name   string
		change func(*corev1.Event)
		want   string // of the refusal to create it, by the annotator
		patch  string // by the annotator, of what somebody else made
		refuse string
	}{
		{"its own", func(*corev1.Event) {}, "", `{"message":"x","count":2}`, ""},
		{"what it is about", func(*corev1.Event) {}, "", `{"involvedObject":{"name":"other"}}`, "may only change Events of oom-tracer"},
		{"passed off as another's", func(*corev1.Event) {}, "", `{"reportingComponent":"kubelet"}`, "may only write Events that say that they are of oom-tracer"},
		{"another reason", func(*corev1.Event) {}, "", `{"reason":"EvictionFailed"}`, "may only write Events that say that they are of oom-tracer"},
		{"kubelet", func(e *corev1.Event) { e.ReportingController = "kubelet" }, "may only write Events that say that they are of oom-tracer",
			`{"reportingComponent":"oom-tracer"}`, "may only change Events of oom-tracer"},
		{"kubelet, by the old field", func(e *corev1.Event) { e.Source.Component = "kubelet" }, "may only write Events that say that they are of oom-tracer",
			`{"source":{"component":"oom-tracer"}}`, ""},
		{"of nobody", func(e *corev1.Event) {
			e.ReportingController, e.ReportingInstance, e.Source = "", "", corev1.EventSource{}
		},
			"may only write Events that say that they are of oom-tracer", `{"message":"x"}`, "may only write Events that say that they are of oom-tracer"},
		{"a reason that evictors have", func(e *corev1.Event) { e.Reason = "EvictionFailed" }, "may only write Events that say that they are of oom-tracer",
			`{"message":"x"}`, "may only write Events that say that they are of oom-tracer"},
		{"on a Deployment", func(e *corev1.Event) { e.InvolvedObject.Kind = "Deployment" }, "may only write Events that say that they are of oom-tracer",
			`{"message":"x"}`, "may only write Events that say that they are of oom-tracer"},
	} {
		name := fmt.Sprint("event-", i)
		events := client.CoreV1().Events("shop")
		_, err := events.Create(t.Context(), event(name, test.change), metav1.CreateOptions{})
		if test.want == "" && err != nil || test.want != "" && !deniedBy("oom-annotator-events", err, test.want) {
			t.Errorf("create %s: got %v, want %q", test.name, errOrDone(err), test.want)
		}
		if err != nil {
			if _, err := c.Client.CoreV1().Events("shop").Create(t.Context(), event(name, test.change), metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		_, err = events.Patch(t.Context(), name, types.MergePatchType, []byte(test.patch), metav1.PatchOptions{})
		if test.refuse == "" && err != nil || test.refuse != "" && !deniedBy("oom-annotator-events", err, test.refuse) {
			t.Errorf("patch %s: got %v, want %q", test.name, errOrDone(err), test.refuse)
		}
	}
}

// FuzzAdmission: whatever other annotations and labels a pod has, and whatever the victim's name is, the policy lets a mark through, and
// nothing that changes an annotation of somebody else. An expression that fails to evaluate would refuse the mark.
func FuzzAdmission(f *testing.F) {
	f.Add("team", "shop", "x", "app", "web")
	f.Add("example.com/a.b", `'"\`, `","annotation":"example.com/a.b`, "a", "")
	f.Add("annotation", "\n\x00☃", `"annotation":"annotation"`, "example.com/x", "y")
	f.Add("a", `{"annotation":"a"}`, `\","annotation":"a"`, "f", "f-g")
	c := Start(f)
	c.Namespace("shop")
	client := newClient(f, c.Annotator())
	var made atomic.Uint64
	f.Fuzz(func(t *testing.T, key, value, victim, label, labelValue string) {
		value = strings.ToValidUTF8(value, "?")
		if len(validation.IsQualifiedName(strings.ToLower(key))) > 0 || strings.Contains(key, "kubernetes.io") || len(validation.IsQualifiedName(label)) > 0 ||
			len(validation.IsValidLabelValue(labelValue)) > 0 || len(value)+len(victim) > 100_000 {
			return // no annotation or label that an API server takes
		}
		c, name := c.In(t), fmt.Sprint("pod-", made.Add(1))
		kill, err := json.Marshal(map[string]string{"victim": strings.ToValidUTF8(victim, "?")})
		if err != nil {
			t.Fatal(err)
		}
		told := `{"event":"boot-1-2","annotation":"` + evictMe + `",` + string(kill[1:])
		defer c.DeletePod("shop", name)
		c.Pod("shop", name, "node-1", func(pod *corev1.Pod) {
			pod.Annotations, pod.Labels = map[string]string{key: value}, map[string]string{label: labelValue}
		})
		try := func(values map[string]any) error {
			body, err := json.Marshal(map[string]any{"metadata": map[string]any{"annotations": values}})
			if err != nil {
				t.Fatal(err)
			}
			return (&write{body: string(body)}).do(client, "shop", name)
		}
		foreign := "may not change the annotation " + key
		if err := try(map[string]any{evictMe: "true", lastKill: told, key: value + "x"}); !denied(err, foreign) {
			t.Errorf("the mark with a change of %q: %v", key, errOrDone(err))
		}
		if err := try(map[string]any{evictMe: "true", lastKill: told}); err != nil {
			t.Errorf("the mark: %v", err)
		}
		for _, to := range []any{nil, value + "x"} {
			if err := try(map[string]any{evictMe: nil, key: to}); !denied(err, foreign) {
				t.Errorf("the mark taken back with %q set to %v: %v", key, to, errOrDone(err))
			}
		}
		if err := try(map[string]any{evictMe: nil}); err != nil {
			t.Errorf("the mark taken back: %v", err)
		}
	})
}
