package doctor

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"github.com/cilium/ebpf/btf"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/procfs"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/statedir"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// Status is how a finding stands.
type Status string

const (
	StatusOK   Status = "ok"
	StatusWarn Status = "warn" // tracing works, with less
	StatusFail Status = "fail" // tracing cannot work, or a tracer with this config would not start
)

// Schema names the shape of what doctor prints with --output json, in the order of the text. Within v1, fields and checks are
// added, none is renamed or changes its meaning. The sentences are for people.
const Schema = "oom-tracer-doctor/v1"

// Report is the whole of it.
type Report struct {
	Schema   string    `json:"schema"`
	Version  string    `json:"version"`   // of this program
	Node     string    `json:"node"`      // empty for another machine's kernel
	CanTrace bool      `json:"can_trace"` // no finding failed; the exit status says the same
	Findings []Finding `json:"findings"`
}

// Finding is one check: every one of them is there every time, once, in the same order.
type Finding struct {
	Check  string `json:"check"`
	Status Status `json:"status"`
	Detail string `json:"detail"`
	Remedy string `json:"remedy,omitempty"` // what to do about it; absent when nothing is wrong
}

func ok(check, format string, args ...any) Finding {
	return Finding{check, StatusOK, fmt.Sprintf(format, args...), ""}
}

func warn(check, detail, remedy string) Finding { return Finding{check, StatusWarn, detail, remedy} }

func fail(check, detail, remedy string) Finding { return Finding{check, StatusFail, detail, remedy} }

// Run says what this kernel and this process can do. It fails when tracing cannot work.
func Run(ctx context.Context, cfg config.Config, node, output string, stdout io.Writer) error {
	x := checker{
		cfg: cfg, node: node, procfs: "/proc", sysfs: "/sys",
		checkBPF: loader.CheckBPF, checkPerf: loader.CheckPerfEvents, load: tryLoad,
	}
	return printFindings(x.examine(ctx), node, "here", output, stdout)
}

// RunBTF says whether the program fits a kernel that need not be this machine's, by its types. It fails
// when they lack something without which the program would not load there.
func RunBTF(file, output string, stdout io.Writer) error {
	if info, err := os.Stat(file); err == nil && info.IsDir() {
		return runBTFs(file, output, stdout)
	}
	// Whether there are hooks, functions says as far as types tell.
	x := checker{btfFile: file, hook: loader.TierKprobe}
	x.kernel, x.kernelErr = btf.LoadSpec(file)
	findings := []Finding{x.btf(), x.markVictim(), x.relocations(), x.functions()}
	return printFindings(findings, "", "there", output, stdout)
}

func (x *checker) relocations() Finding {
	const check = "relocations"
	if x.kernelErr != nil {
		return fail(check, "not known without BTF", "see btf")
	}
	n, err := loader.CheckRelocations(x.kernel)
	if err != nil {
		return fail(check, err.Error(), "report this kernel: the program does not load there, or would not read what it should")
	}
	return ok(check, "all %d resolve, except those that the program checks for before it uses them", n)
}

func (x *checker) functions() Finding {
	const check = "functions"
	if x.kernelErr != nil {
		return fail(check, "not known without BTF", "see btf")
	}
	if missing := loader.MissingHooks(x.kernel); len(missing) > 0 {
		return warn(check, "cannot hook functions that are not in the kernel's BTF: "+strings.Join(missing, ", "),
			"run oom-tracer doctor on a machine with that kernel, and see hooks and stack")
	}
	return ok(check, "the kernel has the functions that the tiers fentry and kprobe hook")
}

// printFindings prints the findings of this machine (here) or another's kernel (there). It fails when one of them does.
func printFindings(findings []Finding, node, where, output string, stdout io.Writer) error {
	failed := failures(findings)
	var err error
	if output == "json" {
		err = printJSON(stdout, Report{Schema, obs.Version().Version, node, len(failed) == 0, findings})
	} else {
		var out strings.Builder
		for _, f := range findings {
			fmt.Fprintf(&out, "%-4s  %-12s  %s\n", f.Status, f.Check, text.Printable(f.Detail))
			if f.Remedy != "" {
				fmt.Fprintf(&out, "%-4s  %-12s  -> %s\n", "", "", text.Printable(f.Remedy))
			}
		}
		_, err = io.WriteString(stdout, out.String())
	}
	if err != nil {
		return fmt.Errorf("write the findings: %w", err)
	}
	if len(failed) > 0 {
		return fmt.Errorf("tracing cannot work %s: see %s", where, strings.Join(failed, ", "))
	}
	return nil
}

func printJSON(stdout io.Writer, v any) error {
	encoder := json.NewEncoder(stdout)
	encoder.SetEscapeHTML(false)
	encoder.SetIndent("", "  ")
	return encoder.Encode(v)
}

func failures(findings []Finding) (failed []string) {
	for _, f := range findings {
		if f.Status == StatusFail {
			failed = append(failed, f.Check)
		}
	}
	return failed
}

