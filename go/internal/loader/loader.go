// Package loader loads the kernel program, attaches it and hands its samples on. It is the only
// package with cgo.
//
// Rule of the package: nothing is dropped in silence. Every record has a seq and stands in the journal until
// it is settled. The perf buffer only brings it sooner; what it does not bring is read from the journal, and
// what that does not have any more is told as lost.
package loader

import (
	"bytes"
	"context"
	_ "embed" // the object
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/aquasecurity/libbpfgo"
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/wire"
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

// tiers are the tiers from the best down. Their values in the program are those of enum oom_tier.
var tiers = []struct {
	tier      Tier
	value     uint32
	hooks     string   // prefix of the programs that it attaches beside the main one
	functions []string // of hookFunctions
}{
	{TierFentry, 3, "fentry_", hookFunctions},
	{TierFentry, 3, "fentry_", fallbackFunctions},
	{TierKprobe, 2, "kprobe_", hookFunctions},
	{TierKprobe, 2, "kprobe_", fallbackFunctions},
	{TierStack, 1, "", nil},
	{TierNone, 0, "", nil},
}

// hookFunctions are the functions that fentry and kprobe hook. The last one only where the tracepoint
// hands over no task.
var hookFunctions = []string{"out_of_memory", "oom_kill_process", "__oom_kill_process", "mark_oom_victim"}

// fallbackFunctions do where a compiler has left the others, which are static, without an entry of their
// own. Only the stack then tells whether it was a kill.
var fallbackFunctions = []string{"out_of_memory", "mark_oom_victim"}

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

// ground is what a load of the program finds of those before it.
type ground struct {
	pins       *pins
	state      *ebpf.Map // nil: none is there yet
	journal    *ebpf.Map // the journal in use, if it is as wanted
	generation uint64    // of this load
}

func (g *ground) close() {
	for _, m := range []*ebpf.Map{g.state, g.journal} {
		if m != nil {
			m.Close()
		}
	}
}

// Open loads and attaches the program, with the best tier that works here unless opts names one. From
// its return on, the kernel records every kill; Run reads them. Where another load of the program is
// pinned, recording goes over from that one to this without a gap, and what it left unread is read.
//
// It fails where the kernel has no BTF or no mark_victim tracepoint, where the verifier refuses the
// program, without CAP_BPF and CAP_PERFMON (or CAP_SYS_ADMIN), and where another tracer runs or something
// is pinned that this version cannot read.
func Open(ctx context.Context, opts Options) (_ *Loader, err error) {
	if err := CheckLayout(); err != nil {
		return nil, err
	}
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("read the kernel's BTF: %w", err)
	}
	prototype, err := MarkVictimPrototype(kernel)
	if err != nil {
		return nil, err
	}
	g, err := prepare(ctx, opts)
	if err != nil {
		return nil, err
	}
	defer g.close()
	defer func() {
		if err != nil && g.pins != nil {
			g.pins.close()
		}
	}()
	symbols, stackErr := StackSymbols("/proc")
	for i, t := range tiers {
		if opts.Tier != TierAuto && opts.Tier != t.tier {
			continue
		}
		l, err := openTier(opts, g, i, prototype, symbols, stackErr)
		if err == nil {
			if opts.Tier == TierAuto && t.tier == TierNone {
				opts.Log.Warn("no context for kills: scope, outcome and limit will be unknown", "reason", stackErr)
			}
			if err := l.takeOver(g); err != nil {
				l.Close()
				return nil, err
			}
			return l, nil
		}
		last := i+1 == len(tiers) || opts.Tier != TierAuto && tiers[i+1].tier != t.tier
		if last {
			return nil, fmt.Errorf("use tier %s: %w", t.tier, err)
		}
		opts.Log.Info("tier is not to be had here", "tier", string(t.tier), "hooks", t.functions, "reason", err)
	}
	return nil, fmt.Errorf("tier %q is not known", opts.Tier)
}

