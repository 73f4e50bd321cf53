// Package loader loads the kernel program, attaches it and hands its samples on. It is the only
// package with cgo.
//
// Rule of the package: nothing is dropped in silence. Every record has a seq and stands in the journal until
// it is settled. The perf buffer only brings it sooner; what it does not bring is read from the journal, and
// what that does not have any more is told as lost.
package loader

import (
	"context"
	_ "embed" // the object
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/aquasecurity/libbpfgo"
	"golang.org/x/sys/unix"
)

//go:embed oom.bpf.o
var object []byte

// The names of src/oom.bpf.c.
const (
	programName = "oom_mark_victim"
	eventsMap   = "oom_events"
	statsMap    = "oom_stats"
	stateMap    = "oom_state"
	journalMap  = "oom_journal"
)

// Tier is where an event's context comes from.
type Tier string

// The tiers. The values of the enumeration are the program's.
const (
	TierAuto   Tier = "auto"   // the best that the kernel offers
	TierFentry Tier = "fentry" // hooks on the OOM killer's functions, by trampoline
	TierKprobe Tier = "kprobe" // the same by breakpoint
	TierStack  Tier = "stack"
	TierNone   Tier = "none"
)

// Options say how to load.
type Options struct {
	// Tier is auto, or the one tier to use; one that the kernel does not offer is then an error.
	Tier Tier
	// PerfPages is the size of each CPU's perf buffer in pages, a power of two.
	PerfPages int
	// JournalSlots is how many records the journal holds, a power of two from 2 on; of MaxSize bytes each.
	JournalSlots int
	// PinDir is a directory in a bpffs in which everything is pinned, so that recording goes on when
	// this process has ended. It is made, its parent is not. Empty: nothing is pinned.
	PinDir string
	Log    *slog.Logger
}

// Stats are the kernel program's own counts since it was loaded, summed over the CPUs.
type Stats struct {
	Seen    uint64 `abi:"seen"`    // marks: sent and refused
	Sent    uint64 `abi:"sent"`    // taken by the perf buffer
	Refused uint64 `abi:"refused"` // not taken by it: full, or no reader on that CPU
}

// Handler takes over what Run reads, one call at a time and in the order of seq. It must not block. A
// function that returns false has not taken it, and is called with the same again a moment later.
type Handler struct {
	// Record gets a sample. It may keep it.
	Record func(seq uint64, sample []byte) bool
	// Lost is told of records that are in no buffer and not in the journal any more.
	Lost func(first, last uint64) bool
}

// Loader is a loaded and attached program.
type Loader struct {
	log       *slog.Logger
	tier      Tier
	prototype Prototype
	perf      *libbpfgo.PerfBuffer
	links     []link // the main program's is the last
	events    chan []byte
	lost      chan uint64

	pins       *pins // nil: nothing is pinned
	fresh      bool
	journal    *journal
	generation uint64

	running   atomic.Bool
	received  atomic.Uint64
	caughtUp  atomic.Uint64
	arrival   time.Time // of the last sample
	closeOnce sync.Once

	mu          sync.Mutex // guards what follows, and the memory against Close
	module      *libbpfgo.Module
	state       *state // nil after Close
	stateMemory []byte
	older       []*journal // of earlier generations, as long as they have what is not settled
	acks        acks
	final       Stats  // after Close
	finalCounts Counts // after Close
}

type link struct {
	*libbpfgo.BPFLink
	kept bool // its destruction would end what is pinned
}

// Tier is the tier in use.
func (l *Loader) Tier() Tier { return l.tier }

// Prototype is that of the running kernel's mark_victim.
func (l *Loader) Prototype() Prototype { return l.prototype }

// Pinned reports whether recording goes on when this process has ended.
func (l *Loader) Pinned() bool { return l.pins != nil }

// Fresh reports whether the epoch has no kernel base yet: it began with this Open, or with one whose process
// ended before it came to SetKernelBase.
func (l *Loader) Fresh() bool { return l.Counts().KernelBase == noBase }

