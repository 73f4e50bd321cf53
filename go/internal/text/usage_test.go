package text_test

import (
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const mib = 1 << 20

func TestNeighboursLine(t *testing.T) {
	pods := []event.PodMemory{{PodUID: "u\x1b", Usage: 3 << 30, Max: new(uint64(4 << 30))}, {PodUID: "v", Usage: 10, Victim: true}}
	for _, tt := range []struct {
		n    event.Neighbours
		want string
	}{
		{event.Neighbours{Scope: event.ScopeGlobal, Pods: pods, PodsSeen: new(uint32(17))},
			`global     pod u\x1b 3.0 GiB of 4.0 GiB, pod v (victim) 10 B (2 of 17 pods)`},
		{event.Neighbours{Scope: event.ScopeGlobal, Pods: pods[:0], PodsSeen: new(uint32(17)), Incomplete: true},
			`global     no pod (0 of 17 pods, not all could be read)`},
		{event.Neighbours{Scope: event.ScopeGlobal}, `global     not known`},
		{event.Neighbours{Scope: event.ScopeCgroup, Breakdown: &event.Breakdown{Source: event.SourceStat, AfterNS: 2_600_000, Gone: true, NodePressure: &event.Pressure{
			Some: &event.Stall{Avg10: 12.6, Avg60: 1}, Full: &event.Stall{Avg300: 99.9},
		}, Limit: &event.Limit{Level: event.LevelContainer, Inferred: true}, Incomplete: true}},
			`cgroup     limit container?, 3ms after the kill (the cgroup was removed); node pressure some 13/1/0% full 0/0/100%; the processes could not be read in time`},
		{event.Neighbours{Scope: event.ScopeCgroup, Breakdown: &event.Breakdown{
			Source: event.SourceStat, Limit: &event.Limit{Level: event.LevelPod, Max: new(uint64(512 * mib))}, Usage: new(uint64(460 * mib)),
			Anon: new(uint64(2 * mib)), File: new(uint64(440 * mib)), Shmem: new(uint64(430 * mib)), Slab: new(uint64(5 * mib)), SlabUnreclaimable: new(uint64(4 * mib)),
			KernelStack: new(uint64(3 * mib)), PageTables: new(uint64(2 * mib)), Sock: new(uint64(0)), Swap: new(uint64(20 * mib)), Zswap: new(uint64(6 * mib)),
			Events: &event.MemoryEvents{Low: new(uint64(0)), Max: new(uint64(33)), OOM: new(uint64(1)), OOMKill: new(uint64(2))}, Pressure: &event.Pressure{Some: &event.Stall{}},
			Processes:     []event.Process{{PID: 7, Comm: "dd\n", RSS: 2 * mib, Victim: true}, {PID: 8, RSS: mib}},
			ProcessesSeen: new(uint32(3)), Incomplete: true,
		}}, `cgroup     limit pod 512.0 MiB, 0s after the kill: usage 460.0 MiB, 430.0 MiB tmpfs or shared memory, 20.0 MiB swap, 10.0 MiB file, 6.0 MiB zswap, ` +
			`4.0 MiB unreclaimable slab, 3.0 MiB kernel stacks, 2.0 MiB anon, 2.0 MiB page tables, 1.0 MiB slab; events max 33, oom 1, oom_kill 2; pressure some 0/0/0%; ` +
			`dd\n[7] (victim) 2.0 MiB, ?[8] 1.0 MiB (2 of 3 processes) (not all could be read)`},
		{event.Neighbours{Scope: event.ScopeGlobal, Pods: pods[1:], Breakdown: &event.Breakdown{Source: event.SourceMeminfo, Total: new(uint64(8 << 30)), ProcessesSeen: new(uint32(0))}},
			`global     node 8.0 GiB, 0s after the kill; no process; pod v (victim) 10 B`},
	} {
		tt.n.Time, tt.n.Node.Name = time.Date(2026, 11, 23, 2, 3, 4, 9e6, time.UTC), "node-1"
		var table text.Table
		if got, want := table.NeighboursLine(&tt.n), `2026-11-23T02:03:04.009Z  node-1  usage            `+tt.want; got != want {
			t.Errorf("%s\nwant %s", got, want)
		}
	}
}

func TestLargePart(t *testing.T) {
	limit := &event.Limit{Max: new(uint64(512 * mib))}
	for _, tt := range []struct {
		name string
		b    *event.Breakdown
		want string
	}{
		{"nothing is known", nil, ""},
		{"the limit is not known", &event.Breakdown{Limit: &event.Limit{}, Shmem: new(uint64(430 * mib))}, ""},
		{"tmpfs", &event.Breakdown{Limit: limit, Shmem: new(uint64(430 * mib)), SlabUnreclaimable: new(uint64(300 * mib))}, "of 512.0 MiB, 430.0 MiB were tmpfs or shared memory"},
		{"a quarter", &event.Breakdown{Limit: limit, Sock: new(uint64(128 * mib))}, "of 512.0 MiB, 128.0 MiB were network buffers"},
		{"less", &event.Breakdown{Limit: limit, Sock: new(uint64(128*mib - 1))}, ""},
		{"what the kernel frees by itself", &event.Breakdown{Limit: limit, File: new(uint64(400 * mib)), Slab: new(uint64(200 * mib))}, ""},
		{"what processes hold", &event.Breakdown{Limit: limit, Anon: new(uint64(500 * mib)), Swap: new(uint64(500 * mib))}, ""},
		{"the node", &event.Breakdown{Total: new(uint64(1 << 30)), PageTables: new(uint64(300 * mib))}, "of 1.0 GiB, 300.0 MiB were page tables"},
		{"no memory at all", &event.Breakdown{Total: new(uint64(0)), PageTables: new(uint64(0))}, ""},
	} {
		if got := text.LargePart(tt.b); got != tt.want {
			t.Errorf("%s: %q, want %q", tt.name, got, tt.want)
		}
	}
}
