package tap

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/advice"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/fifo"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const (
	// maxRows bounds the workloads, pods, namespaces, nodes or images that are counted apart.
	maxRows = 10_000
	// maxWaiting bounds the kills whose outcomes are waited for. An outcome follows its kill within seconds.
	maxWaiting = 10_000
)

// others is the name of the row that counts what is one too many.
const others = "(others)"

// row is what top shows of one workload, pod, namespace, node or image.
type row struct {
	Name    string           `json:"name"`
	Kills   int              `json:"kills"`
	Recent  int              `json:"recent"` // in the second half of the time
	Last    time.Time        `json:"last"`   // of the stream
	Level   event.LimitLevel `json:"level,omitempty"`
	Limit   *uint64          `json:"limit,omitempty"` // of the last kill that had one, in bytes
	Victim  string           `json:"victim"`          // the largest: its name
	Largest uint64           `json:"largest"`         // and its RSS in bytes

	history *advice.History // nil unless there is advice to give
}

// trend compares the second half of the time with the first.
func (r *row) trend() string {
	switch before := r.Kills - r.Recent; {
	case r.Recent > 2*before && r.Recent > 1:
		return "rising"
	case before > 2*r.Recent && before > 1:
		return "falling"
	}
	return "-"
}

// counter counts kills by what --by names.
type counter struct {
	o       options
	half    time.Time
	rows    map[string]*row
	waiting *fifo.Map[counted] // by the kill's ID
	unknown int                // kills in pods that have no outcome, and so no name
	gaps    map[string]bool    // the nodes that have some
	// What else is known of a kill or an incident comes under its ID, before or after the outcome.
	related *fifo.Map[*related]
	seen    *fifo.Map[struct{}]
	// each takes each kill that is counted, the row's name and the outcome of stage annotate, or nil. It may be nil itself.
	each func(row string, e *event.Event, o *event.Outcome)
}

func newCounter(o options, half time.Time) *counter {
	return &counter{
		o: o, half: half, rows: map[string]*row{}, gaps: map[string]bool{},
		waiting: fifo.New[counted](maxWaiting), related: fifo.New[*related](maxWaiting), seen: fifo.New[struct{}](4 * maxWaiting),
	}
}

// related is what belongs to one kill or one incident.
type related struct {
	histories []*advice.History
	pods      *event.Neighbours
}

// counted is what is kept of a kill until its outcome comes.
type counted struct {
	event  *event.Event
	stored time.Time
}

// top shows what is killed most.
func top(ctx context.Context, conn *bus.Conn, o options, stdout, stderr io.Writer) error {
	now := time.Now()
	c, err := count(ctx, conn, o, now, stderr)
	if err != nil {
		return err
	}
	if err := c.write(stdout, now); err != nil {
		return err
	}
	c.unseen(stderr)
	return nil
}

// count counts the kills that the stream holds.
func count(ctx context.Context, conn *bus.Conn, o options, now time.Time, stderr io.Writer) (*counter, error) {
	kinds := []event.Kind{event.KindKill, event.KindOutcome, event.KindGap}
	if o.advice {
		kinds = append(kinds, event.KindNeighbours)
	}
	var patterns []string
	for _, kind := range kinds {
		pattern, err := event.Filter(kind, "", o.node)
		if err != nil {
			return nil, err
		}
		patterns = append(patterns, pattern)
	}
	c := newCounter(o, now.Add(-o.since/2))
	err := each(ctx, conn, bus.TailOptions{Subjects: patterns, Since: now.Add(-o.since)}, stderr, func(m bus.Stored, r message) error {
		c.take(m, r)
		return nil
	})
	c.rest()
	return c, err
}

// take takes a message, in the stream's order, and reports whether it is new.
func (c *counter) take(m bus.Stored, r message) bool {
	switch {
	case !c.seen.AddNew(r.id, struct{}{}):
		return false
	case r.gap != nil && r.gap.Missing():
		c.gaps[r.node] = true
	case r.kill != nil:
		c.kill(r.kill, m.Time)
	case r.outcome != nil && r.outcome.Stage == event.StageAnnotate:
		c.outcome(r.outcome)
	case r.outcome != nil && r.outcome.Stage == event.StageNeighbours && c.o.advice:
		for _, h := range c.relatedTo(r.outcome.Kill).histories {
			h.AddNeighbours(r.outcome)
		}
	case r.neighbours != nil:
		of := c.relatedTo(r.neighbours.Incident)
		of.pods = r.neighbours
		for _, h := range of.histories {
			h.AddPods(of.pods)
		}
	}
	return true
}

// rest counts the kills that still wait for an outcome.
func (c *counter) rest() {
	for k := range c.waiting.All() {
		c.give(k)
	}
}

// unseen reports what is not known. Neither is an all-clear.
func (c *counter) unseen(stderr io.Writer) {
	if c.unknown > 0 {
		fmt.Fprintf(stderr, "%s: %d kills in pods have no outcome, so their pods are not known: does oom-annotator run?\n", c.o.name, c.unknown)
	}
	if len(c.gaps) > 0 {
		fmt.Fprintf(stderr, "%s: kills may be missing (gaps) on: %s; see %[1]s nodes\n", c.o.name, text.Printable(strings.Join(slices.Sorted(maps.Keys(c.gaps)), ", ")))
	}
}

