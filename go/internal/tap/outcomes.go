package tap

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/fifo"
)

const (
	// maxKills is how many kills are kept for their outcomes.
	maxKills = 10_000
	// outcomeWait is how long a kill waits for its outcome before it is shown without one.
	outcomeWait = 5 * time.Second
)

// killed is a kill that the stream has shown.
type killed struct {
	event  *event.Event // nil once it was shown with an outcome
	raw    []byte
	stored time.Time // by the server's clock
	shown  bool      // without an outcome
}

// joiner joins kills with their outcomes, which come some time later in the stream.
type joiner struct {
	o   options
	out *printer

	mu    sync.Mutex
	seen  *fifo.Map[struct{}]
	kills map[string]*killed // by ID
	order []string           // of kills
	next  int                // of order: the first that may have to be shown without an outcome

	last time.Time // when the newest message was stored
	came time.Time // when it came here
}

// take takes a message, in the stream's order.
func (j *joiner) take(m bus.Stored, r message) error {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.last, j.came = m.Time, time.Now()
	if err := j.overdue(m.Time); err != nil {
		return err
	}
	switch {
	case !j.seen.AddNew(r.id, struct{}{}):
		return nil
	case r.kill != nil:
		return j.wait(r.id, &killed{event: r.kill, raw: m.Data, stored: m.Time})
	case r.eviction != nil && !j.wanted(&r.eviction.Pod):
		return nil
	case r.outcome == nil:
		return j.out.print(r.line(&j.out.table), m.Data)
	}
	k := j.kills[r.outcome.Kill]
	if k == nil {
		k = &killed{}
		// The scope of an outcome is its kill's, and this kill is of another one, or of before --since.
		if len(j.o.scopes) > 0 {
			return nil
		}
	}
	e, raw := k.event, k.raw
	k.event, k.raw = nil, nil
	if !j.wanted(r.outcome.Pod) {
		return nil
	}
	return j.print(e, r.outcome, raw, m.Data)
}

// wait keeps a kill. If that is one too many, the oldest is dropped, and shown if it had no outcome.
func (j *joiner) wait(id string, k *killed) error {
	j.kills[id] = k
	if j.order = append(j.order, id); len(j.order) <= maxKills {
		return nil
	}
	oldest := j.kills[j.order[0]]
	delete(j.kills, j.order[0])
	j.order = j.order[1:]
	if j.next > 0 {
		j.next--
		return nil
	}
	return j.without(oldest)
}

// overdue shows the kills that have waited too long for an outcome, at a time of the server's clock. With --no-follow they
// are shown at the end.
func (j *joiner) overdue(now time.Time) error {
	for ; !j.o.noFollow && j.next < len(j.order); j.next++ {
		k := j.kills[j.order[j.next]]
		if now.Sub(k.stored) <= outcomeWait {
			return nil
		}
		if err := j.without(k); err != nil {
			j.next++
			return err
		}
	}
	return nil
}

// idle calls overdue while no message comes.
func (j *joiner) idle() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.last.IsZero() {
		return nil
	}
	return j.overdue(j.last.Add(time.Since(j.came)))
}

// rest shows all kills that have no outcome.
func (j *joiner) rest() error {
	j.mu.Lock()
	defer j.mu.Unlock()
	for ; j.next < len(j.order); j.next++ {
		if err := j.without(j.kills[j.order[j.next]]); err != nil {
			return err
		}
	}
	return nil
}

// without shows a kill that has no outcome. Its pod is not known yet, so it may be of the pod that is asked for, unless it was
// outside of all pods.
func (j *joiner) without(k *killed) error {
	if k.event == nil || k.shown || k.event.Container == nil && j.o.ofPods() {
		return nil
	}
	k.shown = true
	return j.print(k.event, nil, k.raw, nil)
}

// wanted reports whether the flags select a pod. nil is one that was not found.
func (j *joiner) wanted(p *event.PodRef) bool {
	return !j.o.ofPods() || p != nil && (j.o.namespace == "" || p.Namespace == j.o.namespace) && (j.o.pod == "" || p.Name == j.o.pod)
}

// print writes a kill and its outcome as one line. Either may be unknown.
func (j *joiner) print(e *event.Event, o *event.Outcome, kill, outcome []byte) error {
	null := []byte("null")
	if kill == nil {
		kill = null
	}
	if outcome == nil {
		outcome = null
	}
	return j.out.print(j.out.table.OutcomeLine(e, o), fmt.Appendf(nil, `{"kill":%s,"outcome":%s}`, kill, outcome))
}

// outcomes prints kills with their outcomes; see tail.
func outcomes(ctx context.Context, conn *bus.Conn, o options, t bus.TailOptions, p *printer, stderr io.Writer) error {
	j := &joiner{o: o, out: p, seen: fifo.New[struct{}](4 * maxKills), kills: map[string]*killed{}}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var idleErr error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(time.Second)
		defer tick.Stop()
		for {
			select {
			case <-tick.C:
			case <-ctx.Done():
				return
			}
			if !conn.Connected() {
				continue // the outcomes may be there
			}
			if idleErr = j.idle(); idleErr != nil {
				cancel()
				return
			}
		}
	}()
	err := each(ctx, conn, t, stderr, j.take)
	cancel()
	<-ended
	switch {
	case idleErr != nil:
		return idleErr
	case err == nil && o.noFollow:
		return j.rest()
	}
	return err
}
