// Package report makes one HTML file of what the stream says about the kills of a time, for a post-mortem.
//
// Rule of the package: it takes messages and writes HTML. It reads nothing and knows no clock. Who may publish events may put
// anything into them, so all strings of an event pass text.Printable and the escaping of html/template. Its memory is bounded,
// however many messages it takes, and what it does not show it counts.
package report

import (
	"cmp"
	"slices"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/advice"
	"github.com/oom-tracer/oom-tracer/go/internal/fifo"
)

const (
	// maxIncidents is how many incidents are shown in full: those with the most kills, of equals the last.
	maxIncidents = 500
	// maxKept is how many are kept before the others are dropped.
	maxKept = 4 * maxIncidents
	// maxKills is how many kills of an incident are kept in full: the first.
	maxKills = 10
	// maxDecisions is how many decisions of the OOM killer are known to belong to one incident.
	maxDecisions = 64
	// together: kills at the same limit, or for the memory of the same node, belong together if less time is between them.
	together = 30 * time.Second
	// maxWaiting bounds the memory usages whose kill is not known yet, and the marks whose end is not.
	maxWaiting = 2_000
	// maxNames bounds the nodes, namespaces and workloads that are counted apart.
	maxNames = 10_000
	// maxGaps bounds the gaps of a node that are shown.
	maxGaps = 50
	// slots is how many parts of the time a timeline counts apart.
	slots = 96
)

// others is the name of what is one too many.
const others = "(others)"

// Options say what the report is about.
type Options struct {
	From, Until time.Time
	// Namespace and Node are empty for all. The kills are selected already.
	Namespace, Node string
	// Incident is the ID of a kill or of an incident. If it is set, the stories are those of the incidents that have it.
	Incident string
	Made     time.Time
}

// Stream is what is known of the stream after it was read.
type Stream struct {
	Messages   int // that were read
	Unreadable int
	// Begin is when the oldest message was stored, if older ones were removed.
	Begin time.Time
	// Unnamed is how many kills in pods have no outcome, which would name their pods.
	Unnamed int
}

// Workload is a row of oom-tap top.
type Workload struct {
	Name    string
	Kills   int
	Trend   string // rising or falling, or nothing of the kind
	Last    time.Time
	Level   event.LimitLevel
	Limit   *uint64
	Victim  string // the largest
	Largest uint64 // its RSS in bytes
	Advice  advice.Advice
}

// Node is the last status of a node.
type Node struct {
	Name    string
	Since   time.Time // recording began
	Heard   time.Time // when the status was stored
	State   string    // in a few words
	Watched bool      // at the time of the report
	// Unpublished is how many records are in the kernel and not in the stream yet.
	Unpublished uint64
}

// Report collects messages.
type Report struct {
	o Options

	kills      int
	first      time.Time // of all kills
	last       time.Time
	incidents  []*incident
	open       map[string][]*incident // by what ran out, the last ones at the end
	decisions  map[string]*incident   // by the IDs of the OOM killer's decisions
	byKill     map[string]*kill       // of the kills that are kept
	dropped    int                    // incidents
	droppedOf  int                    // their kills
	causes     map[cause]int          // of all incidents
	nodes      map[string]*node
	namespaces map[string]*series
	workloads  map[string]*series
	waiting    *fifo.Map[*event.Neighbours] // by decision
	marks      *fifo.Map[struct{}]          // by kill: what became of the mark is not known yet
	results    map[event.Result]int         // of the marks
}

// incident is kills that belong together.
type incident struct {
	key         string
	first, last time.Time
	kills       int
	rss         uint64 // of all
	cause       cause
	group       bool
	wanted      bool // by Options.Incident
	full        []*kill
	decisions   []string
	breakdown   *event.Neighbours // the first one that has it
	pods        *event.Neighbours // the same
	others      string            // what the other pods then used, with their names
}

// kill is a kill, and what became of it.
type kill struct {
	event    *event.Event
	outcome  *event.Outcome // nil: not known
	end      *event.Outcome // of the mark; nil: none or not known
	workload string
	of       *incident
}

// series counts kills over time.
type series struct {
	kills int
	at    [slots]uint32
}

// node is what is known of a node.
type node struct {
	series
	status *Node // nil: none is known
	gaps   []*event.Gap
	more   int // gaps
}

