package pods_test

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// TestWatcher: against a real API server in trouble, every pod becomes known, and all pods are never listed in a loop.
func TestWatcher(t *testing.T) {
	c := kubetest.Start(t)
	c.Namespace("shop")
	const count = 1100 // five pages
	for i := range count {
		c.Pod("shop", fmt.Sprint("pod-", i), "node-1")
	}
	// What a server before Kubernetes 1.34 answers.
	paged := func(r *http.Request) bool { return r.URL.Query().Has("sendInitialEvents") }

	for _, tt := range []struct {
		name  string
		fault func(r *http.Request, lists, watches int) kubetest.Fault
		// How many requests for a list, and for a stream of all pods, there may be.
		lists, streams int
	}{
		{"stream", func(*http.Request, int, int) kubetest.Fault { return kubetest.Fault{} }, 0, 1},
		{"cold watch cache", func(r *http.Request, _, watches int) kubetest.Fault {
			if watches < 3 {
				return kubetest.Fault{Code: 429, RetryAfter: time.Second}
			}
			return kubetest.Fault{}
		}, 0, 3},
		{"pages", func(r *http.Request, _, _ int) kubetest.Fault {
			if paged(r) {
				return kubetest.Fault{Code: 422}
			}
			return kubetest.Fault{}
		}, 5, 1},
		// Every third request: a list that began anew each time would never be complete.
		{"pages, too many requests", func(r *http.Request, lists, _ int) kubetest.Fault {
			switch {
			case paged(r):
				return kubetest.Fault{Code: 422}
			case lists%3 == 0:
				return kubetest.Fault{Code: 429}
			case lists == 4:
				return kubetest.Fault{Code: 500} // etcd changes its leader
			}
			return kubetest.Fault{}
		}, 8, 4},
		{"pages, an expired token", func(r *http.Request, lists, _ int) kubetest.Fault {
			switch {
			case paged(r):
				return kubetest.Fault{Code: 422}
			case lists == 4:
				return kubetest.Fault{Code: 410}
			}
			return kubetest.Fault{}
		}, 9, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			c := c.In(t)
			proxy := c.Proxy()
			var lists, watches, streams atomic.Int32
			proxy.Fault(func(r *http.Request) kubetest.Fault {
				switch {
				case paged(r):
					streams.Add(1)
					watches.Add(1)
				case r.URL.Query().Get("watch") != "":
					watches.Add(1)
				default:
					lists.Add(1)
				}
				return tt.fault(r, int(lists.Load()), int(watches.Load()))
			})
			client, err := pods.NewClient(proxy.Config(c.Admin), "test", 0, 0)
			if err != nil {
				t.Fatal(err)
			}
			store := pods.NewStore(time.Minute)
			w := pods.NewWatcher(client, store, pods.Terms{}, slog.New(slog.DiscardHandler))
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan struct{})
			go func() {
				defer close(done)
				w.Run(ctx)
			}()
			defer func() { cancel(); <-done }()
			select {
			case <-w.Synced():
			case <-time.After(time.Minute):
				t.Fatalf("not synced after %d lists and %d streams: %v", lists.Load(), streams.Load(), w.Failing())
			}
			if n := store.Len(); n < count {
				t.Errorf("%d pods are known, want %d", n, count)
			}

			// What happens from now on is seen, also after a proxy or a server in trouble has ended the watch.
			seen := func(pod string, want bool) {
				t.Helper()
				p := c.GetPod("shop", pod)
				c.Eventually(fmt.Sprint(pod, " is known: ", want), func() error {
					if err := w.Failing(); err != nil {
						return err
					}
					if store.Has(string(p.UID)) != want {
						return fmt.Errorf("%d pods", store.Len())
					}
					return nil
				})
			}
			name := fmt.Sprint("new-", time.Now().UnixNano())
			c.Pod("shop", name, "node-1")
			seen(name, true)
			n := 0
			proxy.Fault(func(*http.Request) kubetest.Fault {
				if n++; n > 2 {
					return kubetest.Fault{}
				}
				return kubetest.Fault{Code: 503}
			})
			proxy.Cut()
			c.Pod("shop", name+"-2", "node-1")
			seen(name+"-2", true)
			// A version that the server no longer keeps: what was deleted meanwhile is gone from a list.
			if tt.name == "stream" || tt.name == "pages" {
				tt.lists, tt.streams = 2*tt.lists+1, tt.streams+1 // the pods of the first list, and two more
				gone := c.GetPod("shop", name)
				proxy.Fault(func(*http.Request) kubetest.Fault { return kubetest.Fault{Code: 503} })
				proxy.Cut()
				if err := c.Client.CoreV1().Pods("shop").Delete(t.Context(), name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)}); err != nil {
					t.Fatal(err)
				}
				n = 0
				proxy.Fault(func(r *http.Request) kubetest.Fault {
					if n++; n == 1 {
						return kubetest.Fault{Code: 410}
					}
					if paged(r) {
						streams.Add(1)
					} else if r.URL.Query().Get("watch") == "" {
						lists.Add(1)
					}
					return tt.fault(r, int(lists.Load()), int(watches.Load()))
				})
				c.Eventually("the deleted pod is gone", func() error {
					if err := w.Failing(); err != nil || store.Has(string(gone.UID)) {
						return fmt.Errorf("known still, %v", err)
					}
					return nil
				})
				if n := store.Len(); n < count {
					t.Errorf("%d pods are known then, want %d", n, count)
				}
			}
			if l, s := int(lists.Load()), int(streams.Load()); l > tt.lists || s > tt.streams {
				t.Errorf("%d lists and %d streams, want at most %d and %d", l, s, tt.lists, tt.streams)
			}
		})
	}
}
