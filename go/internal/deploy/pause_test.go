package deploy

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/budget"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// TestPauseReplicated: on three servers, the operator's pause gets through while two annotators claim without a break. No claim is lost,
// and none is granted after the pause.
func TestPauseReplicated(t *testing.T) {
	s := startServers(t, values(t, "nats: {passwordSecret: oom-tracer-nats, tracers: shared}")...)
	ledger := func(who, name string) *budget.Ledger {
		cfg, err := config.Load(s.config(who))
		if err != nil {
			t.Fatal(err)
		}
		conn, err := bus.Connect(t.Context(), cfg.NATS, bus.Options{Name: name}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(conn.Close)
		return &budget.Ledger{Entry: conn.KVEntry(budget.Key), Keep: time.Minute, Now: time.Now}
	}
	operator := ledger("operator", "oom-tap")
	ctx, cancel := context.WithCancel(t.Context())
	var claiming sync.WaitGroup
	defer claiming.Wait()
	defer cancel()
	var granted atomic.Int32
	for replica := range 2 {
		l := ledger("annotator", "oom-annotator")
		claiming.Go(func() {
			for i := 0; ctx.Err() == nil; i++ {
				id := fmt.Sprintf("kill-%d-%d", replica, i)
				v, err := l.Claim(t.Context(), budget.Request{Kill: id, Node: id, Owner: id, Killed: time.Now(), Read: true})
				if err != nil {
					t.Error(err)
					return
				}
				if v.Granted() {
					granted.Add(1)
				}
			}
		})
	}
	for granted.Load() < 20 {
		time.Sleep(time.Millisecond)
	}
	begun := time.Now()
	if _, err := operator.SetPause(t.Context(), &budget.Pause{Reason: "test", By: "me", Since: begun}); err != nil {
		t.Fatal(err)
	}
	took := time.Since(begun)
	time.Sleep(300 * time.Millisecond) // for claims that come late
	count := granted.Load()
	time.Sleep(300 * time.Millisecond)
	cancel()
	claiming.Wait()
	state, err := operator.State(t.Context())
	if err != nil || state.Pause == nil || len(state.Marks) != int(count) || granted.Load() != count {
		t.Errorf("%d granted, %d after the pause; %d marks, pause %+v, %v", count, granted.Load()-count, len(state.Marks), state.Pause, err)
	}
	t.Logf("%d claims, paused in %s", count, took)
}
