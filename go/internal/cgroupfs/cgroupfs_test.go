package cgroupfs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// machine is this machine's own hierarchy.
func machine(t *testing.T) Hierarchy {
	t.Helper()
	h, err := Find("/proc")
	check(t, err)
	return h
}

func newGroup(t *testing.T, limit uint64) *Cgroup {
	t.Helper()
	group, err := machine(t).New(limit)
	check(t, err)
	removeLater(t, group)
	return group
}

func removeLater(t *testing.T, group *Cgroup) {
	t.Cleanup(func() {
		if err := group.Remove(); err != nil {
			t.Error(err)
		}
	})
}

func content(t *testing.T, path ...string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(path...))
	check(t, err)
	return strings.TrimSpace(string(data))
}

// DIR in testdata stands for a directory whose subdirectories have a file cgroup.controllers each.
func TestFind(t *testing.T) {
	dir := t.TempDir()
	for mount, controllers := range map[string]string{
		"unified":         "cpuset cpu io memory hugetlb pids\n",
		"hybrid":          "hugetlb\n",
		"none":            "",
		"similar":         "memory_recursiveprot memoryx\n",
		"with space\tand": "memory",
	} {
		check(t, os.MkdirAll(filepath.Join(dir, mount), 0o755))
		check(t, os.WriteFile(filepath.Join(dir, mount, "cgroup.controllers"), []byte(controllers), 0o644))
	}
	for _, tt := range []struct {
		file string
		want Hierarchy
		err  error
	}{
		{"v2", Hierarchy{Mount: dir + "/unified", Version: 2}, nil},
		{"v1", Hierarchy{Mount: "/sys/fs/cgroup/memory", Version: 1}, nil},
		{"v1-combined", Hierarchy{Mount: "/cgroup/memory,cpu", Version: 1}, nil},
		{"hybrid", Hierarchy{Mount: "/sys/fs/cgroup/memory", Version: 1, Hybrid: true}, nil},
		{"hybrid-v2-first", Hierarchy{Mount: "/sys/fs/cgroup/memory", Version: 1, Hybrid: true}, nil},
		{"hybrid-memory-on-v2", Hierarchy{Mount: dir + "/unified", Version: 2}, nil},
		{"twice", Hierarchy{Mount: dir + "/unified", Version: 2}, nil},
		{"escaped", Hierarchy{Mount: dir + "/with space\tand", Version: 2}, nil},
		{"none", Hierarchy{}, ErrNoController},
		{"garbage", Hierarchy{}, ErrNoController},
		{"empty", Hierarchy{}, ErrNoController},
	} {
		t.Run(tt.file, func(t *testing.T) {
			procfs := t.TempDir()
			check(t, os.Mkdir(procfs+"/self", 0o755))
			text := strings.ReplaceAll(content(t, "testdata", tt.file+".mountinfo"), "DIR", dir)
			check(t, os.WriteFile(procfs+"/self/mountinfo", []byte(text), 0o644))
			got, err := Find(procfs)
			if got != tt.want || !errors.Is(err, tt.err) {
				t.Errorf("got %+v, %v", got, err)
			}
		})
	}
	if _, err := Find(dir); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), dir+"/self/mountinfo") {
		t.Errorf("without mountinfo: %v", err)
	}
}

func TestNewSetsLimits(t *testing.T) {
	const limit = 64 << 20
	group := newGroup(t, limit)
	if want := filepath.Join(group.Mount, prefix+strconv.Itoa(os.Getpid())); group.Dir != want {
		t.Errorf("made %s, want %s", group.Dir, want)
	}
	if want := "/" + filepath.Base(group.Dir); group.Path() != want {
		t.Errorf("path %q, want %q", group.Path(), want)
	}
	var st unix.Stat_t
	check(t, unix.Stat(group.Dir, &st))
	if group.ID != st.Ino || group.ID == 0 {
		t.Errorf("id %d, want %d", group.ID, st.Ino)
	}
	limitFile, swapFile := "memory.max", "memory.swap.max"
	if group.Version == 1 {
		limitFile, swapFile = "memory.limit_in_bytes", "memory.swappiness"
		if got := content(t, group.Dir, "memory.use_hierarchy"); got != "1" {
			t.Errorf("memory.use_hierarchy is %s", got)
		}
	}
	if got := content(t, group.Dir, limitFile); got != strconv.Itoa(limit) {
		t.Errorf("%s is %s", limitFile, got)
	}
	if got := content(t, group.Dir, swapFile); got != "0" {
		t.Errorf("%s is %s", swapFile, got)
	}
	if n, err := group.Kills(); n != 0 || err != nil {
		t.Errorf("%d kills, %v, in a cgroup that is new", n, err)
	}

	// There is one for each process.
	if again, err := group.New(limit); !errors.Is(err, fs.ErrExist) {
		t.Errorf("a second one: %v, %v", again, err)
	}
}

