// Package oomtest causes real, contained OOM kills for tests.
package oomtest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
)

// Program is a binary that make builds for the tests.
func Program(t testing.TB, name string) string {
	t.Helper()
	dir := os.Getenv("OOM_TEST_BUILD")
	if dir == "" {
		t.Fatalf("OOM_TEST_BUILD does not say where %s is: run the tests with make test", name)
	}
	return filepath.Join(dir, name)
}

// New makes a cgroup that goes with the test. From then on this process is [Alone].
func New(t testing.TB, limit uint64) *cgroupfs.Cgroup {
	t.Helper()
	if err := alone(); err != nil {
		t.Fatal(err)
	}
	h, err := cgroupfs.Find("/proc")
	if err != nil {
		t.Fatal(err)
	}
	group, err := h.New(limit)
	if err != nil {
		t.Fatal(err)
	}
	removeAfter(t, group)
	return group
}

// Child makes a cgroup inside another.
func Child(t testing.TB, parent *cgroupfs.Cgroup, name string, limit uint64) *cgroupfs.Cgroup {
	t.Helper()
	child, err := parent.Child(name, limit)
	if err != nil {
		t.Fatal(err)
	}
	removeAfter(t, child)
	return child
}

func removeAfter(t testing.TB, group *cgroupfs.Cgroup) {
	t.Cleanup(func() {
		if err := group.Remove(); err != nil {
			t.Error(err)
		}
	})
}

// Kills reads the cgroup's own count.
func Kills(t testing.TB, group *cgroupfs.Cgroup) int {
	t.Helper()
	n, err := group.Kills()
	if err != nil {
		t.Fatal(err)
	}
	return int(n)
}

// Storm runs tools/hog in the cgroup: count children, one after the other, of mib MiB each. It returns
// the PIDs of those that were killed by SIGKILL, in their order.
func Storm(t testing.TB, group *cgroupfs.Cgroup, count, mib int, mode string) []int {
	t.Helper()
	killed, err := RunStorm(t.Context(), group, Program(t, "hog"), count, mib, mode)
	if err != nil {
		t.Fatal(err)
	}
	return killed
}

// RunStorm is Storm for a goroutine beside the test's, which may not end the test.
func RunStorm(ctx context.Context, group *cgroupfs.Cgroup, program string, count, mib int, mode string) (killed []int, err error) {
	ctx, cancel := context.WithCancel(ctx) // ends the hog on the ways out below
	defer cancel()
	hog := exec.CommandContext(ctx, program, fmt.Sprint(count), fmt.Sprint(mib), mode)
	hog.Env = append(os.Environ(), "HOG_CGROUP="+group.Dir)
	hog.Stderr = os.Stderr
	hog.WaitDelay = time.Second
	stdin, stdout, err := start(hog)
	if err != nil {
		return nil, fmt.Errorf("start hog: %w", err)
	}
	defer func() {
		if err != nil {
			cancel()
			_ = hog.Wait() // or its cgroup could not be removed
		}
	}()
	if _, err := stdin.Write([]byte{1}); err != nil {
		return nil, fmt.Errorf("start hog: %w", err)
	}
	lines := bufio.NewScanner(stdout)
	for lines.Scan() {
		var pid, value int
		var how string
		if _, err := fmt.Sscan(lines.Text(), &pid, &how, &value); err != nil {
			return nil, fmt.Errorf("hog said %q: %w", lines.Text(), err)
		}
		if how == "signal" && value == 9 {
			killed = append(killed, pid)
		}
	}
	if err := hog.Wait(); err != nil {
		return nil, fmt.Errorf("hog: %w", err)
	}
	return killed, nil
}

// start starts a command whose input and output are the test's.
func start(cmd *exec.Cmd) (stdin io.WriteCloser, stdout io.ReadCloser, err error) {
	stdin, inErr := cmd.StdinPipe()
	stdout, outErr := cmd.StdoutPipe()
	return stdin, stdout, errors.Join(inErr, outErr, cmd.Start())
}

