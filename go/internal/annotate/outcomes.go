package annotate

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/mark"
)

// Publisher publishes messages; see bus.Publisher.
type Publisher interface {
	Enqueue(m bus.Msg) error
}

// Outcomes publishes outcomes, and reads them back from the stream.
type Outcomes struct {
	Publisher Publisher // its hooks must be Hooks
	// Last reads the last message on a subject of the stream. Its error wraps bus.ErrNoMessage if there is none; see bus.Conn.
	Last    func(ctx context.Context, subject string) ([]byte, error)
	Metrics *Metrics
	Log     *slog.Logger
}

// pending is the tag of an outcome that the stream has not stored yet.
type pending struct {
	done    func()               // acknowledges the message that the outcome is about
	stored  func(duplicate bool) // called when the stream has stored the outcome, or had stored another replica's
	retried bool                 // an attempt failed; the stream may have stored it all the same
}

// Find reads the outcome of the stage annotate. It returns nil and nil if there is none.
func (s *Outcomes) Find(ctx context.Context, kill, node string) (*event.Outcome, error) {
	ctx, cancel := context.WithTimeout(ctx, mark.Timeout)
	defer cancel()
	subject, err := event.OutcomeSubject(kill, event.StageAnnotate, node)
	if err != nil {
		return nil, err
	}
	data, err := s.Last(ctx, subject)
	if errors.Is(err, bus.ErrNoMessage) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	o, err := event.ParseOutcome(data)
	if err != nil || o.Kill != kill {
		return nil, nil // on a NATS without accounts, JetStream's own acknowledgements can be stored there
	}
	return &o, nil
}

// Publish publishes an outcome of a later stage of a kill.
func (s *Outcomes) Publish(o *event.Outcome) error {
	return s.publish(o, func() {}, func(duplicate bool) {
		if o.Stage != event.StageClose || duplicate { // duplicate: another replica was faster
			return
		}
		s.Metrics.closed(o)
		s.Log.Info("mark closed", "id", o.Kill, "pod", podName(o.Pod), "result", string(o.Result), "reason", string(o.Reason), "detail", o.Detail)
	})
}

func (s *Outcomes) publish(o *event.Outcome, done func(), stored func(duplicate bool)) error {
	subject, err := o.Subject()
	if err != nil {
		return err
	}
	data, err := json.Marshal(o)
	if err != nil {
		return fmt.Errorf("encode outcome %s: %w", o.ID, err)
	}
	return s.Publisher.Enqueue(bus.Msg{ID: o.ID, Subject: subject, Data: data, Once: true, Tag: &pending{done: done, stored: stored}})
}

// Hooks are the hooks of Publisher: the message that an outcome is about is acknowledged after the stream has stored the outcome.
func (s *Outcomes) Hooks() bus.Hooks {
	return bus.Hooks{
		OnAck: func(m bus.Msg, duplicate bool) {
			p := m.Tag.(*pending)
			p.stored(duplicate && !p.retried)
			p.done()
		},
		OnRetry: func(m bus.Msg, _ error) {
			m.Tag.(*pending).retried = true
			s.Metrics.failure("publish")
		},
		OnDrop: func(m bus.Msg, err error) *bus.Msg {
			s.Metrics.failure("dropped")
			s.Log.Error("outcome dropped", "id", m.ID, "error", err)
			m.Tag.(*pending).done()
			return nil
		},
	}
}
