package kubetest

import (
	"bufio"
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/yaml"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/discovery/cached/memory"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"
	"k8s.io/client-go/util/retry"

	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// Node makes a node that is ready, with room for pods and without a taint: all that a scheduler or descheduler
// looks at. Each change is applied to it before it is created.
func (c *Cluster) Node(name string, changes ...func(*corev1.Node)) *corev1.Node {
	c.t.Helper()
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{corev1.LabelHostname: name}},
		Status: corev1.NodeStatus{
			Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}},
			Allocatable: corev1.ResourceList{
				corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("8Gi"), corev1.ResourcePods: resource.MustParse("110"),
			},
		},
	}
	for _, change := range changes {
		change(node)
	}
	status, taints := node.Status, node.Spec.Taints
	status.Capacity = status.Allocatable
	nodes := c.Client.CoreV1().Nodes()
	node, err := nodes.Create(c.t.Context(), node, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	// The server taints every new node as not ready, for a controller to take that away once it is. Where there is
	// one, it changes the node too.
	for _, change := range []func() error{
		func() error {
			node.Status = status
			node, err = nodes.UpdateStatus(c.t.Context(), node, metav1.UpdateOptions{})
			return err
		},
		func() error {
			node.Spec.Taints = taints
			node, err = nodes.Update(c.t.Context(), node, metav1.UpdateOptions{})
			return err
		},
	} {
		name := node.Name
		err := retry.RetryOnConflict(retry.DefaultBackoff, func() error {
			if node, err = nodes.Get(c.t.Context(), name, metav1.GetOptions{}); err != nil {
				return err
			}
			return change()
		})
		if err != nil {
			c.t.Fatal(err)
		}
	}
	return node
}

// Namespace makes a namespace, if it is not there, and the service account that its pods need.
func (c *Cluster) Namespace(name string) {
	c.t.Helper()
	namespace := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}
	if _, err := c.Client.CoreV1().Namespaces().Create(c.t.Context(), namespace, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		c.t.Fatal(err)
	}
	account := &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "default"}}
	if _, err := c.Client.CoreV1().ServiceAccounts(name).Create(c.t.Context(), account, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
		c.t.Fatal(err)
	}
}

// Pod makes a pod with one container, main, that runs on the node. Each change is applied to it before it
// is created: what a change puts into the status is kept, and where it puts nothing, each container of the
// spec runs with a random container ID. The server gives the UID. The node need not be there.
func (c *Cluster) Pod(namespace, name, node string, changes ...func(*corev1.Pod)) *corev1.Pod {
	c.t.Helper()
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.PodSpec{
			NodeName:   node,
			Containers: []corev1.Container{{Name: "main", Image: "example.com/main:1"}},
		},
	}
	for _, change := range changes {
		change(pod)
	}
	status := pod.Status
	if status.Phase == "" {
		status.Phase = corev1.PodRunning
	}
	if status.ContainerStatuses == nil {
		status.ContainerStatuses = running(pod.Spec.Containers)
	}
	if status.InitContainerStatuses == nil {
		status.InitContainerStatuses = running(pod.Spec.InitContainers)
	}
	pod, err := c.Client.CoreV1().Pods(namespace).Create(c.t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	status.QOSClass = pod.Status.QOSClass // may not change
	pod.Status = status
	return c.SetStatus(pod)
}

// SetStatus writes pod.Status, as the kubelet does.
func (c *Cluster) SetStatus(pod *corev1.Pod) *corev1.Pod {
	c.t.Helper()
	pod, err := c.Client.CoreV1().Pods(pod.Namespace).UpdateStatus(c.t.Context(), pod, metav1.UpdateOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return pod
}

// GetPod reads a pod anew.
func (c *Cluster) GetPod(namespace, name string) *corev1.Pod {
	c.t.Helper()
	pod, err := c.Client.CoreV1().Pods(namespace).Get(c.t.Context(), name, metav1.GetOptions{})
	if err != nil {
		c.t.Fatal(err)
	}
	return pod
}

// DeletePod deletes a pod at once. Any longer grace would have it wait for a kubelet.
func (c *Cluster) DeletePod(namespace, name string) {
	c.t.Helper()
	var now int64
	if err := c.Client.CoreV1().Pods(namespace).Delete(c.t.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: &now}); err != nil {
		c.t.Fatal(err)
	}
}

func running(containers []corev1.Container) []corev1.ContainerStatus {
	var statuses []corev1.ContainerStatus
	for _, container := range containers {
		statuses = append(statuses, corev1.ContainerStatus{
			Name:        container.Name,
			Image:       container.Image,
			ContainerID: "containerd://" + NewContainerID(),
			State:       corev1.ContainerState{Running: &corev1.ContainerStateRunning{StartedAt: metav1.Now()}},
		})
	}
	return statuses
}

