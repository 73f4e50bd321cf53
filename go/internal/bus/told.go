package bus

import (
	"context"
	"crypto/sha256"
	"fmt"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
)

const (
	// readTime bounds one reading of the outcomes.
	readTime = 30 * time.Second
)

// Told knows which outcomes the stream holds. The stream itself forgets that it has a message after its dedup
// window. Nothing is read before it is asked, and then only what has come since it was asked last.
type Told struct {
	conn *Conn

	mu      sync.Mutex
	ids     map[[16]byte]struct{} // of the outcomes from a time on up to last
	from    time.Time
	last    uint64    // a sequence, not always that of an outcome
	read    time.Time // when that was
	created time.Time // which stream of that name it was
}

// NewTold makes one. Nothing is asked of the server.
func NewTold(c *Conn) *Told { return &Told{conn: c, ids: map[[16]byte]struct{}{}} }

// Has tells whether the stream holds, or held lately, an outcome of that ID that was stored after the message
// that it is about, which was at since. What was stored within the last fresh may be missed: give no more
// than what the server itself remembers.
func (t *Told) Has(ctx context.Context, id string, since time.Time, fresh time.Duration) (bool, error) {
	asked := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	earlier := t.from.IsZero() || since.Before(t.from)
	// A reading that began after this was asked is as good as one of its own: in a storm many ask at once.
	if now := time.Now(); earlier || now.Sub(t.read) >= fresh && !t.read.After(asked) {
		ctx, cancel := context.WithTimeout(ctx, readTime)
		defer cancel()
		var s jetstream.Stream
		err := t.conn.call(ctx, "$JS.API.STREAM.INFO."+event.StreamName, func(ctx context.Context) (err error) {
			s, err = t.conn.js.Stream(ctx, event.StreamName)
			return err
		})
		if err != nil {
			return false, fmt.Errorf("read the outcomes: %w", err)
		}
		info := s.CachedInfo()
		if !t.created.Equal(info.Created) {
			t.created, t.last = info.Created, 0 // made anew, it counts anew
		}
		if earlier {
			t.from, t.last = since, 0
		}
		err = outcomesOf(ctx, t.conn, s, t.last, t.from, func(m Stored) error {
			t.note(m.ID, m.Seq)
			return nil
		})
		if err != nil {
			t.read = time.Time{} // the next reading goes on after last
			return false, fmt.Errorf("read the outcomes: %w", err)
		}
		t.read, t.last = now, max(t.last, info.State.LastSeq) // up to there it has seen everything
	}
	_, ok := t.ids[short(id)]
	return ok, nil
}

func (t *Told) note(id string, seq uint64) {
	t.ids[short(id)] = struct{}{}
	t.last = seq
}

// short is an ID in little space.
func short(id string) (key [16]byte) {
	sum := sha256.Sum256([]byte(id))
	copy(key[:], sum[:])
	return key
}
