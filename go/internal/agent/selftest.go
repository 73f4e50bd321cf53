package agent

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kmsg"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const (
	selftestLimit = 32 << 20         // of the scratch cgroup, bytes
	selftestWait  = 15 * time.Second // for the victim's end, and for the event
)

// rssSlack is how many bytes the console may differ: its line comes after the tracepoint, before Linux 7 from counters that
// lag by pages (percpu_counter_batch).
func rssSlack() uint64 { return 128 * uint64(os.Getpagesize()) }

// Selftest causes one contained OOM kill and checks what comes back out of NATS against what this
// process, the cgroup's files and the kernel's console say of it.
func Selftest(ctx context.Context, cfg config.Config, node string, stdout io.Writer, log *slog.Logger) error {
	h, err := cgroupfs.Find("/proc")
	if err != nil {
		return err
	}
	running := obs.TracerRuns(ctx, cfg.Metrics.Listen)
	if running {
		fmt.Fprintf(stdout, "selftest: using the tracer that runs at %s, cgroup v%d\n", cfg.Metrics.Listen, h.Version)
		if cfg.Node.CgroupRoot != "/" {
			return fmt.Errorf("the running tracer publishes only what happens below node.cgroup_root %s, and the selftest's cgroup is not there: "+
				"run it with a config in which that is / and metrics.listen is empty", cfg.Node.CgroupRoot)
		}
	} else {
		fmt.Fprintf(stdout, "selftest: no tracer runs; starting one with an embedded nats, cgroup v%d\n", h.Version)
		stop, err := privateTracer(ctx, &cfg, node, log)
		if err != nil {
			return err
		}
		defer stop()
	}
	conn, err := bus.Connect(ctx, cfg.NATS, bus.Options{Name: "oom-tracer-selftest"}, log)
	if err != nil {
		return err
	}
	defer conn.Close()

	want, err := causeKill(ctx, h)
	if err != nil {
		return err
	}
	fmt.Fprintf(stdout, "selftest: the kernel killed %s[%d] in %s\n", want.comm, want.pid, want.cgroup)
	e, err := awaitEvent(ctx, conn, want)
	if err != nil {
		return err
	}
	pretty, err := json.MarshalIndent(&e, "", "  ")
	if err != nil {
		return fmt.Errorf("print the event: %w", err)
	}
	fmt.Fprintf(stdout, "\n%s\n\n%s\n\n", text.Line(&e, false), pretty)

	wrong := want.compare(&e)
	if want.console == nil {
		fmt.Fprintln(stdout, "selftest: the kernel's console cannot be read; memory was checked against the limit only")
	}
	for _, w := range wrong {
		fmt.Fprintf(stdout, "WRONG %s\n", w)
	}
	if len(wrong) > 0 {
		return fmt.Errorf("selftest failed: %d of the event's fields are wrong", len(wrong))
	}
	fmt.Fprintln(stdout, "selftest: ok: victim, cgroup, scope, limit and memory are right")
	return nil
}

// privateTracer runs a tracer in this process, whose NATS is its own. cfg is changed to lead there.
func privateTracer(ctx context.Context, cfg *config.Config, node string, log *slog.Logger) (stop func(), err error) {
	dir, err := os.MkdirTemp("", "oom-tracer-selftest-")
	if err != nil {
		return nil, fmt.Errorf("make a directory for nats: %w", err)
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	cfg.NATS = config.Default().NATS
	cfg.NATS.Embedded.Dir = filepath.Join(dir, "nats")
	cfg.NATS.Embedded.Listen = "127.0.0.1:0"
	cfg.Metrics.Listen = ""
	cfg.Node.CgroupRoot = "/"
	// It records for itself alone, and leaves nothing.
	cfg.Kernel.PinDir, cfg.Node.StateFile = "", filepath.Join(dir, "state.json")
	if err := nothingMissed(cfg.Node.StateFile, node); err != nil {
		return nil, err
	}
	t, err := start(ctx, *cfg, node, io.Discard, log)
	if err != nil {
		return nil, err
	}
	if err := t.server.Ready(); err != nil {
		return nil, errors.Join(err, t.close(time.Now().Add(stopTime)))
	}
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := t.run(ctx); err != nil {
			log.Error("the tracer of the selftest ended", "error", err)
		}
	}()
	return func() {
		cancel()
		<-done
		os.RemoveAll(dir)
	}, nil
}

// expectation is what is known of the kill from other sources than the event.
type expectation struct {
	pid       int
	comm      string
	uid       uint32
	startTick uint64 // field 22 of /proc/PID/stat, in 1/100 s since boot
	cgroup    string // path below the mount
	id        uint64
	version   int
	limit     uint64
	console   *kmsg.Kill // nil when the console cannot be read
}