// Hold runs tools/hog in the cgroup until it holds mib MiB, and leaves it there. It goes with the test.
func Hold(t testing.TB, group *cgroupfs.Cgroup, mib int) *os.Process {
	t.Helper()
	hog := exec.Command(Program(t, "hog"), "0", fmt.Sprint(mib), "hold")
	hog.Stderr = os.Stderr
	stdin, stdout, err := start(hog)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = hog.Process.Kill()
		_ = hog.Wait()
	})
	if err := group.Add(hog.Process.Pid); err != nil {
		t.Fatal(err)
	}
	if _, err := stdin.Write([]byte{1}); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "holding\n" {
		t.Fatalf("hog said %q: %v", line, err)
	}
	return hog.Process
}

// BPFFS mounts a bpffs of the test's own.
func BPFFS(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	Mount(t, "bpf", dir, 0, "mode=0700")
	return dir
}

// FreezerGroup is a cgroup of the version 1 freezer. A task in it cannot act on a signal, SIGKILL included,
// as one that hangs in the kernel cannot.
type FreezerGroup string

// Freezer makes a freezer cgroup that is thawed and goes with the test. Where the machine has not mounted
// the controller (it is apart from the unified hierarchy), it is mounted for the test.
func Freezer(t testing.TB) FreezerGroup {
	t.Helper()
	root := "/sys/fs/cgroup/freezer"
	if _, err := os.Stat(filepath.Join(root, "cgroup.procs")); err != nil {
		root = t.TempDir()
		Mount(t, "cgroup", root, 0, "freezer")
	}
	dir := filepath.Join(root, fmt.Sprintf("oom-tracer-test-%d", os.Getpid()))
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = os.WriteFile(filepath.Join(dir, "freezer.state"), []byte("THAWED"), 0)
		for range 100 {
			if os.Remove(dir) == nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Errorf("%s cannot be removed", dir)
	})
	return FreezerGroup(dir)
}

// Freeze freezes a process.
func (f FreezerGroup) Freeze(t testing.TB, pid int) {
	t.Helper()
	for _, set := range [][2]string{{"cgroup.procs", fmt.Sprint(pid)}, {"freezer.state", "FROZEN"}} {
		if err := os.WriteFile(filepath.Join(string(f), set[0]), []byte(set[1]), 0); err != nil {
			t.Fatal(err)
		}
	}
	for range 500 {
		if state, _ := os.ReadFile(filepath.Join(string(f), "freezer.state")); string(state) == "FROZEN\n" {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("process %d does not freeze", pid)
}

// FillTmpfs writes mib MiB into a tmpfs, by a process in the cgroup, and waits until that has ended. The tmpfs is in a mount
// separate namespace and goes with the test, as an emptyDir outlives its containers. It returns whether the process was killed.
func FillTmpfs(t testing.TB, group *cgroupfs.Cgroup, mib int) bool {
	t.Helper()
	const script = `
		mount -t tmpfs tmpfs "$1"
		killed=0
		(echo 0 >/proc/self/oom_score_adj; echo 0 >"$2/cgroup.procs"; exec dd if=/dev/zero of="$1/file" bs=64k count="$3" 2>/dev/null) || killed=$?
		echo "$killed"
		read -r _ || true`
	dir := t.TempDir()
	cmd := exec.Command("sh", "-ec", script, "sh", dir, group.Dir, fmt.Sprint(mib*16))
	cmd.Stderr = os.Stderr
	// Go makes the mounts of the new namespace private.
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	stdin, stdout, err := start(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = cmd.Wait()
	})
	var status int
	if _, err := fmt.Fscan(stdout, &status); err != nil {
		t.Fatalf("fill a tmpfs in %s: %v", group.Dir, err)
	}
	return status == 128+int(syscall.SIGKILL)
}
