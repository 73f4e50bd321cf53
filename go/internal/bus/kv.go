package bus

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// BucketName is the KV bucket that the annotators share. JetStream stores it in the stream KV_<name>.
const BucketName = "OOM_ANNOTATOR"

const (
	kvHistory   = 64              // revisions of each entry that the bucket keeps, for oom-tap restore
	updateTries = 1000            // of Update, while others change the entry at the same time
	giveWay     = 2 * time.Second // how long Update waits for an UpdateFirst
	// firstKey is the key of what UpdateFirst announces. Its values mean nothing: what counts is that they are newer than the entry.
	firstKey = "pausing"
)

// KVEntry is one entry of the bucket, changed by compare-and-set. Its methods may be called from any goroutine.
type KVEntry struct {
	conn *Conn
	key  string

	mu    sync.Mutex
	known *revision // that Update read or wrote last; nil: none
}

// revision is a value of an entry. It must not be changed.
type revision struct {
	data   []byte
	number uint64 // 0: there was no value
	kv     jetstream.KeyValue
}

// KVEntry returns the entry of a key. Nothing is requested from the server.
func (c *Conn) KVEntry(key string) *KVEntry { return &KVEntry{conn: c, key: key} }

// Load reads the value: nil if there is none. It waits for a connection until ctx ends, and may miss a value of a moment ago if
// another server of the cluster answers. The error wraps jetstream.ErrBucketNotFound if EnsureStreams was not called.
func (e *KVEntry) Load(ctx context.Context) ([]byte, error) {
	r, err := e.load(ctx)
	if err != nil {
		return nil, err
	}
	return r.data, nil
}

func (e *KVEntry) load(ctx context.Context) (*revision, error) {
	r := &revision{}
	// Both requests name the stream at the end of their subjects.
	err := e.conn.call(ctx, "$JS.API.", func(ctx context.Context) (err error) {
		if r.kv, err = e.conn.js.KeyValue(ctx, BucketName); err != nil {
			return err
		}
		entry, err := r.kv.Get(ctx, e.key)
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			return nil
		}
		if err == nil {
			r.data, r.number = entry.Value(), entry.Revision()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("read %s of bucket %s: %w", e.key, BucketName, err)
	}
	return r, nil
}

// Update calls change with the newest value, and stores what it returns; again if the entry was changed meanwhile. If change
// returns nil, or an error, nothing is stored, and Update returns the error. After any other error, it may have been stored.
//
// The first value is the one that this KVEntry knows, so that mostly one request suffices: the server refuses to replace a
// newer one. If change wants nothing stored, it is called again with a value that was read.
func (e *KVEntry) Update(ctx context.Context, change func([]byte) ([]byte, error)) error {
	return e.update(ctx, false, change)
}

// UpdateFirst is Update that goes before others. If the entry was changed meanwhile, it announces itself: then Update stores nothing in
// any process until UpdateFirst has, or for giveWay. So it does not matter how often others change the entry, and how slow this
// connection is. A client that may not publish to firstKey competes with the others.
func (e *KVEntry) UpdateFirst(ctx context.Context, change func([]byte) ([]byte, error)) error {
	return e.update(ctx, true, change)
}

func (e *KVEntry) update(ctx context.Context, first bool, change func([]byte) ([]byte, error)) error {
	e.mu.Lock()
	now := e.known
	e.mu.Unlock()
	begun := time.Now()
	for try := 1; ; try++ {
		read := now == nil || try > 1
		if read {
			var err error
			if now, err = e.load(ctx); err != nil {
				return err
			}
		}
		value, err := change(now.data)
		if err != nil || value == nil {
			if !read {
				continue
			}
			e.know(now)
			return err
		}
		next := &revision{data: value, kv: now.kv}
		if now.number == 0 {
			err = e.conn.call(ctx, "$KV."+BucketName+".", func(ctx context.Context) (err error) {
				next.number, err = now.kv.Create(ctx, e.key, value)
				return err
			})
		} else {
			options := []jetstream.PublishOpt{jetstream.WithExpectLastSequencePerSubject(now.number)}
			if !first && time.Since(begun) < giveWay {
				options = append(options, jetstream.WithExpectLastSequence(now.number)) // no announcement since then either
			}
			next.number, err = e.publish(ctx, e.key, value, options...)
		}
		var api *jetstream.APIError
		changed := errors.Is(err, jetstream.ErrKeyExists) ||
			errors.As(err, &api) && (api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequence || api.ErrorCode == jetstream.JSErrCodeStreamWrongLastSequenceConstant)
		switch {
		case err == nil:
			e.know(next)
			return nil
		case !changed || try == updateTries:
			e.know(nil)
			return fmt.Errorf("write %s of bucket %s: %w", e.key, BucketName, err)
		case first:
			_, _ = e.publish(ctx, firstKey, nil, jetstream.WithRetryAttempts(0))
			continue
		case !read:
			continue
		}
		sleep(ctx, rand.N(time.Duration(min(try, 20))*time.Millisecond))
	}
}

// publish stores a value of a key, and returns its revision.
func (e *KVEntry) publish(ctx context.Context, key string, value []byte, options ...jetstream.PublishOpt) (number uint64, err error) {
	m := &nats.Msg{Subject: "$KV." + BucketName + "." + key, Data: value}
	err = e.conn.call(ctx, m.Subject, func(ctx context.Context) error {
		ack, err := e.conn.js.PublishMsg(ctx, m, options...)
		if err == nil {
			number = ack.Sequence
		}
		return err
	})
	return number, err
}

func (e *KVEntry) know(r *revision) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.known = r
}