// NewContainerID is an ID as container runtimes make them.
func NewContainerID() string {
	var id [32]byte
	_, _ = rand.Read(id[:]) // never fails
	return hex.EncodeToString(id[:])
}

// ContainerID is the ID of a pod's container, as it stands in the name of the container's cgroup.
func (c *Cluster) ContainerID(pod *corev1.Pod, container string) string {
	c.t.Helper()
	for _, statuses := range [][]corev1.ContainerStatus{
		pod.Status.ContainerStatuses, pod.Status.InitContainerStatuses, pod.Status.EphemeralContainerStatuses,
	} {
		for _, status := range statuses {
			if status.Name == container {
				_, id, _ := strings.Cut(status.ContainerID, "://")
				return id
			}
		}
	}
	c.t.Fatalf("pod %s/%s has no status of a container %s", pod.Namespace, pod.Name, container)
	return ""
}

// Apply applies manifests, server side, and refuses unknown fields. A file's name that is not absolute is
// taken from the root of the repository. The server obeys new roles and policies a moment later: see
// Eventually.
func (c *Cluster) Apply(files ...string) {
	c.t.Helper()
	for _, file := range files {
		objects, err := Manifests(file)
		if err != nil {
			c.t.Fatal(err)
		}
		c.applyAll(objects)
	}
}

// ApplyChart applies templates of the chart, rendered with these values (key=value).
func (c *Cluster) ApplyChart(values []string, templates ...string) {
	c.t.Helper()
	c.applyAll(Chart(c.t, values, templates...))
}

func (c *Cluster) applyAll(objects []*unstructured.Unstructured) {
	c.t.Helper()
	o := c.Objects()
	for _, object := range objects {
		if err := o.Apply(object); err != nil {
			c.t.Fatalf("apply %s %s: %v", object.GetKind(), object.GetName(), err)
		}
	}
}

// DryRun returns what the server has against an object, unknown fields too, and changes nothing.
func (c *Cluster) DryRun(object *unstructured.Unstructured) error {
	c.t.Helper()
	return c.Objects().apply(object, metav1.DryRunAll)
}

// Objects writes and reads objects of any kind, by what the server knew when it was made.
type Objects struct {
	c      *Cluster
	client dynamic.Interface
	mapper meta.RESTMapper
}

// Objects knows the kinds that the server knows now.
func (c *Cluster) Objects() *Objects {
	c.t.Helper()
	client, err := dynamic.NewForConfig(c.Admin)
	if err != nil {
		c.t.Fatal(err)
	}
	kinds, err := discovery.NewDiscoveryClientForConfig(c.Admin)
	if err != nil {
		c.t.Fatal(err)
	}
	return &Objects{c: c, client: client, mapper: restmapper.NewDeferredDiscoveryRESTMapper(memory.NewMemCacheClient(kinds))}
}

func (o *Objects) at(object *unstructured.Unstructured) (dynamic.ResourceInterface, error) {
	kind := object.GroupVersionKind()
	mapping, err := o.mapper.RESTMapping(kind.GroupKind(), kind.Version)
	if err != nil {
		return nil, err
	}
	return o.client.Resource(mapping.Resource).Namespace(object.GetNamespace()), nil
}

// Apply applies an object, server side, and refuses unknown fields.
func (o *Objects) Apply(object *unstructured.Unstructured) error { return o.apply(object) }

func (o *Objects) apply(object *unstructured.Unstructured, dryRun ...string) error {
	at, err := o.at(object)
	if err != nil {
		return err
	}
	data, err := json.Marshal(object)
	if err != nil {
		return err
	}
	// The client's own Apply has no field validation.
	_, err = at.Patch(o.c.t.Context(), object.GetName(), types.ApplyPatchType, data, metav1.PatchOptions{
		FieldManager: "kubetest", Force: new(true), FieldValidation: metav1.FieldValidationStrict, DryRun: dryRun,
	})
	return err
}

// Get reads the object of this kind and name.
func (o *Objects) Get(object *unstructured.Unstructured) (*unstructured.Unstructured, error) {
	at, err := o.at(object)
	if err != nil {
		return nil, err
	}
	return at.Get(o.c.t.Context(), object.GetName(), metav1.GetOptions{})
}

// Delete deletes the object of this kind and name, and what there is of it at once.
func (o *Objects) Delete(object *unstructured.Unstructured) error {
	at, err := o.at(object)
	if err != nil {
		return err
	}
	return at.Delete(o.c.t.Context(), object.GetName(), metav1.DeleteOptions{
		GracePeriodSeconds: new(int64(0)), PropagationPolicy: new(metav1.DeletePropagationBackground),
	})
}

// Manifests reads the objects of a file of YAML documents, from the root of the repository.
func Manifests(file string) ([]*unstructured.Unstructured, error) {
	file, err := Path(file)
	if err != nil {
		return nil, err
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	objects, err := Parse(f)
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", file, err)
	}
	return objects, nil
}

