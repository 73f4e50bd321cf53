package annotate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const (
	// onlookDelay is how long after its kill a message of the kind neighbours is looked for: the tracer takes a
	// second, and bounds its reading at two more.
	onlookDelay = 3500 * time.Millisecond
	// maxOnlook is how many kills may wait for that. Those above are told of without.
	maxOnlook = 1000
	// maxNamed is how many pods are named.
	maxNamed = 3
)

// Onlooker tells of kills beyond one pod a moment later, and with what the node's pods held then, by their names.
// Of other kills it tells at once.
type Onlooker struct {
	// Last reads the last message on a subject of the stream; see bus.Conn.
	Last   func(ctx context.Context, subject string) ([]byte, error)
	Finder Finder
	Outlet Outlet
	Next   Teller
	Log    *slog.Logger
	Now    func() time.Time

	mu      sync.Mutex
	waiting []onlook // in the order in which they came
}

type onlook struct {
	e   *event.Event
	o   *event.Outcome
	due time.Time
}

// Tell implements Teller. It never blocks.
func (k *Onlooker) Tell(e *event.Event, o *event.Outcome, others string) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if !e.BeyondPod() || e.Incident == nil || len(k.waiting) >= maxOnlook {
		k.Next.Tell(e, o, others)
		return
	}
	k.waiting = append(k.waiting, onlook{e, o, k.Now().Add(onlookDelay)})
}

// Run tells until ctx ends, and then of the rest without more.
func (k *Onlooker) Run(ctx context.Context) {
	tick := time.NewTicker(250 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			for _, one := range k.take(k.Now()) {
				k.Next.Tell(one.e, one.o, k.others(ctx, one.e, one.o))
			}
		case <-ctx.Done():
			for _, one := range k.take(k.Now().Add(onlookDelay)) {
				k.Next.Tell(one.e, one.o, "")
			}
			return
		}
	}
}

// take takes those that are due.
func (k *Onlooker) take(now time.Time) []onlook {
	k.mu.Lock()
	defer k.mu.Unlock()
	n := 0
	for n < len(k.waiting) && !k.waiting[n].due.After(now) {
		n++
	}
	due := k.waiting[:n:n]
	k.waiting = k.waiting[n:]
	return due
}

// others is what the node's pods held after a kill; empty where nobody has told.
func (k *Onlooker) others(ctx context.Context, e *event.Event, o *event.Outcome) string {
	n, err := k.read(ctx, e)
	if err != nil {
		k.Log.Debug("what the other pods held is not known", "id", e.ID, "error", err)
		return ""
	}
	if len(n.Pods) == 0 {
		return ""
	}
	var named []string
	for i := range n.Pods[:min(len(n.Pods), maxNamed)] {
		named = append(named, k.name(n.Node.Name, &n.Pods[i]))
	}
	said := "then " + strings.Join(named, ", ")
	if n.Kill == e.ID {
		k.publish(e, o, said)
	}
	return said
}

// errAnother means that the last ones told of are another incident's.
var errAnother = errors.New("it was not told for this incident")

func (k *Onlooker) read(ctx context.Context, e *event.Event) (*event.Neighbours, error) {
	want := event.Neighbours{Scope: e.Scope, Node: e.Node}
	subject, err := want.Subject()
	if err != nil {
		return nil, err
	}
	data, err := k.Last(ctx, subject)
	if err != nil {
		return nil, err
	}
	n, err := event.ParseNeighbours(data)
	switch {
	case err != nil:
		return nil, err
	case n.Node.Name != e.Node.Name:
		return nil, fmt.Errorf("node.name is %.300q, the subject's node %q", n.Node.Name, e.Node.Name)
	case n.Incident != e.Incident.ID:
		return nil, errAnother
	}
	return &n, nil
}

// name is a pod and what it holds.
func (k *Onlooker) name(node string, m *event.PodMemory) string {
	f, err := k.Finder.Find(node, m.PodUID, "")
	name, of := "pod "+text.Printable(cut(m.PodUID, 36)), ""
	if err == nil {
		name = f.Pod.Namespace + "/" + f.Pod.Name
		of = " without a request"
		if f.Pod.Request > 0 {
			of = " of its " + text.Size(uint64(f.Pod.Request)) + " request"
		}
	}
	return name + " held " + text.Size(m.Usage) + of
}

// publish says on NATS as well what the figures mean.
func (k *Onlooker) publish(e *event.Event, o *event.Outcome, said string) {
	told := *o
	told.ID, told.Stage = event.OutcomeID(e.ID, event.StageNeighbours), event.StageNeighbours
	told.Time, told.Result, told.Reason = k.Now().UTC(), event.ResultObserved, event.ReasonNeighbours
	told.Detail, told.Annotation = said[:min(len(said), maxDetail)], ""
	subject, err := told.Subject()
	var data []byte
	if err == nil {
		data, err = json.Marshal(&told)
	}
	if err == nil {
		err = k.Outlet.Enqueue(bus.Msg{ID: told.ID, Subject: subject, Data: data, Tag: tag{settle: func() {}, killed: e.Time}})
	}
	if err != nil {
		k.Log.Warn("what the other pods held is not told on nats", "id", e.ID, "error", err)
	}
}
