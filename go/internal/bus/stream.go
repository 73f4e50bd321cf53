package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// nodesMaxBytes bounds the stream of the nodes' statuses: some 1 KiB for each node, of 10,000 and more.
const nodesMaxBytes = 64 << 20

// EnsureStreams makes the streams [event.StreamName] and [event.NodesStreamName], or brings existing ones to
// cfg: subjects, age, bytes, replicas and dedup window; and the bucket [BucketName]. What cfg does not speak of (placement,
// compression, further subjects) stays as an operator has set it. Calling it again, or from several
// places at once, does no harm.
//
// It waits for a connection as long as ctx lets it. It fails when the server refuses, and when a
// stream of that name exists that cannot be turned into one that keeps every message on disk for its
// time (memory storage, another retention, a mirror, no acknowledgements).
func EnsureStreams(ctx context.Context, c *Conn, cfg config.Stream) error {
	nodes := cfg
	nodes.MaxBytes = nodesMaxBytes
	for _, s := range []streamWanted{
		{event.StreamName, event.StreamSubjects(), cfg, 0},
		{event.NodesStreamName, event.NodesStreamSubjects(), nodes, 1},
	} {
		if err := ensureStream(ctx, c, s); err != nil {
			return fmt.Errorf("ensure stream %s: %w", s.name, err)
		}
	}
	return ensureBucket(ctx, c, cfg)
}

// streamWanted is how a stream ought to be.
type streamWanted struct {
	name       string
	subjects   []string
	cfg        config.Stream
	perSubject int64 // messages; 0: no bound
}

func ensureStream(ctx context.Context, c *Conn, s streamWanted) error {
	for {
		info, err := streamInfo(ctx, c, s.name)
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			want := jetstream.StreamConfig{Name: s.name, Storage: jetstream.FileStorage, Retention: jetstream.LimitsPolicy}
			s.configure(&want)
			err = c.call(ctx, "$JS.API.STREAM.CREATE."+s.name, func(ctx context.Context) error {
				_, err := c.js.CreateStream(ctx, want)
				return err
			})
			if errors.Is(err, jetstream.ErrStreamNameAlreadyInUse) {
				continue // somebody was faster
			}
			if err != nil {
				return fmt.Errorf("create: %w", err)
			}
			c.log.Info("stream created", "stream", s.name, "max_age", s.cfg.MaxAge, "max_bytes", s.cfg.MaxBytes, "replicas", s.cfg.Replicas)
			return nil
		}
		if err != nil {
			return err
		}
		if err := checkStream(info.Config); err != nil {
			return err
		}
		want := info.Config
		if !s.configure(&want) {
			return nil
		}
		err = c.call(ctx, "$JS.API.STREAM.UPDATE."+s.name, func(ctx context.Context) error {
			_, err := c.js.UpdateStream(ctx, want)
			return err
		})
		if errors.Is(err, jetstream.ErrStreamNotFound) {
			continue // deleted in between
		}
		if err != nil {
			return fmt.Errorf("update: %w", err)
		}
		c.log.Info("stream updated", "stream", s.name, "max_age", s.cfg.MaxAge, "max_bytes", s.cfg.MaxBytes, "replicas", s.cfg.Replicas)
		return nil
	}
}

