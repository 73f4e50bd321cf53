// Package cgroupfs finds the memory controller's mount. It also makes memory cgroups in which an OOM kill
// does no harm: below the root of the hierarchy, limited, and removed afterwards. The selftest and the
// tests use those.
package cgroupfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Hierarchy is where the memory controller lives on this machine.
type Hierarchy struct {
	Mount   string // of its root, as this process sees it
	Version int    // 1 or 2
	// Hybrid is set on version 1 when a version 2 hierarchy, without the memory controller, is
	// mounted beside it.
	Hybrid bool
}

// ErrNoController is wrapped by the error of Find when no mount has the memory controller.
var ErrNoController = errors.New("no cgroup mount has it")

// Find finds the memory controller's mount in procfs.
func Find(procfs string) (Hierarchy, error) {
	mounts, err := os.ReadFile(procfs + "/self/mountinfo")
	if err != nil {
		return Hierarchy{}, fmt.Errorf("find the memory controller: %w", err)
	}
	var found Hierarchy
	unified := false
	for line := range strings.Lines(string(mounts)) {
		// proc(5): … mount point (5th field) … " - " type source super-options
		before, after, ok := strings.Cut(line, " - ")
		left, right := strings.Fields(before), strings.Fields(after)
		if !ok || len(left) < 5 || len(right) < 3 {
			continue
		}
		mount := unescape.Replace(left[4])
		version := 0
		switch right[0] {
		case "cgroup":
			if slices.Contains(strings.Split(right[2], ","), "memory") {
				version = 1
			}
		case "cgroup2":
			unified = true
			controllers, err := os.ReadFile(filepath.Join(mount, "cgroup.controllers"))
			if err == nil && slices.Contains(strings.Fields(string(controllers)), "memory") {
				version = 2
			}
		}
		// The first mount counts: a later one of the same hierarchy may show a part of it only.
		if found.Version == 0 && version != 0 {
			found = Hierarchy{Mount: mount, Version: version}
		}
	}
	if found.Version == 0 {
		return Hierarchy{}, fmt.Errorf("find the memory controller: %w", ErrNoController)
	}
	found.Hybrid = found.Version == 1 && unified
	return found, nil
}

// unescape undoes what the kernel does to a path in mountinfo (mangle() in fs/seq_file.c).
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// Cgroup is a cgroup of our own.
type Cgroup struct {
	Hierarchy
	Dir string
	// ID is the kernfs node's ID: the directory's inode number.
	ID uint64
}

const prefix = "oom-tracer-selftest-"

// Unlimited leaves a cgroup without a limit of its own.
const Unlimited = 0

// New makes a cgroup with a limit in bytes and no swap, directly below the root. Its name tells whose
// it is: should this process be killed, the next one to call New removes it.
//
// It fails without root, and on version 2 when the root does not hand the memory controller down.
func (h Hierarchy) New(limit uint64) (*Cgroup, error) {
	h.removeStale()
	return h.make(filepath.Join(h.Mount, prefix+strconv.Itoa(os.Getpid())), limit)
}

// Child makes a cgroup inside c. On version 2 the controller is handed down to it, and c can then hold
// no process itself.
func (c *Cgroup) Child(name string, limit uint64) (*Cgroup, error) {
	if c.Version == 2 {
		if err := write(filepath.Join(c.Dir, "cgroup.subtree_control"), "+memory"); err != nil {
			return nil, fmt.Errorf("enable the memory controller below %s: %w", c.Dir, err)
		}
	}
	return c.make(filepath.Join(c.Dir, name), limit)
}

