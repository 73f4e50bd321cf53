package tap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/report"
)

// around is how much is reported before and after the kill of --incident.
const around = 15 * time.Minute

// writeReport writes the report to standard output. What it counts and advises is what top and advise do.
func writeReport(ctx context.Context, conn *bus.Conn, o options, stdout, stderr io.Writer) error {
	now := time.Now()
	held, err := conn.Held(ctx)
	if err != nil {
		return fmt.Errorf("look up what stream %s holds: %w", event.StreamName, err)
	}
	if o.incident != "" {
		if err := o.find(ctx, conn, now); err != nil {
			return err
		}
	}
	stream := report.Stream{}
	switch {
	case held.FirstSeq > 1 && held.FirstSeq <= held.LastSeq:
		stream.Begin = held.FirstTime
	case held.FirstSeq > 1: // nothing is left
		stream.Begin = now
	}
	r := report.New(report.Options{From: o.from, Until: o.until, Namespace: o.namespace, Node: o.node, Incident: o.incident, Made: now})
	unreadable := &lines{w: stderr}
	if err := readNodes(ctx, conn, o, r, now, unreadable); err != nil {
		return err
	}
	var patterns []string
	for _, kind := range []event.Kind{event.KindKill, event.KindOutcome, event.KindGap, event.KindNeighbours} {
		pattern, err := event.Filter(kind, "", o.node)
		if err != nil {
			return err
		}
		patterns = append(patterns, pattern)
	}
	c := newCounter(o, o.from.Add(o.until.Sub(o.from)/2))
	c.each = r.Kill
	// To the end of the stream: what was done about a kill may be stored hours later, and so may the kill.
	err = each(ctx, conn, bus.TailOptions{Subjects: patterns, Since: o.from}, unreadable, func(m bus.Stored, msg message) error {
		stream.Messages++
		if msg.kill != nil && msg.kill.Time.After(o.until) && m.Time.After(o.until) || !c.take(m, msg) {
			return nil
		}
		switch {
		case msg.outcome != nil:
			r.Outcome(msg.outcome)
		case msg.neighbours != nil:
			r.Neighbours(msg.neighbours)
		case msg.gap != nil && msg.gap.Missing():
			r.Gap(msg.gap, m.Time)
		}
		return nil
	})
	if err != nil {
		return err
	}
	c.rest()
	if o.incident != "" && !r.Found() {
		return o.notFound()
	}
	stream.Unreadable, stream.Unnamed = unreadable.n, c.unknown
	var top []report.Workload
	for _, row := range c.sorted() {
		top = append(top, report.Workload{
			Name: row.Name, Kills: row.Kills, Trend: row.trend(), Last: row.Last, Level: row.Level, Limit: row.Limit,
			Victim: row.Victim, Largest: row.Largest, Advice: row.advice(),
		})
	}
	return r.Write(stdout, stream, top)
}

// readNodes adds the last status of each node.
func readNodes(ctx context.Context, conn *bus.Conn, o options, r *report.Report, now time.Time, stderr io.Writer) error {
	pattern, err := event.Filter(event.KindNode, "", o.node)
	if err != nil {
		return err
	}
	t := bus.TailOptions{Stream: event.NodesStreamName, Subjects: []string{pattern}, Since: time.Unix(0, 0)}
	return each(ctx, conn, t, stderr, func(m bus.Stored, msg message) error {
		s := heard{*msg.status, m.Time}
		state, since := watched(&s, now), s.stored
		if !s.Since.IsZero() {
			since = s.stored.Add(-s.Time.Sub(s.Since)) // by the server's clock
		}
		r.Node(report.Node{
			Name: msg.node, Since: since, Heard: s.stored, State: state + s.clock(), Watched: state == "watched",
			Unpublished: s.Seq - min(s.Seq, s.Acked),
		})
		return nil
	})
}

// find sets the time of the report to that around the kill or the incident of --incident.
func (o *options) find(ctx context.Context, conn *bus.Conn, now time.Time) error {
	pattern, err := event.Filter(event.KindKill, "", "")
	if err != nil {
		return err
	}
	t := bus.TailOptions{Subjects: []string{pattern}, Since: time.Unix(0, 0)}
	err = each(ctx, conn, t, io.Discard, func(m bus.Stored, msg message) error {
		if e := msg.kill; e != nil && (e.ID == o.incident || e.Incident != nil && e.Incident.ID == o.incident) {
			at := e.Time
			if m.Time.Before(at) {
				at = m.Time // the node's clock is ahead
			}
			o.from, o.until = at.Add(-around), at.Add(around)
			if o.until.After(now) {
				o.until = now
			}
			return errEnough
		}
		return nil
	})
	switch {
	case errors.Is(err, errEnough):
		return nil
	case err != nil:
		return err
	}
	return o.notFound()
}

func (o *options) notFound() error {
	return fmt.Errorf("no kill or incident with the ID %q is in the stream: %s --since 24h --no-follow --kills -o json shows the IDs", o.incident, o.name)
}

// lines counts the lines that it passes on.
type lines struct {
	w io.Writer
	n int
}

func (l *lines) Write(p []byte) (int, error) {
	l.n += bytes.Count(p, []byte("\n"))
	return l.w.Write(p)
}
