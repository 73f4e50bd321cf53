package usage

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// Breakdown reads what the memory of the cgroup that owns limit is used for, or of the node if limit is nil. It fails
// only where there is nothing to read; errs are about single files. AfterNS is the caller's.
func (t *Tree) Breakdown(ctx context.Context, procfs string, limit *event.Limit) (_ *event.Breakdown, errs []error, err error) {
	proc, err := os.OpenRoot(procfs)
	if err != nil {
		return nil, nil, fmt.Errorf("read what the memory is used for: %w", err)
	}
	defer proc.Close()
	r := breakdown{proc: proc, Breakdown: event.Breakdown{Source: event.SourceMeminfo}}
	if limit == nil {
		r.node(ctx)
	} else if err := r.cgroup(ctx, t, limit); err != nil {
		return nil, nil, fmt.Errorf("read what the memory of a cgroup is used for: %w", err)
	}
	r.NodePressure = pressure(r.file(proc, "pressure/memory"))
	return &r.Breakdown, r.errs, nil
}

// breakdown is one reading under way.
type breakdown struct {
	event.Breakdown
	proc *os.Root
	errs []error
}

// file reads a file. It returns nothing if this kernel does not have it, and if the cgroup is gone.
func (r *breakdown) file(dir *os.Root, name string) []byte {
	data, _, err := read(dir, name)
	// Without pressure stall information (psi=0, cgroup.pressure) the kernel may have the file, and refuse to read it.
	if err != nil && !gone(err) && !errors.Is(err, unix.EOPNOTSUPP) {
		r.fail(fmt.Errorf("read %s: %w", filepath.Join(dir.Name(), name), err))
	}
	if err != nil {
		return nil
	}
	return data
}

func (r *breakdown) fail(err error) {
	if len(r.errs) < maxErrors {
		r.errs = append(r.errs, err)
	}
}

// number reads a file that has one number.
func (r *breakdown) number(dir *os.Root, name string) *uint64 {
	data := r.file(dir, name)
	if data == nil {
		return nil
	}
	n, err := number(data)
	if err != nil {
		r.fail(fmt.Errorf("read %s: %w", filepath.Join(dir.Name(), name), err))
	}
	return n
}

func (r *breakdown) node(ctx context.Context) {
	m := meminfo(r.file(r.proc, "meminfo"))
	without := func(a, b *uint64) *uint64 {
		if a == nil || b == nil || *b > *a {
			return nil
		}
		return new(*a - *b)
	}
	r.Total, r.Usage = m["MemTotal"], without(m["MemTotal"], m["MemFree"])
	r.Anon, r.Shmem, r.Zswap = m["AnonPages"], m["Shmem"], m["Zswap"]
	r.Slab, r.SlabUnreclaimable, r.KernelStack, r.PageTables = m["Slab"], m["SUnreclaim"], m["KernelStack"], m["PageTables"]
	r.Swap = without(m["SwapTotal"], m["SwapFree"])
	if cached, buffers, swap := m["Cached"], m["Buffers"], m["SwapCached"]; cached != nil && buffers != nil && swap != nil {
		r.File = new(*cached + *buffers + *swap)
	}
	r.nodeProcesses(ctx)
}

// errCgroup means that the path of a cgroup cannot be used.
var errCgroup = errors.New("its path is not known as a whole")

func (r *breakdown) cgroup(ctx context.Context, t *Tree, limit *event.Limit) error {
	r.Source, r.Limit = event.SourceStat, limit
	c := limit.Cgroup
	if c == nil || c.Truncated {
		return errCgroup
	}
	dir, err := t.open(c)
	if errors.Is(err, errRemoved) {
		r.Gone = true
		return nil
	}
	if err != nil {
		return err
	}
	defer dir.Close()
	stat := flatKeyed(r.file(dir, "memory.stat"))
	if t.Version == 1 {
		r.Usage = r.number(dir, "memory.usage_in_bytes")
		r.Anon, r.File, r.Shmem, r.Swap = stat["total_rss"], stat["total_cache"], stat["total_shmem"], stat["total_swap"]
	} else {
		r.Usage, r.Swap = r.number(dir, "memory.current"), r.number(dir, "memory.swap.current")
		r.Anon, r.File, r.Shmem, r.Sock, r.Zswap = stat["anon"], stat["file"], stat["shmem"], stat["sock"], stat["zswap"]
		r.Slab, r.SlabUnreclaimable, r.KernelStack, r.PageTables = stat["slab"], stat["slab_unreclaimable"], stat["kernel_stack"], stat["pagetables"]
		r.Pressure = pressure(r.file(dir, "memory.pressure"))
		r.events(flatKeyed(r.file(dir, "memory.events")))
	}
	r.cgroupProcesses(ctx, dir)
	if again, err := t.open(c); err == nil {
		again.Close()
	} else {
		r.Gone = true
	}
	return nil
}

