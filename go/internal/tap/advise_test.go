package tap

import (
	"fmt"
	"strings"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
)

// workloads is one of each kind that can be patched. Each has a second container, and settings that no patch may change.
const workloads = `
apiVersion: apps/v1
kind: Deployment
metadata: {name: cart, namespace: shop}
spec: {selector: {matchLabels: {app: x}}, template: TEMPLATE}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: "true", namespace: shop}
spec: {serviceName: x, selector: {matchLabels: {app: x}}, template: TEMPLATE}
---
apiVersion: apps/v1
kind: DaemonSet
metadata: {name: agent, namespace: shop}
spec: {selector: {matchLabels: {app: x}}, template: TEMPLATE}
---
apiVersion: apps/v1
kind: ReplicaSet
metadata: {name: alone.v1, namespace: shop}
spec: {selector: {matchLabels: {app: x}}, template: TEMPLATE}
---
apiVersion: v1
kind: ReplicationController
metadata: {name: old, namespace: shop}
spec: {selector: {app: x}, template: TEMPLATE}
---
apiVersion: batch/v1
kind: CronJob
metadata: {name: "20261128", namespace: shop}
spec: {schedule: "0 0 * * *", jobTemplate: {spec: {template: {spec: {restartPolicy: Never, containers: CONTAINERS}}}}}
`

const containers = `[{name: sidecar, image: "example.com/sidecar:1"}, {name: main, image: "example.com/main:1", args: [serve],
  resources: {limits: {memory: 1Gi, cpu: 500m}, requests: {memory: 512Mi}}}]`

// TestPatches has a real API server take the patches, each in a dry run.
func TestPatches(t *testing.T) {
	c := kubetest.Start(t)
	c.Namespace("shop")
	yaml := strings.ReplaceAll(workloads, "TEMPLATE", "{metadata: {labels: {app: x}}, spec: {containers: CONTAINERS}}")
	objects, err := kubetest.Parse(strings.NewReader(strings.ReplaceAll(yaml, "CONTAINERS", containers)))
	if err != nil {
		t.Fatal(err)
	}
	s := start(t)
	for _, object := range objects {
		if err := c.Objects().Apply(object); err != nil {
			t.Fatal(err)
		}
		killTwice(t, s, object.GetKind()+"/"+object.GetName())
	}
	killTwice(t, s, "Job/once")

	var stdout, stderr strings.Builder
	if status := cli.Run(t.Context(), Command("oom-tap", nil), []string{"advise", "--config", s.config, "-n", "shop", "-o", "patch"}, &stdout, &stderr); status != 0 {
		t.Fatalf("status %d: %s", status, &stderr)
	}
	if want := "oom-tap: no patch for 1 of 7 workloads; see oom-tap advise without --output\n"; stderr.String() != want {
		t.Errorf("stderr %q, want %q", &stderr, want)
	}
	docs := strings.Split(stdout.String(), "---\n")
	if len(docs) != len(objects) {
		t.Fatalf("%d patches for %d workloads:\n%s", len(docs), len(objects), &stdout)
	}
	client, err := dynamic.NewForConfig(c.Admin)
	if err != nil {
		t.Fatal(err)
	}
	for _, doc := range docs {
		parsed, err := kubetest.Parse(strings.NewReader(doc))
		if err != nil || len(parsed) != 1 {
			t.Fatalf("%v:\n%s", err, doc)
		}
		patch, kind := parsed[0], parsed[0].GroupVersionKind()
		data, err := patch.MarshalJSON()
		if err != nil {
			t.Fatal(err)
		}
		at := client.Resource(schema.GroupVersionResource{Group: kind.Group, Version: kind.Version, Resource: strings.ToLower(kind.Kind) + "s"}).Namespace(patch.GetNamespace())
		patched, err := at.Patch(t.Context(), patch.GetName(), types.StrategicMergePatchType, data, metav1.PatchOptions{
			DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict,
		})
		if err != nil {
			t.Errorf("%s: %v\n%s", kind.Kind, err, doc)
			continue
		}
		if err := onlyLimit(patched, "1280Mi"); err != nil {
			t.Errorf("%s: %v", kind.Kind, err)
		}
		if now, err := at.Get(t.Context(), patch.GetName(), metav1.GetOptions{}); err != nil || onlyLimit(now, "1Gi") != nil {
			t.Errorf("%s: a dry run has changed it: %v", kind.Kind, err)
		}
	}
}

// onlyLimit checks that a workload is as in the test, with this limit.
func onlyLimit(workload *unstructured.Unstructured, limit string) error {
	path := []string{"spec", "template", "spec", "containers"}
	if workload.GetKind() == "CronJob" {
		path = append([]string{"spec", "jobTemplate"}, path...)
	}
	all, _, err := unstructured.NestedSlice(workload.Object, path...)
	if err != nil || len(all) != 2 {
		return fmt.Errorf("containers %v: %w", all, err)
	}
	main, _ := all[1].(map[string]any)
	got := fmt.Sprintln(main["name"], main["image"], main["args"], main["resources"])
	if want := fmt.Sprintf("main example.com/main:1 [serve] map[limits:map[cpu:500m memory:%s] requests:map[memory:512Mi]]\n", limit); got != want {
		return fmt.Errorf("got %swant %s", got, want)
	}
	return nil
}

// killTwice publishes two kills for the limit of 1 GiB of the container main of a workload, each a second after its start.
func killTwice(t *testing.T, s *natsServer, owner string) {
	t.Helper()
	for n := range 2 {
		id := fmt.Sprintf("k-%s-%d", strings.NewReplacer("/", "-", ".", "-").Replace(strings.ToLower(owner)), n)
		kill := fmt.Sprintf(`{"schema":"oom-tracer/v1","id":%q,"seq":1,"time":"2026-11-23T02:03:04Z","boottime_ns":2000000000,"node":{"name":"node-1","boot_id":"b","kernel":"k","tier":"fentry"},`+
			`"scope":"cgroup","outcome":"killed","victim":{"pid":7,"tid":7,"ns_pid":1,"comm":"java","start_boottime_ns":1000000000,`+
			`"memory":{"total_vm":1,"anon_rss":1073000000,"file_rss":0,"shmem_rss":0,"swap":0,"pgtables":1,"approximate":false}},`+
			`"limit":{"level":"container","max":1073741824,"usage":1073741824,"inferred":false},"container":{"pod_uid":"u","container_id":"c%d","qos":"burstable"}}`, id, n)
		outcome := fmt.Sprintf(`{"schema":"oom-tracer/v1","id":"%[1]s/annotate","kill":%[1]q,"stage":"annotate","time":"2026-11-23T02:03:05Z","result":"skipped","reason":"level","node":"node-1",`+
			`"pod":{"namespace":"shop","name":"x","uid":"u","owner":%[2]q},"container":"main"}`, id, owner)
		publish(t, s, "id="+id, "subject=oom.v1.kill.cgroup.node-1", "file="+kill)
		publish(t, s, "id="+id+"/annotate", "subject=oom.v1.outcome."+id+"_annotate.node-1", "file="+outcome)
	}
}
