package budget

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// Key is the key of the state in the KV bucket bus.BucketName.
const Key = "state"

// maxClaims bounds the state that claims write, in bytes. NATS takes messages of 1 MiB by default, and a pause must always fit.
const maxClaims = 960 << 10

// Entry is the KV entry of the state; see bus.KVEntry.
type Entry interface {
	// Load returns nil if there is no value.
	Load(ctx context.Context) ([]byte, error)
	// Update calls change with the newest value until the result is stored. If change returns nil or an error, nothing is
	// stored.
	Update(ctx context.Context, change func([]byte) ([]byte, error)) error
	// UpdateFirst is Update before all others, however often they change the entry.
	UpdateFirst(ctx context.Context, change func([]byte) ([]byte, error)) error
}

// Ledger reads and changes the shared state. Its methods may be called from any goroutine.
type Ledger struct {
	Entry  Entry
	Limits config.Budgets
	Keep   time.Duration // how long a kill may be delivered again: policy.max_event_age
	Now    func() time.Time

	queue   sync.Mutex // guards waiting
	waiting []*claim

	mu sync.Mutex // one at a time: the goroutines of one process need not compete
	// The value that Claim made last, and its encoding: mostly the one that the next Claim begins with.
	state State
	data  []byte
}

// Verdict is the answer to a claim.
type Verdict struct {
	Paused  *Pause
	Refusal Refusal
	// Contested: pods of this owner on this node were marked for other kills, and the pod may be one of them. Read it, and claim again.
	Contested bool
	New       bool // granted, and not before
}

// Granted reports whether the pod may be marked.
func (v Verdict) Granted() bool { return v.Paused == nil && v.Refusal == "" && !v.Contested }

// Request is a claim of the right to mark a pod.
type Request struct {
	Kill, Node, Owner string
	Killed            time.Time
	// Read: the pod was read after its kill. What the watch shows may be from before another kill's mark, and a claim for a marked
	// pod would take the place of another pod.
	Read bool
}

// claim is a call of Claim.
type claim struct {
	Request
	verdict Verdict
	err     error
	done    bool
}

// Claim claims the right to mark a pod for a kill. Claiming it again, here or in another process, gives the same right. An error
// gives none. Claims that wait for another one are stored together.
func (l *Ledger) Claim(ctx context.Context, r Request) (Verdict, error) {
	c := &claim{Request: r}
	l.queue.Lock()
	l.waiting = append(l.waiting, c)
	l.queue.Unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if !c.done {
		l.queue.Lock()
		all := l.waiting
		l.waiting = nil
		l.queue.Unlock()
		l.claimAll(ctx, all)
	}
	if c.err != nil {
		return Verdict{}, fmt.Errorf("claim a mark: %w", c.err)
	}
	return c.verdict, nil
}

func (l *Ledger) claimAll(ctx context.Context, all []*claim) {
	err := l.Entry.Update(ctx, func(data []byte) ([]byte, error) {
		s := l.state
		if len(data) == 0 || !bytes.Equal(data, l.data) {
			var err error
			if s, err = Parse(data); err != nil {
				return nil, err
			}
		}
		now, before, changed := l.Now().UTC(), len(s.Marks), 0
		for _, c := range all {
			c.verdict = Verdict{Paused: s.Paused(now), Contested: !c.Read && s.contested(c.Request)}
			if !c.verdict.Granted() {
				continue
			}
			if c.verdict.New, c.verdict.Refusal = s.claim(l.Limits, Mark{c.Kill, c.Node, c.Owner, now}, c.Killed, l.Keep); c.verdict.New {
				changed++
			}
		}
		if changed == 0 {
			return nil, nil
		}
		value, err := encode(&s, data, before, changed)
		if len(value) > maxClaims {
			return nil, fmt.Errorf("the state with %d marks has %d bytes, the maximum is %d", len(s.Marks), len(value), maxClaims)
		}
		l.state, l.data = s, value
		return value, err
	})
	for _, c := range all {
		c.err, c.done = err, true
	}
}

// encode encodes a state to which marks were added. Before that it was data, with so many marks. Mostly none was deleted, and the new
// ones are put behind them: with 500 marks, to encode all of them takes as long as everything else that is done for a kill.
func encode(s *State, data []byte, before, added int) ([]byte, error) {
	marks, ok := bytes.CutSuffix(data, []byte("]}")) // marks are the only list, so this is its end
	if !ok || before == 0 || len(s.Marks) != before+added {
		return json.Marshal(s)
	}
	more, err := json.Marshal(s.Marks[before:])
	if err != nil {
		return nil, err
	}
	more[0] = ','
	return slices.Concat(marks, more, []byte("}")), nil
}

// Release returns the right to mark a pod that was not used.
func (l *Ledger) Release(ctx context.Context, kill string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.Entry.Update(ctx, func(data []byte) ([]byte, error) {
		s, err := Parse(data)
		if err != nil {
			return nil, err
		}
		had := len(s.Marks)
		if s.Marks = slices.DeleteFunc(s.Marks, func(m Mark) bool { return m.Kill == kill }); len(s.Marks) == had {
			return nil, nil
		}
		return json.Marshal(&s)
	})
	if err != nil {
		return fmt.Errorf("return the right to mark a pod: %w", err)
	}
	return nil
}

// State reads the shared state.
func (l *Ledger) State(ctx context.Context) (State, error) {
	data, err := l.Entry.Load(ctx)
	if err != nil {
		return State{}, err
	}
	return Parse(data)
}

// SetPause sets the pause; nil removes it. It returns the previous one. Claims wait for it.
func (l *Ledger) SetPause(ctx context.Context, p *Pause) (before *Pause, err error) {
	err = l.Entry.UpdateFirst(ctx, func(data []byte) ([]byte, error) {
		s, err := Parse(data)
		if err != nil {
			return nil, err
		}
		if before, s.Pause = s.Pause, p; before == nil && p == nil {
			return nil, nil
		}
		return json.Marshal(&s)
	})
	return before, err
}

// Revision is an earlier value.
type Revision struct {
	Data []byte
	Time time.Time // when it was stored
}

// Restore stores the newest valid revision, and returns it. If the current state is valid, nothing is changed, and valid is true.
func (l *Ledger) Restore(ctx context.Context, newestFirst []Revision) (from *Revision, valid bool, err error) {
	err = l.Entry.Update(ctx, func(data []byte) ([]byte, error) {
		from, valid = nil, false
		if _, err := Parse(data); err == nil {
			valid = true
			return nil, nil
		}
		for _, r := range newestFirst {
			if _, err := Parse(r.Data); err == nil {
				from = &r
				return r.Data, nil
			}
		}
		return nil, fmt.Errorf("restore the state of budgets and pause: none of the last %d revisions is valid", len(newestFirst))
	})
	return from, valid, err
}
