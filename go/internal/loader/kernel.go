package loader

// #include <malloc.h>
// #include <stdlib.h>
// #include <bpf/bpf.h>
// #include <bpf/btf.h>
import "C"

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strconv"
	"strings"
	"unsafe"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"
)

// Prototype is what the running kernel's mark_victim tracepoint hands over.
type Prototype string

// The prototypes. The kernel changed from the one to the other in v6.9 (commit 72ba14deb40a) and in
// many stable kernels, so the version does not tell.
const (
	PrototypeTask Prototype = "task" // (struct task_struct *, uid_t)
	PrototypePID  Prototype = "pid"  // (int pid)
)

// MarkVictimPrototype reads the tracepoint's prototype from a kernel's BTF. It fails when there is none, or an unknown one.
func MarkVictimPrototype(kernel *btf.Spec) (Prototype, error) {
	const name = "btf_trace_mark_victim"
	var typedef *btf.Typedef
	if err := kernel.TypeByName(name, &typedef); err != nil {
		return "", fmt.Errorf("find %s in the kernel's BTF: %w", name, err)
	}
	var proto *btf.FuncProto
	if ptr, ok := btf.As[*btf.Pointer](typedef); ok {
		proto, _ = btf.As[*btf.FuncProto](ptr.Target)
	}
	if proto != nil && len(proto.Params) > 1 { // the first is the tracepoint's private data
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
	}
	return "", fmt.Errorf("%s has an unknown prototype %v", name, typedef.Type)
}

