package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// nodes shows the last status of every node that has ever said one, within the stream's age.
func nodes(ctx context.Context, conn *bus.Conn, o options, stdout, stderr io.Writer) error {
	var all []event.NodeStatus
	terminal := isTerminal(stdout)
	err := bus.Tail(ctx, conn, bus.TailOptions{Stream: event.NodesStreamName, Since: time.Unix(0, 0)}, func(m bus.Stored) error {
		_, _, node, err := event.ParseSubject(m.Subject)
		if err != nil {
			skip(stderr, m, err)
			return nil
		}
		s, err := event.ParseNodeStatus(m.Data)
		if err == nil {
			err = sameNode(s.Node.Name, node)
		}
		if err != nil {
			skip(stderr, m, err)
			return nil
		}
		if o.output == "json" {
			fmt.Fprintf(stdout, "%s\n", rendered(m.Data, terminal))
			return nil
		}
		all = append(all, s)
		return nil
	})
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		return fmt.Errorf("%w: make it with: oom-tap setup --config %s", err, o.configPath)
	case err != nil:
		return err
	case o.output == "json":
		return nil
	}
	slices.SortFunc(all, func(a, b event.NodeStatus) int { return strings.Compare(a.Node.Name, b.Node.Name) })
	return writeNodes(stdout, all, time.Now())
}

// watched says whether a node is watched at a moment: what it said last, unless that is too long ago.
func watched(s *event.NodeStatus, now time.Time) string {
	switch {
	case s.Phase == event.PhaseStop && s.Pinned:
		return "stopped, kernel records" // and the next tracer tells
	case s.Phase == event.PhaseStop:
		return "stopped"
	// Once the due time again, for a clock that goes differently and a server that was slow.
	case s.Due != nil && now.After(s.Due.Add(s.Due.Sub(s.Time))):
		return "QUIET"
	}
	return "watched"
}

// gaps says what is missing of a node's kills.
func gaps(s *event.NodeStatus) string {
	var missing []string
	if s.Lost > 0 {
		missing = append(missing, fmt.Sprintf("%d lost", s.Lost))
	}
	if s.Unseen != nil && s.Unseen.AtLeast > 0 {
		missing = append(missing, fmt.Sprintf("%d unseen", s.Unseen.AtLeast))
	}
	if missing == nil {
		return "-"
	}
	return strings.Join(missing, ", ")
}

func writeNodes(w io.Writer, all []event.NodeStatus, now time.Time) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "NODE\tSTATE\tHEARD\tTIER\tKERNEL\tVERSION\tSEQ\tUNACKED\tGAPS\tLAST KILL")
	for i := range all {
		s := &all[i]
		last := "-"
		if s.LastKill != nil {
			last = ago(now.Sub(*s.LastKill))
		}
		columns := []string{
			s.Node.Name, watched(s, now), ago(now.Sub(s.Time)), s.Node.Tier, s.Node.Kernel, s.Version,
			fmt.Sprint(s.Seq), fmt.Sprint(s.Seq - min(s.Seq, s.Acked)), gaps(s), last,
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

// ago is a time span in its largest unit, as people say it.
func ago(d time.Duration) string {
	switch d = max(d, 0); {
	case d < 2*time.Minute:
		return fmt.Sprintf("%ds ago", int(d.Seconds()))
	case d < 2*time.Hour:
		return fmt.Sprintf("%dm ago", int(d.Minutes()))
	case d < 48*time.Hour:
		return fmt.Sprintf("%dh ago", int(d.Hours()))
	}
	return fmt.Sprintf("%dd ago", int(d.Hours()/24))
}
