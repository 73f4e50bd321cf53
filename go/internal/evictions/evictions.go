// Package evictions publishes which pods the kubelet evicted because their node ran low on memory. It only observes.
package evictions

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

const (
	// maxWaiting bounds the pods that wait. Those above are found at the next start, if they still exist.
	maxWaiting = 10_000
	// interval is the time between two messages. At a start all evicted pods that the API server keeps are published again, and
	// refused: by default as many as 12,500 (terminated-pod-gc-threshold).
	interval = 20 * time.Millisecond
	// After a failed attempt the next one is made between retryMin and retryMax later.
	retryMin = time.Second
	retryMax = time.Minute
)

// Publisher publishes evictions. Every replica runs one, and the stream stores one eviction of a pod.
type Publisher struct {
	// Store stores a message, unless there is one on its subject; see bus.Conn.PublishOnce.
	Store func(ctx context.Context, m bus.Msg) (duplicate bool, err error)
	// Keep is how long the stream keeps a message. An eviction that is older is not published: nobody knows whether it was.
	Keep time.Duration
	Log  *slog.Logger
	Now  func() time.Time

	results *prometheus.CounterVec

	mu      sync.Mutex
	waiting []*pods.Pod
	uids    map[string]struct{} // of waiting
	added   chan struct{}       // holds a token if something was added
}

// New makes a publisher and registers its metric. Set its fields before Run.
func New(registerer prometheus.Registerer, keep time.Duration, log *slog.Logger) *Publisher {
	p := &Publisher{Keep: keep, Log: log, Now: time.Now, uids: map[string]struct{}{}, added: make(chan struct{}, 1)}
	p.results = promauto.With(registerer).NewCounterVec(prometheus.CounterOpts{
		Name: "oom_tracer_kubelet_evictions_total",
		Help: "Number of pods that the kubelet evicted because their node ran low on memory, by result: published, repeated (it was published before), expired (too old), failed (an attempt; another one follows), dropped.",
	}, []string{"result"})
	for _, result := range []string{"published", "repeated", "expired", "failed", "dropped"} {
		p.results.WithLabelValues(result)
	}
	return p
}

// Add adds a pod with LowMemory; see pods.Store.OnLowMemory.
func (p *Publisher) Add(pod *pods.Pod) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, waits := p.uids[pod.UID]; waits {
		return
	}
	if len(p.waiting) == maxWaiting {
		p.results.WithLabelValues("dropped").Inc()
		return
	}
	p.uids[pod.UID] = struct{}{}
	p.waiting = append(p.waiting, pod)
	select {
	case p.added <- struct{}{}:
	default:
	}
}

// first is the pod that waits longest; nil: none waits.
func (p *Publisher) first() *pods.Pod {
	p.mu.Lock()
	defer p.mu.Unlock()
	if len(p.waiting) == 0 {
		return nil
	}
	return p.waiting[0]
}

func (p *Publisher) removeFirst() {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.uids, p.waiting[0].UID)
	p.waiting = p.waiting[1:]
}

// Run publishes until ctx ends.
func (p *Publisher) Run(ctx context.Context) {
	failures := 0
	for ctx.Err() == nil {
		pod := p.first()
		if pod == nil {
			select {
			case <-p.added:
			case <-ctx.Done():
			}
			continue
		}
		wait := interval
		result, err := p.publish(ctx, pod, failures > 0)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil:
			failures = 0
			p.removeFirst()
		default:
			if wait = min(retryMin<<min(failures, 16), retryMax); failures == 0 {
				p.Log.Warn("could not publish the eviction of a pod by the kubelet, will try again", "pod", pod.Namespace+"/"+pod.Name, "error", err)
			}
			failures++
		}
		p.results.WithLabelValues(result).Inc()
		select {
		case <-time.After(wait):
		case <-ctx.Done():
		}
	}
}

// publish makes one attempt. again means that one before failed.
func (p *Publisher) publish(ctx context.Context, pod *pods.Pod, again bool) (result string, err error) {
	if p.Now().Sub(pod.LowMemory.Time) > p.Keep {
		return "expired", nil
	}
	e := event.Eviction{
		Schema: event.Schema, ID: event.EvictionID(pod.UID), Time: pod.LowMemory.Time.UTC(), Node: pod.Node,
		Pod:     event.PodRef{Namespace: pod.Namespace, Name: pod.Name, UID: pod.UID, Owner: pod.Owner},
		Message: pod.LowMemory.Message,
	}
	subject, err := e.Subject()
	if err != nil { // no tracer publishes for this node either
		p.Log.Error("eviction of a pod by the kubelet dropped: it has no subject", "pod", pod.Namespace+"/"+pod.Name, "error", err)
		return "dropped", nil
	}
	data, err := json.Marshal(e)
	if err != nil {
		return "failed", fmt.Errorf("encode eviction %s: %w", e.ID, err)
	}
	duplicate, err := p.Store(ctx, bus.Msg{ID: e.ID, Subject: subject, Data: data})
	switch {
	case err != nil:
		return "failed", err
	case duplicate && !again: // else the attempt that failed may have stored it
		return "repeated", nil
	}
	p.Log.Info("pod evicted by the kubelet", "pod", pod.Namespace+"/"+pod.Name, "node", pod.Node, "message", e.Message)
	return "published", nil
}