// checker looks at the machine that procfs and sysfs show.
type checker struct {
	cfg                 config.Config
	node                string
	procfs              string
	sysfs               string
	btfFile             string                               // where the kernel's types are, if not in sysfs
	checkBPF, checkPerf func() error                         // ask whether the kernel permits these system calls
	load                func(loader.Options) (loaded, error) // loads and attaches what a run would, and takes it away again

	// What several checks need; see look.
	proc       procfs.FS
	self       procfs.Proc
	process    procfs.ProcStatus // its
	processErr error
	kernel     *btf.Spec
	kernelErr  error
	outcome    bool // the stack proves it
	stackErr   error
	shown      bool // kallsyms shows addresses
	bpfErr     error
	perfErr    error
	running    bool        // a tracer of this config runs on this node
	loaded     loaded      // what a run would use; empty if programErr
	programErr error       // why nothing can be loaded
	said       warnings    // about that
	hook       loader.Tier // the tier with hooks that a run would use; empty when there is none
	unhooked   []string    // why those before it are not available
	needsPerf  bool        // that of kprobe is that perf events are refused
}

type loaded struct {
	tier   loader.Tier
	notify loader.Notify
}

// examine makes all checks: what the kernel program needs, each before what depends on it; that program; what is around it.
func (x *checker) examine(ctx context.Context) []Finding {
	x.look(ctx)
	findings := []Finding{x.release(), x.capabilities(), x.protection(), x.lockdown(), x.bpf(), x.notify(), x.memlock(), x.btf(), x.markVictim()}
	findings = append(findings, x.hooks(failures(findings)), x.kallsyms(), x.stack())
	findings = append(findings, x.program(failures(findings)), x.cgroup(), x.bpffs(), x.tracer(ctx))
	return append(findings, x.nats(ctx)...)
}

func (x *checker) look(ctx context.Context) {
	x.proc, x.processErr = procfs.NewFS(x.procfs)
	if x.processErr == nil {
		x.self, x.processErr = x.proc.Self()
	}
	if x.processErr == nil {
		x.process, x.processErr = x.self.NewStatus()
	}
	x.kernel, x.kernelErr = btf.LoadSpec(x.sysfs + "/kernel/btf/vmlinux")
	x.outcome, x.stackErr = loader.CheckStack(x.procfs)
	x.shown = x.stackErr == nil || errors.Is(x.stackErr, loader.ErrNoStack) && !errors.Is(x.stackErr, loader.ErrHidden)
	x.bpfErr, x.perfErr = x.checkBPF(), x.checkPerf()
	x.running = obs.TracerRuns(ctx, x.cfg.Metrics.Listen)
	for _, tier := range []loader.Tier{loader.TierFentry, loader.TierKprobe} {
		if x.wants(loader.TierAuto, tier) && x.hook == "" {
			if l, err := x.tryTier(tier, &warnings{}); err != nil {
				x.unhooked = append(x.unhooked, strings.TrimPrefix(err.Error(), "use tier "))
				x.needsPerf = tier == loader.TierKprobe && x.perfErr != nil && errors.Is(err, errno(x.perfErr))
			} else {
				x.loaded, x.hook = l, tier
			}
		}
	}
	if x.hook == "" {
		x.loaded, x.programErr = x.tryTier(loader.Tier(x.cfg.Kernel.Tier), &x.said)
	}
}

// wants reports whether kernel.tier is one of those given.
func (x *checker) wants(tiers ...loader.Tier) bool {
	return slices.Contains(tiers, loader.Tier(x.cfg.Kernel.Tier))
}

// needsStack reports whether the context of kills comes from the kernel's stack, if it comes at all.
func (x *checker) needsStack() bool {
	return x.wants(loader.TierStack) || x.wants(loader.TierAuto) && x.hook == ""
}

func (x *checker) tryTier(tier loader.Tier, said *warnings) (loaded, error) {
	return x.load(loader.Options{
		Tier: tier, Notify: loader.Notify(x.cfg.Kernel.Notify), JournalSize: uint64(x.cfg.Kernel.JournalSize), Log: slog.New(said),
	})
}

// sysctl reads a number below /proc/sys; what cannot be read is the kernel's default, given.
func (x *checker) sysctl(name string, otherwise int) int {
	values, err := x.proc.SysctlInts(name)
	if err != nil || len(values) != 1 {
		return otherwise
	}
	return values[0]
}

// has reports whether this process has a capability in the initial user namespace, where the kernel asks for it.
func (x *checker) has(bit uint) bool {
	return x.processErr == nil && x.foreignNamespace("user") == "" && x.process.CapEff&(1<<bit) != 0
}

// The initial namespaces have fixed numbers (include/linux/proc_ns.h, PROC_USER_INIT_INO and so on).
var initialNamespaces = map[string]string{"user": "user:[4026531837]", "cgroup": "cgroup:[4026531835]"}

// foreignNamespace is this process's namespace of a kind, if it is not the initial one.
func (x *checker) foreignNamespace(kind string) string {
	link, err := os.Readlink(filepath.Join(x.procfs, "self/ns", kind))
	if err != nil || link == initialNamespaces[kind] {
		return ""
	}
	return link
}

func (x *checker) release() Finding {
	data, err := os.ReadFile(x.procfs + "/sys/kernel/osrelease")
	if err != nil {
		return fail("kernel", err.Error(), "mount proc at "+x.procfs)
	}
	return ok("kernel", "%s %s, node %s", strings.TrimSpace(string(data)), runtime.GOARCH, x.node)
}

