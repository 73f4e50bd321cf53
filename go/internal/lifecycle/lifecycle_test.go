package lifecycle

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/decide"
	"github.com/oom-tracer/oom-tracer/go/internal/mark"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// What a Tracker makes of a real API server and its Events is in go/cmd/oom-annotator.

const key = "oom-tracer.alpha.kubernetes.io/evict-me"

// stream is a stream that knows which kills were annotated, and how often it is read.
type stream struct {
	annotated map[string]string // by the ID of the kill: the pod's UID
	err       error
	reads     int
	out       []event.Outcome
}

func (s *stream) find(_ context.Context, kill, node string) (*event.Outcome, error) {
	s.reads++
	uid, ok := s.annotated[kill]
	if s.err != nil || !ok {
		return nil, s.err
	}
	return &event.Outcome{
		Kill: kill, Stage: event.StageAnnotate, Node: node, Result: event.ResultAnnotated, Reason: event.ReasonMarked,
		Pod: &event.PodRef{Namespace: "shop", Name: "cart", UID: uid},
	}, nil
}

func (s *stream) publish(o *event.Outcome) error {
	s.out = append(s.out, *o)
	return nil
}

// cluster is an API server with one pod and Events on it, and what is known of its pods.
type cluster struct {
	hit     []*pods.Pod
	pod     *corev1.Pod
	patches []string
	events  []corev1.Event
	listed  int
	err     error
}

func (c *cluster) Hit() []*pods.Pod { return c.hit }
func (c *cluster) Has(uid string) bool {
	for _, p := range c.hit {
		if p.UID == uid {
			return true
		}
	}
	return false
}

func (c *cluster) Get(context.Context, string, string) (*corev1.Pod, error) {
	return c.pod.DeepCopy(), nil
}

func (c *cluster) Patch(_ context.Context, _, _ string, patch []byte) (string, error) {
	c.patches = append(c.patches, string(patch))
	var p struct{ Metadata metav1.ObjectMeta }
	c.pod = c.pod.DeepCopy()
	err := json.Unmarshal(patch, &p)
	c.pod.Annotations = p.Metadata.Annotations
	return c.pod.ResourceVersion, err
}

func (c *cluster) PatchStatus(_ context.Context, _, _ string, patch []byte) (string, error) {
	c.patches = append(c.patches, "status "+string(patch))
	return c.pod.ResourceVersion, nil
}

func (c *cluster) list(_ context.Context, namespace, uid, reason string) ([]corev1.Event, error) {
	c.listed++
	if reason != evictionFailed || namespace != "shop" {
		return nil, fmt.Errorf("asked for %s in %s", reason, namespace)
	}
	return c.events, c.err
}

func newTracker() (*Tracker, *stream, *cluster) {
	cfg := config.Default()
	cfg.Policy.Annotation, cfg.Policy.Condition = key+"=true", "example.com/evict"
	s := &stream{annotated: map[string]string{}}
	c := &cluster{pod: &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "cart", UID: "uid-1", ResourceVersion: "7"}, Spec: corev1.PodSpec{NodeName: "node-1"}}}
	return &Tracker{
		Lifetime: time.Hour, Retention: 3 * time.Hour, Pods: c, Marker: &mark.Marker{Policy: cfg.Policy, Terms: decide.Terms(&cfg), API: c, Now: time.Now},
		Events: c.list, Annotated: s.find, Publish: s.publish, Log: slog.New(slog.DiscardHandler), Now: time.Now,
	}, s, c
}

// run runs a Tracker for a time.
func run(t *testing.T, tracker *Tracker, lasts time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), lasts)
	defer cancel()
	tracker.Run(ctx, func(context.Context, time.Time, func(bus.Stored) error) error { return nil })
}

// For marks that these annotators did not make, the stream is read for a while, and no more often than once a second: there may be many.
func TestTrackerForeign(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracker, s, c := newTracker()
		for i := range 100 {
			tracker.PodLeft(&pods.Pod{Namespace: "shop", Name: "x", UID: fmt.Sprint(i), Node: "node-1", Mark: &pods.Mark{Kill: fmt.Sprintf("boot-1-%d", i), Time: time.Now()}})
		}
		// Of another pod than the one that was annotated for the kill.
		s.annotated["boot-1-2"] = "uid-1"
		run(t, tracker, outcomeWait+5*time.Second)
		if most := 100 * int(outcomeWait/readInterval+1); s.reads > most || s.reads < 100 || len(s.out) > 0 || len(tracker.left) > 0 || c.listed > 0 {
			t.Errorf("%d reads, want at most %d; outcomes %v, %d wait still, Events asked for %d times", s.reads, most, s.out, len(tracker.left), c.listed)
		}
	})
}

