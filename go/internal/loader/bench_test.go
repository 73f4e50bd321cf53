//go:build bench

package loader

import (
	"context"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// TestBenchProgram prints how long the main program runs for a kill, by each way to notify: in a storm, and for kills
// that find the reader asleep. It fails only when it could not measure.
func TestBenchProgram(t *testing.T) {
	// The kernel stops counting when the descriptor is closed, however this process ends.
	counting, err := ebpf.EnableStats(uint32(unix.BPF_STATS_RUN_TIME))
	if err != nil {
		t.Fatal(err)
	}
	defer counting.Close()
	for _, tier := range []Tier{TierAuto, TierNone} {
		for _, notify := range []Notify{NotifyPerf, NotifyRingbuf, NotifyPoll} {
			t.Run(fmt.Sprint(tier, notify), func(t *testing.T) { benchProgram(t, tier, notify) })
		}
	}
}

func benchProgram(t *testing.T, tier Tier, notify Notify) {
	l := openNotified(t, tier, notify)
	main, err := l.module.GetProgram(programName)
	if err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Dup(main.FileDescriptor())
	if err != nil {
		t.Fatal(err)
	}
	program, err := ebpf.NewProgramFromFD(fd)
	if err != nil {
		t.Fatal(err)
	}
	defer program.Close()
	stats := func() (runs uint64, took time.Duration) {
		s, err := program.Stats()
		if err != nil {
			t.Error(err)
			return 0, 0
		}
		return s.RunCount, s.Runtime
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	var read atomic.Uint64
	go func() {
		done <- l.Run(ctx, Handler{
			Record: func(seq uint64, record []byte) bool { read.Add(1); return true },
			Lost:   func(first, last uint64, _ bool) bool { t.Errorf("%d to %d are lost", first, last); return true },
		})
	}()
	group := oomtest.New(t, 8*mib)
	oomtest.Storm(t, group, 5, 16, "plain")

	var single []time.Duration
	for range 50 {
		time.Sleep(20 * time.Millisecond)
		runs, took := stats()
		oomtest.Storm(t, group, 1, 16, "plain")
		if again, later := stats(); again == runs+1 {
			single = append(single, later-took)
		}
	}
	// Looked at every millisecond, which is more often than there is a kill.
	var storm []time.Duration
	runs, took := stats()
	begun, beganRuns, beganTook := time.Now(), runs, took
	stormed := make(chan struct{})
	go func() {
		defer close(stormed)
		oomtest.Storm(t, group, 200, 16, "plain")
	}()
	for running := true; running; {
		select {
		case <-stormed:
			running = false
		case <-time.After(time.Millisecond):
		}
		again, later := stats()
		if again == runs+1 {
			storm = append(storm, later-took)
		}
		runs, took = again, later
	}
	lasted := time.Since(begun)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	if len(single) < 20 || len(storm) < 100 {
		t.Fatalf("%d and %d runs were seen one by one", len(single), len(storm))
	}
	counts, err := l.Stats()
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(single)
	slices.Sort(storm)
	fmt.Fprintf(os.Stdout, "BENCH tier %s notify %s: single p50 %s p90 %s; storm p50 %s p90 %s mean %s (%d of %d apart, %.0f/s); sent %d of %d\n",
		l.Tier(), notify, single[len(single)/2], single[len(single)*9/10], storm[len(storm)/2], storm[len(storm)*9/10],
		(took-beganTook)/time.Duration(runs-beganRuns), len(storm), runs-beganRuns, float64(runs-beganRuns)/lasted.Seconds(), counts.Sent, counts.Seen)
}
