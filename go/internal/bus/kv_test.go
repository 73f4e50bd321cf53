package bus_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

func ledger(c *bus.Conn, limits config.Budgets, now func() time.Time) *budget.Ledger {
	return &budget.Ledger{Entry: c.KVEntry(budget.Key), Limits: limits, Keep: 10 * time.Minute, Now: now}
}

// Every change sees the one before, however many change at once.
func TestKVEntryUpdate(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	c := connect(ctx, t, cfg, bus.Options{}, quiet())
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	entry := c.KVEntry("counter")
	if data, err := entry.Load(ctx); err != nil || data != nil {
		t.Fatalf("before anything was stored: %q, %v", data, err)
	}
	const workers, each = 4, 10
	var wg sync.WaitGroup
	for range workers {
		own := connect(ctx, t, cfg, bus.Options{}, quiet()).KVEntry("counter")
		wg.Go(func() {
			for range each {
				if err := own.Update(ctx, func(data []byte) ([]byte, error) { return append(data, 'x'), nil }); err != nil {
					t.Error(err)
				}
			}
		})
	}
	wg.Wait()
	if data, err := entry.Load(ctx); err != nil || string(data) != strings.Repeat("x", workers*each) {
		t.Errorf("%d updates are stored as %q, %v", workers*each, data, err)
	}

	// What the change does not want is not stored.
	refused := errors.New("refused")
	if err := entry.Update(ctx, func([]byte) ([]byte, error) { return []byte("no"), refused }); err != refused {
		t.Errorf("the error of the change came as %v", err)
	}
	check(t, entry.Update(ctx, func([]byte) ([]byte, error) { return nil, nil }))
	if data, err := entry.Load(ctx); err != nil || len(data) != workers*each {
		t.Errorf("after no change: %q, %v", data, err)
	}

	// An operator deletes the key, or purges it: it begins anew.
	kv, err := c.JetStream().KeyValue(ctx, bus.BucketName)
	check(t, err)
	for i, remove := range []func() error{
		func() error { return kv.Delete(ctx, "counter") },
		func() error { return kv.Purge(ctx, "counter") },
	} {
		check(t, remove())
		if data, err := entry.Load(ctx); err != nil || data != nil {
			t.Errorf("removal %d: %q, %v", i, data, err)
		}
		check(t, entry.Update(ctx, func(data []byte) ([]byte, error) { return append(data, 'y'), nil }))
		if data, err := entry.Load(ctx); err != nil || string(data) != "y" {
			t.Errorf("after removal %d: %q, %v", i, data, err)
		}
	}
}

func TestKVEntryWithoutBucket(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	entry := connect(ctx, t, cfg, bus.Options{}, quiet()).KVEntry("k")
	_, err := entry.Load(ctx)
	if !errors.Is(err, jetstream.ErrBucketNotFound) {
		t.Errorf("load: %v", err)
	}
	wantError(t, err, "read k of bucket OOM_ANNOTATOR")
	err = entry.Update(ctx, func([]byte) ([]byte, error) { return []byte("v"), nil })
	if !errors.Is(err, jetstream.ErrBucketNotFound) {
		t.Errorf("update: %v", err)
	}
}

// Where the server refuses, that is said at once, and not waited for.
func TestKVEntryRefused(t *testing.T) {
	ctx := begin(t)
	d := startNatsd(t, `authorization { users: [
		{ user: all, password: p }
		{ user: reads, password: p, permissions: { publish: { deny: "$KV.>" } } }
		{ user: nothing, password: p, permissions: { publish: { deny: ["$JS.API.DIRECT.>", "$KV.>"] } } }
	] }`)
	as := func(user string) *bus.Conn {
		return connect(ctx, t, config.NATS{URL: d.url(), User: user, PasswordFile: secret(t, "p")}, bus.Options{}, quiet())
	}
	check(t, bus.EnsureStreams(ctx, as("all"), streamConfig))
	check(t, as("all").KVEntry("k").Update(ctx, func([]byte) ([]byte, error) { return []byte("v"), nil }))
	begun := time.Now()
	reads := as("reads").KVEntry("k")
	if data, err := reads.Load(ctx); err != nil || string(data) != "v" {
		t.Errorf("read with the right to: %q, %v", data, err)
	}
	err := reads.Update(ctx, func([]byte) ([]byte, error) { return []byte("w"), nil })
	if !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("write: %v", err)
	}
	wantError(t, err, "write k of bucket OOM_ANNOTATOR", "$KV.OOM_ANNOTATOR.k")
	_, err = as("nothing").KVEntry("k").Load(ctx)
	if !errors.Is(err, nats.ErrPermissionViolation) {
		t.Errorf("read: %v", err)
	}
	if took := time.Since(begun); took > timeout {
		t.Errorf("it took %s to be refused", took)
	}
}

