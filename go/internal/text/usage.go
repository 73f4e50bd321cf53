package text

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// NeighboursLine is what the memory was used for after a kill, without a newline, with the columns of an event.
func (t *Table) NeighboursLine(n *event.Neighbours) string {
	var parts []string
	if n.Breakdown != nil {
		parts = append(parts, breakdown(n.Breakdown)...)
	}
	if n.Pods != nil {
		parts = append(parts, podsLine(n))
	}
	if parts == nil {
		parts = append(parts, "not known")
	}
	return strings.Join([]string{
		t.start(n.Time, n.Node.Name),
		pad("usage", outcomeWidth),
		pad(Printable(string(n.Scope)), scopeWidth),
		strings.Join(parts, "; "),
	}, "  ")
}

func podsLine(n *event.Neighbours) string {
	var pods []string
	for i := range n.Pods {
		p := &n.Pods[i]
		hit, of := "", ""
		if p.Victim {
			hit = " (victim)"
		}
		if p.Max != nil {
			of = " of " + Size(*p.Max)
		}
		pods = append(pods, fmt.Sprintf("pod %s%s %s%s", Printable(p.PodUID), hit, Size(p.Usage), of))
	}
	line := strings.Join(pods, ", ")
	if line == "" {
		line = "no pod"
	}
	var notes []string
	if n.PodsSeen != nil {
		notes = append(notes, fmt.Sprintf("%d of %d pods", len(n.Pods), *n.PodsSeen))
	}
	if n.Incomplete {
		notes = append(notes, "not all could be read")
	}
	if notes != nil {
		line += " (" + strings.Join(notes, ", ") + ")"
	}
	return line
}

// Kind is a kind of memory.
type Kind struct {
	Name  string
	Bytes *uint64 // nil: not known
	// Held means that the kernel cannot free it when memory is short: somebody must let go of it.
	Held bool
}

// Kinds lists the kinds of memory, without counting any twice.
func Kinds(b *event.Breakdown) []Kind {
	// The kernel counts shared memory as a part of the page cache, and has updated only one of them at times.
	file := b.File
	if file != nil && b.Shmem != nil {
		file = new(*file - min(*file, *b.Shmem))
	}
	slab := b.Slab
	if slab != nil && b.SlabUnreclaimable != nil {
		slab = new(*slab - min(*slab, *b.SlabUnreclaimable))
	}
	return []Kind{
		{"anon", b.Anon, false}, {"file", file, false}, {"tmpfs or shared memory", b.Shmem, true},
		{"slab", slab, false}, {"unreclaimable slab", b.SlabUnreclaimable, true}, {"kernel stacks", b.KernelStack, true},
		{"page tables", b.PageTables, true}, {"network buffers", b.Sock, true}, {"zswap", b.Zswap, true},
	}
}

// LargePart is a clause about the kind of memory, other than anonymous memory, that held a large part of the limit, or of the
// node's memory: the largest of those that the kernel cannot free, if it is a quarter at least. It is empty if there is none.
// The page cache is none of them: the kernel frees it before it kills, and other processes may have filled it since.
func LargePart(b *event.Breakdown) string {
	if b == nil {
		return ""
	}
	of := b.Total
	if b.Limit != nil {
		of = b.Limit.Max
	}
	if of == nil {
		return ""
	}
	var largest Kind
	var bytes uint64
	for _, k := range Kinds(b) {
		if k.Held && k.Bytes != nil && *k.Bytes > bytes {
			largest, bytes = k, *k.Bytes
		}
	}
	if bytes == 0 || bytes < *of/4 {
		return ""
	}
	return fmt.Sprintf("of %s, %s were %s", Size(*of), Size(bytes), largest.Name)
}

// breakdown is what the memory was used for.
func breakdown(b *event.Breakdown) []string {
	what := "node"
	if l := b.Limit; l != nil {
		what = "limit " + Printable(string(l.Level))
		if l.Inferred {
			what += "?"
		}
		if l.Max != nil {
			what += " " + Size(*l.Max)
		}
	} else if b.Total != nil {
		what += " " + Size(*b.Total)
	}
	after := time.Duration(min(b.AfterNS, 1<<62)).Round(time.Millisecond)
	what += fmt.Sprintf(", %s after the kill", after)
	if b.Gone {
		what += " (the cgroup was removed)"
	}
	all := append(Kinds(b), Kind{"swap", b.Swap, false})
	slices.SortStableFunc(all, func(a, b Kind) int { return cmp.Compare(value(b.Bytes), value(a.Bytes)) })
	var used []string
	for _, k := range all {
		if value(k.Bytes) > 0 {
			used = append(used, Size(*k.Bytes)+" "+k.Name)
		}
	}
	if b.Usage != nil {
		used = slices.Insert(used, 0, "usage "+Size(*b.Usage))
	}
	if used != nil {
		what += ": " + strings.Join(used, ", ")
	}
	parts := []string{what}
	if e := b.Events; e != nil {
		var counts []string
		for _, c := range []struct {
			name string
			n    *uint64
		}{{"low", e.Low}, {"high", e.High}, {"max", e.Max}, {"oom", e.OOM}, {"oom_kill", e.OOMKill}, {"oom_group_kill", e.OOMGroupKill}} {
			if value(c.n) > 0 {
				counts = append(counts, fmt.Sprintf("%s %d", c.name, *c.n))
			}
		}
		if counts != nil {
			parts = append(parts, "events "+strings.Join(counts, ", "))
		}
	}
	for _, p := range []struct {
		name string
		p    *event.Pressure
	}{{"pressure", b.Pressure}, {"node pressure", b.NodePressure}} {
		if p.p == nil {
			continue
		}
		var stalls []string
		if s := p.p.Some; s != nil {
			stalls = append(stalls, "some "+stall(s))
		}
		if s := p.p.Full; s != nil {
			stalls = append(stalls, "full "+stall(s))
		}
		parts = append(parts, p.name+" "+strings.Join(stalls, " "))
	}
	if b.ProcessesSeen != nil {
		var processes []string
		for i := range b.Processes {
			p := &b.Processes[i]
			one := process(p.Comm, p.PID)
			if p.Victim {
				one += " (victim)"
			}
			processes = append(processes, one+" "+Size(p.RSS))
		}
		if processes == nil {
			processes = append(processes, "no process")
		}
		line := strings.Join(processes, ", ")
		if rest := uint64(*b.ProcessesSeen); rest > uint64(len(b.Processes)) {
			line += fmt.Sprintf(" (%d of %d processes)", len(b.Processes), rest)
		}
		if b.Incomplete {
			line += " (not all could be read)"
		}
		parts = append(parts, line)
	} else if b.Incomplete {
		parts = append(parts, "the processes could not be read in time")
	}
	return parts
}

// stall is the three averages in percent, as the load averages are shown.
func stall(s *event.Stall) string { return fmt.Sprintf("%.0f/%.0f/%.0f%%", s.Avg10, s.Avg60, s.Avg300) }

func value(n *uint64) uint64 {
	if n == nil {
		return 0
	}
	return *n
}
