package main

import (
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
)

// These tests are about what "kubectl describe" shows. They run as TestEndToEnd does.

func TestEvents(t *testing.T) {
	c := kubetest.Start(t)
	c.Namespace("shop")
	account := c.Annotator()
	for name, test := range map[string]func(*testing.T, *kubetest.Cluster, *rest.Config){
		"Texts": testEventTexts, "Neighbours": testEventNeighbours, "Incident": testEventIncident, "ExitCode": testEventExitCode, "Latency": testEventLatency,
	} {
		t.Run(name, func(t *testing.T) {
			c := c.In(t)
			c.Node(onNode(t))
			test(t, c, account)
		})
	}
}

// onNode is the node of a test: what is told on it is told by that test alone.
func onNode(t *testing.T) string {
	return "node-" + strings.ToLower(t.Name()[strings.LastIndexByte(t.Name(), '/')+1:])
}

// killOn is a kill of a pod's container by the limit of the test's node.
func (r *rig) killOn(pod *corev1.Pod, containerID string) event.Event {
	e := r.killOf(pod, containerID)
	e.Node.Name = onNode(r.t)
	e.Incident = &event.Incident{ID: "incident-" + e.ID}
	return e
}

// eventsOn lists the Events on a pod or a node, with their counts.
func eventsOn(t *testing.T, c *kubetest.Cluster, uid string) (all []string) {
	t.Helper()
	list, err := c.Client.CoreV1().Events("").List(t.Context(), metav1.ListOptions{FieldSelector: fields.Set{"involvedObject.uid": uid}.String()})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range list.Items {
		if e.Type != corev1.EventTypeWarning || e.Reason != "OOMKilled" || e.Source.Component != "oom-tracer" || e.ReportingController != "oom-tracer" {
			t.Errorf("event %+v", e)
		}
		all = append(all, fmt.Sprintf("%d %s", e.Count, e.Message))
	}
	return all
}