// cause is what ran out, as far as it matters for who can help.
type cause int

const (
	unclear  cause = iota
	ownLimit       // of a pod, or of something in it
	nodeWide       // the node, or several pods together
)

// New returns an empty report.
func New(o Options) *Report {
	return &Report{
		o: o, open: map[string][]*incident{}, decisions: map[string]*incident{}, byKill: map[string]*kill{}, causes: map[cause]int{},
		nodes: map[string]*node{}, namespaces: map[string]*series{}, workloads: map[string]*series{},
		waiting: fifo.New[*event.Neighbours](maxWaiting), marks: fifo.New[struct{}](maxWaiting), results: map[event.Result]int{},
	}
}

// Kill adds a kill and its outcome of the stage annotate, which is nil if it is not known. The workload is its name in oom-tap top.
func (r *Report) Kill(workload string, e *event.Event, o *event.Outcome) {
	r.kills++
	if r.first.IsZero() || e.Time.Before(r.first) {
		r.first = e.Time
	}
	if e.Time.After(r.last) {
		r.last = e.Time
	}
	slot := r.slot(e.Time)
	namespace := workload
	if o != nil && o.Pod != nil {
		namespace = o.Pod.Namespace
	}
	named(r.nodes, e.Node.Name).add(slot)
	named(r.namespaces, namespace).add(slot)
	named(r.workloads, workload).add(slot)

	i := r.incident(e)
	i.kills++
	i.group = i.group || e.Incident != nil && e.Incident.Group
	i.wanted = i.wanted || r.o.Incident != "" && (e.ID == r.o.Incident || e.Incident != nil && e.Incident.ID == r.o.Incident)
	if m := e.Victim.Memory; m != nil {
		i.rss += m.AnonRSS + m.FileRSS + m.ShmemRSS
	}
	if e.Time.Before(i.first) {
		i.first = e.Time
	}
	if e.Time.After(i.last) {
		i.last = e.Time
	}
	if o != nil && o.Result == event.ResultAnnotated {
		r.marks.Add(e.ID, struct{}{})
		r.results[event.ResultAnnotated]++
	}
	if len(i.full) < maxKills {
		k := &kill{event: e, outcome: o, workload: workload, of: i}
		i.full = append(i.full, k)
		r.byKill[e.ID] = k
	}
	if len(r.incidents) > maxKept {
		r.drop()
	}
}

// incident returns that of a kill, the last one or a new one.
func (r *Report) incident(e *event.Event) *incident {
	decision := e.ID
	if e.Incident != nil {
		decision = e.Incident.ID
	}
	if i := r.decisions[decision]; i != nil {
		return i
	}
	key := whatRanOut(e)
	var of *incident
	for _, i := range slices.Backward(r.open[key]) {
		if e.Time.After(i.first.Add(-together)) && e.Time.Before(i.last.Add(together)) {
			of = i
			break
		}
	}
	if of == nil {
		of = &incident{key: key, first: e.Time, last: e.Time, cause: causeOf(e)}
		r.incidents = append(r.incidents, of)
		r.open[key] = append(r.open[key], of)
		r.causes[of.cause]++
	}
	if len(of.decisions) < maxDecisions {
		of.decisions = append(of.decisions, decision)
		r.decisions[decision] = of
		if n, ok := r.waiting.Take(decision); ok {
			of.usage(n)
		}
	}
	return of
}

// whatRanOut names the limit or the node of a kill.
func whatRanOut(e *event.Event) string {
	what := string(e.Scope)
	switch c := e.Container; {
	case e.Scope == event.ScopeCgroup && e.Limit != nil && e.Limit.Cgroup != nil:
		what += " " + e.Limit.Cgroup.Path
	case (e.Scope == event.ScopeCgroup || e.Scope == event.ScopeUnknown) && c != nil:
		what += " " + c.PodUID + " " + c.ContainerID
	}
	return e.Node.Name + " " + what
}

func causeOf(e *event.Event) cause {
	switch {
	case e.BeyondPod():
		return nodeWide
	case e.Limit != nil && (e.Limit.Level == event.LevelPod || e.Limit.Level == event.LevelContainer):
		return ownLimit
	}
	return unclear
}

