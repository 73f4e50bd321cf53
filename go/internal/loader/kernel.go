package loader

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf/btf"
)

// Prototype is what the running kernel's mark_victim tracepoint hands over.
type Prototype string

// The prototypes. The kernel changed from the one to the other in v6.9 (commit 72ba14deb40a) and in
// many stable kernels, so the version does not tell.
const (
	PrototypeTask Prototype = "task" // (struct task_struct *, uid_t)
	PrototypePID  Prototype = "pid"  // (int pid)
)

// MarkVictimPrototype reads the tracepoint's prototype from a kernel's BTF.
//
// It fails when the kernel has no such tracepoint, or one of an unknown prototype.
func MarkVictimPrototype(kernel *btf.Spec) (Prototype, error) {
	const name = "btf_trace_mark_victim"
	var typedef *btf.Typedef
	if err := kernel.TypeByName(name, &typedef); err != nil {
		return "", fmt.Errorf("find %s in the kernel's BTF: %w", name, err)
	}
	ptr, ok := btf.As[*btf.Pointer](typedef)
	if !ok {
		return "", fmt.Errorf("%s is not a pointer but %v", name, typedef.Type)
	}
	proto, ok := btf.As[*btf.FuncProto](ptr.Target)
	// The first parameter is the tracepoint's private data.
	if !ok || len(proto.Params) < 2 {
		return "", fmt.Errorf("%s has an unknown prototype %v", name, ptr.Target)
	}
	switch arg := btf.UnderlyingType(proto.Params[1].Type).(type) {
	case *btf.Pointer:
		if s, ok := btf.As[*btf.Struct](arg.Target); ok && s.Name == "task_struct" {
			return PrototypeTask, nil
		}
	case *btf.Int:
		if len(proto.Params) == 2 {
			return PrototypePID, nil
		}
	}
	return "", fmt.Errorf("%s has an unknown prototype %v", name, proto)
}

// frame mirrors enum oom_frame: what a function on the kernel stack proves.
type frame uint32

// The frames, in the order of the enumeration.
const (
	frameKill frame = iota
	frameKillProcess
	frameGroup
	frameOOM
	frameMemcg
	frameSysrq
	framePageAlloc
)

// symbol mirrors struct oom_symbol.
type symbol struct {
	Start uint64 `abi:"start"`
	End   uint64 `abi:"end"`
	Frame frame  `abi:"frame"`
	Pad   uint32 `abi:"pad"`
}

// maxSymbols is OOM_SYMBOLS_MAX.
const maxSymbols = 32

// stackFunctions are the functions that the stack tier knows, all static or global text of
// mm/oom_kill.c, mm/memcontrol.c, mm/page_alloc.c and drivers/tty/sysrq.c.
var stackFunctions = map[string]frame{
	"__oom_kill_process":       frameKill,
	"oom_kill_process":         frameKillProcess,
	"oom_kill_memcg_member":    frameGroup,
	"out_of_memory":            frameOOM,
	"mem_cgroup_out_of_memory": frameMemcg,
	"moom_callback":            frameSysrq,
	"__alloc_pages_slowpath":   framePageAlloc,
	"__alloc_pages_may_oom":    framePageAlloc,
	"pagefault_out_of_memory":  framePageAlloc,
}

// stackRequired are the functions without which the stack proves nothing: were one of them inlined,
// its absence from the stack would be taken for a fact.
var stackRequired = []string{"__oom_kill_process", "oom_kill_process", "out_of_memory", "mem_cgroup_out_of_memory", "__alloc_pages_slowpath"}

// ErrNoStack is wrapped by the error that says why the stack tier is not available.
var ErrNoStack = errors.New("the kernel stack cannot be read as proof")

// stackSymbols finds the address ranges of stackFunctions in the text of /proc/kallsyms. Parts that
// the compiler split off (.cold, .part.0, .constprop.0) count as their function.
func stackSymbols(kallsyms io.Reader) ([]symbol, error) {
	var found []symbol
	var text []uint64
	seen := map[string]bool{}
	scan := bufio.NewScanner(kallsyms)
	for scan.Scan() {
		// address type name [module]
		fields := strings.Fields(scan.Text())
		if len(fields) != 3 || !strings.ContainsAny(fields[1], "tTwW") {
			continue
		}
		address, err := strconv.ParseUint(fields[0], 16, 64)
		if err != nil {
			return nil, fmt.Errorf("read kallsyms: %w", err)
		}
		text = append(text, address)
		name, _, _ := strings.Cut(fields[2], ".")
		kind, ok := stackFunctions[name]
		if !ok {
			continue
		}
		if address == 0 {
			return nil, fmt.Errorf("%w: kallsyms hides its addresses (kernel.kptr_restrict; needs CAP_SYSLOG)", ErrNoStack)
		}
		seen[name] = true
		found = append(found, symbol{Start: address, Frame: kind})
	}
	if err := scan.Err(); err != nil {
		return nil, fmt.Errorf("read kallsyms: %w", err)
	}
	for _, name := range stackRequired {
		if !seen[name] {
			return nil, fmt.Errorf("%w: kallsyms has no %s", ErrNoStack, name)
		}
	}
	if len(found) > maxSymbols {
		return nil, fmt.Errorf("%w: kallsyms has %d parts of the functions, more than %d", ErrNoStack, len(found), maxSymbols)
	}
	slices.Sort(text)
	for i := range found {
		next, _ := slices.BinarySearch(text, found[i].Start+1)
		if next == len(text) {
			return nil, fmt.Errorf("%w: no end of the function at %#x", ErrNoStack, found[i].Start)
		}
		found[i].End = text[next]
	}
	return found, nil
}

// oneMemoryNode reports whether the machine has a single NUMA node with memory, on which neither a
// cpuset nor a memory policy can be the reason of an OOM (constrained_alloc() in mm/oom_kill.c).
func oneMemoryNode(sysfs string) (bool, error) {
	// Documentation/ABI/stable/sysfs-devices-node; absent without CONFIG_NUMA.
	list, err := os.ReadFile(sysfs + "/devices/system/node/has_memory")
	if errors.Is(err, os.ErrNotExist) {
		return true, nil
	}
	if err != nil {
		return false, fmt.Errorf("read the nodes with memory: %w", err)
	}
	return !strings.ContainsAny(strings.TrimSpace(string(list)), ",-"), nil
}

// GFPFlags reads the names of the bits of a gfp mask from the running kernel's BTF: the enumeration of
// ___GFP_*_BIT in include/linux/gfp_types.h, which there is since v6.10. The map is empty where there is
// none, or no BTF.
func GFPFlags() map[int]string {
	names := map[int]string{}
	// An anonymous enumeration can only be found by walking all types, which is not done for nothing.
	raw, err := os.ReadFile("/sys/kernel/btf/vmlinux")
	if err != nil || !bytes.Contains(raw, []byte("___GFP_DMA_BIT\x00")) {
		return names
	}
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		return names
	}
	for typ, err := range kernel.All() {
		if err != nil {
			return names
		}
		enum, ok := typ.(*btf.Enum)
		if !ok || len(enum.Values) == 0 || !strings.HasPrefix(enum.Values[0].Name, "___GFP_") {
			continue
		}
		for _, v := range enum.Values {
			if name, ok := strings.CutSuffix(v.Name, "_BIT"); ok && v.Value < 32 {
				// ___GFP_IO_BIT is what the kernel's own code calls __GFP_IO.
				names[int(v.Value)] = strings.TrimPrefix(name, "_")
			}
		}
		return names
	}
	return names
}
