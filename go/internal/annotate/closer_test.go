package annotate

import (
	"cmp"
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
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// What a Closer makes of a real API server and its Events is in go/cmd/oom-annotator.

// record is a stream that knows which kills were annotated, and how often it is asked.
type record struct {
	annotated map[string]string // by the subject of the outcome: the pod's UID
	err       error
	reads     int
	out       []event.Outcome
}

func (r *record) last(_ context.Context, subject string) ([]byte, error) {
	r.reads++
	uid, ok := r.annotated[subject]
	if r.err != nil || !ok {
		return nil, cmp.Or(r.err, bus.ErrNoMessage)
	}
	return json.Marshal(event.Outcome{
		Schema: event.Schema, ID: "x", Kill: strings.TrimSuffix(strings.TrimPrefix(subject, "oom.v1.outcome."), "_annotate.node-1"), Stage: event.StageAnnotate, Time: time.Now(), Node: "node-1",
		Result: event.ResultAnnotated, Reason: event.ReasonMarked, Pod: &event.PodRef{Namespace: "shop", Name: "cart", UID: uid},
	})
}

func (r *record) Enqueue(m bus.Msg) error {
	o, err := event.ParseOutcome(m.Data)
	r.out = append(r.out, o)
	return err
}

// ward is the pods of a cluster.
type ward struct{ hit []*pods.Pod }

func (w *ward) Hit() []*pods.Pod { return w.hit }
func (w *ward) Has(uid string) bool {
	for _, p := range w.hit {
		if p.UID == uid {
			return true
		}
	}
	return false
}

func newCloser() (*Closer, *record, *ward, *bulletin) {
	cfg := config.Default()
	cfg.Policy.Condition = "example.com/evict"
	r, w, b := &record{annotated: map[string]string{}}, &ward{}, &bulletin{world: newWorld()}
	return &Closer{
		Terms: Terms(&cfg), Lifetime: time.Hour, Memory: 3 * time.Hour, API: b, Marks: w, Last: r.last, Outlet: r,
		Metrics: NewMetrics(), Log: slog.New(slog.DiscardHandler), Now: time.Now,
	}, r, w, b
}

// bulletin is an API server with Events on one pod.
type bulletin struct {
	*world
	events []corev1.Event
	asked  int
	err    error
}

func (b *bulletin) Events(_ context.Context, namespace, uid, reason string) ([]corev1.Event, error) {
	b.asked++
	if reason != evictionFailed || namespace != "shop" {
		return nil, fmt.Errorf("asked for %s in %s", reason, namespace)
	}
	return b.events, b.err
}

// run runs a Closer for a time.
func run(t *testing.T, c *Closer, lasts time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), lasts)
	defer cancel()
	c.Run(ctx, nil)
}

// Marks of another hand are asked about for a while, and no more often than once a second: there may be many.
func TestCloserForeign(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, r, _, b := newCloser()
		for i := range 100 {
			c.Leave(&pods.Pod{Namespace: "shop", Name: "x", UID: fmt.Sprint(i), Node: "node-1", Mark: &pods.Mark{Kill: fmt.Sprintf("boot-1-%d", i), Time: time.Now()}})
		}
		// Of another pod than the one that was annotated for the kill.
		r.annotated["oom.v1.outcome.boot-1-2_annotate.node-1"] = "uid-1"
		run(t, c, closeWait+5*time.Second)
		if most := 100 * int(closeWait/leaveInterval+1); r.reads > most || r.reads < 100 || len(r.out) > 0 || len(c.leaving) > 0 || b.asked > 0 {
			t.Errorf("%d reads, want at most %d; outcomes %v, %d wait still, Events asked for %d times", r.reads, most, r.out, len(c.leaving), b.asked)
		}
	})
}

// A pod leaves while the stream cannot be read, for longer than its outcome is waited for, and longer than one that is not ours.
func TestCloserOutage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, r, _, _ := newCloser()
		r.err = errors.New("nats is away")
		for i := range 3 {
			c.Leave(&pods.Pod{Namespace: "shop", Name: "cart", UID: "uid-1", Node: "node-1", Evicted: i == 0, Mark: &pods.Mark{Kill: fmt.Sprint("boot-1-", i+1), Time: time.Now()}})
		}
		run(t, c, 2*closeWait)
		r.err = nil
		run(t, c, closeWait/2)
		r.annotated["oom.v1.outcome.boot-1-1_annotate.node-1"] = "uid-1"
		run(t, c, 2*closeWait)
		if len(r.out) != 1 || r.out[0].Result != event.ResultEvicted || r.out[0].Reason != event.ReasonEvicted || len(c.leaving) > 0 {
			t.Errorf("outcomes %+v, %d wait still", r.out, len(c.leaving))
		}
	})
}

