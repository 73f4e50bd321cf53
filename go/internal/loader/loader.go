// Package loader loads the kernel program, attaches it and hands its samples on. It is the only
// package with cgo.
//
// Rule of the package: nothing is dropped in silence. What the kernel program saw, sent and could not
// send is counted in the kernel and read from there, and what was sent must be received.
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
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"
	"unsafe"

	"github.com/aquasecurity/libbpfgo"
	"github.com/cilium/ebpf/btf"
)

//go:embed oom.bpf.o
var object []byte

// The names of src/oom.bpf.c.
const (
	programName = "oom_mark_victim"
	eventsMap   = "oom_events"
	statsMap    = "oom_stats"
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
	Log       *slog.Logger
}

// Stats are the kernel program's own counts since it was loaded, summed over the CPUs.
type Stats struct {
	Seen    uint64 `abi:"seen"`    // marks: sent and refused
	Sent    uint64 `abi:"sent"`    // taken by the perf buffer
	Refused uint64 `abi:"refused"` // not taken by it: full, or no reader on that CPU
}

// Loader is a loaded and attached program.
type Loader struct {
	log       *slog.Logger
	tier      Tier
	prototype Prototype
	perf      *libbpfgo.PerfBuffer
	links     []*libbpfgo.BPFLink // the main program's is the last
	events    chan []byte
	lost      chan uint64

	running   atomic.Bool
	received  atomic.Uint64
	closeOnce sync.Once

	mu     sync.Mutex // guards module against Close
	module *libbpfgo.Module
	final  Stats // after Close
}

// Open loads and attaches the program, with the best tier that works here unless opts names one. From
// its return on, the kernel records every kill; Run reads them.
//
// It fails where the kernel has no BTF or no mark_victim tracepoint, where the verifier refuses the
// program, and without CAP_BPF and CAP_PERFMON (or CAP_SYS_ADMIN).
func Open(opts Options) (*Loader, error) {
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
	symbols, stackErr := StackSymbols("/proc")
	for i, t := range tiers {
		if opts.Tier != TierAuto && opts.Tier != t.tier {
			continue
		}
		l, err := openTier(opts, i, prototype, symbols, stackErr)
		if err == nil {
			if opts.Tier == TierAuto && t.tier == TierNone {
				opts.Log.Warn("no context for kills: scope, outcome and limit will be unknown", "reason", stackErr)
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

// openTier loads and attaches what one tier needs, and nothing else.
func openTier(opts Options, tier int, prototype Prototype, symbols []symbol, stackErr error) (_ *Loader, err error) {
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
		events: make(chan []byte, 1024),
		lost:   make(chan uint64, 64),
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
			l.module.Close()
		}
	}()
	if err := l.setVariables(t.value, symbols); err != nil {
		return nil, err
	}
	hooks, err := l.chooseHooks(t.hooks, t.functions)
	if err != nil {
		return nil, err
	}
	if err := l.module.BPFLoadObject(); err != nil {
		return nil, fmt.Errorf("load the BPF object: %w", err)
	}
	if l.perf, err = l.module.InitPerfBuf(eventsMap, l.events, l.lost, opts.PerfPages); err != nil {
		return nil, fmt.Errorf("open the perf buffer of %d pages per CPU: %w", opts.PerfPages, err)
	}
	// The hooks first: a kill between the two would have no context.
	for _, hook := range append(hooks, programName) {
		program, err := l.module.GetProgram(hook)
		if err != nil {
			return nil, fmt.Errorf("find program %s: %w", hook, err)
		}
		link, err := program.AttachGeneric()
		if err != nil {
			return nil, fmt.Errorf("attach %s: %w", hook, err)
		}
		l.links = append(l.links, link)
	}
	return l, nil
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

func (l *Loader) setVariables(tier uint32, symbols []symbol) error {
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

// drainTime bounds how long Run waits, when it is told to end, for samples that are still in the perf
// buffer.
const drainTime = 2 * time.Second

// Run hands each sample to handle, in the order in which they arrive, until ctx ends; then it
// detaches the program, reads what is left and returns. handle must not block: while it does, the
// kernel's buffer fills. It may keep the sample.
func (l *Loader) Run(ctx context.Context, handle func(sample []byte)) error {
	l.perf.Poll(int(300 * time.Millisecond / time.Millisecond))
	l.running.Store(true)
	defer l.running.Store(false)

	var refused uint64
	take := func(sample []byte) {
		l.received.Add(1)
		handle(sample)
		if len(l.events) > 0 {
			return
		}
		// Once a burst: what the buffer refused meanwhile. (The kernel's own lost records tell
		// only those after which another sample found room.)
		if stats, err := l.Stats(); err != nil {
			l.log.Error("cannot count refused samples", "error", err)
		} else if stats.Refused > refused {
			l.log.Error("perf buffer refused samples: these kills were not reported",
				"refused", stats.Refused-refused, "total", stats.Refused)
			refused = stats.Refused
		}
	}
	for ctx.Err() == nil {
		select {
		case sample := <-l.events:
			take(sample)
		case <-l.lost: // counted by the program, as refused
		case <-ctx.Done():
		}
	}

	// The main one first: what it still records has its context.
	for _, link := range slices.Backward(l.links) {
		if err := link.Destroy(); err != nil {
			return fmt.Errorf("detach: %w", err)
		}
	}
	deadline := time.NewTimer(drainTime)
	defer deadline.Stop()
	for {
		behind, err := l.behind()
		if err != nil {
			return err
		}
		if behind == 0 {
			break
		}
		select {
		case sample := <-l.events:
			take(sample)
		case <-l.lost: // counted by the program, as refused
		case <-deadline.C:
			return fmt.Errorf("drain the perf buffer: %d samples did not arrive within %s", behind, drainTime)
		}
	}
	l.perf.Stop()
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

// Received is how many samples arrived.
func (l *Loader) Received() uint64 { return l.received.Load() }

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

// Close detaches and unloads the program. Run must have returned.
func (l *Loader) Close() {
	l.closeOnce.Do(func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		if final, err := l.stats(); err == nil {
			l.final = final
		}
		l.module.Close()
		l.module = nil
	})
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
