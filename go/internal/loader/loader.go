// Package loader loads the kernel program, attaches it and hands its records on. It is the only
// package with cgo.
//
// Rule of the package: nothing is dropped in silence. Every record has a seq and stands in the journal until
// it is settled. It is read from there and from nowhere else, in the order of seq; what was overwritten before
// it was read is reported as lost. A notification only says that there is something to read.
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

	"github.com/oom-tracer/oom-tracer/go/internal/wire"
)

//go:embed oom.bpf.o
var object []byte

// The names of src/oom.bpf.c.
const (
	programName = "oom_mark_victim"
	statsMap    = "oom_stats"
	stateMap    = "oom_state"
	waitingMap  = "oom_waiting"
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
	Tier        Tier   // auto, or the one tier to use; one that the kernel does not offer is then an error
	Notify      Notify // auto (the same as none), or the one way to notify; one that this process may not use is an error
	JournalSize uint64 // how many bytes the journal takes, a power of two from 2*SegmentSize on
	// PinDir is a directory in a bpffs in which everything is pinned, so that recording goes on when
	// this process has ended. It is made, its parent is not. Empty: nothing is pinned.
	PinDir string
	Log    *slog.Logger
}

// Stats are the kernel program's own counts since it was loaded, summed over the CPUs.
type Stats struct {
	Seen    uint64 `abi:"seen"`    // marks
	Sent    uint64 `abi:"sent"`    // notifications: only a reader that waits gets one
	Refused uint64 `abi:"refused"` // notifications: the buffer was full, or had no reader on that CPU
	Unwound uint64 `abi:"unwound"` // marks that were explained with the help of the kernel stack
}

// Handler takes over what Run reads, one call at a time and in the order of seq. It must not block. A
// function that returns false has not taken it, and is called with the same again after Resume.
type Handler struct {
	Record func(seq uint64, record []byte) bool // gets a record. It may keep it
	// Lost gets the records that are not in the journal any more. handed: an earlier reader got them, and may have published them.
	Lost func(first, last uint64, handed bool) bool
}

// Loader is a loaded and attached program.
type Loader struct {
	log       *slog.Logger
	tier      Tier
	prototype Prototype
	notifier  *notifier
	links     []link // the main program's is the last

	pins       *pins // nil: nothing is pinned
	fresh      bool
	left       *Left // of a state of another version
	journal    *journal
	generation uint64

	refused   atomic.Bool // the handler has refused a record
	running   atomic.Bool
	received  atomic.Uint64
	caughtUp  atomic.Uint64
	next      atomic.Uint64 // the seq that Run hands over next
	turn      atomic.Int64  // when Run last came around, since opened
	opened    time.Time
	idleTime  time.Duration
	stuckTime time.Duration

	mu          sync.Mutex // guards what follows, and the memory against Close
	module      *libbpfgo.Module
	maps        map[string]*libbpfgo.BPFMap
	state       *state // a copy after Close
	stateMemory []byte
	waiting     []byte     // oom_waiting
	older       []*journal // of earlier generations, as long as they have what is not settled
	acks        acks
	final       Stats // after Close
}

type link struct {
	bpfLink
	kept bool // its destruction would end what is pinned
}

type bpfLink interface {
	Pin(path string) error
	Destroy() error
}

// Tier is the tier in use.
func (l *Loader) Tier() Tier { return l.tier }

// Notify is the way in which records are notified now.
func (l *Loader) Notify() Notify {
	if l.notifier.polls() {
		return NotifyPoll
	}
	return l.notifier.way
}

// Prototype is that of the running kernel's mark_victim.
func (l *Loader) Prototype() Prototype { return l.prototype }

// Pinned reports whether recording goes on when this process has ended.
func (l *Loader) Pinned() bool { return l.pins != nil }

// Fresh reports whether the epoch has no kernel base yet: no tracer has come to SetKernelBase in it.
func (l *Loader) Fresh() bool { return l.Counts().KernelBase == noBase }

// EpochNS is CLOCK_BOOTTIME in nanoseconds when the epoch began, in which seq counts.
func (l *Loader) EpochNS() uint64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return atomic.LoadUint64(&l.state.EpochBoottimeNS)
}

// Counts reads what was counted in this epoch; after Close, the last that was read.
func (l *Loader) Counts() Counts {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.state.counts()
}

