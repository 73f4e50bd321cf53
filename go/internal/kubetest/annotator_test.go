package kubetest

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	policyv1 "k8s.io/api/policy/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/util/retry"
)

const (
	evictMe  = "oom-tracer.alpha.kubernetes.io/evict-me"
	lastKill = "oom-tracer.alpha.kubernetes.io/last-kill"
)

// TestAnnotatorRights: what deploy/manifests lets the annotator do, asked of a real API server with the
// token of its service account.
func TestAnnotatorRights(t *testing.T) {
	c := Start(t)
	c.Node("node-1")
	c.Namespace("shop")
	web := c.Pod("shop", "web", "node-1", func(pod *corev1.Pod) {
		pod.GenerateName = "web-"
		pod.Labels = map[string]string{"app": "web"}
		pod.Annotations = map[string]string{"team": "shop", "note": "stays"}
		pod.Finalizers = []string{"example.com/a", "example.com/b"}
		pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: "0f1e2d3c"}}
		pod.Spec.Tolerations = []corev1.Toleration{{Key: "a", Operator: corev1.TolerationOpExists}}
	})

	// Without the policy, the roles alone let it change an image: what is denied below, the policy denies.
	c.Apply("deploy/manifests/00-namespace.yaml", "deploy/manifests/rbac.yaml")
	bare := newClient(t, c.ServiceAccount("oom-tracer", "oom-annotator"))
	c.Eventually("rbac.yaml alone lets an image be changed", func() error {
		return patch(bare, "shop", "web", types.StrategicMergePatchType, `{"spec":{"containers":[{"name":"main","image":"example.com/evil:1"}]}}`)
	})

	client := newClient(t, c.Annotator())
	t.Run("Allowed", func(t *testing.T) { testAllowed(t, c.In(t), client) })
	t.Run("Policy", func(t *testing.T) { testPolicy(t, c.In(t), client) })
	t.Run("Subresources", func(t *testing.T) { testSubresources(t, c.In(t), client) })
	t.Run("Large", func(t *testing.T) { testLarge(t, c.In(t), client) })
	t.Run("OtherUser", func(t *testing.T) { testOtherUser(t, c.In(t)) })
	t.Run("Forbidden", func(t *testing.T) { testForbidden(t, client) })
	t.Run("Reborn", func(t *testing.T) { testReborn(t, c.In(t), client, web.UID) })
	t.Run("Verbs", func(t *testing.T) { testVerbs(t, c.In(t), client) })
}