// causeKill lets a child of this process run into a limit, and removes all traces but the kernel's.
func causeKill(ctx context.Context, h cgroupfs.Hierarchy) (_ *expectation, err error) {
	ctx, cancel := context.WithTimeout(ctx, selftestWait)
	defer cancel()
	group, err := h.New(selftestLimit)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, group.Remove()) }()
	// Readable only with CAP_SYSLOG; without it the figures are checked less sharply.
	console, consoleErr := kmsg.Open()
	if consoleErr == nil {
		defer console.Close()
	}

	victim := exec.CommandContext(ctx, "/proc/self/exe", VictimCommand, strconv.Itoa(2*selftestLimit>>20))
	var complaints strings.Builder
	victim.Stderr = &complaints
	victim.WaitDelay = time.Second
	stdin, inErr := victim.StdinPipe()
	output, outErr := victim.StdoutPipe()
	if err := errors.Join(inErr, outErr, victim.Start()); err != nil {
		return nil, fmt.Errorf("start the victim: %w", err)
	}
	defer func() {
		if victim.ProcessState == nil {
			_ = victim.Process.Kill()
			_ = victim.Wait()
		}
	}()
	if line, err := bufio.NewReader(output).ReadString('\n'); err != nil || line != "ready\n" {
		return nil, fmt.Errorf("start the victim: it said %q: %w", line+complaints.String(), err)
	}
	pid := victim.Process.Pid
	process, err := procfs.NewProc(pid)
	if err != nil {
		return nil, err
	}
	stat, err := process.Stat()
	if err != nil {
		return nil, err
	}
	want := &expectation{
		pid: pid, comm: stat.Comm, uid: uint32(os.Getuid()), startTick: stat.Starttime, cgroup: group.Path(), id: group.ID,
		version: group.Version, limit: selftestLimit,
	}
	if err := group.Add(pid); err != nil {
		return nil, err
	}
	if _, err := stdin.Write([]byte{'\n'}); err != nil {
		return nil, fmt.Errorf("start the victim: %w", err)
	}
	err = victim.Wait()
	status, ok := victim.ProcessState.Sys().(syscall.WaitStatus)
	if ctx.Err() != nil || !ok || !status.Signaled() || status.Signal() != syscall.SIGKILL {
		return nil, fmt.Errorf("the victim was not killed: %w: %s", err, strings.TrimSpace(complaints.String()))
	}
	if n, err := group.Kills(); err != nil {
		return nil, err
	} else if n != 1 {
		return nil, fmt.Errorf("the scratch cgroup counts %d kills, not 1", n)
	}
	if consoleErr != nil {
		return want, nil
	}
	_, err = console.Read(func(kills []kmsg.Kill) bool {
		for _, kill := range kills {
			if kill.PID == pid {
				want.console = &kill
			}
		}
		return want.console != nil
	}, 2*time.Second)
	return want, err
}

func awaitEvent(ctx context.Context, conn *bus.Conn, want *expectation) (event.Event, error) {
	ctx, cancel := context.WithTimeout(ctx, selftestWait)
	defer cancel()
	// Whatever name the running tracer gives this node: its boot is the same.
	self, err := thisNode("")
	if err != nil {
		return event.Event{}, err
	}
	kills, err1 := event.Filter(event.KindKill, "", "")
	exiting, err2 := event.Filter(event.KindExiting, "", "")
	if err := errors.Join(err1, err2); err != nil {
		return event.Event{}, err
	}
	var e event.Event
	errFound := errors.New("found")
	err = bus.Tail(ctx, conn, bus.TailOptions{
		Subjects: []string{kills, exiting}, Since: time.Now().Add(-time.Minute), Follow: true,
	}, func(m bus.Stored) (err error) {
		if e, err = event.Parse(m.Data); err != nil || e.Node.BootID != self.BootID {
			return nil // somebody else's message
		}
		// By the cgroup as well, so that an event with a wrong victim is compared and not waited for.
		if int(e.Victim.PID) == want.pid || e.Victim.Cgroup != nil && e.Victim.Cgroup.ID == want.id {
			return errFound
		}
		return nil
	})
	switch {
	case errors.Is(err, errFound):
		return e, nil
	case err != nil && !errors.Is(err, context.DeadlineExceeded):
		return event.Event{}, fmt.Errorf("wait for the event: %w", err)
	default:
		return event.Event{}, fmt.Errorf("selftest failed: the kernel killed process %d and no event came within %s", want.pid, selftestWait)
	}
}

