package main

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"regexp"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
)

const lowMemory = "The node was low on resource: memory. Threshold quantity: 100Mi, available: 71Mi. Container main was using 900Mi, request is 0, has larger consumption of memory. "

// evict writes the status of a pod that the kubelet has evicted, as evictPod in pkg/kubelet/eviction does.
func evict(c *kubetest.Cluster, pod *corev1.Pod, change func(*corev1.PodStatus)) (at time.Time) {
	now := metav1.Now()
	s := &pod.Status
	s.Phase, s.Reason, s.Message = corev1.PodFailed, "Evicted", lowMemory
	s.Conditions = append(s.Conditions, corev1.PodCondition{
		Type: corev1.DisruptionTarget, Status: corev1.ConditionTrue, Reason: corev1.PodReasonTerminationByKubelet, Message: s.Message, LastTransitionTime: now,
	})
	change(s)
	c.SetStatus(pod)
	return now.UTC().Truncate(time.Second)
}

// evicted reads the evictions that the stream holds.
func (r *rig) evicted() (all []event.Eviction) {
	r.t.Helper()
	err := bus.Tail(r.t.Context(), r.conn, bus.TailOptions{Subjects: []string{"oom.v1.eviction.>"}, Since: time.Unix(0, 0)}, func(m bus.Stored) error {
		e, err := event.ParseEviction(m.Data)
		if subject, _ := e.Subject(); err != nil || subject != m.Subject || e.ID != m.ID {
			r.t.Errorf("%s on %s, of %s: %s, %v", m.ID, m.Subject, subject, m.Data, err)
		}
		all = append(all, e)
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return all
}

// evictionsOf reads a result of the metric from a replica.
func evictionsOf(listen, result string) int {
	resp, err := http.Get("http://" + listen + "/metrics")
	if err != nil {
		return 0
	}
	defer resp.Body.Close()
	body, _ := io.ReadAll(resp.Body)
	if m := regexp.MustCompile(`(?m)^oom_tracer_kubelet_evictions_total\{result="` + result + `"\} (\d+)$`).FindSubmatch(body); m != nil {
		n, _ := strconv.Atoi(string(m[1]))
		return n
	}
	return -1
}

// testEvictions: two annotators, one of which only observes, publish each pod once that the kubelet evicted because its node ran low on
// memory, also one that was evicted before they started, and after a restart. No other pod is published.
func testEvictions(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	keep := func(*corev1.PodStatus) {}
	type pod struct {
		*corev1.Pod
		at time.Time
	}
	want := map[string]pod{} // by UID
	low := func(name string) *corev1.Pod {
		p := c.Pod("shop", "evicted-"+name, node)
		want[string(p.UID)] = pod{p, evict(c, p, keep)}
		return p
	}
	low("before")
	defer c.DeletePod("shop", "evicted-before") // annotators of other tests would publish it too
	for name, change := range map[string]func(*corev1.PodStatus){
		"disk":      func(s *corev1.PodStatus) { s.Message = "The node was low on resource: ephemeral-storage. " },
		"volume":    func(s *corev1.PodStatus) { s.Message = `Usage of EmptyDir volume "memory" exceeds the limit "1Mi". ` },
		"rejected":  func(s *corev1.PodStatus) { s.Message = "Pod was rejected: The node had condition: [MemoryPressure]. " },
		"preempted": func(s *corev1.PodStatus) { s.Reason = "Preempting" },
		"running":   func(s *corev1.PodStatus) { s.Phase = corev1.PodRunning },
		"api":       func(s *corev1.PodStatus) { s.Conditions[0].Reason = "EvictionByEvictionAPI" },
		"no-longer": func(s *corev1.PodStatus) { s.Conditions[0].Status = corev1.ConditionFalse },
		"long-ago": func(s *corev1.PodStatus) {
			s.Conditions[0].LastTransitionTime = metav1.NewTime(time.Now().Add(-8 * 24 * time.Hour))
		},
	} {
		evict(c, c.Pod("shop", "not-evicted-"+name, node), change)
	}

	r := newBus(t, func(cfg *config.Config) { cfg.NATS.Stream.DedupWindow = time.Second })
	var replicas []*process
	var listen []string
	for i := range 2 {
		cfg, path := newConfig(t, func(cfg *config.Config) {
			cfg.NATS.Embedded = r.cfg.NATS.Embedded
			if i == 1 {
				cfg.Policy.Annotation = ""
			}
		})
		replicas = append(replicas, start(t, "oom-annotator", "--config", path, "--kubeconfig", c.Kubeconfig(account)))
		listen = append(listen, cfg.Annotator.Listen)
	}
	seen := func(n int) {
		t.Helper()
		eventually(t, "each replica has tried all", func() error {
			for _, l := range listen {
				if published, repeated := evictionsOf(l, "published"), evictionsOf(l, "repeated"); published+repeated < n {
					return fmt.Errorf("%s: %d published, %d repeated", l, published, repeated)
				}
			}
			return nil
		})
	}
	seen(1)
	low("after")
	defer c.DeletePod("shop", "evicted-after")
	deleted := low("deleted") // as the controllers of StatefulSets and DaemonSets do at once
	c.DeletePod("shop", deleted.Name)
	seen(3)
	if n := evictionsOf(listen[0], "published") + evictionsOf(listen[1], "published"); n != len(want) {
		t.Errorf("%d are counted as published, want %d", n, len(want))
	}
	time.Sleep(2 * r.cfg.NATS.Stream.DedupWindow) // only the subjects tell what is in the stream
	for i, p := range replicas {
		if n := evictionsOf(listen[i], "expired"); n != 1 {
			t.Errorf("replica %d: %d are counted as too old, want 1", i, n)
		}
		p.stop(t)
		start(t, "oom-annotator", p.cmd.Args[1:]...)
	}
	seen(2) // those that are still there
	for i, l := range listen {
		if n := evictionsOf(l, "published"); n != 0 {
			t.Errorf("replica %d has published %d again", i, n)
		}
	}

	all := r.evicted()
	if len(all) != len(want) {
		t.Errorf("%d evictions, want %d", len(all), len(want))
	}
	for _, e := range all {
		p := want[e.Pod.UID]
		if p.Pod == nil || e.Pod.Name != p.Name || e.Pod.Namespace != "shop" || e.Node != node || e.Message != lowMemory || !e.Time.Equal(p.at) {
			text, _ := json.Marshal(e)
			t.Errorf("eviction %s", text)
		}
	}
	for _, p := range []string{"evicted-before", "evicted-after"} {
		if pod := c.GetPod("shop", p); pod.Annotations != nil {
			t.Errorf("%s has the annotations %v", p, pod.Annotations)
		}
	}
}
