package budget_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/bus/embedded"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// connections makes as many connections to a NATS of their own.
func connections(t *testing.T, count int) (all []*bus.Conn) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	cfg := config.NATS{Embedded: config.Embedded{Listen: "127.0.0.1:0", Dir: filepath.Join(t.TempDir(), "nats")}}
	s, err := embedded.Start(cfg.Embedded, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
	for range count {
		c, err := bus.Connect(t.Context(), cfg, bus.Options{Name: "test"}, log)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(c.Close)
		all = append(all, c)
	}
	if err := bus.EnsureStreams(t.Context(), all[0], config.Default().NATS.Stream); err != nil {
		t.Fatal(err)
	}
	return all
}

func ledgers(t *testing.T, count int, limits config.Budgets) (all []*budget.Ledger) {
	for _, c := range connections(t, count) {
		all = append(all, &budget.Ledger{Entry: c.KVEntry(budget.Key), Limits: limits, Keep: time.Minute, Now: time.Now})
	}
	return all
}

// However many claim at once, no more are granted than there may be, and what is granted stays so.
func TestLedgerRace(t *testing.T) {
	const limit, workers, tries = 7, 8, 10
	all := ledgers(t, 3, config.Budgets{Window: time.Hour, Cluster: limit})
	var granted sync.Map
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for i := range tries {
				kill := fmt.Sprintf("kill-%d-%d", w, i)
				v, err := all[(w+i)%len(all)].Claim(t.Context(), budget.Request{Kill: kill, Node: "node", Owner: "owner", Killed: time.Now(), Read: true})
				if err != nil {
					t.Error(err)
				}
				if v.Granted() {
					granted.Store(kill, true)
				}
			}
		})
	}
	wg.Wait()
	count := 0
	granted.Range(func(kill, _ any) bool {
		count++
		v, err := all[0].Claim(t.Context(), budget.Request{Kill: kill.(string), Node: "node", Owner: "owner", Killed: time.Now(), Read: true})
		if err != nil || !v.Granted() {
			t.Errorf("%s claimed again: %+v, %v", kill, v, err)
		}
		return true
	})
	state, err := all[1].State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if count != limit || len(state.Marks) != limit {
		t.Errorf("%d granted, %d kept, want %d", count, len(state.Marks), limit)
	}
}

// slow is an entry whose first update waits for release.
type slow struct {
	budget.Entry
	updates atomic.Int64
	begun   chan struct{}
	release chan struct{}
}

func (s *slow) Update(ctx context.Context, change func([]byte) ([]byte, error)) error {
	if s.updates.Add(1) == 1 {
		close(s.begun)
		<-s.release
	}
	return s.Entry.Update(ctx, change)
}

// Claims that wait for another one are stored together, each within the limits.
func TestLedgerTogether(t *testing.T) {
	const limit, waiting = 7, 20
	all := ledgers(t, 2, config.Budgets{Window: time.Hour, Cluster: limit})
	entry := &slow{Entry: all[0].Entry, begun: make(chan struct{}), release: make(chan struct{})}
	all[0].Entry = entry
	var granted, refused atomic.Int64
	var wg sync.WaitGroup
	claim := func(l *budget.Ledger, kill string) {
		v, err := l.Claim(t.Context(), budget.Request{Kill: kill, Node: "node", Owner: "owner", Killed: time.Now(), Read: true})
		switch {
		case err != nil || v.New != v.Granted():
			t.Errorf("%s: %+v, %v", kill, v, err)
		case v.New:
			granted.Add(1)
		default:
			refused.Add(1)
		}
	}
	wg.Go(func() { claim(all[0], "first") })
	<-entry.begun
	for i := range waiting {
		wg.Go(func() { claim(all[0], fmt.Sprint("kill-", i)) })
	}
	time.Sleep(100 * time.Millisecond)
	claim(all[1], "other") // another process, so that what the first one knows is old
	close(entry.release)
	wg.Wait()
	state, err := all[1].State(t.Context())
	if err != nil || len(state.Marks) != limit || granted.Load() != limit || refused.Load() != waiting+2-limit {
		t.Errorf("%d granted, %d refused, stored %+v, %v; want %d granted", granted.Load(), refused.Load(), state.Marks, err, limit)
	}
	if n := entry.updates.Load(); n > waiting/2 {
		t.Errorf("%d updates for %d claims", n, waiting+1)
	}
}