// capabilities compares what the process may do with what bpf(2) and perf_event_open(2) ask of the initial user namespace
// (bpf_prog_load() in kernel/bpf/syscall.c, perf_allow_cpu() in include/linux/perf_event.h).
func (x *checker) capabilities() Finding {
	const check = "capabilities"
	if x.processErr != nil {
		return fail(check, x.processErr.Error(), "mount proc at "+x.procfs)
	}
	if ns := x.foreignNamespace("user"); ns != "" {
		return fail(check, "those of the user namespace "+ns+", which the kernel does not count for BPF",
			"run it in the host's user namespace (Kubernetes: leave hostUsers at true; Docker: --userns=host)")
	}
	if last := x.sysctl("kernel/cap_last_cap", unix.CAP_LAST_CAP); last < unix.CAP_BPF && !x.has(unix.CAP_SYS_ADMIN) {
		return fail(check, "lacks CAP_SYS_ADMIN to load and attach the program (Linux before 5.8 has no CAP_BPF and CAP_PERFMON)",
			"run it as root, or give it CAP_SYS_ADMIN")
	}
	f := Finding{Check: check, Status: StatusOK}
	var have, lack, names []string
	allowed := x.process.UIDs[1] != 0 // what this user lacks, root would have
	for _, c := range []struct {
		name     string
		bit      uint
		use      string
		byAdmin  bool // CAP_SYS_ADMIN stands for those that were split off it in 5.8
		severity Status
	}{
		{"BPF", unix.CAP_BPF, "load the program", true, StatusFail},
		{"PERFMON", unix.CAP_PERFMON, "attach it and read the kernel's memory", true, StatusFail},
		{"SYSLOG", unix.CAP_SYSLOG, "see the kernel's addresses (tier stack)", false, StatusWarn},
	} {
		switch {
		case x.has(c.bit):
			have = append(have, "CAP_"+c.name)
		case c.byAdmin && x.has(unix.CAP_SYS_ADMIN):
			have = append(have, "CAP_SYS_ADMIN for CAP_"+c.name)
		case c.bit == unix.CAP_SYSLOG && (x.shown || !x.needsStack()):
			have = append(have, "no need of CAP_"+c.name)
		default:
			lack = append(lack, fmt.Sprintf("CAP_%s to %s", c.name, c.use))
			names = append(names, c.name)
			allowed = allowed && x.process.CapBnd&(1<<c.bit) != 0
			if f.Status != StatusFail {
				f.Status = c.severity
			}
		}
	}
	f.Detail = "has " + cmp.Or(strings.Join(have, ", "), "none of those needed")
	switch {
	case len(lack) == 0:
		return f
	case allowed:
		f.Remedy = fmt.Sprintf("run it as user 0, which has them here; user %d does not", x.process.UIDs[1])
	default:
		f.Remedy = fmt.Sprintf("run it as root with all capabilities, or add these (Kubernetes: securityContext.capabilities.add: [%s], with runAsUser: 0)",
			strings.Join(names, ", "))
	}
	f.Detail += "; lacks " + strings.Join(lack, ", ")
	return f
}

// protection says whether a tracer can keep the OOM killer from itself: to go below the least oom_score_adj
// that it had takes CAP_SYS_RESOURCE in the first user namespace (__set_oom_adj() in fs/proc/base.c).
func (x *checker) protection() Finding {
	const check = "protection"
	data, err := os.ReadFile(x.procfs + "/self/oom_score_adj")
	if err != nil {
		return warn(check, err.Error(), "mount proc at "+x.procfs)
	}
	now := strings.TrimSpace(string(data))
	if n, err := strconv.Atoi(now); err == nil && n <= cli.OOMScoreAdj || x.has(unix.CAP_SYS_RESOURCE) {
		return ok(check, "a tracer can have oom_score_adj %d, so that the OOM killer chooses it last", cli.OOMScoreAdj)
	}
	return warn(check, "lacks CAP_SYS_RESOURCE to lower its oom_score_adj, now "+now+": the OOM killer may kill the tracer",
		"add it (Kubernetes: securityContext.capabilities.add: [SYS_RESOURCE]), or start it with oom_score_adj "+strconv.Itoa(cli.OOMScoreAdj))
}

// lockdown reads the mode in force, which stands in brackets (lockdown_read() in
// security/lockdown/lockdown.c). Only confidentiality takes bpf_probe_read_kernel() away.
func (x *checker) lockdown() Finding {
	const check = "lockdown"
	data, err := os.ReadFile(x.sysfs + "/kernel/security/lockdown")
	switch missing := errors.Is(err, fs.ErrNotExist); {
	case missing && x.securityfs():
		return ok(check, "not in this kernel")
	case missing:
		return ok(check, "not known: securityfs is not mounted at %s/kernel/security", x.sysfs)
	case err != nil:
		return warn(check, err.Error(), "run doctor as root to see")
	}
	_, rest, _ := strings.Cut(string(data), "[")
	switch mode, _, closed := strings.Cut(rest, "]"); {
	case mode == "confidentiality":
		return fail(check, mode+": the kernel lets no program read its memory",
			"boot with lockdown=integrity, which is enough for secure boot; lockdown cannot be lowered while the kernel runs")
	case closed && (mode == "none" || mode == "integrity"):
		return ok(check, "%s", mode)
	default:
		return warn(check, fmt.Sprintf("unknown mode %q", strings.TrimSpace(string(data))), "see whether program works, and report this kernel")
	}
}

