package deploy

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
)

// limited is what GKE and others have: pods of the system's priority classes need a quota that covers them.
const limited = `
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
`

// TestPriorityQuota: where the system's priority classes need a quota, the chart's pods are refused without the chart's ResourceQuota,
// and admitted with it.
func TestPriorityQuota(t *testing.T) {
	file := filepath.Join(t.TempDir(), "admission.yaml")
	if err := os.WriteFile(file, []byte(limited), 0o600); err != nil {
		t.Fatal(err)
	}
	c := kubetest.StartWith(t, kubetest.Options{
		AuditPolicy: "apiVersion: audit.k8s.io/v1\nkind: Policy\nrules: [{level: None}]\n",
		Args:        map[string]string{"admission-control-config-file": file},
	})
	c.Namespace(namespace)
	for _, account := range []string{"oom-tracer", "oom-annotator", "oom-auth", "oom-descheduler"} {
		c.ServiceAccount(namespace, account)
	}
	objects := render(t, "--set", "descheduler.enabled=true")
	pods := templates(t, objects)
	create := func(name string) error {
		template := pods[name]
		pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, Labels: template.Labels}, Spec: *template.Spec.DeepCopy()}
		_, err := c.Client.CoreV1().Pods(namespace).Create(t.Context(), pod, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}})
		return err
	}
	for name := range pods {
		if err := create(name); name != "oom-tracer-test" && (err == nil || !strings.Contains(err.Error(), "insufficient quota")) {
			t.Fatalf("%s without a quota: %v, so that this test shows nothing", name, err)
		}
	}
	quota := get[corev1.ResourceQuota](t, objects, "ResourceQuota", "oom-tracer")
	made, err := c.Client.CoreV1().ResourceQuotas(namespace).Create(t.Context(), quota, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// As its controller does.
	made.Status = corev1.ResourceQuotaStatus{Hard: made.Spec.Hard, Used: corev1.ResourceList{corev1.ResourcePods: {}}}
	if _, err := c.Client.CoreV1().ResourceQuotas(namespace).UpdateStatus(t.Context(), made, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	for name := range pods {
		c.Eventually("the quota admits "+name, func() error { return create(name) })
	}
}

// TestScheduling: every pod tolerates what all shall tolerate, and none goes to a Windows node.
func TestScheduling(t *testing.T) {
	for name, template := range templates(t, render(t, "--values", root+"/deploy/examples/tainted-pools.yaml", "--set", "descheduler.enabled=true")) {
		spec := template.Spec
		tolerated := false
		for _, toleration := range spec.Tolerations {
			tolerated = tolerated || toleration.Key == "dedicated" && toleration.Value == "system"
		}
		if !tolerated || spec.NodeSelector["kubernetes.io/os"] != "linux" || (spec.NodeSelector["node-pool"] == "system") != (name != "oom-tracer") {
			t.Errorf("%s: node selector %v, tolerations %v", name, spec.NodeSelector, spec.Tolerations)
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

// TestIPv6: the servers of a cluster without IPv4 listen on its addresses.
func TestIPv6(t *testing.T) {
	conf := get[corev1.ConfigMap](t, render(t, "--values", root+"/deploy/examples/ipv6-only.yaml"), "ConfigMap", "oom-tracer-nats").Data["nats.conf"]
	for _, port := range []string{"4222", "6222", "8222"} {
		if !strings.Contains(conf, `"[::]:`+port+`"`) {
			t.Errorf("nats.conf does not listen on [::]:%s:\n%s", port, conf)
		}
	}
}