// The bucket follows the config, and where the server refuses that, it stays.
func TestBucketReplicas(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	c := connect(ctx, t, cfg, bus.Options{}, quiet())
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	check(t, c.KVEntry("k").Update(ctx, func([]byte) ([]byte, error) { return []byte("v"), nil }))
	// A server alone takes no replicas, so this is all that can be seen: it is asked for.
	keepAccount(ctx, t, c)
	three := streamConfig
	three.Replicas = 3
	wantError(t, bus.EnsureBucket(ctx, c, three), "replicas")
	check(t, bus.EnsureBucket(ctx, c, streamConfig))
	if data, err := c.KVEntry("k").Load(ctx); err != nil || string(data) != "v" {
		t.Errorf("afterwards: %q, %v", data, err)
	}
}

// Three replicas and many kills: never more are granted than the budget, and what was refused stays so.
func TestLedgerReplicas(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	first := connect(ctx, t, cfg, bus.Options{}, quiet())
	check(t, bus.EnsureStreams(ctx, first, streamConfig))
	limits := config.Budgets{Window: time.Hour, Cluster: 7}
	var clock atomic.Int64 // seconds
	start := time.Now()
	now := func() time.Time { return start.Add(time.Duration(clock.Load()) * time.Second) }
	var ledgers []*budget.Ledger
	for range 3 {
		ledgers = append(ledgers, ledger(connect(ctx, t, cfg, bus.Options{}, quiet()), limits, now))
	}
	const kills = 40
	claim := func(l *budget.Ledger, i int) bool {
		v, err := l.Claim(ctx, budget.Request{Kill: fmt.Sprint("kill-", i), Node: fmt.Sprint("node-", i), Owner: fmt.Sprint("owner-", i), Killed: start, Read: true})
		if err != nil {
			t.Error(err)
		}
		return v.Refusal == ""
	}
	var mu sync.Mutex
	granted := map[int]bool{}
	var wg sync.WaitGroup
	for r, l := range ledgers {
		wg.Go(func() {
			for n := range kills {
				i := (n + r*kills/3) % kills // each begins elsewhere, and all ask for every kill
				if claim(l, i) {
					mu.Lock()
					granted[i] = true
					mu.Unlock()
				}
			}
		})
	}
	wg.Wait()
	if len(granted) != limits.Cluster {
		t.Errorf("%d were granted, the budget is %d", len(granted), limits.Cluster)
	}
	// However often they come again, on whichever replica: the same answer.
	for _, seconds := range []int64{60, 590, 3601, 4000} {
		clock.Store(seconds)
		for i := range kills {
			if got := claim(ledgers[i%3], i); got != granted[i] {
				t.Errorf("after %d s kill %d: granted %t, at first %t", seconds, i, got, granted[i])
			}
		}
	}
	// New ones find room when the window is over.
	v, err := ledgers[0].Claim(ctx, budget.Request{Kill: "later", Node: "node", Owner: "owner", Killed: now(), Read: true})
	if err != nil || v.Refusal != "" {
		t.Errorf("after the window: %+v, %v", v, err)
	}
}

