package deploy

import (
	"crypto/tls"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	schedulingv1 "k8s.io/api/scheduling/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// descheduler is the descheduler as the chart renders it.
type descheduler struct {
	c       *kubetest.Cluster
	objects []*unstructured.Unstructured
	pod     corev1.PodSpec
	account *rest.Config
}

// newDescheduler renders the chart and applies the account and the roles of it.
func newDescheduler(t *testing.T, c *kubetest.Cluster, args ...string) *descheduler {
	t.Helper()
	d := &descheduler{c: c, objects: render(t, append([]string{"--set", "descheduler.enabled=true"}, args...)...)}
	d.pod = get[appsv1.Deployment](t, d.objects, "Deployment", "oom-descheduler").Spec.Template.Spec
	var documents []string
	for _, o := range d.objects {
		switch o.GetKind() {
		case "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding":
			text, err := o.MarshalJSON()
			if err != nil {
				t.Fatal(err)
			}
			documents = append(documents, string(text))
		}
	}
	file := filepath.Join(t.TempDir(), "rbac.yaml")
	if err := os.WriteFile(file, []byte(strings.Join(documents, "\n---\n")), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Apply(file)
	d.account = c.ServiceAccount(namespace, d.pod.ServiceAccountName)
	return d
}

// may asks the API server whether the account may do something.
func (d *descheduler) may(t *testing.T, ask authorizationv1.ResourceAttributes) bool {
	t.Helper()
	client, err := kubernetes.NewForConfig(d.account)
	if err != nil {
		t.Fatal(err)
	}
	review := &authorizationv1.SelfSubjectAccessReview{Spec: authorizationv1.SelfSubjectAccessReviewSpec{ResourceAttributes: &ask}}
	if review, err = client.AuthorizationV1().SelfSubjectAccessReviews().Create(t.Context(), review, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	return review.Status.Allowed
}

// start runs it with the rendered arguments and policy, with the interval, a port and a kubeconfig of the test's. said is
// what it has said up to now.
func (d *descheduler) start(t *testing.T, account *rest.Config, interval string) (cmd *exec.Cmd, address string, said func() string) {
	t.Helper()
	dir := t.TempDir()
	for name, text := range get[corev1.ConfigMap](t, d.objects, "ConfigMap", d.pod.Volumes[0].ConfigMap.Name).Data {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	container := d.pod.Containers[0]
	address = freeAddr(t)
	_, port, _ := net.SplitHostPort(address)
	args := strings.Join(container.Args, "\n")
	args = replaced(t, true, args, container.VolumeMounts[0].MountPath+"/", dir+"/")
	args = replaced(t, true, args, "--descheduling-interval=1m", "--descheduling-interval="+interval)
	args += "\n--secure-port=" + port + "\n--kubeconfig=" + d.c.Kubeconfig(account)

	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		t.Fatal(err)
	}
	said = func() string {
		text, err := os.ReadFile(log.Name())
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	cmd = exec.Command(oomtest.Program(t, "oom-descheduler"), strings.Split(args, "\n")...)
	cmd.Stdout, cmd.Stderr, cmd.SysProcAttr = log, log, &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	log.Close()
	t.Cleanup(func() {
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("%q said:\n%s", cmd.Args, said())
		}
	})
	return cmd, address, said
}

// evicted are the pods whose eviction anybody has asked for.
func evicted(c *kubetest.Cluster) []string {
	var names []string
	for _, e := range c.Audit() {
		names = append(names, e.ObjectRef.Namespace+"/"+e.ObjectRef.Name)
	}
	return names
}

// TestDescheduler: what the chart renders, run by build/oom-descheduler on a real API server: with the rendered
// arguments, policy and role it evicts what it should; with dryRun it evicts nothing, and could not.
func TestDescheduler(t *testing.T) {
	c := kubetest.Start(t)
	c.Node("node-1")
	c.Node("node-2")
	c.Namespace("shop")
	c.Namespace(namespace)
	class := &schedulingv1.PriorityClass{ObjectMeta: metav1.ObjectMeta{Name: "high"}, Value: 100}
	if _, err := c.Client.SchedulingV1().PriorityClasses().Create(t.Context(), class, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	keys := []string{"--set", "config.policy.annotation=example.com/evict=now", "--set", "config.annotator.summary_annotation=example.com/kill"}
	eviction := authorizationv1.ResourceAttributes{Verb: "create", Resource: "pods", Subresource: "eviction", Namespace: "shop"}
	pod := func(name, key string, hit time.Time) {
		t.Helper()
		summary, err := json.Marshal(pods.Summary{Event: "boot-4711-1", Time: hit, Scope: "global", Node: "node-1"})
		if err != nil {
			t.Fatal(err)
		}
		controller := true
		c.Pod("shop", name, "node-1", func(pod *corev1.Pod) {
			pod.Annotations = map[string]string{key: "now", "example.com/kill": string(summary)}
			pod.OwnerReferences = []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: "web", UID: "0f1e2d3c", Controller: &controller}}
			pod.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: corev1.ConditionTrue}}
		})
	}
	pod("hit", "example.com/evict", time.Now())
	pod("long-ago", "example.com/evict", time.Now().Add(-2*time.Hour))
	pod("other-key", "oom-tracer.alpha.kubernetes.io/evict-me", time.Now())

	t.Run("DryRun", func(t *testing.T) {
		c := c.In(t)
		d := newDescheduler(t, c, append(keys, "--set", "dryRun=true")...)
		c.Eventually("it may list pods", func() error {
			if !d.may(t, authorizationv1.ResourceAttributes{Verb: "list", Resource: "pods"}) {
				return errors.New("not yet")
			}
			return nil
		})
		if d.may(t, eviction) {
			t.Error("it may evict")
		}
		_, _, said := d.start(t, d.account, "1s")
		c.Eventually("it tells what it would evict", func() error {
			if !strings.Contains(said(), `"Evicted pod in dry run mode" pod="shop/hit"`) {
				return errors.New("not yet")
			}
			return nil
		})
		if got := evicted(c); len(got) > 0 || strings.Contains(said(), "forbidden") {
			t.Errorf("evictions %v, forbidden: %v", got, strings.Contains(said(), "forbidden"))
		}
	})

	t.Run("Evicts", func(t *testing.T) {
		c := c.In(t)
		d := newDescheduler(t, c, append(keys, "--set", "descheduler.replicas=2")...)
		for _, right := range []authorizationv1.ResourceAttributes{eviction, {Verb: "create", Group: "coordination.k8s.io", Resource: "leases", Namespace: namespace}} {
			c.Eventually("it has its rights", func() error {
				if !d.may(t, right) {
					return fmt.Errorf("not to %s %s", right.Verb, right.Resource)
				}
				return nil
			})
		}
		for _, ask := range []authorizationv1.ResourceAttributes{
			{Verb: "delete", Resource: "pods"}, {Verb: "patch", Resource: "pods"}, {Verb: "create", Resource: "pods"},
			{Verb: "create", Resource: "pods", Subresource: "exec"}, {Verb: "get", Resource: "secrets"}, {Verb: "list", Resource: "secrets"},
			{Verb: "patch", Resource: "nodes"}, {Verb: "create", Group: "coordination.k8s.io", Resource: "leases", Namespace: "kube-system"},
			{Verb: "update", Group: "coordination.k8s.io", Resource: "leases", Namespace: namespace, Name: "another"},
		} {
			if d.may(t, ask) {
				t.Errorf("it may %s %s/%s in %q", ask.Verb, ask.Resource, ask.Subresource, ask.Namespace)
			}
		}

		cmd, address, said := d.start(t, d.account, "1s")
		c.Eventually("the pod is evicted", func() error {
			if c.GetPod("shop", "hit").DeletionTimestamp == nil {
				return errors.New("not yet")
			}
			return nil
		})
		// As the probe and the PodMonitor ask.
		container := d.pod.Containers[0]
		if probe := container.LivenessProbe.HTTPGet; container.Ports[0].Name != probe.Port.StrVal || probe.Scheme != corev1.URISchemeHTTPS {
			t.Errorf("the probe asks %v", probe)
		}
		client := &http.Client{Transport: &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}}
		defer client.CloseIdleConnections()
		read := func(path string) *http.Response {
			t.Helper()
			resp, err := client.Get("https://" + address + path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { resp.Body.Close() })
			if resp.StatusCode != http.StatusOK {
				t.Fatalf("%s: %s", path, resp.Status)
			}
			return resp
		}
		read(container.LivenessProbe.HTTPGet.Path)
		if metrics := parseMetrics(t, read("/metrics").Body); !metrics.has("descheduler_pods_evicted_total", "strategy", "RemoveAnnotated") {
			t.Error("the metrics do not count the eviction")
		}
		c.Eventually("it has told of the eviction", func() error {
			list, err := c.Client.EventsV1().Events("shop").List(t.Context(), metav1.ListOptions{})
			if err != nil || len(list.Items) == 0 {
				return fmt.Errorf("no Event: %v", err)
			}
			return nil
		})
		if got := evicted(c); !slices.Equal(got, []string{"shop/hit"}) {
			t.Errorf("evictions of %v", got)
		}

		if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
			t.Fatal(err)
		}
		begin := time.Now()
		if err := cmd.Wait(); err != nil || time.Since(begin) > time.Duration(*get[appsv1.Deployment](t, d.objects, "Deployment", "oom-descheduler").Spec.Template.Spec.TerminationGracePeriodSeconds)*time.Second {
			t.Errorf("it ended after %s: %v", time.Since(begin), err)
		}
		if strings.Contains(said(), "forbidden") {
			t.Error("it lacks a right")
		}
	})

	// A policy in the place of the chart's, with all that DefaultEvictor reads.
	own := func(args string) []string {
		return values(t, `
descheduler:
  policy:
    apiVersion: descheduler/v1alpha2
    kind: DeschedulerPolicy
    maxNoOfPodsToEvictTotal: 2000000
    profiles:
      - name: own
        pluginConfig:
          - name: DefaultEvictor
            args:
              priorityThreshold: {name: high}
              namespaceLabelSelector: {matchLabels: {kubernetes.io/metadata.name: shop}}
              podProtections: {extraEnabled: [PodsWithPVC]}
          - name: RemoveAnnotated
            args: `+args+`
        plugins: {deschedule: {enabled: [RemoveAnnotated]}}
`)
	}
	t.Run("OwnPolicy", func(t *testing.T) {
		c := c.In(t)
		cmd, _, said := newDescheduler(t, c, own("{annotationKey: example.com/evict}")...).start(t, c.ServiceAccount(namespace, "oom-descheduler"), "0s")
		if err := cmd.Wait(); err != nil {
			t.Error(err)
		}
		// Without maxAge this one goes too.
		if text := said(); strings.Contains(text, "forbidden") || !strings.Contains(text, `"Evicted pod" pod="shop/long-ago"`) {
			t.Error("it lacks a right, or does not go by that policy")
		}
		if got := evicted(c); !slices.Equal(got, []string{"shop/hit", "shop/long-ago"}) {
			t.Errorf("evictions of %v", got)
		}
	})
	t.Run("Mistyped", func(t *testing.T) {
		cmd, _, said := newDescheduler(t, c.In(t), own("{maxage: 1h}")...).start(t, c.ServiceAccount(namespace, "oom-descheduler"), "1s")
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 || !strings.Contains(said(), `unknown field \"maxage\"`) {
			t.Errorf("%v, and not the name of the key", err)
		}
	})
}