func (r *breakdown) events(m map[string]*uint64) {
	e := event.MemoryEvents{Low: m["low"], High: m["high"], Max: m["max"], OOM: m["oom"], OOMKill: m["oom_kill"], OOMGroupKill: m["oom_group_kill"]}
	if e != (event.MemoryEvents{}) {
		r.Events = &e
	}
}

// errRemoved means that a cgroup is no more. Another one may have its path.
var errRemoved = errors.New("the cgroup was removed")

// open opens the directory of a cgroup.
func (t *Tree) open(c *event.Cgroup) (*os.Root, error) {
	path := filepath.Join(t.Mount, c.Path)
	dir, err := os.OpenRoot(path)
	if gone(err) {
		return nil, fmt.Errorf("open %s: %w", path, errRemoved)
	}
	if err != nil {
		return nil, err
	}
	info, err := dir.Stat(".")
	if err == nil {
		if stat, ok := info.Sys().(*syscall.Stat_t); ok && stat.Ino == c.ID {
			return dir, nil
		}
	}
	dir.Close()
	if err != nil && !gone(err) {
		return nil, err
	}
	return nil, fmt.Errorf("open %s: %w", path, errRemoved)
}

// maxValue is more than a machine can have, and the sum of a few such values can be computed.
const maxValue = 1 << 60

// flatKeyed parses lines of a name and a number, such as memory.stat and memory.events. A line that is anything else
// has no value, nor has a name that is there twice.
func flatKeyed(data []byte) map[string]*uint64 {
	return values(data, func(fields []string) (name, value string, unit uint64) {
		if len(fields) != 2 {
			return "", "", 0
		}
		return fields[0], fields[1], 1
	})
}

// meminfo parses /proc/meminfo into bytes, as flatKeyed does.
func meminfo(data []byte) map[string]*uint64 {
	return values(data, func(fields []string) (name, value string, unit uint64) {
		if len(fields) != 3 || fields[2] != "kB" {
			return "", "", 0
		}
		name, ok := strings.CutSuffix(fields[0], ":")
		if !ok {
			return "", "", 0
		}
		return name, fields[1], 1024
	})
}

func values(data []byte, split func(fields []string) (name, value string, unit uint64)) map[string]*uint64 {
	all := map[string]*uint64{}
	for line := range strings.Lines(string(data)) {
		if !strings.HasSuffix(line, "\n") {
			break // cut
		}
		name, value, unit := split(strings.Fields(line))
		if name == "" {
			continue
		}
		if _, twice := all[name]; twice {
			all[name] = nil
			continue
		}
		all[name] = nil
		if n, err := strconv.ParseUint(value, 10, 64); err == nil && n <= maxValue/unit {
			all[name] = new(n * unit)
		}
	}
	return all
}

// pressure parses pressure stall information. It returns nil if there is none in it.
func pressure(data []byte) *event.Pressure {
	var p event.Pressure
	for line := range strings.Lines(string(data)) {
		fields := strings.Fields(line)
		if len(fields) < 4 {
			continue
		}
		var s event.Stall
		ok := share(fields[1], "avg10=", &s.Avg10) && share(fields[2], "avg60=", &s.Avg60) && share(fields[3], "avg300=", &s.Avg300)
		switch {
		case !ok:
		case fields[0] == "some":
			p.Some = &s
		case fields[0] == "full":
			p.Full = &s
		}
	}
	if p == (event.Pressure{}) {
		return nil
	}
	return &p
}

// share parses a percentage behind its name. What is not from 0 to 100 is none, nor is NaN.
func share(field, name string, to *float64) bool {
	text, ok := strings.CutPrefix(field, name)
	n, err := strconv.ParseFloat(text, 64)
	*to = n
	return ok && err == nil && n >= 0 && n <= 100
}
