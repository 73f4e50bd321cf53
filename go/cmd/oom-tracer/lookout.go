package main

import (
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/neighbours"
	"github.com/oom-tracer/oom-tracer/go/internal/scratch"
)

const (
	// lookPause is the least time between two readings of all pods: a storm is read once.
	lookPause = 10 * time.Second
	// lookAfter is how long after the kill the pods are read: it takes a moment until the victim's memory is given
	// back, and what remains is what the next kill is for.
	lookAfter = time.Second
	// lookTime bounds one reading.
	lookTime = 2 * time.Second
	// lookExpires is how long it is tried to publish what was read.
	lookExpires = time.Minute
	// lookLate is how old a kill may be: what the pods hold now says nothing of one from before.
	lookLate = 5 * time.Second
)

// lookout looks at what the pods hold when more than one of them ran out of memory. It never holds up the kills
// themselves.
type lookout struct {
	top    int
	root   string
	count  *prometheus.CounterVec
	log    *slog.Logger
	wanted chan event.Event
	before string    // the incident that was seen last
	last   time.Time // when it was
}

func newLookout(cfg config.Node, count *prometheus.CounterVec, log *slog.Logger) *lookout {
	return &lookout{top: cfg.Neighbours, root: cfg.CgroupRoot, count: count, log: log, wanted: make(chan event.Event, 1)}
}

// see takes a kill. Only one goroutine may call it.
func (l *lookout) see(e *event.Event) {
	if l.top == 0 || e.Kind() != event.KindKill || !e.BeyondPod() || e.Incident == nil || e.Incident.ID == l.before {
		return
	}
	l.before = e.Incident.ID
	if now := time.Now(); now.Sub(l.last) < lookPause || now.Sub(e.Time) > lookLate {
		l.count.WithLabelValues("skipped").Inc()
		return
	}
	select {
	case l.wanted <- *e:
		l.last = time.Now()
	default: // one takes its time
		l.count.WithLabelValues("skipped").Inc()
	}
}

// run reads until ctx ends, and hands on what it has read.
func (l *lookout) run(ctx context.Context, publish func(*event.Neighbours) error) {
	for {
		var e event.Event
		select {
		case e = <-l.wanted:
		case <-ctx.Done():
			return
		}
		select {
		case <-time.After(time.Until(e.Time.Add(lookAfter))):
		case <-ctx.Done():
			return
		}
		n, err := l.read(ctx, &e)
		if err == nil {
			err = publish(n)
		}
		if err != nil {
			l.count.WithLabelValues("failed").Inc()
			l.log.Warn("the memory of the other pods is not known", "kill", e.ID, "error", err)
			continue
		}
		l.count.WithLabelValues("read").Inc()
	}
}

func (l *lookout) read(ctx context.Context, e *event.Event) (*event.Neighbours, error) {
	ctx, cancel := context.WithTimeout(ctx, lookTime)
	defer cancel()
	began := time.Now()
	h, err := scratch.Find("/proc")
	if err != nil {
		return nil, err
	}
	tree := neighbours.Tree{Mount: h.Mount, Version: h.Version, Root: l.root}
	r, err := tree.Read(ctx, l.top)
	if err != nil {
		return nil, err
	}
	for _, err := range r.Errors {
		l.log.Warn("a pod's memory cannot be read", "error", err)
	}
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

// neighbours publishes what a lookout has read.
func (t *tracer) neighbours(n *event.Neighbours) error {
	subject, err := n.Subject()
	if err != nil {
		return err
	}
	data, err := json.Marshal(n)
	if err != nil {
		return fmt.Errorf("write %s as json: %w", n.ID, err)
	}
	// A stream of another version may not take it: it must not be in the way of kills for ever.
	return t.publisher.Enqueue(bus.Msg{ID: n.ID, Subject: subject, Data: data, Tag: settles{}, Expires: time.Now().Add(lookExpires)})
}