// TestConditionRights: with policy.condition the annotator may set and remove that condition, and touch nothing else of
// a pod's status.
func TestConditionRights(t *testing.T) {
	c := Start(t)
	c.Node("node-1")
	c.Namespace("shop")
	c.Pod("shop", "web", "node-1", func(pod *corev1.Pod) {
		pod.Annotations, pod.Labels = map[string]string{"team": "shop"}, map[string]string{"app": "web"}
		marked(pod)
		pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}, {Type: "example.com/gate", Status: corev1.ConditionFalse}}
		pod.Status.PodIP, pod.Status.PodIPs = "10.1.2.3", []corev1.PodIP{{IP: "10.1.2.3"}}
	})
	client := newClient(t, c.AnnotatorWith("config.policy.condition="+evictMe))
	ours := `{"type":"` + evictMe + `","status":"True","reason":"OOMKilled","message":"boot-1-2","lastTransitionTime":"2026-01-02T03:04:05Z"}`
	set := `{"status":{"conditions":[` + ours + `]}}`
	remove := `{"status":{"conditions":[{"type":"` + evictMe + `","$patch":"delete"}]}}`
	find := func() (found *corev1.PodCondition) {
		pod := c.GetPod("shop", "web")
		for i := range pod.Status.Conditions {
			if pod.Status.Conditions[i].Type == evictMe {
				found = &pod.Status.Conditions[i]
			}
		}
		if n := len(pod.Status.Conditions); found == nil && n != 2 || found != nil && n != 3 || len(pod.Status.ContainerStatuses) != 1 {
			t.Fatalf("status %+v", pod.Status)
		}
		return found
	}
	// On a pod without a status too; and one that is as large as they get.
	annotated := func(pod *corev1.Pod) {
		pod.Annotations = map[string]string{}
		marked(pod)
	}
	c.Pod("shop", "pending", "node-1", annotated)
	if _, err := c.Client.CoreV1().Pods("shop").Patch(t.Context(), "pending", types.MergePatchType, []byte(`{"status":null}`), metav1.PatchOptions{}, "status"); err != nil {
		t.Fatal(err)
	}
	c.Pod("shop", "large", "node-1", annotated, func(pod *corev1.Pod) {
		pod.Spec.Containers = nil
		for i := range 100 {
			pod.Spec.Containers = append(pod.Spec.Containers, corev1.Container{Name: fmt.Sprintf("c%d", i), Image: "example.com/c:1"})
		}
		for i := range 100 {
			pod.Status.Conditions = append(pod.Status.Conditions, corev1.PodCondition{
				Type: corev1.PodConditionType(fmt.Sprintf("example.com/gate-%d", i)), Status: corev1.ConditionTrue, Message: strings.Repeat("m", 500),
			})
		}
	})
	for _, name := range []string{"web", "pending", "large"} {
		for range 2 { // the second changes nothing
			if err := patch(client, "shop", name, types.StrategicMergePatchType, set, "status"); err != nil {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	if got := find(); got == nil || got.Status != corev1.ConditionTrue || got.Message != "boot-1-2" {
		t.Errorf("condition %+v", got)
	}
	before := c.GetPod("shop", "web")
	for _, test := range []struct {
		name string
		kind types.PatchType
		body string
		want string
	}{
		{"phase", types.MergePatchType, `{"status":{"phase":"Failed"}}`, "nothing of a pod's status but its own condition"},
		{"reason added", types.MergePatchType, `{"status":{"reason":"Evicted"}}`, "nothing of a pod's status but its own condition"},
		{"address", types.MergePatchType, `{"status":{"podIP":"10.9.9.9","podIPs":[{"ip":"10.9.9.9"}]}}`, "nothing of a pod's status but its own condition"},
		{"address removed", types.MergePatchType, `{"status":{"podIP":null,"podIPs":null}}`, "nothing of a pod's status but its own condition"},
		{"containers", types.StrategicMergePatchType, `{"status":{"containerStatuses":[{"name":"main","ready":false}]}}`, "nothing of a pod's status but its own condition"},
		{"a field that is new in Kubernetes", types.MergePatchType, `{"status":{"observedGeneration":7}}`, "nothing of a pod's status but its own condition"},
		{"Ready", types.StrategicMergePatchType, `{"status":{"conditions":[{"type":"Ready","status":"False"}]}}`, "no condition of a pod but its own"},
		{"Ready beside its own", types.StrategicMergePatchType, `{"status":{"conditions":[{"type":"Ready","status":"False"},` + ours + `]}}`, "no condition of a pod but its own"},
		{"a gate", types.StrategicMergePatchType, `{"status":{"conditions":[{"type":"example.com/gate","status":"True"}]}}`, "no condition of a pod but its own"},
		{"DisruptionTarget", types.StrategicMergePatchType, `{"status":{"conditions":[{"type":"DisruptionTarget","status":"True"}]}}`, "no condition of a pod but its own"},
		{"the others removed", types.MergePatchType, `{"status":{"conditions":[` + ours + `]}}`, "no condition of a pod but its own"},
		{"all removed", types.MergePatchType, `{"status":{"conditions":null}}`, "no condition of a pod but its own"},
		{"a label through the status", types.MergePatchType, `{"metadata":{"labels":{"x":"y"}}}`, "may not change a pod's labels"},
		{"an annotation through the status", types.MergePatchType, `{"metadata":{"annotations":{"team":"other"}}}`, "may not change the annotation team"},
	} {
		if err := patch(client, "shop", "web", test.kind, test.body, "status"); !apierrors.IsInvalid(err) ||
			!strings.Contains(err.Error(), "ValidatingAdmissionPolicy 'oom-annotator'") || !strings.Contains(err.Error(), test.want) {
			t.Errorf("%s: got %v, want the policy's refusal: %s", test.name, err, test.want)
		}
	}
	if after := c.GetPod("shop", "web"); after.ResourceVersion != before.ResourceVersion {
		t.Errorf("the pod was changed:\n%v\n%v", before, after)
	}
	for _, name := range []string{"web", "pending", "large"} {
		if err := patch(client, "shop", name, types.StrategicMergePatchType, remove, "status"); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if got := find(); got != nil {
		t.Errorf("condition %+v", got)
	}
	if err := patch(client, "shop", "web", types.MergePatchType, `{"spec":{"activeDeadlineSeconds":1}}`); !denied(err, "may not change a pod's spec") {
		t.Errorf("spec: %v", err)
	}
	for name, do := range map[string]func() error{
		"evict": func() error {
			return client.CoreV1().Pods("shop").EvictV1(t.Context(), &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: "web"}})
		},
		"delete": func() error { return client.CoreV1().Pods("shop").Delete(t.Context(), "web", metav1.DeleteOptions{}) },
	} {
		if err := do(); !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func newClient(t testing.TB, cfg *rest.Config) kubernetes.Interface {
	t.Helper()
	cfg = rest.CopyConfig(cfg)
	cfg.QPS = -1 // no waiting for the client's own rate limit
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return client
}

func patch(client kubernetes.Interface, namespace, name string, kind types.PatchType, body string, subresources ...string) error {
	opts := metav1.PatchOptions{}
	if kind == types.ApplyPatchType {
		force := true
		opts = metav1.PatchOptions{FieldManager: "oom-annotator", Force: &force}
	}
	_, err := client.CoreV1().Pods(namespace).Patch(context.Background(), name, kind, []byte(body), opts, subresources...)
	return err
}

// annotate sets annotations, with "null" to remove one, by a merge patch that carries uid if it is not "".
func annotate(client kubernetes.Interface, namespace, name string, uid types.UID, annotations map[string]*string) error {
	metadata := map[string]any{"annotations": annotations}
	if uid != "" {
		metadata["uid"] = uid
	}
	body, err := json.Marshal(map[string]any{"metadata": metadata})
	if err != nil {
		return err
	}
	return patch(client, namespace, name, types.MergePatchType, string(body))
}

func value(s string) *string { return &s }

func testAllowed(t *testing.T, c *Cluster, client kubernetes.Interface) {
	pods := client.CoreV1().Pods("shop")
	web, err := pods.Get(t.Context(), "web", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	list, err := client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName=node-1"})
	if err != nil {
		t.Fatal(err)
	}
	if len(list.Items) != 1 || list.Items[0].Name != "web" {
		t.Errorf("listed on the node: %v", list.Items)
	}
	watch, err := client.CoreV1().Pods("").Watch(t.Context(), metav1.ListOptions{ResourceVersion: list.ResourceVersion})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()

	if err := annotate(client, "shop", "web", web.UID, map[string]*string{
		evictMe: value("true"), lastKill: value(summary("boot-1-2", evictMe)),
	}); err != nil {
		t.Fatal(err)
	}
	got, ok := (<-watch.ResultChan()).Object.(*corev1.Pod)
	if !ok || got.Annotations[evictMe] != "true" || got.Annotations[lastKill] != summary("boot-1-2", evictMe) || got.Annotations["team"] != "shop" {
		t.Errorf("watched: %v", got)
	}
	// By the other kinds of patch too, and on a pod that has no annotation yet.
	c.Pod("shop", "plain", "node-1")
	for _, test := range []struct {
		pod  string
		kind types.PatchType
		body string
	}{
		{"web", types.MergePatchType, `{"metadata":{"annotations":{"team":"shop"}}}`}, // as it is
		{"web", types.MergePatchType, unmark},
		{"web", types.ApplyPatchType, fmt.Sprintf(`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"web","annotations":{%q:"true",%q:%q}}}`, evictMe, lastKill, summary("boot-1-3", evictMe))},
		{"plain", types.JSONPatchType, fmt.Sprintf(`[{"op":"add","path":"/metadata/annotations","value":{%q:"true",%q:%q}}]`, evictMe, lastKill, summary("boot-1-2", evictMe))},
	} {
		if err := patch(client, "shop", test.pod, test.kind, test.body); err != nil {
			t.Errorf("%s: %v", test.body, err)
		}
	}
	if got := c.GetPod("shop", "web"); got.Annotations[evictMe] != "true" || got.Annotations["team"] != "shop" || len(got.Annotations) != 4 {
		t.Errorf("annotations at the end: %v", got.Annotations)
	}
}

func testPolicy(t *testing.T, c *Cluster, client kubernetes.Interface) {
	before := c.GetPod("shop", "web")
	for _, test := range []struct {
		name string
		kind types.PatchType
		body string
		want string
	}{
		{"image", types.StrategicMergePatchType, `{"spec":{"containers":[{"name":"main","image":"example.com/main:2"}]}}`, "may not change a pod's spec"},
		{"image with an annotation of its own", types.StrategicMergePatchType,
			`{"metadata":{"annotations":{"` + evictMe + `":"no"}},"spec":{"containers":[{"name":"main","image":"example.com/main:2"}]}}`, "may not change a pod's spec"},
		{"deadline", types.MergePatchType, `{"spec":{"activeDeadlineSeconds":1}}`, "may not change a pod's spec"},
		{"toleration", types.JSONPatchType, `[{"op":"add","path":"/spec/tolerations/-","value":{"operator":"Exists"}}]`, "may not change a pod's spec"},
		{"label added", types.MergePatchType, `{"metadata":{"labels":{"x":"y"}}}`, "may not change a pod's labels"},
		{"label changed", types.MergePatchType, `{"metadata":{"labels":{"app":"other"}}}`, "may not change a pod's labels"},
		{"labels removed", types.MergePatchType, `{"metadata":{"labels":null}}`, "may not change a pod's labels"},
		{"annotation added", types.MergePatchType, `{"metadata":{"annotations":{"x":"y"}}}`, "may not change the annotation x"},
		{"annotation added beside its own", types.MergePatchType, `{"metadata":{"annotations":{"` + evictMe + `":"no","x":"y"}}}`, "may not change the annotation x"},
		{"annotation with its own as a prefix", types.MergePatchType, `{"metadata":{"annotations":{"` + evictMe + `2":"y"}}}`, "may not change the annotation " + evictMe + "2"},
		{"annotation changed", types.MergePatchType, `{"metadata":{"annotations":{"team":"other"}}}`, "may not change the annotation team"},
		{"annotation emptied", types.MergePatchType, `{"metadata":{"annotations":{"team":""}}}`, "may not change the annotation team"},
		{"annotation removed", types.MergePatchType, `{"metadata":{"annotations":{"team":null}}}`, "may not change the annotation team"},
		{"annotation swapped", types.MergePatchType, `{"metadata":{"annotations":{"team":null,"` + evictMe + `":"shop"}}}`, "may not change the annotation team"},
		{"annotations removed", types.MergePatchType, `{"metadata":{"annotations":null}}`, "may not change the annotation "},
		{"finalizer added", types.JSONPatchType, `[{"op":"add","path":"/metadata/finalizers/-","value":"example.com/c"}]`, "may not change a pod's finalizers"},
		{"finalizer removed", types.JSONPatchType, `[{"op":"remove","path":"/metadata/finalizers/0"}]`, "may not change a pod's finalizers"},
		{"finalizers removed", types.MergePatchType, `{"metadata":{"finalizers":null}}`, "may not change a pod's finalizers"},
		{"owner removed", types.MergePatchType, `{"metadata":{"ownerReferences":null}}`, "may not change a pod's owner references"},
		{"owner changed", types.JSONPatchType, `[{"op":"add","path":"/metadata/ownerReferences/0/controller","value":true}]`, "may not change a pod's owner references"},
		{"generateName", types.MergePatchType, `{"metadata":{"generateName":"x-"}}`, "may not change a pod's generateName"},
		{"label by apply", types.ApplyPatchType, `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"web","labels":{"x":"y"}}}`, "may not change the annotation " + lastKill},
		{"pod without any of it", types.JSONPatchType, `[{"op":"add","path":"/metadata/labels","value":{"x":"y"}}]`, "may not change a pod's labels"},
	} {
		t.Run(test.name, func(t *testing.T) {
			pod := "web"
			if test.name == "pod without any of it" {
				pod = "plain"
			}
			err := patch(client, "shop", pod, test.kind, test.body)
			if !denied(err, test.want) {
				t.Errorf("got %v, want the policy's %q", err, test.want)
			}
		})
	}
	// The server itself ignores these, or refuses them before it asks the policy.
	for _, body := range []string{
		`{"metadata":{"generation":99}}`, `{"metadata":{"creationTimestamp":"2020-01-01T00:00:00Z"}}`,
		`{"status":{"phase":"Failed"}}`, `{"metadata":{"deletionTimestamp":"2020-01-01T00:00:00Z"}}`,
		`{"metadata":{"deletionGracePeriodSeconds":0}}`, `{"metadata":{"name":"other"}}`, `{"spec":{"nodeName":"node-2"}}`,
	} {
		_ = patch(client, "shop", "web", types.MergePatchType, body)
	}
	after := c.GetPod("shop", "web")
	if after.ResourceVersion != before.ResourceVersion {
		t.Errorf("the pod was changed:\n%v\n%v", before, after)
	}
}

// denied tells the policy's refusal from that of anybody else.
func denied(err error, message string) bool { return deniedBy("oom-annotator", err, message) }

func deniedBy(policy string, err error, message string) bool {
	return apierrors.IsInvalid(err) && strings.Contains(err.Error(), "ValidatingAdmissionPolicy '"+policy+"'") &&
		strings.Contains(err.Error(), "oom-annotator "+message)
}

// testSubresources: the policy holds where somebody widens the role by mistake.
func testSubresources(t *testing.T, c *Cluster, client kubernetes.Interface) {
	pods := client.CoreV1().Pods("shop")
	changeRole(t, c, func(role *rbacv1.ClusterRole) {
		role.Rules = append(role.Rules, rbacv1.PolicyRule{APIGroups: []string{""}, Resources: []string{"*"}, Verbs: []string{"*"}})
	})
	defer c.Apply("deploy/manifests/rbac.yaml")
	status := `{"status":{"conditions":[{"type":"OOM","status":"True"}]}}`
	c.Eventually("the role is widened", func() error {
		if err := patch(client, "shop", "web", types.StrategicMergePatchType, status, "status"); !denied(err, "may only annotate pods, not UPDATE pods/status") {
			return fmt.Errorf("status: %v", err)
		}
		return nil
	})
	for name, test := range map[string]struct {
		do   func() error
		want string
	}{
		"delete": {func() error { return pods.Delete(t.Context(), "web", metav1.DeleteOptions{}) }, "DELETE pods"},
		"delete all": {func() error {
			return pods.DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{})
		}, "DELETE pods"},
		"create": {func() error {
			pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "new"}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "a", Image: "a"}}}}
			_, err := pods.Create(t.Context(), pod, metav1.CreateOptions{})
			return err
		}, "CREATE pods"},
		"create by apply": {func() error {
			return patch(client, "shop", "new", types.ApplyPatchType,
				`{"apiVersion":"v1","kind":"Pod","metadata":{"name":"new"},"spec":{"containers":[{"name":"a","image":"a"}]}}`)
		}, "CREATE pods"},
		"evict": {func() error {
			return pods.EvictV1(t.Context(), &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: "web"}})
		}, "CREATE pods/eviction"},
		"bind": {func() error {
			return pods.Bind(t.Context(), &corev1.Binding{ObjectMeta: metav1.ObjectMeta{Name: "web"}, Target: corev1.ObjectReference{Kind: "Node", Name: "node-2"}}, metav1.CreateOptions{})
		}, "CREATE pods/binding"},
		"debug": {func() error {
			return patch(client, "shop", "web", types.StrategicMergePatchType,
				`{"spec":{"ephemeralContainers":[{"name":"debug","image":"a"}]}}`, "ephemeralcontainers")
		}, "UPDATE pods/ephemeralcontainers"},
		"exec": {func() error {
			return client.CoreV1().RESTClient().Post().Resource("pods").Namespace("shop").Name("web").SubResource("exec").
				Param("command", "sh").Param("container", "main").Param("stdout", "true").Do(t.Context()).Error()
		}, "CONNECT pods/exec"},
	} {
		if err := test.do(); !denied(err, "may only annotate pods, not "+test.want) {
			t.Errorf("%s: got %v, want the policy's refusal of %s", name, err, test.want)
		}
	}
	c.GetPod("shop", "web")
}

