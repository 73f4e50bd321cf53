package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
)

const (
	outcomeSubjects = "oom.v1." + string(event.KindOutcome) + ".>"
	// outcomeReaders is how many requests are in flight, and readerBatch how many sequences of the stream each reader has before
	// what they read is handed over.
	outcomeReaders, readerBatch = 16, 256
)

// Outcomes hands the outcomes that were stored since a time to each, in the order of the stream, up to the last one that the
// stream holds now.
//
// It requests one message at a time and has no consumer: NATS permissions cannot tell apart consumers whose names are not known
// beforehand, because the name is one token of a subject. Who may pull from one of them may pull from all.
func (c *Conn) Outcomes(ctx context.Context, since time.Time, each func(Stored) error) error {
	if err := c.outcomes(ctx, since, each); err != nil {
		return fmt.Errorf("read the outcomes: %w", err)
	}
	return nil
}

func (c *Conn) outcomes(ctx context.Context, since time.Time, each func(Stored) error) error {
	var s jetstream.Stream
	err := c.call(ctx, "$JS.API.STREAM.INFO."+event.StreamName, func(ctx context.Context) (err error) {
		s, err = c.js.Stream(ctx, event.StreamName)
		return err
	})
	if err != nil {
		return err
	}
	get := func(ctx context.Context, from uint64) (m *jetstream.RawStreamMsg, err error) {
		err = c.call(ctx, "$JS.API.STREAM.MSG.GET."+event.StreamName, func(ctx context.Context) (err error) {
			m, err = s.GetMsg(ctx, from, jetstream.WithGetMsgSubject(outcomeSubjects))
			return err
		})
		return m, err
	}
	var last *jetstream.RawStreamMsg
	err = c.call(ctx, "$JS.API.STREAM.MSG.GET."+event.StreamName, func(ctx context.Context) (err error) {
		last, err = s.GetLastMsgForSubject(ctx, outcomeSubjects)
		return err
	})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil
	}
	if err != nil || last.Time.Before(since) {
		return err
	}
	from, err := c.firstOutcome(ctx, since)
	if err != nil {
		return err
	}
	for from <= last.Sequence {
		parts := make([][]Stored, outcomeReaders)
		errs := make([]error, outcomeReaders)
		next := from + outcomeReaders*readerBatch // where the next round begins
		var reading sync.WaitGroup
		for i := range outcomeReaders {
			begin := from + uint64(i)*readerBatch
			if begin > last.Sequence {
				break
			}
			reading.Go(func() {
				end := min(begin+readerBatch-1, last.Sequence)
				for seq := begin; seq <= end; {
					m, err := get(ctx, seq)
					switch {
					case errors.Is(err, jetstream.ErrMsgNotFound): // the rest was deleted
						return
					case err != nil:
						errs[i] = err
						return
					case m.Sequence > end:
						if i == outcomeReaders-1 {
							next = m.Sequence
						}
						return
					}
					seq = m.Sequence + 1
					parts[i] = append(parts[i], Stored{ID: m.Header.Get(jetstream.MsgIDHeader), Subject: m.Subject, Data: m.Data, Seq: m.Sequence, Time: m.Time})
				}
			})
		}
		reading.Wait()
		if err := errors.Join(errs...); err != nil {
			return err
		}
		for _, part := range parts {
			for _, m := range part {
				if m.Time.Before(since) {
					continue
				}
				if err := each(m); err != nil {
					return err
				}
			}
		}
		from = next
	}
	return nil
}

// firstOutcome is the sequence of the first outcome that was stored at since or later. Servers before 2.11
// ignore the time and return the first one that they have.
func (c *Conn) firstOutcome(ctx context.Context, since time.Time) (uint64, error) {
	subject := "$JS.API.STREAM.MSG.GET." + event.StreamName
	request, err := json.Marshal(map[string]any{"next_by_subj": outcomeSubjects, "start_time": since})
	if err != nil {
		return 0, fmt.Errorf("write the request: %w", err)
	}
	var answer struct {
		Message struct {
			Seq uint64 `json:"seq"`
		} `json:"message"`
		Error *jetstream.APIError `json:"error"`
	}
	err = c.call(ctx, subject, func(ctx context.Context) error {
		m, err := c.nc.RequestWithContext(ctx, subject, request)
		if err != nil {
			return err
		}
		return json.Unmarshal(m.Data, &answer)
	})
	if err == nil && answer.Error != nil {
		err = answer.Error
	}
	return answer.Message.Seq, err
}
