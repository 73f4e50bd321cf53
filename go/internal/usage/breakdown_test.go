package usage

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"

	"github.com/oom-tracer/oom-tracer/go/event"
)

const someFull = "some avg10=1.50 avg60=0.20 avg300=0.00 total=123\nfull avg10=0.10 avg60=0.00 avg300=0.00 total=1\n"

// procFiles are those of a node with three processes, and a kernel thread.
func procFiles(t *testing.T) string {
	t.Helper()
	proc := files(t, map[string]string{
		"meminfo": "MemTotal:       1000 kB\nMemFree:         100 kB\nBuffers:           1 kB\nCached:          300 kB\nSwapCached:        2 kB\nSwapTotal:        50 kB\nSwapFree:         20 kB\n" +
			"Zswap:             4 kB\nAnonPages:       200 kB\nShmem:            30 kB\nSlab:             70 kB\nSUnreclaim:       40 kB\nKernelStack:       5 kB\nPageTables:        6 kB\nHugePages_Total:   0\n",
		"pressure/memory": someFull,
		"2/statm":         "0 0 0 0 0 0 0\n",
		"71/statm":        "100 30 1 1 0 1 0\n", "71/comm": "java\n", "71/oom_score_adj": "-997\n",
		"72/statm": "100 40 1 1 0 1 0\n", "72/comm": "a\xff b\n", "72/oom_score_adj": "1000\n",
		"73/statm": "100 2 1 1 0 1 0\n",
		"74/stat":  "", "self/ns/x": "", "bus/x": "",
	})
	if err := os.Symlink(initialPIDNamespace, filepath.Join(proc, "self/ns/pid")); err != nil {
		t.Fatal(err)
	}
	return proc
}

func page(n uint64) uint64 { return n * uint64(os.Getpagesize()) }

// limitOf is a limit of a cgroup that is there.
func limitOf(t *testing.T, mount, path string, version int) *event.Limit {
	t.Helper()
	info, err := os.Stat(filepath.Join(mount, path))
	if err != nil {
		t.Fatal(err)
	}
	return &event.Limit{Level: event.LevelOther, Cgroup: &event.Cgroup{Path: path, ID: info.Sys().(*syscall.Stat_t).Ino, Version: version}}
}

var v2 = map[string]string{
	"c/memory.current":      "1000\n",
	"c/memory.swap.current": "7\n",
	"c/memory.stat": "anon 100\nfile 800\nkernel 90\nkernel_stack 16\npagetables 8\nsock 4\nshmem 700\nzswap 3\nzswapped 9\nslab_reclaimable 20\nslab_unreclaimable 30\n" +
		"slab 50\n",
	"c/memory.pressure": someFull,
	"c/memory.events":   "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\nsock_throttled 6\n",
	"c/cgroup.procs":    "71\n",
	"c/d/cgroup.procs":  "0\n72\n72\n74\n",
	"e/cgroup.procs":    "73\n",
}

