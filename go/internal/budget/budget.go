// Package budget bounds how many pods are marked, and holds the switch that stops marking. Both are one
// value, shared by all replicas and kept by NATS: to claim a mark and to pause exclude each other, so that
// after a pause nothing new is claimed by anybody.
//
// Rule of the package: what was refused once stays refused. A claim is held against the marks since its
// kill's time less the window, and not since now less the window: of those there are never fewer later on,
// whenever, and however often, the kill comes again. The one exception is a mark that the API server refused for good: it
// counts no more.
package budget

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// State is what is shared.
type State struct {
	Schema string `json:"schema"`
	Pause  *Pause `json:"pause,omitempty"`
	// Marks are in the order in which they were claimed.
	Marks []Mark `json:"marks,omitempty"`
}

// Pause stops all marking.
type Pause struct {
	Reason string    `json:"reason"`
	By     string    `json:"by"` // user@host
	Since  time.Time `json:"since"`
	// Until is when it ends by itself; nil: never.
	Until *time.Time `json:"until,omitempty"`
}

// Mark is the right to mark one pod, for one kill. Whether that was done stands in the outcome of the kill. A
// right that was not used because the pod was gone is not given back; one whose patch was refused for good is.
type Mark struct {
	Kill string `json:"kill"` // event.Event's ID
	Node string `json:"node"`
	// Owner is what would make a new pod in this one's place, or the pod itself: <namespace>/<kind>/<name>.
	Owner string    `json:"owner"`
	Time  time.Time `json:"time"` // of the claim
}

// Paused returns the pause that holds at a moment, nil if none does.
func (s *State) Paused(now time.Time) *Pause {
	if p := s.Pause; p != nil && (p.Until == nil || now.Before(*p.Until)) {
		return p
	}
	return nil
}

// Since lists the marks after a moment.
func (s *State) Since(t time.Time) []Mark {
	var marks []Mark
	for _, m := range s.Marks {
		if m.Time.After(t) {
			marks = append(marks, m)
		}
	}
	return marks
}

// Refusal is why a claim is not granted.
type Refusal string

// Claim adds m, whose kill happened at a time, unless that is refused. A claim that was granted before is still.
// keep is for how long a kill may come again.
func (s *State) Claim(limits config.Budgets, m Mark, killed time.Time, keep time.Duration) Refusal {
	_, refusal := s.claim(limits, m, killed, keep)
	return refusal
}

// claim reports as well whether that changes anything.
func (s *State) claim(limits config.Budgets, m Mark, killed time.Time, keep time.Duration) (changed bool, refusal Refusal) {
	if slices.ContainsFunc(s.Marks, func(had Mark) bool { return had.Kill == m.Kill }) {
		return false, ""
	}
	if m.Time.Sub(killed) > keep {
		return false, Refusal(fmt.Sprintf("the kill is older than %s", keep)) // marks that it was held against may be forgotten
	}
	node := func(had Mark) bool { return had.Node == m.Node }
	owner := func(had Mark) bool { return had.Owner == m.Owner }
	for _, b := range []struct {
		of     string
		limit  int
		window time.Duration
		same   func(Mark) bool
	}{
		{"cluster", limits.Cluster, limits.Window, func(Mark) bool { return true }},
		{"node " + m.Node, limits.Node, limits.Window, node},
		{"owner " + m.Owner, limits.Owner, limits.Window, owner},
		{"node " + m.Node, 1, limits.Cooldown, node},
		{"owner " + m.Owner, 1, limits.Cooldown, owner},
	} {
		if b.limit == 0 || b.window == 0 {
			continue // no bound of its own
		}
		used := 0
		for _, had := range s.Since(killed.Add(-b.window)) {
			if b.same(had) {
				used++
			}
		}
		if used >= b.limit {
			return false, Refusal(fmt.Sprintf("%s: %d of %d within %s", b.of, used, b.limit, b.window))
		}
	}
	s.Marks = append(s.Since(m.Time.Add(-max(limits.Window, limits.Cooldown)-keep)), m)
	return true, ""
}

// Schema names what is shared. It is that of nothing else on NATS.
const Schema = "oom-tracer/budgets/v1"

var (
	// ErrState means that the shared state cannot be used, and nothing may be marked.
	ErrState = errors.New("the state of budgets and pause is refused, nothing is marked (restore it with oom-tap restore)")
	// ErrAbsent means that there is none, and wraps ErrState. Setup writes the first one, so that absence is never the beginning.
	ErrAbsent = fmt.Errorf("%w: it is absent", ErrState)
)

// Initial is the state of a bucket that nothing was ever stored in.
func Initial() []byte { return []byte(`{"schema":"` + Schema + `"}`) }

// Parse reads what is shared. It refuses everything that is not exactly that: a state that was emptied or replaced would lift
// the pause and reset the budgets.
func Parse(data []byte) (State, error) {
	if len(data) == 0 {
		return State{}, ErrAbsent
	}
	var s State
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&s); err != nil {
		return State{}, fmt.Errorf("%w: %w", ErrState, err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return State{}, fmt.Errorf("%w: something follows it", ErrState)
	}
	if s.Schema != Schema {
		return State{}, fmt.Errorf("%w: its schema is %.50q, not %q", ErrState, s.Schema, Schema)
	}
	for i, m := range s.Marks {
		if m.Kill == "" || m.Node == "" || m.Owner == "" || m.Time.IsZero() {
			return State{}, fmt.Errorf("%w: mark %d is not complete", ErrState, i)
		}
	}
	return s, nil
}