// testLarge: comparing a pod has its price, and a policy that goes beyond its budget denies everything.
func testLarge(t *testing.T, c *Cluster, client kubernetes.Interface) {
	c.Pod("shop", "large", "node-1", func(pod *corev1.Pod) {
		pod.Annotations, pod.Labels = map[string]string{}, map[string]string{}
		for i := range 1500 { // 256 KiB of annotations are allowed
			pod.Annotations[fmt.Sprintf("example.com/annotation-%04d", i)] = strings.Repeat("v", 130)
		}
		for i := range 1000 {
			pod.Labels[fmt.Sprintf("example.com/label-%04d", i)] = "value"
		}
		pod.Spec.Containers = nil
		for i := range 40 {
			container := corev1.Container{Name: fmt.Sprintf("c%d", i), Image: "example.com/c:1"}
			for j := range 200 {
				container.Env = append(container.Env, corev1.EnvVar{Name: fmt.Sprintf("VARIABLE_%d", j), Value: strings.Repeat("v", 60)})
			}
			pod.Spec.Containers = append(pod.Spec.Containers, container)
		}
	})
	if err := patch(client, "shop", "large", types.MergePatchType, mark); err != nil {
		t.Error(err)
	}
	if err := annotate(client, "shop", "large", "", map[string]*string{"x": value("y")}); !denied(err, "may not change the annotation x") {
		t.Errorf("another annotation: %v", err)
	}
}

