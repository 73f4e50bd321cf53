//go:build bench || vm

package agent

import (
	"errors"
	"os"
	"testing"

	"github.com/cilium/ebpf"
)

// bpfPerRun is the kernel's own mean time of a run of the youngest program of that name, in ns.
func bpfPerRun(t *testing.T, name string) float64 {
	var mean float64
	for id := ebpf.ProgramID(0); ; {
		next, err := ebpf.ProgramGetNextID(id)
		if errors.Is(err, os.ErrNotExist) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		id = next
		p, err := ebpf.NewProgramFromID(id)
		if err != nil {
			continue // gone meanwhile
		}
		if info, err := p.Info(); err == nil && info.Name == name {
			if s, err := p.Stats(); err == nil && s.RunCount > 0 {
				mean = float64(s.Runtime) / float64(s.RunCount)
			}
		}
		p.Close()
	}
	if mean == 0 {
		t.Fatalf("no program %s has run", name)
	}
	return mean
}