// checkFentry reports whether the kernel takes programs for fentry: nil, or why not. It loads one that does nothing. The
// attempt with all hooks costs much more, for libbpf first reads all of the kernel's types.
func checkFentry(kernel *btf.Spec) error {
	var function *btf.Func
	err := kernel.TypeByName(hookFunctions[0], &function)
	var id btf.TypeID
	if err == nil {
		id, err = kernel.TypeID(function)
	}
	if err != nil {
		return fmt.Errorf("find %s in the kernel's BTF: %w", hookFunctions[0], err)
	}
	opts := C.struct_bpf_prog_load_opts{sz: C.sizeof_struct_bpf_prog_load_opts, expected_attach_type: C.BPF_TRACE_FENTRY, attach_btf_id: C.__u32(id)}
	nothing := [...]C.struct_bpf_insn{{code: C.BPF_ALU64 | C.BPF_MOV | C.BPF_K}, {code: C.BPF_JMP | C.BPF_EXIT}} // r0 = 0; exit
	license := C.CString("GPL")
	defer C.free(unsafe.Pointer(license))
	fd := C.bpf_prog_load(C.BPF_PROG_TYPE_TRACING, nil, license, &nothing[0], C.size_t(len(nothing)), &opts)
	if fd < 0 {
		return fmt.Errorf("load a program for fentry: %w", unix.Errno(-fd))
	}
	return unix.Close(int(fd))
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

// stackFunction is what the stack tier knows of one function of the kernel: the function and, where a compiler has inlined it
// everywhere, so that it has no address, the functions that it is inlined into. The first row of which kallsyms has one counts.
type stackFunction struct {
	rows     []stackRow
	required bool // the stack proves nothing without it
}

type stackRow struct {
	frame frame
	names []string
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
	{required: true, rows: []stackRow{{frameKill, []string{"__oom_kill_process"}}, {frameKillProcess, []string{"oom_kill_process"}}}},
	{rows: []stackRow{{frameGroup, []string{"oom_kill_memcg_member"}}}},
	{required: true, rows: []stackRow{{frameOOM, []string{"out_of_memory"}}}},
	{required: true, rows: []stackRow{
		{frameMemcg, []string{"mem_cgroup_out_of_memory"}},
		{frameMemcg, []string{"mem_cgroup_oom", "try_charge", "try_charge_memcg", "mem_cgroup_oom_synchronize", "memory_max_write"}},
	}},
	{rows: []stackRow{{frameSysrq, []string{"moom_callback"}}}},
	{required: true, rows: []stackRow{
		{framePageAlloc, []string{"__alloc_pages_may_oom"}},
		{framePageAlloc, []string{"__alloc_pages_slowpath"}},
		// The entry of the allocator: before v5.13, before v6.10, since then, since v6.14.
		{framePageAlloc, []string{"__alloc_pages_nodemask", "__alloc_pages", "__alloc_pages_noprof", "__alloc_frozen_pages_noprof"}},
	}},
	{rows: []stackRow{{framePageAlloc, []string{"pagefault_out_of_memory"}}}},
	{rows: []stackRow{{frameKswapd, []string{"kswapd"}}}},
}

// ErrNoStack is wrapped by the error that says why there is no tier stack; ErrHidden, if kallsyms hides its addresses.
var (
	ErrNoStack = errors.New("the kernel stack cannot be read as proof")
	ErrHidden  = fmt.Errorf("%w: kallsyms hides its addresses (kernel.kptr_restrict; needs CAP_SYSLOG)", ErrNoStack)
)

// stackSymbols finds the address ranges of stackFunctions in the text of /proc/kallsyms. Parts that
// the compiler split off (.cold, .part.0, .constprop.0) count as their function.
//
// The kernel's own symbols come first and in the order of their addresses (scripts/kallsyms.c), so a function ends
// where the next one begins. There are some 200,000 lines.
func stackSymbols(kallsyms io.Reader) ([]symbol, error) {
	found := map[string][]*symbol{} // of each name that stackFunctions has
	for _, f := range stackFunctions {
		for _, row := range f.rows {
			for _, name := range row.names {
				found[name] = nil
			}
		}
	}
	var open []*symbol // whose end is not known yet
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
		for len(open) > 0 && open[0].Start < address {
			open[0].End = address
			open = open[1:]
		}
		name, _, _ = bytes.Cut(name, []byte("."))
		parts, ok := found[string(name)]
		if !ok {
			continue
		}
		if address == 0 {
			return nil, ErrHidden
		}
		s := &symbol{Start: address}
		found[string(name)], open = append(parts, s), append(open, s)
	}
	if err := scan.Err(); err != nil {
		return nil, fmt.Errorf("read kallsyms: %w", err)
	}
	if len(open) > 0 {
		return nil, fmt.Errorf("%w: no end of the function at %#x", ErrNoStack, open[0].Start)
	}
	var symbols []symbol
	var missing []string
	for _, f := range stackFunctions {
		before := len(symbols)
		for _, row := range f.rows {
			for _, name := range row.names {
				for _, s := range found[name] {
					symbols = append(symbols, symbol{Start: s.Start, End: s.End, Frame: row.frame})
				}
			}
			if len(symbols) > before {
				break
			}
		}
		if f.required && len(symbols) == before {
			missing = append(missing, f.rows[0].names[0])
		}
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

// GFPFlags reads the names of the bits of a gfp mask from the running kernel's BTF: ___GFP_*_BIT in include/linux/gfp_types.h,
// since v6.10. The map is empty where there are none, or no BTF.
func GFPFlags() map[int]string {
	limitHeap()
	return gfpFlags("/sys/kernel/btf/vmlinux")
}

// gfpFlags finds the enumeration, which has no name, by its first value. cilium's library makes 20 MB of garbage of it.
func gfpFlags(file string) map[int]string {
	path := C.CString(file)
	defer C.free(unsafe.Pointer(path))
	types := C.btf__parse_raw(path)
	if types == nil {
		return nil
	}
	defer C.btf__free(types)
	name := func(offset C.__u32) string { return C.GoString(C.btf__name_by_offset(types, offset)) }
	for id := range C.btf__type_cnt(types) {
		t := C.btf__type_by_id(types, id)
		n := t.info & 0xffff // struct btf_type: the kind in bits 24 to 28, the number of values in bits 0 to 15
		if t.info>>24&0x1f != C.BTF_KIND_ENUM || n == 0 {
			continue
		}
		values := unsafe.Slice(C.btf_enum(t), n)
		if name(values[0].name_off) != "___GFP_DMA_BIT" {
			continue
		}
		flags := map[int]string{}
		for _, v := range values {
			// ___GFP_IO_BIT is what the kernel's own code calls __GFP_IO.
			if flag, ok := strings.CutSuffix(name(v.name_off), "_BIT"); ok && v.val < 32 {
				flags[int(v.val)] = strings.TrimPrefix(flag, "_")
			}
		}
		return flags
	}
	return nil
}

// libbpf reads all of the kernel's types, 5 to 10 MB, and glibc keeps what libbpf has freed.

// limitHeap lets glibc unmap freed big blocks. Without it the first one raises the threshold to its size (mallopt(3)).
func limitHeap() {
	C.mallopt(C.M_ARENA_MAX, 1)
	C.mallopt(C.M_MMAP_THRESHOLD, 128<<10)
}

func trimHeap() { C.malloc_trim(0) }

// giveBack does the same, and with the garbage that the start has left in Go's heap.
func giveBack() {
	trimHeap()
	debug.FreeOSMemory()
}