// The end of a mark is published at once when its pod leaves, whenever the marks are checked next.
func TestTrackerAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracker, s, _ := newTracker()
		s.annotated["boot-1-1"] = "uid-1"
		time.AfterFunc(checkInterval/2, func() {
			tracker.PodLeft(&pods.Pod{Namespace: "shop", Name: "cart", UID: "uid-1", Node: "node-1", Mark: &pods.Mark{Kill: "boot-1-1", Time: time.Now()}})
		})
		run(t, tracker, checkInterval/2+time.Millisecond)
		if len(s.out) != 1 || len(tracker.left) > 0 {
			t.Errorf("outcomes %v, %d wait still", s.out, len(tracker.left))
		}
	})
}

// A pod leaves while the stream cannot be read, for longer than Tracker waits for its outcome.
func TestTrackerOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracker, s, _ := newTracker()
		s.err = errors.New("nats is away")
		for i := range 3 {
			tracker.PodLeft(&pods.Pod{Namespace: "shop", Name: "cart", UID: "uid-1", Node: "node-1", Evicted: i == 0, Mark: &pods.Mark{Kill: fmt.Sprint("boot-1-", i+1), Time: time.Now()}})
		}
		run(t, tracker, 2*outcomeWait)
		s.err = nil
		run(t, tracker, outcomeWait/2)
		s.annotated["boot-1-1"] = "uid-1"
		run(t, tracker, 2*outcomeWait)
		if len(s.out) != 1 || s.out[0].Result != event.ResultEvicted || s.out[0].Reason != event.ReasonEvicted || len(tracker.left) > 0 {
			t.Errorf("outcomes %+v, %d wait still", s.out, len(tracker.left))
		}
	})
}

// The end of a mark that is too old: which Event counts, and what is published if none can be read.
func TestTrackerExpired(t *testing.T) {
	// As a bubble's clock stands when it begins.
	killed := time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC).Add(-90 * time.Minute)
	at := func(after time.Duration) metav1.Time { return metav1.NewTime(killed.Add(after)) }
	micro := func(after time.Duration) metav1.MicroTime { return metav1.NewMicroTime(killed.Add(after)) }
	for _, tt := range []struct {
		name   string
		age    time.Duration // of the kill
		change func(p *pods.Pod)
		events []corev1.Event
		err    error
		want   string
	}{
		{name: "none", want: "expired/lifetime: "},
		{name: "of a kill before", events: []corev1.Event{{Message: "old", LastTimestamp: at(-time.Minute)}, {Message: "older", EventTime: micro(-time.Hour)}}, want: "expired/lifetime: "},
		{name: "the last one", events: []corev1.Event{
			{Message: "first", LastTimestamp: at(time.Minute)},
			{Message: "last", EventTime: micro(-time.Hour), Series: &corev1.EventSeries{LastObservedTime: micro(3 * time.Minute)}},
			{Message: "second", EventTime: micro(2 * time.Minute)},
		}, want: "refused/evictor: last"},
		{name: "escapes", events: []corev1.Event{{Message: "\x1b[31mred", EventTime: micro(time.Minute)}}, want: `refused/evictor: \x1b[31mred`},
		{name: "not known", err: errors.New("no"), want: "expired/lifetime: whether a descheduler refused is not known: no"},
		{name: "young", age: 30 * time.Minute},
		{name: "of long ago", age: 4 * time.Hour},
		{name: "ended", change: func(p *pods.Pod) { p.Finished = true }},
	} {
		t.Run(tt.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tracker, s, c := newTracker()
				c.events, c.err = tt.events, tt.err
				when := killed
				if tt.age > 0 {
					when = time.Now().Add(-tt.age)
				}
				p := &pods.Pod{Namespace: "shop", Name: "cart", UID: "uid-1", Node: "node-1", Mark: &pods.Mark{Kill: "boot-1-2", Time: when}}
				if tt.change != nil {
					tt.change(p)
				}
				c.hit = []*pods.Pod{p}
				s.annotated["boot-1-2"] = "uid-1"
				run(t, tracker, 3*checkInterval)
				var got string
				for _, o := range s.out {
					got += fmt.Sprintf("%s/%s: %s", o.Result, o.Reason, o.Detail)
				}
				if got != tt.want || c.listed > 1 {
					t.Errorf("published %q, want %q; Events asked for %d times", got, tt.want, c.listed)
				}
			})
		})
	}
}

