package loader

import (
	"encoding/binary"
	"fmt"
	"math"
	"runtime"
	"sync/atomic"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// state mirrors struct oom_state, in memory that the kernel program writes: every access to it is atomic.
type state struct {
	Magic      uint32 `abi:"magic"`
	Version    uint32 `abi:"version"`
	Generation uint64 `abi:"generation"`
	Head       uint64 `abi:"head"`
	Acked      uint64 `abi:"acked"`

	Killed      uint64 `abi:"killed"`
	Exiting     uint64 `abi:"exiting"`
	Unknown     uint64 `abi:"unknown"`
	Groups      uint64 `abi:"groups"`
	KilledAgain uint64 `abi:"killed_again"`
	Unhooked    uint64 `abi:"unhooked"`

	KernelBase      uint64 `abi:"kernel_base"`
	EpochBoottimeNS uint64 `abi:"epoch_boottime_ns"`
	Lost            uint64 `abi:"lost"`

	LastKillBoottimeNS uint64 `abi:"last_kill_boottime_ns"`

	IncidentBoottimeNS uint64   `abi:"incident_boottime_ns"`
	IncidentThread     uint64   `abi:"incident_thread"`
	IncidentIndex      uint32   `abi:"incident_index"`
	Handed             uint32   `abi:"handed"`
	LastMark           lastMark `abi:"last_mark"`
}

// handedOver is the seq up to which earlier readers had records handed over: they may have published what is above Acked.
func (s *state) handedOver() uint64 {
	head, acked := atomic.LoadUint64(&s.Head), atomic.LoadUint64(&s.Acked)
	if ahead := uint64(atomic.LoadUint32(&s.Handed) - uint32(acked)); ahead <= head-min(head, acked) {
		return acked + ahead
	}
	return head // the last reader was of a version that does not say
}

// lastMark mirrors struct oom_last_mark.
type lastMark struct {
	Generation      uint64 `abi:"generation"`
	Thread          uint64 `abi:"thread"`
	StartBoottimeNS uint64 `abi:"start_boottime_ns"`
	TID             uint32 `abi:"tid"`
	Pad             uint32 `abi:"pad"`
}

// OOM_STATE_MAGIC and OOM_STATE_VERSION.
const (
	stateMagic   = 0x4f4f4d54
	stateVersion = 1
)

// statePrefix is how many bytes at the beginning of struct oom_state no version changes, up to acked.
const statePrefix = 32

// noBase stands in state.KernelBase until SetKernelBase.
const noBase = math.MaxUint64

func mapArray(fd int, bytes uint64) ([]byte, error) {
	page := uint64(unix.Getpagesize())
	memory, err := unix.Mmap(fd, 0, int((bytes+page-1)/page*page), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", bytes, err)
	}
	return memory, nil
}

// mapState maps a state. Of one of another version only the first statePrefix bytes may be used.
func mapState(fd int) ([]byte, *state, error) {
	memory, err := mapArray(fd, uint64(unsafe.Sizeof(state{})))
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", stateMap, err)
	}
	return memory, (*state)(unsafe.Pointer(&memory[0])), nil
}

// segment mirrors struct oom_segment up to its data.
type segment struct {
	Number   uint64 `abi:"number"`
	FirstSeq uint64 `abi:"first_seq"`
	Current  uint64 `abi:"current"`
	Used     uint64 `abi:"used"`
}

const (
	segmentHeader = uint64(unsafe.Sizeof(segment{}))
	SegmentSize   = 32 << 10 // sizeof(struct oom_segment) in bytes
)

type journal struct {
	memory []byte
	slots  uint64 // segments; records in one of journal-v1
	stride uint64 // bytes from slot to slot: the map's value size, rounded up to 8
	dir    string // the pin directory of an earlier generation; empty for the one in use
	end    uint64 // of an earlier generation: its last seq
}

func mapJournal(fd int, slots, valueSize uint32) (*journal, error) {
	j := &journal{slots: uint64(slots), stride: (uint64(valueSize) + 7) / 8 * 8}
	var err error
	if j.memory, err = mapArray(fd, j.slots*j.stride); err != nil {
		return nil, fmt.Errorf("%s: %w", journalMap, err)
	}
	return j, nil
}

// What no version of a record changes (src/oom_event.h): where its size and its seq stand.
const (
	sizeOffset   = 4
	seqOffset    = 8
	recordPrefix = 16
)

func (j *journal) slot(n uint64) []byte { return j.memory[n&(j.slots-1)*j.stride:][:j.stride] }

func (j *journal) segment(n uint64) *segment { return (*segment)(unsafe.Pointer(&j.slot(n)[0])) }