// Parse reads objects from a stream of YAML documents, strictly.
func Parse(r io.Reader) ([]*unstructured.Unstructured, error) {
	documents := yaml.NewYAMLReader(bufio.NewReader(r))
	var objects []*unstructured.Unstructured
	for {
		document, err := documents.Read()
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		object := &unstructured.Unstructured{}
		if err := yaml.UnmarshalStrict(document, &object.Object); err != nil {
			return nil, fmt.Errorf("%w in:\n%s", err, document)
		}
		if object.Object != nil { // nil: nothing but comments
			objects = append(objects, object)
		}
	}
}

// Chart renders the chart with these values (key=value) and returns the objects of some of its templates. Without a cluster to ask it
// makes no passwords, and takes the Secret oom-tracer-nats.
func Chart(t testing.TB, values []string, templates ...string) []*unstructured.Unstructured {
	t.Helper()
	chart, err := Path("deploy/chart")
	if err != nil {
		t.Fatal(err)
	}
	args := []string{"template", "oom-tracer", chart, "--namespace", "oom-tracer", "--kube-version", "1.36.3", "--set", "nats.passwordSecret=oom-tracer-nats"}
	for _, v := range values {
		args = append(args, "--set", v)
	}
	for _, name := range templates {
		args = append(args, "--show-only", "templates/"+name)
	}
	text, err := Helm(t, args...)
	if err != nil {
		t.Fatalf("render the chart: %v", err)
	}
	objects, err := Parse(strings.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	return objects
}

// Helm runs helm, with a home of its own, and returns what it says; where it fails, all of that is the error.
func Helm(t testing.TB, args ...string) (string, error) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), filepath.Join(oomtest.Program(t, "deploy"), "helm"), args...)
	cmd.Env = []string{"HOME=" + t.TempDir(), "PATH=" + os.Getenv("PATH")}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		return "", errors.New(stdout.String() + stderr.String())
	}
	return stdout.String(), nil
}

// Path finds a file of the repository, by its name from the root of it. The test runs somewhere below.
func Path(file string) (string, error) {
	if filepath.IsAbs(file) {
		return file, nil
	}
	dir, err := os.Getwd()
	if err != nil {
		return "", err
	}
	for {
		path := filepath.Join(dir, file)
		if _, err := os.Stat(path); err == nil {
			return path, nil
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("find %s: the test does not run in the repository", file)
		}
		dir = filepath.Dir(dir)
	}
}

// Annotator applies what deploy/manifests gives the annotator and returns the client configuration of its service
// account, once the server obeys what was applied.
func (c *Cluster) Annotator() *rest.Config {
	c.t.Helper()
	c.Apply("deploy/manifests/00-namespace.yaml", "deploy/manifests/rbac.yaml", "deploy/manifests/admission.yaml")
	return c.annotator()
}

// AnnotatorWith is Annotator with what the chart gives it for other values, such as "config.policy.condition=…".
func (c *Cluster) AnnotatorWith(values ...string) *rest.Config {
	c.t.Helper()
	c.Namespace("oom-tracer")
	c.ApplyChart(values, "rbac.yaml", "admission.yaml")
	return c.annotator()
}

func (c *Cluster) annotator() *rest.Config {
	c.t.Helper()
	cfg := c.ServiceAccount("oom-tracer", "oom-annotator")
	cfg.UserAgent = "oom-annotator/test" // the server takes the field manager from it
	client, err := kubernetes.NewForConfig(cfg)
	if err != nil {
		c.t.Fatal(err)
	}
	// A pod that nobody need see, whose patches are tried and not done.
	c.Namespace("kubetest")
	c.Pod("kubetest", "probe", "node")
	defer c.DeletePod("kubetest", "probe")
	try := func(patch string) error {
		_, err := client.CoreV1().Pods("kubetest").Patch(c.t.Context(), "probe", types.MergePatchType, []byte(patch),
			metav1.PatchOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	c.Eventually("the annotator may annotate", func() error {
		return try(`{"metadata":{"annotations":{"oom-tracer.alpha.kubernetes.io/evict-me":"true",` +
			`"oom-tracer.alpha.kubernetes.io/last-kill":"{\"event\":\"x\",\"annotation\":\"oom-tracer.alpha.kubernetes.io/evict-me\"}"}}}`)
	})
	c.Eventually("the annotator is denied the rest", func() error {
		if err := try(`{"metadata":{"labels":{"kubetest":"probe"}}}`); !apierrors.IsInvalid(err) && !apierrors.IsForbidden(err) {
			return fmt.Errorf("a label: got %q", fmt.Sprint(err)) // nil too
		}
		return nil
	})
	return cfg
}

// Eventually waits until try returns nil: the server reads its own roles and policies through a watch.
func (c *Cluster) Eventually(what string, try func() error) {
	c.t.Helper()
	deadline := time.Now().Add(30 * time.Second)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			c.t.Fatalf("%s: not after 30 s: %v", what, err)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
