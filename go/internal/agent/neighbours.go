package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/usage"
)

const (
	readPause           = 10 * time.Second  // the least time between two readings of all pods, and of one cgroup or the node: a storm is read once
	readRate, readBurst = rate.Limit(1), 10 // of all cgroups, per second
	// readDelay is how long after the kill the pods are read: it takes a moment until the victim's memory is given
	// back, and what remains is what the next kill is for. A cgroup is read at once: it may be removed.
	readDelay   = time.Second
	readTimeout = 2 * time.Second // bounds one reading
	readExpires = time.Minute     // how long it is tried to publish what was read
	maxKillAge  = 5 * time.Second // how old a kill may be: what the pods hold now says nothing of one from before
)

// neighbourReader reads after a kill what the memory of the limit's cgroup, or of the node, is used for, and how much the
// pods use when more than one of them ran out of memory. It never holds up the kills themselves.
type neighbourReader struct {
	top    int
	root   string
	count  *prometheus.CounterVec
	log    *slog.Logger
	wanted chan *reading

	// Only observe uses these.
	latest *reading             // the incident that was seen last
	pods   time.Time            // when pods were to be read last
	read   map[uint64]time.Time // when each cgroup was, by its ID; the node's is 0
	limit  *rate.Limiter
}

// reading is an incident after which something is to be read.
type reading struct {
	kill      event.Event // its first one
	breakdown bool        // read what the memory is used for
	pods      bool        // read the pods

	mu      sync.Mutex
	victims map[string]bool // UIDs of the pods in which a process was killed
	killed  map[uint32]bool // PIDs

	// Only run uses these.
	message *event.Neighbours
	failed  error // why some of it could not be read
}

func (r *reading) add(e *event.Event) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.killed[e.Victim.PID] = true
	if e.Container != nil && e.Container.PodUID != "" {
		r.victims[e.Container.PodUID] = true
	}
}

// mark marks those of the pods and processes in the message that are victims.
func (r *reading) mark() {
	r.mu.Lock()
	defer r.mu.Unlock()
	for i, pod := range r.message.Pods {
		r.message.Pods[i].Victim = r.victims[pod.PodUID]
	}
	if b := r.message.Breakdown; b != nil {
		for i, process := range b.Processes {
			b.Processes[i].Victim = r.killed[process.PID]
		}
	}
}

func newNeighbourReader(cfg config.Node, count *prometheus.CounterVec, log *slog.Logger) *neighbourReader {
	return &neighbourReader{
		top: cfg.Neighbours, root: cfg.CgroupRoot, count: count, log: log, wanted: make(chan *reading, readBurst),
		read: map[uint64]time.Time{}, limit: rate.NewLimiter(readRate, readBurst),
	}
}

// observe takes a kill. Only one goroutine may call it.
func (l *neighbourReader) observe(e *event.Event) {
	if l.top == 0 || e.Kind() != event.KindKill || e.Incident == nil {
		return
	}
	limited := e.Scope == event.ScopeCgroup && e.Limit != nil && e.Limit.Cgroup != nil
	if !limited && !e.BeyondPod() {
		return // what ran out of memory is not known
	}
	if l.latest != nil && l.latest.kill.Incident.ID == e.Incident.ID {
		l.latest.add(e)
		return
	}
	r := &reading{kill: *e, victims: map[string]bool{}, killed: map[uint32]bool{}}
	r.add(e)
	l.latest = r
	now := time.Now()
	if now.Sub(e.Time) <= maxKillAge {
		r.pods = e.BeyondPod() && now.Sub(l.pods) >= readPause
		r.breakdown = (limited || e.Scope != event.ScopeCgroup) && l.due(e, now)
	}
	if r.breakdown || r.pods {
		select {
		case l.wanted <- r:
			if r.pods {
				l.pods = now
			}
			return
		default: // the others take their time
		}
	}
	l.count.WithLabelValues("skipped").Inc()
}

// due reports whether the cgroup that owns the limit, or the node, may be read now.
func (l *neighbourReader) due(e *event.Event, now time.Time) bool {
	var id uint64
	if e.Scope == event.ScopeCgroup {
		id = e.Limit.Cgroup.ID
	}
	maps.DeleteFunc(l.read, func(_ uint64, last time.Time) bool { return now.Sub(last) >= readPause })
	if _, ok := l.read[id]; ok || !l.limit.AllowN(now, 1) {
		return false
	}
	l.read[id] = now
	return true
}

