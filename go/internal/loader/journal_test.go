package loader

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync/atomic"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/oom-tracer/oom-tracer/go/internal/wire"
)

// record is the unchanging part of one.
func record(seq uint64) []byte {
	r := make([]byte, 32)
	binary.NativeEndian.PutUint32(r[sizeOffset:], uint32(len(r)))
	binary.NativeEndian.PutUint64(r[seqOffset:], seq)
	return r
}

// put writes a record as put_journal() in src/journal.bpf.h does.
func (j *journal) put(seq uint64) {
	first := j.segment(0)
	s := j.segment(first.Current)
	if s.Used > SegmentSize-segmentHeader-wire.MaxSize {
		first.Current++
		s = j.segment(first.Current)
		s.FirstSeq, s.Number, s.Used = seq, first.Current, 0
	} else if s.Used == 0 {
		s.FirstSeq = seq
	}
	s.Used += uint64(copy(j.slot(first.Current)[segmentHeader+s.Used:], record(seq))) // a multiple of 8
}

// A segment that was written over, or may be under way to it, is not read.
func TestJournalRead(t *testing.T) {
	const slots = 4
	j := &journal{memory: make([]byte, slots*SegmentSize), slots: slots, stride: SegmentSize}
	if j.read(1) != nil {
		t.Error("an empty journal has a record")
	}
	var firsts []uint64 // seqs of the segments
	for seq := uint64(1); ; seq++ {
		j.put(seq)
		current := j.segment(0).Current
		if int(current) == len(firsts) {
			firsts = append(firsts, seq)
		}
		if current == 10 && seq == firsts[10]+5 {
			break
		}
	}
	last := firsts[10] + 5
	for seq := uint64(1); seq <= last+2; seq++ {
		// 7 stands in its element, but 11 may be half written there already.
		want := seq >= firsts[8] && seq <= last
		got := j.read(seq)
		if (got != nil) != want || got != nil && !slices.Equal(got, record(seq)) {
			t.Fatalf("seq %d, segments begin at %d: %x", seq, firsts, got)
		}
	}
	// The program has named the next segment, and not begun it.
	j.segment(0).Current++
	if j.read(firsts[8]) != nil || j.read(firsts[9]) == nil || j.read(last) == nil {
		t.Error("while a segment is begun, the oldest is read, or another is not")
	}
	// Its number is visible, and its first_seq not yet.
	next := j.segment(j.segment(0).Current)
	old := next.Number
	next.Number = j.segment(0).Current
	if got := j.read(last); !slices.Equal(got, record(last)) {
		t.Errorf("while the next segment is half visible, the last record is %x", got)
	}
	next.Number = old
	j.segment(0).Current--
	// A size that is none must not lead out of the segment.
	data := j.slot(9)[segmentHeader:]
	for _, size := range []uint32{0, 1, 7, SegmentSize, 1 << 31, 1<<32 - 1} {
		binary.NativeEndian.PutUint32(data[sizeOffset:], size)
		if got := j.read(firsts[9]); len(got) < recordPrefix || len(got) > len(data) {
			t.Errorf("size %d: %d bytes", size, len(got))
		}
		if got := j.read(firsts[9] + 1); got != nil {
			t.Errorf("size %d: read the next one: %x", size, got)
		}
	}
}

// A journal of version 1 has a slot for each record.
func TestJournalV1(t *testing.T) {
	j := &journal{memory: make([]byte, 8*wire.MaxSize), slots: 8, stride: wire.MaxSize}
	for seq := uint64(1); seq <= 11; seq++ {
		copy(j.slot(seq), record(seq))
	}
	for seq := uint64(1); seq <= 13; seq++ {
		if got := j.read(seq); (got != nil) != (seq >= 4 && seq <= 11) || got != nil && !slices.Equal(got, record(seq)) {
			t.Errorf("seq %d: %x", seq, got)
		}
	}
}

// follow collects what a reader hands over, as "1 2 lost 3-4 5".
type follow struct {
	reader
	journal map[uint64]bool
	said    []string
	refuse  bool
	now     time.Time
}

