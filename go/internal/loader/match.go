package loader

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// What can be known of a kernel before the program is loaded into it.
//
// Rule: an access that the kernel's types do not have is no fault where the program asks before (with
// bpf_core_field_exists() and the like, src/core_fixes.bpf.h) and the answer keeps it from being reached.
// The verifier judges in the same way: it never looks at an instruction that cannot be reached.

// CheckRelocations resolves every CO-RE relocation of the embedded object against a kernel's types. It
// returns how many there are, and fails with all those which can be reached and have no answer, each named
// as the C source names it.
//
// It holds for the kernel itself, whatever this machine's. That the verifier takes the program, and that
// its hooks can be attached, only a load can tell.
func CheckRelocations(kernel *btf.Spec) (int, error) {
	collection, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return 0, fmt.Errorf("read the BPF object: %w", err)
	}
	var missing []string
	total := 0
	for _, name := range slices.Sorted(maps.Keys(collection.Programs)) {
		p := program{insns: slices.Clone(collection.Programs[name].Instructions)}
		n, err := p.relocate(kernel, collection.ByteOrder, collection.Types)
		if err != nil {
			return 0, fmt.Errorf("program %s: %w", name, err)
		}
		total += n
		if err := p.reach(); err != nil {
			return 0, fmt.Errorf("program %s: %w", name, err)
		}
		for i := range p.insns {
			if what, ok := p.poison[i]; ok && p.reached[i] && !slices.Contains(missing, what) {
				missing = append(missing, what)
			}
		}
	}
	if len(missing) > 0 {
		return total, fmt.Errorf("the kernel's BTF lacks what the program reads: %s", strings.Join(missing, ", "))
	}
	return total, nil
}

// MissingHooks names the functions that fentry and kprobe hook and that have no entry of their own in a
// kernel's types.
func MissingHooks(kernel *btf.Spec) []string {
	var missing []string
	for _, name := range hookFunctions {
		var f *btf.Func
		if err := kernel.TypeByName(name, &f); err != nil {
			missing = append(missing, name)
		}
	}
	return missing
}

// program is one as it would be loaded, with the functions that it calls behind it.
type program struct {
	insns   asm.Instructions
	poison  map[int]string // by instruction: what it wants and the kernel does not have
	reached []bool
}

// relocate applies the relocations, and returns how many there are.
func (p *program) relocate(kernel *btf.Spec, order binary.ByteOrder, local *btf.Spec) (int, error) {
	var relocations []*btf.CORERelocation
	var at []int
	for i := range p.insns {
		if r := btf.CORERelocationMetadata(&p.insns[i]); r != nil {
			relocations = append(relocations, r)
			at = append(at, i)
		}
	}
	fixups, err := btf.CORERelocate(relocations, []*btf.Spec{kernel}, order, local.TypeID)
	if err != nil {
		return 0, err
	}
	p.poison = map[int]string{}
	for n, i := range at {
		ins := p.insns[i]
		if err := fixups[n].Apply(&ins); err != nil {
			return 0, fmt.Errorf("%s: %w", relocated(relocations[n], local), err)
		}
		if ins.Constant == btf.COREBadRelocationSentinel {
			p.poison[i] = relocated(relocations[n], local)
			continue
		}
		p.insns[i] = ins
	}
	return len(at), nil
}

var relocationText = regexp.MustCompile(`(\w+):"(\w+)"\[([0-9:]+)\], local_id=(\d+)\)$`)

// relocated names what a relocation is of: "struct task_struct.signal". The library has the members on the way as numbers
// only. The program's own name of a type may have a flavour, which says of which kernels it is.
func relocated(r *btf.CORERelocation, local *btf.Spec) string {
	said := r.String()
	m := relocationText.FindStringSubmatch(said)
	if m == nil {
		return said
	}
	id, err := strconv.ParseUint(m[4], 10, 32)
	if err != nil {
		return said
	}
	typ, err := local.TypeByID(btf.TypeID(id))
	if err != nil {
		return said
	}
	var name strings.Builder
	name.WriteString(strings.ToLower(m[1]) + " " + m[2])
	for i, step := range strings.Split(m[3], ":") {
		n, err := strconv.Atoi(step)
		if err != nil {
			return said
		}
		var members []btf.Member
		switch t := btf.UnderlyingType(typ).(type) {
		case *btf.Enum:
			if n < len(t.Values) {
				name.WriteString("." + t.Values[n].Name)
			}
			return name.String()
		case *btf.Array:
			if i > 0 {
				typ = t.Type
				fmt.Fprintf(&name, "[%d]", n)
			}
			continue
		case *btf.Struct:
			members = t.Members
		case *btf.Union:
			members = t.Members
		}
		if i == 0 { // which of an array of such, and it is always the first
			continue
		}
		if n >= len(members) {
			return said
		}
		if members[n].Name != "" {
			name.WriteString("." + members[n].Name)
		}
		typ = members[n].Type
	}
	return name.String()
}

// value is what is known of a register: a number, or nothing.
type value struct {
	known bool
	n     uint64
}

// registers are what is known where an instruction begins. (Of the stack nothing is.)
type registers [asm.R10 + 1]value

// join keeps what is known in both, and reports whether that is less than s knew.
func (s *registers) join(other *registers) (less bool) {
	for i := range s {
		if s[i].known && s[i] != other[i] {
			s[i], less = value{}, true
		}
	}
	return less
}

