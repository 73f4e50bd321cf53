package loader

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
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
	frameKswapd
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

// stackFunction is what the stack tier knows of one function of the kernel.
type stackFunction struct {
	frame frame
	// names are the function and, where a compiler has inlined it everywhere, so that it has no address, the
	// functions that it is inlined into. The first row of which kallsyms has one counts.
	names [][]string
	// instead is used where kallsyms has none of the names.
	instead *stackFunction
	// required: the stack proves nothing without it.
	required bool
}

// stackFunctions are the functions that the stack tier knows. Among them are all those that call
// out_of_memory() in Linux 5.10 to 7.2:
//
//   - mem_cgroup_out_of_memory() (mm/memcontrol.c), which mem_cgroup_oom() calls, that is try_charge(),
//     try_charge_memcg() since v5.13, and mem_cgroup_oom_synchronize() and memory_max_write();
//   - moom_callback() (drivers/tty/sysrq.c), which is a work function;
//   - __alloc_pages_may_oom() (mm/page_alloc.c), which is inlined into __alloc_pages_slowpath(), and that on arm64 into
//     the allocator's entry;
//   - pagefault_out_of_memory() (mm/oom_kill.c), until v5.16;
//   - lru_gen_age_node() (mm/vmscan.c) since v6.1, which only kswapd() runs, a thread function. kswapd itself
//     never runs out of memory (PF_MEMALLOC).
//
// The one that is nearest to out_of_memory() decides. A caller that is not among them proves nothing.
//
// Where __oom_kill_process() is inlined, oom_kill_process() is either a kill or the mark of a task that is exiting.
// Its absence from the stack still proves such a mark by out_of_memory() itself.
var stackFunctions = []stackFunction{
	{frame: frameKill, names: [][]string{{"__oom_kill_process"}}, required: true,
		instead: &stackFunction{frame: frameKillProcess, names: [][]string{{"oom_kill_process"}}}},
	{frame: frameGroup, names: [][]string{{"oom_kill_memcg_member"}}},
	{frame: frameOOM, names: [][]string{{"out_of_memory"}}, required: true},
	{frame: frameMemcg, names: [][]string{
		{"mem_cgroup_out_of_memory"},
		{"mem_cgroup_oom", "try_charge", "try_charge_memcg", "mem_cgroup_oom_synchronize", "memory_max_write"},
	}, required: true},
	{frame: frameSysrq, names: [][]string{{"moom_callback"}}},
	{frame: framePageAlloc, names: [][]string{
		{"__alloc_pages_may_oom"},
		{"__alloc_pages_slowpath"},
		// The entry of the allocator: before v5.13, before v6.10, since then, since v6.14.
		{"__alloc_pages_nodemask", "__alloc_pages", "__alloc_pages_noprof", "__alloc_frozen_pages_noprof"},
	}, required: true},
	{frame: framePageAlloc, names: [][]string{{"pagefault_out_of_memory"}}},
	{frame: frameKswapd, names: [][]string{{"kswapd"}}},
}

// stackNames are all names of stackFunctions.
func stackNames() map[string]bool {
	names := map[string]bool{}
	for _, f := range stackFunctions {
		for f := &f; f != nil; f = f.instead {
			for _, row := range f.names {
				for _, name := range row {
					names[name] = true
				}
			}
		}
	}
	return names
}

// choose returns the symbols of a function, none where kallsyms has none of its names.
func (f *stackFunction) choose(found map[string][]symbol) []symbol {
	for ; f != nil; f = f.instead {
		for _, row := range f.names {
			var chosen []symbol
			for _, name := range row {
				for _, s := range found[name] {
					s.Frame = f.frame
					chosen = append(chosen, s)
				}
			}
			if len(chosen) > 0 {
				return chosen
			}
		}
	}
	return nil
}

// ErrNoStack is wrapped by the error that says why the stack tier is not available.
var ErrNoStack = errors.New("the kernel stack cannot be read as proof")

