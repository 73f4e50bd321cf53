package usage

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroup"
)

const (
	// maxDepth is how deep below the node's root the kubelet's tree may begin: each level of its --cgroup-root
	// is one.
	maxDepth = 4
	// maxDirs bounds the search for it, in which only cgroups that have children are opened, and maxPods what is
	// read: more than any node has (the kubelet's default for pods is 110).
	maxDirs = 5000
	maxPods = 5000
)

// Pods is what was read of the pods.
type Pods struct {
	Largest    []event.PodMemory // the largest first
	Seen       int
	Incomplete bool
	// Errors are about single files.
	Errors []error
}

// maxErrors is how many of them are kept.
const maxErrors = 5

// ErrNoPods means that no kubelet's tree was found.
var ErrNoPods = errors.New("there is no cgroup of a kubelet")

// Pods reads the pods' cgroups until ctx ends, and returns the top largest. What lies inside of a pod is not
// looked at. It fails only where there is nothing to read.
//
// The search goes down level by level and ends with the level on which the kubelet's tree is. It continues where pods
// have no containers in their cgroups: those of containerd's colon form are elsewhere (see cgroup.Parse). Where siblings
// are few it looks first: what somebody has forgotten to remove stands together by the thousand.
func (t *Tree) Pods(ctx context.Context, top int) (Pods, error) {
	s := search{tree: t, pods: map[string]*pod{}}
	queue := []string{t.Root}
	for depth := 0; depth < maxDepth && len(queue) > 0 && !s.done(); depth++ {
		var next [][]string // by parent
		for _, dir := range queue {
			if s.visited++; s.visited > maxDirs || ctx.Err() != nil {
				s.cut = true
				break
			}
			children, err := t.children(dir)
			if err != nil && depth == 0 {
				return Pods{}, fmt.Errorf("read the cgroups of pods: %w", err)
			}
			var siblings []string
			for _, child := range children {
				switch cgroup.Level(t.Root, child) {
				case event.LevelKubepods:
					s.found = true
					s.kubepods(ctx, child)
				case event.LevelContainer:
					s.container(child)
				default:
					if t.hasChildren(child) {
						siblings = append(siblings, child)
					}
				}
			}
			next = append(next, siblings)
		}
		slices.SortStableFunc(next, func(a, b []string) int { return cmp.Compare(len(a), len(b)) })
		queue = slices.Concat(next...)
	}
	r := s.reading
	for _, p := range s.pods {
		if p.known {
			r.Largest = append(r.Largest, p.PodMemory)
		}
		// It may have just begun, or its containers are where the search did not come.
		r.Incomplete = r.Incomplete || p.empty && s.cut
	}
	r.Seen = len(s.pods)
	if r.Seen == 0 && !s.found {
		err := ErrNoPods
		switch {
		case ctx.Err() != nil:
			err = context.Cause(ctx)
		case s.cut:
			err = fmt.Errorf("not found among the first %d cgroups", maxDirs)
		}
		return Pods{}, fmt.Errorf("read the cgroups of pods below %s: %w", filepath.Join(t.Mount, t.Root), err)
	}
	slices.SortFunc(r.Largest, func(a, b event.PodMemory) int {
		return cmp.Or(cmp.Compare(b.Usage, a.Usage), strings.Compare(a.PodUID, b.PodUID))
	})
	r.Largest = slices.Clip(r.Largest[:min(top, len(r.Largest))])
	return r, nil
}

// search is one reading under way.
type search struct {
	tree    *Tree
	reading Pods
	pods    map[string]*pod // by UID
	found   bool            // a kubelet's tree
	visited int
	cut     bool // there was more to search
}

type pod struct {
	event.PodMemory
	known bool // its usage
	empty bool // no container has been seen in its cgroup or elsewhere
	apart bool // it has containers elsewhere
}

// done reports whether every pod that was found has its containers.
func (s *search) done() bool {
	if !s.found {
		return false
	}
	for _, p := range s.pods {
		if p.empty {
			return false
		}
	}
	return true
}

// kubepods reads the pods below a kubepods or one of its QoS classes.
func (s *search) kubepods(ctx context.Context, dir string) {
	children, err := s.tree.children(dir)
	if err != nil {
		s.reading.fail(err)
		return
	}
	for _, child := range children {
		if ctx.Err() != nil {
			s.reading.Incomplete = true
			return
		}
		switch cgroup.Level(s.tree.Root, child) {
		case event.LevelKubepods, event.LevelQoS:
			s.kubepods(ctx, child)
		case event.LevelPod:
			c := cgroup.Parse(s.tree.Root, child)
			if c == nil || c.PodUID == "" {
				continue
			}
			m := event.PodMemory{PodUID: c.PodUID, Static: c.Static, QoS: c.QoS}
			known, err := s.tree.memory(child, &m)
			if gone(err) && !known {
				continue // it has ended meanwhile
			}
			if err != nil {
				s.reading.fail(err)
			}
			if p := s.pod(c); p != nil {
				p.empty = !p.apart && !s.tree.hasChildren(child)
				p.add(m, known)
			}
		}
	}
}

