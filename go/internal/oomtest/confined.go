package oomtest

import (
	"fmt"
	"os/exec"
	"runtime"
	"slices"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Confinement is what a process is to have less than root.
type Confinement struct {
	// Drop are capabilities to be taken from the bounding set, with which root loses them.
	Drop []uintptr
	// Refuse are system calls that a seccomp filter answers with EPERM, as the runtimes' profiles do.
	Refuse []uint32
}

// chartCapabilities are those that the chart gives to the tracer.
var chartCapabilities = []uintptr{unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_SYSLOG, unix.CAP_SYS_RESOURCE}

// AsInChart leaves the capabilities of the chart, but for some.
func AsInChart(without ...uintptr) []uintptr {
	var drop []uintptr
	for bit := uintptr(0); bit <= unix.CAP_LAST_CAP; bit++ {
		if !slices.Contains(chartCapabilities, bit) || slices.Contains(without, bit) {
			drop = append(drop, bit)
		}
	}
	return drop
}

// Start starts a command with less than this process has.
func (c Confinement) Start(t testing.TB, command *exec.Cmd) {
	t.Helper()
	started := make(chan error)
	go func() {
		// All of it is a thread's own. This one is not unlocked, and so ends with its goroutine.
		runtime.LockOSThread()
		err := c.apply()
		if err == nil {
			err = command.Start()
		}
		started <- err
	}()
	if err := <-started; err != nil {
		t.Fatal(err)
	}
}

func (c Confinement) apply() error {
	for _, bit := range c.Drop {
		// One that this kernel does not have cannot be dropped.
		if err := unix.Prctl(unix.PR_CAPBSET_DROP, bit, 0, 0, 0); err != nil && err != unix.EINVAL {
			return fmt.Errorf("drop capability %d, which needs root: %w", bit, err)
		}
	}
	if len(c.Refuse) == 0 {
		return nil
	}
	// struct seccomp_data begins with the number of the call.
	filter := []unix.SockFilter{{Code: unix.BPF_LD | unix.BPF_W | unix.BPF_ABS}}
	for _, number := range c.Refuse {
		filter = append(filter,
			unix.SockFilter{Code: unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, Jf: 1, K: number},
			unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ERRNO | uint32(unix.EPERM)})
	}
	filter = append(filter, unix.SockFilter{Code: unix.BPF_RET | unix.BPF_K, K: unix.SECCOMP_RET_ALLOW})
	program := unix.SockFprog{Len: uint16(len(filter)), Filter: &filter[0]}
	if err := unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&program)), 0, 0); err != nil {
		return fmt.Errorf("install a seccomp filter, which needs root: %w", err)
	}
	return nil
}