// relatedTo returns what belongs to a kill or an incident, by its ID.
func (c *counter) relatedTo(id string) *related {
	of, ok := c.related.Get(id)
	if !ok {
		of = &related{}
		c.related.Add(id, of)
	}
	return of
}

// kill takes a kill. One in a pod waits for its outcome, which names the pod.
func (c *counter) kill(e *event.Event, stored time.Time) {
	switch {
	case c.o.by == "node" && c.o.namespace == "":
		c.add(e.Node.Name, e, nil, stored)
	case e.Container == nil:
		if c.o.namespace == "" {
			c.add("(no pod)", e, nil, stored)
		}
	default:
		if oldest, dropped := c.waiting.Add(e.ID, counted{e, stored}); dropped {
			c.give(oldest)
		}
	}
}

// give counts a kill that has no outcome.
func (c *counter) give(k counted) {
	c.unknown++
	if c.o.namespace == "" {
		c.add("(pod not known)", k.event, nil, k.stored)
	}
}

// outcome counts the kill that it is of.
func (c *counter) outcome(o *event.Outcome) {
	k, ok := c.waiting.Take(o.Kill)
	if !ok {
		return
	}
	switch p := o.Pod; {
	case p == nil && c.o.namespace == "":
		c.add("(pod not found)", k.event, o, k.stored)
	case p == nil, c.o.namespace != "" && p.Namespace != c.o.namespace:
	case c.o.by == "node":
		c.add(k.event.Node.Name, k.event, o, k.stored)
	case c.o.by == "image":
		c.add(cmp.Or(o.Image, "(image not known)"), k.event, o, k.stored)
	case c.o.by == "namespace":
		c.add(p.Namespace, k.event, o, k.stored)
	case c.o.by == "workload" && p.Owner != "":
		c.add(p.Namespace+"/"+p.Owner, k.event, o, k.stored)
	case c.o.by == "workload":
		c.add(p.Namespace+"/Pod/"+p.Name, k.event, o, k.stored)
	default:
		c.add(p.Namespace+"/"+p.Name, k.event, o, k.stored)
	}
}

// add counts a kill in the row of that name. Its outcome is nil if there is none.
func (c *counter) add(name string, e *event.Event, o *event.Outcome, stored time.Time) {
	r := c.rows[name]
	if r == nil {
		if len(c.rows) >= maxRows {
			name = others
		}
		if r = c.rows[name]; r == nil {
			r = &row{Name: name}
			c.rows[name] = r
		}
	}
	if c.each != nil {
		c.each(name, e, o)
	}
	r.Kills++
	r.Last = stored.UTC()
	if stored.After(c.half) {
		r.Recent++
	}
	if e.Limit != nil {
		r.Level = e.Limit.Level
		if e.Limit.Max != nil {
			r.Limit = e.Limit.Max
		}
	}
	if c.o.advice && o != nil && o.Pod != nil && name != others {
		c.advise(r, e, o)
	}
	var rss uint64
	if m := e.Victim.Memory; m != nil {
		rss = m.AnonRSS + m.FileRSS + m.ShmemRSS
	}
	if r.Victim == "" || rss > r.Largest {
		r.Victim, r.Largest = e.Victim.Comm, rss
	}
}

// sorted returns the rows, those with the most kills first.
func (c *counter) sorted() []*row {
	return slices.SortedFunc(maps.Values(c.rows), func(a, b *row) int {
		return cmp.Or(cmp.Compare(b.Kills, a.Kills), cmp.Compare(a.Name, b.Name))
	})
}

// write prints the rows with the most kills.
func (c *counter) write(w io.Writer, now time.Time) error {
	rows := c.sorted()
	if c.o.count > 0 {
		rows = rows[:min(len(rows), c.o.count)]
	}
	if c.o.output == "json" {
		encoder := json.NewEncoder(w)
		for _, r := range rows {
			if err := encoder.Encode(r); err != nil {
				return fmt.Errorf("write: %w", err)
			}
		}
		return nil
	}
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	title, what := strings.ToUpper(c.o.by), ""
	if c.o.output == "wide" {
		title += "\tADVICE"
	}
	fmt.Fprintf(table, "KILLS\tTREND\tLAST\tLEVEL\tLIMIT\tLARGEST VICTIM\t%s\n", title)
	for _, r := range rows {
		limit := "-"
		if r.Limit != nil {
			limit = text.Size(*r.Limit)
		}
		if c.o.output == "wide" {
			what = "\t" + r.advice().Clause
		}
		fmt.Fprintf(table, "%d\t%s\t%s\t%s\t%s\t%s %s\t%s%s\n", r.Kills, r.trend(), ago(now.Sub(r.Last)), text.Printable(cmp.Or(string(r.Level), "-")),
			limit, text.Printable(r.Victim), text.Size(r.Largest), text.Printable(r.Name), what)
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}