// securityfs reports whether it is mounted, which it is not in most containers.
func (x *checker) securityfs() bool {
	entries, err := os.ReadDir(x.sysfs + "/kernel/security")
	return err == nil && len(entries) > 0
}

// filtered reports whether a seccomp filter is in force (SECCOMP_MODE_FILTER in proc_pid_status(5)).
func (x *checker) filtered() bool {
	data, err := os.ReadFile(x.procfs + "/self/status")
	return err == nil && slices.ContainsFunc(strings.Split(string(data), "\n"), func(line string) bool {
		name, mode, _ := strings.Cut(line, ":")
		return name == "Seccomp" && strings.TrimSpace(mode) == "2"
	})
}

// refusal says why the kernel refuses a system call that takes a capability, or CAP_SYS_ADMIN, and what to do about it.
func (x *checker) refusal(call, capability string, bit uint, err error) (cause, remedy string) {
	admin := x.has(unix.CAP_SYS_ADMIN)
	switch paranoid := x.sysctl("kernel/perf_event_paranoid", 2); {
	case !errors.Is(err, fs.ErrPermission):
		return fmt.Sprintf("%s: %v", call, err), "report this kernel, with this message"
	case !x.has(bit) && !admin:
		return fmt.Sprintf("%s is refused (%v): this process lacks CAP_%s", call, err, capability), "see capabilities"
	// The kernel itself answers EACCES (perf_allow_cpu()).
	case bit == unix.CAP_PERFMON && paranoid > 2 && !admin && !errors.Is(err, unix.EPERM):
		return fmt.Sprintf("kernel.perf_event_paranoid is %d, a level that Debian and Ubuntu added: the kernel then requires CAP_SYS_ADMIN for %s, and CAP_%s is not enough",
			paranoid, call, capability), "sysctl kernel.perf_event_paranoid=2 on the node"
	case x.filtered():
		return fmt.Sprintf("the seccomp filter of this process refuses %s (%v, although it has CAP_%s; Seccomp is 2 in %s/self/status)", call, err, capability, x.procfs),
			fmt.Sprintf("use a seccomp profile that permits %s to a process with CAP_%s: RuntimeDefault of containerd 1.7 and Docker 23 or later does, that of CRI-O and of older ones does not "+
				"(Kubernetes: securityContext.seccompProfile)", call, capability)
	default:
		return fmt.Sprintf("%s is refused (%v), although this process has CAP_%s and no seccomp filter", call, err, capability),
			"see the audit log of the node: a security module (SELinux, AppArmor) may refuse it"
	}
}

func (x *checker) bpf() Finding {
	const check = "bpf"
	if x.bpfErr == nil {
		return ok(check, "the bpf system call is permitted")
	}
	if !errors.Is(x.bpfErr, loader.ErrBPF) && x.has(unix.CAP_BPF) && x.countsBPF() {
		return fail(check, x.bpfErr.Error(), "see memlock")
	}
	cause, remedy := x.refusal("bpf", "BPF", unix.CAP_BPF, errno(x.bpfErr))
	return fail(check, cause, remedy)
}

// errno is the error of a system call without what is around it.
func errno(err error) error {
	var number unix.Errno
	if errors.As(err, &number) {
		return number
	}
	return err
}

// notify says how the tracer learns of a kill. Perf events are the usual way, and not needed.
func (x *checker) notify() Finding {
	const check = "notify"
	way, known := map[loader.Notify]string{
		loader.NotifyPerf: "a perf buffer", loader.NotifyRingbuf: "a ring buffer", loader.NotifyPoll: "polling, every 200 ms",
	}[x.loaded.notify]
	switch want := loader.Notify(x.cfg.Kernel.Notify); {
	case x.bpfErr != nil:
		return warn(check, "not known without bpf", "see bpf")
	case x.perfErr != nil && want != loader.NotifyRingbuf && want != loader.NotifyPoll:
		cause, remedy := x.refusal("perf_event_open", "PERFMON", unix.CAP_PERFMON, errno(x.perfErr))
		if want == loader.NotifyPerf {
			return fail(check, "kernel.notify is perf: "+cause, remedy+"; or set kernel.notify to auto")
		}
		if !known {
			return warn(check, "no perf events: "+cause, "perf events are not needed; to permit them: "+remedy)
		}
		return warn(check, fmt.Sprintf("notifications use %s, all kills are reported; no perf events: %s", way, cause), "perf events are not needed; to permit them: "+remedy)
	case !known:
		return ok(check, "not known: the program cannot be loaded")
	case x.loaded.notify == loader.NotifyPerf || want != loader.NotifyAuto:
		return ok(check, "notifications use %s", way)
	default:
		return warn(check, fmt.Sprintf("notifications use %s, all kills are reported", way), "see memlock, and the tracer's log for the reason")
	}
}