// Once SetPause has returned nothing is granted, by anybody.
func TestLedgerRelease(t *testing.T) {
	all := ledgers(t, 2, config.Budgets{Window: time.Hour, Cluster: 1})
	claim := func(kill, want string) {
		t.Helper()
		v, err := all[0].Claim(t.Context(), budget.Request{Kill: kill, Node: "node", Owner: "owner", Killed: time.Now(), Read: true})
		if err != nil || string(v.Refusal) != want {
			t.Errorf("%s: %q, %v; want %q", kill, v.Refusal, err, want)
		}
	}
	claim("first", "")
	claim("second", "cluster: 1 of 1 within 1h0m0s")
	for range 2 { // the second time there is nothing to give back
		if err := all[1].Release(t.Context(), "first"); err != nil {
			t.Fatal(err)
		}
	}
	claim("third", "")
	if err := all[1].Release(t.Context(), "first"); err != nil {
		t.Fatal(err)
	}
	claim("fourth", "cluster: 1 of 1 within 1h0m0s")
}

// distant is an Entry at the end of a slow connection: between the read of a value and the write of the next one, others change it.
type distant struct{ *bus.KVEntry }

func slowly(change func([]byte) ([]byte, error)) func([]byte) ([]byte, error) {
	return func(data []byte) ([]byte, error) {
		time.Sleep(100 * time.Millisecond)
		return change(data)
	}
}

func (d distant) Update(ctx context.Context, change func([]byte) ([]byte, error)) error {
	return d.KVEntry.Update(ctx, slowly(change))
}

func (d distant) UpdateFirst(ctx context.Context, change func([]byte) ([]byte, error)) error {
	return d.KVEntry.UpdateFirst(ctx, slowly(change))
}

// A pause from a distant client gets through while two replicas claim without a break, and nothing is granted after it.
func TestLedgerPause(t *testing.T) {
	all := ledgers(t, 3, config.Budgets{})
	all[2].Entry = distant{all[2].Entry.(*bus.KVEntry)}
	var paused atomic.Bool
	var after, before atomic.Int32
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	for w := range 8 {
		wg.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				was := paused.Load() // before the claim begins
				v, err := all[w%2].Claim(t.Context(), budget.Request{Kill: fmt.Sprintf("kill-%d-%d", w, i), Node: "node", Owner: "owner", Killed: time.Now(), Read: true})
				switch {
				case err != nil:
					t.Error(err)
					return
				case v.Granted() && was:
					after.Add(1)
				case v.Granted():
					before.Add(1)
				}
			}
		})
	}
	for before.Load() < 20 {
		time.Sleep(time.Millisecond)
	}
	setting, stop := context.WithTimeout(t.Context(), 10*time.Second)
	defer stop()
	if was, err := all[2].SetPause(setting, &budget.Pause{Reason: "x"}); err != nil || was != nil {
		t.Fatalf("%v, %v", was, err)
	}
	paused.Store(true)
	state, err := all[2].State(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	cancel()
	wg.Wait()
	later, err := all[2].State(t.Context())
	if err != nil || len(later.Marks) != len(state.Marks) || after.Load() != 0 {
		t.Errorf("%d granted after the pause; %d marks, then %d; %v", after.Load(), len(state.Marks), len(later.Marks), err)
	}
	if was, err := all[2].SetPause(t.Context(), nil); err != nil || was == nil || was.Reason != "x" {
		t.Errorf("%v, %v", was, err)
	}
	if v, err := all[0].Claim(t.Context(), budget.Request{Kill: "last", Node: "node", Owner: "owner", Killed: time.Now(), Read: true}); err != nil || !v.Granted() {
		t.Errorf("%+v, %v", v, err)
	}
}

