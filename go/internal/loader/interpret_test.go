package loader

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"

	"github.com/oom-tracer/oom-tracer/go/internal/wire"
)

// The program, relocated to a kernel's types and run by an interpreter on a memory that is laid out by them. So it can
// be tried on kernels that are not here, and on such as nobody has built.

// interpreter runs one program.
type interpreter struct {
	insns   asm.Instructions
	poison  map[int]string
	t       *testing.T
	kernel  *btf.Spec
	index   map[asm.RawInstructionOffset]int
	offset  []asm.RawInstructionOffset
	entry   map[string]int
	memory  [][]byte          // the region of address a is memory[a>>32-1]
	values  map[string]uint64 // the values of a map, by its name
	handles map[string]uint64 // its struct bpf_array
	specs   map[string]*ebpf.MapSpec
	current uint64 // struct task_struct
	thread  uint64 // pid_tgid
}

// cpuStride is how far the parts of two CPUs of a percpu allocation lie apart.
const cpuStride = 1 << 12

// newInterpreter loads a program of the embedded object for a kernel's types, with constants set.
func newInterpreter(t *testing.T, name string, kernel *btf.Spec, constants map[string]any) *interpreter {
	t.Helper()
	collection, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		t.Fatal(err)
	}
	m := &interpreter{
		t: t, kernel: kernel, specs: collection.Maps, index: map[asm.RawInstructionOffset]int{}, entry: map[string]int{},
		values: map[string]uint64{}, handles: map[string]uint64{},
	}
	m.insns = collection.Programs[name].Instructions
	if _, m.poison, err = relocate(m.insns, kernel, collection); err != nil {
		t.Fatal(err)
	}
	m.offset = make([]asm.RawInstructionOffset, len(m.insns))
	for iter := m.insns.Iterate(); iter.Next(); {
		m.index[iter.Offset], m.offset[iter.Index] = iter.Index, iter.Offset
		if symbol := iter.Ins.Symbol(); symbol != "" {
			m.entry[symbol] = iter.Index
		}
	}
	for _, name := range slices.Sorted(maps.Keys(collection.Maps)) {
		spec := collection.Maps[name]
		m.values[name] = m.allocate(int(max(spec.MaxEntries, 2)*max(spec.ValueSize, cpuStride)) + 2*cpuStride)
		m.handles[name] = m.object("bpf_array")
		m.set(m.handles[name], "bpf_array", "pptrs", m.values[name])
		if len(spec.Contents) > 0 { // a data section
			copy(m.bytes(m.values[name], int(spec.ValueSize)), spec.Contents[0].Value.([]byte))
		}
	}
	for name, value := range constants {
		v := collection.Variables[name]
		if err := v.Set(value); err != nil {
			t.Fatal(err)
		}
		copy(m.bytes(m.values[v.SectionName]+uint64(v.Offset), len(v.Value)), v.Value)
	}
	return m
}

// allocate makes a region of zeros.
func (m *interpreter) allocate(size int) (address uint64) {
	m.memory = append(m.memory, make([]byte, size))
	return uint64(len(m.memory)) << 32
}

// bytes are those at an address, nil where there is no memory.
func (m *interpreter) bytes(address uint64, size int) []byte {
	region, at := address>>32, int(address&(1<<32-1))
	if region < 1 || region > uint64(len(m.memory)) || at+size > len(m.memory[region-1]) {
		return nil
	}
	return m.memory[region-1][at:][:size]
}

// object allocates a struct of the kernel. What stands behind it in a larger one of the test has room too.
func (m *interpreter) object(name string) uint64 { return m.allocate(m.size(name) + 1024) }

func (m *interpreter) size(name string) int {
	m.t.Helper()
	typ, err := m.kernel.AnyTypeByName(name)
	if err != nil {
		m.t.Fatal(err)
	}
	size, err := btf.Sizeof(typ)
	if err != nil {
		m.t.Fatal(err)
	}
	return size
}

// member finds a member, also in anonymous ones.
func member(typ btf.Type, name string) (offset uint32, of btf.Type, ok bool) {
	var members []btf.Member
	switch s := btf.UnderlyingType(typ).(type) {
	case *btf.Struct:
		members = s.Members
	case *btf.Union:
		members = s.Members
	}
	for _, one := range members {
		if one.Name == name {
			return one.Offset.Bytes(), one.Type, true
		}
		if one.Name == "" {
			if inner, of, ok := member(one.Type, name); ok {
				return one.Offset.Bytes() + inner, of, true
			}
		}
	}
	return 0, nil, false
}