func newFollow(next uint64) *follow {
	f := &follow{journal: map[uint64]bool{}, now: time.Unix(0, 0)}
	f.reader = reader{
		next: next, idle: time.Second,
		stored: func(seq uint64) []byte {
			if f.journal[seq] {
				return record(seq)
			}
			return nil
		},
		refused: new(atomic.Bool),
	}
	f.Record = func(seq uint64, record []byte) bool {
		if f.refuse {
			return false
		}
		f.said = append(f.said, fmt.Sprint(binary.NativeEndian.Uint64(record[seqOffset:])))
		return true
	}
	f.Lost = func(first, last uint64, handed bool) bool {
		if f.refuse {
			return false
		}
		what := "lost"
		if handed {
			what = "handed"
		}
		f.said = append(f.said, fmt.Sprintf("%s %d-%d", what, first, last))
		return true
	}
	return f
}

// put writes records into the journal.
func (f *follow) put(first, last uint64) {
	for ; first <= last; first++ {
		f.journal[first] = true
	}
}

func (f *follow) expect(t *testing.T, due time.Duration, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, f.said); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	f.said = nil
	if got := f.due.Sub(f.now); got != due {
		t.Errorf("the next look is in %s, want %s", got, due)
	}
}

func TestReader(t *testing.T) {
	f := newFollow(1)
	f.look(0, f.now)
	f.expect(t, time.Second)
	// Two CPUs' notifications, and doubles: each names all before it.
	f.put(1, 4)
	for _, seq := range []uint64{1, 3, 2, 2, 1, 4} {
		f.notified(seq, 4, f.now)
	}
	f.expect(t, visibleTime, "1", "2", "3", "4")
	f.look(4, f.now)
	f.expect(t, time.Second)

	// 6 is not notified: it is looked for soon, and read when it is visible for certain.
	f.put(5, 6)
	f.notified(5, 6, f.now)
	f.expect(t, visibleTime, "5")
	if n := f.look(6, f.now); n != 0 {
		t.Errorf("read %d that may not be visible yet", n)
	}
	f.expect(t, visibleTime)
	if n := f.look(6, f.now); n != 1 {
		t.Errorf("read %d without a notification, want 1", n)
	}
	f.expect(t, time.Second, "6")

	// What is not in the journal any more is lost, in one piece, whatever the notifications name.
	f.put(7, 7)
	f.put(10, 10)
	f.notified(8, 10, f.now)
	f.notified(10, 10, f.now)
	f.expect(t, visibleTime, "7")
	f.look(10, f.now)
	f.look(10, f.now)
	f.expect(t, time.Second, "lost 8-9", "10")

	// What is refused is handed over again, at a look and not at every notification.
	f.refuse = true
	f.put(11, 11)
	f.put(15, 30)
	f.notified(11, 30, f.now)
	f.expect(t, retryTime)
	f.refuse = false
	f.notified(30, 30, f.now)
	f.expect(t, retryTime)
	f.look(30, f.now)
	f.expect(t, visibleTime)
	f.refuse = true
	f.look(30, f.now)
	f.expect(t, retryTime)
	f.refuse = false
	if n := f.look(30, f.now); n != 0 {
		t.Errorf("%d count as not notified, after a refusal", n)
	}
	f.expect(t, time.Second, "11", "lost 12-14", "15", "16", "17", "18", "19", "20", "21", "22", "23", "24", "25", "26", "27", "28", "29", "30")

	// After a restart: from what was settled on, of which the journal has a part.
	f = newFollow(5)
	f.put(8, 12)
	f.look(12, f.now)
	f.look(12, f.now)
	f.expect(t, time.Second, "lost 5-7", "8", "9", "10", "11", "12")

	// Of those that are lost, an earlier reader had some.
	f = newFollow(5)
	f.old = 6
	f.put(9, 9)
	f.look(9, f.now)
	f.look(9, f.now)
	f.expect(t, time.Second, "handed 5-6", "lost 7-8", "9")
}

func TestHandedOver(t *testing.T) {
	for _, test := range []struct {
		acked, head uint64
		handed      uint32
		want        uint64
	}{
		{0, 0, 0, 0},
		{0, 9, 0, 0},
		{5, 9, 5, 5},
		{5, 9, 7, 7},
		{5, 9, 9, 9},
		{5, 9, 0, 9}, // a reader of a version that writes none has settled some
		{5, 9, 4, 9},
		{5, 9, 12, 9},
		{1<<32 - 2, 1<<32 + 9, 3, 1<<32 + 3},
		{1<<32 + 2, 1<<32 + 9, 1<<32 - 1, 1<<32 + 9},
	} {
		if got := (&state{Acked: test.acked, Head: test.head, Handed: test.handed}).handedOver(); got != test.want {
			t.Errorf("%+v: %d", test, got)
		}
	}
}