// SetKernelBase says what the kernel had counted when the epoch began. Counts is compared with it.
func (l *Loader) SetKernelBase(n uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	atomic.StoreUint64(&l.state.KernelBase, n)
}

// Ack settles the records from first to last, in any order: each, or the gap in its place, is where it was to go. Their slots
// of the journal are free once all before them are settled too.
func (l *Loader) Ack(first, last uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	acked := l.acks.settle(atomic.LoadUint64(&l.state.Acked), first, last)
	atomic.StoreUint64(&l.state.Acked, acked)
	l.older = slices.DeleteFunc(l.older, func(j *journal) bool {
		if j.end > acked {
			return false
		}
		j.close()
		if err := remove(j.dir); err != nil {
			l.log.Error("cannot unpin an earlier journal", "error", err)
		}
		return true
	})
}

// Left is what a program with a state of another version has recorded, and how much of that was published.
type Left struct{ Acked, Head uint64 }

// Left is nil unless Open found a state of another version.
func (l *Loader) Left() *Left { return l.left }

// Resume has Run hand over anew what the handler has refused.
func (l *Loader) Resume() {
	if l.refused.Swap(false) {
		l.notifier.interrupt()
	}
}

func (l *Loader) stored(seq uint64) []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	record := l.journal.read(seq)
	for _, j := range l.older {
		if record == nil && seq <= j.end {
			record = j.read(seq)
		}
	}
	return record
}

const (
	pollTime  = 200 * time.Millisecond // how often the journal is read where nothing notifies: one word of memory, without a system call
	idleTime  = 10 * time.Second       // the same with notifications, which CPUs that came online later cannot send
	retryTime = time.Second            // how long Run waits for Resume after the handler has refused a record
	drainTime = 2 * time.Second        // bounds how long Run reads what is left after ctx has ended
	stuckTime = 30 * time.Second       // how long Run may hang while records wait
)