// wantEvents waits until there are just these.
func wantEvents(t *testing.T, c *kubetest.Cluster, uid string, want ...string) {
	t.Helper()
	eventually(t, "the Events on "+uid, func() error {
		if got := eventsOn(t, c, uid); !slices.Equal(got, want) {
			return fmt.Errorf("there are\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
		}
		return nil
	})
}

func observing(cfg *config.Config) { cfg.Policy.Annotation = "" }

// testEventTexts: each kill is told in Kubernetes, whatever is done about it.
func testEventTexts(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	pod := c.Pod("shop", "told", onNode(t))
	r := newRig(t, c, account, observing)
	r.ready()
	e, own, host := r.killOn(pod, c.ContainerID(pod, "main")), r.killOn(pod, c.ContainerID(pod, "main")), r.killOn(pod, "")
	e.Victim.Memory = &event.Memory{AnonRSS: 200 << 20}
	own.Scope, own.Limit = event.ScopeCgroup, &event.Limit{Level: event.LevelPod, Max: new(uint64(8 << 20)), Usage: new(uint64(8 << 20))}
	host.Container = nil
	r.publish(e)
	r.want(e.ID, "observed/observe_only")
	const fate = "the node is out of memory; not marked for eviction: observe only (policy.annotation is empty)"
	wantEvents(t, c, string(pod.UID), fmt.Sprintf("1 OOM killer killed java[%d] (rss 200.0 MiB) in container main: %s", e.Victim.PID, fate))
	wantEvents(t, c, onNode(t), fmt.Sprintf("1 OOM killer killed java[%d] (rss 200.0 MiB) in container main of pod shop/told: %s", e.Victim.PID, fate))
	r.publish(own, host)
	r.outcome()
	r.outcome()
	// What follows is written with the next one, a minute later, or on the way down.
	r.annotator.stop(t)
	wantEvents(t, c, string(pod.UID), fmt.Sprintf("2 OOM killer killed java[%d] in container main: it reached its own memory limit of 8.0 MiB (pod level), usage 8.0 MiB; not marked for eviction: level (not in policy.levels)", own.Victim.PID))
	wantEvents(t, c, onNode(t), fmt.Sprintf("2 OOM killer killed java[%d]: the node is out of memory; not marked for eviction: host (not in a pod)", host.Victim.PID))

	// Whoever comes after it takes the same Event up.
	r.start()
	r.ready()
	own = r.killOn(pod, c.ContainerID(pod, "main"))
	own.Scope, own.Limit = event.ScopeCgroup, &event.Limit{Level: event.LevelContainer, Max: new(uint64(8 << 20))}
	r.publish(own)
	r.want(own.ID, "skipped/level")
	wantEvents(t, c, string(pod.UID), fmt.Sprintf("3 OOM killer killed java[%d] in container main: it reached its own memory limit of 8.0 MiB (container level); not marked for eviction: level (not in policy.levels)", own.Victim.PID))
}

// testEventNeighbours: an Event does not wait for what the other pods used. That is added when it is known, by their
// names, and published on NATS as well. The victim is none of the others.
func testEventNeighbours(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, observing)
	r.ready()
	greedy := c.Pod("shop", "greedy", onNode(t), func(p *corev1.Pod) {
		p.Spec.Containers[0].Resources.Requests = corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("512Mi")}
	})
	pod := c.Pod("shop", "small", onNode(t))
	e, other := r.killOn(pod, ""), r.killOn(greedy, "")
	r.publish(e)
	r.want(e.ID, "observed/observe_only")
	const (
		cause = ": the node is out of memory; not marked for eviction: observe only (policy.annotation is empty)"
		after = "other pods then used: shop/greedy 3.0 GiB (request 512.0 MiB), pod unheard-of 1 B"
	)
	onPod := func(e event.Event) string { return fmt.Sprintf("OOM killer killed java[%d]", e.Victim.PID) }
	wantEvents(t, c, string(pod.UID), "1 "+onPod(e)+cause)
	wantEvents(t, c, onNode(t), "1 "+onPod(e)+" in pod shop/small"+cause)
	r.neighbours(e, event.PodMemory{PodUID: string(greedy.UID), Usage: 3 << 30}, event.PodMemory{PodUID: string(pod.UID), Usage: 4096}, event.PodMemory{PodUID: "unheard-of", Usage: 1})
	if o := r.others(); o.Kill != e.ID || o.Detail != after || o.Pod == nil || o.Pod.Name != "small" {
		t.Errorf("outcome %+v", o)
	}
	wantEvents(t, c, string(pod.UID), "1 "+onPod(e)+cause+"; "+after)
	wantEvents(t, c, onNode(t), "1 "+onPod(e)+" in pod shop/small"+cause+"; "+after)
	// At its own limit there is what held the memory. Others' messages on the same subject are not in the way.
	cache := c.Pod("shop", "cache", onNode(t))
	own, later := r.killOn(cache, ""), r.killOn(cache, "")
	own.Scope, own.Limit = event.ScopeCgroup, &event.Limit{Level: event.LevelContainer, Max: new(uint64(512 << 20))}
	later.Scope, later.Limit = own.Scope, own.Limit
	used := event.Neighbours{Breakdown: &event.Breakdown{Source: event.SourceStat, Limit: own.Limit, Shmem: new(uint64(430 << 20))}}
	r.publish(own)
	r.after(own, used)
	r.after(later, event.Neighbours{})
	r.want(own.ID, "skipped/level")
	const tmpfs = "of 512.0 MiB, 430.0 MiB were tmpfs or shared memory"
	if o := r.others(); o.Kill != own.ID || o.Detail != tmpfs || o.Pod == nil || o.Pod.Name != "cache" {
		t.Errorf("outcome %+v", o)
	}
	wantEvents(t, c, string(cache.UID), fmt.Sprintf("1 %s: it reached its own memory limit of 512.0 MiB (container level); not marked for eviction: level (not in policy.levels); %s", onPod(own), tmpfs))
	// What was told for another incident is not told for this one.
	r.publish(other)
	r.want(other.ID, "observed/observe_only")
	time.Sleep(5 * time.Second)
	r.annotator.stop(t)
	wantEvents(t, c, string(greedy.UID), "1 "+onPod(other)+cause)
	wantEvents(t, c, onNode(t), "2 "+onPod(other)+" in pod shop/greedy"+cause)
	select {
	case o := <-r.named:
		t.Errorf("one more outcome: %+v", o)
	default:
	}
}

