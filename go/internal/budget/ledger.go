package budget

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// Key names the state in the bucket bus.BucketName.
const Key = "state"

// maxClaims bounds the state that claims make, in bytes: NATS takes messages of 1 MiB, unless told otherwise,
// and a pause must always fit in.
const maxClaims = 960 << 10

// Cell holds the state; see bus.Cell.
type Cell interface {
	// Load returns nil where there is nothing.
	Load(ctx context.Context) ([]byte, error)
	// Update has change called on the newest value until it is stored. Where change returns nil, or an error,
	// nothing is stored.
	Update(ctx context.Context, change func([]byte) ([]byte, error)) error
}

// Ledger is the state in its cell. Its methods may be called from any goroutine.
type Ledger struct {
	Cell   Cell
	Limits config.Budgets
	Keep   time.Duration // for how long a kill may come again: policy.max_event_age
	Now    func() time.Time

	mu sync.Mutex // one at a time: those of one process need not contend
}

// Verdict is the answer to a claim. The zero one grants it.
type Verdict struct {
	Paused  *Pause
	Refusal Refusal
}

// Claim claims the right to mark a pod for a kill that happened at a time. To claim it again, here or in
// another process, is the same right. Where it fails there is no right.
func (l *Ledger) Claim(ctx context.Context, kill, node, owner string, killed time.Time) (v Verdict, err error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	err = l.Cell.Update(ctx, func(data []byte) ([]byte, error) {
		v = Verdict{}
		s, err := Parse(data)
		if err != nil {
			return nil, err
		}
		now := l.Now().UTC()
		if v.Paused = s.Paused(now); v.Paused != nil {
			return nil, nil
		}
		var changed bool
		if changed, v.Refusal = s.claim(l.Limits, Mark{kill, node, owner, now}, killed, l.Keep); !changed {
			return nil, nil
		}
		value, err := json.Marshal(&s)
		if len(value) > maxClaims {
			return nil, fmt.Errorf("%d marks that still count take %d bytes, more than %d", len(s.Marks), len(value), maxClaims)
		}
		return value, err
	})
	if err != nil {
		return Verdict{}, fmt.Errorf("claim a mark: %w", err)
	}
	return v, nil
}

// Release gives back the right to mark a pod for a kill, of which nothing was made.
func (l *Ledger) Release(ctx context.Context, kill string) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	err := l.Cell.Update(ctx, func(data []byte) ([]byte, error) {
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
		return fmt.Errorf("give back the right to mark a pod: %w", err)
	}
	return nil
}

// State reads what is shared.
func (l *Ledger) State(ctx context.Context) (State, error) {
	data, err := l.Cell.Load(ctx)
	if err != nil {
		return State{}, err
	}
	return Parse(data)
}

// SetPause sets the pause; nil ends it. It returns the one that was set before.
func (l *Ledger) SetPause(ctx context.Context, p *Pause) (before *Pause, err error) {
	err = l.Cell.Update(ctx, func(data []byte) ([]byte, error) {
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

// Revision is a value that was stored before.
type Revision struct {
	Data []byte
	Time time.Time // when it was stored
}

// Restore stores the newest of the revisions that is valid, and returns it. It changes nothing where the state is valid as it
// is, and reports that.
func (l *Ledger) Restore(ctx context.Context, newestFirst []Revision) (from *Revision, valid bool, err error) {
	err = l.Cell.Update(ctx, func(data []byte) ([]byte, error) {
		from = nil
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