func TestBreakdown(t *testing.T) {
	psi := &event.Pressure{Some: &event.Stall{Avg10: 1.5, Avg60: 0.2}, Full: &event.Stall{Avg10: 0.1}}
	java := event.Process{PID: 71, Comm: "java", RSS: page(30), OOMScoreAdj: new(int16(-997))}
	a := event.Process{PID: 72, Comm: "a\ufffd b", RSS: page(40), OOMScoreAdj: new(int16(1000))}
	for _, tt := range []struct {
		name    string
		version int // 0: the node
		files   map[string]string
		want    event.Breakdown
	}{
		{"version 2", 2, v2, event.Breakdown{
			Source: event.SourceStat, Usage: new(uint64(1000)), Anon: new(uint64(100)), File: new(uint64(800)), Shmem: new(uint64(700)), Slab: new(uint64(50)),
			SlabUnreclaimable: new(uint64(30)), KernelStack: new(uint64(16)), PageTables: new(uint64(8)), Sock: new(uint64(4)), Swap: new(uint64(7)), Zswap: new(uint64(3)),
			Events: &event.MemoryEvents{
				Low: new(uint64(0)), High: new(uint64(1)), Max: new(uint64(2)), OOM: new(uint64(3)), OOMKill: new(uint64(4)), OOMGroupKill: new(uint64(5)),
			},
			Pressure: psi, NodePressure: psi, Processes: []event.Process{a, java}, ProcessesSeen: new(uint32(2)),
		}},
		{"version 2, an older kernel without swap and pressure", 2, map[string]string{"c/memory.current": "1000\n", "c/memory.stat": "anon 100\n", "c/cgroup.procs": ""}, event.Breakdown{
			Source: event.SourceStat, Usage: new(uint64(1000)), Anon: new(uint64(100)), NodePressure: psi, ProcessesSeen: new(uint32(0)),
		}},
		{"version 1", 1, map[string]string{
			"c/memory.usage_in_bytes": "1000\n", "c/memory.stat": "cache 1\nrss 2\nshmem 3\nswap 4\ntotal_cache 800\ntotal_rss 100\ntotal_shmem 700\ntotal_swap 7\n",
			"c/cgroup.procs": "71\n", "c/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
		}, event.Breakdown{
			Source: event.SourceStat, Usage: new(uint64(1000)), Anon: new(uint64(100)), File: new(uint64(800)), Shmem: new(uint64(700)), Swap: new(uint64(7)),
			NodePressure: psi, Processes: []event.Process{java}, ProcessesSeen: new(uint32(1)),
		}},
		{"the node", 0, nil, event.Breakdown{
			Source: event.SourceMeminfo, Total: new(uint64(1000 << 10)), Usage: new(uint64(900 << 10)), Anon: new(uint64(200 << 10)), File: new(uint64(303 << 10)), Shmem: new(uint64(30 << 10)),
			Slab: new(uint64(70 << 10)), SlabUnreclaimable: new(uint64(40 << 10)), KernelStack: new(uint64(5 << 10)), PageTables: new(uint64(6 << 10)), Swap: new(uint64(30 << 10)),
			Zswap: new(uint64(4 << 10)), NodePressure: psi,
			Processes:     []event.Process{a, java, {PID: 73, RSS: page(2)}},
			ProcessesSeen: new(uint32(3)),
		}},
		{"rubbish", 2, map[string]string{
			"c/memory.current": "max\n", "c/memory.swap.current": "",
			"c/memory.stat": "anon -1\nfile 18446744073709551616\nshmem 1 2\nslab\nsock 1e3\nkernel_stack 2000000000000000000\npagetables 0x10\nanon 5\n" +
				"zswap 3\nzswap 4\nslab_unreclaimable 12",
			"c/memory.pressure": "some avg10=NaN avg60=0.00 avg300=0.00\nfull avg10=0.00 avg60=100.01 avg300=0.00\nsome avg10=0.00\nfull avg60=0.00 avg10=0.00 avg300=0.00\n",
			"c/memory.events":   "oom_kill\nmax x\n", "c/cgroup.procs": "x\n-71\n4294967367\n72\n",
		}, event.Breakdown{Source: event.SourceStat, NodePressure: psi, Processes: []event.Process{a}, ProcessesSeen: new(uint32(1))}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tree := Tree{Version: tt.version, Mount: files(t, tt.files)}
			var limit *event.Limit
			if tt.version > 0 {
				limit = limitOf(t, tree.Mount, "c", tt.version)
			}
			got, errs, err := tree.Breakdown(t.Context(), procFiles(t), limit)
			if err != nil || len(errs) > 0 && tt.name != "rubbish" {
				t.Fatal(err, errs)
			}
			if tt.want.Limit = limit; tt.name == "rubbish" && len(errs) != 1 {
				t.Errorf("errors %v", errs)
			}
			if diff := cmp.Diff(&tt.want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

// A cgroup that is gone has no value, and one that has its path now is another one.
func TestBreakdownGone(t *testing.T) {
	tree := Tree{Version: 2, Mount: files(t, v2)}
	proc := procFiles(t)
	was := limitOf(t, tree.Mount, "c", 2)
	another := *was.Cgroup
	another.ID++
	removed := *was.Cgroup
	removed.Path = "none"
	for _, c := range []*event.Cgroup{&another, &removed} {
		l := &event.Limit{Cgroup: c}
		got, errs, err := tree.Breakdown(t.Context(), proc, l)
		if err != nil || len(errs) > 0 {
			t.Fatal(err, errs)
		}
		want := &event.Breakdown{Source: event.SourceStat, Limit: l, Gone: true}
		if diff := cmp.Diff(want, got, cmpopts.IgnoreFields(event.Breakdown{}, "NodePressure")); diff != "" || got.NodePressure == nil {
			t.Errorf("%s: -want +got:\n%s", c.Path, diff)
		}
	}
	for _, l := range []*event.Limit{{}, {Cgroup: &event.Cgroup{Path: ".../c", Truncated: true}}} {
		if got, _, err := tree.Breakdown(t.Context(), proc, l); err == nil {
			t.Errorf("of a path that is not known: %+v", got)
		}
	}
	if got, _, err := tree.Breakdown(t.Context(), "/none", was); err == nil {
		t.Errorf("without procfs: %+v", got)
	}
}

// In another PID namespace the PIDs are not those of the node.
func TestBreakdownPIDNamespace(t *testing.T) {
	tree := Tree{Version: 2, Mount: files(t, v2)}
	proc := procFiles(t)
	link := filepath.Join(proc, "self/ns/pid")
	if err := os.Remove(link); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("pid:[4026532000]", link); err != nil {
		t.Fatal(err)
	}
	for _, l := range []*event.Limit{nil, limitOf(t, tree.Mount, "c", 2)} {
		if got, _, err := tree.Breakdown(t.Context(), proc, l); err != nil || got.ProcessesSeen != nil || got.Processes != nil || got.Anon == nil {
			t.Errorf("%+v, %v", got, err)
		}
	}
}

// It ends, whatever is there.
func TestBreakdownBounds(t *testing.T) {
	proc := procFiles(t)
	many := map[string]string{}
	for i := range 20 {
		many[fmt.Sprintf("%d/statm", 100+i)] = fmt.Sprintf("9 %d 0 0 0 0 0\n", 100+i)
	}
	write(t, proc, many)
	tree := Tree{Version: 2}
	if got, _, err := tree.Breakdown(t.Context(), proc, nil); err != nil || len(got.Processes) != maxProcesses || *got.ProcessesSeen != 23 || got.Processes[0].PID != 119 || got.Incomplete {
		t.Errorf("%+v, %v", got, err)
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	if got, _, err := tree.Breakdown(ended, proc, nil); err != nil || !got.Incomplete || got.Anon == nil || got.ProcessesSeen != nil {
		t.Errorf("after the time: %+v, %v", got, err)
	}

	var pids strings.Builder
	for i := range maxPIDs + 10 {
		fmt.Fprintln(&pids, 100+i)
	}
	deep := map[string]string{"pids/cgroup.procs": pids.String(), "long/cgroup.procs": strings.Repeat("71\n", maxFile), "wide/cgroup.procs": "71\n"}
	for i := range maxCgroups + 10 {
		deep[fmt.Sprintf("wide/%04d/cgroup.procs", i)] = fmt.Sprintln(100 + i)
	}
	tree.Mount = files(t, deep)
	for path, seen := range map[string]uint32{"pids": 20, "long": 1, "wide": 21} {
		got, _, err := tree.Breakdown(t.Context(), proc, limitOf(t, tree.Mount, path, 2))
		if err != nil || !got.Incomplete || *got.ProcessesSeen != seen {
			t.Errorf("%s: %+v, %v", path, got, err)
		}
	}
}

// Whatever the files say, what comes out can be published.
func FuzzBreakdown(f *testing.F) {
	f.Add("anon 1\nfile 2\n", someFull, "MemTotal: 1 kB\n")
	f.Add("anon 18446744073709551615\n", "some avg10=NaN avg60=+Inf avg300=1e400 total=0\n", "Cached: 18446744073709551615 kB\nBuffers: 1 kB\nSwapCached: 1 kB\n")
	f.Add("anon 1\nanon 2\n\x00", "full avg10=0x1p-2 avg60=-0 avg300=100\n", "Cached: 1125899906842624 kB\nBuffers: 1125899906842624 kB\nSwapCached: 1125899906842624 kB\n")
	f.Fuzz(func(t *testing.T, stat, psi, mem string) {
		for name, n := range maps.All(flatKeyed([]byte(stat))) {
			if n != nil && (*n > maxValue || !strings.Contains(stat, name) || strings.Count("\n"+stat, "\n"+name+" ") > 1) {
				t.Errorf("%q: %d", name, *n)
			}
		}
		for name, n := range maps.All(meminfo([]byte(mem))) {
			if n != nil && (*n > maxValue || *n%1024 != 0 || !strings.Contains(mem, name+":")) {
				t.Errorf("%q: %d", name, *n)
			}
		}
		p := pressure([]byte(psi))
		if p != nil && p.Some == nil && p.Full == nil {
			t.Error("a pressure without a value")
		}
		data, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		var again *event.Pressure
		if err := json.Unmarshal(data, &again); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(p, again); diff != "" {
			t.Error(diff)
		}
		if p == nil {
			return
		}
		for _, s := range []*event.Stall{p.Some, p.Full} {
			if s != nil && !(min(s.Avg10, s.Avg60, s.Avg300) >= 0 && max(s.Avg10, s.Avg60, s.Avg300) <= 100) {
				t.Errorf("%+v", s)
			}
		}
	})
}