func (h Hierarchy) make(dir string, limit uint64) (_ *Cgroup, err error) {
	c := &Cgroup{Hierarchy: h, Dir: dir}
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make a scratch cgroup: %w", err)
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, c.Remove())
		}
	}()
	var st unix.Stat_t
	if err := unix.Stat(dir, &st); err != nil {
		return nil, fmt.Errorf("read the scratch cgroup's id: %w", err)
	}
	c.ID = st.Ino
	if h.Version == 1 {
		// Before Linux 5.11 a parent's limit binds its children only if this is set, and before they
		// are made; since then it is always set.
		err := write(filepath.Join(dir, "memory.use_hierarchy"), "1")
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("make the scratch cgroup hierarchical: %w", err)
		}
	}
	if limit == Unlimited {
		return c, nil
	}
	limitFile, swapFile := "memory.max", "memory.swap.max"
	if h.Version == 1 {
		limitFile, swapFile = "memory.limit_in_bytes", "memory.swappiness"
	}
	err = write(filepath.Join(dir, limitFile), strconv.FormatUint(limit, 10))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("limit the scratch cgroup: %w (is memory in %s/cgroup.subtree_control?)", err, filepath.Dir(dir))
	}
	if err != nil {
		return nil, fmt.Errorf("limit the scratch cgroup: %w", err)
	}
	// A kernel without swap has no such file.
	if err := write(filepath.Join(dir, swapFile), "0"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("limit the scratch cgroup's swap: %w", err)
	}
	return c, nil
}

// write writes to a file that is there. os.WriteFile would try to make one that is not, which a cgroup
// file system refuses with EACCES: it would look like a lack of rights.
func write(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = f.WriteString(text)
	return err
}

// removeStale removes what a process that was killed left behind: empty cgroups of dead processes, and
// those inside them.
func (h Hierarchy) removeStale() {
	dirs, _ := filepath.Glob(filepath.Join(h.Mount, prefix+"*"))
	for _, dir := range dirs {
		pid, err := strconv.Atoi(strings.TrimPrefix(filepath.Base(dir), prefix))
		if err != nil || !errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			continue
		}
		var tree []string
		_ = filepath.WalkDir(dir, func(path string, entry fs.DirEntry, err error) error {
			if err == nil && entry.IsDir() {
				tree = append(tree, path)
			}
			return nil
		})
		for _, dir := range slices.Backward(tree) {
			_ = unix.Rmdir(dir) // refused while a process is in it
		}
	}
}

// Path is the cgroup's path below the mount.
func (c *Cgroup) Path() string { return strings.TrimPrefix(c.Dir, strings.TrimSuffix(c.Mount, "/")) }

// Add moves a process in.
func (c *Cgroup) Add(pid int) error {
	if err := write(filepath.Join(c.Dir, "cgroup.procs"), strconv.Itoa(pid)); err != nil {
		return fmt.Errorf("move process %d into the scratch cgroup: %w", pid, err)
	}
	return nil
}

// Kills is the kernel's count of processes that its OOM killer has killed in the cgroup: on version 1
// in this one alone (mem_cgroup_oom_control_read()), on version 2 in those below it as well
// (Documentation/admin-guide/cgroup-v2.rst, memory.events).
func (c *Cgroup) Kills() (uint64, error) {
	file := filepath.Join(c.Dir, "memory.events")
	if c.Version == 1 {
		file = filepath.Join(c.Dir, "memory.oom_control")
	}
	data, err := os.ReadFile(file)
	if err != nil {
		return 0, fmt.Errorf("count the cgroup's kills: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		if n, ok := strings.CutPrefix(line, "oom_kill "); ok {
			return strconv.ParseUint(strings.TrimSpace(n), 10, 64)
		}
	}
	return 0, fmt.Errorf("count the cgroup's kills: %s has no oom_kill", file)
}

// Remove removes the cgroup. A process that was killed leaves it a moment later, so it tries for two
// seconds.
func (c *Cgroup) Remove() error {
	for deadline := time.Now().Add(2 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := unix.Rmdir(c.Dir)
		if err == nil || errors.Is(err, unix.ENOENT) {
			return nil
		}
		if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return fmt.Errorf("remove the scratch cgroup %s: %w", c.Dir, err)
		}
	}
}
