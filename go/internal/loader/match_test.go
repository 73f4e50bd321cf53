package loader

import (
	"slices"
	"strings"
	"testing"

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

// without is this machine's kernel with members taken out of a struct, or a value out of an enumeration.
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
	types, err := spec.AnyTypesByName(typ)
	if err != nil {
		t.Fatal(err)
	}
	for _, found := range types {
		switch c := found.(type) {
		case *btf.Struct:
			dropFrom(c)
		case *btf.Enum:
			c.Values = slices.DeleteFunc(c.Values, func(v btf.EnumValue) bool { return drop(v.Name) })
		}
	}
	if removed == 0 {
		t.Fatalf("this kernel has no %s.%v", typ, names)
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
		{"mm_struct", []string{"rss_stat"}, "struct mm_struct___before_v62.rss_stat.count"},
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
