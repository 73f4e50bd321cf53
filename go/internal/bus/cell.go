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

// BucketName is the key-value bucket that the annotators share. JetStream keeps it as the stream KV_<name>.
const BucketName = "OOM_ANNOTATOR"

// history is how many revisions of each value the bucket keeps, for oom-tap restore.
const history = 64

// updateTries bounds how often Update begins anew because others were faster.
const updateTries = 100

// Cell is one value in the bucket, which whoever shares it changes by compare-and-set.
type Cell struct {
	conn *Conn
	key  string
}

// Cell returns the value of a key. Nothing is asked of the server.
func (c *Conn) Cell(key string) *Cell { return &Cell{c, key} }

// Load reads the value: nil where there is none yet. What was stored a moment ago may not be in it, where
// another server of the cluster answers.
//
// It waits for a connection as long as ctx lets it, and wraps jetstream.ErrBucketNotFound where
// EnsureStreams was not called.
func (c *Cell) Load(ctx context.Context) ([]byte, error) {
	data, _, _, err := c.load(ctx)
	return data, err
}

func (c *Cell) load(ctx context.Context) (data []byte, revision uint64, kv jetstream.KeyValue, err error) {
	// Both requests name the stream at the end of their subjects.
	err = c.conn.call(ctx, "$JS.API.", func(ctx context.Context) error {
		if kv, err = c.conn.js.KeyValue(ctx, BucketName); err != nil {
			return err
		}
		entry, err := kv.Get(ctx, c.key)
		if errors.Is(err, jetstream.ErrKeyNotFound) {
			return nil
		}
		if err == nil {
			data, revision = entry.Value(), entry.Revision()
		}
		return err
	})
	if err != nil {
		return nil, 0, nil, fmt.Errorf("read %s of bucket %s: %w", c.key, BucketName, err)
	}
	return data, revision, kv, nil
}

// Update has change called on the newest value, again for as long as others are faster, and stores what it
// returns. Where that is nil, or an error, which is returned as it is, nothing is stored.
//
// Where Update fails otherwise the value may have been stored all the same.
func (c *Cell) Update(ctx context.Context, change func([]byte) ([]byte, error)) error {
	for try := 1; ; try++ {
		data, revision, kv, err := c.load(ctx)
		if err != nil {
			return err
		}
		value, err := change(data)
		if err != nil || value == nil {
			return err
		}
		err = c.conn.call(ctx, "$KV."+BucketName+".", func(ctx context.Context) error {
			if revision == 0 {
				_, err = kv.Create(ctx, c.key, value)
			} else {
				_, err = kv.Update(ctx, c.key, value, revision)
			}
			return err
		})
		switch {
		case err == nil:
			return nil
		case !changed(err) || try == updateTries:
			return fmt.Errorf("write %s of bucket %s: %w", c.key, BucketName, err)
		}
		select {
		case <-time.After(rand.N(time.Duration(min(try, 20)) * time.Millisecond)):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// History reads the revisions that the bucket still has, the newest first. A removal is none.
func (c *Cell) History(ctx context.Context) (all []budget.Revision, err error) {
	name := "KV_" + BucketName
	info, err := streamInfo(ctx, c.conn, name)
	if err != nil {
		return nil, fmt.Errorf("read the history of bucket %s: %w", BucketName, err)
	}
	for seq := info.State.LastSeq; seq > 0 && seq >= info.State.FirstSeq; seq-- {
		var m *jetstream.RawStreamMsg
		err := c.conn.call(ctx, "$JS.API.STREAM.", func(ctx context.Context) error {
			s, err := c.conn.js.Stream(ctx, name)
			if err != nil {
				return err
			}
			m, err = s.GetMsg(ctx, seq)
			return err
		})
		switch {
		case errors.Is(err, jetstream.ErrMsgNotFound):
		case err != nil:
			return nil, fmt.Errorf("read revision %d of bucket %s: %w", seq, BucketName, err)
		case m.Subject == "$KV."+BucketName+"."+c.key && m.Header.Get("KV-Operation") == "":
			all = append(all, budget.Revision{Data: m.Data, Time: m.Time})
		}
	}
	return all, nil
}

// changed tells that the value is not what it was.
func changed(err error) bool {
	return errors.Is(err, jetstream.ErrKeyExists) || errors.Is(err, jetstream.ErrKeyRevisionMismatch)
}

// ensureBucket makes the bucket, with as many replicas as the streams have, and writes the first state into a bucket that nothing
// was ever stored in. A state that was there and is gone is not made anew: see budget.ErrAbsent.
func ensureBucket(ctx context.Context, c *Conn, cfg config.Stream) error {
	const name = "KV_" + BucketName
	info, err := streamInfo(ctx, c, name)
	if errors.Is(err, jetstream.ErrStreamNotFound) {
		err = c.call(ctx, "$JS.API.STREAM.CREATE."+name, func(ctx context.Context) error {
			_, err := c.js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
				Bucket: BucketName, Description: "OOM Tracer: budgets and pause of the annotators", History: history, Storage: jetstream.FileStorage, Replicas: cfg.Replicas,
			})
			if errors.Is(err, jetstream.ErrBucketExists) {
				return nil // somebody was faster
			}
			return err
		})
		if err == nil {
			info, err = streamInfo(ctx, c, name)
		}
	}
	if err == nil && (info.Config.Replicas != cfg.Replicas || info.Config.MaxMsgsPerSubject != history) {
		want := info.Config
		want.Replicas, want.MaxMsgsPerSubject = cfg.Replicas, history
		err = c.call(ctx, "$JS.API.STREAM.UPDATE."+name, func(ctx context.Context) error {
			_, err := c.js.UpdateStream(ctx, want)
			return err
		})
	}
	if err == nil && info.State.LastSeq == 0 {
		err = c.Cell(budget.Key).Update(ctx, func(data []byte) ([]byte, error) {
			if data != nil {
				return nil, nil // somebody was faster
			}
			return budget.Initial(), nil
		})
	}
	if err != nil {
		return fmt.Errorf("ensure bucket %s: %w", BucketName, err)
	}
	return nil
}