// drop keeps the largest incidents, and the last ones, which may still grow.
func (r *Report) drop() {
	young := len(r.incidents) - maxIncidents
	keep := largest(r.incidents[:young], maxIncidents)
	kept := make(map[*incident]bool, len(keep))
	for _, i := range keep {
		kept[i] = true
	}
	for _, i := range r.incidents[:young] {
		if kept[i] {
			continue
		}
		r.dropped++
		r.droppedOf += i.kills
		for _, id := range i.decisions {
			delete(r.decisions, id)
		}
		for _, k := range i.full {
			delete(r.byKill, k.event.ID)
		}
		if rest := slices.DeleteFunc(r.open[i.key], func(o *incident) bool { return o == i }); len(rest) > 0 {
			r.open[i.key] = rest
		} else {
			delete(r.open, i.key)
		}
	}
	r.incidents = append(keep, r.incidents[young:]...)
}

// largest returns the n incidents with the most kills, of equals the last, in their order.
func largest(all []*incident, n int) []*incident {
	sorted := slices.SortedStableFunc(slices.Values(all), func(a, b *incident) int {
		switch {
		case a.wanted != b.wanted && a.wanted:
			return -1
		case a.wanted != b.wanted:
			return 1
		}
		return cmp.Or(cmp.Compare(b.kills, a.kills), b.last.Compare(a.last))
	})
	keep := map[*incident]bool{}
	for _, i := range sorted[:min(n, len(sorted))] {
		keep[i] = true
	}
	return slices.DeleteFunc(slices.Clone(all), func(i *incident) bool { return !keep[i] })
}

// Outcome adds any outcome, after the kill.
func (r *Report) Outcome(o *event.Outcome) {
	k := r.byKill[o.Kill]
	switch o.Stage {
	case event.StageAnnotate:
		if k != nil && k.outcome == nil {
			k.outcome = o
		}
	case event.StageNeighbours:
		if k != nil && k.of.others == "" {
			k.of.others = o.Detail
		}
	case event.StageClose:
		if _, ok := r.marks.Take(o.Kill); ok {
			r.results[o.Result]++
		}
		if k != nil && k.end == nil {
			k.end = o
		}
	}
}

// Neighbours adds what the memory was used for, before the kill or after it.
func (r *Report) Neighbours(n *event.Neighbours) {
	switch i, k := r.decisions[n.Incident], r.byKill[n.Kill]; {
	case i != nil:
		i.usage(n)
	case k != nil:
		k.of.usage(n)
	default:
		r.waiting.Add(n.Incident, n)
	}
}

func (i *incident) usage(n *event.Neighbours) {
	if i.breakdown == nil && n.Breakdown != nil {
		i.breakdown = n
	}
	if i.pods == nil && n.Pods != nil {
		i.pods = n
	}
}

// Gap adds a gap in which kills may be missing. One that was stored in the time counts, whatever the clock of its node says.
func (r *Report) Gap(g *event.Gap, stored time.Time) {
	if from, _ := gapSpan(g); from.After(r.o.Until) && stored.After(r.o.Until) {
		return
	}
	n := named(r.nodes, g.Node.Name)
	if len(n.gaps) >= maxGaps {
		n.more++
		return
	}
	n.gaps = append(n.gaps, g)
}

// Node adds the last status of a node.
func (r *Report) Node(s Node) { named(r.nodes, s.Name).status = &s }

// Found tells whether a kill with the ID Options.Incident was added.
func (r *Report) Found() bool {
	return slices.ContainsFunc(r.incidents, func(i *incident) bool { return i.wanted })
}

// slot is the part of the time that a moment is in. What was before is in the first, what was after in the last.
func (r *Report) slot(t time.Time) int {
	at := t.Sub(r.o.From).Seconds() / r.o.Until.Sub(r.o.From).Seconds() * slots
	return int(max(0, min(at, slots-1)))
}

func (s *series) add(slot int) {
	s.kills++
	s.at[slot]++
}

// named returns what has this name, and makes it.
func named[T any](all map[string]*T, name string) *T {
	if all[name] == nil {
		if len(all) >= maxNames {
			name = others
		}
		if all[name] == nil {
			all[name] = new(T)
		}
	}
	return all[name]
}
