package loader

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/aquasecurity/libbpfgo"
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	ebpflink "github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/statedir"
)

// How the program gets into the kernel: its variants by tier, its maps, its pins, the change of generations.

// tiers are the tiers from the best down. Their values in the program are those of enum oom_tier.
var tiers = []struct {
	tier  Tier
	value uint32
	hooks string // prefix of the programs that it attaches beside the main one
}{
	{TierFentry, 3, fentryPrefix},
	{TierKprobe, 2, kprobePrefix},
	{TierStack, 1, ""},
	{TierNone, 0, ""},
}

const fentryPrefix, kprobePrefix = "fentry_", "kprobe_"

// hookFunctions are what fentry and kprobe hook, the last one only where the tracepoint hands over no task.
var hookFunctions = []string{"out_of_memory", "oom_kill_process", "__oom_kill_process", "mark_oom_victim"}

// fallbackFunctions do where a compiler has inlined the others, which are static. Only the stack then proves a kill.
var fallbackFunctions = []string{"out_of_memory", "mark_oom_victim"}

func (o Options) segments() uint32 { return uint32(o.JournalSize / SegmentSize) }

// opening is what Open finds before it tries the tiers.
type opening struct {
	opts      Options
	prototype Prototype
	notifier  *notifier

	// Of the loads before this one.
	pins       *pins
	state      *ebpf.Map // nil: none of this version is there yet
	other      *ebpf.Map // the state of another version, if that is there
	journal    *ebpf.Map // the journal in use, if it is as wanted
	generation uint64    // of this load

	symbols     []symbol
	kprobeMulti bool
	refused     map[Tier]error // why a tier is not available, as far as that is known
}

// Open loads and attaches the program, with the best tier that works here unless opts names one. From its return on, the
// kernel records every kill; Run reads them. Recording goes over from a pinned program without a gap.
//
// It fails where the kernel has no BTF or no mark_victim tracepoint, where the verifier refuses the program, without CAP_BPF
// and CAP_PERFMON (or CAP_SYS_ADMIN), where another tracer runs, and where something is pinned that it cannot read.
func Open(ctx context.Context, opts Options) (_ *Loader, err error) {
	if err := CheckLayout(); err != nil {
		return nil, err
	}
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return nil, fmt.Errorf("read the kernel's BTF: %w", err)
	}
	o := &opening{opts: opts, generation: 1, refused: map[Tier]error{}}
	if o.prototype, err = MarkVictimPrototype(kernel); err != nil {
		return nil, err
	}
	limitHeap()
	defer trimHeap()
	bridgeLog(opts.Log, true)
	// Where bpf(2) is refused, no tier has to be tried.
	if err := CheckBPF(); err != nil {
		return nil, err
	}
	defer func() { o.close(err) }()
	if err := o.findPinned(ctx); err != nil {
		return nil, err
	}
	perfErr := CheckPerfEvents()
	var why error
	if o.notifier, why, err = openNotifier(cmp.Or(opts.Notify, NotifyAuto), perfErr); err != nil {
		return nil, err
	}
	if why != nil {
		level := slog.LevelInfo // nothing is missed, and nothing comes late
		if o.notifier.way == NotifyPoll {
			level = slog.LevelWarn
		}
		opts.Log.Log(ctx, level, "perf buffer not available for notifications, using another way", "notify", string(o.notifier.way), "reason", why)
	}
	o.symbols, o.refused[TierStack] = findStackSymbols("/proc")
	if opts.Tier == TierAuto || opts.Tier == TierFentry {
		o.refused[TierFentry] = checkFentry(kernel)
	}
	o.kprobeMulti, o.refused[TierKprobe] = kprobeWay("/sys", kernel, perfErr)
	for i, t := range tiers {
		if opts.Tier != TierAuto && opts.Tier != t.tier {
			continue
		}
		l, err := o.tier(i)
		if err == nil {
			if opts.Tier == TierAuto && t.tier == TierNone {
				opts.Log.Warn("no context for kills: scope, outcome and limit will be unknown", "reason", o.refused[TierStack])
			}
			if err := l.takeOver(o.other); err != nil {
				l.Close()
				return nil, err
			}
			return l, nil
		}
		if opts.Tier != TierAuto || t.tier == TierNone {
			return nil, fmt.Errorf("use tier %s: %w", t.tier, err)
		}
		opts.Log.Info("tier not available on this kernel, trying the next", "tier", string(t.tier), "reason", err)
	}
	return nil, fmt.Errorf("tier %q is not known", opts.Tier)
}

// close releases what only Open needs, and all after an error.
func (o *opening) close(err error) {
	for _, m := range []*ebpf.Map{o.state, o.other, o.journal} {
		m.Close() // also of nil
	}
	if err != nil && o.notifier != nil {
		o.notifier.close()
	}
	if err != nil && o.pins != nil {
		o.pins.close()
	}
}

