package annotate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// shelf is an API server's Events. What a real one takes is tested in go/cmd/oom-annotator.
type shelf struct {
	mu     sync.Mutex
	events map[string]*corev1.Event
	writes int
	answer func(write int) error
}

func (s *shelf) next() error {
	s.writes++
	if s.answer != nil {
		return s.answer(s.writes)
	}
	return nil
}

var eventResource = schema.GroupResource{Resource: "events"}

func (s *shelf) CreateEvent(_ context.Context, e *corev1.Event) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.next(); err != nil {
		return err
	}
	if s.events[e.Namespace+"/"+e.Name] != nil {
		return fmt.Errorf("create events: %w", apierrors.NewAlreadyExists(eventResource, e.Name))
	}
	s.events[e.Namespace+"/"+e.Name] = e.DeepCopy()
	return nil
}

func (s *shelf) PatchEvent(_ context.Context, namespace, name string, patch []byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.next(); err != nil {
		return err
	}
	e := s.events[namespace+"/"+name]
	if e == nil {
		return fmt.Errorf("patch events: %w", apierrors.NewNotFound(eventResource, name))
	}
	return json.Unmarshal(patch, e)
}

// counts lists every Event as <object> <count>.
func (s *shelf) counts() map[string]int32 {
	counts := map[string]int32{}
	for _, e := range s.events {
		counts[e.InvolvedObject.Kind+" "+e.InvolvedObject.Name] += e.Count
	}
	return counts
}

