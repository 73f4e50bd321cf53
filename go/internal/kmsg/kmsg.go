// Package kmsg reads what the kernel's console says of OOM kills: the independent witness that the
// selftest and the tests compare events with. Nothing that is published comes from here: header lines
// are rate-limited, and the text is no interface.
package kmsg

import (
	"errors"
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Kill is one "Killed process" line of __oom_kill_process() in mm/oom_kill.c. Sizes are in bytes; the
// kernel prints whole KiB.
type Kill struct {
	PID         int // of the marked thread
	Comm        string
	TotalVM     uint64
	AnonRSS     uint64
	FileRSS     uint64
	ShmemRSS    uint64
	UID         uint32
	PgTables    uint64
	OOMScoreAdj int16
	// From the header line, which is rate-limited and printed once for a whole memory.oom.group: empty
	// when there was none, or when other messages fell into it.
	Constraint string
	OOMMemcg   string
	TaskMemcg  string
	// From the "invoked oom-killer" line above it: empty without one.
	TriggerComm string
	GFPMask     string // hexadecimal, with 0x
	Order       int
}

// The lines read the same from Linux 5.10 to 7.2. A task may be called anything, hence (?s) and the
// greedy groups for its name.
var (
	// __oom_kill_process(), behind what oom_kill_process() was told: "Out of memory", "Memory cgroup
	// out of memory" and others.
	killed = regexp.MustCompile(`(?s): Killed process (\d+) \((.*)\) total-vm:(\d+)kB, anon-rss:(\d+)kB, file-rss:(\d+)kB, shmem-rss:(\d+)kB, UID:(\d+) pgtables:(\d+)kB oom_score_adj:(-?\d+)`)
	// dump_oom_victim(), cpuset_print_current_mems_allowed() and mem_cgroup_print_oom_context(): the
	// parts of the latter two are there where the kernel has cpusets and memory cgroups.
	header = regexp.MustCompile(stamp + `oom-kill:constraint=(\w+),nodemask=.*?(?:,oom_memcg=(.*?))?(?:,global_oom)?(?:,task_memcg=(.*?))?,task=.*,pid=(\d+),uid=\d+`)
	// dump_header(), by the task that asked for memory.
	invoked = regexp.MustCompile(stamp + `(.*) invoked oom-killer: gfp_mask=(0x[0-9a-f]+)\(.*\), order=(-?\d+), oom_score_adj=`)
)

// stamp is what a console puts before a message: the time and, with CONFIG_PRINTK_CALLER, who spoke.
const stamp = `(?s)^(?:\[ *\d+\.\d+\](?:\[ *[TC]\d+\])? )?`

// Parse reads the kills from messages, in their order.
func Parse(messages []string) []Kill {
	var kills []Kill
	headers := map[int][]string{}
	askers := map[int][]string{}
	var asker []string
	for _, message := range messages {
		if m := invoked.FindStringSubmatch(message); m != nil {
			asker = m
			continue
		}
		if h := header.FindStringSubmatch(message); h != nil {
			pid, _ := strconv.Atoi(h[4])
			headers[pid], askers[pid], asker = h, asker, nil
			continue
		}
		m := killed.FindStringSubmatch(message)
		if m == nil {
			continue
		}
		number := func(i int) uint64 {
			n, _ := strconv.ParseUint(m[i], 10, 64)
			return n
		}
		adj, _ := strconv.ParseInt(m[9], 10, 16)
		k := Kill{
			PID: int(number(1)), Comm: m[2], TotalVM: number(3) << 10, AnonRSS: number(4) << 10,
			FileRSS: number(5) << 10, ShmemRSS: number(6) << 10, UID: uint32(number(7)),
			PgTables: number(8) << 10, OOMScoreAdj: int16(adj),
		}
		if h := headers[k.PID]; h != nil {
			k.Constraint, k.OOMMemcg, k.TaskMemcg = h[1], h[2], h[3]
			if a := askers[k.PID]; a != nil {
				k.TriggerComm, k.GFPMask = a[1], a[2]
				k.Order, _ = strconv.Atoi(a[3])
			}
			delete(headers, k.PID)
			delete(askers, k.PID)
		}
		kills = append(kills, k)
	}
	return kills
}

// Reader reads the kernel's messages from the moment of Open on.
type Reader struct {
	file     *os.File
	read     func([]byte) (int, error) // read(2) of the file, which does not wait
	messages []string
	// Lost is set when the kernel's buffer wrapped before it was read.
	Lost bool
}

// Open begins at the end of what was logged so far. It needs CAP_SYSLOG where kernel.dmesg_restrict is
// set.
func Open() (*Reader, error) {
	file, err := os.OpenFile("/dev/kmsg", os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open the kernel's log: %w", err)
	}
	if _, err := file.Seek(0, io.SeekEnd); err != nil {
		file.Close()
		return nil, fmt.Errorf("seek to the end of the kernel's log: %w", err)
	}
	connection, err := file.SyscallConn()
	if err != nil {
		file.Close()
		return nil, fmt.Errorf("read the kernel's log: %w", err)
	}
	return &Reader{file: file, read: func(buffer []byte) (n int, err error) {
		if controlErr := connection.Read(func(fd uintptr) bool {
			n, err = unix.Read(int(fd), buffer)
			return true
		}); controlErr != nil {
			return 0, controlErr
		}
		return n, err
	}}, nil
}

// Close closes the log.
func (r *Reader) Close() error { return r.file.Close() }

// Read reads until done is content with the kills since Open, at most as long as wait says, and
// returns them all.
func (r *Reader) Read(done func([]Kill) bool, wait time.Duration) ([]Kill, error) {
	deadline := time.Now().Add(wait)
	for {
		if err := r.drain(); err != nil {
			return nil, err
		}
		kills := Parse(r.messages)
		if done(kills) || time.Now().After(deadline) {
			return kills, nil
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// Messages are those that Read has read so far.
func (r *Reader) Messages() []string { return r.messages }

// drain reads what is there (Documentation/ABI/testing/dev-kmsg: one record a read).
func (r *Reader) drain() error {
	buffer := make([]byte, 8192)
	for {
		n, err := r.read(buffer)
		switch {
		case errors.Is(err, unix.EAGAIN):
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case errors.Is(err, unix.EPIPE):
			r.Lost = true
			continue
		case err != nil:
			return fmt.Errorf("read the kernel's log: %w", err)
		case n == 0:
			return fmt.Errorf("read the kernel's log: %w", io.ErrUnexpectedEOF)
		}
		// priority,sequence,microseconds,flags;message\n, and then lines of a dictionary
		_, message, _ := strings.Cut(string(buffer[:n]), ";")
		message, _, _ = strings.Cut(message, "\n")
		r.messages = append(r.messages, unescape(message))
	}
}

var escaped = regexp.MustCompile(`\\x[0-9a-f]{2}`)

// unescape undoes what the kernel does to a backslash and to all that is not printable ASCII
// (msg_add_ext_text() in kernel/printk/printk.c).
func unescape(message string) string {
	return escaped.ReplaceAllStringFunc(message, func(s string) string {
		b, _ := strconv.ParseUint(s[2:], 16, 8)
		return string([]byte{byte(b)})
	})
}
