package bus

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// nodesMaxBytes bounds the stream of the nodes' statuses: some 1 KiB for each node, of 10,000 and more.
const nodesMaxBytes = 64 << 20

// EnsureStreams makes the streams [event.StreamName] and [event.NodesStreamName] and the bucket [BucketName], or brings them to
// cfg. What cfg does not speak of (placement, compression, further subjects) stays. It may be called again, and at once.
//
// It waits for a connection until ctx ends. It fails when the server refuses, and when a stream of that name cannot become one
// that keeps every message on disk for its time (memory storage, another retention, a mirror, no acknowledgements).
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
	if err := ensureBucket(ctx, c, cfg); err != nil {
		return fmt.Errorf("ensure bucket %s: %w", BucketName, err)
	}
	return nil
}

type streamWanted struct {
	name       string
	subjects   []string
	cfg        config.Stream
	perSubject int64 // messages; 0: no bound
}

func ensureStream(ctx context.Context, c *Conn, s streamWanted) error {
	for {
		have, err := c.stream(ctx, s.name)
		isNew := errors.Is(err, jetstream.ErrStreamNotFound)
		if err != nil && !isNew {
			return err
		}
		act := "create"
		want := jetstream.StreamConfig{Name: s.name, Storage: jetstream.FileStorage, Retention: jetstream.LimitsPolicy}
		if !isNew {
			act, want = "update", have.CachedInfo().Config
			if err := checkStream(want); err != nil {
				return err
			}
		}
		if !s.configure(&want) {
			return nil
		}
		err = c.call(ctx, "$JS.API.STREAM."+strings.ToUpper(act)+"."+s.name, func(ctx context.Context) error {
			if isNew {
				_, err = c.js.CreateStream(ctx, want)
			} else {
				_, err = c.js.UpdateStream(ctx, want)
			}
			return err
		})
		switch {
		case errors.Is(err, jetstream.ErrStreamNameAlreadyInUse), errors.Is(err, jetstream.ErrStreamNotFound):
			continue // somebody created or deleted it in between
		case err != nil:
			return fmt.Errorf("%s: %w", act, err)
		}
		c.log.Info("stream configured", "stream", s.name, "new", isNew, "max_age", s.cfg.MaxAge, "max_bytes", s.cfg.MaxBytes, "replicas", s.cfg.Replicas)
		return nil
	}
}

