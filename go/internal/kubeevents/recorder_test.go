package kubeevents

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
	"unicode/utf8"

	"github.com/google/go-cmp/cmp"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// shelf is an API server's Events. What a real one takes is tested in go/cmd/oom-annotator.
type shelf struct {
	mu     sync.Mutex
	events map[string]*corev1.Event
	writes int
	reads  int
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

func (s *shelf) GetEvent(_ context.Context, namespace, name string) (*corev1.Event, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reads++
	if e := s.events[namespace+"/"+name]; e != nil {
		return e.DeepCopy(), nil
	}
	return nil, nil
}

func (s *shelf) CreateEvent(_ context.Context, e *corev1.Event) (*corev1.Event, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.next(); err != nil {
		return nil, err
	}
	if s.events[e.Namespace+"/"+e.Name] != nil {
		return nil, fmt.Errorf("create events: %w", apierrors.NewAlreadyExists(eventResource, e.Name))
	}
	e = e.DeepCopy()
	e.ResourceVersion = fmt.Sprint(s.writes)
	s.events[e.Namespace+"/"+e.Name] = e
	return e.DeepCopy(), nil
}

func (s *shelf) PatchEvent(_ context.Context, namespace, name string, patch []byte) (*corev1.Event, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.next(); err != nil {
		return nil, err
	}
	e := s.events[namespace+"/"+name]
	if e == nil {
		return nil, fmt.Errorf("patch events: %w", apierrors.NewNotFound(eventResource, name))
	}
	version := e.ResourceVersion
	changed := e.DeepCopy()
	if err := json.Unmarshal(patch, changed); err != nil {
		return nil, err
	}
	if changed.ResourceVersion != version {
		return nil, fmt.Errorf("patch events: %w", apierrors.NewConflict(eventResource, name, errors.New("changed")))
	}
	changed.ResourceVersion = fmt.Sprint(s.writes)
	s.events[namespace+"/"+name] = changed
	return changed.DeepCopy(), nil
}

// on lists the messages of the Events on an object, with their counts.
func (s *shelf) on(name string) (all []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.events {
		if e.InvolvedObject.Name == name {
			all = append(all, fmt.Sprintf("%d %s", e.Count, e.Message))
		}
	}
	return all
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

// writing runs a test with a recorder, in a time of its own.
func writing(t *testing.T, test func(t *testing.T, r *Recorder, s *shelf)) {
	synctest.Test(t, func(t *testing.T) {
		s := &shelf{events: map[string]*corev1.Event{}}
		r := NewRecorder(s, "host-1", slog.New(slog.DiscardHandler), nil)
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan struct{})
		go func() {
			defer close(done)
			r.Run(ctx)
		}()
		test(t, r, s)
		cancel()
		<-done
	})
}

// nodeKill is the nth kill in a pod, by the node.
func nodeKill(pod string, n int) (*event.Event, *event.Outcome) {
	e := &event.Event{
		Schema: event.Schema, ID: fmt.Sprintf("%s-%d-1", pod, n), Time: time.Now().UTC(), Node: event.Node{Name: "node-1"},
		Scope: event.ScopeGlobal, Outcome: event.OutcomeKilled,
		Victim:    event.Victim{PID: uint32(n), TID: uint32(n), Comm: "java", Memory: &event.Memory{AnonRSS: 1 << 20}},
		Limit:     &event.Limit{Level: event.LevelNode},
		Incident:  &event.Incident{ID: fmt.Sprintf("incident-%s-%d", pod, n)},
		Container: &event.Container{PodUID: "uid-" + pod, ContainerID: "c"},
	}
	return e, &event.Outcome{
		Kill: e.ID, Node: "node-1", Result: event.ResultAnnotated, Reason: event.ReasonMarked, Container: "main",
		Pod: &event.PodRef{Namespace: "shop", Name: pod, UID: "uid-" + pod},
	}
}

// podKill is the nth kill in a pod, by its own limit.
func podKill(pod string, n int) (*event.Event, *event.Outcome) {
	e, o := nodeKill(pod, n)
	e.Scope, e.Limit = event.ScopeCgroup, &event.Limit{Level: event.LevelPod, Max: new(uint64(8 << 20)), Usage: new(uint64(8 << 20))}
	o.Result, o.Reason = event.ResultSkipped, event.ReasonLevel
	return e, o
}

// group is the nth process of a group kill in a pod.
func group(e *event.Event, o *event.Outcome, index uint32, reason event.Reason) (*event.Event, *event.Outcome) {
	e.Incident = &event.Incident{ID: "incident-group", Group: true, Index: index}
	if o.Reason = reason; reason != event.ReasonMarked {
		o.Result = event.ResultSkipped
	}
	return e, o
}

// kill records the nth kill in a pod.
func killIn(r *Recorder, pod string, n int) { r.Record(podKill(pod, n)) }

func TestRecorder(t *testing.T) {
	writing(t, func(t *testing.T, r *Recorder, s *shelf) {
		killIn(r, "cart", 1)
		synctest.Wait()
		if len(s.events) != 1 {
			t.Fatalf("%d events", len(s.events))
		}
		for key, e := range s.events {
			if !strings.HasPrefix(key, "shop/cart.") || e.InvolvedObject.UID != "uid-cart" || e.Type != "Warning" || e.Reason != "OOMKilled" || e.Count != 1 || e.Source.Host != "host-1" {
				t.Errorf("event %s: %+v", key, e)
			}
			want := "OOM killer killed java[1] (rss 1.0 MiB) in container main: it reached its own memory limit of 8.0 MiB (pod level), usage 8.0 MiB; not marked for eviction: level (not in policy.levels)"
			if e.Message != want {
				t.Errorf("message %q\nwant    %q", e.Message, want)
			}
		}
		// A crash loop: few writes, and finally all of it, though no kill comes to take it along.
		for n := range 99 {
			sleep(time.Second)
			killIn(r, "cart", n+2)
		}
		sleep(2 * eventInterval)
		if diff := cmp.Diff(map[string]int32{"Pod cart": 100}, s.counts()); diff != "" || s.writes > 4 || len(s.events) != 1 {
			t.Errorf("%d writes, %d events (-want +got):\n%s", s.writes, len(s.events), diff)
		}
		// Another container and another pod have an Event of their own. One that is forgotten here is taken up again.
		e, o := podKill("cart", 101)
		o.Container = "side"
		r.Record(e, o)
		killIn(r, "web", 1)
		synctest.Wait()
		sleep(eventLife + 2*time.Second)
		if len(r.series) > 0 {
			t.Errorf("%d series are kept for ever", len(r.series))
		}
		killIn(r, "web", 2)
		synctest.Wait()
		if diff := cmp.Diff(map[string]int32{"Pod cart": 101, "Pod web": 2}, s.counts()); diff != "" || len(s.events) != 3 {
			t.Errorf("%d events (-want +got):\n%s", len(s.events), diff)
		}
		if got := testutil.ToFloat64(r.kills.WithLabelValues("written")); got != 103 || testutil.ToFloat64(r.writes) != float64(s.writes-1) {
			t.Errorf("%g kills written, %g writes counted of %d", got, testutil.ToFloat64(r.writes), s.writes)
		}
	})
}

// What one kill alone shows of its workload is part of the message.
func TestRecorderClause(t *testing.T) {
	writing(t, func(t *testing.T, r *Recorder, s *shelf) {
		e, o := nodeKill("cart", 1)
		e.Container.QoS = "besteffort"
		r.Record(e, o)
		e, o = podKill("web", 2)
		e.Victim.NSPID = 12
		r.Record(e, o)
		synctest.Wait()
		for pod, want := range map[string]string{
			"cart": "1 OOM killer killed java[1] (rss 1.0 MiB) in container main: the node is out of memory; it has no memory request and no limit; marked for eviction",
			"web": "1 OOM killer killed java[2] (rss 1.0 MiB) in container main: it reached its own memory limit of 8.0 MiB (pod level), usage 8.0 MiB; " +
				"a child process, the container may live on; not marked for eviction: level (not in policy.levels)",
		} {
			if got := s.on(pod); !slices.Equal(got, []string{want}) {
				t.Errorf("got  %q\nwant %q", got, want)
			}
		}
	})
}

// A group kill is one incident. Its first process is told at once, the others are added, and the count is one. The pod
// was marked for one of them, whatever is said of the others.
func TestRecorderGroup(t *testing.T) {
	writing(t, func(t *testing.T, r *Recorder, s *shelf) {
		member := func(n int, reason event.Reason) (*event.Event, *event.Outcome) {
			e, o := podKill("cart", n+1)
			e.Victim.Comm = string(rune('a' + n))
			return group(e, o, uint32(n), reason)
		}
		r.Record(member(1, event.ReasonAlready))
		synctest.Wait()
		const cause = " in container main: it reached its own memory limit of 8.0 MiB (pod level), usage 8.0 MiB"
		if want := []string{"1 OOM killer killed b[2] (rss 1.0 MiB)" + cause + "; not marked for eviction: already (the pod is marked already)"}; !slices.Equal(s.on("cart"), want) {
			t.Errorf("at once there is %q\nwant %q", s.on("cart"), want)
		}
		e, o := member(0, event.ReasonMarked)
		o.Result = event.ResultAnnotated
		r.Record(e, o)
		r.Record(member(2, event.ReasonAlready))
		r.Record(member(1, event.ReasonAlready)) // once more
		sleep(2 * firstDelay)
		want := []string{"1 OOM killer killed 3 processes: a[1], b[2], c[3] (rss 3.0 MiB in all)" + cause + "; marked for eviction"}
		if !slices.Equal(s.on("cart"), want) || s.writes != 2 {
			t.Errorf("then there is, after %d writes, %q\nwant %q", s.writes, s.on("cart"), want)
		}
		for n := range 2000 {
			r.Record(group(first(member(n%26, event.ReasonAlready)), o, uint32(n), event.ReasonAlready))
		}
		sleep(2 * eventInterval)
		if got := s.on("cart"); len(got) != 1 || !strings.HasPrefix(got[0], "1 OOM killer killed more than 1000 processes: a[1], b[2], c[3], d[4], e[5], f[6], g[7], h[8] and 992 more in container") {
			t.Errorf("of many there is %q", got)
		}
		// A further incident is a second occurrence.
		sleep(time.Second)
		killIn(r, "cart", 9)
		sleep(2 * eventInterval)
		if got := s.on("cart"); len(got) != 1 || !strings.HasPrefix(got[0], "2 OOM killer killed java[9] (rss 1.0 MiB) in container") {
			t.Errorf("finally there is %q", got)
		}
	})
}

func first(e *event.Event, _ *event.Outcome) *event.Event { return e }

// Two replicas handle the kills of one incident, and those of one crash loop: that is one Event with one count. So it is
// when one of them ends and its kills are handled again.
func TestRecorderReplicas(t *testing.T) {
	writing(t, func(t *testing.T, r *Recorder, s *shelf) {
		other := NewRecorder(s, "host-2", slog.New(slog.DiscardHandler), nil)
		ctx, cancel := context.WithCancel(context.Background())
		defer cancel()
		go other.Run(ctx)
		both := []*Recorder{r, other}
		for n := range 4 {
			e, o := nodeKill("cart", n+1)
			both[n%2].Record(group(e, o, uint32(n), event.ReasonMarked))
		}
		sleep(3 * firstDelay)
		const told = "1 OOM killer killed 4 processes: java[1], java[2], java[3], java[4] (rss 4.0 MiB in all) in container main"
		if got, want := s.on("cart"), []string{told + ": the node is out of memory; marked for eviction"}; !slices.Equal(got, want) {
			t.Errorf("on the pod there is %q\nwant %q", got, want)
		}
		if got, want := s.on("node-1"), []string{told + " of pod shop/cart: the node is out of memory; marked for eviction"}; !slices.Equal(got, want) {
			t.Errorf("on the node there is %q\nwant %q", got, want)
		}
		third := NewRecorder(s, "host-3", slog.New(slog.DiscardHandler), nil)
		for n := range 50 {
			sleep(time.Second)
			e, o := podKill("web", n)
			both[n%2].Record(e, o)
			if n >= 45 {
				third.Record(e, o)
			}
			if n%10 == 0 {
				both[1-n%2].Record(e, o) // again
			}
		}
		sleep(3 * eventInterval)
		writes := s.writes
		third.write(ctx, true)
		if diff := cmp.Diff(map[string]int32{"Pod cart": 1, "Node node-1": 1, "Pod web": 50}, s.counts()); diff != "" || len(s.events) != 3 {
			t.Errorf("%d events (-want +got):\n%s", len(s.events), diff)
		}
		if s.writes != writes+1 { // what is refused, for it is there
			t.Errorf("%d writes for what was told before", s.writes-writes)
		}
	})
}

// What the other pods used comes later, and is added to the Events of its incident, if they are about it still.
func TestRecorderComplete(t *testing.T) {
	writing(t, func(t *testing.T, r *Recorder, s *shelf) {
		e, o := nodeKill("cart", 1)
		r.Record(e, o)
		sleep(time.Second)
		r.Complete(e.Incident.ID, "other pods then used: shop/web 3.0 GiB (no request)")
		r.Complete("another", "nothing")
		sleep(2 * time.Second)
		const after = ": the node is out of memory; marked for eviction; other pods then used: shop/web 3.0 GiB (no request)"
		if got, want := s.on("cart"), []string{"1 OOM killer killed java[1] (rss 1.0 MiB) in container main" + after}; !slices.Equal(got, want) || s.writes != 4 {
			t.Errorf("on the pod there is %q\nwant %q; %d writes", got, want, s.writes)
		}
		if got, want := s.on("node-1"), []string{"1 OOM killer killed java[1] (rss 1.0 MiB) in container main of pod shop/cart" + after}; !slices.Equal(got, want) {
			t.Errorf("on the node there is %q\nwant %q", got, want)
		}
		r.Record(nodeKill("api", 2))
		r.Complete(e.Incident.ID, "too late for the node's")
		sleep(2 * eventInterval)
		if got, want := s.on("node-1"), []string{"2 OOM killer killed java[2] (rss 1.0 MiB) in container main of pod shop/api: the node is out of memory; marked for eviction"}; !slices.Equal(got, want) {
			t.Errorf("on the node there is then %q\nwant %q", got, want)
		}
	})
}

func TestRecorderNode(t *testing.T) {
	writing(t, func(t *testing.T, r *Recorder, s *shelf) {
		e, o := nodeKill("cart", 1)
		r.Record(e, o)
		host, _ := nodeKill("", 2)
		host.Container = nil
		r.Record(host, &event.Outcome{Kill: host.ID, Node: "node-1", Result: event.ResultSkipped, Reason: event.ReasonHost})
		// What is long ago is no news, and a cgroup of the host's is not the node.
		old, _ := nodeKill("cart", 3)
		r.Record(old, &event.Outcome{Node: "node-1", Result: event.ResultSkipped, Reason: event.ReasonTooOld, Pod: o.Pod})
		other, _ := nodeKill("", 4)
		other.Scope, other.Limit, other.Container = event.ScopeCgroup, &event.Limit{Level: event.LevelOther}, nil
		r.Record(other, &event.Outcome{Node: "node-1", Result: event.ResultSkipped, Reason: event.ReasonHost})
		// One incident in two pods: each pod's Event tells what becomes of it, the node's names both.
		e, o = nodeKill("cart", 5)
		two, o2 := nodeKill("web", 6)
		e.Time, two.Time = e.Time.Add(time.Second), two.Time.Add(time.Second)
		r.Record(group(e, o, 0, event.ReasonMarked))
		r.Record(group(two, o2, 1, event.ReasonBudget))
		synctest.Wait()
		sleep(2 * eventInterval)
		if diff := cmp.Diff(map[string]int32{"Pod cart": 2, "Pod web": 1, "Node node-1": 3}, s.counts()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		want := []string{"3 OOM killer killed 2 processes: java[5], java[6] (rss 2.0 MiB in all) in container main of pod shop/cart, container main of pod shop/web: the node is out of memory"}
		if got := s.on("node-1"); !slices.Equal(got, want) {
			t.Errorf("on the node there is %q\nwant %q", got, want)
		}
		for key, e := range s.events {
			if e.InvolvedObject.Kind == "Node" && (e.Namespace != "default" || e.InvolvedObject.UID != "node-1" || e.InvolvedObject.Namespace != "") {
				t.Errorf("event %s: %+v", key, e)
			}
		}
	})
}

func TestRecorderFails(t *testing.T) {
	unavailable := apierrors.NewServiceUnavailable("x")
	for _, tt := range []struct {
		name            string
		answer          func(write int) error
		written, failed float64
		writes          int
	}{
		{"once", func(n int) error { return map[bool]error{true: unavailable}[n == 1] }, 2, 0, 2},
		{"a moment of network", func(n int) error { return map[bool]error{true: context.DeadlineExceeded}[n < 4] }, 2, 0, 4},
		{"for good", func(int) error { return unavailable }, 0, 2, 14},
		{"forbidden for good", func(int) error { return apierrors.NewForbidden(eventResource, "x", errors.New("no")) }, 0, 2, 14},
		{"no namespace", func(int) error { return apierrors.NewNotFound(schema.GroupResource{Resource: "namespaces"}, "shop") }, 0, 2, 1},
		{"slowly", func(n int) error {
			return map[bool]error{true: apierrors.NewGenericServerResponse(http.StatusTooManyRequests, "POST", eventResource, "x", "", 1, true)}[n == 1]
		}, 2, 0, 2},
	} {
		t.Run(tt.name, func(t *testing.T) {
			writing(t, func(t *testing.T, r *Recorder, s *shelf) {
				s.answer = tt.answer
				killIn(r, "cart", 1)
				killIn(r, "cart", 2)
				synctest.Wait()
				sleep(2 * eventLife)
				written, failed := testutil.ToFloat64(r.kills.WithLabelValues("written")), testutil.ToFloat64(r.kills.WithLabelValues("failed"))
				if written != tt.written || failed != tt.failed || s.writes < tt.writes || s.writes > tt.writes+1 {
					t.Errorf("%g written, %g failed, %d writes; want %g, %g, %d", written, failed, s.writes, tt.written, tt.failed, tt.writes)
				}
				if len(r.series) > 0 || r.pending > 0 {
					t.Errorf("%d series, %d records are kept for ever", len(r.series), r.pending)
				}
			})
		})
	}
}

// An Event that outlived its time on the server is made again. One of its name that is somebody else's is left alone.
func TestRecorderExpired(t *testing.T) {
	writing(t, func(t *testing.T, r *Recorder, s *shelf) {
		killIn(r, "cart", 1)
		synctest.Wait()
		clear(s.events)
		sleep(time.Second)
		killIn(r, "cart", 2)
		sleep(2 * eventInterval)
		if diff := cmp.Diff(map[string]int32{"Pod cart": 2}, s.counts()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
		for _, e := range s.events {
			e.Source.Component, e.Message = "kubelet", "theirs"
		}
		again := NewRecorder(s, "host-2", slog.New(slog.DiscardHandler), nil)
		killIn(again, "cart", 3)
		again.write(context.Background(), true)
		if got, want := s.on("cart"), []string{"2 theirs"}; !slices.Equal(got, want) || testutil.ToFloat64(again.kills.WithLabelValues("failed")) != 1 {
			t.Errorf("there is %q, want %q", got, want)
		}
		// Its state may have been taken away.
		for _, e := range s.events {
			e.Source.Component, e.Annotations = component, nil
		}
		sleep(time.Second)
		killIn(again, "cart", 4)
		again.write(context.Background(), true)
		if diff := cmp.Diff(map[string]int32{"Pod cart": 3}, s.counts()); diff != "" {
			t.Errorf("-want +got:\n%s", diff)
		}
	})
}

// A bad day of a cluster: each pod is told of once, at the pace that the API server is asked for.
func TestRecorderStorm(t *testing.T) {
	writing(t, func(t *testing.T, r *Recorder, s *shelf) {
		for n := range maxSeries + 100 {
			killIn(r, fmt.Sprint("pod-", n), 1)
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
		if len(s.events) != maxSeries || testutil.ToFloat64(r.kills.WithLabelValues("dropped")) != 100 {
			t.Errorf("%d events, %g dropped", len(s.events), testutil.ToFloat64(r.kills.WithLabelValues("dropped")))
		}
	})
}

// On the way down what is known is written, though it is not due, within a bound.
func TestRecorderDrain(t *testing.T) {
	s := &shelf{events: map[string]*corev1.Event{}}
	synctest.Test(t, func(t *testing.T) {
		r := NewRecorder(s, "host-1", slog.New(slog.DiscardHandler), nil)
		ctx, cancel := context.WithCancel(context.Background())
		go r.Run(ctx)
		killIn(r, "cart", 1)
		synctest.Wait()
		killIn(r, "cart", 2)
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
	writing(t, func(t *testing.T, r *Recorder, s *shelf) {
		long := strings.Repeat("a", 235) + "-" + strings.Repeat("b", 17)
		e, o := podKill(long, 1)
		e.Victim.Comm = strings.Repeat("x", 5000)
		r.Record(e, o)
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

func TestRecorderMetrics(t *testing.T) {
	registry := prometheus.NewPedanticRegistry()
	NewRecorder(nil, "", slog.New(slog.DiscardHandler), registry)
	if n, err := testutil.GatherAndCount(registry); err != nil || n != 4 {
		t.Errorf("%d series, %v", n, err)
	}
	if problems, err := testutil.GatherAndLint(registry); err != nil || len(problems) > 0 {
		t.Errorf("lint: %v, %v", problems, err)
	}
}

// Whatever stands in an Event of that name, a kill is recorded in it within the server's bounds, or it is left alone.
func FuzzRead(f *testing.F) {
	f.Add(`{"counted":["a"],"incident":{"id":"boot-1","time":"2026-01-02T03:04:05Z","processes":[0,1],"victims":[{"index":0,"name":"java"}],"cause":"c","fate":{"rank":1,"text":"t"}}}`, component, int32(3))
	f.Add(`{"incident":{"id":"incident","processes":[9,1,9],"victims":null,"where":["","z","a"],"rss":18446744073709551615}}`, component, int32(-1))
	f.Add(`{`, "kubelet", int32(0))
	f.Fuzz(func(t *testing.T, annotation, source string, count int32) {
		s := &shelf{events: map[string]*corev1.Event{}}
		r := NewRecorder(s, "host-1", slog.New(slog.DiscardHandler), nil)
		e := &event.Event{
			ID: "boot-1-2", Time: time.Unix(1, 0), Scope: event.ScopeGlobal, Outcome: event.OutcomeKilled, Victim: event.Victim{PID: 7, Comm: "java"},
			Incident: &event.Incident{ID: "incident", Index: 1},
		}
		o := &event.Outcome{Result: event.ResultSkipped, Reason: event.ReasonLevel, Pod: &event.PodRef{Namespace: "shop", Name: "web", UID: "u"}, Container: "main"}
		r.Record(e, o)
		var name string
		for _, one := range r.series {
			name = one.name
		}
		before := &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{Namespace: "shop", Name: name, ResourceVersion: "7", Annotations: map[string]string{stateKey: annotation}},
			InvolvedObject: corev1.ObjectReference{UID: "u"}, Source: corev1.EventSource{Component: source}, Message: "before", Count: count,
		}
		s.events["shop/"+name] = before
		r.write(t.Context(), true)
		after := s.events["shop/"+name]
		if source != component {
			if after.Message != "before" || after.ResourceVersion != "7" {
				t.Errorf("somebody else's Event was changed: %+v", after)
			}
			return
		}
		if len(after.Message) > maxEventMessage || !utf8.ValidString(after.Message) || after.Message == "" {
			t.Errorf("message %q", after.Message)
		}
		if !json.Valid([]byte(after.Annotations[stateKey])) && after.ResourceVersion != "7" {
			t.Errorf("state %q", after.Annotations[stateKey])
		}
	})
}