// reach finds out which instructions can be reached: what a jump compares may be a constant, as the answers
// of the relocations are, and then there is one way to go on.
func (p *program) reach() error {
	index := map[asm.RawInstructionOffset]int{}
	offset := make([]asm.RawInstructionOffset, len(p.insns))
	function := map[string]int{}
	for iter := p.insns.Iterate(); iter.Next(); {
		index[iter.Offset], offset[iter.Index] = iter.Index, iter.Offset
		if symbol := iter.Ins.Symbol(); symbol != "" {
			function[symbol] = iter.Index
		}
	}
	p.reached = make([]bool, len(p.insns))
	states := make([]registers, len(p.insns))
	todo := []int{}
	enter := func(i int, s registers) {
		if !p.reached[i] {
			p.reached[i], states[i] = true, s
		} else if !states[i].join(&s) {
			return
		}
		todo = append(todo, i)
	}
	enter(0, registers{})
	for len(todo) > 0 {
		i := todo[len(todo)-1]
		todo = todo[:len(todo)-1]
		ins, s := &p.insns[i], states[i]
		if _, ok := p.poison[i]; ok {
			continue // nothing runs past it
		}
		next, jump := true, false
		switch op := ins.OpCode; op.Class() {
		case asm.ALUClass, asm.ALU64Class:
			s[ins.Dst] = calculate(ins, &s)
		case asm.LdClass:
			s[ins.Dst] = value{ins.IsConstantLoad(asm.DWord) && ins.Src == asm.R0 && ins.Reference() == "", uint64(ins.Constant)}
		case asm.LdXClass:
			s[ins.Dst] = value{}
		case asm.StXClass:
			if op.Mode() == asm.AtomicMode {
				s[ins.Src], s[asm.R0] = value{}, value{}
			}
		case asm.JumpClass, asm.Jump32Class:
			switch op.JumpOp() {
			case asm.Exit:
				next = false
			case asm.Call:
				if ins.IsFunctionCall() {
					to, ok := function[ins.Reference()]
					if !ok {
						return fmt.Errorf("calls %q, which does not exist", ins.Reference())
					}
					enter(to, registers{})
				}
				for r := asm.R0; r <= asm.R5; r++ {
					s[r] = value{}
				}
			case asm.Ja:
				next, jump = false, true
			default:
				next, jump = branches(ins, &s)
			}
		}
		if next {
			if i+1 == len(p.insns) {
				return errors.New("runs past its end")
			}
			enter(i+1, s)
		}
		if jump {
			to, ok := index[offset[i]+1+asm.RawInstructionOffset(ins.Offset)]
			if !ok {
				return fmt.Errorf("instruction %d jumps to where none begins", i)
			}
			enter(to, s)
		}
	}
	return nil
}

// operands are what an instruction works on, cut to 32 bits where it does so.
func operands(ins *asm.Instruction, s *registers, narrow bool) (a, b uint64, known bool) {
	dst, src := s[ins.Dst], value{true, uint64(ins.Constant)}
	if ins.OpCode.Source() == asm.RegSource {
		src = s[ins.Src]
	}
	if narrow {
		dst.n, src.n = uint64(uint32(dst.n)), uint64(uint32(src.n))
	}
	return dst.n, src.n, dst.known && src.known
}

// The arithmetic and the comparisons that compilers do with answers.
var (
	alu = map[asm.ALUOp]func(a, b uint64) uint64{
		asm.Mov: func(_, b uint64) uint64 { return b },
		asm.Add: func(a, b uint64) uint64 { return a + b },
		asm.Sub: func(a, b uint64) uint64 { return a - b },
		asm.And: func(a, b uint64) uint64 { return a & b },
		asm.Or:  func(a, b uint64) uint64 { return a | b },
		asm.Xor: func(a, b uint64) uint64 { return a ^ b },
		asm.LSh: func(a, b uint64) uint64 { return a << b },
		asm.RSh: func(a, b uint64) uint64 { return a >> b },
	}
	jumps = map[asm.JumpOp]func(a, b uint64) bool{
		asm.JEq:  func(a, b uint64) bool { return a == b },
		asm.JNE:  func(a, b uint64) bool { return a != b },
		asm.JGT:  func(a, b uint64) bool { return a > b },
		asm.JGE:  func(a, b uint64) bool { return a >= b },
		asm.JLT:  func(a, b uint64) bool { return a < b },
		asm.JLE:  func(a, b uint64) bool { return a <= b },
		asm.JSet: func(a, b uint64) bool { return a&b != 0 },
	}
)

func calculate(ins *asm.Instruction, s *registers) value {
	narrow := ins.OpCode.Class() == asm.ALUClass
	a, b, known := operands(ins, s, narrow)
	op := ins.OpCode.ALUOp()
	compute := alu[op]
	if op == asm.Mov {
		known = (ins.OpCode.Source() == asm.ImmSource || s[ins.Src].known) && ins.Offset == 0 // else with a sign
	}
	if !known || compute == nil {
		return value{}
	}
	if shift := op == asm.LSh || op == asm.RSh; shift && narrow {
		b &= 31
	} else if shift {
		b &= 63
	}
	a = compute(a, b)
	if narrow {
		a = uint64(uint32(a))
	}
	return value{true, a}
}

// branches says which ways a conditional jump can go.
func branches(ins *asm.Instruction, s *registers) (next, jump bool) {
	a, b, known := operands(ins, s, ins.OpCode.Class() == asm.Jump32Class)
	compare := jumps[ins.OpCode.JumpOp()]
	if !known || compare == nil {
		return true, true
	}
	jump = compare(a, b)
	return !jump, jump
}
