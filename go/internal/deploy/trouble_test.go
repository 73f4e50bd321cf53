package deploy

import (
	"math"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/decide"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// For so long a node may thrash before the kernel kills, and none of our programs is restarted meanwhile; a start may
// take so long on a slow one.
const (
	thrashes = 5 * time.Minute
	starts   = 10 * time.Minute
)

// checkSpared: while its node is out of memory the pod is neither among the first victims, nor is it marked, nor
// restarted. The pod is as an API server has it.
func checkSpared(t *testing.T, pod *corev1.Pod) {
	t.Helper()
	// A test takes no other pod's place.
	if test := pod.Name == "oom-tracer-test"; test != (pod.Spec.PriorityClassName == "") ||
		!test && pod.Spec.PriorityClassName != "system-node-critical" && pod.Spec.PriorityClassName != "system-cluster-critical" {
		t.Errorf("%s: priority class %q", pod.Name, pod.Spec.PriorityClassName)
	}
	if got := pod.Annotations["oom-tracer.alpha.kubernetes.io/opt-out"]; got != "true" {
		t.Errorf("%s: the annotation that protects it is %q", pod.Name, got)
	}
	ends := pod.Spec.RestartPolicy != corev1.RestartPolicyAlways // a Job's
	// GetContainerOOMScoreAdjust in pkg/kubelet/qos/policy.go: these two get -997. What ends by itself is started anew.
	if !ends && pod.Spec.PriorityClassName != "system-node-critical" && pod.Status.QOSClass != corev1.PodQOSGuaranteed {
		t.Errorf("%s: QoS class %s, priority class %s: among the kernel's first victims", pod.Name, pod.Status.QOSClass, pod.Spec.PriorityClassName)
	}
	for i, c := range append(pod.Spec.InitContainers, pod.Spec.Containers...) {
		limits, requests := c.Resources.Limits, c.Resources.Requests
		if cpu, limited := limits[corev1.ResourceCPU]; limited && pod.Status.QOSClass != corev1.PodQOSGuaranteed {
			t.Errorf("%s: CPU limit %s, which makes it no Guaranteed pod", c.Name, &cpu)
		}
		memory := limits[corev1.ResourceMemory]
		if request := requests[corev1.ResourceMemory]; memory.IsZero() || request.Cmp(memory) != 0 {
			t.Errorf("%s: memory request %s, limit %s", c.Name, &request, &memory)
		}
		soft := int64(math.MaxInt64)
		for _, e := range c.Env {
			if e.Name == "GOMEMLIMIT" {
				var err error
				if soft, err = strconv.ParseInt(e.Value, 10, 64); err != nil {
					t.Errorf("%s: %v", c.Name, err)
				}
			}
		}
		if soft < memory.Value()/2 || soft > memory.Value()*9/10 {
			t.Errorf("%s: GOMEMLIMIT %d of %d", c.Name, soft, memory.Value())
		}
		if !ends && i >= len(pod.Spec.InitContainers) && c.Name != "reload" { // which serves nothing
			checkProbes(t, &c)
		}
	}
}

func checkProbes(t *testing.T, c *corev1.Container) {
	t.Helper()
	for name, want := range map[string]struct {
		probe   *corev1.Probe
		timeout time.Duration // of one attempt, at least
		bears   time.Duration // failures for so long, at least
	}{
		"startup":   {c.StartupProbe, 10 * time.Second, starts},
		"liveness":  {c.LivenessProbe, 10 * time.Second, thrashes},
		"readiness": {c.ReadinessProbe, 10 * time.Second, 30 * time.Second},
	} {
		p := want.probe
		if p == nil {
			t.Errorf("%s has no %s probe", c.Name, name)
			continue
		}
		second := func(n int32) time.Duration { return time.Duration(n) * time.Second }
		if bears := second(p.PeriodSeconds) * time.Duration(p.FailureThreshold); second(p.TimeoutSeconds) < want.timeout || bears < want.bears {
			t.Errorf("%s, %s: time-out %ds, bears failures for %s: %+v", c.Name, name, p.TimeoutSeconds, bears, p)
		}
	}
	if c.LivenessProbe != nil && c.ReadinessProbe != nil && c.Name != "oom-descheduler" && c.LivenessProbe.HTTPGet.Path == c.ReadinessProbe.HTTPGet.Path {
		t.Errorf("%s is restarted for what passes by itself: %s", c.Name, c.LivenessProbe.HTTPGet.Path)
	}
}

// TestNotMarked: of our own pods none is marked, not even under a policy that spares nobody else.
func TestNotMarked(t *testing.T) {
	objects := render(t, "--set", "descheduler.enabled=true")
	cfg := configs(t, objects)["annotator"]
	cfg.Policy.Protections = config.Protections{}
	terms := decide.Terms(&cfg)
	for name, template := range templates(t, objects) {
		decided := func(template corev1.PodTemplateSpec) decide.Decision {
			pod := terms.Read(&corev1.Pod{ObjectMeta: template.ObjectMeta, Spec: template.Spec})
			return decide.Decide(&cfg.Policy, &decide.Kill{
				Event: &event.Event{
					ID: "kill", Scope: event.ScopeGlobal, Outcome: event.OutcomeKilled, Limit: &event.Limit{Level: event.LevelNode},
					Container: &event.Container{PodUID: "4a0e1b9c-0000-4000-8000-000000000000"},
				},
				Found: pods.Found{Pod: pod},
			})
		}
		if d := decided(template); d.Result != event.ResultSkipped || d.Reason != event.ReasonOptOut {
			t.Errorf("%s: %s/%s", name, d.Result, d.Reason)
		}
		delete(template.Annotations, cfg.Policy.OptOutAnnotation)
		if d := decided(template); !d.Act {
			t.Errorf("%s without the annotation: %s/%s, so that this test shows nothing", name, d.Result, d.Reason)
		}
	}
}

// TestSizes: what follows from a size in the values, in the forms that Kubernetes knows.
func TestSizes(t *testing.T) {
	for size, want := range map[string]string{
		"128Mi": "114085068", "1Gi": "912680550", "0.5Gi": "456340275", "200M": "170000000", "268435456": "228170137", "2e8": "170000000",
	} {
		q, err := resource.ParseQuantity(size)
		if err != nil || strconv.FormatInt(q.Value()*85/100, 10) != want {
			t.Fatalf("%s is %d: %v", size, q.Value(), err)
		}
		env := map[string]string{}
		for _, e := range templates(t, render(t, values(t, "tracer: {resources: {limits: {memory: "+size+"}}}")...))["oom-tracer"].Spec.Containers[0].Env {
			env[e.Name] = e.Value
		}
		if env["GOMEMLIMIT"] != want {
			t.Errorf("%s: GOMEMLIMIT %s, want %s", size, env["GOMEMLIMIT"], want)
		}
	}
	own := templates(t, render(t, values(t, "nats: {extraEnv: [{name: GOMEMLIMIT, value: 1GiB}]}")...))["oom-tracer-nats"].Spec.Containers[0].Env
	if last := own[len(own)-1]; last.Value != "1GiB" || len(own) != 9 {
		t.Errorf("with a GOMEMLIMIT in extraEnv: %+v", own)
	}
}
