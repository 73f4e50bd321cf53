package usage

import (
	"cmp"
	"context"
	"io/fs"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"

	"github.com/oom-tracer/oom-tracer/go/event"
)

const (
	// maxProcesses is how many processes are published.
	maxProcesses = 10
	// maxCgroups and maxPIDs bound where they are looked for, and among how many.
	maxCgroups = 500
	maxPIDs    = 4096
)

// initialPIDNamespace is the initial PID namespace (PROC_PID_INIT_INO in include/linux/proc_ns.h). In another one the
// processes of the node are not seen, or have other PIDs.
const initialPIDNamespace = "pid:[4026531836]"

func (r *breakdown) seesProcesses() bool {
	name, err := r.proc.Readlink("self/ns/pid")
	return err == nil && name == initialPIDNamespace
}

// nodeProcesses reads those of the node.
func (r *breakdown) nodeProcesses(ctx context.Context) {
	if !r.seesProcesses() {
		return
	}
	dir, err := r.proc.Open(".")
	if err != nil {
		r.fail(err)
		return
	}
	defer dir.Close()
	names, err := dir.Readdirnames(2 * maxPIDs)
	if err != nil {
		r.fail(err)
		return
	}
	r.Incomplete = len(names) == 2*maxPIDs
	var pids []uint32
	for _, name := range names {
		if pid, err := strconv.ParseUint(name, 10, 32); err == nil {
			pids = append(pids, uint32(pid))
		}
	}
	r.processes(ctx, pids)
}

// cgroupProcesses reads those in a cgroup and below it.
func (r *breakdown) cgroupProcesses(ctx context.Context, root *os.Root) {
	if !r.seesProcesses() {
		return
	}
	var pids []uint32
	dirs := []string{"."}
	for n := 0; n < len(dirs); n++ {
		if n == maxCgroups || len(pids) > maxPIDs || ctx.Err() != nil {
			r.Incomplete = true
			break
		}
		// A threaded cgroup refuses; its processes are in the one above it.
		data, whole, err := read(root, path.Join(dirs[n], "cgroup.procs"))
		if n == 0 && err != nil {
			return
		}
		if err == nil && !whole {
			data, r.Incomplete = data[:strings.LastIndexByte(string(data), '\n')+1], true
		}
		for line := range strings.Lines(string(data)) {
			if pid, err := strconv.ParseUint(strings.TrimSpace(line), 10, 32); err == nil && pid > 0 {
				pids = append(pids, uint32(pid))
			}
		}
		children, _ := fs.ReadDir(root.FS(), dirs[n]) // it may have been removed
		for _, child := range children {
			if child.IsDir() {
				dirs = append(dirs, path.Join(dirs[n], child.Name()))
			}
		}
	}
	r.processes(ctx, pids)
}

// processes reads the largest of some.
func (r *breakdown) processes(ctx context.Context, pids []uint32) {
	slices.Sort(pids)
	pids = slices.Compact(pids)
	if len(pids) > maxPIDs {
		pids, r.Incomplete = pids[:maxPIDs], true
	}
	var all []event.Process
	for _, pid := range pids {
		if ctx.Err() != nil {
			r.Incomplete = true
			break
		}
		if rss, ok := r.rss(pid); ok {
			all = append(all, event.Process{PID: pid, RSS: rss})
		}
	}
	if len(all) == 0 && r.Incomplete {
		return // there may be some
	}
	r.ProcessesSeen = new(uint32(len(all)))
	slices.SortFunc(all, func(a, b event.Process) int { return cmp.Or(cmp.Compare(b.RSS, a.RSS), cmp.Compare(a.PID, b.PID)) })
	for _, p := range all[:min(len(all), maxProcesses)] {
		dir := strconv.FormatUint(uint64(p.PID), 10)
		if comm, _, err := read(r.proc, dir+"/comm"); err == nil {
			p.Comm = strings.ToValidUTF8(strings.TrimSuffix(string(comm), "\n"), "\ufffd")
		}
		if text, _, err := read(r.proc, dir+"/oom_score_adj"); err == nil {
			if adj, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 16); err == nil {
				p.OOMScoreAdj = new(int16(adj))
			}
		}
		r.Processes = append(r.Processes, p)
	}
}

// rss reads how much memory a process has, in bytes. Kernel threads have none, nor has a process that is exiting.
// /proc/PID/statm takes no lock of the process's memory (task_statm() in fs/proc/task_mmu.c), which it may hold itself
// while it waits for memory.
func (r *breakdown) rss(pid uint32) (uint64, bool) {
	data, _, err := read(r.proc, strconv.FormatUint(uint64(pid), 10)+"/statm")
	if err != nil {
		return 0, false
	}
	fields := strings.Fields(string(data))
	if len(fields) < 2 {
		return 0, false
	}
	pages, err := strconv.ParseUint(fields[1], 10, 64)
	if err != nil || pages == 0 || pages > maxValue>>16 {
		return 0, false
	}
	return pages * uint64(os.Getpagesize()), true
}