// An earlier version took over the time of a node whose clock was ahead: the mark is in the future.
func TestTrackerFuture(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracker, s, c := newTracker()
		c.pod.Annotations = map[string]string{
			key: "true", tracker.Marker.Terms.Summary: fmt.Sprintf(`{"event":"boot-1-2","annotation":%q,"time":"%d-01-01T00:00:00Z"}`, key, time.Now().Year()+1),
		}
		c.hit = []*pods.Pod{tracker.Marker.Terms.Read(c.pod)}
		s.annotated["boot-1-2"] = "uid-1"
		run(t, tracker, checkInterval/2)
		if len(c.patches) != 1 || !strings.Contains(c.patches[0], `"`+key+`":null`) || len(s.out) != 1 || s.out[0].Result != event.ResultExpired {
			t.Errorf("patches %q, outcomes %+v", c.patches, s.out)
		}
	})
}

// A mark by the key of another configuration is removed at once, whether marks are set now or not.
func TestTrackerReconfigured(t *testing.T) {
	for _, key := range []string{"", "example.com/new"} {
		synctest.Test(t, func(t *testing.T) {
			tracker, s, c := newTracker()
			tracker.Marker.Terms.Mark = key
			c.pod.Annotations = map[string]string{"example.com/old": "x", tracker.Marker.Terms.Summary: `{"event":"boot-1-2","annotation":"example.com/old"}`}
			p := tracker.Marker.Terms.Read(c.pod)
			p.Mark.Time = time.Now()
			c.hit = []*pods.Pod{p}
			s.annotated["boot-1-2"] = string(p.UID)
			run(t, tracker, checkInterval/2)
			if len(s.out) != 1 || s.out[0].Result != event.ResultExpired || s.out[0].Reason != event.ReasonReconfigured {
				t.Errorf("key %q: outcomes %+v", key, s.out)
			}
			if len(c.patches) != 1 || !strings.Contains(c.patches[0], `{"annotations":{"example.com/old":null}`) {
				t.Errorf("key %q: patches %q", key, c.patches)
			}
		})
	}
}

// The mark is removed while NATS is away: the pod no longer shows how its mark ended. That is published when NATS is back.
func TestTrackerAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracker, s, c := newTracker()
		tracker.Marker.Terms.Mark = ""
		c.pod.Annotations = map[string]string{"example.com/old": "x", tracker.Marker.Terms.Summary: `{"event":"boot-1-2","annotation":"example.com/old"}`}
		p := tracker.Marker.Terms.Read(c.pod)
		p.Mark.Time = time.Now()
		c.hit = []*pods.Pod{p}
		s.annotated["boot-1-2"] = p.UID
		away := 3
		tracker.Annotated = func(ctx context.Context, kill, node string) (*event.Outcome, error) {
			if c.hit = nil; away > 0 {
				away--
				return nil, errors.New("NATS is away")
			}
			return s.find(ctx, kill, node)
		}
		run(t, tracker, checkInterval/2)
		if len(s.out) != 1 || s.out[0].Reason != event.ReasonReconfigured || len(c.patches) != 1 {
			t.Errorf("outcomes %+v, patches %q", s.out, c.patches)
		}
	})
}

// In observe-only mode the marks are not ours.
func TestTrackerObserves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		tracker, s, c := newTracker()
		tracker.Marker.Terms.Mark, tracker.Marker.Terms.Condition = "", ""
		c.hit = []*pods.Pod{{Namespace: "shop", Name: "cart", UID: "uid-1", Node: "node-1", Mark: &pods.Mark{Kill: "boot-1-2", Time: time.Now().Add(-90 * time.Minute)}}}
		s.annotated["boot-1-2"] = "uid-1"
		run(t, tracker, 3*checkInterval)
		if len(s.out) > 0 {
			t.Errorf("outcomes %v", s.out)
		}
	})
}