// testEventIncident: two replicas handle the kills of one incident. There is one Event on the pod, for one occurrence,
// and it names all of them. So it is with a crash loop.
func testEventIncident(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	pod, loop := c.Pod("shop", "group", onNode(t)), c.Pod("shop", "loop", onNode(t))
	r := newRig(t, c, account, keep)
	r.ready()
	second := &rig{t: t, kubeconfig: r.kubeconfig}
	second.cfg, second.configPath = newConfig(t, func(cfg *config.Config) { cfg.NATS = r.cfg.NATS })
	second.start()
	second.ready()
	const killed = 12
	var all []event.Event
	for n := range killed {
		e := r.killOn(pod, c.ContainerID(pod, "main"))
		e.Victim.Comm, e.Incident = string(rune('a'+n)), &event.Incident{ID: "incident-group", Group: true, Index: uint32(n)}
		all = append(all, e)
	}
	r.publish(all...)
	for range all {
		if o := r.outcome(); o.Reason != event.ReasonMarked && o.Reason != event.ReasonAlready {
			t.Errorf("outcome %+v", o)
		}
	}
	var names []string
	for _, e := range all[:8] {
		names = append(names, fmt.Sprintf("%s[%d]", e.Victim.Comm, e.Victim.PID))
	}
	text := fmt.Sprintf("1 OOM killer killed 12 processes: %s and 4 more in container main", strings.Join(names, ", "))
	wantEvents(t, c, string(pod.UID), text+": the node is out of memory; marked for eviction")
	wantEvents(t, c, onNode(t), text+" of pod shop/group: the node is out of memory; marked for eviction")

	const kills = 20
	var last event.Event
	for range kills {
		last = r.killOn(loop, c.ContainerID(loop, "main"))
		last.Scope, last.Limit = event.ScopeCgroup, &event.Limit{Level: event.LevelPod, Max: new(uint64(8 << 20))}
		r.publish(last)
		r.outcome()
	}
	r.settled()
	// All of it is consumed once more.
	if err := r.conn.JetStream().DeleteConsumer(t.Context(), event.StreamName, name); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the consumer is made again", func() error {
		_, err := r.conn.JetStream().Consumer(t.Context(), event.StreamName, name)
		return err
	})
	r.settled()
	r.annotator.stop(t)
	second.annotator.stop(t)
	wantEvents(t, c, string(pod.UID), text+": the node is out of memory; marked for eviction")
	wantEvents(t, c, string(loop.UID), fmt.Sprintf("%d OOM killer killed java[%d] in container main: it reached its own memory limit of 8.0 MiB (pod level); not marked for eviction: level (not in policy.levels)", kills, last.Victim.PID))
	if !strings.Contains(r.annotator.out.String(), "shop/loop") || !strings.Contains(second.annotator.out.String(), "shop/loop") {
		t.Error("one of the replicas had nothing to do")
	}
}

// testEventExitCode: of a container that the node's OOM killer killed containerd says Error and 137, as of any that got
// a SIGKILL. That it was the node that was out of memory is told by the Event.
func testEventExitCode(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, keep)
	r.ready()
	pod := c.Pod("shop", "exited", onNode(t))
	id := c.ContainerID(pod, "main")
	pod.Status.ContainerStatuses = []corev1.ContainerStatus{{
		Name: "main", ContainerID: "containerd://" + kubetest.NewContainerID(), RestartCount: 1,
		State:                corev1.ContainerState{Running: &corev1.ContainerStateRunning{}},
		LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 137, Reason: "Error", ContainerID: "containerd://" + id}},
	}}
	pod = c.SetStatus(pod)
	if s := pod.Status.ContainerStatuses[0].LastTerminationState.Terminated; s.Reason != "Error" || s.ExitCode != 137 {
		t.Fatalf("status %+v", s)
	}
	seen := r.killOn(c.Pod("shop", "exited-after", onNode(t)), "") // whose outcome comes when this pod, and so the status, is known
	seen.Scope, seen.Limit = event.ScopeCgroup, &event.Limit{Level: event.LevelContainer}
	r.publish(seen)
	r.want(seen.ID, "skipped/level")
	e := r.killOn(pod, id)
	r.publish(e)
	o := r.want(e.ID, "annotated/marked")
	if o.Container != "main" || summary(t, c.GetPod("shop", "exited")).Scope != "global" {
		t.Errorf("outcome %+v", o)
	}
	wantEvents(t, c, string(pod.UID), fmt.Sprintf("1 OOM killer killed java[%d] in container main (1 restart): the node is out of memory; marked for eviction", e.Victim.PID))
	wantEvents(t, c, onNode(t), fmt.Sprintf("1 OOM killer killed java[%d] in container main (1 restart) of pod shop/exited: the node is out of memory; marked for eviction", e.Victim.PID))
}

// testEventLatency: from a node's kill to the Event on its pod, without what the other pods used.
func testEventLatency(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	proxy := c.Proxy()
	var created atomic.Int64
	proxy.Fault(func(req *http.Request) kubetest.Fault {
		if req.Method == http.MethodPost && strings.Contains(req.URL.Path, "/namespaces/shop/events") {
			created.CompareAndSwap(0, time.Now().UnixNano())
		}
		return kubetest.Fault{}
	})
	r := newRig(t, c, proxy.Config(account), observing)
	r.ready()
	var all []time.Duration
	for n := range 20 {
		e := r.killOn(c.Pod("shop", fmt.Sprint("latency-", n), onNode(t)), "")
		created.Store(0)
		e.Time = time.Now().UTC()
		r.publish(e)
		eventually(t, "the Event is written", func() error {
			if created.Load() == 0 {
				return fmt.Errorf("not yet")
			}
			return nil
		})
		all = append(all, time.Unix(0, created.Load()).Sub(e.Time))
	}
	slices.Sort(all)
	t.Logf("kill to Event: p50 %s, max %s", all[len(all)/2].Round(time.Millisecond), all[len(all)-1].Round(time.Millisecond))
	if p50 := all[len(all)/2]; p50 > time.Second {
		t.Errorf("p50 %s: the Event waits for something", p50)
	}
}