// Once SetPause has returned, nothing more is granted, by whoever asks.
func TestLedgerPause(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	first := connect(ctx, t, cfg, bus.Options{}, quiet())
	check(t, bus.EnsureStreams(ctx, first, streamConfig))
	limits := config.Budgets{Window: time.Hour, Cluster: 1000}
	operator := ledger(first, limits, time.Now)
	for round := range 5 {
		var paused atomic.Bool
		var granted, late atomic.Int64
		stop, done := context.WithCancel(ctx)
		defer done()
		var wg sync.WaitGroup
		for worker := range 8 {
			l := ledger(connect(ctx, t, cfg, bus.Options{}, quiet()), limits, time.Now)
			wg.Go(func() {
				for i := 0; stop.Err() == nil; i++ {
					before := paused.Load()
					id := fmt.Sprintf("%d-%d-%d", round, worker, i)
					v, err := l.Claim(ctx, budget.Request{Kill: id, Node: id, Owner: id, Killed: time.Now(), Read: true})
					switch {
					case err != nil && !strings.Contains(err.Error(), "wrong last sequence"):
						t.Error(err)
					case err == nil && v.Granted():
						granted.Add(1)
						if before {
							late.Add(1)
						}
					}
				}
			})
		}
		for granted.Load() < 20 && ctx.Err() == nil {
			time.Sleep(time.Millisecond)
		}
		before, err := operator.SetPause(ctx, &budget.Pause{Reason: "test", By: "me", Since: time.Now()})
		s, stateErr := operator.State(ctx)
		paused.Store(true)
		marks := len(s.Marks)
		time.Sleep(100 * time.Millisecond) // for those who would claim
		done()
		wg.Wait()
		check(t, err)
		check(t, stateErr)
		if before != nil {
			t.Errorf("there was a pause: %+v", before)
		}
		s, err = operator.State(ctx)
		check(t, err)
		if late.Load() > 0 || len(s.Marks) != marks {
			t.Errorf("round %d: %d claims were granted in the pause; %d marks at its begin, %d at its end", round, late.Load(), marks, len(s.Marks))
		}
		if before, err = operator.SetPause(ctx, nil); err != nil || before == nil || before.Reason != "test" {
			t.Errorf("resume: %+v, %v", before, err)
		}
	}
	if before, err := operator.SetPause(ctx, nil); before != nil || err != nil {
		t.Errorf("resume without a pause: %+v, %v", before, err)
	}
}

// As many marks as the config allows fit in one message, with names as long as they get; more than fit are
// refused, and a pause still gets in.
func TestLedgerSize(t *testing.T) {
	ctx := begin(t)
	cfg, _ := startEmbedded(t)
	c := connect(ctx, t, cfg, bus.Options{}, quiet())
	check(t, bus.EnsureStreams(ctx, c, streamConfig))
	now := time.Now()
	fill := func(marks int) {
		t.Helper()
		var s budget.State
		s.Schema = budget.Schema
		for i := range marks {
			s.Marks = append(s.Marks, budget.Mark{
				Kill: fmt.Sprintf("1dd8105d-ffb3-46fb-940b-dc17365768a7-%d-8011705978461", i),
				Node: strings.Repeat("n", 253), Owner: strings.Repeat("s", 63) + "/Deployment/" + strings.Repeat("d", 253), Time: now,
			})
		}
		check(t, c.KVEntry(budget.Key).Update(ctx, func([]byte) ([]byte, error) { return json.Marshal(&s) }))
	}
	l := ledger(c, config.Budgets{Window: time.Hour, Cluster: 10000}, func() time.Time { return now })
	fill(999)
	if v, err := l.Claim(ctx, budget.Request{Kill: "k", Node: strings.Repeat("m", 253), Owner: strings.Repeat("o", 320), Killed: now, Read: true}); err != nil || !v.Granted() {
		t.Errorf("the thousandth: %+v, %v", v, err)
	}
	fill(1390)
	_, err := l.Claim(ctx, budget.Request{Kill: "k", Node: "m", Owner: "o", Killed: now, Read: true})
	wantError(t, err, "claim a mark", "the state with 1391 marks has", "bytes, the maximum is")
	if _, err := l.SetPause(ctx, &budget.Pause{Reason: strings.Repeat("r", 256), By: "me", Since: now}); err != nil {
		t.Errorf("a pause: %v", err)
	}
}
