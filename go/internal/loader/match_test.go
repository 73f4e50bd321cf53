package loader

import (
	"bytes"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
)

// machineBTF is this machine's kernel, from the file: changes to it are seen by nobody else.
func machineBTF(t *testing.T) *btf.Spec {
	t.Helper()
	spec, err := btf.LoadSpec("/sys/kernel/btf/vmlinux")
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

// without takes members out of a struct, or a value out of an enumeration, and writes the kernel's types
// anew as the kernel would.
func without(t *testing.T, typ string, names ...string) *btf.Spec {
	t.Helper()
	spec := machineBTF(t)
	removed := 0
	drop := func(name string) bool {
		if slices.Contains(names, name) {
			removed++
			return true
		}
		return false
	}
	var dropFrom func(*btf.Struct)
	dropFrom = func(c *btf.Struct) {
		c.Members = slices.DeleteFunc(c.Members, func(m btf.Member) bool { return drop(m.Name) })
		for _, m := range c.Members {
			if inner, ok := m.Type.(*btf.Struct); ok && m.Name == "" {
				dropFrom(inner)
			}
		}
	}
	var types []btf.Type
	for all, err := range spec.All() {
		if err != nil {
			t.Fatal(err)
		}
		switch c := all.(type) {
		case *btf.Struct:
			if c.Name == typ {
				dropFrom(c)
			}
		case *btf.Enum:
			if c.Name == typ {
				c.Values = slices.DeleteFunc(c.Values, func(v btf.EnumValue) bool { return drop(v.Name) })
			}
		}
		types = append(types, all)
	}
	if removed == 0 {
		t.Fatalf("this kernel has no %s.%v", typ, names)
	}
	return rebuilt(t, types)
}

// rebuilt writes types as a kernel would, and reads them.
func rebuilt(t *testing.T, types []btf.Type) *btf.Spec {
	t.Helper()
	builder, err := btf.NewBuilder(types, nil)
	if err != nil {
		t.Fatal(err)
	}
	raw, err := builder.Marshal(nil, nil)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(raw))
	if err != nil {
		t.Fatal(err)
	}
	return spec
}

func TestCheckRelocations(t *testing.T) {
	n, err := CheckRelocations(machineBTF(t))
	if err != nil || n < 100 {
		t.Errorf("this machine's kernel: %d relocations, %v", n, err)
	}
	for _, test := range []struct {
		typ   string
		names []string
		want  string // empty: it fits all the same
	}{
		{"signal_struct", []string{"oom_score_adj"}, "struct signal_struct.oom_score_adj"},
		{"oom_control", []string{"chosen"}, "struct oom_control.chosen"},
		{"cgroup_subsys_id", []string{"memory_cgrp_id"}, "enum cgroup_subsys_id.memory_cgrp_id"},
		// One of the two names is asked for first, and the other is what is left.
		{"kernfs_node", []string{"parent", "__parent"}, "struct kernfs_node___before_v615.parent"},
		{"mm_struct", []string{"rss_stat"}, "struct mm_struct___since_v62.rss_stat"},
		// Asked for first, and done without.
		{"bpf_func_id", []string{"BPF_FUNC_map_lookup_percpu_elem"}, ""},
		{"trace_event_raw_mark_victim", []string{"uid"}, ""},
		// Not used.
		{"task_struct", []string{"policy"}, ""},
	} {
		t.Run(test.typ+"."+strings.Join(test.names, ","), func(t *testing.T) {
			_, err := CheckRelocations(without(t, test.typ, test.names...))
			if test.want == "" && err != nil {
				t.Errorf("it is refused: %v", err)
			}
			if test.want != "" && (err == nil || !strings.Contains(err.Error(), test.want)) {
				t.Errorf("got %v, want %s named", err, test.want)
			}
		})
	}
}

// An instruction stands for an access that has no answer; is it reached?
func TestReach(t *testing.T) {
	const far = asm.R6 // helpers leave it alone
	access := asm.FnKtimeGetNs.Call()
	// guarded jumps over the access where the condition holds.
	guarded := func(jump asm.Instruction, before ...asm.Instruction) asm.Instructions {
		jump.Offset = 1
		jump = jump.WithReference("")
		return append(append(asm.Instructions{}, before...), jump, access, asm.Return())
	}
	for _, test := range []struct {
		name  string
		insns asm.Instructions
		want  bool
	}{
		{"no guard", guarded(asm.JEq.Imm(asm.R1, 0, "")), true}, // of an argument nothing is known
		{"yes", guarded(asm.JEq.Imm(far, 0, ""), asm.Mov.Imm(far, 1)), true},
		{"no", guarded(asm.JEq.Imm(far, 0, ""), asm.Mov.Imm(far, 0)), false},
		{"no, turned round", guarded(asm.JNE.Imm(far, 1, ""), asm.Mov.Imm(far, 0)), false},
		{"copied, and a helper between", guarded(asm.JEq.Imm(far, 0, ""), asm.Mov.Imm(asm.R1, 0), asm.Mov.Reg(far, asm.R1), asm.FnKtimeGetNs.Call()), false},
		{"a helper's result", guarded(asm.JEq.Imm(asm.R0, 0, ""), asm.Mov.Imm(asm.R0, 0), asm.FnKtimeGetNs.Call()), true},
		{"read from memory", guarded(asm.JEq.Imm(far, 0, ""), asm.Mov.Imm(far, 0), asm.LoadMem(far, asm.R10, -8, asm.DWord)), true},
		{"a bit", guarded(asm.JSet.Imm(far, 2, ""), asm.Mov.Imm(far, 3), asm.And.Imm(far, 2)), false},
		{"shifted out of 32 bits", guarded(asm.JEq.Imm(far, 0, ""), asm.Mov.Imm(far, -1), asm.LSh.Imm(far, 32), asm.Mov.Reg32(far, far)), false},
		{"double word", guarded(asm.JGT.Imm(far, 5, ""), asm.LoadImm(far, 1<<40, asm.DWord)), false},
		{"two ways to it", asm.Instructions{
			asm.Mov.Imm(far, 0),
			{OpCode: asm.JEq.Op(asm.ImmSource), Dst: asm.R1, Offset: 1},
			asm.Mov.Imm(far, 1),
			{OpCode: asm.JEq.Op(asm.ImmSource), Dst: far, Offset: 1},
			access, asm.Return(),
		}, true},
	} {
		t.Run(test.name, func(t *testing.T) {
			p := program{insns: test.insns}
			if err := p.reach(); err != nil {
				t.Fatal(err)
			}
			if got := p.reached[len(test.insns)-2]; got != test.want {
				t.Errorf("reached: %t, want %t", got, test.want)
			}
		})
	}
	if err := (&program{insns: asm.Instructions{asm.Mov.Imm(asm.R0, 0)}}).reach(); err == nil {
		t.Error("a program without an end is taken")
	}
}