// stream looks a stream up; jetstream.ErrStreamNotFound when there is none.
func (c *Conn) stream(ctx context.Context, name string) (s jetstream.Stream, err error) {
	err = c.call(ctx, "$JS.API.STREAM.INFO."+name, func(ctx context.Context) (err error) {
		s, err = c.js.Stream(ctx, name)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("look up: %w", err)
	}
	return s, nil
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
	stream, err := c.stream(ctx, event.StreamName)
	if err != nil {
		return Held{}, err
	}
	s := stream.CachedInfo().State
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

// Last reads the last message on a subject from the leader of the stream [event.StreamName], within 5 s, if connected.
func (c *Conn) Last(ctx context.Context, subject string) ([]byte, error) {
	m, err := c.getNow(ctx, "last", subject, map[string]any{"last_by_subj": subject})
	return m.Data, err
}

// Next reads the first message on a subject whose sequence is at least from, and returns its sequence, as Last does.
func (c *Conn) Next(ctx context.Context, subject string, from uint64) ([]byte, uint64, error) {
	m, err := c.getNow(ctx, "next", subject, map[string]any{"next_by_subj": subject, "seq": from})
	return m.Data, m.Seq, err
}

func (c *Conn) getNow(ctx context.Context, which, subject string, query map[string]any) (m Stored, err error) {
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err = ErrDisconnected; c.Connected() {
		m, err = c.get(ctx, query)
	}
	if err != nil {
		return Stored{}, fmt.Errorf("read the %s message on %s: %w", which, subject, err)
	}
	return m, nil
}

// get reads the message of the stream [event.StreamName] that a query names, from the stream's leader. nats.go would look up the
// stream before each, ask any of its replicas where an operator has set allow_direct, and knows no start_time.
func (c *Conn) get(ctx context.Context, query map[string]any) (Stored, error) {
	const api = "$JS.API.STREAM.MSG.GET." + event.StreamName
	request, err := json.Marshal(query)
	if err != nil {
		return Stored{}, fmt.Errorf("write the request: %w", err)
	}
	var answer struct {
		Error   *jetstream.APIError
		Message struct {
			Subject    string
			Seq        uint64
			Time       time.Time
			Hdrs, Data []byte
		}
	}
	if err := c.call(ctx, api, func(ctx context.Context) error {
		m, err := c.nc.RequestWithContext(ctx, api, request)
		if err != nil {
			return err
		}
		return json.Unmarshal(m.Data, &answer)
	}); err != nil {
		return Stored{}, err
	}
	if answer.Error != nil {
		return Stored{}, answer.Error
	}
	m := answer.Message
	header := nats.Header{}
	if len(m.Hdrs) > 0 {
		if header, err = nats.DecodeHeadersMsg(m.Hdrs); err != nil {
			return Stored{}, err
		}
	}
	return Stored{header.Get(jetstream.MsgIDHeader), m.Subject, m.Data, m.Seq, m.Time}, nil
}

// checkStream refuses what an update cannot mend.
func checkStream(have jetstream.StreamConfig) error {
	var wrong []string
	refuse := func(is bool, format string, args ...any) {
		if is {
			wrong = append(wrong, fmt.Sprintf(format, args...))
		}
	}
	refuse(have.Storage != jetstream.FileStorage, "its storage is %s, not file", have.Storage)
	refuse(have.Retention != jetstream.LimitsPolicy, "its retention is %s, not limits", have.Retention)
	if have.Mirror != nil {
		refuse(true, "it is a mirror of %s", have.Mirror.Name)
	}
	refuse(have.Sealed, "it is sealed")
	refuse(have.NoAck, "its no_ack is true")
	if wrong == nil {
		return nil
	}
	return fmt.Errorf("the existing stream cannot be used, back it up and delete it: %s", strings.Join(wrong, ", "))
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
	for {
		t, restA, moreA := strings.Cut(a, ".")
		u, restB, moreB := strings.Cut(b, ".")
		switch {
		case t == ">":
			return true
		case u == ">", t != "*" && t != u:
			return false
		case !moreA || !moreB:
			return moreA == moreB
		}
		a, b = restA, restB
	}
}

// Check asks whether JetStream is enabled for the account, and whether the stream [event.StreamName] exists, within 5 s, if
// connected. The error wraps nats.ErrPermissionViolation where this client may not ask, as a tracer on a shared cluster.
func (c *Conn) Check(ctx context.Context) (enabled bool, err error) {
	if !c.Connected() {
		return false, fmt.Errorf("check nats at %s: %w", c.server, ErrDisconnected)
	}
	// The link may break before the call notices: then call would wait for the next one.
	ctx, cancel := context.WithTimeout(ctx, requestTimeout)
	defer cancel()
	if err := c.call(ctx, "$JS.API.INFO", func(ctx context.Context) error {
		_, err := c.js.AccountInfo(ctx)
		return err
	}); err != nil {
		return false, fmt.Errorf("check jetstream at %s: %w", c.server, err)
	}
	if _, err := c.stream(ctx, event.StreamName); err != nil {
		return true, fmt.Errorf("check stream %s at %s: %w", event.StreamName, c.server, err)
	}
	return true, nil
}

const (
	outcomeSubjects = "oom.v1." + string(event.KindOutcome) + ".>"
	// outcomeReaders read at once, each readerBatch sequences of the stream, before what they read is handed over.
	outcomeReaders, readerBatch = 16, 256
)

// Outcomes hands the outcomes that were stored since a time to each, in the order of the stream, up to its last one now. It has
// no consumer: the name of one is a token of a subject, so who may pull from a consumer of any name may pull from all.
func (c *Conn) Outcomes(ctx context.Context, since time.Time, each func(Stored) error) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("read the outcomes: %w", err)
		}
	}()
	last, err := c.get(ctx, map[string]any{"last_by_subj": outcomeSubjects})
	if errors.Is(err, jetstream.ErrMsgNotFound) {
		return nil
	}
	if err != nil || last.Time.Before(since) {
		return err
	}
	// Servers before 2.11 ignore the time and return the first one that they have.
	first, err := c.get(ctx, map[string]any{"next_by_subj": outcomeSubjects, "start_time": since})
	if err != nil {
		return err
	}
	for from := first.Seq; from <= last.Seq; {
		parts := make([][]Stored, outcomeReaders)
		errs := make([]error, outcomeReaders)
		next := from + outcomeReaders*readerBatch // where the next round begins
		var reading sync.WaitGroup
		for i := range outcomeReaders {
			begin := from + uint64(i)*readerBatch
			if begin > last.Seq {
				break
			}
			reading.Go(func() {
				end := min(begin+readerBatch-1, last.Seq)
				for seq := begin; seq <= end; {
					m, err := c.get(ctx, map[string]any{"next_by_subj": outcomeSubjects, "seq": seq})
					switch {
					case errors.Is(err, jetstream.ErrMsgNotFound): // the rest was deleted
						return
					case err != nil:
						errs[i] = err
						return
					case m.Seq > end:
						if i == outcomeReaders-1 {
							next = m.Seq
						}
						return
					}
					seq = m.Seq + 1
					parts[i] = append(parts[i], m)
				}
			})
		}
		reading.Wait()
		if err := errors.Join(errs...); err != nil {
			return err
		}
		for _, m := range slices.Concat(parts...) {
			if m.Time.Before(since) {
				continue
			}
			if err := each(m); err != nil {
				return err
			}
		}
		from = next
	}
	return nil
}