func (want *expectation) compare(e *event.Event) []string {
	var wrong []string
	check := func(field string, got, want any) {
		if got != want {
			wrong = append(wrong, fmt.Sprintf("%s: %v, want %v", field, got, want))
		}
	}
	present := func(field string, is bool) bool {
		if !is {
			wrong = append(wrong, field+" is absent")
		}
		return is
	}
	near := func(field string, got, want, slack uint64) {
		if max(got, want)-min(got, want) > slack {
			wrong = append(wrong, fmt.Sprintf("%s: %d, want %d give or take %d", field, got, want, slack))
		}
	}
	outcome, scope := event.OutcomeKilled, event.ScopeCgroup
	if e.Node.Tier == "none" {
		outcome, scope = event.OutcomeUnknown, event.ScopeUnknown
	}
	check("outcome", e.Outcome, outcome)
	check("scope", e.Scope, scope)
	check("victim.pid", int(e.Victim.PID), want.pid)
	check("victim.tid", int(e.Victim.TID), want.pid)
	check("victim.comm", e.Victim.Comm, want.comm)
	// USER_HZ is 100 on every architecture that this program runs on.
	check("victim.start_boottime_ns in ticks", e.Victim.StartBoottimeNS/1e7, want.startTick)
	if present("victim.uid", e.Victim.UID != nil) {
		check("victim.uid", *e.Victim.UID, want.uid)
	}
	if present("victim.oom_score_adj", e.Victim.OOMScoreAdj != nil) {
		check("victim.oom_score_adj", *e.Victim.OOMScoreAdj, int16(1000))
	}
	checkCgroup := func(field string, c *event.Cgroup) {
		if !present(field, c != nil) {
			return
		}
		check(field+".id", c.ID, want.id)
		check(field+".version", c.Version, want.version)
		// The mount's root may be a cgroup further down, in a cgroup namespace.
		if !strings.HasSuffix(c.Path, want.cgroup) || c.Truncated {
			wrong = append(wrong, fmt.Sprintf("%s.path: %q does not end with %q", field, c.Path, want.cgroup))
		}
	}
	checkCgroup("victim.cgroup", e.Victim.Cgroup)
	if present("trigger", e.Trigger != nil) {
		check("trigger.pid", int(e.Trigger.PID), want.pid)
		checkCgroup("trigger.cgroup", e.Trigger.Cgroup)
	}
	limited := e.Limit != nil && e.Limit.Max != nil
	if (limited || e.Node.Tier != "none") && present("limit", limited) {
		checkCgroup("limit.cgroup", e.Limit.Cgroup)
		check("limit.max", *e.Limit.Max, want.limit)
	}
	m := e.Victim.Memory
	if !present("victim.memory", m != nil) {
		return wrong
	}
	// The victim held all that was charged, and what it had touched before it was moved.
	near("victim.memory.anon_rss", m.AnonRSS, want.limit, want.limit/4)
	if c := want.console; c != nil {
		check("victim.memory.total_vm against the console", m.TotalVM, c.TotalVM)
		near("victim.memory.anon_rss against the console", m.AnonRSS, c.AnonRSS, rssSlack())
		near("victim.memory.file_rss against the console", m.FileRSS, c.FileRSS, rssSlack())
		near("victim.memory.shmem_rss against the console", m.ShmemRSS, c.ShmemRSS, rssSlack())
		check("victim.memory.pgtables against the console", m.PgTables, c.PgTables)
	}
	return wrong
}

// VictimCommand is how Selftest calls itself for its victim. It is not for people.
const VictimCommand = "selftest-victim"

// victimComm is the victim's name, at most 15 bytes.
const victimComm = "oom-selftest"

// Victim allocates MIB MiB once a byte comes on standard input. It fails if nobody kills it.
func Victim(size string) error {
	mib, err := strconv.Atoi(size)
	if err != nil || mib < 1 || mib > 1024 {
		return fmt.Errorf("%s: %q is not 1..1024 MiB", VictimCommand, size)
	}
	debug.SetGCPercent(-1)
	if err := errors.Join(
		// With selftest gone nobody would clean up.
		unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0),
		// Should anything else run out of memory now, this process goes first.
		os.WriteFile("/proc/self/oom_score_adj", []byte("1000"), 0),
		os.WriteFile("/proc/self/comm", []byte(victimComm), 0),
	); err != nil {
		return fmt.Errorf("%s: %w", VictimCommand, err)
	}
	fmt.Println("ready")
	if n, _ := os.Stdin.Read(make([]byte, 1)); n != 1 {
		return errors.New(VictimCommand + ": no word to start")
	}
	bytes := mib << 20
	memory, err := unix.Mmap(-1, 0, bytes, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON|unix.MAP_NORESERVE)
	if err != nil {
		return fmt.Errorf("%s: map %d MiB: %w", VictimCommand, mib, err)
	}
	for i := 0; i < bytes; i += os.Getpagesize() {
		memory[i] = 1
	}
	return fmt.Errorf("%s: still alive with %d MiB", VictimCommand, mib)
}
