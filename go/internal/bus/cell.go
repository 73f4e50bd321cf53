package bus

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// BucketName is the key-value bucket that the annotators share. JetStream keeps it as the stream KV_<name>.
const BucketName = "OOM_ANNOTATOR"

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

// changed tells that the value is not what it was.
func changed(err error) bool {
	return errors.Is(err, jetstream.ErrKeyExists) || errors.Is(err, jetstream.ErrKeyRevisionMismatch)
}

// ensureBucket makes the bucket, with as many replicas as the streams have.
func ensureBucket(ctx context.Context, c *Conn, cfg config.Stream) error {
	info, err := streamInfo(ctx, c, "KV_"+BucketName)
	switch {
	case errors.Is(err, jetstream.ErrStreamNotFound):
		err = c.call(ctx, "$JS.API.STREAM.CREATE.KV_"+BucketName, func(ctx context.Context) error {
			_, err := c.js.CreateKeyValue(ctx, jetstream.KeyValueConfig{
				Bucket: BucketName, Description: "OOM Tracer: budgets and pause of the annotators", Storage: jetstream.FileStorage, Replicas: cfg.Replicas,
			})
			if errors.Is(err, jetstream.ErrBucketExists) {
				return nil // somebody was faster
			}
			return err
		})
	case err == nil && info.Config.Replicas != cfg.Replicas:
		want := info.Config
		want.Replicas = cfg.Replicas
		err = c.call(ctx, "$JS.API.STREAM.UPDATE.KV_"+BucketName, func(ctx context.Context) error {
			_, err := c.js.UpdateStream(ctx, want)
			return err
		})
	}
	if err != nil {
		return fmt.Errorf("ensure bucket %s: %w", BucketName, err)
	}
	return nil
}