// As many marks as a config permits fit into one message, with names as long as they may be in practice; with
// longer ones the claim fails, and nothing is marked.
func TestLedgerSize(t *testing.T) {
	for _, tt := range []struct {
		length int
		fits   bool
	}{{63, true}, {600, false}} {
		l := ledgers(t, 1, config.Budgets{Window: time.Hour, Cluster: 1000})[0]
		state := budget.State{Schema: budget.Schema}
		now := time.Now()
		for i := range 999 {
			name := fmt.Sprintf("%d%s", i, strings.Repeat("x", tt.length))
			state.Claim(l.Limits, budget.Mark{Kill: name + name, Node: name, Owner: name + name, Time: now}, now, time.Minute)
		}
		data, err := json.Marshal(&state)
		if err != nil {
			t.Fatal(err)
		}
		err = l.Entry.Update(t.Context(), func([]byte) ([]byte, error) { return data, nil })
		if err == nil {
			var v budget.Verdict
			if v, err = l.Claim(t.Context(), budget.Request{Kill: "last", Node: "node", Owner: "owner", Killed: now, Read: true}); !v.Granted() {
				t.Errorf("%+v", v)
			}
		}
		if (err == nil) != tt.fits {
			t.Errorf("names of %d: %v", tt.length, err)
		}
	}
}

