package agent

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/neighbours"
)

const (
	// readPause is the least time between two readings of all pods: a storm is read once.
	readPause = 10 * time.Second
	// readDelay is how long after the kill the pods are read: it takes a moment until the victim's memory is given
	// back, and what remains is what the next kill is for.
	readDelay = time.Second
	// readTimeout bounds one reading.
	readTimeout = 2 * time.Second
	// readExpires is how long it is tried to publish what was read.
	readExpires = time.Minute
	// maxKillAge is how old a kill may be: what the pods hold now says nothing of one from before.
	maxKillAge = 5 * time.Second
)

// neighbourReader reads what the pods hold when more than one of them ran out of memory. It never holds up the kills
// themselves.
type neighbourReader struct {
	top    int
	root   string
	count  *prometheus.CounterVec
	log    *slog.Logger
	wanted chan *podReading
	latest *podReading // the incident that was seen last
	last   time.Time   // when it was
}

// podReading is an incident for which the pods are to be read.
type podReading struct {
	kill event.Event // its first one

	mu      sync.Mutex
	victims map[string]struct{} // UIDs of the pods in which a process was killed
}

func (s *podReading) add(e *event.Event) {
	if e.Container == nil || e.Container.PodUID == "" {
		return
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.victims[e.Container.PodUID] = struct{}{}
}

// mark marks those of the pods that are victims'.
func (s *podReading) mark(pods []event.PodMemory) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i := range pods {
		_, pods[i].Victim = s.victims[pods[i].PodUID]
	}
}

func newNeighbourReader(cfg config.Node, count *prometheus.CounterVec, log *slog.Logger) *neighbourReader {
	return &neighbourReader{top: cfg.Neighbours, root: cfg.CgroupRoot, count: count, log: log, wanted: make(chan *podReading, 1)}
}

// observe takes a kill. Only one goroutine may call it.
func (l *neighbourReader) observe(e *event.Event) {
	if l.top == 0 || e.Kind() != event.KindKill || !e.BeyondPod() || e.Incident == nil {
		return
	}
	if l.latest != nil && l.latest.kill.Incident.ID == e.Incident.ID {
		l.latest.add(e)
		return
	}
	l.latest = &podReading{kill: *e, victims: map[string]struct{}{}}
	l.latest.add(e)
	if now := time.Now(); now.Sub(l.last) < readPause || now.Sub(e.Time) > maxKillAge {
		l.count.WithLabelValues("skipped").Inc()
		return
	}
	select {
	case l.wanted <- l.latest:
		l.last = time.Now()
	default: // one takes its time
		l.count.WithLabelValues("skipped").Inc()
	}
}

// run reads until ctx ends, and hands on what it has read.
func (l *neighbourReader) run(ctx context.Context, publish func(*event.Neighbours) error) {
	for {
		var s *podReading
		select {
		case s = <-l.wanted:
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(time.Until(s.kill.Time.Add(readDelay))):
		case <-ctx.Done():
			return
		}
		n, err := l.read(ctx, s)
		if err == nil {
			err = publish(n)
		}
		if err != nil {
			l.count.WithLabelValues("failed").Inc()
			l.log.Warn("cannot read the memory usage of the other pods", "kill", s.kill.ID, "error", err)
			continue
		}
		l.count.WithLabelValues("read").Inc()
	}
}

func (l *neighbourReader) read(ctx context.Context, s *podReading) (*event.Neighbours, error) {
	e := &s.kill
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	began := time.Now()
	h, err := cgroupfs.Find("/proc")
	if err != nil {
		return nil, err
	}
	tree := neighbours.Tree{Mount: h.Mount, Version: h.Version, Root: l.root}
	r, err := tree.Read(ctx, l.top)
	if err != nil {
		return nil, err
	}
	for _, err := range r.Errors {
		l.log.Warn("cannot read the memory usage of a pod", "error", err)
	}
	s.mark(r.Pods)
	n := &event.Neighbours{
		Schema: event.Schema, ID: event.NeighboursID(e.Incident.ID), Incident: e.Incident.ID, Kill: e.ID,
		Time: began.UTC(), ReadNS: uint64(time.Since(began)), Node: e.Node, Scope: e.Scope,
		Pods: r.Pods, PodsSeen: uint32(r.Seen), Incomplete: r.Incomplete,
	}
	if e.Limit != nil {
		n.Level = e.Limit.Level
	}
	return n, nil
}

// publishNeighbours publishes what was read.
func (t *tracer) publishNeighbours(n *event.Neighbours) error {
	subject, err := n.Subject()
	if err != nil {
		return err
	}
	data, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("write %s as json: %w", n.ID, err)
	}
	// A stream of another version may not take it: it must not be in the way of kills for ever.
	return t.publisher.Enqueue(bus.Msg{ID: n.ID, Subject: subject, Data: data, Tag: ackTag{}, Expires: time.Now().Add(readExpires)})
}
