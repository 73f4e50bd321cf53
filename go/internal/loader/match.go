package loader

import (
	"bytes"
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
// Rule: what the kernel's types do not have is no fault where the program asks before it reads. The names of the types say so
// (src/core_fixes.bpf.h): the program reads T___since_X where the kernel has that, else T___before_X.

// CheckRelocations resolves every CO-RE relocation of the embedded object against a kernel's types, whatever this machine's.
// It returns their number, and fails with all that the program needs and the kernel lacks, in the names of the C source.
// Only a load can tell whether the verifier takes the program and its hooks can be attached.
func CheckRelocations(kernel *btf.Spec) (total int, err error) {
	collection, err := ebpf.LoadCollectionSpecFromReader(bytes.NewReader(object))
	if err != nil {
		return 0, fmt.Errorf("read the BPF object: %w", err)
	}
	absent := map[string]bool{}
	for name, program := range collection.Programs {
		n, poison, err := relocate(program.Instructions, kernel, collection)
		if err != nil {
			return 0, fmt.Errorf("program %s: %w", name, err)
		}
		total += n
		for _, what := range poison {
			absent[what] = true
		}
	}
	if missing := needed(absent); len(missing) > 0 {
		return total, fmt.Errorf("the kernel's BTF lacks what the program reads: %s", strings.Join(missing, ", "))
	}
	return total, nil
}

// needed are those of the absent members that the program cannot do without.
func needed(absent map[string]bool) (missing []string) {
	absentTypes := map[string]bool{}
	for what := range absent {
		typ, _, _ := strings.Cut(what, ".")
		absentTypes[typ] = true
	}
	for _, what := range slices.Sorted(maps.Keys(absent)) {
		typ, _, _ := strings.Cut(what, ".")
		since := strings.Replace(typ, "___before_", "___since_", 1)
		instead := since != typ && !absentTypes[since]
		if !strings.Contains(typ, "___since_") && !instead {
			missing = append(missing, what)
		}
	}
	return missing
}

// MissingHooks names the functions that fentry and kprobe hook and that a kernel's types do not have.
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

// relocate applies the relocations of a program. It returns their number and, by instruction, what the kernel lacks.
func relocate(program asm.Instructions, kernel *btf.Spec, collection *ebpf.CollectionSpec) (n int, poison map[int]string, err error) {
	var relocations []*btf.CORERelocation
	var at []int
	for i := range program {
		if r := btf.CORERelocationMetadata(&program[i]); r != nil {
			relocations, at = append(relocations, r), append(at, i)
		}
	}
	fixups, err := btf.CORERelocate(relocations, []*btf.Spec{kernel}, collection.ByteOrder, collection.Types.TypeID)
	if err != nil {
		return 0, nil, err
	}
	poison = map[int]string{}
	for n, i := range at {
		ins := program[i]
		if err := fixups[n].Apply(&ins); err != nil {
			return 0, nil, fmt.Errorf("%s: %w", relocated(relocations[n], collection.Types), err)
		}
		if ins.Constant == btf.COREBadRelocationSentinel {
			poison[i] = relocated(relocations[n], collection.Types)
			continue
		}
		program[i] = ins
	}
	return len(at), poison, nil
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
	id, _ := strconv.ParseUint(m[4], 10, 32) // digits alone
	typ, err := local.TypeByID(btf.TypeID(id))
	if err != nil {
		return said
	}
	name := strings.ToLower(m[1]) + " " + m[2]
	for i, step := range strings.Split(m[3], ":") {
		n, _ := strconv.Atoi(step)
		var members []btf.Member
		switch t := btf.UnderlyingType(typ).(type) {
		case *btf.Enum:
			if n < len(t.Values) {
				name += "." + t.Values[n].Name
			}
			return name
		case *btf.Array:
			if i > 0 {
				typ = t.Type
				name += fmt.Sprintf("[%d]", n)
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
			name += "." + members[n].Name
		}
		typ = members[n].Type
	}
	return name
}
