package main

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
)

// testClocks: the clock of a node is a year ahead, goes back, and is an hour behind. Every kill has an outcome, no mark is from the future,
// and no clock gets around a budget: the stream's time decides.
func testClocks(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	r := newRig(t, c, account, budgets(config.Budgets{Window: time.Minute, Cluster: 1000, Cooldown: time.Minute}))
	r.ready()
	const year = 365 * 24 * time.Hour
	kill := func(name, node string, ahead time.Duration, want string) (*corev1.Pod, time.Time) {
		t.Helper()
		pod := c.Pod("shop", "clocks-"+name, node)
		e := r.killOf(pod, c.ContainerID(pod, "main"))
		e.Node.Name, e.Time = node, e.Time.Add(ahead)
		r.publish(e)
		r.want(e.ID, want)
		return c.GetPod("shop", pod.Name), e.Time
	}
	began := time.Now().Add(-time.Second) // NATS runs on this machine
	pod, _ := kill("ahead", node, year, "annotated/marked")
	if marked := summary(t, pod).Time; marked.Before(began) || marked.After(time.Now()) {
		t.Errorf("with a clock a year ahead the mark is of %s", marked)
	}
	// A minute has not passed, whatever the clock of the node says.
	kill("back", node, -5*time.Minute, "skipped/budget")
	kill("ahead-again", node, year, "skipped/budget")
	// A kill that old is recorded only: nothing tells it from one that was published late.
	kill("behind", node, -time.Hour, "skipped/too_old")
	pod, at := kill("other", "worker-2", -5*time.Minute, "annotated/marked")
	if marked := summary(t, pod).Time; !marked.Equal(at) {
		t.Errorf("with a clock behind the mark is of %s, want %s", marked, at)
	}
	r.settled()
	if _, body := r.get("/metrics"); !strings.Contains(body, fmt.Sprintf(`oom_tracer_events_total{reason="clock",stage="error"} %d`, 2)) {
		t.Error("two kills came from a clock that is ahead, and the metric does not say so")
	}
}
