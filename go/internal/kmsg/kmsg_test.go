package kmsg

import (
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// A whole report of a real kernel, as dmesg prints it: one kill and no other line is taken for one.
func TestParseWholeReport(t *testing.T) {
	text, err := os.ReadFile("testdata/6.18-memcg.txt")
	check(t, err)
	want := []Kill{{
		PID: 28033, Comm: "oom-selftest", TotalVM: 1864100 << 10, AnonRSS: 35712 << 10, FileRSS: 20428 << 10,
		PgTables: 232 << 10, OOMScoreAdj: 1000,
		Constraint: "CONSTRAINT_MEMCG", OOMMemcg: "/oom-tracer-selftest-28014", TaskMemcg: "/oom-tracer-selftest-28014",
		TriggerComm: "exe", GFPMask: "0xcc0",
	}}
	if diff := cmp.Diff(want, Parse(strings.Split(string(text), "\n"))); diff != "" {
		t.Error(diff)
	}
}

// kill is the line of __oom_kill_process() for a victim of 100 MiB, and what is to be read of it.
func kill(message string, pid int, comm string) (string, Kill) {
	line := message + ": Killed process " + strconv.Itoa(pid) + " (" + comm +
		") total-vm:102400kB, anon-rss:81920kB, file-rss:1024kB, shmem-rss:4kB, UID:1000 pgtables:200kB oom_score_adj:0"
	return line, Kill{
		PID: pid, Comm: comm, TotalVM: 100 << 20, AnonRSS: 80 << 20, FileRSS: 1 << 20, ShmemRSS: 4 << 10,
		UID: 1000, PgTables: 200 << 10,
	}
}

// The texts with odd numbers are from public reports; the others are what the format strings make that
// stand the same in mm/oom_kill.c, kernel/cgroup/cpuset.c and mm/memcontrol.c of 5.10, 6.1, 6.12 (also
// in the image of Debian's 6.12.95) and 7.2.
func TestParse(t *testing.T) {
	const (
		pod = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod968a06fb_9ab9_4819_8caf_0392ddff3d9b.slice"
		cri = "cri-containerd-0f32894de86edf3d3832702af794874ef8d400b4969acdea4976b12040756e0d.scope"
	)
	plain, plainKill := kill("Out of memory", 7, "x")
	withHeader := func(k Kill, constraint, oomMemcg, taskMemcg string) Kill {
		k.Constraint, k.OOMMemcg, k.TaskMemcg = constraint, oomMemcg, taskMemcg
		return k
	}
	for _, tt := range []struct {
		name string
		text []string
		want []Kill
	}{
		{"5.8.0-1031-oracle, a memory cgroup", []string{
			"oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/ltp_19257,task_memcg=/ltp_19257,task=memcg_process,pid=19289,uid=0",
			"Memory cgroup out of memory: Killed process 19289 (memcg_process) total-vm:2676kB, anon-rss:84kB, file-rss:1468kB, shmem-rss:4kB, UID:0 pgtables:40kB oom_score_adj:0",
			"oom_reaper: reaped process 19289 (memcg_process), now anon-rss:0kB, file-rss:0kB, shmem-rss:4kB",
		}, []Kill{{
			PID: 19289, Comm: "memcg_process", TotalVM: 2676 << 10, AnonRSS: 84 << 10, FileRSS: 1468 << 10, ShmemRSS: 4 << 10,
			PgTables: 40 << 10, Constraint: "CONSTRAINT_MEMCG", OOMMemcg: "/ltp_19257", TaskMemcg: "/ltp_19257",
		}}},
		{"a cpuset, reported to linux-mm in 2021", []string{
			"oom-kill:constraint=CONSTRAINT_CPUSET,nodemask=(null),cpuset=docker-9976a269caec812c134fa317f27487ee36e1129beba7278a463dd53e5fb9997b.scope,mems_allowed=4,global_oom,task_memcg=/system.slice/containerd.service,task=containerd,pid=4100,uid=0",
			"Out of memory: Killed process 4100 (containerd) total-vm:4077036kB, anon-rss:51184kB, file-rss:26016kB, shmem-rss:0kB, UID:0 pgtables:676kB oom_score_adj:0",
		}, []Kill{{
			PID: 4100, Comm: "containerd", TotalVM: 4077036 << 10, AnonRSS: 51184 << 10, FileRSS: 26016 << 10, PgTables: 676 << 10,
			Constraint: "CONSTRAINT_CPUSET", TaskMemcg: "/system.slice/containerd.service",
		}}},
		{"without cpusets, on a console that names the caller", []string{
			"[ 1630.158028][T14021] oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),global_oom,task_memcg=/,task=normal-priority,pid=23173,uid=0",
			"[ 1630.161867][T14021] Out of memory: Killed process 23173 (normal-priority) total-vm:4228kB, anon-rss:88kB, file-rss:0kB, shmem-rss:0kB, UID:0 pgtables:52kB oom_score_adj:1000\r",
		}, []Kill{{
			PID: 23173, Comm: "normal-priority", TotalVM: 4228 << 10, AnonRSS: 88 << 10, PgTables: 52 << 10, OOMScoreAdj: 1000,
			Constraint: "CONSTRAINT_NONE", TaskMemcg: "/",
		}}},
		{"global, below zero, the highest user", []string{
			"oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=user.slice,mems_allowed=0,global_oom,task_memcg=/user.slice/user-1000.slice/user@1000.service/app.slice/app-org.kde.konsole-10418.scope/tab(2336326).scope,task=codescout,pid=2621226,uid=1000",
			"Out of memory: Killed process 2621226 (codescout) total-vm:176941204kB, anon-rss:68726128kB, file-rss:2708kB, shmem-rss:0kB, UID:4294967294 pgtables:136028kB oom_score_adj:-997",
		}, []Kill{{
			PID: 2621226, Comm: "codescout", TotalVM: 176941204 << 10, AnonRSS: 68726128 << 10, FileRSS: 2708 << 10, UID: 4294967294,
			PgTables: 136028 << 10, OOMScoreAdj: -997, Constraint: "CONSTRAINT_NONE",
			TaskMemcg: "/user.slice/user-1000.slice/user@1000.service/app.slice/app-org.kde.konsole-10418.scope/tab(2336326).scope",
		}}},
		{"a pod's limit, a container's task", []string{
			"oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=" + cri + ",mems_allowed=0-1,oom_memcg=" + pod + ",task_memcg=" + pod + "/" + cri + ",task=x,pid=7,uid=107",
			plain,
		}, []Kill{withHeader(plainKill, "CONSTRAINT_MEMCG", pod, pod+"/"+cri)}},
		{"a memory policy; lists with commas", []string{
			"oom-kill:constraint=CONSTRAINT_MEMORY_POLICY,nodemask=0-2,4,cpuset=vcpu1,mems_allowed=0,2-4,global_oom,task_memcg=/machine.slice,task=x,pid=7,uid=0",
			plain,
		}, []Kill{withHeader(plainKill, "CONSTRAINT_MEMORY_POLICY", "", "/machine.slice")}},
		{"without memory cgroups", []string{
			"oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,task=x,pid=7,uid=0",
			plain,
		}, []Kill{withHeader(plainKill, "CONSTRAINT_NONE", "", "")}},
		{"the header did not get through", []string{plain}, []Kill{plainKill}},
		{"the header is another task's", []string{
			"oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/,task=x,pid=8,uid=0",
			plain,
		}, []Kill{plainKill}},
		{"the header belongs to one kill, even when the ID comes again", []string{
			"oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/,task=x,pid=7,uid=0",
			plain,
			plain,
		}, []Kill{withHeader(plainKill, "CONSTRAINT_NONE", "", "/"), plainKill}},
		{"no kills", []string{
			"x invoked oom-killer: gfp_mask=0x140dca(GFP_HIGHUSER_MOVABLE|__GFP_ZERO|__GFP_COMP), order=0, oom_score_adj=0",
			"oom_kill_process.cold+0x8/0x8a",
			"Tasks in /x are going to be killed due to memory.oom.group set",
			"Out of memory: OOM victim 7 (x) is already exiting. Skip killing the task",
			"Out of memory and no killable processes...",
			"oom_reaper: reaped process 7 (x), now anon-rss:0kB, file-rss:0kB, shmem-rss:0kB",
			"",
		}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, Parse(tt.text)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestParseMessages(t *testing.T) {
	for _, message := range []string{"Out of memory", "Memory cgroup out of memory", "Out of memory (oom_kill_allocating_task)"} {
		line, want := kill(message, 7, "x")
		if diff := cmp.Diff([]Kill{want}, Parse([]string{line})); diff != "" {
			t.Errorf("%s: %s", message, diff)
		}
	}
}

// A task may call itself anything of up to 15 bytes.
func TestParseNames(t *testing.T) {
	for _, comm := range []string{
		"npm start", "(sd-pam)", "((x)", "CPU 11/KVM", "kworker/u8:3-ev", "", " ", "x) total-vm:1kB",
		",task=y,pid=8", "a,pid=9,uid=0", "Killed process", "line\nbreak", "tab\there", `back\slash`, "naïve", "\xff\xfe",
	} {
		line, want := kill("Out of memory", 7, comm)
		header := "oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/a,task_memcg=/a/b,task=" + comm + ",pid=7,uid=1000"
		want.Constraint, want.OOMMemcg, want.TaskMemcg = "CONSTRAINT_MEMCG", "/a", "/a/b"
		if diff := cmp.Diff([]Kill{want}, Parse([]string{header, line})); diff != "" {
			t.Errorf("%q: %s", comm, diff)
		}
	}
}

func TestUnescape(t *testing.T) {
	for in, want := range map[string]string{
		`plain`:               "plain",
		`a\x5cb`:              `a\b`,
		`na\xc3\xafve \x09`:   "naïve \t",
		`\x0a\x5cx0a`:         "\n" + `\x0a`, // a backslash is escaped itself, so nothing is undone twice
		`\xff\xfe`:            "\xff\xfe",
		`cut \x5`:             `cut \x5`,
		`not \n the kernel's`: `not \n the kernel's`,
	} {
		if got := unescape(in); got != want {
			t.Errorf("%q: %q, want %q", in, got, want)
		}
	}
}

// records is a read(2) that hands out records and errors, and then has no more.
func records(results ...any) func([]byte) (int, error) {
	return func(buffer []byte) (int, error) {
		if len(results) == 0 {
			return 0, unix.EAGAIN
		}
		result := results[0]
		results = results[1:]
		if err, ok := result.(error); ok {
			return 0, err
		}
		return copy(buffer, result.(string)), nil
	}
}

// Records are taken apart, an interruption is none, and a buffer that wrapped is told.
func TestReaderRecords(t *testing.T) {
	line, want := kill("Out of memory", 7, "x;y z")
	r := &Reader{read: records(
		"6,339,5140900,-;NET: Registered protocol family 10\n",
		unix.EINTR,
		"6,340,5690716,-,caller=T1;"+strings.ReplaceAll(line, " z", `\x5cz`)+"\n SUBSYSTEM=acpi\n DEVICE=+acpi:PNP0A03:00\n",
	)}
	want.Comm = `x;y\z`
	kills, err := r.Read(func([]Kill) bool { return true }, 0)
	check(t, err)
	if diff := cmp.Diff([]Kill{want}, kills); diff != "" {
		t.Error(diff)
	}
	if r.Lost {
		t.Error("nothing was lost")
	}
	if r.messages[0] != "NET: Registered protocol family 10" {
		t.Errorf("first message %q", r.messages[0])
	}

	r = &Reader{read: records(unix.EPIPE, "3,900,5690716,-;"+line+"\n")}
	kills, err = r.Read(func(k []Kill) bool { return len(k) == 1 }, time.Minute)
	if err != nil || len(kills) != 1 || !r.Lost {
		t.Errorf("after the buffer wrapped: %v, %v, lost %t", kills, err, r.Lost)
	}
}

// Read gives up after a while, and goes on where it was when it is called again.
func TestReaderWaits(t *testing.T) {
	line, _ := kill("Out of memory", 7, "x")
	empty := 0
	r := &Reader{}
	r.read = func(buffer []byte) (int, error) {
		if empty++; empty != 5 {
			return 0, unix.EAGAIN
		}
		return copy(buffer, "3,1,2,-;"+line+"\n"), nil
	}
	one := func(k []Kill) bool { return len(k) == 1 }
	if kills, err := r.Read(one, 0); len(kills) != 0 || err != nil || empty != 1 {
		t.Errorf("without waiting: %v, %v after %d reads", kills, err, empty)
	}
	if kills, err := r.Read(one, time.Minute); len(kills) != 1 || err != nil {
		t.Errorf("waiting: %v, %v", kills, err)
	}
	if kills, err := r.Read(one, 0); len(kills) != 1 || err != nil {
		t.Errorf("again: %v, %v", kills, err)
	}
}

func TestReaderFails(t *testing.T) {
	for _, tt := range []struct {
		result any
		want   error
	}{
		{unix.EINVAL, unix.EINVAL},
		{"", io.ErrUnexpectedEOF},
		{os.ErrClosed, os.ErrClosed},
	} {
		r := &Reader{read: records(tt.result)}
		if kills, err := r.Read(func([]Kill) bool { return true }, 0); !errors.Is(err, tt.want) || !strings.Contains(err.Error(), "read the kernel's log") {
			t.Errorf("%v: %v, %v", tt.result, kills, err)
		}
	}
}

// The kernel's own log: what was there before Open is not read, what comes after is, as it was written.
func TestReaderReal(t *testing.T) {
	log, err := os.OpenFile("/dev/kmsg", os.O_WRONLY, 0)
	check(t, err)
	defer log.Close()
	tag := "oom-tracer test " + strconv.FormatUint(rand.Uint64(), 36) + " "
	say := func(text string) {
		t.Helper()
		// Without the newline the record would stay open for more, and out of sight.
		_, err := log.WriteString(tag + text + "\n")
		check(t, err)
	}
	say("before")
	r, err := Open()
	check(t, err)
	const odd = `back\slash, naïve, semi;colon`
	say(odd)
	if _, err := r.Read(func([]Kill) bool { return slices.Contains(r.messages, tag+odd) }, 10*time.Second); err != nil {
		t.Error(err)
	}
	if !slices.Contains(r.messages, tag+odd) {
		t.Errorf("%q did not come back: %q", odd, r.messages)
	}
	if slices.Contains(r.messages, tag+"before") {
		t.Error("what was said before Open is read too")
	}
	check(t, r.Close())
	if _, err := r.Read(func([]Kill) bool { return true }, 0); err == nil {
		t.Error("it reads on after Close")
	}
}

// Where kernel.dmesg_restrict is set it takes CAP_SYSLOG (check_syslog_permissions()), where it is not,
// anybody may read.
func TestOpenWithoutRights(t *testing.T) {
	restricted, err := os.ReadFile("/proc/sys/kernel/dmesg_restrict")
	check(t, err)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	// Capabilities are this thread's own.
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var all, fewer [2]unix.CapUserData
	check(t, unix.Capget(&header, &all[0]))
	if all[0].Effective == 0 {
		t.Fatal("this test needs root")
	}
	fewer = all
	fewer[0].Effective, fewer[1].Effective = 0, 0
	check(t, unix.Capset(&header, &fewer[0]))
	r, err := Open()
	check(t, unix.Capset(&header, &all[0]))
	if strings.TrimSpace(string(restricted)) == "0" {
		check(t, err)
		check(t, r.Close())
		return
	}
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "/dev/kmsg") {
		t.Errorf("got %v, %v", r, err)
	}
}

// The line above the header names who asked, and for what; it belongs to the kill that follows.
func TestParseTrigger(t *testing.T) {
	line, k := kill("Out of memory", 8, "hog")
	const header = "oom-kill:constraint=CONSTRAINT_NONE,nodemask=(null),cpuset=/,mems_allowed=0,global_oom,task_memcg=/a,task=hog,pid=8,uid=1000"
	got := Parse([]string{
		"a (b) invoked oom-killer: gfp_mask=0x140dca(GFP_HIGHUSER_MOVABLE|__GFP_ZERO|__GFP_COMP), order=-1, oom_score_adj=0",
		header, line, line,
	})
	with := k
	with.Constraint, with.TaskMemcg = "CONSTRAINT_NONE", "/a"
	with.TriggerComm, with.GFPMask, with.Order = "a (b)", "0x140dca", -1
	if diff := cmp.Diff([]Kill{with, k}, got); diff != "" {
		t.Error(diff)
	}
}