func (o *opening) findPinned(ctx context.Context) (err error) {
	if o.opts.PinDir == "" {
		return nil
	}
	o.pins, err = lockPins(ctx, o.opts.PinDir)
	// Nor may a user who was there first keep this node from being watched.
	if errors.Is(err, ErrNoBPFFS) || errors.Is(err, statedir.ErrUnsafe) {
		o.opts.Log.Warn("cannot pin the program: kills while no tracer runs are not recorded", "error", err)
		return nil
	}
	if err != nil {
		return err
	}
	if o.state, o.other, err = o.pins.openState(); err != nil {
		return err
	}
	generations, err := o.pins.generations()
	if err != nil {
		return err
	}
	for _, n := range generations {
		o.generation = max(o.generation, n+1)
	}
	if o.state == nil {
		return nil
	}
	memory, s, err := mapState(o.state.FD())
	if err != nil {
		return err
	}
	speaking := atomic.LoadUint64(&s.Generation)
	_ = unix.Munmap(memory)
	o.generation = max(o.generation, speaking+1)
	journal, ours, err := o.pins.pinnedJournal(speaking)
	if err != nil || journal == nil {
		return err
	}
	if ours && journal.MaxEntries() == o.opts.segments() && journal.ValueSize() == SegmentSize {
		o.journal = journal
		return nil
	}
	o.opts.Log.Info("created a new journal, reading the previous one to its end",
		"bytes", o.opts.JournalSize, "before", uint64(journal.MaxEntries())*uint64(journal.ValueSize()), "same_version", ours)
	journal.Close()
	return nil
}

// tier opens one of tiers, with as many hooks as it can.
func (o *opening) tier(i int) (*Loader, error) {
	t := tiers[i]
	if err := o.refused[t.tier]; err != nil {
		return nil, err
	}
	l, err := o.load(i, hookFunctions)
	// Fewer hooks help where a function is missing, and not where hooks are forbidden.
	if err == nil || t.hooks == "" || errors.Is(err, fs.ErrPermission) {
		return l, err
	}
	fewer, fewerErr := o.load(i, fallbackFunctions)
	if fewerErr != nil {
		return nil, err
	}
	o.opts.Log.Warn("not all hooks available: the outcome of kills comes from the stack", "tier", string(t.tier), "reason", err)
	return fewer, nil
}

