package tap

import (
	"cmp"
	"context"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/fifo"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// story is what is known of a pod, and how many other kills may be of it too.
type story struct {
	o       options
	results map[string]event.Result // of its kills, by ID: the last one
	uids    map[string]bool         // of the pods that had this name
	nodes   map[string]bool         // that these pods ran on
	marked  time.Time               // last
	// restarts are the fewest and the most of each container, by its pod's UID and its name, at the kills of the last hour.
	restarts map[[2]string][2]uint32

	kills int
	ours  map[string]bool // the kills that were shown, by ID
	gaps  int             // of all nodes
	// The kills in pods that have no outcome. Of more than maxKills the oldest are counted only.
	waiting   *fifo.Map[struct{}]
	forgotten int
}

// pod prints the story of one pod: its kills, what the memory was used for then, their outcomes, its evictions by the kubelet, and the
// gaps of its nodes.
// The outcome of a kill names the pod. A kill without an outcome is matched by the UID.
//
// The stream is read twice, first for the outcomes, which tell the kills of the pod from others. So nothing of other pods is kept.
func pod(ctx context.Context, conn *bus.Conn, o options, stdout, stderr io.Writer) error {
	pattern := map[event.Kind]string{}
	for _, kind := range []event.Kind{event.KindKill, event.KindOutcome, event.KindGap, event.KindNeighbours, event.KindEviction} {
		var err error
		if pattern[kind], err = event.Filter(kind, "", ""); err != nil {
			return err
		}
	}
	from := time.Now().Add(-o.since)
	p := newPrinter(stdout, o)
	s := &story{o: o, results: map[string]event.Result{}, uids: map[string]bool{}, nodes: map[string]bool{}, waiting: fifo.New[struct{}](maxKills), ours: map[string]bool{}, restarts: map[[2]string][2]uint32{}}

	// What cannot be read is reported by the second reading.
	err := each(ctx, conn, bus.TailOptions{Subjects: []string{pattern[event.KindOutcome]}, Since: from}, io.Discard, func(m bus.Stored, r message) error {
		if r.outcome != nil && s.isOurs(r.outcome.Pod) {
			s.results[r.outcome.Kill] = r.outcome.Result
			s.uids[r.outcome.Pod.UID], s.nodes[r.node] = true, true
			if time.Since(m.Time) < time.Hour {
				s.restarted(r.outcome)
			}
		}
		return nil
	})
	if err != nil {
		return err
	}
	oldest := time.Time{}
	seen := fifo.New[struct{}](4 * maxKills)
	err = each(ctx, conn, bus.TailOptions{Subjects: slices.Collect(maps.Values(pattern)), Since: from}, stderr, func(m bus.Stored, r message) error {
		if oldest.IsZero() {
			oldest = m.Time
		}
		if !seen.AddNew(r.id, struct{}{}) || !s.take(&r) {
			return nil
		}
		return p.print(r.line(&p.table), m.Data)
	})
	if err != nil {
		return err
	}
	if oldest.IsZero() || oldest.Sub(from) > time.Hour {
		first := "none"
		if !oldest.IsZero() {
			first = oldest.UTC().Format(time.RFC3339)
		}
		defer fmt.Fprintf(stderr, "%s: the stream may begin later than --since (first message: %s)\n", o.name, first)
	}
	if s.kills > 0 || len(s.results) > 0 {
		if o.output != "json" {
			fmt.Fprintln(stdout, s.summary())
		}
		return nil
	}
	if err := s.unknown(); err != nil {
		return err
	}
	if o.output != "json" {
		fmt.Fprintf(stdout, "no kill in pod %s is known since %s\n", o.podName(), from.UTC().Format(time.RFC3339))
	}
	return nil
}

// podName is the pod with its namespace; "*" stands for all.
func (o *options) podName() string { return text.Printable(cmp.Or(o.namespace, "*") + "/" + o.pod) }

// isOurs tells whether p is the pod.
func (s *story) isOurs(p *event.PodRef) bool {
	return p != nil && p.Name == s.o.pod && (s.o.allNamespaces || p.Namespace == s.o.namespace)
}

// restarted notes how often a container was restarted when a process in it was killed.
func (s *story) restarted(o *event.Outcome) {
	if o.Restarts == nil {
		return
	}
	key := [2]string{o.Pod.UID, o.Container}
	seen, ok := s.restarts[key]
	if !ok {
		seen[0] = *o.Restarts
	}
	s.restarts[key] = [2]uint32{min(seen[0], *o.Restarts), max(seen[1], *o.Restarts)}
}

// take adds a message, in the stream's order, and reports whether it is of the pod.
func (s *story) take(r *message) bool {
	switch {
	case r.outcome != nil:
		s.waiting.Take(r.outcome.Kill)
		if !s.isOurs(r.outcome.Pod) {
			return false
		}
		if r.outcome.Result == event.ResultAnnotated {
			s.marked = r.outcome.Time
		}
		return true
	case r.gap != nil && !r.gap.Missing():
		return false
	case r.gap != nil:
		s.gaps++
		return s.nodes[r.node]
	case r.neighbours != nil:
		return s.ours[r.neighbours.Kill]
	case r.eviction != nil:
		return s.isOurs(&r.eviction.Pod)
	}
	_, ours := s.results[r.id]
	if c := r.kill.Container; c != nil {
		if ours = ours || c.PodUID != "" && s.uids[c.PodUID]; !ours {
			if _, dropped := s.waiting.Add(r.id, struct{}{}); dropped {
				s.forgotten++
			}
		}
	}
	if ours {
		s.kills++
		s.ours[r.id] = true
	}
	return ours
}

// exitUnknown is the exit status if the pod may have had kills that are not known.
const exitUnknown = 3

// unknown returns why a pod without known kills may still have had one.
func (s *story) unknown() error {
	var why []string
	if n := s.waiting.Len() + s.forgotten; n > 0 {
		why = append(why, fmt.Sprintf("%d kills in pods have no outcome (check that oom-annotator is running)", n))
	}
	if s.gaps > 0 {
		why = append(why, fmt.Sprintf("OOM kills may not have been recorded (%d gaps, see %s nodes)", s.gaps, s.o.name))
	}
	if why == nil {
		return nil
	}
	return cli.Status(exitUnknown, fmt.Errorf("no kill in pod %s is known, but there may have been some: %s", s.o.podName(), strings.Join(why, "; ")))
}

// summary is the story in one line.
func (s *story) summary() string {
	counts := map[event.Result]int{}
	for _, result := range s.results {
		counts[result]++
	}
	var results []string
	for result, n := range counts {
		results = append(results, fmt.Sprintf("%d %s", n, text.Printable(string(result))))
	}
	slices.Sort(results)
	line := fmt.Sprintf("%s: %d kills", s.o.podName(), s.kills)
	if len(s.uids) > 1 {
		line += fmt.Sprintf(" in %d pods of that name", len(s.uids))
	}
	if results != nil {
		line += "; final outcomes: " + strings.Join(results, ", ")
	}
	for _, key := range slices.SortedFunc(maps.Keys(s.restarts), func(a, b [2]string) int { return slices.Compare(a[:], b[:]) }) {
		if seen := s.restarts[key]; seen[1] > seen[0] {
			line += fmt.Sprintf("; container %s was restarted at least %d times in the last hour", text.Printable(key[1]), seen[1]-seen[0])
		}
	}
	if s.marked.IsZero() {
		return line + "; never marked"
	}
	return line + "; last marked at " + s.marked.UTC().Format(time.RFC3339)
}