// overwritten reports whether the segment with a number is, or may be under way to be, written over.
func (j *journal) overwritten(number uint64) bool {
	return number+j.slots-1 <= atomic.LoadUint64(&j.segment(0).Current)
}

// read copies the record of seq, which must be visible (see visible); nil when it does not stand there any more.
//
// The program may write meanwhile: the next records, or the next segment over the oldest one. Its stores may become
// visible in any order, but those of one kill before those of the next: oom_lock was released and taken in between. So:
//
//   - current names a segment long before a record in the next one is written, many kills later. Every load here is an
//     acquire: those of the record come before the second one of current. If that does not find the segment in
//     danger, nothing of the copy is of a later record.
//   - number may be visible before first_seq, which is then the old one. The record is not there then, and the search
//     continues in the segment before.
func (j *journal) read(seq uint64) []byte {
	if j.stride != SegmentSize { // journal-v1: the slot of a record is its seq's. Nobody writes to it any more.
		return copyRecord(j.slot(seq), seq, seq)
	}
	for number := atomic.LoadUint64(&j.segment(0).Current); ; number-- {
		s := j.segment(number)
		// The program names the next segment before it begins it.
		if first := atomic.LoadUint64(&s.FirstSeq); atomic.LoadUint64(&s.Number) == number && first > 0 && first <= seq {
			if record := copyRecord(j.slot(number)[segmentHeader:], first, seq); record != nil {
				if j.overwritten(number) {
					return nil
				}
				return record
			}
		}
		if number == 0 || j.overwritten(number-1) {
			return nil
		}
	}
}

// copyRecord copies the record of seq out of data, which begins with that of first; nil: not there. Every load is an acquire.
func copyRecord(data []byte, first, seq uint64) []byte {
	load := func(at uint64) uint64 { return atomic.LoadUint64((*uint64)(unsafe.Pointer(&data[at]))) }
	for ; len(data) >= recordPrefix && load(seqOffset) == first; first++ {
		size := uint64(atomic.LoadUint32((*uint32)(unsafe.Pointer(&data[sizeOffset]))))
		size = min(max(size, recordPrefix), uint64(len(data)))
		whole := min((size+7)/8*8, uint64(len(data)))
		if first == seq {
			record := make([]byte, whole)
			for at := uint64(0); at < whole; at += 8 {
				binary.NativeEndian.PutUint64(record[at:], load(at))
			}
			if binary.NativeEndian.Uint64(record[seqOffset:]) != seq {
				return nil
			}
			return record[:size]
		}
		data = data[whole:]
	}
	return nil
}

func (j *journal) close() { _ = unix.Munmap(j.memory) }

// visibleTime is longer than a CPU takes to show what another one has written: then what head names is visible without proof.
const visibleTime = 10 * time.Millisecond

// strongOrder: the CPU shows what another one has written in the order in which it was written.
const strongOrder = runtime.GOARCH == "amd64"

// visible returns up to where records are visible for certain. head was just read. The program writes it last, without a
// barrier (put_journal() in src/journal.bpf.h): visible last on x86; elsewhere every CPU executes a barrier for the reader.
func visible(head uint64) uint64 {
	if strongOrder || barrier() == nil {
		return head
	}
	return 0
}

// barrier returns when every CPU has executed a full memory barrier since the call. It takes some ten milliseconds.
func barrier() error {
	// MEMBARRIER_CMD_GLOBAL is synchronize_rcu() (kernel/sched/membarrier.c). nohz_full and seccomp filters refuse it.
	const global = 1
	if _, _, errno := unix.Syscall(unix.SYS_MEMBARRIER, global, 0, 0); errno != 0 {
		return fmt.Errorf("membarrier: %w", errno)
	}
	return nil
}

type reader struct {
	Handler
	next uint64        // what is to be handed over next
	old  uint64        // up to it earlier readers had records handed over
	seen uint64        // head at the last look; what it names is visible at the next one
	due  time.Time     // of the next look
	idle time.Duration // between looks while nothing waits
	wait bool          // something was refused: nothing is handed over before the next look

	stored  func(seq uint64) []byte // reads the journal, nil when the record is gone
	refused *atomic.Bool            // by the handler; Resume resets it
}

// notified reads up to the record that a notification names, with which the kernel has made all before it visible.
// What is lost waits for a look, which knows all of it: it is reported in one piece.
func (r *reader) notified(seq, head uint64, now time.Time) {
	if r.wait {
		return
	}
	r.advance(seq, false, now)
	// Something is lost, or the notification of a later one was refused.
	if soon := now.Add(visibleTime); r.next <= head && !r.wait && soon.Before(r.due) {
		r.due = soon
	}
}

