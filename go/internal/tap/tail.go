package tap

import (
	"context"
	"io"
	"slices"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/fifo"
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
	if !o.kills && len(o.scopes) == 0 {
		pattern, err := event.Filter(event.KindEviction, "", o.node)
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
	p := newPrinter(stdout, o)
	if o.outcomes {
		return outcomes(ctx, conn, o, tailOptions, p, stderr)
	}
	seen := fifo.New[struct{}](maxKills)
	return each(ctx, conn, tailOptions, stderr, func(m bus.Stored, r message) error {
		// The stream drops duplicates within its window only.
		if !seen.AddNew(r.id, struct{}{}) {
			return nil
		}
		return p.print(r.line(&p.table), m.Data)
	})
}
