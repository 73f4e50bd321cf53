package loader

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// record is the unchanging part of one.
func record(seq uint64) []byte {
	r := make([]byte, 32)
	binary.NativeEndian.PutUint32(r[sizeOffset:], uint32(len(r)))
	binary.NativeEndian.PutUint64(r[seqOffset:], seq)
	return r
}

// put writes a record as the program does.
func (j *journal) put(seq uint64) { copy(j.memory[(seq&(j.slots-1))*j.stride:], record(seq)) }

// A slot that was written over, or may be under way to it, is not read.
func TestJournalRead(t *testing.T) {
	j := &journal{memory: make([]byte, 8*64), slots: 8, stride: 64}
	at := func(head uint64) func() uint64 { return func() uint64 { return head } }
	if j.read(1, at(0)) != nil {
		t.Error("an empty journal has a record")
	}
	for seq := uint64(1); seq <= 11; seq++ {
		j.put(seq)
	}
	for seq := uint64(1); seq <= 13; seq++ {
		// 4 stands in its slot, but 12 may be half written there already.
		want := seq >= 5 && seq <= 11
		got := j.read(seq, at(11))
		if (got != nil) != want || got != nil && !slices.Equal(got, record(seq)) {
			t.Errorf("seq %d: %x", seq, got)
		}
	}
	// A size that is none must not lead out of the slot.
	for _, size := range []uint32{0, 1, 64, 65, 1 << 31} {
		binary.NativeEndian.PutUint32(j.memory[(9&7)*64+sizeOffset:], size)
		if got := j.read(9, at(11)); len(got) < recordPrefix || len(got) > 64 {
			t.Errorf("size %d: %d bytes", size, len(got))
		}
	}
	// It may be written over while it is read: head says so afterwards.
	if got := j.read(11, at(19)); got != nil {
		t.Errorf("read %x of a slot that was written over meanwhile", got)
	}
}

// follow collects what a sequencer hands over, as "1 2 lost 3-4 5".
type follow struct {
	sequencer
	journal map[uint64]bool
	said    []string
	refuse  bool
}

func newFollow(next, head uint64) *follow {
	f := &follow{journal: map[uint64]bool{}}
	f.sequencer = sequencer{
		next: next, seen: head, early: map[uint64][]byte{}, bound: 4,
		stored: func(seq uint64) []byte {
			if f.journal[seq] {
				return record(seq)
			}
			return nil
		},
		record: func(seq uint64, sample []byte, caughtUp bool) bool {
			if f.refuse {
				return false
			}
			s := fmt.Sprint(binary.NativeEndian.Uint64(sample[seqOffset:]))
			if caughtUp {
				s += "j"
			}
			f.said = append(f.said, s)
			return true
		},
		lost: func(first, last uint64) bool {
			if f.refuse {
				return false
			}
			f.said = append(f.said, fmt.Sprintf("lost %d-%d", first, last))
			return true
		},
	}
	return f
}

func (f *follow) expect(t *testing.T, want ...string) {
	t.Helper()
	if diff := cmp.Diff(want, f.said); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
	f.said = nil
}

func TestSequencer(t *testing.T) {
	yes, no := func() bool { return true }, func() bool { return false }
	f := newFollow(1, 0)
	for _, seq := range []uint64{1, 3, 2, 2, 1, 4} { // two CPUs' buffers, and doubles
		f.arrive(record(seq))
	}
	f.expect(t, "1", "2", "3", "4")

	// 5 does not come: not before it had its time is it looked for.
	f.arrive(record(6))
	f.journal[5], f.journal[6] = true, true
	f.look(6, yes)
	f.expect(t)
	f.look(6, yes)
	f.expect(t, "5j", "6")

	// What is not in the journal either is lost, but not as long as it may be under way.
	f.arrive(record(10))
	f.look(10, no)
	f.look(10, no)
	f.expect(t)
	f.arrive(record(7))
	f.expect(t, "7")
	f.look(10, yes)
	f.expect(t, "lost 8-9", "10")

	// A full house: nothing is handed over, nothing is forgotten, and little is kept.
	f.refuse = true
	for seq := uint64(11); seq <= 30; seq++ {
		f.arrive(record(seq))
		f.journal[seq] = seq > 14
	}
	f.look(30, yes)
	f.look(30, yes)
	if len(f.early) != f.bound {
		t.Errorf("%d are kept", len(f.early))
	}
	f.expect(t)
	f.refuse = false
	f.look(30, yes)
	f.expect(t, "11", "12", "13", "14", "15j", "16j", "17j", "18j", "19j", "20j", "21j", "22j", "23j", "24j", "25j", "26j", "27j", "28j", "29j", "30j")

	// Rubbish has no place in the order.
	f.arrive([]byte{1, 2, 3})
	f.arrive(nil)
	f.expect(t)

	// After a restart: from what was settled on, of which the journal has a part.
	f = newFollow(5, 12)
	for seq := uint64(8); seq <= 12; seq++ {
		f.journal[seq] = true
	}
	f.look(12, yes)
	f.expect(t, "lost 5-7", "8j", "9j", "10j", "11j", "12j")
}

// Whatever order samples come in, and whichever do not: each seq is handed over once and in order, or told
// as lost, and it is lost only if neither way had it.
func TestSequencerAnyOrder(t *testing.T) {
	for seed := range uint64(300) {
		r := rand.New(rand.NewPCG(seed, 1))
		f := newFollow(1, 0)
		f.bound = 64
		var told []uint64
		lost := map[uint64]bool{}
		f.sequencer.record = func(seq uint64, _ []byte, _ bool) bool {
			if r.IntN(10) == 0 {
				return false
			}
			told = append(told, seq)
			return true
		}
		f.lost = func(first, last uint64) bool {
			for ; first <= last; first++ {
				lost[first] = true
				told = append(told, first)
			}
			return true
		}
		const n = 60
		sent := map[uint64]bool{}
		var arriving []uint64
		for seq := uint64(1); seq <= n; seq++ {
			if r.IntN(3) > 0 {
				sent[seq] = true
				arriving = append(arriving, seq)
			}
			f.journal[seq] = r.IntN(4) > 0
		}
		// Two CPUs: their samples shift against each other.
		for range 40 {
			i := r.IntN(len(arriving) - 1)
			arriving[i], arriving[i+1] = arriving[i+1], arriving[i]
		}
		for i, seq := range arriving {
			f.arrive(record(seq))
			if r.IntN(5) == 0 {
				f.look(n, func() bool { return i == len(arriving)-1 })
			}
		}
		for range 2 * n {
			f.look(n, func() bool { return true })
		}
		if len(told) != n || !slices.IsSorted(told) {
			t.Fatalf("seed %d: told %d", seed, told)
		}
		for seq := uint64(1); seq <= n; seq++ {
			if lost[seq] != (!sent[seq] && !f.journal[seq]) {
				t.Fatalf("seed %d: %d is lost: %t; sent %t, in the journal %t", seed, seq, lost[seq], sent[seq], f.journal[seq])
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
		{"the kernel's count went back", Counts{KernelBase: 7, Killed: 3}, 5, 0, 0},
	} {
		if atLeast, atMost := tt.c.Unseen(tt.kernel); atLeast != tt.atLeast || atMost != tt.atMost {
			t.Errorf("%s: %d..%d, want %d..%d", tt.name, atLeast, atMost, tt.atLeast, tt.atMost)
		}
	}
}
