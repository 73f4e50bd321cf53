package kubetest

import (
	"context"
	"errors"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/tools/clientcmd"
)

// TestCluster: what tests build upon.
func TestCluster(t *testing.T) {
	c := Start(t)
	c.Node("node-1")
	c.Namespace("shop")
	c.Namespace("shop") // there already
	client := newClient(t, c.Annotator())

	t.Run("Pod", func(t *testing.T) { testPod(t, c.In(t)) })
	t.Run("Proxy", func(t *testing.T) { testProxy(t, c.In(t)) })

	// Last, with what was made before.
	before := c.GetPod("shop", "web")
	c.Stop()
	if _, err := client.CoreV1().Pods("shop").Get(t.Context(), "web", metav1.GetOptions{}); err == nil {
		t.Error("a stopped server answers")
	}
	c.Start()
	// With the token of before, and the roles as they were.
	c.Eventually("the server knows the annotator again", func() error {
		after, err := client.CoreV1().Pods("shop").Get(t.Context(), "web", metav1.GetOptions{})
		if err == nil && (after.UID != before.UID || after.ResourceVersion != before.ResourceVersion) {
			t.Errorf("another pod after an outage: %v, before it %v", after, before)
		}
		return err
	})
}

func testPod(t *testing.T, c *Cluster) {
	pod := c.Pod("shop", "web", "node-1", func(pod *corev1.Pod) {
		pod.Spec.InitContainers = []corev1.Container{{Name: "init", Image: "example.com/init:1"}}
		pod.Status.EphemeralContainerStatuses = []corev1.ContainerStatus{{Name: "debug", ContainerID: "cri-o://abc"}}
	})
	pod.Status.ContainerStatuses[0].LastTerminationState.Terminated = &corev1.ContainerStateTerminated{Reason: "OOMKilled", ExitCode: 137}
	pod = c.SetStatus(pod)
	if pod.UID == "" || pod.Spec.NodeName != "node-1" || pod.Spec.ServiceAccountName != "default" || pod.Status.Phase != corev1.PodRunning {
		t.Errorf("pod %v", pod)
	}
	for _, name := range []string{"main", "init"} {
		if id := c.ContainerID(pod, name); len(id) != 64 {
			t.Errorf("container %s: ID %q", name, id)
		}
	}
	if id := c.ContainerID(pod, "debug"); id != "abc" {
		t.Errorf("container debug: ID %q", id)
	}
	if got := pod.Status.ContainerStatuses[0].LastTerminationState.Terminated; got == nil || got.Reason != "OOMKilled" {
		t.Errorf("container main: terminated %v", got)
	}
}

func testProxy(t *testing.T, c *Cluster) {
	p := c.Proxy()
	// As a program would get it. The admission policy is for another account.
	cfg, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig(p.Config(c.Admin)))
	if err != nil {
		t.Fatal(err)
	}
	client := newClient(t, cfg)
	pods := client.CoreV1().Pods("shop")
	mark := func(v string) error {
		return annotate(client, "shop", "web", "", map[string]*string{evictMe: value(v)})
	}
	patches := func(fault Fault) func(*http.Request) Fault {
		return func(r *http.Request) Fault {
			if r.Method == http.MethodPatch {
				return fault
			}
			return Fault{}
		}
	}

	if err := mark("through"); err != nil {
		t.Fatal(err)
	}
	for code, is := range map[int]func(error) bool{
		401: apierrors.IsUnauthorized, 403: apierrors.IsForbidden, 404: apierrors.IsNotFound, 409: apierrors.IsConflict,
		422: apierrors.IsInvalid, 429: apierrors.IsTooManyRequests, 500: apierrors.IsInternalError,
		503: apierrors.IsServiceUnavailable, 504: apierrors.IsTimeout,
	} {
		p.Fault(patches(Fault{Code: code}))
		if err := mark("refused"); !is(err) {
			t.Errorf("%d: %v", code, err)
		}
		if got, err := pods.Get(t.Context(), "web", metav1.GetOptions{}); err != nil || got.Annotations[evictMe] != "through" {
			t.Errorf("%d: then get: %v, %v", code, got.Annotations, err)
		}
	}

	// The client itself waits as it was told to, and tries again.
	var asked atomic.Int32
	p.Fault(func(*http.Request) Fault {
		if asked.Add(1) == 1 {
			return Fault{Code: 429, RetryAfter: time.Second}
		}
		return Fault{}
	})
	begin := time.Now()
	if err := mark("again"); err != nil || asked.Load() != 2 || time.Since(begin) < time.Second {
		t.Errorf("429 with Retry-After: %v, asked %d times in %v", err, asked.Load(), time.Since(begin))
	}

	p.Fault(patches(Fault{Lost: true}))
	if err := mark("lost"); err == nil || apierrors.ReasonForError(err) != metav1.StatusReasonUnknown {
		t.Errorf("lost: %v", err)
	}
	if got := c.GetPod("shop", "web"); got.Annotations[evictMe] != "lost" {
		t.Errorf("lost: annotations %v", got.Annotations)
	}

	p.Fault(func(*http.Request) Fault { return Fault{Hang: true} })
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := pods.Get(ctx, "web", metav1.GetOptions{}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("hang: %v", err)
	}

	p.Fault(func(*http.Request) Fault { return Fault{Delay: 300 * time.Millisecond} })
	begin = time.Now()
	if _, err := pods.Get(t.Context(), "web", metav1.GetOptions{}); err != nil || time.Since(begin) < 300*time.Millisecond {
		t.Errorf("delay: %v after %v", err, time.Since(begin))
	}

	p.Fault(func(r *http.Request) Fault {
		if r.URL.Query().Get("watch") != "" {
			return Fault{Code: 410}
		}
		return Fault{}
	})
	if _, err := pods.Watch(t.Context(), metav1.ListOptions{}); !apierrors.IsResourceExpired(err) && !apierrors.IsGone(err) {
		t.Errorf("watch: %v, want it expired", err)
	}
	p.Fault(nil)
	watch, err := pods.Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer watch.Stop()
	if _, ok := <-watch.ResultChan(); !ok {
		t.Error("a watch through the proxy tells nothing")
	}
	p.Cut()
	for range watch.ResultChan() {
		// until it is closed
	}
}