// look reads up to the head of the last look, and returns how many records no notification named (0 after a refusal).
func (r *reader) look(head uint64, now time.Time) (unnotified int) {
	refused := r.wait
	r.wait = false
	r.due = now.Add(r.idle)
	n := r.advance(r.seen, true, now)
	if r.seen = head; r.next <= head && !r.wait {
		r.due = now.Add(visibleTime)
	}
	if refused {
		return 0
	}
	return n
}

// advance hands over what stands up to a seq, or up to the first one that is lost, and returns how many records that were.
func (r *reader) advance(until uint64, lost bool, now time.Time) (records int) {
	for r.next <= until {
		record, last := r.stored(r.next), r.next
		if record == nil && !lost {
			return records
		}
		waitForVictim(record)
		r.refused.Store(true) // before: Resume may be called while the handler refuses
		taken := false
		if record != nil {
			taken = r.Record(r.next, record)
		} else {
			for last < until && last != r.old && r.stored(last+1) == nil {
				last++
			}
			taken = r.Lost(r.next, last, last <= r.old)
		}
		if !taken {
			r.wait, r.due = true, now.Add(retryTime)
			return records
		}
		r.refused.Store(false)
		if r.next = last + 1; record != nil {
			records++
		}
	}
	return records
}

// acks finds up to where everything is settled.
type acks struct {
	ranges map[uint64]uint64 // first to last of what is settled above acked
}

// settle adds a range, and returns the new end of what is settled without a hole, given the old one.
func (a *acks) settle(acked, first, last uint64) uint64 {
	if first <= acked {
		return acked
	}
	if a.ranges == nil {
		a.ranges = map[uint64]uint64{}
	}
	a.ranges[first] = last
	for {
		last, ok := a.ranges[acked+1]
		if !ok {
			return acked
		}
		delete(a.ranges, acked+1)
		acked = last
	}
}

// Counts are what the kernel program and its readers have counted since the epoch began, over all tracers since.
type Counts struct {
	Head  uint64 // the last record's seq: how many there were
	Acked uint64 // up to it all are settled
	Lost  uint64 // records that were reported as lost

	Killed      uint64 // marks that were proved to be kills
	Exiting     uint64 // marks that were proved to be none
	Unknown     uint64 // the others
	Groups      uint64 // incidents of memory.oom.group
	KilledAgain uint64 // kills of processes that were marked before, and so had no mark; where the tier has hooks
	Unhooked    uint64 // of Killed, those that the hook of __oom_kill_process did not see

	KernelBase uint64 // what the kernel had counted when the epoch began; all ones until SetKernelBase
	LastKillNS uint64 // CLOCK_BOOTTIME of the last kill, 0 if there was none
}

// Since is what was counted since an earlier reading.
func (c Counts) Since(before Counts) Counts {
	c.Killed -= before.Killed
	c.Exiting -= before.Exiting
	c.Unknown -= before.Unknown
	c.Groups -= before.Groups
	c.KilledAgain -= min(c.KilledAgain, before.KilledAgain) // one that is under way may be taken back
	c.Unhooked -= before.Unhooked
	return c
}

// Unseen is how many kills the kernel has counted (oom_kill in /proc/vmstat) that the program saw no mark of. With hooks the
// two figures are one; else they bound what may be. A count is read between two equal ones of the program's, because the
// kernel counts before it marks. Doubles are taken off: it counts again what it kills as a member of a group or while it exits.
func (c Counts) Unseen(kernel uint64) (atLeast, atMost uint64) {
	less := func(a, b uint64) uint64 { return a - min(a, b) }
	since := less(kernel, c.KernelBase)
	atMost = less(since, c.Killed+c.KilledAgain)
	if c.Unhooked == 0 && c.Unknown == 0 {
		return atMost, atMost
	}
	return less(atMost, c.Unknown+c.Groups+c.Exiting), atMost
}

func (s *state) counts() Counts {
	return Counts{
		Head: atomic.LoadUint64(&s.Head), Acked: atomic.LoadUint64(&s.Acked), Lost: atomic.LoadUint64(&s.Lost),
		Killed: atomic.LoadUint64(&s.Killed), Exiting: atomic.LoadUint64(&s.Exiting), Unknown: atomic.LoadUint64(&s.Unknown),
		Groups: atomic.LoadUint64(&s.Groups), KilledAgain: atomic.LoadUint64(&s.KilledAgain), Unhooked: atomic.LoadUint64(&s.Unhooked),
		KernelBase: atomic.LoadUint64(&s.KernelBase), LastKillNS: atomic.LoadUint64(&s.LastKillBoottimeNS),
	}
}
