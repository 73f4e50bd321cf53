// Package neighbours reads how much memory the pods of a node hold.
//
// Rule of the package: it is done when the node has the least memory to spare. So it is bounded in time and in
// what it looks at, and what it does not get it leaves out, and says so.
package neighbours

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
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
	// maxDirs bounds the search for it, and maxPods what is read: more than any node has (the kubelet's
	// default for pods is 110).
	maxDirs = 5000
	maxPods = 5000
)

// Tree is the hierarchy of the memory controller.
type Tree struct {
	Mount   string // where its root is mounted
	Version int    // 1 or 2
	Root    string // the node's own root within it; see cgroup.Parse
}

// Reading is what was read.
type Reading struct {
	Pods       []event.PodMemory // the largest first
	Seen       int
	Incomplete bool
	// Errors are about single files.
	Errors []error
}

// maxErrors is how many of them are kept.
const maxErrors = 5

// ErrNoPods means that no kubelet's tree was found.
var ErrNoPods = errors.New("there is no cgroup of a kubelet")

// Read reads the pods' cgroups until ctx ends, and returns the top largest. What lies inside of a pod is not
// looked at. It fails only where there is nothing to read.
func (t *Tree) Read(ctx context.Context, top int) (Reading, error) {
	var r Reading
	found := false
	visited := 0
	queue := []string{t.Root}
	for depth := 0; depth <= maxDepth && len(queue) > 0; depth++ {
		var next []string
		for _, dir := range queue {
			if visited++; visited > maxDirs || ctx.Err() != nil {
				r.Incomplete = true
				break
			}
			if cgroup.Level(t.Root, dir) == event.LevelKubepods {
				found = true
				t.pods(ctx, dir, &r)
				continue
			}
			if depth < maxDepth {
				children, err := t.children(dir)
				if err != nil && depth == 0 {
					return Reading{}, fmt.Errorf("read the cgroups of pods: %w", err)
				}
				next = append(next, children...)
			}
		}
		queue = next
	}
	if !found && ctx.Err() != nil {
		return Reading{}, fmt.Errorf("read the cgroups of pods: %w", context.Cause(ctx))
	}
	if !found {
		return Reading{}, fmt.Errorf("read the cgroups of pods below %s: %w", filepath.Join(t.Mount, t.Root), ErrNoPods)
	}
	slices.SortFunc(r.Pods, func(a, b event.PodMemory) int {
		return cmp.Or(cmp.Compare(b.Usage, a.Usage), strings.Compare(a.PodUID, b.PodUID))
	})
	r.Pods = slices.Clip(r.Pods[:min(top, len(r.Pods))])
	return r, nil
}

// pods reads the pods below a kubepods or one of its QoS classes.
func (t *Tree) pods(ctx context.Context, dir string, r *Reading) {
	children, err := t.children(dir)
	if err != nil {
		r.fail(err)
		return
	}
	for _, child := range children {
		if ctx.Err() != nil || r.Seen >= maxPods {
			r.Incomplete = true
			return
		}
		switch cgroup.Level(t.Root, child) {
		case event.LevelQoS:
			t.pods(ctx, child, r)
		case event.LevelPod:
			c := cgroup.Parse(t.Root, child)
			if c == nil || c.PodUID == "" {
				continue
			}
			p := event.PodMemory{PodUID: c.PodUID, Static: c.Static, QoS: c.QoS}
			known, err := t.memory(child, &p)
			if gone(err) && !known {
				continue // it has ended meanwhile
			}
			if r.Seen++; known {
				r.Pods = append(r.Pods, p)
			}
			if err != nil {
				r.fail(err)
			}
		}
	}
}

// gone tells that the cgroup, or a file that its version of the kernel does not have, is not there.
func gone(err error) bool { return errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ENODEV) }

func (r *Reading) fail(err error) {
	r.Incomplete = true
	if len(r.Errors) < maxErrors {
		r.Errors = append(r.Errors, err)
	}
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
		text := strings.TrimSpace(string(data))
		if text == "max" {
			return 0, false, nil
		}
		n, err := strconv.ParseUint(text, 10, 64)
		if err != nil {
			return 0, false, fmt.Errorf("read %s: %w", filepath.Join(t.Mount, dir, name), err)
		}
		return n, true, nil
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
