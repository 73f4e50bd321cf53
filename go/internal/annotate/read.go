package annotate

import (
	"errors"
	"fmt"
	"regexp"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
)

// maxMessage is larger than any event: its largest parts are five paths of at most 4 KiB each, which JSON
// may make six times as long.
const maxMessage = 256 << 10

// plainID is what ids are made of. They become a header, part of another id, part of a subject, and part of an annotation.
var plainID = regexp.MustCompile(`^[A-Za-z0-9_-]{1,200}$`)

// refusal is why a message can never be processed.
type refusal struct {
	reason event.Reason
	err    error
}

// read takes a message of the stream for a kill. The node is the one that the server let the publisher
// speak for: it is in the subject.
func read(m *bus.Stored) (*event.Event, *refusal) {
	kind, class, node, err := event.ParseSubject(m.Subject)
	if err != nil {
		return nil, &refusal{event.ReasonMalformed, err}
	}
	if len(m.Data) > maxMessage {
		return nil, &refusal{event.ReasonOversized, fmt.Errorf("%d bytes, more than %d", len(m.Data), maxMessage)}
	}
	e, err := event.Parse(m.Data)
	switch {
	case errors.Is(err, event.ErrSchema):
		return nil, &refusal{event.ReasonSchema, err}
	case err != nil:
		return nil, &refusal{event.ReasonMalformed, err}
	case !plainID.MatchString(e.ID):
		return nil, &refusal{event.ReasonMalformed, fmt.Errorf("id %.50q is none", e.ID)}
	case e.Node.Name != node:
		return nil, &refusal{event.ReasonForged, fmt.Errorf("node.name is %.300q, the subject's node %q", e.Node.Name, node)}
	case e.Kind() != kind || string(e.Scope) != class:
		return nil, &refusal{event.ReasonForged, fmt.Errorf("a kind %s of scope %.50q came on subject %s", e.Kind(), e.Scope, m.Subject)}
	}
	return &e, nil
}

// clockTolerance is how much later than the stream's a kill's time may be, before it is logged.
const clockTolerance = 2 * time.Second

// newCase begins the case of a kill. Where its node's clock is ahead the time of the stream counts, in whatever is made of the
// event: a mark from the future would never end.
func newCase(e *event.Event, m *bus.Stored, now time.Time) Case {
	ahead := max(e.Time.Sub(m.Time), 0)
	e.Time = e.Time.Add(-ahead)
	return Case{Event: e, Ahead: ahead, Age: now.Sub(e.Time)}
}