// run reads until ctx ends, and hands on what it has read. What is read of the pods comes later than the rest.
func (l *neighbourReader) run(ctx context.Context, publish func(*event.Neighbours) error) {
	var late *reading // its pods are to be read
	end := func(r *reading, err error) {
		if r != nil {
			l.end(r, errors.Join(r.failed, err), publish)
		}
	}
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case r := <-l.wanted:
			r.failed = l.begin(ctx, r)
			if !r.pods {
				end(r, nil)
				continue
			}
			end(late, errors.New("the pods were not read in time")) // before the next incident
			late = r
			timer.Reset(time.Until(r.kill.Time.Add(readDelay)))
		case <-timer.C:
			if late != nil {
				end(late, l.readPods(ctx, late.message))
			}
			late = nil
		case <-ctx.Done():
			end(late, context.Cause(ctx))
			return
		}
	}
}

func (l *neighbourReader) begin(ctx context.Context, r *reading) error {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	e := &r.kill
	began, boottime := now()
	n := &event.Neighbours{
		Schema: event.Schema, ID: event.NeighboursID(e.Incident.ID), Incident: e.Incident.ID, Kill: e.ID,
		Time: began.UTC(), Node: e.Node, Scope: e.Scope,
	}
	r.message = n
	if e.Limit != nil {
		n.Level = e.Limit.Level
	}
	if !r.breakdown {
		return nil
	}
	tree, err := l.tree()
	if err != nil {
		return err
	}
	limit := e.Limit
	if e.Scope != event.ScopeCgroup {
		limit = nil // the node
	}
	b, errs, err := tree.Breakdown(ctx, "/proc", limit)
	if err != nil {
		return err
	}
	for _, err := range errs {
		l.log.Warn("cannot read a part of what the memory is used for", "kill", e.ID, "error", err)
	}
	b.AfterNS = boottime - min(e.BoottimeNS, boottime)
	n.Breakdown, n.ReadNS = b, uint64(time.Since(began))
	return nil
}

func (l *neighbourReader) readPods(ctx context.Context, n *event.Neighbours) error {
	ctx, cancel := context.WithTimeout(ctx, readTimeout)
	defer cancel()
	began := time.Now()
	tree, err := l.tree()
	if err != nil {
		return err
	}
	pods, err := tree.Pods(ctx, l.top)
	if err != nil {
		return err
	}
	for _, err := range pods.Errors {
		l.log.Warn("cannot read the memory usage of a pod", "error", err)
	}
	n.Time, n.ReadNS = began.UTC(), n.ReadNS+uint64(time.Since(began))
	n.Pods, n.PodsSeen, n.Incomplete = append([]event.PodMemory{}, pods.Largest...), new(uint32(pods.Seen)), pods.Incomplete
	return nil
}

func (l *neighbourReader) tree() (*usage.Tree, error) {
	h, err := cgroupfs.Find("/proc")
	if err != nil {
		return nil, err
	}
	return &usage.Tree{Mount: h.Mount, Version: h.Version, Root: l.root}, nil
}

// end publishes what was read, and counts. failed is why some of it could not be read.
func (l *neighbourReader) end(r *reading, failed error, publish func(*event.Neighbours) error) {
	if r.message.Breakdown != nil || r.message.Pods != nil {
		r.mark()
		failed = errors.Join(failed, publish(r.message))
	}
	if failed != nil {
		l.count.WithLabelValues("failed").Inc()
		l.log.Warn("cannot read the memory usage after a kill", "kill", r.kill.ID, "error", failed)
		return
	}
	l.count.WithLabelValues("read").Inc()
}

func (t *tracer) publishNeighbours(n *event.Neighbours) error {
	m, err := message(n.ID, n, ackTag{})
	if err != nil {
		return err
	}
	m.Expires = time.Now().Add(readExpires) // a stream of another version may not take it: it must not be in the way of kills for ever
	return t.publisher.Enqueue(m)
}
