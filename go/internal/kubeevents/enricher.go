package kubeevents

import (
	"context"
	"log/slog"
	"strings"
	"sync"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const (
	// firstRead is how long after a kill its message of the kind neighbours is read first: the tracer reads the usage of the
	// pods after a second. It takes at most two more, so that after lastRead there will be no message.
	firstRead = 1200 * time.Millisecond
	lastRead  = 4 * time.Second
	readAgain = 400 * time.Millisecond
	// The tracer reads a cgroup at once.
	firstCgroupRead = 200 * time.Millisecond
	lastCgroupRead  = 1500 * time.Millisecond
	// maxMessages bounds how many messages on one subject are read at once.
	maxMessages = 100
	// maxWaiting bounds the incidents that wait for their message, and maxKills the kills of an incident that are kept. Those
	// above are not completed.
	maxWaiting = 1000
	maxKills   = 100
	// maxNamed is how many other pods are named.
	maxNamed = 3
)

// Enricher adds to the Events of incidents what held a large part of the memory and, beyond one pod, how much memory the
// other pods of the node used afterwards. It publishes that on NATS too. The pods of the victims are not among those others.
type Enricher struct {
	// Next reads the next message on a subject of the stream; see bus.Conn.
	Next func(ctx context.Context, subject string, from uint64) ([]byte, uint64, error)
	// Find finds a pod; see pods.Store.
	Find func(node, uid, containerID string) (pods.Found, error)
	// Publish publishes an outcome of a kill.
	Publish func(o *event.Outcome) error

	recorder *Recorder
	log      *slog.Logger
	wake     chan struct{} // holds a token if there are new incidents

	mu      sync.Mutex
	waiting []*waiting
}

// waiting is an incident whose message is not stored yet.
type waiting struct {
	first       *event.Event
	kills       []victimKill
	next, until time.Time // only Run changes next
	from        uint64    // the sequence in the stream from which on its message is looked for; only Run changes it
}

type victimKill struct {
	e *event.Event
	o *event.Outcome
}

// NewEnricher makes an enricher. Set its exported fields before it is used.
func NewEnricher(recorder *Recorder, log *slog.Logger) *Enricher {
	return &Enricher{recorder: recorder, log: log, wake: make(chan struct{}, 1)}
}

// Record records a kill at once, and completes its Event later. The kill has the sequence seq in the stream. It never
// blocks.
func (n *Enricher) Record(e *event.Event, o *event.Outcome, seq uint64) {
	n.recorder.Record(e, o)
	if e.Incident == nil || o.Reason == event.ReasonTooOld {
		return
	}
	first, last := firstRead, lastRead
	if !e.BeyondPod() {
		if e.Scope != event.ScopeCgroup || o.Pod == nil {
			return // the tracer read nothing, or there is no Event
		}
		first, last = firstCgroupRead, lastCgroupRead
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, w := range n.waiting {
		if w.first.Incident.ID == e.Incident.ID {
			if len(w.kills) < maxKills {
				w.kills = append(w.kills, victimKill{e, o})
			}
			return
		}
	}
	if len(n.waiting) >= maxWaiting {
		return
	}
	now := time.Now()
	n.waiting = append(n.waiting, &waiting{
		first: e, kills: []victimKill{{e, o}},
		next: now.Add(min(max(time.Until(e.Time.Add(first)), 0), first)), until: now.Add(last), // the clock of the node may be wrong
		from: seq,
	})
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// Run completes until ctx ends.
func (n *Enricher) Run(ctx context.Context) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		case <-timer.C:
		}
		if next, ok := n.completeDue(ctx); ok {
			timer.Reset(time.Until(next))
		} else {
			timer.Stop()
		}
	}
}

