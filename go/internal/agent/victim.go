package agent

import (
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// VictimCommand is how Selftest calls itself for its victim. It is not for people.
const VictimCommand = "selftest-victim"

// victimComm is the victim's name, at most 15 bytes.
const victimComm = "oom-selftest"

// Victim allocates MIB MiB once a byte comes on standard input, as the caller's victim. It ends with an
// error if nobody kills it.
func Victim(size string) error {
	mib, err := strconv.Atoi(size)
	if err != nil || mib < 1 || mib > 1024 {
		return fmt.Errorf("%s: %q is not 1..1024 MiB", VictimCommand, size)
	}
	debug.SetGCPercent(-1)
	// With selftest gone nobody would clean up.
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return fmt.Errorf("%s: %w", VictimCommand, err)
	}
	// Should anything else run out of memory now, this process goes first.
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0); err != nil {
		return fmt.Errorf("%s: %w", VictimCommand, err)
	}
	if err := os.WriteFile("/proc/self/comm", []byte(victimComm), 0); err != nil {
		return fmt.Errorf("%s: %w", VictimCommand, err)
	}
	fmt.Println("ready")
	if n, _ := os.Stdin.Read(make([]byte, 1)); n != 1 {
		return errors.New(strings.TrimSpace(VictimCommand + ": no word to start"))
	}
	bytes := mib << 20
	memory, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("%s: map %d MiB: %w", VictimCommand, mib, err)
	}
	for i := 0; i < bytes; i += os.Getpagesize() {
		memory[i] = 1
	}
	return fmt.Errorf("%s: still alive with %d MiB", VictimCommand, mib)
}