// prepare finds what is pinned.
func prepare(ctx context.Context, opts Options) (_ *ground, err error) {
	g := &ground{generation: 1}
	if opts.PinDir == "" {
		return g, nil
	}
	g.pins, err = lockPins(ctx, opts.PinDir)
	if errors.Is(err, ErrNoBPFFS) {
		opts.Log.Warn("nothing can be pinned: kills while no tracer runs are not recorded", "error", err)
		return g, nil
	}
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			g.close()
			g.pins.close()
		}
	}()
	if g.state, err = g.pins.openState(); err != nil {
		return nil, err
	}
	generations, err := g.pins.generations()
	if err != nil {
		return nil, err
	}
	for _, n := range generations {
		g.generation = max(g.generation, n+1)
	}
	if g.state == nil {
		return g, nil
	}
	memory, s, err := mapState(g.state.FD())
	if err != nil {
		return nil, err
	}
	speaking := atomic.LoadUint64(&s.Generation)
	_ = unix.Munmap(memory)
	g.generation = max(g.generation, speaking+1)
	journal, ours, err := g.pins.pinnedJournal(speaking)
	if err != nil {
		return nil, err
	}
	if journal != nil && (!ours || journal.MaxEntries() != uint32(opts.JournalSlots) || journal.ValueSize() != maxRecord) {
		opts.Log.Info("the journal is made anew, the one before is read to its end",
			"slots", opts.JournalSlots, "before", journal.MaxEntries(), "same_version", ours)
		journal.Close()
		journal = nil
	}
	g.journal = journal
	return g, nil
}

// openTier loads and attaches what one tier needs, and nothing else. The program is silent as yet.
func openTier(opts Options, g *ground, tier int, prototype Prototype, symbols []symbol, stackErr error) (_ *Loader, err error) {
	t := tiers[tier]
	if t.tier == TierStack && stackErr != nil {
		return nil, stackErr
	}
	bridgeLog(opts.Log, opts.Tier == TierAuto && t.tier != TierNone)
	l := &Loader{
		log:       opts.Log,
		tier:      t.tier,
		prototype: prototype,
		// Room for a burst while the reader's goroutine is not scheduled: libbpfgo's callback blocks
		// on these, and what it does not take stays in the kernel's buffer.
		events:     make(chan []byte, 1024),
		lost:       make(chan uint64, 64),
		pins:       g.pins,
		fresh:      g.state == nil,
		generation: g.generation,
	}
	// The limit is raised by libbpf where the kernel still accounts BPF memory to it (before v5.11).
	l.module, err = libbpfgo.NewModuleFromBufferArgs(libbpfgo.NewModuleArgs{
		BPFObjBuff: object, BPFObjName: "oom_tracer", SkipMemlockBump: true,
	})
	if err != nil {
		return nil, fmt.Errorf("open the BPF object: %w", err)
	}
	defer func() {
		if err != nil {
			l.discard()
		}
	}()
	if err := l.setVariables(opts, t.value, symbols); err != nil {
		return nil, err
	}
	if err := l.setMaps(opts, g); err != nil {
		return nil, err
	}
	hooks, err := l.chooseHooks(t.hooks, t.functions)
	if err != nil {
		return nil, err
	}
	if err := l.module.BPFLoadObject(); err != nil {
		return nil, fmt.Errorf("load the BPF object: %w", err)
	}
	if err := l.mapMemory(opts); err != nil {
		return nil, err
	}
	if l.perf, err = l.module.InitPerfBuf(eventsMap, l.events, l.lost, opts.PerfPages); err != nil {
		return nil, fmt.Errorf("open the perf buffer of %d pages per CPU: %w", opts.PerfPages, err)
	}
	if err := l.pinMaps(); err != nil {
		return nil, err
	}
	// The hooks first: a kill between the two would have no context.
	for _, hook := range append(hooks, programName) {
		program, err := l.module.GetProgram(hook)
		if err != nil {
			return nil, fmt.Errorf("find program %s: %w", hook, err)
		}
		attached, err := program.AttachGeneric()
		if err != nil {
			return nil, fmt.Errorf("attach %s: %w", hook, err)
		}
		l.links = append(l.links, link{BPFLink: attached})
		if l.pins == nil {
			continue
		}
		switch err := attached.Pin(l.pins.path(strconv.FormatUint(l.generation, 10), hook)); {
		case err == nil:
			// bpf_link_perf_detach() of libbpf disables the event, pinned or not.
			l.links[len(l.links)-1].kept = strings.HasPrefix(hook, "kprobe_")
		case strings.HasPrefix(hook, "kprobe_"):
			// Before v5.15 (commit b89fbfbb854c) a kprobe was no link that can be pinned.
			l.log.Warn("hook cannot be pinned: kills while no tracer runs are told without what it knows", "hook", hook, "error", err)
		default:
			return nil, fmt.Errorf("pin %s: %w", hook, err)
		}
	}
	return l, nil
}

