package loader

// #include <malloc.h>
import "C"

import "runtime/debug"

// libbpf reads all of the kernel's types, 5 to 10 MB, and glibc keeps what libbpf has freed.

// limitHeap lets glibc unmap big blocks when they are freed. Without it the first one that is freed raises the
// threshold to its size (mallopt(3)).
func limitHeap() {
	C.mallopt(C.M_ARENA_MAX, 1)
	C.mallopt(C.M_MMAP_THRESHOLD, 128<<10)
}

// trimHeap gives the kernel back what glibc keeps.
func trimHeap() { C.malloc_trim(0) }

// giveBack does the same, and with the garbage that the start has left in Go's heap.
func giveBack() {
	trimHeap()
	debug.FreeOSMemory()
}
