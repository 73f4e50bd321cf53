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
	all, scopes := []string{""}, o.scopes
	if len(scopes) == 0 {
		scopes = all
	}
	kinds := map[event.Kind][]string{event.KindKill: scopes}
	if !o.kills {
		kinds[event.KindNeighbours] = scopes
		kinds[event.KindGap] = all // whatever is selected: the kills that a gap stands for may be just those
		if len(o.scopes) == 0 {
			kinds[event.KindEviction] = all
		}
	}
	if o.outcomes {
		kinds[event.KindOutcome] = all
	} else if !o.kills {
		kinds[event.KindExiting] = scopes
	}
	var patterns []string
	for kind, scopes := range kinds {
		for _, scope := range scopes {
			pattern, err := event.Filter(kind, scope, o.node)
			if err != nil {
				return nil, err
			}
			patterns = append(patterns, pattern)
		}
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