// at is the offset of a member, such as "memory.usage".
func (m *interpreter) at(name, path string) uint64 {
	m.t.Helper()
	typ, err := m.kernel.AnyTypeByName(name)
	if err != nil {
		m.t.Fatal(err)
	}
	sum := uint64(0)
	for _, step := range strings.Split(path, ".") {
		offset, of, ok := member(typ, step)
		if !ok {
			m.t.Fatalf("%s has no %s", name, path)
		}
		sum, typ = sum+uint64(offset), of
	}
	return sum
}

// set writes a member of at most eight bytes, and put any bytes.
func (m *interpreter) set(object uint64, name, path string, value uint64) {
	m.t.Helper()
	m.put(object+m.at(name, path), value)
}

func (m *interpreter) put(address, value uint64) {
	m.t.Helper()
	to := m.bytes(address, 8)
	if to == nil {
		m.t.Fatalf("no memory at %#x", address)
	}
	binary.NativeEndian.PutUint64(to, value)
}

// run runs the program with its context.
func (m *interpreter) run(context []uint64) {
	m.t.Helper()
	ctx := m.allocate(8 * len(context))
	for i, value := range context {
		m.put(ctx+8*uint64(i), value)
	}
	if _, err := m.call(0, [5]uint64{ctx}); err != nil {
		m.t.Fatal(err)
	}
}

// call runs from an instruction to the exit.
func (m *interpreter) call(i int, arguments [5]uint64) (uint64, error) {
	const stack = 512
	var r [asm.R10 + 1]uint64
	copy(r[asm.R1:], arguments[:])
	r[asm.R10] = m.allocate(stack) + stack
	for steps := 0; ; steps++ {
		if steps > 1_000_000 {
			return 0, fmt.Errorf("instruction %d: no end", i)
		}
		ins := &m.insns[i]
		if what, ok := m.poison[i]; ok {
			return 0, fmt.Errorf("instruction %d reads %s, which this kernel lacks", i, what)
		}
		next := i + 1
		operand := uint64(ins.Constant)
		op := ins.OpCode
		if op.Class().IsALU() || op.Class().IsJump() {
			if op.Source() == asm.RegSource {
				operand = r[ins.Src]
			}
		}
		jump := false
		switch op.Class() {
		case asm.ALUClass, asm.ALU64Class:
			result, err := arithmetic(ins, r[ins.Dst], operand)
			if err != nil {
				return 0, fmt.Errorf("instruction %d: %w", i, err)
			}
			r[ins.Dst] = result
		case asm.LdClass:
			switch reference := ins.Reference(); {
			case reference == "":
				r[ins.Dst] = uint64(ins.Constant)
			case ins.Src == asm.PseudoMapValue:
				r[ins.Dst] = m.values[reference] + uint64(ins.Constant)>>32
			default:
				r[ins.Dst] = m.handles[reference]
			}
		case asm.LdXClass:
			from := m.bytes(r[ins.Src]+uint64(int64(ins.Offset)), op.Size().Sizeof())
			if from == nil {
				return 0, fmt.Errorf("instruction %d: %v: no memory at %#x", i, ins, r[ins.Src])
			}
			var value [8]byte
			copy(value[:], from)
			r[ins.Dst] = binary.LittleEndian.Uint64(value[:])
		case asm.StClass, asm.StXClass:
			to := m.bytes(r[ins.Dst]+uint64(int64(ins.Offset)), op.Size().Sizeof())
			if to == nil || op.Mode() == asm.AtomicMode {
				return 0, fmt.Errorf("instruction %d: %v: cannot write to %#x", i, ins, r[ins.Dst])
			}
			value := uint64(ins.Constant)
			if op.Class() == asm.StXClass {
				value = r[ins.Src]
			}
			var b [8]byte
			binary.LittleEndian.PutUint64(b[:], value)
			copy(to, b[:])
		case asm.JumpClass:
			switch {
			case op.JumpOp() == asm.Exit:
				return r[asm.R0], nil
			case ins.IsFunctionCall():
				result, err := m.call(m.entry[ins.Reference()], [5]uint64(r[asm.R1:]))
				if err != nil {
					return 0, fmt.Errorf("%s: %w", ins.Reference(), err)
				}
				r[asm.R0] = result
			case op.JumpOp() == asm.Call:
				result, err := m.help(asm.BuiltinFunc(ins.Constant), [5]uint64(r[asm.R1:]))
				if err != nil {
					return 0, fmt.Errorf("instruction %d: %w", i, err)
				}
				r[asm.R0] = result
			case op.JumpOp() == asm.Ja:
				jump = true
			default:
				jump = compare(op.JumpOp(), r[ins.Dst], operand)
			}
		default:
			return 0, fmt.Errorf("instruction %d: %v is not known", i, ins)
		}
		if jump {
			next = m.index[m.offset[i]+1+asm.RawInstructionOffset(ins.Offset)]
		}
		i = next
	}
}

