package tap

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// TestVictim: in a cgroup with the limit that the chart gives it the victim is killed by the kernel at its first run, and
// succeeds at its second, as the kubelet runs it. Without a limit it gives up.
func TestVictim(t *testing.T) {
	group := oomtest.New(t, 32<<20)
	marker := filepath.Join(t.TempDir(), "killed")
	run := func(marker string, limited bool) error {
		procs := "/dev/null"
		if limited {
			procs = filepath.Join(group.Dir, "cgroup.procs")
		}
		cmd := exec.CommandContext(t.Context(), "sh", "-c", `echo $$ >"$1" && exec "$2" victim "$3"`, "sh", procs, oomtest.Program(t, "oom-tap"), marker)
		cmd.Stderr = os.Stderr
		return cmd.Run()
	}
	var exit *exec.ExitError
	if err := run(marker, true); !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Errorf("first run: %v", err)
	}
	if n := oomtest.Kills(t, group); n != 1 {
		t.Errorf("%d kills", n)
	}
	if err := run(marker, true); err != nil {
		t.Errorf("second run: %v", err)
	}
	if err := run(filepath.Join(t.TempDir(), "killed"), false); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("without a limit: %v", err)
	}
}