func sleep(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

// writing runs a test with a writer, in a time of its own.
func writing(t *testing.T, test func(t *testing.T, v *Events, s *shelf)) {
	synctest.Test(t, func(t *testing.T) {
		s := &shelf{events: map[string]*corev1.Event{}}
		v := NewEvents(s, "host-1", slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			v.Run(ctx)
		}()
		test(t, v, s)
		cancel()
		<-done
	})
}

// podKill is the nth kill in a pod, by its own limit.
func podKill(pod string, n int) (*event.Event, *event.Outcome) {
	e := kill()
	e.ID, e.Time, e.Scope = fmt.Sprintf("%s-%d-1", pod, n), time.Now(), event.ScopeCgroup
	e.Limit = &event.Limit{Level: event.LevelPod, Max: new(uint64(8 << 20)), Usage: new(uint64(8 << 20))}
	return e, &event.Outcome{
		Kill: e.ID, Node: "node-1", Result: event.ResultSkipped, Reason: event.ReasonLevel, Container: "main",
		Pod: &event.PodRef{Namespace: "shop", Name: pod, UID: "uid-" + pod},
	}
}

// tell tells of the nth kill in a pod.
func tell(v *Events, pod string, n int) {
	e, o := podKill(pod, n)
	v.Tell(e, o, "")
}

func TestEvents(t *testing.T) {
	writing(t, func(t *testing.T, v *Events, s *shelf) {
		tell(v, "cart", 1)
		synctest.Wait()
		if len(s.events) != 1 {
			t.Fatalf("%d events", len(s.events))
		}
		for key, e := range s.events {
			if !strings.HasPrefix(key, "shop/cart.") || e.InvolvedObject.UID != "uid-cart" || e.Type != "Warning" || e.Reason != "OOMKilled" || e.Count != 1 || e.Source.Host != "host-1" {
				t.Errorf("event %s: %+v", key, e)
			}
			want := "OOM killer killed java[1] (rss ?) in container main: the pod is at the memory limit of 8.0 MiB, usage 8.0 MiB; not marked for eviction: level"
			if e.Message != want {
				t.Errorf("message %q\nwant    %q", e.Message, want)
			}
		}
		// A crash loop: few writes, and all of it in the end, though no kill comes to take it along.
		for n := range 99 {
			sleep(time.Second)
			tell(v, "cart", n+2)
		}
		sleep(2 * eventInterval)
		if diff := cmp.Diff(map[string]int32{"Pod cart": 100}, s.counts()); diff != "" || s.writes > 4 || len(s.events) != 1 {
			t.Errorf("%d writes, %d events (-want +got):\n%s", s.writes, len(s.events), diff)
		}
		// Another container, another pod, and after a while another Event.
		e, o := podKill("cart", 101)
		o.Container = "side"
		v.Tell(e, o, "")
		tell(v, "web", 1)
		synctest.Wait()
		sleep(eventLife + time.Second)
		tell(v, "web", 2)
		synctest.Wait()
		if diff := cmp.Diff(map[string]int32{"Pod cart": 101, "Pod web": 2}, s.counts()); diff != "" || len(s.events) != 4 {
			t.Errorf("%d events (-want +got):\n%s", len(s.events), diff)
		}
		if got := testutil.ToFloat64(v.kills.WithLabelValues("written")); got != 103 || testutil.ToFloat64(v.writes) != float64(s.writes) {
			t.Errorf("%g kills written, %g writes counted of %d", got, testutil.ToFloat64(v.writes), s.writes)
		}
	})
}

func TestEventsOfNode(t *testing.T) {
	writing(t, func(t *testing.T, v *Events, s *shelf) {
		e := kill()
		o := &event.Outcome{Kill: e.ID, Node: "node-1", Result: event.ResultAnnotated, Reason: event.ReasonMarked, Pod: &event.PodRef{Namespace: "shop", Name: "cart", UID: "u"}}
		v.Tell(e, o, "")
		host := kill()
		host.ID, host.Container = "boot-2-2", nil
		v.Tell(host, &event.Outcome{Kill: host.ID, Node: "node-1", Result: event.ResultSkipped, Reason: event.ReasonHost}, "")
		// What is long ago is no news, and a cgroup of the host's is not the node.
		v.Tell(kill(), &event.Outcome{Node: "node-1", Result: event.ResultSkipped, Reason: event.ReasonTooOld, Pod: o.Pod}, "")
		other := kill()
		other.Scope, other.Limit, other.Container = event.ScopeCgroup, &event.Limit{Level: event.LevelOther}, nil
		v.Tell(other, &event.Outcome{Node: "node-1", Result: event.ResultSkipped, Reason: event.ReasonHost}, "")
		synctest.Wait()
		sleep(2 * eventInterval)
		if diff := cmp.Diff(map[string]int32{"Pod cart": 1, "Node node-1": 2}, s.counts()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		for key, e := range s.events {
			if e.InvolvedObject.Kind == "Node" && (e.Namespace != "default" || e.InvolvedObject.UID != "node-1" || e.InvolvedObject.Namespace != "") {
				t.Errorf("event %s: %+v", key, e)
			}
		}
	})
}

func TestEventsFail(t *testing.T) {
	unavailable := apierrors.NewServiceUnavailable("x")
	for _, tt := range []struct {
		name            string
		answer          func(write int) error
		written, failed float64
		writes          int
	}{
		{"once", func(n int) error { return map[bool]error{true: unavailable}[n == 1] }, 2, 0, 2},
		{"a moment of network", func(n int) error { return map[bool]error{true: context.DeadlineExceeded}[n < 4] }, 2, 0, 4},
		{"for good", func(int) error { return unavailable }, 0, 2, 10},
		{"forbidden for good", func(int) error { return apierrors.NewForbidden(eventResource, "x", errors.New("no")) }, 0, 2, 10},
		{"no namespace", func(int) error { return apierrors.NewNotFound(schema.GroupResource{Resource: "namespaces"}, "shop") }, 0, 2, 1},
		{"slowly", func(n int) error {
			return map[bool]error{true: apierrors.NewGenericServerResponse(http.StatusTooManyRequests, "POST", eventResource, "x", "", 1, true)}[n == 1]
		}, 2, 0, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			writing(t, func(t *testing.T, v *Events, s *shelf) {
				s.answer = tt.answer
				tell(v, "cart", 1)
				tell(v, "cart", 2)
				synctest.Wait()
				sleep(2 * eventLife)
				written, failed := testutil.ToFloat64(v.kills.WithLabelValues("written")), testutil.ToFloat64(v.kills.WithLabelValues("failed"))
				if written != tt.written || failed != tt.failed || s.writes < tt.writes || s.writes > tt.writes+1 {
					t.Errorf("%g written, %g failed, %d writes; want %g, %g, %d", written, failed, s.writes, tt.written, tt.failed, tt.writes)
				}
				if len(v.series) > 0 {
					t.Errorf("%d series are kept for ever", len(v.series))
				}
			})
		})
	}
}

// An Event that outlived its time on the server is made again.
func TestEventsExpire(t *testing.T) {
	writing(t, func(t *testing.T, v *Events, s *shelf) {
		tell(v, "cart", 1)
		synctest.Wait()
		clear(s.events)
		tell(v, "cart", 2)
		sleep(2 * eventInterval)
		if diff := cmp.Diff(map[string]int32{"Pod cart": 2}, s.counts()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

// Who told of a kill, and ended before that was noted, makes no second Event.
func TestEventsAgain(t *testing.T) {
	writing(t, func(t *testing.T, v *Events, s *shelf) {
		e, o := podKill("cart", 1)
		v.Tell(e, o, "")
		synctest.Wait()
		again := NewEvents(s, "host-2", slog.New(slog.DiscardHandler))
		again.Tell(e, o, "")
		again.write(context.Background(), true)
		if diff := cmp.Diff(map[string]int32{"Pod cart": 1}, s.counts()); diff != "" || len(s.events) != 1 {
			t.Errorf("%d events (-want +got):\n%s", len(s.events), diff)
		}
	})
}

// A bad day of a cluster: each pod is told of once, at the pace that the API server is asked for.
func TestEventsStorm(t *testing.T) {
	writing(t, func(t *testing.T, v *Events, s *shelf) {
		for n := range maxSeries + 100 {
			tell(v, fmt.Sprint("pod-", n), 1)
		}
		sleep(10 * time.Second)
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.writes < eventsAtOnce || s.writes > eventsAtOnce+11*eventsPerSec {
			t.Errorf("%d writes in ten seconds", s.writes)
		}
		s.mu.Unlock()
		sleep(eventLife)
		s.mu.Lock()
		if len(s.events) != maxSeries || testutil.ToFloat64(v.kills.WithLabelValues("dropped")) != 100 {
			t.Errorf("%d events, %g dropped", len(s.events), testutil.ToFloat64(v.kills.WithLabelValues("dropped")))
		}
	})
}

// On the way down what is known is written, though it is not due, within a bound.
func TestEventsDrain(t *testing.T) {
	s := &shelf{events: map[string]*corev1.Event{}}
	synctest.Test(t, func(t *testing.T) {
		v := NewEvents(s, "host-1", slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(context.Background())
		go v.Run(ctx)
		tell(v, "cart", 1)
		synctest.Wait()
		tell(v, "cart", 2)
		synctest.Wait()
		before := time.Now()
		cancel()
		synctest.Wait()
		if diff := cmp.Diff(map[string]int32{"Pod cart": 2}, s.counts()); diff != "" || time.Since(before) > drainEvents {
			t.Errorf("after %s (-want +got):\n%s", time.Since(before), diff)
		}
	})
}

func TestEventNames(t *testing.T) {
	writing(t, func(t *testing.T, v *Events, s *shelf) {
		long := strings.Repeat("a", 235) + "-" + strings.Repeat("b", 17)
		e, o := podKill(long, 1)
		e.Victim.Comm = strings.Repeat("x", 5000)
		v.Tell(e, o, "")
		synctest.Wait()
		for key, e := range s.events {
			if len(e.Name) > maxEventName || strings.Contains(e.Name, "-.") || len(e.Message) > maxEventMessage {
				t.Errorf("event %s (%d bytes), message of %d", key, len(e.Name), len(e.Message))
			}
		}
		if len(s.events) != 1 {
			t.Errorf("%d events", len(s.events))
		}
	})
}

func TestEventsMetrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	registry.MustRegister(NewEvents(nil, "", slog.New(slog.DiscardHandler)))
	if n, err := testutil.GatherAndCount(registry); err != nil || n != 4 {
		t.Errorf("%d series, %v", n, err)
	}
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
}
