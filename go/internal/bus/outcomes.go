package bus

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
)

const (
	outcomeSubjects = "oom.v1." + string(event.KindOutcome) + ".>"
	// outcomeReaders read at once, each readerBatch sequences of the stream, before what they read is handed over.
	outcomeReaders, readerBatch = 16, 256
)

// Outcomes hands the outcomes that were stored since a time to each, in the order of the stream, up to the last one that the
// stream holds now.
//
// It requests one message at a time and has no consumer: NATS permissions cannot tell apart consumers whose names are not known
// beforehand, because the name is one token of a subject. Who may pull from one of them may pull from all.
func (c *Conn) Outcomes(ctx context.Context, since time.Time, each func(Stored) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("read the outcomes: %w", err)
		}
	}()
	last, err := c.get(ctx, map[string]any{"last_by_subj": outcomeSubjects})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil
	}
	if err != nil || last.Time.Before(since) {
		return err
	}
	// Servers before 2.11 ignore the time and return the first one that they have.
	first, err := c.get(ctx, map[string]any{"next_by_subj": outcomeSubjects, "start_time": since})
	if err != nil {
		return err
	}
	for from := first.Seq; from <= last.Seq; {
		parts := make([][]Stored, outcomeReaders)
		errs := make([]error, outcomeReaders)
		next := from + outcomeReaders*readerBatch // where the next round begins
		var reading sync.WaitGroup
		for i := range outcomeReaders {
			begin := from + uint64(i)*readerBatch
			if begin > last.Seq {
				break
			}
			reading.Go(func() {
				end := min(begin+readerBatch-1, last.Seq)
				for seq := begin; seq <= end; {
					m, err := c.get(ctx, map[string]any{"next_by_subj": outcomeSubjects, "seq": seq})
					switch {
					case errors.Is(err, jetstream.ErrMsgNotFound): // the rest was deleted
						return
					case err != nil:
						errs[i] = err
						return
					case m.Seq > end:
						if i == outcomeReaders-1 {
							next = m.Seq
						}
						return
					}
					seq = m.Seq + 1
					parts[i] = append(parts[i], m)
				}
			})
		}
		reading.Wait()
		if err := errors.Join(errs...); err != nil {
			return err
		}
		for _, m := range slices.Concat(parts...) {
			if m.Time.Before(since) {
				continue
			}
			if err := each(m); err != nil {
				return err
			}
		}
		from = next
	}
	return nil
}
