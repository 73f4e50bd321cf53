package oomtest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
)

// Alone runs the tests of a package that counts the machine's kills: no other package causes any meanwhile.
type Alone struct{ *testing.M }

// Run implements testscript.TestingM. Fuzzing causes no kills, and its workers are processes of the same package.
func (m Alone) Run() int {
	if !slices.ContainsFunc(os.Args, func(arg string) bool { return strings.HasPrefix(arg, "-test.fuzz") }) {
		if err := alone(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			return 1
		}
	}
	return m.M.Run()
}

// alone waits for the processes of other packages that cause or count kills. The lock ends with the process.
var alone = sync.OnceValue(func() error {
	path := filepath.Join(os.TempDir(), "oom-tracer-tests.lock")
	file, err := syscall.Open(path, syscall.O_RDWR|syscall.O_CREAT|syscall.O_CLOEXEC, 0o600)
	if err == nil {
		err = syscall.Flock(file, syscall.LOCK_EX)
	}
	if err != nil {
		return fmt.Errorf("wait for the other tests with OOM kills at %s: %w", path, err)
	}
	return nil
})
