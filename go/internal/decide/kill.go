package decide

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/pods"
)

// maxMessage is larger than any event: its largest parts are five paths of at most 4 KiB each, which JSON
// may make six times as long.
const maxMessage = 256 << 10

// ValidID reports whether id can be the ID of a kill: at most 200 letters, digits, '_' and '-'. It becomes a header, part of another ID,
// part of a subject, and part of an annotation.
func ValidID(id string) bool {
	other := func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '_' && r != '-'
	}
	return id != "" && len(id) <= 200 && !strings.ContainsFunc(id, other)
}

// Kill is all that a decision depends on, next to the policy.
type Kill struct {
	Event *event.Event
	Ahead time.Duration // how far the clock of its node was ahead of the stream's; Event.Time is already corrected
	Age   time.Duration
	// Found is the pod of the kill. Err is the error of pods.Store.Find.
	Found pods.Found
	Err   error
}

// InPod distinguishes a kill in a pod from one on the host. A container whose cgroup names no pod counts as a pod's only if a
// pod was found.
func (k *Kill) InPod() bool {
	c := k.Event.Container
	return c != nil && (c.PodUID != "" || k.Found.Pod != nil)
}

// Refusal is why a message can never be processed.
type Refusal struct {
	Reason event.Reason
	Err    error
}

// ParseKill parses a message of the stream. NATS lets a publisher use only the subjects of its node, so the node in the subject
// is trusted, and the payload must agree with it.
//
// If the clock of the node is ahead, the time at which the stream stored the message replaces the event's. A mark with a time in
// the future would never expire.
func ParseKill(subject string, data []byte, stored, now time.Time) (*Kill, *Refusal) {
	kind, class, node, err := event.ParseSubject(subject)
	if err != nil {
		return nil, &Refusal{event.ReasonMalformed, err}
	}
	if len(data) > maxMessage {
		return nil, &Refusal{event.ReasonOversized, fmt.Errorf("message has %d bytes, the maximum is %d", len(data), maxMessage)}
	}
	e, err := event.Parse(data)
	switch {
	case errors.Is(err, event.ErrSchema):
		return nil, &Refusal{event.ReasonSchema, err}
	case err != nil:
		return nil, &Refusal{event.ReasonMalformed, err}
	case !ValidID(e.ID):
		return nil, &Refusal{event.ReasonMalformed, fmt.Errorf("id %.50q is not valid", e.ID)}
	case e.Node.Name != node:
		return nil, &Refusal{event.ReasonForged, fmt.Errorf("node.name is %.300q, but the subject's node is %q", e.Node.Name, node)}
	case e.Kind() != kind || string(e.Scope) != class:
		return nil, &Refusal{event.ReasonForged, fmt.Errorf("kind %s and scope %.50q do not match subject %s", e.Kind(), e.Scope, subject)}
	}
	ahead := max(e.Time.Sub(stored), 0)
	e.Time = e.Time.Add(-ahead)
	return &Kill{Event: &e, Ahead: ahead, Age: now.Sub(e.Time)}, nil
}
