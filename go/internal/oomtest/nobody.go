package oomtest

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// Nobody is the user ID of a user without any right.
const Nobody = 65534

// AsNobody lets a command run as a user without any right.
func AsNobody(t testing.TB, cmd *exec.Cmd) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Fatal("needs root, to become another user")
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Credential: &syscall.Credential{Uid: Nobody, Gid: Nobody},
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true,
	}
}

// RunAsNobody runs a shell script as a user without any right, in dir, and must succeed.
func RunAsNobody(t testing.TB, dir, script string) {
	t.Helper()
	cmd := exec.Command("sh", "-ec", script)
	cmd.Dir = dir
	AsNobody(t, cmd)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("as user %d: %v\n%s", Nobody, err, out)
	}
}

// LoopAsNobody runs a shell script as that user again and again until the test ends, whatever it says.
func LoopAsNobody(t testing.TB, dir, script string) {
	t.Helper()
	cmd := exec.Command("sh", "-c", "while :; do "+script+"; done 2>/dev/null")
	cmd.Dir = dir
	AsNobody(t, cmd)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		_ = cmd.Wait()
	})
}

// SharedDir is a directory like /tmp: every user can make things in it, and nobody can remove those of others.
func SharedDir(t testing.TB) string {
	t.Helper()
	dir := t.TempDir()
	for path, mode := range map[string]os.FileMode{filepath.Dir(dir): 0o755, dir: 0o777 | os.ModeSticky} {
		if err := os.Chmod(path, mode); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}