// setMaps lets the program use the maps that are there, and sets the size of a new journal.
func (l *Loader) setMaps(opts Options, g *ground) error {
	for name, m := range map[string]*ebpf.Map{stateMap: g.state, journalMap: g.journal} {
		theirs, err := l.module.GetMap(name)
		if err != nil {
			return fmt.Errorf("find map %s: %w", name, err)
		}
		switch {
		case m != nil:
			err = theirs.ReuseFD(m.FD())
		case name == journalMap:
			err = theirs.SetMaxEntries(uint32(opts.JournalSlots))
		}
		if err != nil {
			return fmt.Errorf("set map %s: %w", name, err)
		}
	}
	return nil
}

// mapMemory maps the state and the journal, and begins an epoch where the state is new.
func (l *Loader) mapMemory(opts Options) error {
	m, err := l.module.GetMap(journalMap)
	if err != nil {
		return fmt.Errorf("find map %s: %w", journalMap, err)
	}
	if l.journal, err = mapJournal(m.FileDescriptor(), uint32(opts.JournalSlots), maxRecord); err != nil {
		return err
	}
	if m, err = l.module.GetMap(stateMap); err != nil {
		return fmt.Errorf("find map %s: %w", stateMap, err)
	}
	if l.stateMemory, l.state, err = mapState(m.FileDescriptor()); err != nil {
		return err
	}
	if l.fresh {
		var boot unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
			return fmt.Errorf("read the boot time: %w", err)
		}
		*l.state = state{Magic: stateMagic, Version: stateVersion, EpochBoottimeNS: uint64(boot.Nano()), KernelBase: noBase}
	}
	return nil
}

// pinMaps pins the state, if it is new, and the journal.
func (l *Loader) pinMaps() error {
	if l.pins == nil {
		return nil
	}
	own := l.pins.generation(l.generation)
	// Of an attempt with a better tier, which failed.
	if err := remove(own); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Mkdir(own, 0o700); err != nil {
		return fmt.Errorf("make the pin directory: %w", err)
	}
	targets := map[string]string{journalMap: filepath.Join(own, journalPin+strconv.Itoa(wire.ABIVersion))}
	if l.fresh {
		targets[stateMap] = l.pins.path(statePin)
	}
	for name, path := range targets {
		m, err := l.module.GetMap(name)
		if err != nil {
			return fmt.Errorf("find map %s: %w", name, err)
		}
		if err := m.Pin(path); err != nil {
			return fmt.Errorf("pin map %s: %w", name, err)
		}
	}
	return nil
}

// discard takes back a load that did not come to speak.
func (l *Loader) discard() {
	for _, link := range slices.Backward(l.links) {
		_ = link.Destroy()
	}
	if l.pins != nil {
		_ = remove(l.pins.generation(l.generation))
		if l.fresh {
			_ = os.Remove(l.pins.path(statePin))
		}
	}
	l.unmap()
	l.module.Close()
}

// takeOver switches recording from the generation before to this one. Both are attached: which of them
// speaks is one word of memory that both read.
func (l *Loader) takeOver(g *ground) error {
	// The mark that is under way meanwhile is told by one of them alone: the older program runs first,
	// and the newer one knows what the older has told last.
	atomic.StoreUint64(&l.state.Generation, l.generation)
	if l.pins == nil {
		return nil
	}
	time.Sleep(takeOverTime)
	head := atomic.LoadUint64(&l.state.Head)
	acked := atomic.LoadUint64(&l.state.Acked)
	own, err := l.module.GetMap(journalMap)
	if err != nil {
		return fmt.Errorf("find map %s: %w", journalMap, err)
	}
	ownInfo, err := libbpfgo.GetMapInfoByFD(own.FileDescriptor())
	if err != nil {
		return fmt.Errorf("look at map %s: %w", journalMap, err)
	}
	generations, err := l.pins.generations()
	if err != nil {
		return err
	}
	for _, n := range generations {
		if n == l.generation {
			continue
		}
		dir := l.pins.generation(n)
		kept, err := l.keepOlder(n, ownInfo.ID, acked, head)
		if err != nil {
			// What cannot be read must not keep this node from being watched.
			l.log.Error("an earlier journal cannot be read", "dir", dir, "error", err)
		}
		if kept == nil {
			err = remove(dir)
		} else {
			err = removeLinks(dir)
		}
		if err != nil {
			return err
		}
	}
	l.log.Info("took over", "generation", l.generation, "seq", head, "unread", head-min(head, acked))
	return nil
}

