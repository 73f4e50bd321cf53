package doctor

import (
	"cmp"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/cilium/ebpf/btf"

	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// fleetSchema names the shape of what doctor prints of a directory with --output json; see Schema.
const fleetSchema = "oom-tracer-doctor-btf/v1"

type fleet struct {
	Schema  string       `json:"schema"`
	Version string       `json:"version"` // of this program
	Kernels []kernelType `json:"kernels"`
}

type kernelType struct {
	File  string `json:"file"` // below the directory
	Loads bool   `json:"loads"`
	// Victim is what mark_victim hands over: task or pid.
	Victim loader.Prototype `json:"victim,omitempty"`
	// Tier is hooks where the types have all that fentry and kprobe hook, else unknown: kprobe goes by kallsyms.
	Tier string `json:"tier,omitempty"`
	// Missing is what it lacks; it may load all the same.
	Missing string `json:"missing,omitempty"`
}

// runBTFs says of each kernel whose BTF is in a directory, or below, whether the program fits it, as doctorBTF does of
// one. It fails when the program does not load on one of them.
func runBTFs(dir, output string, stdout io.Writer) error {
	all, failed := fleet{Schema: fleetSchema, Version: obs.Version().Version, Kernels: []kernelType{}}, 0
	err := filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() || !hasTypes(path) {
			return err
		}
		k := examineTypes(path)
		if k.File, err = filepath.Rel(dir, path); err != nil {
			return err
		}
		if !k.Loads {
			failed++
		}
		all.Kernels = append(all.Kernels, k)
		return nil
	})
	if err != nil {
		return fmt.Errorf("read the kernels' BTF: %w", err)
	}
	if len(all.Kernels) == 0 {
		return fmt.Errorf("no BTF in %s: put each kernel's /sys/kernel/btf/vmlinux there, or its vmlinux", dir)
	}
	if output == "json" {
		err = printJSON(stdout, all)
	} else {
		table := tabwriter.NewWriter(stdout, 0, 0, 2, ' ', 0)
		fmt.Fprintln(table, "KERNEL\tLOADS\tVICTIM\tTIER\tMISSING")
		for _, k := range all.Kernels {
			cells := []string{k.File, map[bool]string{true: "yes", false: "no"}[k.Loads], string(k.Victim), k.Tier, k.Missing}
			for i, cell := range cells {
				cells[i] = cmp.Or(text.Printable(cell), "-")
			}
			fmt.Fprintln(table, strings.Join(cells, "\t"))
		}
		err = table.Flush()
	}
	if err != nil {
		return fmt.Errorf("write the table: %w", err)
	}
	if failed > 0 {
		return fmt.Errorf("the program does not load on %d of %d kernels: see MISSING", failed, len(all.Kernels))
	}
	return nil
}

// hasTypes reports whether a file is raw BTF or an ELF file. (One that cannot be read is, so that it is named.)
func hasTypes(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return true
	}
	defer f.Close()
	var start [4]byte
	_, err = io.ReadFull(f, start[:])
	magic := string(start[:2]) // of BTF in both byte orders: include/uapi/linux/btf.h
	return err == nil && (magic == "\x9f\xeb" || magic == "\xeb\x9f" || string(start[:]) == "\x7fELF")
}

func examineTypes(path string) (k kernelType) {
	kernel, err := btf.LoadSpec(path)
	if err != nil {
		k.Missing = err.Error()
		return k
	}
	if arch := architecture(kernel); arch != runtime.GOARCH {
		k.Missing = fmt.Sprintf("a kernel for %s, and this program is for %s", arch, runtime.GOARCH)
		return k
	}
	prototype, prototypeErr := loader.MarkVictimPrototype(kernel)
	_, relocationsErr := loader.CheckRelocations(kernel)
	if err := errors.Join(prototypeErr, relocationsErr); err != nil {
		k.Missing = strings.ReplaceAll(err.Error(), "\n", "; ")
		return k
	}
	k.Loads, k.Victim, k.Tier = true, prototype, "hooks"
	missing := loader.MissingHooks(kernel)
	if prototype == loader.PrototypeTask { // it is hooked for the task only
		missing = slices.DeleteFunc(missing, func(name string) bool { return name == "mark_oom_victim" })
	}
	if len(missing) > 0 {
		k.Tier, k.Missing = "unknown", "for fentry: "+strings.Join(missing, ", ")
	}
	return k
}

func architecture(kernel *btf.Spec) string {
	var regs *btf.Struct
	if kernel.TypeByName("user_pt_regs", &regs) == nil { // arch/arm64/include/uapi/asm/ptrace.h
		return "arm64"
	}
	return "amd64"
}