// streamInfo reads a stream's state; jetstream.ErrStreamNotFound when there is none.
func streamInfo(ctx context.Context, c *Conn, name string) (info *jetstream.StreamInfo, err error) {
	err = c.call(ctx, "$JS.API.STREAM.INFO."+name, func(ctx context.Context) error {
		s, err := c.js.Stream(ctx, name)
		if err == nil {
			info = s.CachedInfo()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("look up: %w", err)
	}
	return info, nil
}

// Held is what the stream [event.StreamName] holds.
type Held struct {
	FirstSeq  uint64    `json:"first_seq"`
	FirstTime time.Time `json:"first_time"`
	LastSeq   uint64    `json:"last_seq"`
	LastTime  time.Time `json:"last_time"`
	Deleted   uint64    `json:"deleted"` // between the first and the last
	Bytes     uint64    `json:"bytes"`
}

// Held asks the server. It does not wait for a connection, and takes at most 1 s.
func (c *Conn) Held(ctx context.Context) (Held, error) {
	if !c.Connected() {
		return Held{}, ErrDisconnected
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	info, err := streamInfo(ctx, c, event.StreamName)
	if err != nil {
		return Held{}, err
	}
	s := info.State
	return Held{s.FirstSeq, s.FirstTime, s.LastSeq, s.LastTime, uint64(s.NumDeleted), s.Bytes}, nil
}

// Lost is how many of the messages that the stream held before are gone now, although neither cfg.MaxAge nor cfg.MaxBytes can be the
// reason: a damaged store, or somebody who purged it. Where that is not sure, they do not count.
func (before Held) Lost(now Held, cfg config.Stream, at time.Time) uint64 {
	if before.LastSeq == 0 || before.FirstSeq > before.LastSeq {
		return 0 // it was empty
	}
	if now.LastSeq < before.LastSeq { // nats-server does not go back: the stream or its end is another one
		return before.LastSeq - max(now.LastSeq, before.FirstSeq-1)
	}
	lost := now.Deleted - min(now.Deleted, before.Deleted) // nothing of ours deletes single messages
	if now.FirstSeq <= before.FirstSeq || 2*before.Bytes > uint64(cfg.MaxBytes) {
		return lost
	}
	expired := func(stored time.Time) bool { return cfg.MaxAge > 0 && at.Sub(stored) >= cfg.MaxAge }
	if !expired(before.FirstTime) || now.FirstSeq > before.LastSeq && !expired(before.LastTime) {
		lost += min(now.FirstSeq-1, before.LastSeq) - (before.FirstSeq - 1)
	}
	return lost
}

// ErrNoMessage is wrapped by Last's error where the stream holds no message on the subject.
var ErrNoMessage error = jetstream.ErrMsgNotFound

// Last reads the last message on a subject of the stream [event.StreamName], from the stream's leader. It does not wait for a
// connection, and takes at most 5 s.
func (c *Conn) Last(ctx context.Context, subject string) ([]byte, error) {
	data, _, err := c.get(ctx, map[string]any{"last_by_subj": subject})
	if err != nil {
		return nil, fmt.Errorf("read the last message on %s: %w", subject, err)
	}
	return data, nil
}

// Next reads the first message on a subject whose sequence is at least from, and returns its sequence, as Last does.
func (c *Conn) Next(ctx context.Context, subject string, from uint64) ([]byte, uint64, error) {
	data, seq, err := c.get(ctx, map[string]any{"next_by_subj": subject, "seq": from})
	if err != nil {
		return nil, 0, fmt.Errorf("read the next message on %s: %w", subject, err)
	}
	return data, seq, nil
}

func (c *Conn) get(ctx context.Context, which map[string]any) ([]byte, uint64, error) {
	const api = "$JS.API.STREAM.MSG.GET." + event.StreamName
	request, err := json.Marshal(which)
	if err != nil {
		return nil, 0, err
	}
	var answer struct {
		Error   *jetstream.APIError
		Message struct {
			Data []byte
			Seq  uint64
		}
	}
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	// nats.go would look up the stream before each, and ask any of its replicas where an operator has set allow_direct.
	if !c.Connected() {
		return nil, 0, ErrDisconnected
	}
	err = c.call(ctx, api, func(ctx context.Context) error {
		m, err := c.nc.RequestWithContext(ctx, api, request)
		if err != nil {
			return err
		}
		if err := json.Unmarshal(m.Data, &answer); err != nil {
			return err
		}
		if answer.Error != nil {
			return answer.Error
		}
		return nil
	})
	return answer.Message.Data, answer.Message.Seq, err
}

// checkStream refuses what an update cannot mend.
func checkStream(have jetstream.StreamConfig) error {
	var wrong []string
	if have.Storage != jetstream.FileStorage {
		wrong = append(wrong, fmt.Sprintf("its storage is %s, not file", have.Storage))
	}
	if have.Retention != jetstream.LimitsPolicy {
		wrong = append(wrong, fmt.Sprintf("its retention is %s, not limits", have.Retention))
	}
	if have.Mirror != nil {
		wrong = append(wrong, "it is a mirror of "+have.Mirror.Name)
	}
	if have.Sealed {
		wrong = append(wrong, "it is sealed")
	}
	if have.NoAck {
		wrong = append(wrong, "its no_ack is true")
	}
	if wrong != nil {
		return fmt.Errorf("the existing stream cannot be used, back it up and delete it: %s", strings.Join(wrong, ", "))
	}
	return nil
}

// configure writes what is wanted over have and tells whether anything changed.
func (s streamWanted) configure(have *jetstream.StreamConfig) (changed bool) {
	// Subjects of a newer version, or of the operator, stay: this may be the older of two programs.
	want := slices.Clone(have.Subjects)
	for _, ours := range s.subjects {
		if slices.ContainsFunc(want, func(w string) bool { return covers(w, ours) }) {
			continue
		}
		want = slices.DeleteFunc(want, func(w string) bool { return covers(ours, w) })
		want = append(want, ours)
	}
	if !slices.Equal(want, have.Subjects) {
		have.Subjects, changed = want, true
	}
	set(&have.Discard, jetstream.DiscardOld, &changed)
	set(&have.MaxAge, s.cfg.MaxAge, &changed)
	set(&have.MaxBytes, int64(s.cfg.MaxBytes), &changed)
	set(&have.Replicas, s.cfg.Replicas, &changed)
	set(&have.Duplicates, s.cfg.DedupWindow, &changed)
	if s.perSubject > 0 {
		set(&have.MaxMsgsPerSubject, s.perSubject, &changed)
	}
	return changed
}

func set[T comparable](field *T, value T, changed *bool) {
	if *field != value {
		*field, *changed = value, true
	}
}

// covers tells whether the subject pattern a takes everything that b takes.
func covers(a, b string) bool {
	as, bs := strings.Split(a, "."), strings.Split(b, ".")
	for i, t := range as {
		switch {
		case t == ">":
			return len(bs) > i
		case i >= len(bs) || bs[i] == ">":
			return false
		case t != "*" && t != bs[i]:
			return false
		}
	}
	return len(as) == len(bs)
}

// Health is what a readiness probe or a doctor wants to know, in the order in which one thing needs
// the other.
type Health struct {
	Connected bool
	JetStream bool // enabled for the account
	Stream    bool // [event.StreamName] exists
	// Err says why the first of them that is false is so. It wraps nats.ErrPermissionViolation when
	// this client may not ask, as a tracer on a shared cluster may not: then Connected and
	// Publisher.Failing are all there is to know.
	Err error
}

// Check asks the server. It does not wait for a connection, and takes at most 5 s.
func (c *Conn) Check(ctx context.Context) Health {
	var h Health
	if h.Connected = c.Connected(); !h.Connected {
		h.Err = fmt.Errorf("check nats at %s: %w", c.server, ErrDisconnected)
		return h
	}
	// The link may break before the call notices: then call would wait for the next one.
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := c.call(ctx, "$JS.API.INFO", func(ctx context.Context) error {
		_, err := c.js.AccountInfo(ctx)
		return err
	}); err != nil {
		h.Err = fmt.Errorf("check jetstream at %s: %w", c.server, err)
		return h
	}
	h.JetStream = true
	if _, err := streamInfo(ctx, c, event.StreamName); err != nil {
		h.Err = fmt.Errorf("check stream %s at %s: %w", event.StreamName, c.server, err)
		return h
	}
	h.Stream = true
	return h
}