func arithmetic(ins *asm.Instruction, a, b uint64) (uint64, error) {
	bits := uint64(64)
	if ins.OpCode.Class() == asm.ALUClass {
		a, b, bits = uint64(uint32(a)), uint64(uint32(b)), 32
	}
	switch ins.OpCode.ALUOp() {
	case asm.Mov:
		a = b
	case asm.Add:
		a += b
	case asm.Sub:
		a -= b
	case asm.Mul:
		a *= b
	case asm.And:
		a &= b
	case asm.Or:
		a |= b
	case asm.Xor:
		a ^= b
	case asm.LSh:
		a <<= b & (bits - 1)
	case asm.RSh:
		a >>= b & (bits - 1)
	case asm.ArSh:
		if bits == 32 {
			a = uint64(int32(a) >> (b & 31))
		} else {
			a = uint64(int64(a) >> (b & 63))
		}
	case asm.Neg:
		a = -a
	default:
		return 0, fmt.Errorf("%v is not known", ins)
	}
	if bits == 32 {
		a = uint64(uint32(a))
	}
	return a, nil
}

func compare(op asm.JumpOp, a, b uint64) bool {
	switch op {
	case asm.JEq:
		return a == b
	case asm.JNE:
		return a != b
	case asm.JGT:
		return a > b
	case asm.JGE:
		return a >= b
	case asm.JLT:
		return a < b
	case asm.JLE:
		return a <= b
	case asm.JSet:
		return a&b != 0
	case asm.JSGT:
		return int64(a) > int64(b)
	case asm.JSGE:
		return int64(a) >= int64(b)
	case asm.JSLT:
		return int64(a) < int64(b)
	case asm.JSLE:
		return int64(a) <= int64(b)
	}
	panic(op)
}

// help is the kernel's helpers.
func (m *interpreter) help(f asm.BuiltinFunc, r [5]uint64) (uint64, error) {
	const fault = ^uint64(14 - 1) // -EFAULT
	switch f {
	case asm.FnMapLookupElem:
		for name, handle := range m.handles {
			if handle == r[0] {
				key := binary.NativeEndian.Uint32(m.bytes(r[1], 4))
				return m.values[name] + uint64(key)*uint64(m.specs[name].ValueSize), nil
			}
		}
		return 0, fmt.Errorf("no map at %#x", r[0])
	case asm.FnMapLookupPercpuElem:
		for name, handle := range m.handles {
			if handle == r[0] {
				return m.values[name] + r[2]*cpuStride, nil
			}
		}
		return 0, fmt.Errorf("no map at %#x", r[0])
	case asm.FnProbeReadKernel:
		to, from := m.bytes(r[0], int(r[1])), m.bytes(r[2], int(r[1]))
		if to == nil {
			return 0, fmt.Errorf("no memory at %#x", r[0])
		}
		if clear(to); from == nil {
			return fault, nil
		}
		copy(to, from)
		return 0, nil
	case asm.FnProbeReadKernelStr:
		to := m.bytes(r[0], int(r[1]))
		for i := range to {
			from := m.bytes(r[2]+uint64(i), 1)
			if from == nil {
				return fault, nil
			}
			if to[i] = from[0]; from[0] == 0 {
				return uint64(i + 1), nil
			}
		}
		to[len(to)-1] = 0
		return uint64(len(to)), nil
	case asm.FnGetCurrentTask:
		return m.current, nil
	case asm.FnGetCurrentPidTgid:
		return m.thread, nil
	case asm.FnKtimeGetBootNs:
		return 1e9, nil
	case asm.FnGetCurrentComm:
		clear(m.bytes(r[0], int(r[1])))
		return 0, nil
	}
	return 0, fmt.Errorf("%v is not known", f)
}