// How a mark ended whose time is over: which Event counts, and what is said where none can be read.
func TestCloserOver(t *testing.T) {
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
				c, r, w, b := newCloser()
				b.events, b.err = tt.events, tt.err
				when := killed
				if tt.age > 0 {
					when = time.Now().Add(-tt.age)
				}
				p := &pods.Pod{Namespace: "shop", Name: "cart", UID: "uid-1", Node: "node-1", Mark: &pods.Mark{Kill: "boot-1-2", Time: when}}
				if tt.change != nil {
					tt.change(p)
				}
				w.hit = []*pods.Pod{p}
				r.annotated["oom.v1.outcome.boot-1-2_annotate.node-1"] = "uid-1"
				run(t, c, 3*closeInterval)
				var got string
				for _, o := range r.out {
					got += fmt.Sprintf("%s/%s: %s", o.Result, o.Reason, o.Detail)
				}
				if got != tt.want || b.asked > 1 {
					t.Errorf("told %q, want %q; Events asked for %d times", got, tt.want, b.asked)
				}
			})
		})
	}
}

// A mark by the key of another configuration is taken back at once, whether marks are set now or not. Its time need not be over.
// A mark from the future, of an annotator that took over the time of a node whose clock was ahead.
func TestCloserFuture(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, r, w, b := newCloser()
		b.pod.Annotations = map[string]string{
			mark: "true", c.Terms.Summary: fmt.Sprintf(`{"event":"boot-1-2","annotation":%q,"time":"%d-01-01T00:00:00Z"}`, mark, time.Now().Year()+1),
		}
		w.hit = []*pods.Pod{c.Terms.Read(b.pod)}
		r.annotated["oom.v1.outcome.boot-1-2_annotate.node-1"] = "uid-1"
		run(t, c, closeInterval/2)
		if len(b.patches) != 1 || !strings.Contains(b.patches[0], `"`+mark+`":null`) || len(r.out) != 1 || r.out[0].Result != event.ResultExpired {
			t.Errorf("patches %q, outcomes %+v", b.patches, r.out)
		}
	})
}

func TestCloserReconfigured(t *testing.T) {
	for _, key := range []string{"", "example.com/new"} {
		synctest.Test(t, func(t *testing.T) {
			c, r, w, b := newCloser()
			c.Terms.Mark = key
			b.pod.Annotations = map[string]string{"example.com/old": "x", c.Terms.Summary: `{"event":"boot-1-2","annotation":"example.com/old"}`}
			p := c.Terms.Read(b.pod)
			p.Mark.Time = time.Now()
			w.hit = []*pods.Pod{p}
			r.annotated["oom.v1.outcome.boot-1-2_annotate.node-1"] = string(p.UID)
			run(t, c, closeInterval/2)
			if len(r.out) != 1 || r.out[0].Result != event.ResultExpired || r.out[0].Reason != event.ReasonReconfigured {
				t.Errorf("key %q: outcomes %+v", key, r.out)
			}
			if len(b.patches) != 1 || !strings.Contains(b.patches[0], `{"annotations":{"example.com/old":null}`) {
				t.Errorf("key %q: patches %q", key, b.patches)
			}
		})
	}
}

// The mark is gone, and NATS is away: the pod does not say any more how its mark ended. It is published when NATS is back.
func TestCloserAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, r, w, b := newCloser()
		c.Terms.Mark = ""
		b.pod.Annotations = map[string]string{"example.com/old": "x", c.Terms.Summary: `{"event":"boot-1-2","annotation":"example.com/old"}`}
		p := c.Terms.Read(b.pod)
		p.Mark.Time = time.Now()
		w.hit = []*pods.Pod{p}
		r.annotated["oom.v1.outcome.boot-1-2_annotate.node-1"] = p.UID
		away := 3
		c.Last = func(ctx context.Context, subject string) ([]byte, error) {
			if w.hit = nil; away > 0 {
				away--
				return nil, errors.New("NATS is away")
			}
			return r.last(ctx, subject)
		}
		run(t, c, closeInterval/2)
		if len(r.out) != 1 || r.out[0].Reason != event.ReasonReconfigured || len(b.patches) != 1 {
			t.Errorf("outcomes %+v, patches %q", r.out, b.patches)
		}
	})
}

// Who only observes does not see what is marked.
func TestCloserObserves(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, r, w, _ := newCloser()
		c.Terms.Mark, c.Terms.Condition = "", ""
		w.hit = []*pods.Pod{{Namespace: "shop", Name: "cart", UID: "uid-1", Node: "node-1", Mark: &pods.Mark{Kill: "boot-1-2", Time: time.Now().Add(-90 * time.Minute)}}}
		r.annotated["oom.v1.outcome.boot-1-2_annotate.node-1"] = "uid-1"
		run(t, c, 3*closeInterval)
		if len(r.out) > 0 {
			t.Errorf("outcomes %v", r.out)
		}
	})
}