func TestChild(t *testing.T) {
	parent := newGroup(t, 64<<20)
	middle, err := parent.Child("middle", Unlimited)
	check(t, err)
	removeLater(t, middle)
	leaf, err := middle.Child("leaf", 16<<20)
	check(t, err)
	removeLater(t, leaf)
	if want := parent.Path() + "/middle/leaf"; leaf.Path() != want || leaf.Version != parent.Version || leaf.ID == middle.ID {
		t.Errorf("leaf %+v at %q, want %q", leaf, leaf.Path(), want)
	}
	limitFile := map[int]string{1: "memory.limit_in_bytes", 2: "memory.max"}[parent.Version]
	if got := content(t, leaf.Dir, limitFile); got != strconv.Itoa(16<<20) {
		t.Errorf("the leaf's limit is %s", got)
	}
	// Without a limit it is version 1's PAGE_COUNTER_MAX or version 2's "max".
	if got := content(t, middle.Dir, limitFile); got != "max" && len(got) < 19 {
		t.Errorf("the limit of the one without is %s", got)
	}
}

// The process in a cgroup keeps it; once it is gone, Remove comes through.
func TestAddAndRemove(t *testing.T) {
	group := newGroup(t, 64<<20)
	sleep := exec.Command("sleep", "1")
	check(t, sleep.Start())
	defer func() { _ = sleep.Wait() }()
	check(t, group.Add(sleep.Process.Pid))
	if got := content(t, group.Dir, "cgroup.procs"); got != strconv.Itoa(sleep.Process.Pid) {
		t.Errorf("cgroup.procs holds %q, want %d", got, sleep.Process.Pid)
	}
	check(t, group.Remove()) // waits for the second that the process lasts
	if _, err := os.Stat(group.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("after Remove: %v", err)
	}
	check(t, group.Remove()) // it may have been removed already

	if err := group.Add(os.Getpid()); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), group.Dir) {
		t.Errorf("a process into a cgroup that is gone: %v", err)
	}
	if _, err := group.Kills(); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "count the cgroup's kills") {
		t.Errorf("the kills of a cgroup that is gone: %v", err)
	}
}

// A cgroup that somebody stays in is said to be there still.
func TestRemoveBusy(t *testing.T) {
	group := newGroup(t, 64<<20)
	sleep := exec.Command("sleep", "60")
	check(t, sleep.Start())
	check(t, group.Add(sleep.Process.Pid))
	err := group.Remove()
	check(t, sleep.Process.Kill())
	_ = sleep.Wait()
	if !errors.Is(err, unix.EBUSY) || !strings.Contains(err.Error(), group.Dir) {
		t.Errorf("got %v", err)
	}
}

// deadPID is the ID of a process that has been and is no more.
func deadPID(t *testing.T) int {
	t.Helper()
	c := exec.Command("true")
	check(t, c.Run())
	return c.Process.Pid
}

// What a killed selftest left behind goes; what belongs to a process that lives stays, and so does
// what is not ours.
func TestNewRemovesStale(t *testing.T) {
	h := machine(t)
	mkdir := func(name string) string {
		t.Helper()
		dir := filepath.Join(h.Mount, name)
		check(t, os.Mkdir(dir, 0o755))
		t.Cleanup(func() { _ = unix.Rmdir(dir) })
		return dir
	}
	dead := prefix + strconv.Itoa(deadPID(t))
	stale := []string{mkdir(dead)}
	stale = append(stale, mkdir(dead+"/a"), mkdir(dead+"/a/b"), mkdir(dead+"/c"))
	kept := []string{mkdir(prefix + strconv.Itoa(os.Getppid())), mkdir(prefix + "kept-" + strconv.Itoa(os.Getpid()))}
	busy := mkdir(prefix + strconv.Itoa(deadPID(t)))
	sleep := exec.Command("sleep", "60")
	check(t, sleep.Start())
	defer func() {
		_ = sleep.Process.Kill()
		_ = sleep.Wait()
	}()
	check(t, write(busy+"/cgroup.procs", strconv.Itoa(sleep.Process.Pid)))

	newGroup(t, 64<<20)
	for _, dir := range stale {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there: %v", dir, err)
		}
	}
	for _, dir := range append(kept, busy) {
		if _, err := os.Stat(dir); err != nil {
			t.Errorf("%s went too: %v", dir, err)
		}
	}
}