// takeOverTime is far longer than the program runs for one mark.
const takeOverTime = 50 * time.Millisecond

// keepOlder opens the journal of an earlier generation, if it may hold what this one's does not.
func (l *Loader) keepOlder(generation uint64, own uint32, acked, head uint64) (*journal, error) {
	if acked >= head {
		return nil, nil
	}
	m, _, err := l.pins.pinnedJournal(generation)
	if err != nil || m == nil {
		return nil, err
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return nil, fmt.Errorf("look at the pinned journal: %w", err)
	}
	if id, ok := info.ID(); ok && uint32(id) == own {
		return nil, nil
	}
	older, err := mapJournal(m.FD(), m.MaxEntries(), m.ValueSize())
	if err != nil {
		return nil, err
	}
	older.dir, older.end = l.pins.generation(generation), head
	l.older = append(l.older, older)
	return older, nil
}

// chooseHooks switches off every program that the tier does not need, and returns the names of its
// hooks.
func (l *Loader) chooseHooks(prefix string, functions []string) ([]string, error) {
	var wanted []string
	for _, kind := range []string{"fentry_", "kprobe_"} {
		for _, function := range hookFunctions {
			name := kind + function
			use := kind == prefix && slices.Contains(functions, function) &&
				(function != "mark_oom_victim" || l.prototype == PrototypePID)
			if use && lacks(function) {
				return nil, fmt.Errorf("hook %s: a fault of the tests", function)
			}
			if use {
				wanted = append(wanted, name)
				continue
			}
			program, err := l.module.GetProgram(name)
			if err != nil {
				return nil, fmt.Errorf("find program %s: %w", name, err)
			}
			if err := program.SetAutoload(false); err != nil {
				return nil, fmt.Errorf("leave out program %s: %w", name, err)
			}
		}
	}
	return wanted, nil
}

// StackSymbols finds what the stack tier needs in procfs, or says why there is none.
func StackSymbols(procfs string) ([]symbol, error) {
	kallsyms, err := os.Open(procfs + "/kallsyms")
	if err != nil {
		return nil, fmt.Errorf("%w: %w", ErrNoStack, err)
	}
	defer kallsyms.Close()
	return stackSymbols(kallsyms)
}

// variable is a constant of the program that is written before it is loaded.
type variable struct {
	name  string
	value any
}

func (l *Loader) setVariables(opts Options, tier uint32, symbols []symbol) error {
	if n := opts.JournalSlots; n < 2 || n&(n-1) != 0 {
		return fmt.Errorf("a journal of %d records: must be a power of two from 2 on", n)
	}
	cpus, err := libbpfgo.NumPossibleCPUs()
	if err != nil {
		return fmt.Errorf("count the possible CPUs: %w", err)
	}
	one, err := oneMemoryNode("/sys")
	if err != nil {
		return err
	}
	var table [maxSymbols]symbol
	copy(table[:], symbols)
	for _, v := range append([]variable{
		{"oom_tier", tier},
		{"oom_nr_cpus", uint32(cpus)},
		{"oom_one_memory_node", map[bool]uint32{true: 1}[one]},
		{"oom_generation", l.generation},
		{"oom_journal_slots", uint32(opts.JournalSlots)},
		{"oom_symbol_count", uint32(len(symbols))},
		{"oom_symbols", table},
	}, faults()...) {
		if err := l.module.InitGlobalVariable(v.name, v.value); err != nil {
			return fmt.Errorf("set %s: %w", v.name, err)
		}
	}
	return nil
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

// bridgeLog sends libbpf's messages to slog. libbpf has one printer for the whole process. Where the next
// tier is tried after a failure, its complaints of this one are no warnings.
func bridgeLog(log *slog.Logger, quiet bool) {
	libbpfgo.SetLoggerCbs(libbpfgo.Callbacks{Log: func(level int, msg string) {
		at := slog.LevelDebug
		if level == libbpfgo.LibbpfWarnLevel && !quiet {
			at = slog.LevelWarn
		}
		log.Log(context.Background(), at, "libbpf", "message", strings.TrimSpace(msg))
	}})
}

// objectSpec is the BTF of the embedded object.
func objectSpec() (*btf.Spec, error) {
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("read the BPF object's BTF: %w", err)
	}
	return spec, nil
}
