package bus

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// BucketName is the KV bucket that the annotators share. JetStream stores it in the stream KV_<name>.
const BucketName = "OOM_ANNOTATOR"

const (
	kvHistory   = 64  // revisions of each entry that the bucket keeps, for oom-tap restore
	updateTries = 100 // of Update, while others change the entry at the same time
)

// KVEntry is one entry of the bucket, changed by compare-and-set.
type KVEntry struct {
	conn *Conn
	key  string
}

// KVEntry returns the entry of a key. Nothing is requested from the server.
func (c *Conn) KVEntry(key string) *KVEntry { return &KVEntry{c, key} }

// Load reads the value: nil if there is none. It may miss a value that was stored a moment ago, if another server of the cluster
// answers.
//
// Load waits for a connection until ctx ends. Its error wraps jetstream.ErrBucketNotFound if EnsureStreams was not called.
func (e *KVEntry) Load(ctx context.Context) ([]byte, error) {
	data, _, _, err := e.load(ctx)
	return data, err
}

func (e *KVEntry) load(ctx context.Context) (data []byte, revision uint64, kv jetstream.KeyValue, err error) {
	// Both requests name the stream at the end of their subjects.
	err = e.conn.call(ctx, "$JS.API.", func(ctx context.Context) error {
		if kv, err = e.conn.js.KeyValue(ctx, BucketName); err != nil {
			return err
		}
		entry, err := kv.Get(ctx, e.key)
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			return nil
		}
		if err == nil {
			data, revision = entry.Value(), entry.Revision()
		}
		return err
	})
	if err != nil {
		return nil, 0, nil, fmt.Errorf("read %s of bucket %s: %w", e.key, BucketName, err)
	}
	return data, revision, kv, nil
}

// Update calls change with the newest value, and stores what it returns. It begins again if the entry was changed meanwhile. If
// change returns nil, or an error, nothing is stored; Update returns the error as it is.
//
// After any other error, the value may have been stored.
func (e *KVEntry) Update(ctx context.Context, change func([]byte) ([]byte, error)) error {
	for try := 1; ; try++ {
		data, revision, kv, err := e.load(ctx)
		if err != nil {
			return err
		}
		value, err := change(data)
		if err != nil || value == nil {
			return err
		}
		err = e.conn.call(ctx, "$KV."+BucketName+".", func(ctx context.Context) error {
			if revision == 0 {
				_, err = kv.Create(ctx, e.key, value)
			} else {
				_, err = kv.Update(ctx, e.key, value, revision)
			}
			return err
		})
		changed := errors.Is(err, jetstream.ErrKeyExists) || errors.Is(err, jetstream.ErrKeyRevisionMismatch)
		switch {
		case err == nil:
			return nil
		case !changed || try == updateTries:
			return fmt.Errorf("write %s of bucket %s: %w", e.key, BucketName, err)
		}
		sleep(ctx, rand.N(time.Duration(min(try, 20))*time.Millisecond))
	}
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
			if errors.Is(err, jetstream.ErrBucketExists) {
				return nil // by somebody else
			}
			return err
		})
		if err == nil {
			s, err = c.stream(ctx, name)
		}
	}
	if err != nil {
		return fmt.Errorf("ensure bucket %s: %w", BucketName, err)
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
	if err == nil && s.CachedInfo().State.LastSeq == 0 {
		err = c.KVEntry(budget.Key).Update(ctx, func(data []byte) ([]byte, error) {
			if data != nil {
				return nil, nil // by somebody else
			}
			return budget.Initial(), nil
		})
	}
	if err != nil {
		return fmt.Errorf("ensure bucket %s: %w", BucketName, err)
	}
	return nil
}
