package main

import (
	"fmt"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
)

// testReplicas: three annotators share the kills, and are killed in the middle of a patch time and again: before
// the server has it, and when it is done and nobody can tell of it any more. Each kill has one outcome, and each
// pod is changed once.
func testReplicas(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	const podCount, killsOfEach, deaths = 60, 4, 6
	r := newBus(t, keep)
	type replica struct {
		process atomic.Pointer[process]
		args    []string
		patches atomic.Int32
	}
	var patches, died atomic.Int32
	dead := make(chan *replica, deaths)
	var replicas []*replica
	for range 3 {
		proxy := c.Proxy()
		_, configPath := newConfig(t, func(cfg *config.Config) { cfg.NATS.Embedded = r.cfg.NATS.Embedded })
		one := &replica{args: []string{"--config", configPath, "--kubeconfig", c.Kubeconfig(proxy.Config(account))}}
		proxy.Fault(func(req *http.Request) kubetest.Fault {
			if !patchesPod(req) {
				return kubetest.Fault{}
			}
			one.patches.Add(1)
			if patches.Add(1)%4 != 0 || one.process.Load().ended() {
				return kubetest.Fault{}
			}
			n := died.Add(1)
			if n > deaths {
				return kubetest.Fault{}
			}
			one.process.Load().kill()
			dead <- one
			if n%2 == 0 {
				return kubetest.Fault{Lost: true}
			}
			return kubetest.Fault{Hang: true}
		})
		one.process.Store(start(t, "oom-annotator", one.args...))
		replicas = append(replicas, one)
	}

	var events []event.Event
	podOf := map[string]*corev1.Pod{} // by the kill's ID
	var last *corev1.Pod
	for i := range podCount {
		last = c.Pod("shop", fmt.Sprint("replicas-", i), node)
		for range killsOfEach {
			e := r.killOf(last, "")
			podOf[e.ID] = last
			events = append(events, e)
		}
	}
	changes, err := c.Client.CoreV1().Pods("shop").Watch(t.Context(), metav1.ListOptions{ResourceVersion: last.ResourceVersion})
	if err != nil {
		t.Fatal(err)
	}
	defer changes.Stop()
	r.publish(events...)

	outcomes := map[string][]event.Outcome{} // by the kill's ID
	for deadline := time.After(4 * patience); len(outcomes) < len(events); {
		select {
		case o := <-r.outcomes:
			outcomes[o.Kill] = append(outcomes[o.Kill], o)
		case one := <-dead:
			one.process.Store(start(t, "oom-annotator", one.args...))
		case <-deadline:
			t.Fatalf("%d of %d outcomes", len(outcomes), len(events))
		}
	}
	r.settled()
	if n := died.Load(); n < deaths {
		t.Errorf("annotators were killed %d times, want %d", n, deaths)
	}
	for i, one := range replicas {
		if one.patches.Load() == 0 {
			t.Errorf("annotator %d had nothing to do", i)
		}
	}
	for len(r.outcomes) > 0 { // one too many
		o := <-r.outcomes
		outcomes[o.Kill] = append(outcomes[o.Kill], o)
	}
	marks := map[string]string{} // the kill's ID, by that of the pod
	for kill, all := range outcomes {
		pod := podOf[kill]
		if len(all) != 1 || all[0].Pod == nil || all[0].Pod.UID != string(pod.UID) {
			t.Errorf("kill %s of %s has the outcomes %+v", kill, pod.Name, all)
		}
		switch o := all[0]; o.Reason {
		case event.ReasonMarked:
			if was, ok := marks[string(pod.UID)]; ok {
				t.Errorf("%s is marked for %s and %s", pod.Name, was, kill)
			}
			marks[string(pod.UID)] = kill
		case event.ReasonAlready:
		default:
			t.Errorf("outcome %+v", o)
		}
	}
	if len(marks) != podCount {
		t.Errorf("%d pods are marked, want %d", len(marks), podCount)
	}
	// A pod after it tells that all that went before was seen.
	c.Pod("shop", "replicas-end", node)
	changed := map[string]int{}
	for e := range changes.ResultChan() {
		pod := e.Object.(*corev1.Pod)
		if pod.Name == "replicas-end" {
			break
		}
		if e.Type != watch.Modified {
			continue
		}
		changed[pod.Name]++
		if kill := marks[string(pod.UID)]; changed[pod.Name] != 1 || pod.Annotations[evictMe] != "true" || summary(t, pod).Event != kill {
			t.Errorf("change %d of %s: %v, marked for %s", changed[pod.Name], pod.Name, pod.Annotations, kill)
		}
	}
	if len(changed) != podCount {
		t.Errorf("%d pods were changed, want %d", len(changed), podCount)
	}
}