// EpochNS is CLOCK_BOOTTIME in nanoseconds when the epoch began, in which seq counts.
func (l *Loader) EpochNS() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state == nil {
		return 0
	}
	return atomic.LoadUint64(&l.state.EpochBoottimeNS)
}

// Counts reads what was counted in this epoch; after Close, the last that was read.
func (l *Loader) Counts() Counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state == nil {
		return l.finalCounts
	}
	return l.state.counts()
}

// SetKernelBase says what the kernel had counted when the epoch began, which is what Counts is held
// against.
func (l *Loader) SetKernelBase(n uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state != nil {
		atomic.StoreUint64(&l.state.KernelBase, n)
	}
}

// Settle says that the records from first to last need not be kept any longer: each of them, or the gap
// in its place, is where it was to go. Their slots of the journal are free once all before them are
// settled too. It may be called in any order.
func (l *Loader) Settle(first, last uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.state == nil {
		return
	}
	acked := l.acks.settle(atomic.LoadUint64(&l.state.Acked), first, last)
	atomic.StoreUint64(&l.state.Acked, acked)
	l.older = slices.DeleteFunc(l.older, func(j *journal) bool {
		if j.end > acked {
			return false
		}
		j.close()
		if err := remove(j.dir); err != nil {
			l.log.Error("an earlier journal stays pinned", "error", err)
		}
		return true
	})
}

// stored reads a record from the journals.
func (l *Loader) stored(seq uint64) []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	head := func() uint64 { return atomic.LoadUint64(&l.state.Head) }
	if record := l.journal.read(seq, head); record != nil {
		return record
	}
	for _, j := range l.older {
		// Nobody writes to these.
		if record := j.read(seq, func() uint64 { return seq }); record != nil && seq <= j.end {
			return record
		}
	}
	return nil
}

const (
	// lookTime is how often the journal is looked at: a word of memory, without a system call.
	lookTime = 200 * time.Millisecond
	// drainTime bounds how long Run waits, when it is told to end, for what is still to be read.
	drainTime = 2 * time.Second
	// silenceTime is how long a sample may take that the perf buffer has accepted.
	silenceTime = 2 * time.Second
)

// Run hands everything to h that was not settled before, in the order of seq, until ctx ends; then it
// detaches the program, unless it is pinned, reads what is left and returns.
func (l *Loader) Run(ctx context.Context, h Handler) error {
	l.perf.Poll(int(300 * time.Millisecond / time.Millisecond))
	l.running.Store(true)
	defer l.running.Store(false)

	counts := l.Counts()
	s := sequencer{
		next: counts.Acked + 1, seen: counts.Head, early: map[uint64][]byte{}, bound: int(l.journal.slots),
		stored: l.stored,
		record: func(seq uint64, sample []byte, caughtUp bool) bool {
			if !h.Record(seq, sample) {
				return false
			}
			if caughtUp {
				l.caughtUp.Add(1)
			}
			return true
		},
		lost: func(first, last uint64) bool {
			if !h.Lost(first, last) {
				return false
			}
			l.mu.Lock()
			defer l.mu.Unlock()
			atomic.AddUint64(&l.state.Lost, last-first+1)
			return true
		},
	}
	take := func(sample []byte) {
		l.received.Add(1)
		l.arrival = time.Now()
		s.arrive(sample)
	}
	look := func() {
		before := l.caughtUp.Load()
		s.look(l.Counts().Head, l.allArrived)
		if n := l.caughtUp.Load() - before; n > 0 {
			l.log.Info("read from the journal what came by no other way", "records", n, "seq", s.next-1)
		}
	}
	l.arrival = time.Now()
	tick := time.NewTicker(lookTime)
	defer tick.Stop()
	for ctx.Err() == nil {
		select {
		case sample := <-l.events:
			take(sample)
		case <-l.lost: // counted by the program, as refused; and it stands in the journal
		case <-tick.C:
			look()
		case <-ctx.Done():
		}
	}

	if l.pins == nil {
		// The main one first: what it still records has its context.
		for _, link := range slices.Backward(l.links) {
			if err := link.Destroy(); err != nil {
				return fmt.Errorf("detach: %w", err)
			}
		}
		l.links = nil
	}
	end := l.Counts().Head
	tick.Reset(20 * time.Millisecond)
	deadline := time.NewTimer(drainTime)
	defer deadline.Stop()
	for s.next <= end {
		select {
		case sample := <-l.events:
			take(sample)
		case <-l.lost:
		case <-tick.C:
			look()
		case <-deadline.C:
			if l.pins != nil { // the next one reads them
				l.perf.Stop()
				return nil
			}
			return fmt.Errorf("drain the journal: %d records were not taken over within %s", end+1-s.next, drainTime)
		}
	}
	l.perf.Stop()
	return nil
}