// Run hands everything to h that was not settled before, in the order of seq, until ctx ends; then it
// detaches the program, unless it is pinned, reads what is left and returns.
func (l *Loader) Run(ctx context.Context, h Handler) error {
	r := reader{
		next: l.Counts().Acked + 1, old: l.state.handedOver(), due: time.Now(), idle: l.idleTime,
		stored: l.stored, refused: &l.refused,
	}
	// Before the handler gets it, for it may be published at once. What earlier readers had stays so while it is read again.
	handed := func(seq uint64) { atomic.StoreUint32(&l.state.Handed, uint32(max(seq, r.old))) }
	r.Record = func(seq uint64, record []byte) bool {
		handed(seq)
		return h.Record(seq, record)
	}
	r.Lost = func(first, last uint64, old bool) bool {
		handed(last)
		taken := h.Lost(first, last, old)
		if taken {
			l.mu.Lock()
			defer l.mu.Unlock()
			atomic.AddUint64(&l.state.Lost, last-first+1)
		}
		return taken
	}
	if l.notifier.polls() {
		r.idle = pollTime
	}
	around := func() {
		l.next.Store(r.next)
		l.turn.Store(int64(time.Since(l.opened)))
	}
	known := l.Counts().Head // when it was last looked at; what is there now is looked for
	unread := func() bool { return l.Counts().Head > known }
	look := func() {
		known = l.Counts().Head
		if !strongOrder && r.next <= r.seen {
			_ = barrier() // or visibleTime has passed since seen was read
		}
		if n := r.look(known, time.Now()); n > 0 {
			l.caughtUp.Add(uint64(n))
			if !l.notifier.polls() {
				l.log.Info("read records without a notification", "records", n, "seq", r.next-1)
			}
		}
		around()
	}
	go giveBack()
	l.running.Store(true)
	defer l.running.Store(false)
	r.seen = visible(l.Counts().Head) // what an earlier reader has left
	look()
	defer context.AfterFunc(ctx, l.notifier.interrupt)()
	for ctx.Err() == nil {
		seq, err := l.notifier.wait(ctx, r.due, unread)
		switch {
		case err != nil:
			l.log.Error("notifications stopped, polling the journal", "error", err)
			r.idle = pollTime
		case seq > 0:
			l.received.Add(1)
			fallthrough
		case unread():
			known = l.Counts().Head
			// Its notification makes a record visible, and all before it.
			if seq == 0 || strongOrder {
				seq = max(seq, visible(known))
			}
			r.notified(seq, known, time.Now())
			around()
		}
		resumed := r.wait && !l.refused.Load()
		if resumed || !time.Now().Before(r.due) {
			look()
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
	for deadline := time.Now().Add(drainTime); r.next <= end; time.Sleep(visibleTime) {
		if time.Now().After(deadline) {
			if l.pins != nil { // the next one reads them
				return nil
			}
			return fmt.Errorf("drain the journal: %d records were not read within %s", end+1-r.next, drainTime)
		}
		look()
	}
	return nil
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
	var key uint32
	values, err := l.maps[statsMap].GetValue(unsafe.Pointer(&key))
	if err != nil {
		return Stats{}, fmt.Errorf("read map %s: %w", statsMap, err)
	}
	var sum Stats
	for _, cpu := range unsafe.Slice((*Stats)(unsafe.Pointer(&values[0])), len(values)/binary.Size(sum)) {
		sum.Seen += cpu.Seen
		sum.Sent += cpu.Sent
		sum.Refused += cpu.Refused
		sum.Unwound += cpu.Unwound
	}
	return sum, nil
}

// Received is how many notifications were read.
func (l *Loader) Received() uint64 { return l.received.Load() }

// CaughtUp is how many records were read without a notification.
func (l *Loader) CaughtUp() uint64 { return l.caughtUp.Load() }

// Alive reports whether the journal is being read: nil, or what is wrong. What the handler refuses is read.
func (l *Loader) Alive(context.Context) error {
	if !l.running.Load() {
		return errors.New("the journal is not being read")
	}
	idle := time.Since(l.opened) - time.Duration(l.turn.Load())
	head, next := l.Counts().Head, l.next.Load()
	if head >= next && idle > l.stuckTime {
		return fmt.Errorf("the journal was last read %s ago, and %d records wait", idle.Round(time.Millisecond), head+1-next)
	}
	return nil
}

// Close detaches and unloads the program, unless it is pinned. Run must have returned. It may be called more than once.
func (l *Loader) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.module == nil {
		return
	}
	if final, err := l.stats(); err == nil {
		l.final = final
	}
	for _, link := range slices.Backward(l.links) {
		// Destroy only closes the descriptor where a pin holds the link. A kept link goes with the process.
		if !link.kept {
			_ = link.Destroy()
		}
	}
	l.unmap()
	l.notifier.close()
	l.module.Close()
	l.module = nil
	if l.pins != nil {
		l.pins.close()
	}
}

// unmap gives the memory up. What the state says then is the last of it.
func (l *Loader) unmap() {
	if l.state != nil {
		l.state = new(*l.state)
	}
	for _, j := range append(l.older, l.journal) {
		if j != nil {
			j.close()
		}
	}
	for _, memory := range [][]byte{l.stateMemory, l.waiting} {
		_ = unix.Munmap(memory) // EINVAL if nothing is mapped
	}
	l.older, l.stateMemory, l.waiting = nil, nil, nil
}

// When the whole node is out of memory, whoever allocates before the victim's memory is free can cause the next kill.
// The kill wakes this process, so it waits before it converts and publishes. A kill of a cgroup leaves the node's memory
// alone, and ours is in another cgroup.

// giveWayTime is how long the victim of such a kill has to exit, or the OOM reaper to free its memory.
const giveWayTime = 100 * time.Millisecond

// scopeCgroup is OOM_SCOPE_CGROUP.
const scopeCgroup = 2

// giveWay returns how long to wait before a record is handed over, at a time of CLOCK_BOOTTIME.
func giveWay(record []byte, boottimeNS uint64) time.Duration {
	const scope, killed = unsafe.Offsetof(wire.Header{}.Scope), unsafe.Offsetof(wire.Header{}.BoottimeNS)
	if len(record) <= int(scope) || record[scope] == scopeCgroup {
		return 0
	}
	age := time.Duration(boottimeNS - binary.NativeEndian.Uint64(record[killed:]))
	if age < 0 || age > giveWayTime {
		return 0
	}
	return giveWayTime - age
}

func waitForVictim(record []byte) {
	var boot unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot) == nil {
		time.Sleep(giveWay(record, uint64(boot.Nano())))
	}
}