// completeDue completes the incidents that are due. It returns when the next one is due, if any.
func (n *Enricher) completeDue(ctx context.Context) (next time.Time, ok bool) {
	now := time.Now()
	n.mu.Lock()
	var due []*waiting
	for _, w := range n.waiting {
		if !w.next.After(now) {
			due = append(due, w)
		}
	}
	n.mu.Unlock()
	// In a storm many wait for messages on the same subject.
	bySubject := map[string][]*waiting{}
	for _, w := range due {
		want := event.Neighbours{Scope: w.first.Scope, Node: w.first.Node}
		subject, _ := want.Subject() // that of the kill was right
		bySubject[subject] = append(bySubject[subject], w)
	}
	done := map[*waiting]int{} // how many of its kills
	for subject, all := range bySubject {
		messages, err := n.read(ctx, subject, all)
		for _, w := range all {
			if m := messages[w.first.Incident.ID]; m != nil {
				done[w] = n.complete(w, m)
			} else if time.Now().After(w.until) {
				n.log.Debug("memory usage after an incident is unknown", "incident", w.first.Incident.ID, "error", err)
				done[w] = maxKills
			}
		}
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	left := n.waiting[:0:0]
	for _, w := range n.waiting {
		if done[w] >= len(w.kills) {
			continue
		}
		if !w.next.After(now) {
			w.next = now.Add(readAgain)
		}
		if left = append(left, w); !ok || w.next.Before(next) {
			next, ok = w.next, true
		}
	}
	n.waiting = left
	return next, ok
}

// read reads the messages on a subject, by incident, from the first on that one of the incidents may have. It returns why
// it ended.
func (n *Enricher) read(ctx context.Context, subject string, all []*waiting) (messages map[string]*event.Neighbours, err error) {
	from := all[0].from
	for _, w := range all {
		from = min(from, w.from)
	}
	messages = map[string]*event.Neighbours{}
	for range maxMessages {
		data, seq, err := n.Next(ctx, subject, from)
		if err != nil {
			return messages, err
		}
		from = seq + 1
		for _, w := range all {
			w.from = max(w.from, from)
		}
		m, err := event.ParseNeighbours(data)
		if err == nil && m.Node.Name == all[0].first.Node.Name { // the subject's node
			messages[m.Incident] = &m
		}
	}
	return messages, nil
}

// complete completes an incident with the kills that were recorded so far, and returns their number.
func (n *Enricher) complete(w *waiting, m *event.Neighbours) int {
	n.mu.Lock()
	kills := w.kills
	n.mu.Unlock()
	after := n.after(kills, m)
	if after == "" {
		return len(kills)
	}
	n.recorder.Complete(w.first.Incident.ID, after)
	for _, k := range kills {
		if k.e.ID == m.Kill { // an incident has one such outcome, of this kill
			n.publish(k, after)
		}
	}
	return len(kills)
}

// after says what held a large part of the memory, and names the pods that used most after an incident. A pod in which a
// process was killed is not one of the others: its usage is shown only if it is the highest.
func (n *Enricher) after(kills []victimKill, m *event.Neighbours) string {
	victims := map[string]bool{} // by UID, that of the cgroup and that of the API
	victimPods := map[string]bool{}
	for _, k := range kills {
		if k.e.Container != nil && k.e.Container.PodUID != "" {
			victims[k.e.Container.PodUID] = true
		}
		if k.o.Pod != nil {
			victims[k.o.Pod.UID], victimPods[k.o.Pod.UID] = true, true
		}
	}
	var others []string
	own, hit := "", 0
	for i := range m.Pods {
		p := &m.Pods[i]
		f, err := n.Find(m.Node.Name, p.PodUID, "")
		ours := victims[p.PodUID] || err == nil && victims[f.Pod.UID]
		if ours || p.Victim {
			if hit++; i == 0 && ours {
				own = text.Size(p.Usage) + request(f, err)
			}
			continue
		}
		name := "pod " + text.Printable(text.Truncate(p.PodUID, 36))
		if err == nil {
			name = f.Pod.Namespace + "/" + f.Pod.Name
		}
		if len(others) < maxNamed {
			others = append(others, name+" "+text.Size(p.Usage)+request(f, err))
		}
	}
	var parts []string
	if large := text.LargePart(m.Breakdown); large != "" {
		parts = append(parts, large)
	}
	before := len(parts)
	if own != "" && hit == 1 && len(victimPods) == 1 {
		parts = append(parts, "its own pod still used "+own)
	}
	if others != nil {
		parts = append(parts, "other pods then used: "+strings.Join(others, ", "))
	}
	if len(parts) > before && m.Incomplete {
		parts = append(parts, "not every pod could be read")
	}
	return strings.Join(parts, "; ")
}

// request is the memory request of a pod, in parentheses.
func request(f pods.Found, err error) string {
	switch {
	case err != nil:
		return ""
	case f.Pod.Request > 0:
		return " (request " + text.Size(uint64(f.Pod.Request)) + ")"
	}
	return " (no request)"
}

// publish publishes the text as an outcome of the stage neighbours.
func (n *Enricher) publish(k victimKill, after string) {
	o := *k.o
	o.ID, o.Stage = event.OutcomeID(k.e.ID, event.StageNeighbours), event.StageNeighbours
	o.Time, o.Result, o.Reason = time.Now().UTC(), event.ResultObserved, event.ReasonNeighbours
	o.Detail, o.Annotation = text.Truncate(after, text.MaxDetail), ""
	if err := n.Publish(&o); err != nil {
		n.log.Warn("could not publish the memory usage after a kill", "id", k.e.ID, "error", err)
	}
}