// A claim stores what it would if it encoded all of the state, whatever wrote the state before it, and with marks that the claim deletes.
func TestLedgerEncoding(t *testing.T) {
	l := ledgers(t, 1, config.Budgets{Window: time.Hour, Cluster: 10})[0]
	now := time.Now().UTC().Truncate(time.Second)
	l.Now = func() time.Time { return now }
	old, recent := budget.Mark{Kill: "old", Node: "n", Owner: "a", Time: now.Add(-2 * time.Hour)}, budget.Mark{Kill: "recent", Node: "n", Owner: "b", Time: now.Add(-time.Minute)}
	pause := &budget.Pause{Reason: "over", By: "me", Since: old.Time, Until: &recent.Time}
	encode := func(s budget.State) string {
		s.Schema = budget.Schema
		data, err := json.Marshal(&s)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	for name, before := range map[string]string{
		"no marks":          encode(budget.State{}),
		"an empty list":     `{"schema":"` + budget.Schema + `","marks":[]}`,
		"a mark":            encode(budget.State{Marks: []budget.Mark{recent}}),
		"a pause and marks": encode(budget.State{Pause: pause, Marks: []budget.Mark{recent, recent}}),
		"an old mark":       encode(budget.State{Marks: []budget.Mark{old, recent}}),
		"spaces":            encode(budget.State{Marks: []budget.Mark{recent}}) + "\n",
		"the schema last":   `{"marks":[],"schema":"` + budget.Schema + `"}`,
	} {
		if err := l.Entry.Update(t.Context(), func([]byte) ([]byte, error) { return []byte(before), nil }); err != nil {
			t.Fatal(err)
		}
		for _, kill := range []string{"1", "2"} {
			want, err := budget.Parse([]byte(before))
			if err != nil {
				t.Fatal(err)
			}
			if refused := want.Claim(l.Limits, budget.Mark{Kill: kill, Node: "n", Owner: "c", Time: now}, now, l.Keep); refused != "" {
				t.Fatal(refused)
			}
			if v, err := l.Claim(t.Context(), budget.Request{Kill: kill, Node: "n", Owner: "c", Killed: now, Read: true}); err != nil || !v.New {
				t.Fatalf("%s: %+v, %v", name, v, err)
			}
			got, err := l.Entry.Load(t.Context())
			if err != nil || string(got) != encode(want) {
				t.Errorf("%s: %s, %v, want %s", name, got, err, encode(want))
			}
			before = string(got)
		}
	}
}

// Where a pod of the same owner on the node was marked, a claim needs the pod to be read; and what one process returned or claimed,
// another one sees at its next claim.
func TestLedgerContested(t *testing.T) {
	all := ledgers(t, 2, config.Budgets{Window: time.Hour, Cluster: 3})
	for i, step := range []struct {
		ledger      int
		kill, owner string
		read        bool
		want        budget.Verdict
	}{
		{0, "1", "a", false, budget.Verdict{New: true}},
		{1, "2", "a", false, budget.Verdict{Contested: true}},
		{1, "1", "a", false, budget.Verdict{}}, // delivered again, to another process
		{1, "2", "a", true, budget.Verdict{New: true}},
		{0, "2", "a", false, budget.Verdict{}},
		{0, "3", "b", false, budget.Verdict{New: true}},
		{1, "4", "c", false, budget.Verdict{Refusal: "cluster: 3 of 3 within 1h0m0s"}},
	} {
		v, err := all[step.ledger].Claim(t.Context(), budget.Request{Kill: step.kill, Node: "node", Owner: step.owner, Killed: time.Now(), Read: step.read})
		if err != nil || v != step.want {
			t.Errorf("step %d: %+v, %v, want %+v", i, v, err, step.want)
		}
	}
	if err := all[0].Release(t.Context(), "3"); err != nil {
		t.Fatal(err)
	}
	if v, err := all[1].Claim(t.Context(), budget.Request{Kill: "4", Node: "node", Owner: "c", Killed: time.Now()}); err != nil || !v.New {
		t.Errorf("after a return: %+v, %v", v, err)
	}
}

// TestLedgerRefused: where the state was removed or replaced nothing is granted, and setup does not make it anew. Restore brings the
// last valid one back, with its pause and its marks.
func TestLedgerRefused(t *testing.T) {
	c := connections(t, 1)[0]
	entry := c.KVEntry(budget.Key)
	l := &budget.Ledger{Entry: entry, Limits: config.Budgets{Window: time.Hour, Cluster: 2}, Keep: time.Minute, Now: time.Now}
	claim := func(kill string, granted bool, want error) {
		t.Helper()
		v, err := l.Claim(t.Context(), budget.Request{Kill: kill, Node: "node", Owner: "owner", Killed: time.Now(), Read: true})
		if !errors.Is(err, want) || err == nil && v.Granted() != granted {
			t.Errorf("%s: %+v, %v, want %t, %v", kill, v, err, granted, want)
		}
	}
	claim("1", true, nil)
	kv, err := c.JetStream().KeyValue(t.Context(), bus.BucketName)
	if err != nil {
		t.Fatal(err)
	}
	put := func(data string) func() error {
		return func() error {
			_, err := kv.PutString(t.Context(), budget.Key, data)
			return err
		}
	}
	for name, forge := range map[string]func() error{
		"deleted":         func() error { return kv.Delete(t.Context(), budget.Key) },
		"acknowledgement": put(`{"stream":"OOM","seq":7}`),
		"event":           put(`{"schema":"oom-tracer/v1"}`),
		"empty":           put(""),
	} {
		if err := forge(); err != nil {
			t.Fatal(err)
		}
		if err := bus.EnsureStreams(t.Context(), c, config.Default().NATS.Stream); err != nil {
			t.Fatal(err)
		}
		claim(name, false, budget.ErrState)
		if _, err := l.SetPause(t.Context(), &budget.Pause{Reason: "x", Since: time.Now()}); !errors.Is(err, budget.ErrState) {
			t.Errorf("%s: pause: %v", name, err)
		}
		revisions, err := entry.History(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if from, valid, err := l.Restore(t.Context(), revisions); err != nil || valid || from == nil {
			t.Fatalf("%s: restored %+v, %t, %v", name, from, valid, err)
		}
		if s, err := l.State(t.Context()); err != nil || len(s.Marks) != 1 || s.Marks[0].Kill != "1" {
			t.Errorf("%s: restored to %+v, %v", name, s, err)
		}
		if from, valid, err := l.Restore(t.Context(), revisions); err != nil || !valid || from != nil {
			t.Errorf("%s: restored again: %+v, %t, %v", name, from, valid, err)
		}
	}
	claim("2", true, nil)
	claim("3", false, nil) // the first one is not forgotten

	// Nothing to restore from is no reason to begin anew.
	if err := kv.Purge(t.Context(), budget.Key); err != nil {
		t.Fatal(err)
	}
	revisions, err := entry.History(t.Context())
	if err != nil || len(revisions) != 0 {
		t.Errorf("after a purge: %d revisions, %v", len(revisions), err)
	}
	if from, valid, err := l.Restore(t.Context(), revisions); err == nil || valid || from != nil {
		t.Errorf("restored %+v, %t, %v", from, valid, err)
	}
	claim("4", false, budget.ErrAbsent)
	if err := c.JetStream().DeleteKeyValue(t.Context(), bus.BucketName); err != nil {
		t.Fatal(err)
	}
	claim("5", false, jetstream.ErrBucketNotFound)
}