// testOtherUser: the policy is about the annotator, and nobody else.
func testOtherUser(t *testing.T, c *Cluster) {
	c.Pod("shop", "other", "node-1")
	if err := patch(c.Client, "shop", "other", types.StrategicMergePatchType,
		`{"metadata":{"labels":{"x":"y"}},"spec":{"containers":[{"name":"main","image":"example.com/main:2"}]}}`); err != nil {
		t.Error(err)
	}
	c.DeletePod("shop", "other")
}

func testForbidden(t *testing.T, client kubernetes.Interface) {
	core := client.CoreV1()
	for name, do := range map[string]func() error{
		"delete a pod":      func() error { return core.Pods("shop").Delete(t.Context(), "web", metav1.DeleteOptions{}) },
		"patch pods/status": func() error { return patch(client, "shop", "web", types.MergePatchType, `{"status":{}}`, "status") },
		"read secrets":      func() error { _, err := core.Secrets("").List(t.Context(), metav1.ListOptions{}); return err },
		"read a secret":     func() error { _, err := core.Secrets("shop").Get(t.Context(), "x", metav1.GetOptions{}); return err },
		"list nodes":        func() error { _, err := core.Nodes().List(t.Context(), metav1.ListOptions{}); return err },
		"list namespaces":   func() error { _, err := core.Namespaces().List(t.Context(), metav1.ListOptions{}); return err },
		"read an event":     func() error { _, err := core.Events("shop").Get(t.Context(), "x", metav1.GetOptions{}); return err },
		"delete an event":   func() error { return core.Events("shop").Delete(t.Context(), "x", metav1.DeleteOptions{}) },
		"evict a pod": func() error {
			return core.Pods("shop").EvictV1(t.Context(), &policyv1.Eviction{ObjectMeta: metav1.ObjectMeta{Name: "web"}})
		},
		"create by apply": func() error {
			return patch(client, "shop", "new", types.ApplyPatchType, `{"apiVersion":"v1","kind":"Pod","metadata":{"name":"new"},"spec":{"containers":[{"name":"a","image":"a"}]}}`)
		},
		"change its own role": func() error {
			_, err := client.RbacV1().ClusterRoles().Get(t.Context(), "oom-annotator", metav1.GetOptions{})
			return err
		},
	} {
		if err := do(); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), " cannot ") {
			t.Errorf("%s: got %v, want RBAC's refusal", name, err)
		}
	}

	// The server's own list of what it may do: besides questions about itself, pods and Events and nothing else.
	review, err := client.AuthorizationV1().SelfSubjectRulesReviews().Create(t.Context(), &authorizationv1.SelfSubjectRulesReview{
		Spec: authorizationv1.SelfSubjectRulesReviewSpec{Namespace: "oom-tracer"},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var rules []string
	for _, rule := range review.Status.ResourceRules {
		if !slices.ContainsFunc(rule.Resources, func(r string) bool { return !strings.HasPrefix(r, "selfsubject") }) {
			continue
		}
		rules = append(rules, fmt.Sprint(rule.APIGroups, rule.Resources, rule.Verbs))
	}
	if want := []string{"[] [pods] [get list watch patch]", "[] [events] [create patch list]"}; !slices.Equal(rules, want) {
		t.Errorf("may %q, want %q", rules, want)
	}
}

// testReborn: a patch with the UID of another pod is refused, with the code that the annotator must know.
func testReborn(t *testing.T, c *Cluster, client kubernetes.Interface, uid types.UID) {
	first := c.Pod("shop", "reborn", "node-1")
	c.DeletePod("shop", "reborn")
	mark := map[string]*string{evictMe: value("true"), lastKill: value(summary("boot-1-2", evictMe))}
	if err := annotate(client, "shop", "reborn", first.UID, mark); !apierrors.IsNotFound(err) {
		t.Errorf("a pod that is gone: %v", err)
	}
	second := c.Pod("shop", "reborn", "node-1")
	for name, uid := range map[string]types.UID{"of the pod before": first.UID, "of another pod": uid} {
		err := annotate(client, "shop", "reborn", uid, mark)
		status, ok := err.(apierrors.APIStatus)
		if !ok || status.Status().Code != http.StatusUnprocessableEntity || status.Status().Reason != metav1.StatusReasonInvalid ||
			!slices.ContainsFunc(status.Status().Details.Causes, func(c metav1.StatusCause) bool { return c.Field == "metadata.uid" }) {
			t.Errorf("UID %s: got %v, %#v, want 422 about metadata.uid", name, err, status)
		}
	}
	if got := c.GetPod("shop", "reborn"); got.ResourceVersion != second.ResourceVersion {
		t.Errorf("the reborn pod was changed: %v", got.Annotations)
	}
	if err := annotate(client, "shop", "reborn", second.UID, mark); err != nil {
		t.Errorf("its own UID: %v", err)
	}
}

// testVerbs takes each verb out of the role in turn: the call that needs it fails, and no other.
func testVerbs(t *testing.T, c *Cluster, client kubernetes.Interface) {
	pods, events := client.CoreV1().Pods("shop"), client.CoreV1().Events("shop")
	made := 0
	create := func() error {
		made++
		_, err := events.Create(t.Context(), &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{Name: fmt.Sprint("web.", made)},
			InvolvedObject: corev1.ObjectReference{Kind: "Pod", Namespace: "shop", Name: "web"}, Reason: "OOMKilled",
			ReportingController: "oom-tracer", ReportingInstance: "host-1", Source: corev1.EventSource{Component: "oom-tracer"},
		}, metav1.CreateOptions{})
		return err
	}
	if err := create(); err != nil {
		t.Fatal(err)
	}
	calls := map[string]func() error{
		"get pods":  func() error { _, err := pods.Get(t.Context(), "web", metav1.GetOptions{}); return err },
		"list pods": func() error { _, err := pods.List(t.Context(), metav1.ListOptions{}); return err },
		"watch pods": func() error {
			watch, err := pods.Watch(t.Context(), metav1.ListOptions{})
			if err == nil {
				watch.Stop()
			}
			return err
		},
		"patch pods":    func() error { return patch(client, "shop", "web", types.MergePatchType, unmark) },
		"create events": create,
		"list events": func() error {
			_, err := events.List(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.uid=x,reason=EvictionFailed"})
			return err
		},
		"patch events": func() error {
			_, err := events.Patch(t.Context(), "web.1", types.MergePatchType, []byte(`{"count":2}`), metav1.PatchOptions{})
			return err
		},
	}
	objects, err := Manifests("deploy/manifests/rbac.yaml")
	if err != nil {
		t.Fatal(err)
	}
	known := 0
	for _, object := range objects {
		if object.GetKind() != "ClusterRole" {
			continue
		}
		for i, rule := range object.Object["rules"].([]any) {
			rule := rule.(map[string]any)
			resource := rule["resources"].([]any)[0].(string)
			for _, v := range rule["verbs"].([]any) {
				known++
				verb := v.(string)
				name := verb + " " + resource
				if calls[name] == nil {
					t.Fatalf("no call that needs to %s", name)
				}
				changeRole(t, c, func(role *rbacv1.ClusterRole) {
					role.Rules[i].Verbs = slices.DeleteFunc(role.Rules[i].Verbs, func(v string) bool { return v == verb })
				})
				c.Eventually("without "+name, func() error {
					if err := calls[name](); !apierrors.IsForbidden(err) || !strings.Contains(err.Error(), "cannot "+verb+" resource \""+resource+"\"") {
						return fmt.Errorf("%s: %v", name, err)
					}
					return nil
				})
				for other, call := range calls {
					if err := call(); other != name && err != nil {
						t.Errorf("without %s, %s: %v", name, other, err)
					}
				}
				c.Apply("deploy/manifests/rbac.yaml")
				c.Eventually("with "+name+" again", calls[name])
			}
		}
	}
	if known != len(calls) {
		t.Fatalf("%d verbs, and this test has calls for %d", known, len(calls))
	}
}

func changeRole(t *testing.T, c *Cluster, change func(*rbacv1.ClusterRole)) {
	t.Helper()
	roles := c.Client.RbacV1().ClusterRoles()
	if err := retry.RetryOnConflict(retry.DefaultRetry, func() error {
		role, err := roles.Get(t.Context(), "oom-annotator", metav1.GetOptions{})
		if err != nil {
			return err
		}
		change(role)
		_, err = roles.Update(t.Context(), role, metav1.UpdateOptions{})
		return err
	}); err != nil {
		t.Fatal(err)
	}
}
