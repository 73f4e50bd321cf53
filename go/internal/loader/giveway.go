package loader

import (
	"encoding/binary"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/wire"
)

// When the whole node is out of memory, whoever allocates before the victim's memory is free can cause the next kill.
// The kill wakes this process, so it waits before it converts and publishes. A kill of a cgroup leaves the node's memory
// alone, and ours is in another cgroup.

// giveWayTime is how long the victim of such a kill has to exit, or the OOM reaper to free its memory.
const giveWayTime = 100 * time.Millisecond

// scopeCgroup is OOM_SCOPE_CGROUP.
const scopeCgroup = 2

// giveWay returns how long to wait before a record is handed over, at a time of CLOCK_BOOTTIME.
func giveWay(record []byte, boottimeNS uint64) time.Duration {
	const scope, killed = unsafe.Offsetof(wire.Header{}.Scope), unsafe.Offsetof(wire.Header{}.BoottimeNS)
	if len(record) <= int(scope) || record[scope] == scopeCgroup {
		return 0
	}
	age := time.Duration(boottimeNS - binary.NativeEndian.Uint64(record[killed:]))
	if age < 0 || age > giveWayTime {
		return 0
	}
	return giveWayTime - age
}

// waitForVictim waits for as long as giveWay says. It allocates nothing.
func waitForVictim(record []byte) {
	var boot unix.Timespec
	if unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot) == nil {
		time.Sleep(giveWay(record, uint64(boot.Nano())))
	}
}