// memlock says whether the memory that this user may lock (RLIMIT_MEMLOCK) stands in the way of the perf buffers, which
// perf_mmap() in kernel/events/core.c counts against it, or of the program's maps.
func (x *checker) memlock() Finding {
	const check = "memlock"
	const remedy = "raise the limit (systemd: LimitMEMLOCK=infinity; shell: ulimit -l), or "
	limits, err := x.self.Limits()
	if err != nil {
		return warn(check, err.Error(), "mount proc at "+x.procfs)
	}
	limit := "limit unlimited"
	if limits.LockedMemory != unix.RLIM_INFINITY {
		limit = fmt.Sprintf("limit %d KiB", limits.LockedMemory>>10)
	}
	another := x.loaded.notify == loader.NotifyRingbuf || x.loaded.notify == loader.NotifyPoll
	switch {
	case errors.Is(x.programErr, loader.ErrPerfBuffer):
		return fail(check, limit+", and the kernel refuses the perf buffers", remedy+"give CAP_IPC_LOCK, or set kernel.notify to auto")
	case another && x.perfErr == nil && loader.Notify(x.cfg.Kernel.Notify) == loader.NotifyAuto:
		return warn(check, limit+", and the kernel refuses the perf buffers", remedy+"give CAP_IPC_LOCK; a ring buffer is used instead")
	case x.countsBPF():
		return warn(check, limit+", and this kernel, before 5.11, counts the program's maps against it", remedy+"give CAP_SYS_RESOURCE")
	}
	return ok(check, "%s", limit)
}

// countsBPF reports whether the kernel counts BPF memory against the limit that this process has, as it did before
// 5.11. It is told as libbpf tells it (probe_memcg_account()): by a helper that came with the change.
func (x *checker) countsBPF() bool {
	if limits, err := x.self.Limits(); err != nil || limits.LockedMemory == unix.RLIM_INFINITY || x.has(unix.CAP_SYS_RESOURCE) {
		return false
	}
	return x.kernelErr == nil && CountsBPF(x.kernel)
}

// CountsBPF reports whether a kernel counts BPF maps against RLIMIT_MEMLOCK, as those before 5.11 do.
func CountsBPF(kernel *btf.Spec) bool {
	var helpers *btf.Enum
	if kernel.TypeByName("bpf_func_id", &helpers) != nil {
		return false
	}
	return !slices.ContainsFunc(helpers.Values, func(v btf.EnumValue) bool { return v.Name == "BPF_FUNC_ktime_get_coarse_ns" })
}

func (x *checker) btf() Finding {
	file := cmp.Or(x.btfFile, x.sysfs+"/kernel/btf/vmlinux")
	switch {
	case x.kernelErr == nil:
		return ok("btf", "%s", file)
	case x.btfFile != "":
		return fail("btf", fmt.Sprintf("%s: %v", file, x.kernelErr), "take that kernel's /sys/kernel/btf/vmlinux, or its vmlinux with a section .BTF")
	case errors.Is(x.kernelErr, fs.ErrNotExist):
		return fail("btf", "there is no "+file, "use a kernel with CONFIG_DEBUG_INFO_BTF=y, and mount sysfs at "+x.sysfs)
	}
	return fail("btf", fmt.Sprintf("%s: %v", file, x.kernelErr), "report this kernel: its BTF cannot be read")
}

func (x *checker) markVictim() Finding {
	const check = "mark_victim"
	if x.kernelErr != nil {
		return fail(check, "not known without BTF", "see btf")
	}
	prototype, err := loader.MarkVictimPrototype(x.kernel)
	switch {
	case errors.Is(err, btf.ErrNotFound):
		return fail(check, "this kernel has no such tracepoint", "use a kernel of Linux 5.5 or later with CONFIG_TRACEPOINTS=y")
	case err != nil:
		return fail(check, err.Error(), "report this kernel: its prototype is not known")
	case prototype == loader.PrototypePID:
		if x.hook != "" {
			return ok(check, "hands over a thread ID; the task comes from the hooks")
		}
		return warn(check, "hands over a thread ID and not the task, and there are no hooks: only a process that asked for the memory itself can be read",
			"see hooks, or use a kernel with commit 72ba14deb40a: Linux 6.9 or later, and many stable releases before it")
	}
	return ok(check, "hands over the task")
}

// hooks says whether the OOM killer's functions can be hooked, which proves the context. earlier are the failed checks.
func (x *checker) hooks(earlier []string) Finding {
	const check = "hooks"
	switch why := strings.Join(x.unhooked, "; "); {
	case x.wants(loader.TierStack, loader.TierNone):
		return ok(check, "not used: kernel.tier is %s", x.cfg.Kernel.Tier)
	case x.hook == loader.TierKprobe && why != "":
		return ok(check, "kprobe works (%s)", why)
	case x.hook != "":
		return ok(check, "%s works", x.hook)
	case len(earlier) > 0:
		return x.degraded(check, "none", "see "+strings.Join(earlier, ", "))
	case x.wants(loader.TierAuto) && x.programErr != nil:
		return x.degraded(check, "none", "see program")
	default:
		remedy := "use a kernel with kprobes (CONFIG_KPROBE_EVENTS=y), or one that permits fentry (CONFIG_DYNAMIC_FTRACE_WITH_DIRECT_CALLS=y)"
		if x.needsPerf {
			_, permit := x.refusal("perf_event_open", "PERFMON", unix.CAP_PERFMON, errno(x.perfErr))
			remedy = "permit perf events, which kprobes need on this kernel: " + permit + "; or " + remedy
		}
		return x.degraded(check, "none; the owner of a limit is inferred, and the failed allocation is not known ("+why+")", remedy)
	}
}

