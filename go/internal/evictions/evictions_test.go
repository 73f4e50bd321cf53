package evictions

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// What a Publisher makes of a real API server and a real stream is in go/cmd/oom-annotator.

const keep = time.Hour

func evicted(name, node string, age time.Duration) *pods.Pod {
	return &pods.Pod{Namespace: "shop", Name: name, UID: "uid-" + name, Node: node, LowMemory: &pods.LowMemory{Time: time.Now().Add(-age), Message: "memory"}}
}

// stream stores one message on each subject.
type stream struct {
	stored   map[string]bool
	attempts []time.Time
	fail     func(attempt int) error // after it has stored
}

func (s *stream) store(_ context.Context, m bus.Msg) (bool, error) {
	s.attempts = append(s.attempts, time.Now())
	before := s.stored[m.Subject]
	if s.fail != nil {
		if err := s.fail(len(s.attempts)); err != nil {
			return false, err
		}
	}
	s.stored[m.Subject] = true
	return before, nil
}

// run publishes for a time. It returns the counts, and what was logged.
func run(t *testing.T, s *stream, d time.Duration, add func(*Publisher)) (counts map[string]int, log string) {
	t.Helper()
	var out strings.Builder
	p := New(prometheus.NewRegistry(), keep, slog.New(slog.NewTextHandler(&out, nil)))
	p.Store = s.store
	add(p)
	ctx, cancel := context.WithTimeout(t.Context(), d)
	defer cancel()
	p.Run(ctx)
	counts = map[string]int{}
	for _, result := range []string{"published", "repeated", "expired", "failed", "dropped"} {
		if n := testutil.ToFloat64(p.results.WithLabelValues(result)); n > 0 {
			counts[result] = int(n)
		}
	}
	return counts, out.String()
}

func want(t *testing.T, got map[string]int, want string) {
	t.Helper()
	if text := strings.TrimPrefix(fmt.Sprint(got), "map"); text != want {
		t.Errorf("counted %s, want %s", text, want)
	}
}

// What was published before, what is too old, and what has no subject, is counted and ends there.
func TestResults(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stream{stored: map[string]bool{"oom.v1.eviction.uid-again.node-1": true}}
		got, _ := run(t, s, time.Minute-time.Millisecond, func(p *Publisher) {
			for _, pod := range []*pods.Pod{evicted("new", "node-1", 0), evicted("again", "node-1", keep/2), evicted("old", "node-1", keep+time.Second), evicted("odd", "NODE", 0)} {
				p.Add(pod)
				p.Add(pod) // waits already
			}
		})
		want(t, got, "[dropped:1 expired:1 published:1 repeated:1]")
		if len(s.attempts) != 2 {
			t.Errorf("%d attempts", len(s.attempts))
		}
	})
}

// While the stream refuses, one attempt after the other is made, ever later, and one line logged. One of them stored the eviction, and
// failed all the same: it is counted as published.
func TestRetry(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stream{stored: map[string]bool{}}
		s.fail = func(attempt int) error {
			if attempt == 3 {
				s.stored["oom.v1.eviction.uid-a.node-1"] = true
			}
			if attempt < 9 {
				return errors.New("refused")
			}
			return nil
		}
		began := time.Now()
		got, log := run(t, s, 10*time.Minute, func(p *Publisher) { p.Add(evicted("a", "node-1", 0)) })
		want(t, got, "[failed:8 published:1]")
		if took := s.attempts[len(s.attempts)-1].Sub(began); took != (1+2+4+8+16+32+60+60)*time.Second {
			t.Errorf("it took %s", took)
		}
		if n := strings.Count(log, "level=WARN"); n != 1 {
			t.Errorf("logged:\n%s", log)
		}
	})
}

// The rate, and what waits, are bounded.
func TestBounds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := &stream{stored: map[string]bool{}}
		got, _ := run(t, s, time.Minute-interval/2, func(p *Publisher) { // not at the end of an interval
			for i := range maxWaiting + 5 {
				p.Add(evicted(fmt.Sprint(i), "node-1", 0))
			}
			go func() { // and more while it works
				for i := range 10 {
					time.Sleep(time.Second)
					p.Add(evicted(fmt.Sprint("later-", i), "node-1", 0))
				}
			}()
		})
		want(t, got, "[dropped:5 published:3000]")
	})
}

// An eviction has what the pod's status says.
func TestMessage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		pod := evicted("a", "node-1.example", time.Minute)
		pod.Owner = "Deployment/a"
		var got bus.Msg
		p := New(prometheus.NewRegistry(), keep, slog.New(slog.DiscardHandler))
		p.Store = func(_ context.Context, m bus.Msg) (bool, error) {
			got = m
			return false, nil
		}
		p.Add(pod)
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		p.Run(ctx)
		e, err := event.ParseEviction(got.Data)
		if err != nil {
			t.Fatal(err)
		}
		want := event.Eviction{
			Schema: event.Schema, ID: "uid-a/eviction", Time: pod.LowMemory.Time.UTC(), Node: "node-1.example", Message: "memory",
			Pod: event.PodRef{Namespace: "shop", Name: "a", UID: "uid-a", Owner: "Deployment/a"},
		}
		if e != want || got.ID != want.ID || got.Subject != "oom.v1.eviction.uid-a.node-1_example" {
			t.Errorf("%s on %s: %+v, want %+v", got.ID, got.Subject, e, want)
		}
	})
}