// History reads the revisions that the bucket still has, the newest first. Removals are not revisions.
func (e *KVEntry) History(ctx context.Context) (all []budget.Revision, err error) {
	s, err := e.conn.stream(ctx, "KV_"+BucketName)
	if err != nil {
		return nil, fmt.Errorf("read the history of bucket %s: %w", BucketName, err)
	}
	state := s.CachedInfo().State
	for seq := state.LastSeq; seq > 0 && seq >= state.FirstSeq; seq-- {
		var m *jetstream.RawStreamMsg
		err := e.conn.call(ctx, "$JS.API.STREAM.", func(ctx context.Context) error {
			m, err = s.GetMsg(ctx, seq)
			return err
		})
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
		case err != nil:
			return nil, fmt.Errorf("read revision %d of bucket %s: %w", seq, BucketName, err)
		case m.Subject == "$KV."+BucketName+"."+e.key && m.Header.Get("KV-Operation") == "":
			all = append(all, budget.Revision{Data: m.Data, Time: m.Time})
		}
	}
	return all, nil
}

// ensureBucket creates the bucket, with as many replicas as the streams have, and writes the initial state if nothing was ever
// stored in it. A state that was deleted is not created again: see budget.ErrAbsent.
func ensureBucket(ctx context.Context, c *Conn, cfg config.Stream) error {
	const name = "KV_" + BucketName
	s, err := c.stream(ctx, name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		err = c.call(ctx, "$JS.API.STREAM.CREATE."+name, func(ctx context.Context) error {
			_, err := c.js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
				Bucket: BucketName, Description: "OOM Tracer: budgets and pause of the annotators", History: kvHistory, Storage: jetstream.FileStorage, Replicas: cfg.Replicas,
			})
			return err
		})
		if err == nil || errors.Is(err, jetstream.ErrBucketExists) { // made by somebody else
			s, err = c.stream(ctx, name)
		}
	}
	if err != nil {
		return err
	}
	want, changed := s.CachedInfo().Config, false
	set(&want.Replicas, cfg.Replicas, &changed)
	set(&want.MaxMsgsPerSubject, kvHistory, &changed)
	if changed {
		err = c.call(ctx, "$JS.API.STREAM.UPDATE."+name, func(ctx context.Context) error {
			_, err := c.js.UpdateStream(ctx, want)
			return err
		})
	}
	if err != nil || s.CachedInfo().State.LastSeq > 0 {
		return err
	}
	return c.KVEntry(budget.Key).Update(ctx, func(data []byte) ([]byte, error) {
		if data != nil {
			return nil, nil // by somebody else
		}
		return budget.Initial(), nil
	})
}