// degraded is why a tier is not available: with kernel.tier auto there is less, else the tracer does not start.
func (x *checker) degraded(check, detail, remedy string) Finding {
	if x.wants(loader.TierAuto) {
		return warn(check, detail, remedy)
	}
	return fail(check, detail, remedy+"; or set kernel.tier to auto")
}

func (x *checker) unneeded(check string) Finding {
	if x.hook != "" {
		return ok(check, "not needed beside the hooks")
	}
	return ok(check, "not used: kernel.tier is %s", x.cfg.Kernel.Tier)
}

// kallsyms says whether addresses are shown: see kallsyms_show_value() in kernel/ksyms_common.c.
func (x *checker) kallsyms() Finding {
	const check = "kallsyms"
	restrict, paranoid := x.sysctl("kernel/kptr_restrict", 0), x.sysctl("kernel/perf_event_paranoid", 2)
	hidden := fmt.Sprintf("hides the kernel's addresses from this process (kernel.kptr_restrict is %d, kernel.perf_event_paranoid %d)", restrict, paranoid)
	switch {
	case x.shown:
		return ok(check, "shows the kernel's addresses to this process")
	case !x.needsStack():
		return x.unneeded(check)
	case errors.Is(x.stackErr, fs.ErrNotExist):
		return x.degraded(check, "there is no "+x.procfs+"/kallsyms", "use a kernel with CONFIG_KALLSYMS=y")
	case !errors.Is(x.stackErr, loader.ErrHidden):
		return x.degraded(check, x.stackErr.Error(), "let this process read "+x.procfs+"/kallsyms")
	case restrict >= 2:
		return x.degraded(check, hidden, "sysctl kernel.kptr_restrict=1 (2 hides them from root too), and give CAP_SYSLOG")
	default:
		return x.degraded(check, hidden, "needs CAP_SYSLOG: see capabilities")
	}
}

func (x *checker) stack() Finding {
	const check = "stack"
	if !x.needsStack() {
		return x.unneeded(check)
	}
	if !x.shown {
		return x.degraded(check, "not available: scope, outcome and limit of kills are unknown", "see kallsyms")
	}
	if x.stackErr != nil {
		return x.degraded(check, x.stackErr.Error()+"; scope, outcome and limit of kills are unknown", "report this kernel: its compiler inlined or renamed them")
	}
	if !x.outcome {
		return warn(check, "proves the scope; the outcome of kills is unknown, because the compiler has inlined __oom_kill_process",
			"use a tier with hooks, or report this kernel")
	}
	if nodes := x.memoryNodes(); strings.ContainsAny(nodes, ",-") {
		return warn(check, fmt.Sprintf("proves the scope of cgroup kills; with the memory nodes %s, the scope of other kills is unknown: a cpuset or memory policy may have caused them", nodes),
			"see constraint= in the kernel's own log (dmesg) for those kills")
	}
	return ok(check, "proves scope and outcome")
}

// memoryNodes lists the NUMA nodes with memory, such as 0-1; empty without NUMA.
func (x *checker) memoryNodes() string {
	list, _ := os.ReadFile(x.sysfs + "/devices/system/node/has_memory")
	return strings.TrimSpace(string(list))
}

// tryLoad is the proof, and leaves nothing behind.
func tryLoad(o loader.Options) (loaded, error) {
	l, err := loader.Open(context.Background(), o)
	if err != nil {
		return loaded{}, err
	}
	defer l.Close()
	return loaded{l.Tier(), l.Notify()}, nil
}

// program says whether what a run would load and attach does. earlier are the checks that have failed.
func (x *checker) program(earlier []string) Finding {
	const check = "program"
	err := x.programErr
	if err == nil {
		return ok(check, "loads and attaches; tier %s", x.loaded.tier)
	}
	if len(earlier) > 0 {
		return fail(check, err.Error(), "see "+strings.Join(earlier, ", "))
	}
	detail := err.Error() + x.said.String()
	remedy := "report this kernel, with this message"
	if !x.securityfs() {
		remedy = "check on the host that " + x.sysfs + "/kernel/security/lockdown is not [confidentiality]; otherwise " + remedy
	}
	switch {
	case errors.Is(err, fs.ErrPermission) && x.countsBPF():
		remedy = "see memlock"
	case errors.Is(err, fs.ErrPermission):
		_, remedy = x.refusal("bpf", "BPF", unix.CAP_BPF, errno(err))
	}
	return fail(check, detail, remedy)
}

// warnings collects what the loader and libbpf say at level warn and above.
type warnings struct {
	slog.Handler // nil: attributes and groups are not used
	lines        []string
}

// String is all of it, in brackets.
func (c *warnings) String() string {
	if len(c.lines) == 0 {
		return ""
	}
	return " (" + strings.Join(c.lines, "; ") + ")"
}

func (c *warnings) Enabled(_ context.Context, level slog.Level) bool { return level >= slog.LevelWarn }

func (c *warnings) Handle(_ context.Context, r slog.Record) error {
	line := r.Message
	r.Attrs(func(a slog.Attr) bool {
		line += ": " + a.Value.String()
		return true
	})
	// libbpf repeats its name, and the verifier has lines of its own.
	c.lines = append(c.lines, strings.Join(strings.Fields(strings.TrimPrefix(line, "libbpf: ")), " "))
	return nil
}