// container reads one whose name says of which pod it is, outside of the pod's cgroup.
func (s *search) container(dir string) {
	c := cgroup.Parse(s.tree.Root, dir)
	if c == nil || c.PodUID == "" {
		return
	}
	var m event.PodMemory
	known, err := s.tree.memory(dir, &m)
	if gone(err) && !known {
		return
	}
	if err != nil {
		s.reading.fail(err)
	}
	// The pod's limits do not hold for it, and its own are not the pod's.
	m.Max, m.Low, m.Min = nil, nil, nil
	if p := s.pod(c); p != nil {
		p.empty, p.apart = false, true
		p.add(m, known)
	}
}

// pod returns what is known of a pod, nil where there are too many.
func (s *search) pod(c *event.Container) *pod {
	p := s.pods[c.PodUID]
	if p == nil {
		if len(s.pods) >= maxPods {
			s.reading.Incomplete = true
			return nil
		}
		p = &pod{PodMemory: event.PodMemory{PodUID: c.PodUID, Static: c.Static, QoS: c.QoS}}
		s.pods[c.PodUID] = p
	}
	return p
}

// add adds what one of its cgroups holds.
func (p *pod) add(m event.PodMemory, known bool) {
	if !known {
		return
	}
	if !p.known {
		m.PodUID, m.Static, m.QoS = p.PodUID, p.Static, p.QoS
		p.PodMemory, p.known = m, true
	} else {
		sum := func(a, b *uint64) *uint64 {
			if a == nil || b == nil {
				return nil
			}
			return new(*a + *b)
		}
		p.Usage += m.Usage
		p.WorkingSet, p.Swap = sum(p.WorkingSet, m.WorkingSet), sum(p.Swap, m.Swap)
	}
	if p.apart {
		p.Max, p.Low, p.Min = nil, nil, nil
	}
}

func (r *Pods) fail(err error) {
	r.Incomplete = true
	if len(r.Errors) < maxErrors {
		r.Errors = append(r.Errors, err)
	}
}

// hasChildren reports whether a cgroup may have any. kernfs counts them in the number of links, as most file systems
// do (kernfs_refresh_inode() in fs/kernfs/inode.c).
func (t *Tree) hasChildren(dir string) bool {
	var stat unix.Stat_t
	if err := unix.Lstat(filepath.Join(t.Mount, dir), &stat); err != nil {
		return false
	}
	if stat.Nlink < 2 { // a file system that does not count, under a test
		children, err := t.children(dir)
		return err == nil && len(children) > 0
	}
	return stat.Nlink > 2
}

// children lists the cgroups directly in one.
func (t *Tree) children(dir string) ([]string, error) {
	entries, err := os.ReadDir(filepath.Join(t.Mount, dir))
	if err != nil {
		return nil, err
	}
	var all []string
	for _, e := range entries {
		if e.IsDir() {
			all = append(all, path.Join(dir, e.Name()))
		}
	}
	return all, nil
}

// memory reads the files of one cgroup. Where its usage is known it may fail for another one.
func (t *Tree) memory(dir string, p *event.PodMemory) (known bool, err error) {
	file := func(name string) (uint64, bool, error) {
		data, err := os.ReadFile(filepath.Join(t.Mount, dir, name))
		if err != nil {
			return 0, false, err
		}
		n, err := number(data)
		if err != nil {
			return 0, false, fmt.Errorf("read %s: %w", filepath.Join(t.Mount, dir, name), err)
		}
		if n == nil {
			return 0, false, nil
		}
		return *n, true, nil
	}
	var first error
	optional := func(name string) *uint64 {
		n, ok, err := file(name)
		if err != nil && !gone(err) && first == nil {
			first = err
		}
		if err != nil || !ok {
			return nil
		}
		return &n
	}
	usage, limit, inactive := "memory.current", "memory.max", "inactive_file"
	if t.Version == 1 {
		usage, limit, inactive = "memory.usage_in_bytes", "memory.limit_in_bytes", "total_inactive_file"
	}
	if p.Usage, _, err = file(usage); err != nil {
		return false, err
	}
	p.Max = optional(limit)
	if t.Version == 1 {
		// PAGE_COUNTER_MAX in include/linux/page_counter.h stands for none: LONG_MAX in whole pages.
		if p.Max != nil && *p.Max >= 1<<62 {
			p.Max = nil
		}
		if both := optional("memory.memsw.usage_in_bytes"); both != nil && *both >= p.Usage {
			p.Swap = new(*both - p.Usage)
		}
	} else {
		p.Low, p.Min, p.Swap = optional("memory.low"), optional("memory.min"), optional("memory.swap.current")
	}
	stat, err := os.ReadFile(filepath.Join(t.Mount, dir, "memory.stat"))
	if err != nil && !gone(err) && first == nil {
		first = err
	}
	for line := range strings.Lines(string(stat)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), inactive+" "); ok {
			if n, err := strconv.ParseUint(value, 10, 64); err == nil {
				p.WorkingSet = new(p.Usage - min(n, p.Usage))
			}
		}
	}
	return true, first
}
