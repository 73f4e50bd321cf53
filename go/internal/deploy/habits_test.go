package deploy

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	resourcehelper "k8s.io/component-helpers/resource"
	scheduling "k8s.io/component-helpers/scheduling/corev1"
	"k8s.io/component-helpers/scheduling/corev1/nodeaffinity"
	"k8s.io/klog/v2"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
)

// strict is how some clusters set up their admission. As GKE: pods of the system's priority classes need a quota that covers them.
// Pod Security's level is restricted in every namespace without a label of its own.
const strict = `
apiVersion: apiserver.config.k8s.io/v1
kind: AdmissionConfiguration
plugins:
  - name: ResourceQuota
    configuration:
      apiVersion: apiserver.config.k8s.io/v1
      kind: ResourceQuotaConfiguration
      limitedResources:
        - resource: pods
          matchScopes: [{scopeName: PriorityClass, operator: In, values: [system-node-critical, system-cluster-critical]}]
  - name: PodSecurity
    configuration:
      apiVersion: pod-security.admission.config.k8s.io/v1
      kind: PodSecurityConfiguration
      defaults: {enforce: restricted}
`

// policies are what Gatekeeper or Kyverno do in some clusters. In one namespace pods come from one registry, by digest, and with a login. In
// another one each object that makes pods is changed whenever it is written, Jobs when they are created: a label, an annotation, a mirror.
const policies = `
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicy
metadata: {name: air-gapped}
spec:
  failurePolicy: Fail
  matchConstraints:
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: air-gapped}}
    resourceRules: [{apiGroups: [""], apiVersions: [v1], operations: [CREATE], resources: [pods]}]
  variables:
    - name: containers
      expression: "object.spec.containers + (has(object.spec.initContainers) ? object.spec.initContainers : [])"
  validations:
    - {message: an image of another registry, expression: "variables.containers.all(c, c.image.startsWith('registry.example.com/'))"}
    - {message: an image without a digest, expression: "variables.containers.all(c, c.image.contains('@sha256:'))"}
    - {message: no login, expression: "has(object.spec.imagePullSecrets) && object.spec.imagePullSecrets.exists(s, s.name == 'registry-login')"}
---
apiVersion: admissionregistration.k8s.io/v1
kind: ValidatingAdmissionPolicyBinding
metadata: {name: air-gapped}
spec: {policyName: air-gapped, validationActions: [Deny]}
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicy
metadata: {name: changed}
spec:
  failurePolicy: Fail
  reinvocationPolicy: Never
  matchConstraints:
    namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: oom-tracer}}
    resourceRules:
      - {apiGroups: [apps], apiVersions: [v1], operations: [CREATE, UPDATE], resources: [deployments, daemonsets, statefulsets]}
      - {apiGroups: [batch], apiVersions: [v1], operations: [CREATE], resources: [jobs]}
  mutations:
    - patchType: JSONPatch
      jsonPatch:
        expression: >-
          [JSONPatch{op: "add", path: "/metadata/labels/cost-center", value: "shop"},
          JSONPatch{op: "add", path: "/spec/template/metadata/labels/cost-center", value: "shop"},
          JSONPatch{op: "add", path: "/spec/template/metadata/annotations/example.com~1seen", value: "yes"},
          JSONPatch{op: "replace", path: "/spec/template/spec/containers/0/image",
            value: "mirror.example.com/" + object.spec.template.spec.containers[0].image.split("/")[size(object.spec.template.spec.containers[0].image.split("/")) - 1]}]
---
apiVersion: admissionregistration.k8s.io/v1
kind: MutatingAdmissionPolicyBinding
metadata: {name: changed}
spec: {policyName: changed}
`

// TestHabits: the chart on a cluster with the restrictions of many: each restriction is the server's own, and refuses what goes against it.
func TestHabits(t *testing.T) {
	file := filepath.Join(t.TempDir(), "admission.yaml")
	if err := os.WriteFile(file, []byte(strict), 0o600); err != nil {
		t.Fatal(err)
	}
	c := kubetest.StartWith(t, kubetest.Options{
		AuditPolicy: "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: None}]\n",
		Args: map[string]string{
			"admission-control-config-file": file,
			// Without IPv4. Nobody asks for the address that the server advertises.
			"service-cluster-ip-range": "fd00:10::/112", "advertise-address": "fd00:1::1",
		},
	})
	objects, err := kubetest.Parse(strings.NewReader(policies))
	if err != nil {
		t.Fatal(err)
	}
	written := c.Objects()
	for _, o := range objects {
		if err := written.Apply(o); err != nil {
			t.Fatalf("%s %s: %v", o.GetKind(), o.GetName(), err)
		}
	}
	for name, test := range map[string]func(*testing.T, *kubetest.Cluster){
		"PriorityQuota": testPriorityQuota, "PodSecurity": testPodSecurity, "Nodes": testNodes, "OneNode": testOneNode,
		"AirGapped": testAirGapped, "Mutation": testMutation, "IPv6": testIPv6,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			test(t, c.In(t))
		})
	}
}