// load loads and attaches what one tier needs, and nothing else. The program is silent as yet.
func (o *opening) load(tier int, functions []string) (_ *Loader, err error) {
	t, opts := tiers[tier], o.opts
	bridgeLog(opts.Log, opts.Tier == TierAuto && t.tier != TierNone)
	l := &Loader{
		log: opts.Log, maps: map[string]*libbpfgo.BPFMap{},
		tier: t.tier, prototype: o.prototype, notifier: o.notifier,
		idleTime: idleTime, stuckTime: stuckTime, opened: time.Now(),
		pins: o.pins, fresh: o.state == nil, generation: o.generation,
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
	for _, name := range []string{statsMap, stateMap, waitingMap, journalMap, notifyMaps[NotifyPerf], notifyMaps[NotifyRingbuf]} {
		if l.maps[name], err = l.module.GetMap(name); err != nil {
			return nil, fmt.Errorf("find map %s: %w", name, err)
		}
	}
	if err := l.setVariables(opts, t.value, o.symbols); err != nil {
		return nil, err
	}
	if err := l.setMaps(o); err != nil {
		return nil, err
	}
	hooks, err := l.chooseHooks(t.hooks, functions, o.kprobeMulti)
	if err != nil {
		return nil, err
	}
	if err := l.module.BPFLoadObject(); err != nil {
		return nil, fmt.Errorf("load the BPF object: %w", err)
	}
	if err := l.mapMemory(opts); err != nil {
		return nil, err
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
		multi := o.kprobeMulti && strings.HasPrefix(hook, kprobePrefix)
		attached, err := attach(program, multi, strings.TrimPrefix(hook, kprobePrefix))
		if err != nil {
			return nil, fmt.Errorf("attach %s: %w", hook, err)
		}
		l.links = append(l.links, link{bpfLink: attached})
		if l.pins == nil {
			continue
		}
		byPerf := strings.HasPrefix(hook, kprobePrefix) && !multi
		switch err := attached.Pin(l.pins.path(strconv.FormatUint(l.generation, 10), hook)); {
		case err == nil:
			// bpf_link_perf_detach() of libbpf disables the event, pinned or not.
			l.links[len(l.links)-1].kept = byPerf
		case byPerf:
			// Before v5.15 (commit b89fbfbb854c) a kprobe was no link that can be pinned.
			l.log.Warn("cannot pin a hook: kills while no tracer runs are recorded without its context", "hook", hook, "error", err)
		default:
			return nil, fmt.Errorf("pin %s: %w", hook, err)
		}
	}
	return l, nil
}

// attach attaches a program where its section says, or to a function by a kprobe.multi link, which libbpfgo lacks.
func attach(program *libbpfgo.BPFProg, multi bool, function string) (bpfLink, error) {
	if !multi {
		return program.AttachGeneric()
	}
	fd, err := unix.FcntlInt(uintptr(program.FileDescriptor()), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	same, err := ebpf.NewProgramFromFD(fd) // takes fd
	if err != nil {
		return nil, err
	}
	defer same.Close()
	multiLink, err := ebpflink.KprobeMulti(same, ebpflink.KprobeMultiOptions{Symbols: []string{function}})
	if err != nil {
		return nil, err
	}
	return kprobeMultiLink{multiLink}, nil
}

type kprobeMultiLink struct{ ebpflink.Link }

func (l kprobeMultiLink) Destroy() error { return l.Close() }

// setMaps sets which maps the program shares, makes anew (a journal, of the size wanted) or does without.
func (l *Loader) setMaps(o *opening) error {
	maps := map[string]*ebpf.Map{stateMap: o.state, journalMap: o.journal}
	for way, name := range notifyMaps {
		maps[name] = nil
		if way == l.notifier.way {
			maps[name] = l.notifier.m
		}
	}
	for name, m := range maps {
		var err error
		switch {
		case m != nil:
			err = l.maps[name].ReuseFD(m.FD())
		case name == journalMap:
			err = l.maps[name].SetMaxEntries(o.opts.segments())
		case name != stateMap: // of a way to notify that is not used
			err = l.maps[name].SetAutocreate(false)
		}
		if err != nil {
			return fmt.Errorf("set map %s: %w", name, err)
		}
	}
	return nil
}

// mapMemory maps the state and the journal, and begins an epoch where the state is new.
func (l *Loader) mapMemory(opts Options) (err error) {
	if l.journal, err = mapJournal(l.maps[journalMap].FileDescriptor(), opts.segments(), SegmentSize); err != nil {
		return err
	}
	if l.stateMemory, l.state, err = mapState(l.maps[stateMap].FileDescriptor()); err != nil {
		return err
	}
	if l.waiting, err = mapArray(l.maps[waitingMap].FileDescriptor(), 4); err != nil {
		return fmt.Errorf("%s: %w", waitingMap, err)
	}
	l.notifier.waiting = (*uint32)(unsafe.Pointer(&l.waiting[0]))
	if l.fresh {
		var boot unix.Timespec
		if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot); err != nil {
			return fmt.Errorf("read the boot time: %w", err)
		}
		*l.state = state{Magic: stateMagic, Version: stateVersion, EpochBoottimeNS: uint64(boot.Nano()), KernelBase: noBase}
	}
	return nil
}

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
	targets := map[string]string{journalMap: filepath.Join(own, journalPin+journalVersion)}
	if l.fresh {
		targets[stateMap] = l.pins.path(statePin)
		// Of another version. Who records for it stops when this one takes over.
		if err := os.Remove(targets[stateMap]); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("remove the pinned state of another version: %w", err)
		}
	}
	for name, path := range targets {
		if err := l.maps[name].Pin(path); err != nil {
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

// takeOver switches recording from the generation before to this one. Both are attached, and read which one speaks.
func (l *Loader) takeOver(other *ebpf.Map) error {
	// One of them records the mark under way: the older program runs first, and the newer one knows the older's last mark.
	if other != nil {
		if err := l.silence(other); err != nil {
			return err
		}
	}
	atomic.StoreUint64(&l.state.Generation, l.generation)
	if l.pins == nil {
		return nil
	}
	generations, err := l.pins.generations()
	if err != nil || len(generations) == 1 {
		return err
	}
	time.Sleep(takeOverTime)
	if !strongOrder {
		_ = barrier()
	}
	head, acked := atomic.LoadUint64(&l.state.Head), atomic.LoadUint64(&l.state.Acked)
	ownInfo, err := libbpfgo.GetMapInfoByFD(l.maps[journalMap].FileDescriptor())
	if err != nil {
		return fmt.Errorf("inspect map %s: %w", journalMap, err)
	}
	for _, n := range generations {
		if n == l.generation {
			continue
		}
		dir := l.pins.generation(n)
		kept, err := l.keepOlder(n, ownInfo.ID, acked, head)
		if err != nil {
			// What cannot be read must not keep this node from being watched.
			l.log.Error("cannot read an earlier journal", "dir", dir, "error", err)
		}
		if kept {
			err = removePins(dir, linkPins)
		} else {
			err = remove(dir)
		}
		if err != nil {
			return fmt.Errorf("take over from %s: %w", dir, err)
		}
	}
	l.log.Info("took over the recording", "generation", l.generation, "seq", head, "unread", head-min(head, acked))
	return nil
}

// silence ends the recording of a program whose state is of another version. What that has recorded and not published is
// left: its records cannot be told from this epoch's.
func (l *Loader) silence(other *ebpf.Map) error {
	memory, s, err := mapState(other.FD())
	if err != nil {
		return err
	}
	defer unix.Munmap(memory)
	atomic.StoreUint64(&s.Generation, 0)
	time.Sleep(takeOverTime)
	l.left = &Left{Acked: atomic.LoadUint64(&s.Acked), Head: atomic.LoadUint64(&s.Head)}
	l.log.Warn("the pinned state is of another version, starting a new epoch", "version", atomic.LoadUint32(&s.Version), "seq", l.left.Head, "unread", l.left.Head-min(l.left.Head, l.left.Acked))
	return nil
}

// takeOverTime is far longer than the program runs for one mark.
const takeOverTime = 50 * time.Millisecond

// keepOlder opens the journal of an earlier generation, and keeps it if it may hold what this one's does not.
func (l *Loader) keepOlder(generation uint64, own uint32, acked, head uint64) (kept bool, err error) {
	if acked >= head {
		return false, nil
	}
	m, _, err := l.pins.pinnedJournal(generation)
	if err != nil || m == nil {
		return false, err
	}
	defer m.Close()
	info, err := m.Info()
	if err != nil {
		return false, fmt.Errorf("inspect the pinned journal: %w", err)
	}
	if id, ok := info.ID(); ok && uint32(id) == own {
		return false, nil
	}
	older, err := mapJournal(m.FD(), m.MaxEntries(), m.ValueSize())
	if err != nil {
		return false, err
	}
	older.dir, older.end = l.pins.generation(generation), head
	l.older = append(l.older, older)
	return true, nil
}

// chooseHooks switches off the programs that the tier does not need, and returns the names of its hooks.
func (l *Loader) chooseHooks(prefix string, functions []string, kprobeMulti bool) (wanted []string, err error) {
	for _, kind := range []string{fentryPrefix, kprobePrefix} {
		for _, function := range hookFunctions {
			name := kind + function
			use := kind == prefix && slices.Contains(functions, function) &&
				(function != "mark_oom_victim" || l.prototype == PrototypePID)
			if use && lacks(function) {
				return nil, fmt.Errorf("hook %s: a fault of the tests", function)
			}
			program, err := l.module.GetProgram(name)
			switch {
			case err != nil:
			case !use:
				err = program.SetAutoload(false)
			case kind == kprobePrefix && kprobeMulti:
				err = program.SetExpectedAttachType(libbpfgo.BPFAttachTypeTraceKprobeMulti)
			}
			if err != nil {
				return nil, fmt.Errorf("prepare program %s: %w", name, err)
			}
			if use {
				wanted = append(wanted, name)
			}
		}
	}
	return wanted, nil
}

// CheckStack reports whether the stack tier is available: nil, or why not. outcome is whether it can prove that a task was
// killed: whether __oom_kill_process() is not inlined.
func CheckStack(procfs string) (outcome bool, err error) {
	symbols, err := findStackSymbols(procfs)
	return slices.ContainsFunc(symbols, func(s symbol) bool { return s.Frame == frameKill }), err
}

func findStackSymbols(procfs string) ([]symbol, error) {
	kallsyms, err := os.Open(procfs + "/kallsyms")
	if err != nil {
		return nil, err
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
	if n := opts.JournalSize; n < 2*SegmentSize || n&(n-1) != 0 {
		return fmt.Errorf("journal size %d bytes: must be a power of two, at least %d", n, 2*SegmentSize)
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
		{"oom_notify", l.notifier.way.value()},
		{"oom_nr_cpus", uint32(cpus)},
		{"oom_one_memory_node", map[bool]uint32{true: 1}[one]},
		{"oom_generation", l.generation},
		{"oom_no_limit", math.MaxInt64 / uint64(os.Getpagesize())},
		{"oom_segments", opts.segments()},
		{"oom_symbol_count", uint32(len(symbols))},
		{"oom_symbols", table},
	}, faults()...) {
		if err := l.module.InitGlobalVariable(v.name, v.value); err != nil {
			return fmt.Errorf("set %s: %w", v.name, err)
		}
	}
	return nil
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

func objectSpec() (*btf.Spec, error) {
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return nil, fmt.Errorf("read the BPF object's BTF: %w", err)
	}
	return spec, nil
}
