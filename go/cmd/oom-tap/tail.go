package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"syscall"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// subjects are the patterns that the options select. They do not overlap.
func subjects(o options) ([]string, error) {
	kinds := []event.Kind{event.KindKill}
	if !o.kills && !o.outcomes {
		kinds = append(kinds, event.KindExiting)
	}
	if !o.kills {
		kinds = append(kinds, event.KindNeighbours)
	}
	scopes := o.scopes
	if len(scopes) == 0 {
		scopes = []string{""}
	}
	var patterns []string
	for _, kind := range kinds {
		for _, scope := range scopes {
			pattern, err := event.Filter(kind, scope, o.node)
			if err != nil {
				return nil, err
			}
			patterns = append(patterns, pattern)
		}
	}
	if !o.kills {
		// Whatever is selected: the kills that a gap stands for may be just those.
		pattern, err := event.Filter(event.KindGap, "", o.node)
		if err != nil {
			return nil, err
		}
		patterns = append(patterns, pattern)
	}
	if o.outcomes {
		pattern, err := event.Filter(event.KindOutcome, "", o.node)
		if err != nil {
			return nil, err
		}
		patterns = append(patterns, pattern)
	}
	slices.Sort(patterns)
	return slices.Compact(patterns), nil
}

// tail prints events until --count is reached or ctx ends. With --no-follow it prints what is stored, and it is an error
// when ctx ends before.
func tail(ctx context.Context, conn *bus.Conn, o options, stdout, stderr io.Writer) error {
	patterns, err := subjects(o)
	if err != nil {
		return err
	}
	tailOptions := bus.TailOptions{Subjects: patterns, Follow: !o.noFollow}
	if o.since > 0 {
		tailOptions.Since = time.Now().Add(-o.since)
	}
	terminal := isTerminal(stdout)
	plain := os.Getenv("NO_COLOR") != "" || os.Getenv("TERM") == "dumb"
	table := text.Table{Color: o.color == "always" || o.color == "auto" && terminal && !plain}
	if o.outcomes {
		err := outcomes(ctx, conn, o, tailOptions, &table, stdout, stderr)
		if errors.Is(err, errEnough) {
			return nil
		}
		return err
	}
	seen := newRecent(10000)
	shown := 0
	err = bus.Tail(ctx, conn, tailOptions, func(m bus.Stored) error {
		shownAs, id, err := parse(m, &table)
		if err != nil {
			skip(stderr, m, err)
			return nil
		}
		// The stream drops duplicates within its window only.
		if !seen.add(id) {
			return nil
		}
		line := []byte(shownAs)
		if o.output == "json" {
			line = rendered(m.Data, terminal)
		} else if shownAs == "" {
			return nil
		}
		switch _, err := fmt.Fprintf(stdout, "%s\n", line); {
		case errors.Is(err, syscall.EPIPE):
			return errEnough
		case err != nil:
			return fmt.Errorf("write: %w", err)
		}
		if shown++; shown == o.count {
			return errEnough
		}
		return nil
	})
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// errEnough ends the tail: --count is reached, or the reader of the output (head, grep -m) has exited.
var errEnough = errors.New("enough")

// parse reads a message, as a line of the table. The line is empty where there is nothing to show. The node must be that of the
// subject, for which the server let the publisher publish: one node's tracer must not report kills of another.
func parse(m bus.Stored, table *text.Table) (line, id string, err error) {
	kind, _, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		return "", "", err
	}
	if kind == event.KindGap {
		g, err := event.ParseGap(m.Data)
		if err == nil {
			err = sameNode(g.Node.Name, node)
		}
		if err != nil {
			return "", "", err
		}
		if !g.Missing() {
			return "", g.ID, nil
		}
		return table.GapLine(&g), g.ID, nil
	}
	if kind == event.KindNeighbours {
		n, err := event.ParseNeighbours(m.Data)
		if err == nil {
			err = sameNode(n.Node.Name, node)
		}
		if err != nil {
			return "", "", err
		}
		return table.NeighboursLine(&n), n.ID, nil
	}
	e, err := event.Parse(m.Data)
	if err == nil {
		err = sameNode(e.Node.Name, node)
	}
	if err != nil {
		return "", "", err
	}
	return table.Line(&e), e.ID, nil
}

func sameNode(payload, subject string) error {
	if payload != subject {
		return fmt.Errorf("node.name is %q, the subject's node %q", payload, subject)
	}
	return nil
}

// skip reports a message that cannot be read.
func skip(stderr io.Writer, m bus.Stored, err error) {
	fmt.Fprintf(stderr, "oom-tap: message %d on %s skipped: %s\n", m.Seq, text.Printable(m.Subject), text.Printable(err.Error()))
}

// rendered is a stored message as one line of JSON.
func rendered(data []byte, terminal bool) []byte {
	if terminal {
		return text.JSON(data)
	}
	return oneLine(data)
}

// oneLine is the stored bytes, unless somebody else published JSON of several lines.
func oneLine(data []byte) []byte {
	var compact bytes.Buffer
	if !bytes.ContainsAny(data, "\r\n") || json.Compact(&compact, data) != nil {
		return data
	}
	return compact.Bytes()
}

func isTerminal(w io.Writer) bool {
	file, ok := w.(*os.File)
	if !ok {
		return false
	}
	info, err := file.Stat()
	return err == nil && info.Mode()&os.ModeCharDevice != 0
}

// recent holds the last IDs, as many as its size.
type recent struct {
	ids   map[string]struct{}
	order []string
	next  int
}

func newRecent(size int) *recent {
	return &recent{ids: make(map[string]struct{}, size), order: make([]string, size)}
}

// add reports whether id is new.
func (r *recent) add(id string) bool {
	if _, ok := r.ids[id]; ok {
		return false
	}
	delete(r.ids, r.order[r.next])
	r.order[r.next] = id
	r.ids[id] = struct{}{}
	r.next = (r.next + 1) % len(r.order)
	return true
}
