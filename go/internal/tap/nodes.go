package tap

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// nodes shows the last status of every node that has ever published one, and the gaps of each.
func nodes(ctx context.Context, conn *bus.Conn, o options, stdout, stderr io.Writer) error {
	var all []heard
	p := newPrinter(stdout, o)
	err := each(ctx, conn, bus.TailOptions{Stream: event.NodesStreamName, Since: time.Unix(0, 0)}, stderr, func(m bus.Stored, r message) error {
		all = append(all, heard{*r.status, m.Time})
		if o.output == "json" {
			return p.print("", m.Data)
		}
		return nil
	})
	if err != nil || o.output == "json" && o.failOn == nil {
		return err
	}
	pattern, err := event.Filter(event.KindGap, "", "")
	if err != nil {
		return err
	}
	now := time.Now()
	gaps := map[string]gapsOf{}
	err = each(ctx, conn, bus.TailOptions{Subjects: []string{pattern}, Since: time.Unix(0, 0)}, stderr, func(m bus.Stored, r message) error {
		if r.gap.Missing() && (o.since == 0 || now.Sub(m.Time) <= o.since) {
			of := gaps[r.node]
			of.count++
			of.cause, of.last = r.gap.Cause, m.Time // in the stream's order
			gaps[r.node] = of
		}
		return nil
	})
	if err != nil {
		return err
	}
	slices.SortFunc(all, func(a, b heard) int { return strings.Compare(a.Node.Name, b.Node.Name) })
	if o.output != "json" {
		if err := writeNodes(stdout, all, gaps, now); err != nil {
			return err
		}
	}
	return o.fails(all, gaps, now)
}

// fails returns what --fail-on asks for.
func (o *options) fails(all []heard, gaps map[string]gapsOf, now time.Time) error {
	var why, quiet []string
	for i := range all {
		if state := watched(&all[i], now); state == "QUIET" || state == "stopped" {
			quiet = append(quiet, text.Printable(all[i].Node.Name))
		}
	}
	switch {
	case !slices.Contains(o.failOn, "quiet"):
	case len(all) == 0:
		why = append(why, "no node is known")
	case len(quiet) > 0:
		why = append(why, "not watched: "+strings.Join(quiet, ", "))
	}
	if slices.Contains(o.failOn, "gap") && len(gaps) > 0 {
		names := slices.Sorted(maps.Keys(gaps))
		for i, name := range names {
			names[i] = text.Printable(name)
		}
		why = append(why, "OOM kills may not have been recorded: "+strings.Join(names, ", "))
	}
	if why == nil {
		return nil
	}
	return errors.New(strings.Join(why, "; "))
}

// heard is the last status of a node, and when that was stored. The node's clock may be wrong: only differences of its times
// are used.
type heard struct {
	event.NodeStatus
	stored time.Time
}

// clock returns how wrong the clock of a node is. A small delay may be the way to NATS.
func (s *heard) clock() string {
	switch ahead := s.Time.Sub(s.stored); {
	case ahead > 2*time.Second:
		return ", clock " + span(ahead) + " ahead"
	case ahead < -time.Minute:
		return ", clock " + span(-ahead) + " behind"
	}
	return ""
}

// watched returns whether a node is watched at a moment: its last status, unless that is too old.
func watched(s *heard, now time.Time) string {
	switch {
	case s.Phase == event.PhaseStop && s.Pinned:
		return "stopped, kernel records" // and the next tracer publishes
	case s.Phase == event.PhaseStop:
		return "stopped"
	// Twice the due time, for a clock of another speed and a slow server.
	case s.Due != nil && now.Sub(s.stored) > 2*s.Due.Sub(s.Time):
		return "QUIET"
	}
	return "watched"
}

// gapsOf is how many gaps a node has published, and the last one.
type gapsOf struct {
	count int
	cause event.GapCause
	last  time.Time // when it was stored
}

func (g gapsOf) text(now time.Time) string {
	if g.count == 0 {
		return "-"
	}
	return fmt.Sprintf("%d, %s %s", g.count, g.cause, ago(now.Sub(g.last)))
}

func writeNodes(w io.Writer, all []heard, gaps map[string]gapsOf, now time.Time) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "NODE\tSTATE\tHEARD\tTIER\tKERNEL\tVERSION\tSEQ\tUNACKED\tGAPS\tLAST KILL")
	for i := range all {
		s := &all[i]
		last := "-"
		if s.LastKill != nil {
			last = ago(s.Time.Sub(*s.LastKill) + now.Sub(s.stored))
		}
		columns := []string{
			s.Node.Name, watched(s, now) + s.clock(), ago(now.Sub(s.stored)), s.Node.Tier, s.Node.Kernel, s.Version,
			fmt.Sprint(s.Seq), fmt.Sprint(s.Seq - min(s.Seq, s.Acked)), gaps[s.Node.Name].text(now), last,
		}
		for i, c := range columns {
			columns[i] = text.Printable(c)
		}
		fmt.Fprintln(table, strings.Join(columns, "\t"))
	}
	if err := table.Flush(); err != nil {
		return fmt.Errorf("write: %w", err)
	}
	return nil
}

func ago(d time.Duration) string { return span(d) + " ago" }

// span is a time span in its largest unit.
func span(d time.Duration) string {
	switch d = max(d, 0); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh", int(d.Hours()))
	}
	return fmt.Sprintf("%dd", int(d.Hours()/24))
}
