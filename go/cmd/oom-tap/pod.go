package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// entry is a message of a pod's story.
type entry struct {
	line, kill string
	raw        []byte
	node       string
	outcome    *event.Outcome
	event      *event.Event
}

// pod tells the story of one pod: its kills, what became of them, and what is missing of its node. Which pod a
// kill hit is what oom-annotator has said; a kill that it has not spoken of yet is the pod's by the UID.
func pod(ctx context.Context, conn *bus.Conn, o options, stdout, stderr io.Writer) error {
	var patterns []string
	for _, kind := range []event.Kind{event.KindKill, event.KindOutcome, event.KindGap} {
		pattern, err := event.Filter(kind, "", "")
		if err != nil {
			return err
		}
		patterns = append(patterns, pattern)
	}
	terminal := isTerminal(stdout)
	plain := os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb"
	table := text.Table{Color: terminal && !plain}
	from := time.Now().Add(-o.since)

	var all []entry
	kills, uids := map[string]bool{}, map[string]bool{} // of the pod
	seen := map[string]bool{}
	oldest := time.Time{}
	err := bus.Tail(ctx, conn, bus.TailOptions{Subjects: patterns, Since: from}, func(m bus.Stored) error {
		if oldest.IsZero() {
			oldest = m.Time
		}
		e, id, err := read(m, &table)
		if err != nil {
			skip(stderr, m, err)
			return nil
		}
		if seen[id] {
			return nil
		}
		seen[id] = true
		if out := e.outcome; out != nil {
			if out.Pod == nil || out.Pod.Name != o.pod || out.Pod.Namespace != o.namespace {
				return nil
			}
			kills[out.Kill], uids[out.Pod.UID] = true, true
		}
		all = append(all, e)
		return nil
	})
	if err != nil {
		return missingStream(err, o)
	}
	nodes := map[string]bool{}
	for i := range all {
		e := &all[i]
		if e.event != nil && e.event.Container != nil && e.event.Container.PodUID != "" && uids[e.event.Container.PodUID] {
			kills[e.kill] = true
		}
		if kills[e.kill] {
			nodes[e.node] = true
		}
	}
	story := slices.DeleteFunc(all, func(e entry) bool {
		return e.kill != "" && !kills[e.kill] || e.kill == "" && !nodes[e.node]
	})
	for _, e := range story {
		line := []byte(e.line)
		if o.output == "json" {
			line = rendered(e.raw, terminal)
		}
		switch _, err := fmt.Fprintf(stdout, "%s\n", line); {
		case errors.Is(err, syscall.EPIPE):
			return nil
		case err != nil:
			return fmt.Errorf("write: %w", err)
		}
	}
	if o.output == "json" {
		return nil
	}
	if len(kills) == 0 {
		fmt.Fprintf(stdout, "no kill in pod %s/%s is known since %s\n", text.Printable(o.namespace), text.Printable(o.pod), from.UTC().Format(time.RFC3339))
	} else {
		fmt.Fprintln(stdout, summary(story, o, len(uids)))
	}
	if oldest.IsZero() || oldest.Sub(from) > time.Hour {
		reach := "it holds nothing"
		if !oldest.IsZero() {
			reach = "the first message is of " + oldest.UTC().Format(time.RFC3339)
		}
		fmt.Fprintf(stderr, "oom-tap: the stream may not reach back that far: %s\n", reach)
	}
	return nil
}

// read reads a kill, an outcome or a gap.
func read(m bus.Stored, table *text.Table) (e entry, id string, err error) {
	kind, _, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		return entry{}, "", err
	}
	e.raw, e.node = m.Data, node
	switch kind {
	case event.KindOutcome:
		o, err := event.ParseOutcome(m.Data)
		if err == nil {
			err = sameNode(o.Node, node)
		}
		if err != nil {
			return entry{}, "", err
		}
		e.outcome, e.kill, e.line = &o, o.Kill, table.OutcomeLine(nil, &o)
		return e, o.ID, nil
	case event.KindKill:
		k, err := event.Parse(m.Data)
		if err == nil {
			err = sameNode(k.Node.Name, node)
		}
		if err != nil {
			return entry{}, "", err
		}
		e.event, e.kill, e.line = &k, k.ID, table.Line(&k)
		return e, k.ID, nil
	}
	e.line, id, err = parse(m, table)
	return e, id, err
}

// summary is the story in one sentence.
func summary(story []entry, o options, pods int) string {
	kills := 0
	last := map[string]string{} // by the kill: its last result
	marked := time.Time{}
	for _, e := range story {
		switch {
		case e.event != nil:
			kills++
		case e.outcome != nil:
			last[e.kill] = string(e.outcome.Result)
			if e.outcome.Result == event.ResultAnnotated {
				marked = e.outcome.Time
			}
		}
	}
	counts := map[string]int{}
	for _, result := range last {
		counts[result]++
	}
	var results []string
	for result, n := range counts {
		results = append(results, fmt.Sprintf("%d %s", n, text.Printable(result)))
	}
	slices.Sort(results)
	s := fmt.Sprintf("%s/%s: %d kills", text.Printable(o.namespace), text.Printable(o.pod), kills)
	if pods > 1 {
		s += fmt.Sprintf(" in %d pods of that name", pods)
	}
	if results != nil {
		s += "; in the end " + strings.Join(results, ", ")
	}
	if marked.IsZero() {
		return s + "; never marked"
	}
	return s + "; marked last at " + marked.UTC().Format(time.RFC3339)
}