// cgroup says which hierarchy the events' paths are from, and what stands in the way of the selftest.
func (x *checker) cgroup() Finding {
	const check = "cgroup"
	if x.memoryDisabled() {
		return warn(check, "the memory controller is off: events carry no cgroup, and no pod",
			"boot without cgroup_disable=memory (some distributions: with cgroup_enable=memory)")
	}
	h, err := cgroupfs.Find(x.procfs)
	if err != nil {
		return warn(check, err.Error(), "mount the cgroup file system to run selftest; tracing does not need it")
	}
	detail := fmt.Sprintf("v%d: memory controller at %s", h.Version, h.Mount)
	if h.Hybrid {
		detail = fmt.Sprintf("hybrid: memory controller on v1 at %s, v2 is mounted without it", h.Mount)
	}
	// In a cgroup namespace the mount shows a part of the tree only.
	if root := x.cfg.Node.CgroupRoot; root != "/" && x.foreignNamespace("cgroup") == "" {
		if info, err := os.Stat(h.Mount + root); err != nil || !info.IsDir() {
			return warn(check, fmt.Sprintf("%s; there is no cgroup %s: no kill would be reported", detail, root),
				"correct node.cgroup_root, or start what makes that cgroup")
		}
	}
	if err := unix.Faccessat(unix.AT_FDCWD, h.Mount, unix.W_OK, unix.AT_EACCESS); err != nil {
		detail += fmt.Sprintf("; selftest cannot make a cgroup there: %v", err)
	}
	return ok(check, "%s", detail)
}

// memoryDisabled reports whether the kernel has the memory controller and it is switched off.
func (x *checker) memoryDisabled() bool {
	all, err := x.proc.CgroupSummarys()
	return err == nil && slices.ContainsFunc(all, func(c procfs.CgroupSummary) bool { return c.SubsysName == "memory" && c.Enabled == 0 })
}

// bpffs says whether recording can go on while no tracer runs.
func (x *checker) bpffs() Finding {
	const check = "bpffs"
	dir := x.cfg.Kernel.PinDir
	if dir == "" {
		return ok(check, "not used (kernel.pin_dir is empty): kills while no tracer runs are not recorded")
	}
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(dir), &st); err != nil || st.Type != unix.BPF_FS_MAGIC {
		return warn(check, fmt.Sprintf("not mounted at %s: kills while no tracer runs are not recorded", filepath.Dir(dir)),
			"mount -t bpf -o mode=0700 bpf "+filepath.Dir(dir)+" (systemd does it at boot), or set kernel.pin_dir")
	}
	d, err := statedir.Open(dir)
	if err == nil {
		defer d.Close()
		err = d.Private()
	}
	if errors.Is(err, statedir.ErrUnsafe) {
		return warn(check, fmt.Sprintf("%v: kills while no tracer runs are not recorded", err),
			"follow that message; to keep other users out of the whole bpffs: mount -t bpf -o mode=0700 bpf "+filepath.Dir(dir))
	}
	if err == nil {
		return ok(check, "the kernel records in %s, also while no tracer runs; oom-tracer unload ends that", dir)
	}
	return ok(check, "mounted at %s: the kernel will record in %s, also while no tracer runs", filepath.Dir(dir), filepath.Base(dir))
}

// tracer says whether a tracer runs on this node and is ready, or whether its metrics could be served.
func (x *checker) tracer(ctx context.Context) Finding {
	const check = "tracer"
	addr := x.cfg.Metrics.Listen
	if addr == "" {
		return ok(check, "not known whether one runs: metrics.listen is empty")
	}
	if x.running {
		ready, said, err := obs.Readiness(ctx, addr)
		switch {
		case err != nil:
			return warn(check, fmt.Sprintf("runs at %s, but does not report whether it is ready: %v", addr, err), "see its log")
		case !ready:
			return warn(check, fmt.Sprintf("runs at %s and is not ready: %s", addr, said), "see its log, nats and jetstream")
		}
		return ok(check, "runs, with its metrics at %s, and is ready", addr)
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return fail(check, fmt.Sprintf("none runs with this config, and its metrics could not be served: %v", err),
			"free the address (ss -ltnp shows who uses it), or set metrics.listen")
	}
	listener.Close()
	return ok(check, "none runs with this config; its metrics can be served at %s", addr)
}

// nats looks at the server that a run would publish to, and at JetStream in it.
func (x *checker) nats(ctx context.Context) []Finding {
	// The name decides where replies come, and a tracer may receive them nowhere else.
	o := bus.Options{Name: bus.TracerName(x.node)}
	log := slog.New(slog.DiscardHandler)
	conn, err := bus.Connect(ctx, x.cfg.NATS, o, log)
	if err == nil {
		defer conn.Close()
		where := cmp.Or(x.cfg.NATS.URL, "the embedded server at "+x.cfg.NATS.Embedded.Listen)
		return []Finding{ok("nats", "%s is reachable", where), x.jetstream(conn.Check(ctx))}
	}
	if x.cfg.NATS.URL == "" {
		return []Finding{x.embedded(err), x.store()}
	}
	unknown := warn("jetstream", "not known without a connection", "see nats")
	// What a run would not wait for, such as a file that cannot be read, comes back at once.
	o.Background = true
	if conn, err := bus.Connect(ctx, x.cfg.NATS, o, log); err != nil {
		return []Finding{fail("nats", err.Error(), "correct nats.* in the config, or the files that it names: the tracer does not start"), unknown}
	} else {
		conn.Close()
	}
	return []Finding{warn("nats", err.Error(), "start NATS, or correct nats.* in the config; until then kills wait in the journal (kernel.journal_size)"), unknown}
}