// allArrived reports whether everything has arrived that the perf buffers have taken.
func (l *Loader) allArrived() bool {
	if behind, err := l.behind(); err == nil && behind == 0 {
		return true
	}
	// libbpfgo's poller may have died; Alive says so.
	return time.Since(l.arrival) > silenceTime
}

// Stats reads the program's counts. After Close it returns the last ones.
func (l *Loader) Stats() (Stats, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.module == nil {
		return l.final, nil
	}
	return l.stats()
}

func (l *Loader) stats() (Stats, error) {
	m, err := l.module.GetMap(statsMap)
	if err != nil {
		return Stats{}, fmt.Errorf("find map %s: %w", statsMap, err)
	}
	var key uint32
	values, err := m.GetValue(unsafe.Pointer(&key))
	if err != nil {
		return Stats{}, fmt.Errorf("read map %s: %w", statsMap, err)
	}
	var sum Stats
	size := binary.Size(sum)
	for len(values) >= size {
		var cpu Stats
		if _, err := binary.Decode(values, binary.NativeEndian, &cpu); err != nil {
			return Stats{}, fmt.Errorf("read map %s: %w", statsMap, err)
		}
		sum.Seen += cpu.Seen
		sum.Sent += cpu.Sent
		sum.Refused += cpu.Refused
		values = values[size:]
	}
	return sum, nil
}

// Received is how many samples arrived by the perf buffer.
func (l *Loader) Received() uint64 { return l.received.Load() }

// CaughtUp is how many records were read from the journal, because they did not arrive.
func (l *Loader) CaughtUp() uint64 { return l.caughtUp.Load() }

// behind is how many samples the kernel sent that have not arrived.
func (l *Loader) behind() (uint64, error) {
	stats, err := l.Stats()
	if err != nil {
		return 0, err
	}
	if received := l.received.Load(); received < stats.Sent {
		return stats.Sent - received, nil
	}
	return 0, nil
}

// Alive reports whether samples are being read: nil, or what is wrong. libbpfgo's polling goroutine
// ends silently on an error, so that it runs is no proof; that what was sent arrives is. It takes up
// to a second when something was sent a moment ago.
func (l *Loader) Alive(ctx context.Context) error {
	if !l.running.Load() {
		return errors.New("the perf buffer is not being read")
	}
	stats, err := l.Stats()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	for l.received.Load() < stats.Sent {
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("the kernel sent %d samples and %d arrived", stats.Sent, l.received.Load())
		}
	}
	return nil
}

// Close detaches and unloads the program, unless it is pinned. Run must have returned.
func (l *Loader) Close() {
	l.closeOnce.Do(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if final, err := l.stats(); err == nil {
			l.final = final
		}
		l.finalCounts = l.state.counts()
		for _, link := range slices.Backward(l.links) {
			// What is kept goes with the process. Of the others this closes the descriptor: the
			// pins hold them, where there are any.
			if !link.kept {
				_ = link.Destroy()
			}
		}
		l.unmap()
		l.module.Close()
		l.module = nil
		if l.pins != nil {
			l.pins.close()
		}
	})
}

func (l *Loader) unmap() {
	for _, j := range append(l.older, l.journal) {
		if j != nil {
			j.close()
		}
	}
	if l.state != nil {
		_ = unix.Munmap(l.stateMemory)
		l.state = nil
	}
}