// structOf is a struct of a kernel, to be changed in place.
func structOf(t *testing.T, kernel *btf.Spec, name string) (s *btf.Struct) {
	t.Helper()
	if err := kernel.TypeByName(name, &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// behind moves the members of a struct from a first one on, so that it becomes larger.
func behind(s *btf.Struct, first string, bytes uint32) {
	moved := false
	for i := range s.Members {
		if moved = moved || s.Members[i].Name == first; moved {
			s.Members[i].Offset += btf.Bits(8 * bytes)
		}
	}
	s.Size += bytes
}

// Arrays of kernel structs are walked by the size that their elements have in the kernel that runs, not in vmlinux.h.
func TestArraysOfOtherSizes(t *testing.T) {
	for _, test := range []struct {
		name   string
		change func(*btf.Spec)
		old    bool
	}{
		{"this machine's", func(*btf.Spec) {}, false},
		{"larger, as with DEBUG_SPINLOCK", func(kernel *btf.Spec) {
			behind(structOf(t, kernel, "percpu_counter"), "count", 24)
		}, false},
		{"smaller, as without HOTPLUG_CPU", func(kernel *btf.Spec) {
			s := structOf(t, kernel, "percpu_counter")
			s.Members = slices.DeleteFunc(s.Members, func(m btf.Member) bool { return m.Name == "list" })
			for i := range s.Members {
				if s.Members[i].Name == "counters" {
					s.Members[i].Offset = 16 * 8
				}
			}
			s.Size = 24
		}, false},
		{"larger upid", func(kernel *btf.Spec) { behind(structOf(t, kernel, "upid"), "nr", 8) }, false},
		{"before v6.2", func(kernel *btf.Spec) {
			var long *btf.Typedef
			if err := kernel.TypeByName("atomic_long_t", &long); err != nil {
				t.Fatal(err)
			}
			replaceMember(structOf(t, kernel, "mm_struct"), "rss_stat", &btf.Struct{Name: "mm_rss_stat", Size: 32, Members: []btf.Member{{
				Name: "count", Type: &btf.Array{Type: long, Index: &btf.Int{Name: "int", Size: 4}, Nelems: 4},
			}}})
		}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			kernel := machineBTF(t)
			test.change(kernel)
			m := newInterpreter(t, programName, kernel, map[string]any{"oom_nr_cpus": uint32(2), "oom_segments": uint32(2)})
			task, pid, mm := m.object("task_struct"), m.object("pid"), m.object("mm_struct")
			m.current = m.object("task_struct")
			m.set(task, "task_struct", "group_leader", task)
			m.set(task, "task_struct", "thread_pid", pid)
			m.set(task, "task_struct", "mm", mm)
			m.set(pid, "pid", "level", 2)
			for level := range 3 {
				upid := pid + m.at("pid", "numbers") + uint64(level*m.size("upid"))
				m.set(upid, "upid", "nr", 7000+uint64(level))
			}
			var want [4]uint64
			counters := m.values["oom_percpu"] + 64
			for i := range want {
				if want[i] = 1000 * uint64(i+1); test.old {
					m.put(mm+m.at("mm_struct", "rss_stat.count")+uint64(i*m.size("atomic_long_t")), want[i])
					continue
				}
				counter := mm + m.at("mm_struct", "rss_stat") + uint64(i*m.size("percpu_counter"))
				m.set(counter, "percpu_counter", "count", want[i])
				m.set(counter, "percpu_counter", "counters", counters+uint64(4*i))
			}
			if !test.old {
				for i := range want {
					for cpu := range 2 {
						part := uint32(10*i + cpu + 1)
						binary.NativeEndian.PutUint32(m.bytes(counters+uint64(cpu*cpuStride+4*i), 4), part)
						want[i] += uint64(part)
					}
				}
			}
			m.run([]uint64{task, 0})

			var header wire.Header
			record := m.bytes(m.values[journalMap]+segmentHeader, int(unsafe.Sizeof(header)))
			if _, err := binary.Decode(record, binary.NativeEndian, &header); err != nil {
				t.Fatal(err)
			}
			if header.Seq != 1 || header.Victim.NSTGID != 7002 || header.Memory.RSS != want {
				t.Errorf("seq %d, PID in its namespace %d, RSS %v; want 1, 7002, %v", header.Seq, header.Victim.NSTGID, header.Memory.RSS, want)
			}
			if exact := header.Flags&(1<<2) != 0; exact == test.old {
				t.Errorf("exact: %t", exact)
			}
		})
	}
}

func replaceMember(s *btf.Struct, name string, typ btf.Type) {
	for i := range s.Members {
		if s.Members[i].Name == name {
			s.Members[i].Type = typ
		}
		if inner, ok := s.Members[i].Type.(*btf.Struct); ok && s.Members[i].Name == "" {
			replaceMember(inner, name, typ)
		}
	}
}
