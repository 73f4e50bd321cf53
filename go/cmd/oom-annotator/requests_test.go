package main

import (
	"fmt"
	"maps"
	"net/http"
	"strings"
	"sync"
	"testing"

	"github.com/nats-io/nats.go"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
)

// requests counts what an annotator asks of NATS and of the API server.
type requests struct {
	mu    sync.Mutex
	count map[string]int
}

func (r *requests) add(what string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.count[what]++
}

// take returns the counts since the last call.
func (r *requests) take() map[string]int {
	r.mu.Lock()
	defer r.mu.Unlock()
	all := r.count
	r.count = map[string]int{}
	return all
}

func (r *requests) nats(m *nats.Msg) {
	if strings.HasPrefix(m.Reply, "$JS.ACK.") {
		return // a delivery to the test's tail
	}
	for prefix, what := range map[string]string{
		"$JS.API.STREAM.MSG.GET.OOM": "nats: is there an outcome", "$JS.API.DIRECT.GET.KV_": "nats: read budget",
		"$KV.": "nats: claim", "oom.v1.outcome.": "nats: outcome", "$JS.ACK.OOM." + name + ".": "nats: ack",
	} {
		if strings.HasPrefix(m.Subject, prefix) {
			r.add(what)
		}
	}
}

func (r *requests) api(req *http.Request) kubetest.Fault {
	if !strings.Contains(req.URL.Path, "/events") && !req.URL.Query().Has("watch") {
		r.add("api: " + req.Method)
	}
	return kubetest.Fault{}
}

// testRequests: a kill that marks its pod costs three requests to NATS that are waited for (is there an outcome, claim, outcome), an ack, and
// one request to the API server, and Events; a further kill in that pod an outcome and an ack. That they come together does not change it.
func testRequests(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	proxy := c.Proxy()
	r := newRig(t, c, proxy.Config(account), keep)
	r.ready()
	seen := &requests{count: map[string]int{}}
	const each = 20
	var all []*corev1.Pod
	for i := range 2*each + 1 {
		all = append(all, c.Pod("shop", fmt.Sprint("requests-", i), node))
	}
	// The first claim reads the budgets. The watch delivers this pod's last.
	last := all[2*each]
	e := r.killOf(last, c.ContainerID(last, "main"))
	r.publish(e)
	r.want(e.ID, "annotated/marked")
	r.settled()

	proxy.Fault(seen.api)
	sub, err := r.conn.NATS().Subscribe(">", seen.nats)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = sub.Unsubscribe() }()
	if err := r.conn.NATS().Flush(); err != nil {
		t.Fatal(err)
	}
	kills := func(pods []*corev1.Pod, repeats int, together bool) (n int) {
		for range repeats {
			for _, pod := range pods {
				r.publish(r.killOf(pod, c.ContainerID(pod, "main")))
				if n++; !together {
					r.outcome()
				}
			}
		}
		for range n {
			if together {
				r.outcome()
			}
		}
		return n
	}
	for _, step := range []struct {
		name     string
		pods     []*corev1.Pod
		repeats  int
		together bool
		marks    int
	}{
		{"first kills", all[:each], 1, false, each},
		{"further kills", all[:each], 3, false, 0},
		{"first and further kills together", all[each : 2*each], 10, true, each},
	} {
		n := kills(step.pods, step.repeats, step.together)
		r.settled()
		got := seen.take()
		want := map[string]int{"nats: outcome": n, "nats: ack": n}
		if step.marks > 0 {
			want["nats: is there an outcome"], want["nats: claim"], want["api: PATCH"] = step.marks, step.marks, step.marks
		}
		// Claims that wait for another one are stored with one update.
		if claims := got["nats: claim"]; step.together && 0 < claims && claims <= step.marks {
			want["nats: claim"] = claims
		}
		if !maps.Equal(got, want) {
			t.Errorf("%s: %d kills, %d marks: %v, want %v", step.name, n, step.marks, got, want)
		}
	}
	for _, pod := range all[:2*each] {
		if c.GetPod("shop", pod.Name).Annotations[evictMe] == "" {
			t.Errorf("%s is not marked", pod.Name)
		}
	}
}