// asNobody runs f with the rights on files of a user who has none.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// Of this thread alone, and with it go the capabilities that override permissions (credentials(7)).
	check(t, unix.Setfsuid(65534))
	defer func() { check(t, unix.Setfsuid(0)) }()
	f()
}

func TestWithoutRights(t *testing.T) {
	group := newGroup(t, 64<<20)
	other := Hierarchy{Mount: group.Dir, Version: group.Version}
	asNobody(t, func() {
		if made, err := other.New(1 << 20); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "make a scratch cgroup: mkdir "+group.Dir) {
			t.Errorf("New: %v, %v", made, err)
		}
		if err := group.Add(os.Getpid()); !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), fmt.Sprint(os.Getpid())) {
			t.Errorf("Add: %v", err)
		}
		begun := time.Now()
		if err := group.Remove(); !errors.Is(err, fs.ErrPermission) || time.Since(begun) > time.Second {
			t.Errorf("Remove: %v after %s", err, time.Since(begun)) // waiting would not help
		}
	})
}

// bare is a version 2 cgroup that does not hand the memory controller down: the root of a hybrid
// machine's unified hierarchy, or a new cgroup of a pure one.
func bare(t *testing.T) Hierarchy {
	t.Helper()
	h := machine(t)
	if h.Version == 2 {
		return Hierarchy{Mount: newGroup(t, Unlimited).Dir, Version: 2}
	}
	mount := t.TempDir()
	check(t, unix.Mount("cgroup2", mount, "cgroup2", 0, ""))
	t.Cleanup(func() {
		if err := unix.Unmount(mount, 0); err != nil {
			t.Error(err)
		}
	})
	return Hierarchy{Mount: mount, Version: 2}
}

// A cgroup that cannot be limited is not left behind, and the error says where to look.
func TestControllerNotHandedDown(t *testing.T) {
	h := bare(t)
	group, err := h.New(64 << 20)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "is memory in "+h.Mount+"/cgroup.subtree_control?") {
		t.Errorf("New: %v, %v", group, err)
	}
	if left, _ := filepath.Glob(h.Mount + "/" + prefix + strconv.Itoa(os.Getpid())); left != nil {
		t.Errorf("left behind: %v", left)
	}
	group, err = h.New(Unlimited)
	check(t, err)
	removeLater(t, group)
	if _, err := group.Kills(); err == nil {
		t.Error("kills of a cgroup without the memory controller")
	}
	if child, err := group.Child("child", Unlimited); err == nil || !strings.Contains(err.Error(), "enable the memory controller below "+group.Dir) {
		t.Errorf("Child: %v, %v", child, err)
	}
}

// What files say that no real machine at hand shows: counts, and the lack of them.
func TestKills(t *testing.T) {
	for _, tt := range []struct {
		version    int
		file, text string
		want       uint64
		err        string
	}{
		{1, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 7\n", 7, ""},
		{2, "memory.events", "low 0\nhigh 0\nmax 12\noom 3\noom_kill 2\noom_group_kill 1\n", 2, ""},
		{1, "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\n", 0, "has no oom_kill"}, // before Linux 4.13
		{2, "memory.events", "oom_kill many\n", 0, "invalid syntax"},
	} {
		dir := t.TempDir()
		check(t, os.WriteFile(filepath.Join(dir, tt.file), []byte(tt.text), 0o644))
		got, err := (&Cgroup{Hierarchy: Hierarchy{Version: tt.version}, Dir: dir}).Kills()
		if got != tt.want || (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
			t.Errorf("%q: %d, %v", tt.text, got, err)
		}
	}
}

// Whatever mountinfo says, a hierarchy that is found has a mount point.
func FuzzFind(f *testing.F) {
	f.Add([]byte("25 30 0:23 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw\n33 25 0:28 / /sys/fs/cgroup/me\\040mory rw - cgroup cgroup rw,memory\n"))
	procfs := f.TempDir()
	if err := os.Mkdir(filepath.Join(procfs, "self"), 0o755); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, mounts []byte) {
		check(t, os.WriteFile(filepath.Join(procfs, "self/mountinfo"), mounts, 0o600))
		h, err := Find(procfs)
		if err == nil && (h.Mount == "" || h.Version != 1 && h.Version != 2) || err != nil && !errors.Is(err, ErrNoController) {
			t.Errorf("%+v, %v", h, err)
		}
	})
}
