//go:build demo

package main

import (
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// moment is a line of the timeline.
type moment struct {
	at   time.Time
	what string
}

// TestDemoCluster is make demo-cluster: all parts as they ship, one real OOM kill, and what came of it, with times. It
// ends by itself, and on Ctrl-C, and leaves nothing behind.
func TestDemoCluster(t *testing.T) {
	interrupted := make(chan os.Signal, 1)
	signal.Notify(interrupted, os.Interrupt, syscall.SIGTERM)
	say := func(format string, args ...any) { fmt.Printf(format+"\n", args...) }

	say("==> starting an API server with two nodes")
	c := kubetest.Start(t)
	c.Node(node)
	c.Node("worker-2")
	c.Namespace("shop")
	account := c.Annotator()
	c.Apply("deploy/manifests/descheduler/rbac.yaml")
	pod, other := c.Pod("shop", "cart-5d4f-x7", node, replicaSet), c.Pod("shop", "web-5d4f-k2", node, replicaSet)
	audited := len(c.Audit())

	say("==> starting oom-tracer with its NATS, oom-annotator, and oom-descheduler, which comes every 5 s")
	root := oomtest.New(t, 512<<20)
	r := &rig{t: t, kubeconfig: c.Kubeconfig(account)}
	r.cfg, r.configPath = newConfig(t, func(cfg *config.Config) {
		cfg.Node.CgroupRoot = root.Path()
		cfg.Policy.InferredLimits = true // without hooks the kernel's stack tells whose limit it was
		cfg.Policy.Budgets = config.Default().Policy.Budgets
		cfg.Log.Level = "warn"
	})
	start(t, "oom-tracer", "--config", r.configPath, "--node-name", node)
	r.start()
	r.connect()
	r.tail()
	r.ready()
	startDescheduler(t, c, "oom-descheduler", "deploy/descheduler/policy.yaml", "5s")

	events, err := c.Client.CoreV1().Events("shop").Watch(t.Context(), metav1.ListOptions{FieldSelector: "involvedObject.kind=Pod,reason=OOMKilled"})
	if err != nil {
		t.Fatal(err)
	}
	described := make(chan moment, 100)
	go func() {
		for e := range events.ResultChan() { // until the test ends
			if v, ok := e.Object.(*corev1.Event); ok {
				described <- moment{time.Now(), v.Message} // its own times are in seconds
			}
		}
	}()

	say("==> a container allocates, until all pods of %s together are at their limit of 48 MiB\n", node)
	kubepods := oomtest.Child(t, root, "kubepods", 48<<20)
	burstable := oomtest.Child(t, kubepods, "burstable", cgroupfs.Unlimited)
	container := func(p *corev1.Pod) *cgroupfs.Cgroup {
		return oomtest.Child(t, oomtest.Child(t, burstable, "pod"+string(p.UID), cgroupfs.Unlimited), c.ContainerID(p, "main"), cgroupfs.Unlimited)
	}
	oomtest.Hold(t, container(other), 8)
	if killed := oomtest.Storm(t, container(pod), 1, 96, "plain"); len(killed) != 1 {
		t.Fatalf("%d were killed", len(killed))
	}
	var moments []moment
	add := func(at time.Time, format string, args ...any) {
		moments = append(moments, moment{at, fmt.Sprintf(format, args...)})
	}
	var kill event.Event
	for last := false; !last; {
		select {
		case o := <-r.outcomes:
			add(o.Time, "oom-annotator %s/%s, container %s: %s (%s)", o.Pod.Namespace, o.Pod.Name, o.Container, o.Result, o.Reason)
		case o := <-r.closed:
			add(o.Time, "the last word on it: %s (%s) of %s/%s", o.Result, o.Reason, o.Pod.Namespace, o.Pod.Name)
			last = true
		case s := <-interrupted:
			t.Fatalf("%s: ending", s)
		case <-time.After(patience):
			t.Fatal("nothing more happens")
		}
	}
	err = bus.Tail(t.Context(), r.conn, bus.TailOptions{Subjects: []string{"oom.v1.kill.>"}, Since: time.Unix(0, 0)}, func(m bus.Stored) (err error) {
		if kill, err = event.Parse(m.Data); err == nil {
			add(kill.Time, "the kernel killed %s[%d], tier %s: limit of the level %s, %d MiB", kill.Victim.Comm, kill.Victim.PID, kill.Node.Tier, kill.Limit.Level, *kill.Limit.Max>>20)
			add(m.Time, "NATS has the event, on %s", m.Subject)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range c.Audit()[audited:] {
		add(e.RequestReceivedTimestamp.Time, "the API server is asked for %s of %s/%s by %s: %d", e.ObjectRef.Subresource, e.ObjectRef.Namespace, e.ObjectRef.Name, e.User.Username, e.ResponseStatus.Code)
	}
	named := r.others()
	add(named.Time, "%s", named.Detail)
	for what := "Event on the pod, as kubectl describe shows it"; ; what = "the Event is completed" {
		select {
		case m := <-described:
			add(m.at, "%s: %s", what, m.what)
		case <-time.After(patience):
			t.Fatal("no Event, or it is not completed")
		}
		if strings.Contains(moments[len(moments)-1].what, named.Detail) {
			break
		}
	}
	for len(moments) > 0 {
		first := 0
		for i, m := range moments {
			if m.at.Before(moments[first].at) {
				first = i
			}
		}
		m := moments[first]
		moments = append(moments[:first], moments[first+1:]...)
		say("%s  %+9.3f s  %s", m.at.UTC().Format("15:04:05.000"), m.at.Sub(kill.Time).Seconds(), m.what)
	}
	say("")
}