// TestDeschedulerKnobs: each value arrives, and without metrics nothing listens.
func TestDeschedulerKnobs(t *testing.T) {
	objects := render(t, values(t, `
metrics: {enabled: false}
config: {policy: {mark_lifetime: 30m}}
descheduler:
  enabled: true
  image: {repository: other}
  interval: 1h30m
  replicas: 3
  resources: {limits: {memory: 1Gi}}
  priorityClassName: high
  nodeSelector: {pool: infra}
  tolerations: [{key: infra, operator: Exists}]
  affinity: {nodeAffinity: {}}
  labels: {team: sre}
  annotations: {note: x}
  extraArgs: [--v=4]
  extraEnv: [{name: A, value: b}]
`)...)
	if policy := get[corev1.ConfigMap](t, objects, "ConfigMap", "oom-descheduler").Data["policy.yaml"]; !strings.Contains(policy, "maxAge: 30m\n") {
		t.Errorf("a mark may be older than the descheduler's maxAge:\n%s", policy)
	}
	deployment := get[appsv1.Deployment](t, objects, "Deployment", "oom-descheduler")
	template := deployment.Spec.Template
	spec, container := template.Spec, template.Spec.Containers[0]
	if !reflect.DeepEqual(container.Args, []string{"--policy-config-file=/etc/oom-descheduler/policy.yaml", "--descheduling-interval=1h30m",
		"--client-connection-qps=50", "--client-connection-burst=100", "--v=1", "--leader-elect", "--leader-elect-resource-namespace=oom-tracer", "--v=4"}) {
		t.Errorf("arguments %q", container.Args)
	}
	if *deployment.Spec.Replicas != 3 || spec.PriorityClassName != "high" || spec.NodeSelector["pool"] != "infra" || spec.Tolerations[0].Key != "infra" ||
		spec.Affinity == nil || template.Labels["team"] != "sre" || template.Annotations["note"] != "x" {
		t.Errorf("%+v", deployment.Spec)
	}
	if container.Image != "other:0.1.0" || container.Resources.Limits.Memory().String() != "1Gi" || !slices.Contains(container.Env, corev1.EnvVar{Name: "A", Value: "b"}) ||
		container.LivenessProbe == nil { // the probes need no metrics
		t.Errorf("%+v", container)
	}
}