// stackSymbols finds the address ranges of stackFunctions in the text of /proc/kallsyms. Parts that
// the compiler split off (.cold, .part.0, .constprop.0) count as their function.
//
// The kernel's own symbols come first and in the order of their addresses (scripts/kallsyms.c), so a function ends
// where the next one begins. There are some 200,000 lines.
func stackSymbols(kallsyms io.Reader) ([]symbol, error) {
	type part struct {
		name string
		symbol
	}
	var parts []part
	open := 0 // index in parts of the first one whose end is not known yet
	names := stackNames()
	scan := bufio.NewScanner(kallsyms)
	for scan.Scan() {
		// address type name, and behind a tab [module].
		number, rest, _ := bytes.Cut(scan.Bytes(), []byte(" "))
		kindOf, name, _ := bytes.Cut(rest, []byte(" "))
		if bytes.IndexByte(name, '\t') >= 0 {
			break
		}
		if len(kindOf) != 1 || bytes.IndexByte([]byte("tTwW"), kindOf[0]) < 0 {
			continue
		}
		address, err := strconv.ParseUint(string(number), 16, 64)
		if err != nil {
			return nil, fmt.Errorf("read kallsyms: %w", err)
		}
		for open < len(parts) && parts[open].Start < address {
			parts[open].End = address
			open++
		}
		name, _, _ = bytes.Cut(name, []byte("."))
		if !names[string(name)] {
			continue
		}
		if address == 0 {
			return nil, fmt.Errorf("%w: kallsyms hides its addresses (kernel.kptr_restrict; needs CAP_SYSLOG)", ErrNoStack)
		}
		parts = append(parts, part{string(name), symbol{Start: address}})
	}
	if err := scan.Err(); err != nil {
		return nil, fmt.Errorf("read kallsyms: %w", err)
	}
	if open < len(parts) {
		return nil, fmt.Errorf("%w: no end of the function at %#x", ErrNoStack, parts[open].Start)
	}
	found := map[string][]symbol{}
	for _, p := range parts {
		found[p.name] = append(found[p.name], p.symbol)
	}
	var symbols []symbol
	var missing []string
	for _, f := range stackFunctions {
		chosen := f.choose(found)
		if f.required && len(chosen) == 0 {
			missing = append(missing, f.names[0][0])
		}
		symbols = append(symbols, chosen...)
	}
	if len(missing) > 0 {
		return nil, fmt.Errorf("%w: kallsyms has no %s, nor what it may be inlined into", ErrNoStack, strings.Join(missing, ", no "))
	}
	if len(symbols) > maxSymbols {
		return nil, fmt.Errorf("%w: kallsyms has %d parts of the functions, more than %d", ErrNoStack, len(symbols), maxSymbols)
	}
	return symbols, nil
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
	raw, err := os.ReadFile("/sys/kernel/btf/vmlinux")
	if err != nil {
		return nil
	}
	return gfpFlags(raw)
}

// gfpFlags finds the enumeration in raw BTF (Documentation/bpf/btf.rst) by its first value. It has no name, so
// a library would have to decode all types to find it.
func gfpFlags(raw []byte) map[int]string {
	u32 := func(b []byte) uint32 { return binary.NativeEndian.Uint32(b) }
	const headerSize, typeSize, enumSize = 24, 12, 8
	if len(raw) < headerSize {
		return nil
	}
	// struct btf_header: magic, version, flags, hdr_len, type_off, type_len, str_off, str_len.
	header, body := raw[:headerSize], raw[min(u32(raw[4:]), uint32(len(raw))):]
	section := func(at int) []byte {
		off, size := uint64(u32(header[at:])), uint64(u32(header[at+4:]))
		if off+size > uint64(len(body)) {
			return nil
		}
		return body[off : off+size]
	}
	types, text := section(8), section(16)
	first := bytes.Index(text, []byte("\x00___GFP_DMA_BIT\x00")) + 1
	if first == 0 {
		return nil
	}
	for len(types) >= typeSize {
		// struct btf_type: name_off, info (kind in bits 24 to 28, vlen in bits 0 to 15), size or type.
		info := u32(types[4:])
		kind, n := info>>24&0x1f, int(info&0xffff)
		types = types[typeSize:]
		size, known := btfExtra(kind, n)
		if !known || size > len(types) {
			return nil
		}
		if kind == btfKindEnum && n > 0 && u32(types) == uint32(first) {
			names := map[int]string{}
			for ; n > 0; n-- {
				name, _, _ := bytes.Cut(text[min(u32(types), uint32(len(text))):], []byte{0})
				// ___GFP_IO_BIT is what the kernel's own code calls __GFP_IO.
				if name, ok := strings.CutSuffix(string(name), "_BIT"); ok && u32(types[4:]) < 32 {
					names[int(u32(types[4:]))] = strings.TrimPrefix(name, "_")
				}
				types = types[enumSize:]
			}
			return names
		}
		types = types[size:]
	}
	return nil
}

const btfKindEnum = 6

// btfExtra is how many bytes follow a struct btf_type.
func btfExtra(kind uint32, n int) (size int, known bool) {
	switch kind {
	case 1, 14, 17: // INT, VAR, DECL_TAG
		return 4, true
	case 3: // ARRAY
		return 12, true
	case 4, 5, 15, 19: // STRUCT, UNION, DATASEC, ENUM64
		return 12 * n, true
	case btfKindEnum, 13: // FUNC_PROTO
		return 8 * n, true
	case 2, 7, 8, 9, 10, 11, 12, 16, 18: // PTR, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT, FUNC, FLOAT, TYPE_TAG
		return 0, true
	}
	return 0, false
}
