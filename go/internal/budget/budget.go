// Package budget bounds how many pods are marked, and holds the pause. Both are one value, shared by all replicas in a NATS KV
// entry. Because a claim and a pause change the same value, no replica can claim a mark after a pause.
//
// Rule of the package: a claim that was refused stays refused, however often the kill is delivered again. The window of a claim
// begins before the time of its kill, not before the present: the number of marks since then never goes down. The exception is a
// mark that was certainly not made, because the API server refused it or the pod had changed: it does not count any more.
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

// State is the shared value.
type State struct {
	Schema string `json:"schema"`
	Pause  *Pause `json:"pause,omitempty"`
	// Marks are in the order of their claims.
	Marks []Mark `json:"marks,omitempty"`
}

// Pause stops all marking.
type Pause struct {
	Reason string    `json:"reason"`
	By     string    `json:"by"` // user@host
	Since  time.Time `json:"since"`
	// Until is when the pause ends; nil: when somebody ends it.
	Until *time.Time `json:"until,omitempty"`
}

// Mark is the right to mark one pod, for one kill. The outcome of the kill says whether it was used. A right that was certainly not
// used is returned.
type Mark struct {
	Kill string `json:"kill"` // event.Event's ID
	Node string `json:"node"`
	// Owner is the workload of the pod, or the pod itself: <namespace>/<kind>/<name>.
	Owner string    `json:"owner"`
	Time  time.Time `json:"time"` // of the claim
}

// Paused returns the pause in effect, nil if there is none.
func (s *State) Paused(now time.Time) *Pause {
	if p := s.Pause; p != nil && (p.Until == nil || now.Before(*p.Until)) {
		return p
	}
	return nil
}

// Since lists the marks after a time.
func (s *State) Since(t time.Time) []Mark {
	var marks []Mark
	for _, m := range s.Marks {
		if m.Time.After(t) {
			marks = append(marks, m)
		}
	}
	return marks
}

// Refusal is why a claim was refused.
type Refusal string

// Claim adds m, unless a limit refuses it. A claim that was granted before stays granted. keep is how long a kill may be delivered
// again.
func (s *State) Claim(limits config.Budgets, m Mark, killed time.Time, keep time.Duration) Refusal {
	_, refusal := s.claim(limits, m, killed, keep)
	return refusal
}

// contested reports whether another kill has the right to mark a pod of the same owner on the same node, and this one has not.
func (s *State) contested(r Request) (found bool) {
	for _, had := range s.Marks {
		if had.Kill == r.Kill {
			return false
		}
		found = found || had.Node == r.Node && had.Owner == r.Owner
	}
	return found
}

// claim also reports whether it changed the state.
func (s *State) claim(limits config.Budgets, m Mark, killed time.Time, keep time.Duration) (changed bool, refusal Refusal) {
	if slices.ContainsFunc(s.Marks, func(had Mark) bool { return had.Kill == m.Kill }) {
		return false, ""
	}
	if m.Time.Sub(killed) > keep {
		return false, Refusal(fmt.Sprintf("the kill is older than %s", keep)) // the marks in its window may be deleted already
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
			continue // no limit
		}
		used, since := 0, killed.Add(-b.window)
		for _, had := range s.Marks {
			if had.Time.After(since) && b.same(had) {
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

// Schema is the schema of the state. Nothing else on NATS has it.
const Schema = "oom-tracer/budgets/v1"

var (
	// ErrState means that the shared state cannot be used, and nothing may be marked.
	ErrState = errors.New("the state of budgets and pause is refused, nothing is marked (restore it with oom-tap restore)")
	// ErrAbsent means that there is no state. It wraps ErrState: oom-tap setup writes the first state, so an absent one was deleted.
	ErrAbsent = fmt.Errorf("%w: it is absent", ErrState)
)

// Initial is the first state of a new bucket.
func Initial() []byte { return []byte(`{"schema":"` + Schema + `"}`) }

// Parse reads the state. It is strict: a state that was emptied or replaced would end the pause and reset the budgets.
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
		return State{}, fmt.Errorf("%w: unexpected data after it", ErrState)
	}
	if s.Schema != Schema {
		return State{}, fmt.Errorf("%w: its schema is %.50q, not %q", ErrState, s.Schema, Schema)
	}
	for i, m := range s.Marks {
		if m.Kill == "" || m.Node == "" || m.Owner == "" || m.Time.IsZero() {
			return State{}, fmt.Errorf("%w: mark %d is incomplete", ErrState, i)
		}
	}
	return s, nil
}