// Whatever order notifications come in, and whichever do not: each seq is handed over once and in order, or
// reported as lost, and it is lost only if the journal does not have it.
func TestReaderAnyOrder(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		f := newFollow(1)
		var told []uint64
		lost := map[uint64]bool{}
		f.Record = func(seq uint64, _ []byte) bool {
			if r.IntN(10) == 0 {
				return false
			}
			told = append(told, seq)
			return true
		}
		f.Lost = func(first, last uint64, handed bool) bool {
			if r.IntN(10) == 0 {
				return false
			}
			for ; first <= last; first++ {
				lost[first] = true
				told = append(told, first)
			}
			return true
		}
		const n = 60
		var arriving []uint64
		for seq := uint64(1); seq <= n; seq++ {
			if r.IntN(3) > 0 {
				arriving = append(arriving, seq)
			}
			f.journal[seq] = r.IntN(4) > 0
		}
		// Two CPUs: their notifications shift against each other.
		for range 40 {
			i := r.IntN(len(arriving) - 1)
			arriving[i], arriving[i+1] = arriving[i+1], arriving[i]
		}
		head := uint64(0)
		for _, seq := range arriving {
			head = max(head, seq)
			f.notified(seq, head, f.now)
			if r.IntN(5) == 0 {
				f.look(head, f.now)
			}
		}
		for range 2 * n {
			f.look(n, f.now)
		}
		if len(told) != n || !slices.IsSorted(told) {
			t.Fatalf("seed %d: told %d", seed, told)
		}
		for seq := uint64(1); seq <= n; seq++ {
			if lost[seq] == f.journal[seq] {
				t.Fatalf("seed %d: %d is lost: %t; in the journal %t", seed, seq, lost[seq], f.journal[seq])
			}
		}
	}
}

func TestAcks(t *testing.T) {
	var a acks
	acked := uint64(0)
	for _, tt := range []struct{ first, last, want uint64 }{
		{2, 2, 0}, {4, 6, 0}, {1, 1, 2}, {1, 1, 2}, {3, 3, 6}, {8, 9, 6}, {2, 2, 6}, {7, 7, 9},
	} {
		if acked = a.settle(acked, tt.first, tt.last); acked != tt.want {
			t.Errorf("after %d-%d: %d, want %d", tt.first, tt.last, acked, tt.want)
		}
	}
	if len(a.ranges) != 0 {
		t.Errorf("kept %v", a.ranges)
	}
}

func TestUnseen(t *testing.T) {
	for _, tt := range []struct {
		name            string
		c               Counts
		kernel          uint64
		atLeast, atMost uint64
	}{
		{"nothing", Counts{KernelBase: 7}, 7, 0, 0},
		{"all seen", Counts{KernelBase: 7, Killed: 3}, 10, 0, 0},
		{"hooks: exact", Counts{Killed: 10, KilledAgain: 2, Groups: 2, Exiting: 5}, 13, 1, 1},
		{"hooks: doubles explained", Counts{Killed: 10, KilledAgain: 2, Groups: 2}, 12, 0, 0},
		{"stack: a group's first may count twice", Counts{Killed: 10, Unhooked: 10, Groups: 2}, 12, 0, 2},
		{"stack: more than that", Counts{Killed: 10, Unhooked: 10, Groups: 2, Exiting: 1}, 15, 2, 5},
		{"none: every mark may be a kill", Counts{Unknown: 10}, 8, 0, 8},
		{"none: more kills than marks", Counts{Unknown: 10}, 12, 2, 12},
		{"none: a group may count twice", Counts{Unknown: 1, Groups: 1}, 2, 0, 2},
		{"the kernel's count went back", Counts{KernelBase: 7, Killed: 3}, 5, 0, 0},
	} {
		if atLeast, atMost := tt.c.Unseen(tt.kernel); atLeast != tt.atLeast || atMost != tt.atMost {
			t.Errorf("%s: %d..%d, want %d..%d", tt.name, atLeast, atMost, tt.atLeast, tt.atMost)
		}
	}
}