// home makes a namespace with the service accounts of our pods.
func home(t *testing.T, c *kubetest.Cluster, name string, labels map[string]string) {
	t.Helper()
	ns := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: labels}}
	if _, err := c.Client.CoreV1().Namespaces().Create(t.Context(), ns, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, account := range []string{"default", "oom-tracer", "oom-annotator", "oom-auth", "oom-descheduler"} {
		c.ServiceAccount(name, account)
	}
}

var privileged = map[string]string{"pod-security.kubernetes.io/enforce": "privileged"}

// tryPod is the pod of a template as the server admits it. None is made.
func tryPod(t *testing.T, c *kubetest.Cluster, namespace, name string, template corev1.PodTemplateSpec) (*corev1.Pod, error) {
	t.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: template.Labels, Annotations: template.Annotations}, Spec: *template.Spec.DeepCopy()}
	return c.Client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
}

// quota makes the chart's ResourceQuota and waits until it counts.
func quota(t *testing.T, c *kubetest.Cluster, namespace string, objects []*unstructured.Unstructured) {
	t.Helper()
	quotas := c.Client.CoreV1().ResourceQuotas(namespace)
	quota := get[corev1.ResourceQuota](t, objects, "ResourceQuota", "oom-tracer")
	quota.Namespace = namespace
	made, err := quotas.Create(t.Context(), quota, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// As its controller does.
	made.Status = corev1.ResourceQuotaStatus{Hard: made.Spec.Hard, Used: corev1.ResourceList{corev1.ResourcePods: {}}}
	if _, err := quotas.UpdateStatus(t.Context(), made, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	pods := templates(t, objects)
	c.Eventually("the quota admits pods", func() error {
		for _, name := range []string{"oom-annotator", "oom-tracer"} {
			if _, err := tryPod(t, c, namespace, name, pods[name]); err != nil && strings.Contains(err.Error(), "quota") {
				return err
			}
		}
		return nil
	})
}

// testPriorityQuota: without the chart's ResourceQuota its pods are refused, with it they are admitted.
func testPriorityQuota(t *testing.T, c *kubetest.Cluster) {
	home(t, c, "quota", privileged)
	objects := render(t, "--set", "descheduler.enabled=true")
	pods := templates(t, objects)
	for name, template := range pods {
		if _, err := tryPod(t, c, "quota", name, template); name != "oom-tracer-test" && (err == nil || !strings.Contains(err.Error(), "insufficient quota")) {
			t.Fatalf("%s without a quota: %v, so that this test shows nothing", name, err)
		}
	}
	quota(t, c, "quota", objects)
	for name, template := range pods {
		if _, err := tryPod(t, c, "quota", name, template); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// testPodSecurity: where restricted is the default, the tracer alone is refused; the chart's own Namespace has the label that admits it.
func testPodSecurity(t *testing.T, c *kubetest.Cluster) {
	objects := render(t, "--values", root+"/deploy/examples/gitops.yaml", "--set", "descheduler.enabled=true")
	home(t, c, "unlabelled", nil)
	home(t, c, "labelled", get[corev1.Namespace](t, objects, "Namespace", namespace).Labels)
	for _, where := range []string{"unlabelled", "labelled"} {
		quota(t, c, where, objects)
		for name, template := range templates(t, objects) {
			_, err := tryPod(t, c, where, name, template)
			if name == "oom-tracer" && where == "unlabelled" {
				if err == nil || !strings.Contains(err.Error(), `violates PodSecurity "restricted:latest"`) {
					t.Errorf("the tracer in a namespace without a label: %v, want Pod Security's refusal", err)
				}
			} else if err != nil {
				t.Errorf("%s, in a namespace that is %s: %v", name, where, err)
			}
		}
	}
}

// nodes are a cluster with pools, by name.
func nodes(t *testing.T, c *kubetest.Cluster) map[string]*corev1.Node {
	t.Helper()
	made := map[string]*corev1.Node{}
	for name, node := range map[string]struct {
		labels map[string]string
		taints []corev1.Taint
	}{
		"control-plane": {map[string]string{"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"},
			[]corev1.Taint{{Key: "node-role.kubernetes.io/control-plane", Effect: corev1.TaintEffectNoSchedule}}},
		"system": {map[string]string{"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", "node-pool": "system"},
			[]corev1.Taint{{Key: "dedicated", Value: "system", Effect: corev1.TaintEffectNoSchedule}}},
		"system-arm64": {map[string]string{"kubernetes.io/os": "linux", "kubernetes.io/arch": "arm64", "node-pool": "system"},
			[]corev1.Taint{{Key: "dedicated", Value: "system", Effect: corev1.TaintEffectNoSchedule}}},
		"shop": {map[string]string{"kubernetes.io/os": "linux", "kubernetes.io/arch": "arm64"},
			[]corev1.Taint{{Key: "team", Value: "shop", Effect: corev1.TaintEffectNoExecute}}},
		"free":            {map[string]string{"kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64"}, nil},
		"windows":         {map[string]string{"kubernetes.io/os": "windows", "kubernetes.io/arch": "amd64"}, nil},
		"windows-tainted": {map[string]string{"kubernetes.io/os": "windows", "kubernetes.io/arch": "amd64", "node-pool": "system"}, []corev1.Taint{{Key: "os", Value: "windows", Effect: corev1.TaintEffectNoSchedule}}},
	} {
		made[name] = c.Node(name, func(n *corev1.Node) {
			maps.Copy(n.Labels, node.labels)
			n.Spec.Taints = node.taints
		})
	}
	return made
}

// fits are the nodes that the pod may run on: what the scheduler's NodeAffinity and TaintToleration, and the controller of DaemonSets, ask.
func fits(t *testing.T, pod *corev1.Pod, nodes map[string]*corev1.Node) []string {
	t.Helper()
	var names []string
	for name, node := range nodes {
		match, err := nodeaffinity.GetRequiredNodeAffinity(pod).Match(node)
		if err != nil {
			t.Fatal(err)
		}
		_, repels := scheduling.FindMatchingUntoleratedTaint(klog.Background(), node.Spec.Taints, pod.Spec.Tolerations,
			func(taint *corev1.Taint) bool { return taint.Effect != corev1.TaintEffectPreferNoSchedule }, false)
		if match && !repels {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// testNodes: with tainted pools, Windows nodes and two architectures the tracer runs on every Linux node, and each other pod finds a node.
func testNodes(t *testing.T, c *kubetest.Cluster) {
	home(t, c, "nodes", privileged)
	quota(t, c, "nodes", render(t, "--set", "descheduler.enabled=true"))
	pools := nodes(t, c)
	linux := []string{"control-plane", "free", "shop", "system", "system-arm64"}
	for values, others := range map[string][]string{"": {"free"}, root + "/deploy/examples/tainted-pools.yaml": {"system", "system-arm64"}} {
		args := []string{"--set", "descheduler.enabled=true"}
		if values != "" {
			args = append(args, "--values", values)
		}
		objects := render(t, args...)
		for name, template := range templates(t, objects) {
			pod, err := tryPod(t, c, "nodes", name, template)
			if err != nil {
				t.Errorf("%s: %v", name, err)
				continue
			}
			want := others
			if name == "oom-tracer" {
				want = linux
			}
			if got := fits(t, pod, pools); !slices.Equal(got, want) {
				t.Errorf("%s %s may run on %v, want %v", values, name, got, want)
			}
		}
	}
}

// testOneNode: on one node of 2 CPUs and 2 GiB there is room for all pods of the example and a quarter is left; none keeps another one away.
func testOneNode(t *testing.T, c *kubetest.Cluster) {
	home(t, c, "one-node", privileged)
	objects := render(t, "--values", root+"/deploy/examples/single-node.yaml", "--set", "descheduler.enabled=true")
	quota(t, c, "one-node", objects)
	var cpu, memory int64
	for name, template := range templates(t, objects) {
		pod, err := tryPod(t, c, "one-node", name, template)
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		requests := resourcehelper.PodRequests(pod, resourcehelper.PodResourcesOptions{})
		cpu, memory = cpu+requests.Cpu().MilliValue(), memory+requests.Memory().Value()
		if affinity := pod.Spec.Affinity; affinity != nil && affinity.PodAntiAffinity != nil && affinity.PodAntiAffinity.RequiredDuringSchedulingIgnoredDuringExecution != nil {
			t.Errorf("%s: %+v keeps others off the only node", name, affinity.PodAntiAffinity)
		}
	}
	for _, o := range objects {
		if n, ok, _ := unstructured.NestedInt64(o.Object, "spec", "replicas"); ok && n != 1 {
			t.Errorf("%s %s has %d replicas", o.GetKind(), o.GetName(), n)
		}
		if n, _, _ := unstructured.NestedInt64(o.Object, "spec", "maxUnavailable"); o.GetKind() == "PodDisruptionBudget" && n != 1 {
			t.Errorf("%s %s keeps the only node from being drained", o.GetKind(), o.GetName())
		}
	}
	if cpu > 1500 || memory > 1536<<20 {
		t.Errorf("all pods request %d mCPU and %d MiB", cpu, memory>>20)
	}
}

// testAirGapped: a cluster that admits images of one registry by digest and with a login alone takes the example with a digest for each image,
// and refuses the chart's defaults.
func testAirGapped(t *testing.T, c *kubetest.Cluster) {
	home(t, c, "air-gapped", privileged)
	digests := []string{"descheduler.enabled=true"}
	for _, program := range []string{"tracer", "annotator", "auth", "tap", "descheduler", "notify"} {
		digests = append(digests, program+".image.digest=sha256:"+strings.Repeat("0a", 32))
	}
	pinned := render(t, "--values", root+"/deploy/examples/air-gapped.yaml", "--set", strings.Join(digests, ","))
	quota(t, c, "air-gapped", pinned)
	c.Eventually("the policy holds", func() error {
		for name, template := range templates(t, render(t, "--set", "descheduler.enabled=true")) {
			if _, err := tryPod(t, c, "air-gapped", name, template); err == nil || !strings.Contains(err.Error(), "an image of another registry") {
				return fmt.Errorf("%s by default: %w", name, err)
			}
		}
		return nil
	})
	for name, template := range templates(t, pinned) {
		if _, err := tryPod(t, c, "air-gapped", name, template); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// testMutation: where another admission changes our objects at every write, helm and server-side apply (Argo CD) each come to rest: what is
// written again changes nothing, so that no pod is rolled.
func testMutation(t *testing.T, c *kubetest.Cluster) {
	c.Namespace(namespace)
	kubeconfig := c.Kubeconfig(c.Admin)
	helm := func(args ...string) {
		t.Helper()
		if _, err := kubetest.Helm(t, append(args, "--namespace", namespace, "--kubeconfig", kubeconfig)...); err != nil {
			t.Fatalf("helm %q: %v", args, err)
		}
	}
	written := c.Objects()
	// versions are those of the objects that make pods, but for the Job: each upgrade has its own.
	versions := func(objects []*unstructured.Unstructured) map[string]string {
		t.Helper()
		versions := map[string]string{}
		for _, o := range release(objects) {
			if _, ok, _ := unstructured.NestedMap(o.Object, "spec", "template"); !ok || o.GetKind() == "Job" {
				continue
			}
			now, err := written.Get(o)
			if err != nil {
				t.Fatal(err)
			}
			versions[key(o)] = now.GetResourceVersion()
			image, _, _ := unstructured.NestedSlice(now.Object, "spec", "template", "spec", "containers")
			if now.GetLabels()["cost-center"] != "shop" || !strings.HasPrefix(image[0].(map[string]any)["image"].(string), "mirror.example.com/") {
				t.Errorf("%s is not changed, so that this test shows nothing: %v", key(o), now.GetLabels())
			}
		}
		if len(versions) < 4 {
			t.Fatalf("%v", versions)
		}
		return versions
	}
	args := []string{"--set", "descheduler.enabled=true"}
	objects := render(t, args...)
	c.Eventually("the other admission is there", func() error {
		probe := get[unstructured.Unstructured](t, objects, "DaemonSet", "oom-tracer")
		if err := written.Apply(probe); err != nil {
			return err
		}
		now, err := written.Get(probe)
		if err == nil {
			err = written.Delete(probe)
		}
		if err == nil && now.GetLabels()["cost-center"] == "" {
			err = fmt.Errorf("labels %v", now.GetLabels())
		}
		return err
	})
	helm(append([]string{"install", "oom-tracer", chart}, args...)...)
	text, err := kubetest.Helm(t, "get", "manifest", "oom-tracer", "--namespace", namespace, "--kubeconfig", kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	installed, err := kubetest.Parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	before := versions(installed)
	for range 2 {
		helm(append([]string{"upgrade", "oom-tracer", chart}, args...)...)
		if after := versions(installed); !maps.Equal(after, before) {
			t.Errorf("an upgrade that changes nothing has written: %v, before %v", after, before)
		}
	}
	// A change gets through all the same.
	helm(append([]string{"upgrade", "oom-tracer", chart, "--set", "image.tag=v2"}, args...)...)
	set, err := c.Client.AppsV1().DaemonSets(namespace).Get(t.Context(), "oom-tracer", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if image := set.Spec.Template.Spec.Containers[0].Image; image != "mirror.example.com/oom-tracer:v2" {
		t.Errorf("after an upgrade the image is %s", image)
	}
	helm("uninstall", "oom-tracer")

	// Argo CD renders without the cluster, the same each time, and applies.
	sync := func() map[string]string {
		t.Helper()
		objects := render(t, "--values", root+"/deploy/examples/gitops.yaml")
		for _, o := range release(objects) {
			if _, err := written.Get(o); err == nil && (o.GetKind() == "Namespace" || o.GetKind() == "Job") {
				continue // Argo CD is told to ignore what others change of a Job: gitops.yaml
			}
			if err := written.Apply(o); err != nil {
				t.Fatalf("%s: %v", key(o), err)
			}
		}
		return versions(objects)
	}
	first := sync()
	if again := sync(); !maps.Equal(again, first) {
		t.Errorf("applied again, and written: %v, before %v", again, first)
	}
}

// testIPv6: without IPv4 the services get addresses, and NATS listens on what the pods have.
func testIPv6(t *testing.T, c *kubetest.Cluster) {
	home(t, c, "ipv6", privileged)
	objects := render(t, "--values", root+"/deploy/examples/ipv6-only.yaml")
	services := 0
	for _, o := range objects {
		if o.GetKind() != "Service" {
			continue
		}
		services++
		service := get[corev1.Service](t, objects, "Service", o.GetName())
		service.Namespace = "ipv6"
		made, err := c.Client.CoreV1().Services("ipv6").Create(t.Context(), service, metav1.CreateOptions{})
		if err != nil {
			t.Errorf("%s: %v", o.GetName(), err)
			continue
		}
		if !slices.Equal(made.Spec.IPFamilies, []corev1.IPFamily{corev1.IPv6Protocol}) || made.Spec.ClusterIP != "None" && !strings.HasPrefix(made.Spec.ClusterIP, "fd00:10::") {
			t.Errorf("%s: families %v, address %s", o.GetName(), made.Spec.IPFamilies, made.Spec.ClusterIP)
		}
	}
	if services < 2 {
		t.Errorf("%d services", services)
	}
	conf := get[corev1.ConfigMap](t, objects, "ConfigMap", "oom-tracer-nats").Data["nats.conf"]
	for _, port := range []string{"4222", "6222", "8222"} {
		if !strings.Contains(conf, `"[::]:`+port+`"`) {
			t.Errorf("nats.conf does not listen on [::]:%s:\n%s", port, conf)
		}
	}
}

// TestImages: each image is looked for where the values say, and a digest pins it.
func TestImages(t *testing.T) {
	objects := render(t, "--values", root+"/deploy/examples/air-gapped.yaml", "--set", "descheduler.enabled=true,image.tag=v1,tap.image.registry=other:5000,auth.image.tag=v2")
	for name, template := range templates(t, objects) {
		if len(template.Spec.ImagePullSecrets) != 1 || template.Spec.ImagePullSecrets[0].Name != "registry-login" {
			t.Errorf("%s: pull secrets %v", name, template.Spec.ImagePullSecrets)
		}
		for _, container := range append(template.Spec.InitContainers, template.Spec.Containers...) {
			want := map[string]string{
				"oom-tracer":    "registry.example.com/oom-tracer/oom-tracer:v1@sha256:8b7c3bd1c7a1f5b4e8a3a4c83dc6a8cb3d5be7a2bb2a6ff4db1cdbd15a5f0c11",
				"nats":          "registry.example.com/library/nats:2.15.2@sha256:1f2e3d4c5b6a79880706050403020100ffeeddccbbaa99887766554433221100",
				"oom-annotator": "registry.example.com/oom-tracer/oom-annotator:v1", "oom-descheduler": "registry.example.com/oom-tracer/oom-descheduler:v1",
				"oom-tap": "other:5000/oom-tap:v1", "victim": "other:5000/oom-tap:v1",
				"oom-auth": "registry.example.com/oom-tracer/oom-auth:v2", "issuer": "registry.example.com/oom-tracer/oom-auth:v2",
			}[container.Name]
			if container.Image != want {
				t.Errorf("%s: image %s, want %s", container.Name, container.Image, want)
			}
		}
	}
}