// jetstream says whether a server that is reached can store events.
func (x *checker) jetstream(enabled bool, err error) Finding {
	const check = "jetstream"
	switch {
	case err == nil:
		return ok(check, "enabled; the stream is there")
	case errors.Is(err, nats.ErrPermissionViolation):
		return ok(check, "not known: this user may not ask, which is correct for a tracer; run oom-tap setup as the streams' owner to check")
	case enabled && x.cfg.NATS.URL == "":
		return warn(check, fmt.Sprintf("enabled, but %v", err), "restart the tracer: it makes the stream at its start")
	case enabled:
		return warn(check, fmt.Sprintf("enabled, but %v", err), "make the stream: oom-tap setup")
	case x.cfg.NATS.URL == "":
		return warn(check, err.Error(), "see the tracer's log: once its disk works it restarts its NATS by itself")
	default:
		return warn(check, err.Error(), "enable JetStream on the server, for this user's account; until then kills wait in the journal (kernel.journal_size)")
	}
}

// embedded says why the embedded server was not reached (reason), or whether it could start.
func (x *checker) embedded(reason error) Finding {
	const check = "nats"
	cfg := x.cfg.NATS.Embedded
	_, passwordErr := bus.ReadEmbeddedPassword(cfg.Dir)
	never := errors.Is(passwordErr, fs.ErrNotExist) // no server has run with this directory
	switch {
	case errors.Is(passwordErr, fs.ErrPermission):
		return fail(check, fmt.Sprintf("embedded server: %v", passwordErr), "run this as the user that the tracer runs as, who owns nats.embedded.dir (root by default)")
	case passwordErr != nil && !never:
		return fail(check, fmt.Sprintf("embedded server: %v", passwordErr), "follow that message")
	case x.running:
		return fail(check, fmt.Sprintf("a tracer runs on this node, and its embedded server cannot be reached: %v", reason),
			"give doctor the same config as the tracer (nats.embedded.listen, nats.embedded.dir), and see the tracer's log")
	}
	listener, err := net.Listen("tcp", cfg.Listen)
	if err != nil {
		detail := fmt.Sprintf("the embedded server does not run, and could not start: %v", err)
		if !never {
			detail += fmt.Sprintf("; the server at that address: %v", reason)
		}
		return fail(check, detail, "free the address (ss -ltnp shows who uses it), or set nats.embedded.listen")
	}
	listener.Close()
	return ok(check, "the embedded server does not run; it can listen at %s", cfg.Listen)
}

// store says whether the embedded server, which does not run, could keep its stream.
func (x *checker) store() Finding {
	const check = "jetstream"
	dir, want := x.cfg.NATS.Embedded.Dir, uint64(x.cfg.NATS.Stream.MaxBytes)
	// The nearest directory that is there decides.
	nearest := dir
	_, err := os.Stat(nearest)
	for ; errors.Is(err, fs.ErrNotExist) && nearest != "/"; _, err = os.Stat(nearest) {
		nearest = filepath.Dir(nearest)
	}
	const remedy = "set nats.embedded.dir to a directory that this user can write to, or run it as root"
	if err == nil {
		if accessErr := unix.Faccessat(unix.AT_FDCWD, nearest+"/.", unix.W_OK|unix.X_OK, unix.AT_EACCESS); accessErr != nil {
			err = &fs.PathError{Op: "write to", Path: nearest, Err: accessErr}
		}
	}
	if err != nil {
		return fail(check, fmt.Sprintf("embedded server: %v", err), remedy)
	}
	d, err := statedir.Open(nearest)
	switch {
	case err == nil:
		d.Close()
	case nearest == dir && errors.Is(err, statedir.ErrUnsafe):
		return fail(check, fmt.Sprintf("embedded server: %v", err), remedy)
	}
	var st unix.Statfs_t
	if err := unix.Statfs(nearest, &st); err != nil {
		return warn(check, fmt.Sprintf("embedded server: free space of %s is not known: %v", nearest, err), remedy)
	}
	if room := st.Bavail*uint64(st.Bsize) + bytesBelow(dir); room < want {
		return warn(check, fmt.Sprintf("embedded server: %s has %d MiB free, and the stream may take %d MiB: JetStream stops when the disk is full", nearest, room>>20, want>>20),
			"free some space, set nats.embedded.dir to another disk, or lower nats.stream.max_bytes")
	}
	return ok(check, "part of the embedded server, stores in %s", dir)
}

// bytesBelow is what the files below dir hold. What cannot be read holds nothing.
func bytesBelow(dir string) uint64 {
	var sum uint64
	_ = filepath.WalkDir(dir, func(path string, _ fs.DirEntry, _ error) error {
		if info, err := os.Lstat(path); err == nil && info.Mode().IsRegular() {
			sum += uint64(info.Size())
		}
		return nil
	})
	return sum
}
