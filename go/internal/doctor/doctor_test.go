package doctor

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
	"github.com/google/go-cmp/cmp"
	"github.com/nats-io/nats-server/v2/server"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/bus/embedded"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

const testNode = "node-1.example"

var update = flag.Bool("update", false, "write the golden files anew")

func TestMain(m *testing.M) { os.Exit(oomtest.Alone{M: m}.Run()) }

// testConfig leads to directories of the test's own.
func testConfig(t *testing.T) config.Config {
	t.Helper()
	cfg := config.Default()
	cfg.NATS.Embedded.Dir = filepath.Join(t.TempDir(), "nats")
	cfg.NATS.Embedded.Listen = "127.0.0.1:0"
	cfg.Metrics.Listen = ""
	cfg.Kernel.PinDir = ""
	return cfg
}

// must ends the test on an error of its own set-up.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// machine is an checker of a machine made of files, on which everything is well until a test changes
// something.
type machine struct {
	*checker
	t *testing.T
	// refuse is what loading comes to, by tier, and said what libbpf has to say of each refusal.
	refuse map[loader.Tier]error
	said   []string
	loads  []loader.Options
	// noBPF and noPerf are why the system calls are refused, and noBuffers why perf buffers are.
	noBPF, noPerf, noBuffers error
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	cfg := config.Default()
	cfg.Metrics.Listen = "127.0.0.1:0"
	cfg.NATS.Embedded.Listen = "127.0.0.1:0"
	cfg.NATS.Embedded.Dir = filepath.Join(t.TempDir(), "nats")
	cfg.NATS.Stream.MaxBytes = 1 << 20
	cfg.Kernel.PinDir = ""
	p := &machine{t: t, checker: &checker{cfg: cfg, node: "node-1", procfs: t.TempDir(), sysfs: t.TempDir()}, refuse: map[loader.Tier]error{}}
	p.checkBPF = func() error { return p.noBPF }
	p.checkPerf = func() error { return p.noPerf }
	p.load = func(o loader.Options) (loaded, error) {
		p.loads = append(p.loads, o)
		o.Log.Info("not a complaint")
		tried := []loader.Tier{o.Tier}
		if o.Tier == loader.TierAuto {
			tried = []loader.Tier{loader.TierFentry, loader.TierKprobe, loader.TierStack, loader.TierNone}
		}
		var err error
		for _, tier := range tried {
			refusal := p.refuse[tier]
			if o.Notify == loader.NotifyPerf && p.noBuffers != nil {
				refusal = fmt.Errorf("%w: %w", loader.ErrPerfBuffer, p.noBuffers)
			}
			if refusal == nil {
				way := o.Notify
				if way == loader.NotifyAuto {
					way = loader.NotifyPerf
					if p.noPerf != nil || p.noBuffers != nil {
						way = loader.NotifyRingbuf
					}
				}
				return loaded{tier, way}, nil
			}
			err = fmt.Errorf("use tier %s: %w", tier, refusal)
		}
		for _, line := range p.said {
			o.Log.Warn("libbpf", "message", line)
		}
		return loaded{}, err
	}

	must(t, os.Symlink("77", p.procfs+"/self"))
	p.proc("77/status", "Name:\toom-tracer\nUid:\t0\t0\t0\t0\nCapPrm:\t000001ffffffffff\nCapEff:\t000001ffffffffff\nCapBnd:\t000001ffffffffff\n")
	p.proc("77/oom_score_adj", "-998\n")
	p.memlockLimitIs("8388608")
	p.namespace("user", "user:[4026531837]")
	p.namespace("cgroup", "cgroup:[4026531835]")
	p.mounts("cgroup2", t.TempDir())
	p.proc("cgroups", "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t70\t1\nmemory\t0\t70\t1\n")
	p.proc("sys/kernel/osrelease", "6.12.95+deb12-cloud-amd64\n")
	p.proc("sys/kernel/cap_last_cap", "40\n")
	p.proc("sys/kernel/kptr_restrict", "1\n")
	p.proc("sys/kernel/perf_event_paranoid", "2\n")
	p.kallsymsText(allSymbols)
	p.sys("kernel/security/lockdown", "none [integrity] confidentiality\n")
	p.sys("devices/system/node/has_memory", "0\n")
	p.kernelTypes(victimTask, "BPF_FUNC_map_lookup_elem", "BPF_FUNC_ktime_get_coarse_ns")
	return p
}

func write(t *testing.T, path, text string) {
	t.Helper()
	must(t, os.MkdirAll(filepath.Dir(path), 0o755))
	must(t, os.WriteFile(path, []byte(text), 0o644))
}

func (p *machine) proc(path, text string) { p.t.Helper(); write(p.t, p.procfs+"/"+path, text) }
func (p *machine) sys(path, text string)  { p.t.Helper(); write(p.t, p.sysfs+"/"+path, text) }

// without removes a file or a directory of /proc or /sys.
func (p *machine) without(path string) {
	p.t.Helper()
	for _, root := range []string{p.procfs, p.sysfs} {
		if _, err := os.Lstat(root + "/" + path); err == nil {
			must(p.t, os.RemoveAll(root+"/"+path))
			return
		}
	}
	p.t.Fatalf("there is no %s", path)
}

func (p *machine) namespace(kind, link string) {
	p.t.Helper()
	must(p.t, os.MkdirAll(p.procfs+"/77/ns", 0o755))
	os.Remove(p.procfs + "/77/ns/" + kind)
	must(p.t, os.Symlink(link, p.procfs+"/77/ns/"+kind))
}

func (p *machine) memlockLimitIs(soft string) {
	p.t.Helper()
	p.proc("77/limits", fmt.Sprintf("%-25s %-20s %-20s %-10s\n%-25s %-20s %-20s %-10s\n",
		"Limit", "Soft Limit", "Hard Limit", "Units", "Max locked memory", soft, "unlimited", "bytes"))
}

// filtered has a seccomp filter in force.
func (p *machine) filtered() {
	p.t.Helper()
	data, err := os.ReadFile(p.procfs + "/77/status")
	must(p.t, err)
	p.proc("77/status", string(data)+"NoNewPrivs:\t1\nSeccomp:\t2\nSeccomp_filters:\t1\n")
}

// mounts has the memory controller at a directory, in a hierarchy of version 1 ("cgroup") or 2.
func (p *machine) mounts(fstype, dir string) {
	p.t.Helper()
	p.proc("77/mountinfo", fmt.Sprintf("26 22 0:23 / %s rw - %s cgroup rw,memory\n", dir, fstype))
	if fstype == "cgroup2" {
		write(p.t, dir+"/cgroup.controllers", "cpu memory pids\n")
	}
}

// lacks takes capabilities from the effective set.
func (p *machine) lacks(bits ...uint) {
	p.t.Helper()
	effective := uint64(1)<<(unix.CAP_LAST_CAP+1) - 1
	for _, bit := range bits {
		effective &^= 1 << bit
	}
	p.proc("77/status", fmt.Sprintf("Uid:\t0\t0\t0\t0\nCapEff:\t%016x\nCapBnd:\t%016x\n", effective, effective))
}

var allSymbols = []string{
	"__oom_kill_process", "oom_kill_process", "oom_kill_memcg_member", "out_of_memory", "mem_cgroup_out_of_memory",
	"moom_callback", "__alloc_pages_slowpath.constprop.0", "last_of_the_text",
}

func (p *machine) kallsymsText(names []string) {
	p.t.Helper()
	text := "0000000000000000 A fixed_percpu_data\n"
	for i, name := range names {
		text += fmt.Sprintf("ffffffff81%06x t %s\n", i*0x100, name)
	}
	p.proc("kallsyms", text)
}

// noHooks has neither fentry nor kprobe work.
func (p *machine) noHooks() {
	p.refuse[loader.TierFentry] = fmt.Errorf("load the BPF object: %w", unix.EPERM)
	p.refuse[loader.TierKprobe] = fmt.Errorf("attach kprobe_out_of_memory: %w", unix.ENOENT)
}

// withoutHooks is what is found then.
var withoutHooks = Finding{"hooks", StatusWarn, "none; the owner of a limit is inferred, and the failed allocation is not known (fentry: load the BPF object: operation not permitted; kprobe: attach kprobe_out_of_memory: no such file or directory)", "CONFIG_KPROBE_EVENTS=y"}

// nothing has every tier refused.
func (p *machine) nothing(err error) {
	for _, tier := range []loader.Tier{loader.TierFentry, loader.TierKprobe, loader.TierStack, loader.TierNone} {
		p.refuse[tier] = err
	}
}

func (p *machine) kallsymsHidden() {
	p.t.Helper()
	text := "0000000000000000 A fixed_percpu_data\n"
	for _, name := range allSymbols {
		text += "0000000000000000 t " + name + "\n"
	}
	p.proc("kallsyms", text)
}

// The prototypes of mark_victim: those that are known, and two that are not.
var (
	victimTask = []btf.FuncParam{{Type: &btf.Pointer{Target: &btf.Struct{Name: "task_struct", Size: 4}}}, {Type: &btf.Int{Name: "uid_t", Size: 4}}}
	victimPID  = []btf.FuncParam{{Type: &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}}}
	victimOdd  = []btf.FuncParam{{Type: &btf.Pointer{Target: &btf.Struct{Name: "mm_struct", Size: 4}}}}
)

// kernelTypes writes the BTF of a kernel whose mark_victim takes arguments (none: there is no such
// tracepoint) and that has BPF helpers.
func (p *machine) kernelTypes(arguments []btf.FuncParam, helpers ...string) {
	p.t.Helper()
	void := &btf.Pointer{Target: &btf.Void{}}
	var types []btf.Type
	if arguments != nil {
		types = append(types, &btf.Typedef{Name: "btf_trace_mark_victim", Type: &btf.Pointer{Target: &btf.FuncProto{
			Return: &btf.Void{}, Params: append([]btf.FuncParam{{Type: void}}, arguments...),
		}}})
	}
	enum := &btf.Enum{Name: "bpf_func_id", Size: 4}
	for i, name := range helpers {
		enum.Values = append(enum.Values, btf.EnumValue{Name: name, Value: uint64(i)})
	}
	types = append(types, enum)
	builder, err := btf.NewBuilder(types, nil)
	must(p.t, err)
	blob, err := builder.Marshal(nil, nil)
	must(p.t, err)
	p.sys("kernel/btf/vmlinux", string(blob))
}

// checks are all that doctor makes, in their order.
var checks = []string{
	"kernel", "capabilities", "protection", "lockdown", "bpf", "notify", "memlock", "btf", "mark_victim", "hooks", "kallsyms", "stack", "program",
	"cgroup", "bpffs", "tracer", "nats", "jetstream",
}

// expect holds the findings against those wanted: every one that is not ok must be among them, detail
// and remedy being parts of what it says. What is wanted as ok must say so.
func (p *machine) expect(want ...Finding) {
	p.t.Helper()
	p.check(p.examine(p.t.Context()), want)
}

func (p *machine) check(got, want []Finding) {
	p.t.Helper()
	var names []string
	for _, f := range got {
		names = append(names, f.Check)
		i := slices.IndexFunc(want, func(w Finding) bool { return w.Check == f.Check })
		w := Finding{Status: StatusOK}
		if i >= 0 {
			w = want[i]
		}
		if f.Status != w.Status || !strings.Contains(f.Detail, w.Detail) || !strings.Contains(f.Remedy, w.Remedy) {
			p.t.Errorf("%s:\n got %s: %s -> %s\nwant %s: %s -> %s", f.Check, f.Status, f.Detail, f.Remedy, w.Status, w.Detail, w.Remedy)
		}
		if f.Detail == "" || (f.Remedy == "") != (f.Status == StatusOK) {
			p.t.Errorf("%s is %s with detail %q and remedy %q", f.Check, f.Status, f.Detail, f.Remedy)
		}
	}
	if diff := cmp.Diff(checks, names); diff != "" {
		p.t.Errorf("the checks (-want +got):\n%s", diff)
	}
}

// withoutStack are the findings where neither hooks nor the stack are to be had.
func withoutStack(s Status, cause Finding) []Finding {
	findings := []Finding{cause, {"stack", s, "not available: scope, outcome and limit of kills are unknown", "see kallsyms"}}
	if s == StatusWarn {
		findings = append(findings, withoutHooks)
	}
	return findings
}

func TestDoctorFindings(t *testing.T) {
	const (
		admin  = unix.CAP_SYS_ADMIN
		hidden = "hides the kernel's addresses"
	)
	for _, tt := range []struct {
		name   string
		change func(*machine)
		want   []Finding
	}{
		{"all is well", func(*machine) {}, []Finding{
			{"kernel", StatusOK, "6.12.95+deb12-cloud-amd64 " + runtime.GOARCH + ", node node-1", ""},
			{"capabilities", StatusOK, "has CAP_BPF, CAP_PERFMON, CAP_SYSLOG", ""},
			{"protection", StatusOK, "can have oom_score_adj -998", ""},
			{"lockdown", StatusOK, "integrity", ""},
			{"memlock", StatusOK, "limit 8192 KiB", ""},
			{"bpf", StatusOK, "is permitted", ""},
			{"notify", StatusOK, "notifications use a perf buffer", ""},
			{"btf", StatusOK, "/kernel/btf/vmlinux", ""},
			{"mark_victim", StatusOK, "hands over the task", ""},
			{"kallsyms", StatusOK, "shows the kernel's addresses", ""},
			{"hooks", StatusOK, "fentry works", ""},
			{"stack", StatusOK, "not needed beside the hooks", ""},
			{"program", StatusOK, "loads and attaches; tier fentry", ""},
			{"cgroup", StatusOK, "v2: memory controller at ", ""},
			{"bpffs", StatusOK, "not used (kernel.pin_dir is empty)", ""},
			{"tracer", StatusOK, "none runs with this config", ""},
			{"nats", StatusOK, "the embedded server does not run; it can listen at 127.0.0.1:0", ""},
			{"jetstream", StatusOK, "part of the embedded server", ""},
		}},

		{"no proc", func(p *machine) { p.without("sys/kernel/osrelease") }, []Finding{
			{"kernel", StatusFail, "osrelease: no such file", "mount proc"},
			{"program", StatusOK, "", ""},
		}},

		// Hooks.
		{"kprobe alone", func(p *machine) { p.noHooks(); delete(p.refuse, loader.TierKprobe) }, []Finding{
			{"hooks", StatusOK, "kprobe works (fentry: load the BPF object: operation not permitted)", ""},
			{"kallsyms", StatusOK, "shows the kernel's addresses", ""},
			{"stack", StatusOK, "not needed beside the hooks", ""},
			{"program", StatusOK, "tier kprobe", ""},
		}},
		{"no hooks", func(p *machine) { p.noHooks() }, []Finding{
			withoutHooks,
			{"stack", StatusOK, "proves scope and outcome", ""},
			{"program", StatusOK, "tier stack", ""},
		}},
		{"fentry demanded", func(p *machine) { p.cfg.Kernel.Tier = "fentry"; p.kallsymsHidden(); p.lacks(unix.CAP_SYSLOG) }, []Finding{
			{"capabilities", StatusOK, "no need of CAP_SYSLOG", ""},
			{"hooks", StatusOK, "fentry works", ""},
			{"kallsyms", StatusOK, "not needed beside the hooks", ""},
			{"stack", StatusOK, "not needed beside the hooks", ""},
		}},
		{"kprobe demanded", func(p *machine) { p.cfg.Kernel.Tier = "kprobe" }, []Finding{
			{"hooks", StatusOK, "kprobe works", ""},
			{"program", StatusOK, "tier kprobe", ""},
		}},
		{"fentry demanded and refused", func(p *machine) { p.cfg.Kernel.Tier = "fentry"; p.noHooks() }, []Finding{
			{"hooks", StatusFail, "(fentry: load the BPF object: operation not permitted)", "or set kernel.tier to auto"},
			{"stack", StatusOK, "not used: kernel.tier is fentry", ""},
			{"program", StatusFail, "use tier fentry: ", "see hooks"},
		}},
		{"kprobe demanded and refused", func(p *machine) { p.cfg.Kernel.Tier = "kprobe"; p.noHooks() }, []Finding{
			{"hooks", StatusFail, "(kprobe: attach kprobe_out_of_memory: no such file or directory)", "or set kernel.tier to auto"},
			{"program", StatusFail, "use tier kprobe: ", "see hooks"},
		}},
		{"the stack demanded", func(p *machine) { p.cfg.Kernel.Tier = "stack" }, []Finding{
			{"hooks", StatusOK, "not used: kernel.tier is stack", ""},
			{"stack", StatusOK, "proves scope and outcome", ""},
			{"program", StatusOK, "tier stack", ""},
		}},

		// Capabilities.
		{"no CAP_BPF", func(p *machine) { p.lacks(unix.CAP_BPF, admin) }, []Finding{
			{"capabilities", StatusFail, "has CAP_PERFMON, CAP_SYSLOG; lacks CAP_BPF to load the program", "capabilities.add: [BPF], with runAsUser: 0"},
		}},
		{"no CAP_PERFMON", func(p *machine) { p.lacks(unix.CAP_PERFMON, admin) }, []Finding{
			{"capabilities", StatusFail, "lacks CAP_PERFMON to attach it and read the kernel's memory", "[PERFMON]"},
		}},
		{"none at all", func(p *machine) {
			p.kallsymsHidden()
			p.nothing(unix.EPERM)
			p.lacks(unix.CAP_BPF, unix.CAP_PERFMON, unix.CAP_SYSLOG, admin)
		}, append([]Finding{{"hooks", StatusWarn, "none", "see capabilities"}, {"program", StatusFail, "use tier none: operation not permitted", "see capabilities"}},
			append(withoutStack(StatusWarn, Finding{"kallsyms", StatusWarn, hidden, "see capabilities"})[:2],
				Finding{"capabilities", StatusFail, "has none of those needed; lacks CAP_BPF to load the program, CAP_PERFMON to attach", "[BPF, PERFMON, SYSLOG]"})...)},
		{"CAP_SYS_ADMIN stands for two of them", func(p *machine) { p.lacks(unix.CAP_BPF, unix.CAP_PERFMON) }, []Finding{
			{"capabilities", StatusOK, "has CAP_SYS_ADMIN for CAP_BPF, CAP_SYS_ADMIN for CAP_PERFMON, CAP_SYSLOG", ""},
		}},
		{"CAP_SYS_ADMIN does not stand for CAP_SYSLOG", func(p *machine) { p.lacks(unix.CAP_SYSLOG); p.kallsymsHidden(); p.noHooks() },
			append(withoutStack(StatusWarn, Finding{"kallsyms", StatusWarn, hidden + " from this process (kernel.kptr_restrict is 1, kernel.perf_event_paranoid 2)", "needs CAP_SYSLOG: see capabilities"}),
				Finding{"capabilities", StatusWarn, "has CAP_BPF, CAP_PERFMON; lacks CAP_SYSLOG to see the kernel's addresses (tier stack)", "[SYSLOG]"})},
		{"may lower its oom_score_adj", func(p *machine) { p.proc("77/oom_score_adj", "-997\n") }, nil},
		{"may not lower its oom_score_adj", func(p *machine) { p.proc("77/oom_score_adj", "-997\n"); p.lacks(unix.CAP_SYS_RESOURCE) }, []Finding{
			{"protection", StatusWarn, "lacks CAP_SYS_RESOURCE to lower its oom_score_adj, now -997", "add: [SYS_RESOURCE]"},
		}},
		{"need not lower its oom_score_adj", func(p *machine) { p.lacks(unix.CAP_SYS_RESOURCE) }, nil},
		{"no need of CAP_SYSLOG, where the addresses are shown", func(p *machine) {
			p.noHooks()
			p.lacks(unix.CAP_SYSLOG)
			p.proc("sys/kernel/kptr_restrict", "0\n")
			p.proc("sys/kernel/perf_event_paranoid", "1\n")
		}, []Finding{withoutHooks, {"capabilities", StatusOK, "has CAP_BPF, CAP_PERFMON, no need of CAP_SYSLOG", ""}}},
		{"no need of CAP_SYSLOG, beside the hooks", func(p *machine) { p.lacks(unix.CAP_SYSLOG); p.kallsymsHidden() }, []Finding{
			{"capabilities", StatusOK, "no need of CAP_SYSLOG", ""},
			{"kallsyms", StatusOK, "not needed beside the hooks", ""},
		}},
		{"a user who might have them", func(p *machine) {
			p.proc("77/status", "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\n")
		}, []Finding{{"capabilities", StatusFail, "lacks CAP_BPF", "run it as user 0, which has them here; user 1000 does not"}}},
		{"a user who might not", func(p *machine) {
			p.proc("77/status", "Uid:\t1000\t1000\t1000\t1000\nCapEff:\t0000000000000000\nCapBnd:\t00000000a80425fb\n")
		}, []Finding{{"capabilities", StatusFail, "lacks CAP_BPF", "securityContext.capabilities.add: [BPF, PERFMON], with runAsUser: 0"}}},
		{"root without what it might have", func(p *machine) {
			p.proc("77/status", "Uid:\t0\t0\t0\t0\nCapEff:\t0000000000000000\nCapBnd:\t000001ffffffffff\n")
		}, []Finding{{"capabilities", StatusFail, "lacks CAP_BPF", "run it as root with all capabilities"}}},
		{"root in a user namespace", func(p *machine) { p.namespace("user", "user:[4026532177]") }, []Finding{
			{"capabilities", StatusFail, "user namespace user:[4026532177]", "hostUsers"},
		}},
		{"before 5.8, without CAP_SYS_ADMIN", func(p *machine) { p.proc("sys/kernel/cap_last_cap", "37\n"); p.lacks(38, 39, 40, admin) }, []Finding{
			{"capabilities", StatusFail, "lacks CAP_SYS_ADMIN", "give it CAP_SYS_ADMIN"},
		}},
		{"before 5.8, with CAP_SYS_ADMIN", func(p *machine) { p.proc("sys/kernel/cap_last_cap", "37\n"); p.lacks(38, 39, 40) }, []Finding{
			{"capabilities", StatusOK, "has CAP_SYS_ADMIN for CAP_BPF", ""},
		}},
		{"a status that cannot be read", func(p *machine) { p.without("77/status") }, []Finding{
			{"capabilities", StatusFail, "77/status: no such file", "mount proc"},
		}},

		// The system calls.
		{"bpf without CAP_BPF", func(p *machine) {
			p.lacks(unix.CAP_BPF, admin)
			p.filtered()
			p.nothing(unix.EPERM)
			p.noBPF = fmt.Errorf("%w: %w", loader.ErrBPF, unix.EPERM)
		}, []Finding{
			{"capabilities", StatusFail, "lacks CAP_BPF", ""},
			{"bpf", StatusFail, "bpf is refused (operation not permitted): this process lacks CAP_BPF", "see capabilities"},
			{"notify", StatusWarn, "not known without bpf", "see bpf"},
			{"hooks", StatusWarn, "none", "see capabilities, bpf"},
			{"program", StatusFail, "", "see capabilities, bpf"},
		}},
		{"bpf and a seccomp filter", func(p *machine) {
			p.lacks(admin)
			p.filtered()
			p.nothing(unix.EPERM)
			p.noBPF = fmt.Errorf("%w: %w", loader.ErrBPF, unix.EPERM)
		}, []Finding{
			{"bpf", StatusFail, "the seccomp filter of this process refuses bpf (operation not permitted, although it has CAP_BPF; Seccomp is 2", "RuntimeDefault of containerd 1.7 and Docker 23 or later does, that of CRI-O"},
			{"notify", StatusWarn, "not known without bpf", "see bpf"},
			{"hooks", StatusWarn, "none", "see bpf"},
			{"program", StatusFail, "", "see bpf"},
		}},
		{"bpf and the memory of maps, before 5.11", func(p *machine) {
			p.kernelTypes(victimTask, "BPF_FUNC_map_lookup_elem")
			p.lacks(unix.CAP_SYS_RESOURCE, admin)
			p.filtered()
			p.nothing(unix.EPERM)
			p.noBPF = fmt.Errorf("could not create map: %w", unix.EPERM)
		}, []Finding{
			{"bpf", StatusFail, "could not create map: operation not permitted", "see memlock"},
			{"memlock", StatusWarn, "counts the program's maps against it", ""},
			{"notify", StatusWarn, "", "see bpf"},
			{"hooks", StatusWarn, "none", "see bpf"},
			{"program", StatusFail, "", "see bpf"},
		}},
		{"bpf and a security module", func(p *machine) {
			p.nothing(unix.EACCES)
			p.noBPF = fmt.Errorf("%w: %w", loader.ErrBPF, unix.EACCES)
		}, []Finding{
			{"bpf", StatusFail, "bpf is refused (permission denied), although this process has CAP_BPF and no seccomp filter", "see the audit log"},
			{"notify", StatusWarn, "", "see bpf"},
			{"hooks", StatusWarn, "none", "see bpf"},
			{"program", StatusFail, "", "see bpf"},
		}},
		{"a distribution's own paranoia", func(p *machine) {
			p.lacks(admin)
			p.filtered()
			p.noPerf = unix.EACCES
			p.proc("sys/kernel/perf_event_paranoid", "4\n")
		}, []Finding{
			{"notify", StatusWarn, "notifications use a ring buffer, all kills are reported; no perf events: kernel.perf_event_paranoid is 4, a level that Debian and Ubuntu added", "not needed; to permit them: sysctl kernel.perf_event_paranoid=2"},
			{"memlock", StatusOK, "limit 8192 KiB", ""},
			{"hooks", StatusOK, "fentry works", ""},
		}},
		{"perf and a seccomp filter", func(p *machine) {
			p.lacks(admin)
			p.filtered()
			p.noPerf = unix.EPERM
		}, []Finding{
			{"notify", StatusWarn, "notifications use a ring buffer, all kills are reported; no perf events: the seccomp filter of this process refuses perf_event_open (operation not permitted, although it has CAP_PERFMON", "RuntimeDefault of containerd 1.7"},
		}},
		{"perf, a seccomp filter, and a distribution's own paranoia", func(p *machine) {
			p.lacks(admin)
			p.filtered()
			p.noPerf = unix.EPERM
			p.proc("sys/kernel/perf_event_paranoid", "3\n")
		}, []Finding{{"notify", StatusWarn, "the seccomp filter of this process refuses perf_event_open", "RuntimeDefault"}}},
		{"perf and a security module", func(p *machine) { p.noPerf = unix.EACCES }, []Finding{
			{"notify", StatusWarn, "perf_event_open is refused (permission denied), although this process has CAP_PERFMON and no seccomp filter", "audit log"},
		}},
		{"perf without CAP_PERFMON", func(p *machine) {
			p.lacks(unix.CAP_PERFMON, admin)
			p.noPerf = unix.EACCES
			p.nothing(unix.EPERM)
		}, []Finding{
			{"capabilities", StatusFail, "lacks CAP_PERFMON", ""},
			{"notify", StatusWarn, "no perf events: perf_event_open is refused (permission denied): this process lacks CAP_PERFMON", "see capabilities"},
			{"hooks", StatusWarn, "none", "see capabilities"},
			{"program", StatusFail, "", "see capabilities"},
		}},
		{"perf in no kernel", func(p *machine) { p.noPerf = unix.ENOSYS }, []Finding{
			{"notify", StatusWarn, "perf_event_open: function not implemented", "report this kernel"},
		}},
		{"perf demanded and refused", func(p *machine) {
			p.lacks(admin)
			p.cfg.Kernel.Notify = "perf"
			p.noPerf = unix.EACCES
			p.proc("sys/kernel/perf_event_paranoid", "3\n")
			p.nothing(unix.EACCES)
		}, []Finding{
			{"notify", StatusFail, "kernel.notify is perf: kernel.perf_event_paranoid is 3", "or set kernel.notify to auto"},
			{"hooks", StatusWarn, "none", "see notify"},
			{"program", StatusFail, "", "see notify"},
		}},
		{"a ring buffer demanded", func(p *machine) { p.cfg.Kernel.Notify = "ringbuf"; p.noPerf = unix.EACCES }, []Finding{
			{"notify", StatusOK, "notifications use a ring buffer", ""},
		}},
		{"polling demanded", func(p *machine) { p.cfg.Kernel.Notify = "poll" }, []Finding{
			{"notify", StatusOK, "notifications use polling, every 200 ms", ""},
		}},
		{"kprobes need perf events", func(p *machine) {
			p.lacks(admin)
			p.noHooks()
			p.noPerf = unix.EACCES
			p.proc("sys/kernel/perf_event_paranoid", "3\n")
			p.refuse[loader.TierKprobe] = fmt.Errorf("perf_event_open: %w; and it has no kprobe.multi links", unix.EACCES)
		}, []Finding{
			{"notify", StatusWarn, "notifications use a ring buffer", ""},
			{"hooks", StatusWarn, "kprobe: perf_event_open: permission denied; and it has no kprobe.multi links", "permit perf events, which kprobes need on this kernel: sysctl kernel.perf_event_paranoid=2"},
			{"program", StatusOK, "tier stack", ""},
		}},

		// Lockdown.
		{"lockdown none", func(p *machine) { p.sys("kernel/security/lockdown", "[none] integrity confidentiality\n") }, []Finding{
			{"lockdown", StatusOK, "none", ""},
		}},
		{"lockdown confidentiality", func(p *machine) { p.sys("kernel/security/lockdown", "none integrity [confidentiality]\n") }, []Finding{
			{"lockdown", StatusFail, "confidentiality: the kernel lets no program read its memory", "lockdown=integrity"},
		}},
		{"lockdown unknown", func(p *machine) { p.sys("kernel/security/lockdown", "none [secrecy]\n") }, []Finding{
			{"lockdown", StatusWarn, `unknown mode "none [secrecy]"`, "report this kernel"},
		}},
		{"lockdown without brackets", func(p *machine) { p.sys("kernel/security/lockdown", "none integrity confidentiality\n") }, []Finding{
			{"lockdown", StatusWarn, "unknown mode", "report this kernel"},
		}},
		{"lockdown of another form", func(p *machine) { p.sys("kernel/security/lockdown", "none [integrity") }, []Finding{
			{"lockdown", StatusWarn, "unknown mode", "report this kernel"},
		}},
		{"lockdown cannot be read", func(p *machine) {
			p.without("kernel/security/lockdown")
			p.sys("kernel/security/lockdown/x", "")
		}, []Finding{{"lockdown", StatusWarn, "is a directory", "run doctor as root"}}},
		{"no lockdown in the kernel", func(p *machine) { p.without("kernel/security/lockdown"); p.sys("kernel/security/lsm", "capability") }, []Finding{
			{"lockdown", StatusOK, "not in this kernel", ""},
		}},
		{"no securityfs", func(p *machine) { p.without("kernel/security/lockdown") }, []Finding{
			{"lockdown", StatusOK, "not known: securityfs is not mounted at", ""},
		}},

		// Memory that may be locked.
		{"perf buffers that are refused", func(p *machine) { p.noBuffers = unix.EPERM; p.memlockLimitIs("16383") }, []Finding{
			{"memlock", StatusWarn, "limit 15 KiB, and the kernel refuses the perf buffers", "give CAP_IPC_LOCK; a ring buffer is used instead"},
			{"notify", StatusWarn, "notifications use a ring buffer, all kills are reported", "see memlock"},
		}},
		{"perf buffers that are refused, demanded", func(p *machine) { p.cfg.Kernel.Notify = "perf"; p.noBuffers = unix.EPERM }, []Finding{
			{"memlock", StatusFail, "the kernel refuses the perf buffers", "give CAP_IPC_LOCK, or set kernel.notify to auto"},
			{"notify", StatusOK, "not known", ""},
			{"hooks", StatusWarn, "none", "see memlock"},
			{"program", StatusFail, "open a perf buffer", "see memlock"},
		}},
		{"a ring buffer that is demanded", func(p *machine) { p.cfg.Kernel.Notify = "ringbuf"; p.noBuffers = unix.EPERM; p.memlockLimitIs("0") }, []Finding{
			{"memlock", StatusOK, "limit 0 KiB", ""},
		}},
		{"unlimited", func(p *machine) { p.memlockLimitIs("unlimited") }, []Finding{{"memlock", StatusOK, "limit unlimited", ""}}},
		{"before 5.11", func(p *machine) {
			p.kernelTypes(victimTask, "BPF_FUNC_map_lookup_elem")
			p.lacks(unix.CAP_SYS_RESOURCE)
		}, []Finding{
			{"memlock", StatusWarn, "limit 8192 KiB, and this kernel, before 5.11, counts the program's maps against it", "or give CAP_SYS_RESOURCE"},
		}},
		{"before 5.11, with CAP_SYS_RESOURCE", func(p *machine) { p.kernelTypes(victimTask, "BPF_FUNC_map_lookup_elem") }, nil},
		{"before 5.11, unlimited", func(p *machine) {
			p.kernelTypes(victimTask, "BPF_FUNC_map_lookup_elem")
			p.lacks(unix.CAP_SYS_RESOURCE)
			p.memlockLimitIs("unlimited")
		}, nil},
		{"limits that cannot be read", func(p *machine) { p.without("77/limits") }, []Finding{
			{"memlock", StatusWarn, "77/limits: no such file", "mount proc"},
		}},

		// Types.
		{"no BTF", func(p *machine) { p.without("kernel/btf/vmlinux") }, []Finding{
			{"btf", StatusFail, "there is no ", "CONFIG_DEBUG_INFO_BTF=y"},
			{"mark_victim", StatusFail, "not known without BTF", "see btf"},
		}},
		{"BTF of another form", func(p *machine) { p.sys("kernel/btf/vmlinux", "rubbish") }, []Finding{
			{"btf", StatusFail, "kernel/btf/vmlinux: ", "report this kernel"},
			{"mark_victim", StatusFail, "not known without BTF", "see btf"},
		}},
		{"mark_victim with a thread ID", func(p *machine) { p.kernelTypes(victimPID, "BPF_FUNC_ktime_get_coarse_ns") }, []Finding{
			{"mark_victim", StatusOK, "hands over a thread ID; the task comes from the hooks", ""},
		}},
		{"mark_victim with a thread ID and no hooks", func(p *machine) { p.kernelTypes(victimPID, "BPF_FUNC_ktime_get_coarse_ns"); p.noHooks() }, []Finding{
			{"mark_victim", StatusWarn, "hands over a thread ID and not the task, and there are no hooks", "see hooks, or use a kernel with commit 72ba14deb40a"},
			withoutHooks,
		}},
		{"mark_victim with something else", func(p *machine) { p.kernelTypes(victimOdd, "BPF_FUNC_ktime_get_coarse_ns") }, []Finding{
			{"mark_victim", StatusFail, "unknown prototype", "report this kernel"},
		}},
		{"no mark_victim", func(p *machine) { p.kernelTypes(nil, "BPF_FUNC_ktime_get_coarse_ns") }, []Finding{
			{"mark_victim", StatusFail, "this kernel has no such tracepoint", "Linux 5.5 or later"},
		}},

		// The stack tier.
		{"no kallsyms", func(p *machine) { p.without("kallsyms"); p.noHooks() },
			withoutStack(StatusWarn, Finding{"kallsyms", StatusWarn, "there is no ", "CONFIG_KALLSYMS=y"})},
		{"kallsyms in another form", func(p *machine) { p.proc("kallsyms", "address t name\n"); p.noHooks() },
			withoutStack(StatusWarn, Finding{"kallsyms", StatusWarn, `parsing "address"`, "let this process read"})},
		{"addresses hidden from everybody", func(p *machine) { p.kallsymsHidden(); p.proc("sys/kernel/kptr_restrict", "2\n"); p.noHooks() },
			withoutStack(StatusWarn, Finding{"kallsyms", StatusWarn, "kernel.kptr_restrict is 2", "sysctl kernel.kptr_restrict=1"})},
		{"addresses hidden, and the stack tier demanded", func(p *machine) {
			p.kallsymsHidden()
			p.proc("sys/kernel/kptr_restrict", "2\n")
			p.cfg.Kernel.Tier = "stack"
		}, withoutStack(StatusFail, Finding{"kallsyms", StatusFail, hidden, "or set kernel.tier to auto"})},
		{"addresses hidden, and no tier wanted", func(p *machine) { p.kallsymsHidden(); p.lacks(unix.CAP_SYSLOG); p.cfg.Kernel.Tier = "none" }, []Finding{
			{"capabilities", StatusOK, "no need of CAP_SYSLOG", ""},
			{"hooks", StatusOK, "not used: kernel.tier is none", ""},
			{"kallsyms", StatusOK, "not used: kernel.tier is none", ""},
			{"stack", StatusOK, "not used: kernel.tier is none", ""},
			{"program", StatusOK, "tier none", ""},
		}},
		{"a function is not there", func(p *machine) { p.kallsymsText(slices.Delete(slices.Clone(allSymbols), 3, 4)); p.noHooks() }, []Finding{
			withoutHooks,
			{"stack", StatusWarn, "kallsyms has no out_of_memory, nor what it may be inlined into; scope, outcome and limit of kills are unknown", "report this kernel"},
		}},
		{"a function is not there, and the stack tier demanded", func(p *machine) { p.kallsymsText(allSymbols[2:]); p.cfg.Kernel.Tier = "stack" }, []Finding{
			{"stack", StatusFail, "kallsyms has no __oom_kill_process", "or set kernel.tier to auto"},
		}},
		{"the function that kills is inlined", func(p *machine) { p.kallsymsText(allSymbols[1:]); p.noHooks() }, []Finding{
			withoutHooks,
			{"stack", StatusWarn, "the outcome of kills is unknown", "use a tier with hooks"},
		}},
		{"two memory nodes", func(p *machine) { p.sys("devices/system/node/has_memory", "0-1\n"); p.noHooks() }, []Finding{
			withoutHooks,
			{"stack", StatusWarn, "with the memory nodes 0-1, the scope of other kills is unknown", "constraint="},
		}},
		{"no NUMA", func(p *machine) { p.without("devices/system/node/has_memory"); p.noHooks() }, []Finding{withoutHooks}},

		// Cgroups.
		{"v1", func(p *machine) { p.mounts("cgroup", "/sys/fs/cgroup/memory") }, []Finding{
			{"cgroup", StatusOK, "v1: memory controller at /sys/fs/cgroup/memory", ""},
		}},
		{"hybrid", func(p *machine) {
			p.proc("77/mountinfo", "1 2 0:3 / "+p.sysfs+" rw - cgroup2 cgroup2 rw\n4 2 0:5 / "+p.procfs+" rw - cgroup cgroup rw,memory\n")
		}, []Finding{{"cgroup", StatusOK, "hybrid: memory controller on v1 at ", ""}}},
		{"no cgroups mounted", func(p *machine) { p.proc("77/mountinfo", "") }, []Finding{
			{"cgroup", StatusWarn, "no cgroup mount has it", "tracing does not need it"},
		}},
		{"the memory controller is off", func(p *machine) {
			p.proc("cgroups", "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t0\t1\t0\n")
		}, []Finding{
			{"cgroup", StatusWarn, "the memory controller is off: events carry no cgroup", "cgroup_disable=memory"},
		}},
		{"/proc/cgroups without version 1", func(p *machine) { p.proc("cgroups", "#subsys_name\thierarchy\tnum_cgroups\tenabled\ncpu\t0\t1\t1\n") }, nil},
		{"no /proc/cgroups", func(p *machine) { p.without("cgroups") }, nil},
		{"a root that is there", func(p *machine) {
			dir := p.t.TempDir()
			p.mounts("cgroup2", dir)
			must(p.t, os.MkdirAll(dir+"/docker/kind-worker", 0o755))
			p.cfg.Node.CgroupRoot = "/docker/kind-worker"
		}, nil},
		{"a root that is not there", func(p *machine) { p.cfg.Node.CgroupRoot = "/docker/kind-wroker" }, []Finding{
			{"cgroup", StatusWarn, "there is no cgroup /docker/kind-wroker: no kill would be reported", "correct node.cgroup_root"},
		}},
		{"a root that cannot be seen", func(p *machine) {
			p.cfg.Node.CgroupRoot = "/docker/kind-worker"
			p.namespace("cgroup", "cgroup:[4026532900]")
		}, nil},
		{"a mount that cannot be written to", func(p *machine) { p.mounts("cgroup", readOnly(p.t)) }, []Finding{
			{"cgroup", StatusOK, "selftest cannot make a cgroup there: read-only file system", ""},
		}},
		{"bpffs", func(p *machine) {
			must(p.t, os.MkdirAll(p.sysfs+"/fs/bpf", 0o755))
			oomtest.Mount(p.t, "bpf", p.sysfs+"/fs/bpf", 0)
			p.cfg.Kernel.PinDir = p.sysfs + "/fs/bpf/oom"
		}, []Finding{{"bpffs", StatusOK, "the kernel will record in oom, also while no tracer runs", ""}}},
		{"bpffs with pins", func(p *machine) {
			must(p.t, os.MkdirAll(p.sysfs+"/fs/bpf", 0o755))
			oomtest.Mount(p.t, "bpf", p.sysfs+"/fs/bpf", 0)
			p.cfg.Kernel.PinDir = p.sysfs + "/fs/bpf/oom"
			must(p.t, os.Mkdir(p.cfg.Kernel.PinDir, 0o700))
		}, []Finding{{"bpffs", StatusOK, "also while no tracer runs; oom-tracer unload ends that", ""}}},
		{"no bpffs", func(p *machine) { p.cfg.Kernel.PinDir = p.sysfs + "/fs/bpf/oom" }, []Finding{
			{"bpffs", StatusWarn, "kills while no tracer runs are not recorded", "mount -t bpf -o mode=0700 bpf "},
		}},
		{"another user's pins", func(p *machine) {
			must(p.t, os.MkdirAll(p.sysfs+"/fs/bpf", 0o755))
			oomtest.Mount(p.t, "bpf", p.sysfs+"/fs/bpf", 0)
			p.cfg.Kernel.PinDir = p.sysfs + "/fs/bpf/oom"
			must(p.t, os.Mkdir(p.cfg.Kernel.PinDir, 0o700))
			must(p.t, os.Chown(p.cfg.Kernel.PinDir, 12345, 12345))
		}, []Finding{{"bpffs", StatusWarn, "belongs to user 12345", "mount -t bpf -o mode=0700 bpf "}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newMachine(t)
			tt.change(p)
			p.expect(tt.want...)
		})
	}
}

// readOnly is a directory that not even root can write to.
func readOnly(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	oomtest.Mount(t, "tmpfs", dir, unix.MS_RDONLY)
	return dir
}

// What loading comes to, and what is to be done about it. (Where nothing loads, nor do the hooks.)
func TestDoctorProgram(t *testing.T) {
	denied := func(err error) error { return fmt.Errorf("load the BPF object: %w", err) }
	none := func(remedy string) Finding { return Finding{"hooks", StatusWarn, "none", remedy} }
	for _, tt := range []struct {
		name   string
		change func(*machine)
		want   []Finding
	}{
		{"an earlier check says why", func(p *machine) {
			p.lacks(unix.CAP_BPF, unix.CAP_SYS_ADMIN)
			p.nothing(denied(unix.EPERM))
			p.said = []string{"libbpf: noise"}
		}, []Finding{
			{"capabilities", StatusFail, "lacks CAP_BPF", ""},
			none("see capabilities"),
			{"program", StatusFail, "use tier none: load the BPF object: operation not permitted", "see capabilities"},
		}},
		{"two earlier checks say why", func(p *machine) {
			p.lacks(unix.CAP_BPF, unix.CAP_SYS_ADMIN)
			p.sys("kernel/security/lockdown", "none integrity [confidentiality]\n")
			p.nothing(denied(unix.EPERM))
		}, []Finding{
			{"capabilities", StatusFail, "", ""},
			{"lockdown", StatusFail, "", ""},
			none("see capabilities, lockdown"),
			{"program", StatusFail, "", "see capabilities, lockdown"},
		}},
		{"nothing else says why", func(p *machine) { p.nothing(denied(unix.EPERM)) }, []Finding{
			none(""),
			{"program", StatusFail, "operation not permitted", "a security module (SELinux, AppArmor) may refuse it"},
		}},
		{"the memory of its maps, before 5.11", func(p *machine) {
			p.kernelTypes(victimTask, "BPF_FUNC_map_lookup_elem")
			p.lacks(unix.CAP_SYS_RESOURCE)
			p.nothing(denied(unix.EPERM))
		}, []Finding{
			{"memlock", StatusWarn, "counts the program's maps against it", ""},
			none("see program"),
			{"program", StatusFail, "operation not permitted", "see memlock"},
		}},
		{"nothing else but a seccomp filter", func(p *machine) { p.nothing(denied(unix.EPERM)); p.filtered() }, []Finding{
			none(""),
			{"program", StatusFail, "operation not permitted", "use a seccomp profile that permits bpf"},
		}},
		{"lockdown may be the reason", func(p *machine) {
			p.without("kernel/security/lockdown")
			p.nothing(denied(unix.EINVAL))
		}, []Finding{none(""), {"program", StatusFail, "load the BPF object: invalid argument", "kernel/security/lockdown is not [confidentiality]; otherwise report this kernel"}}},
		{"the verifier", func(p *machine) {
			p.nothing(denied(unix.EINVAL))
			p.said = []string{"libbpf: prog 'oom_mark_victim': -- BEGIN PROG LOAD LOG --\n0: R1=ctx()\n", "invalid mem access"}
		}, []Finding{none(""), {"program", StatusFail,
			"load the BPF object: invalid argument (libbpf: prog 'oom_mark_victim': -- BEGIN PROG LOAD LOG -- 0: R1=ctx(); invalid mem access)", "report this kernel, with this message"}}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newMachine(t)
			tt.change(p)
			findings := p.examine(t.Context())
			p.check(findings, tt.want)
			for _, f := range findings {
				if strings.Contains(f.Detail, "noise") || strings.Contains(f.Detail, "not a complaint") {
					t.Errorf("%s: %s", f.Check, f.Detail)
				}
			}
		})
	}
}

// The proof is made with what a run would take, and once for each tier.
func TestDoctorProgramOptions(t *testing.T) {
	for _, tt := range []struct {
		tier    string
		hooks   bool
		running bool
		want    []string
	}{
		{"auto", true, false, []string{"fentry poll"}},
		{"auto", false, false, []string{"fentry poll", "kprobe poll", "auto poll"}},
		{"kprobe", true, false, []string{"kprobe poll"}},
		{"stack", true, false, []string{"stack poll"}},
		{"none", true, false, []string{"none poll"}},
		{"stack", true, true, []string{"stack poll"}},
	} {
		p := newMachine(t)
		p.cfg.Kernel.Tier, p.cfg.Kernel.Notify = tt.tier, "poll"
		var want []Finding
		if !tt.hooks {
			p.noHooks()
			want = append(want, withoutHooks)
		}
		if tt.running {
			p.cfg.Metrics.Listen = fakeTracer(t, http.StatusOK, "ok")
			want = append(want, notReached)
		}
		p.expect(want...)
		var got []string
		for _, o := range p.loads {
			got = append(got, fmt.Sprint(o.Tier, " ", o.Notify))
		}
		if diff := cmp.Diff(tt.want, got); diff != "" {
			t.Errorf("%+v: %s", tt, diff)
		}
	}
}

// notReached is what is found where a tracer runs, but its server is not where this config says.
var notReached = Finding{"nats", StatusFail, "a tracer runs on this node, and its embedded server cannot be reached", "the same config as the tracer"}

// fakeTracer answers as a tracer does, with a readiness of the test's choice.
func fakeTracer(t *testing.T, code int, said string) (addr string) {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET /metrics", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "%s{tier=\"stack\"} 1\n", obs.TracerMetric)
	})
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if code == 0 {
			panic(http.ErrAbortHandler)
		}
		w.WriteHeader(code)
		io.WriteString(w, said)
	})
	s := httptest.NewServer(mux)
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://")
}

func TestDoctorTracer(t *testing.T) {
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	for _, tt := range []struct {
		name, addr string
		want       Finding
	}{
		{"none", "127.0.0.1:0", Finding{"tracer", StatusOK, "none runs with this config; its metrics can be served at 127.0.0.1:0", ""}},
		{"not known", "", Finding{"tracer", StatusOK, "not known whether one runs: metrics.listen is empty", ""}},
		{"somebody else's server", strings.TrimPrefix(other.URL, "http://"), Finding{"tracer", StatusFail, "address already in use", "set metrics.listen"}},
		{"an address of another machine", "192.0.2.1:9105", Finding{"tracer", StatusFail, "cannot assign requested address", "set metrics.listen"}},
		{"runs, ready", fakeTracer(t, http.StatusOK, "nats: ok\nreader: ok\n"), Finding{"tracer", StatusOK, "and is ready", ""}},
		{"runs, not ready", fakeTracer(t, http.StatusServiceUnavailable, "nats: not connected to nats\nreader: ok\n"),
			Finding{"tracer", StatusWarn, "is not ready: nats: not connected to nats; reader: ok", "see its log, nats and jetstream"}},
		{"runs, does not say", fakeTracer(t, 0, ""), Finding{"tracer", StatusWarn, "does not report whether it is ready: ", "see its log"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			p := newMachine(t)
			p.cfg.Metrics.Listen = tt.addr
			want := []Finding{tt.want}
			if strings.HasPrefix(tt.name, "runs") {
				want = append(want, notReached)
			}
			p.expect(want...)
		})
	}
}

// The embedded server, as it really is.
func TestDoctorEmbeddedNATS(t *testing.T) {
	quiet := slog.New(slog.DiscardHandler)
	run := func(t *testing.T, cfg config.NATS) *embedded.Server {
		t.Helper()
		s, err := embedded.Start(cfg.Embedded, quiet)
		must(t, err)
		t.Cleanup(func() { must(t, s.Shutdown(context.Background())) })
		return s
	}
	t.Run("runs", func(t *testing.T) {
		p := newMachine(t)
		run(t, p.cfg.NATS)
		p.expect(
			Finding{"nats", StatusOK, "the embedded server at 127.0.0.1:0 is reachable", ""},
			Finding{"jetstream", StatusWarn, "enabled, but check stream OOM", "restart the tracer"},
		)
		conn, err := bus.Connect(t.Context(), p.cfg.NATS, bus.Options{Name: "test"}, quiet)
		must(t, err)
		defer conn.Close()
		must(t, bus.EnsureStreams(t.Context(), conn, p.cfg.NATS.Stream))
		p.expect(Finding{"jetstream", StatusOK, "enabled; the stream is there", ""})
	})
	t.Run("ran", func(t *testing.T) {
		p := newMachine(t)
		must(t, run(t, p.cfg.NATS).Shutdown(t.Context()))
		p.expect(Finding{"nats", StatusOK, "does not run; it can listen at 127.0.0.1:0", ""})
	})
	t.Run("runs with another directory", func(t *testing.T) {
		p, other := newMachine(t), newMachine(t)
		s := run(t, other.cfg.NATS)
		p.cfg.NATS.Embedded.Listen = strings.TrimPrefix(s.ClientURL(), "nats://")
		never := Finding{"nats", StatusFail, "does not run, and could not start: listen tcp " + p.cfg.NATS.Embedded.Listen + ": bind: address already in use", "set nats.embedded.listen"}
		p.expect(never)
		// Now with a password, which that server does not take.
		must(t, run(t, p.withListen("127.0.0.1:0")).Shutdown(t.Context()))
		never.Detail = "bind: address already in use; the server at that address: connect to nats at"
		p.expect(never)
	})
	for name, tt := range map[string]struct {
		text string
		mode os.FileMode
		want string
	}{
		"open to others": {strings.Repeat("x", 43) + "\n", 0o644, "has mode 0644 and must have 0600"},
		"empty":          {"", 0o600, "is empty"},
		"somebody's own": {"secret", 0o600, "does not hold a generated password"},
	} {
		t.Run("password "+name, func(t *testing.T) {
			p := newMachine(t)
			file := bus.PasswordFile(p.cfg.NATS.Embedded.Dir)
			write(t, file, tt.text)
			must(t, os.Chmod(file, tt.mode))
			p.expect(Finding{"nats", StatusFail, "embedded server: read password of the embedded nats-server: " + file + " " + tt.want, "follow that message"})
			if output := strings.Join(flat(p.examine(t.Context())), "\n"); strings.Contains(output, "secret") || strings.Contains(output, "xxxx") {
				t.Errorf("the password is told:\n%s", output)
			}
		})
	}
	t.Run("its JetStream has switched itself off", func(t *testing.T) {
		f := newMachine(t).jetstream(false, errors.New("check jetstream: not enabled"))
		if f.Status != StatusWarn || f.Detail != "check jetstream: not enabled" || !strings.Contains(f.Remedy, "its disk works") {
			t.Errorf("%+v", f)
		}
	})
	t.Run("a listening address that is not there", func(t *testing.T) {
		p := newMachine(t)
		p.cfg.NATS.Embedded.Listen = "192.0.2.1:4222"
		p.expect(Finding{"nats", StatusFail, "cannot assign requested address", "set nats.embedded.listen"})
	})
}

func (p *machine) withListen(addr string) config.NATS {
	cfg := p.cfg.NATS
	cfg.Embedded.Listen = addr
	return cfg
}

func flat(findings []Finding) []string {
	var lines []string
	for _, f := range findings {
		lines = append(lines, f.Detail, f.Remedy)
	}
	return lines
}

// Where the embedded server's stream would lie.
func TestDoctorStore(t *testing.T) {
	t.Run("not to be written to", func(t *testing.T) {
		p := newMachine(t)
		dir := readOnly(t)
		p.cfg.NATS.Embedded.Dir = dir + "/a/b"
		p.expect(Finding{"jetstream", StatusFail, "embedded server: write to " + dir + ": read-only file system", "set nats.embedded.dir"})
	})
	t.Run("a file is in the way", func(t *testing.T) {
		p := newMachine(t)
		file := filepath.Join(t.TempDir(), "file")
		write(t, file, "")
		p.cfg.NATS.Embedded.Dir = file
		p.expect(
			Finding{"nats", StatusFail, "not a directory", ""},
			Finding{"jetstream", StatusFail, "write to " + file + ": not a directory", "set nats.embedded.dir"})
	})
	t.Run("somebody else's", func(t *testing.T) {
		p := newMachine(t)
		must(t, os.Mkdir(p.cfg.NATS.Embedded.Dir, 0o777))
		must(t, os.Chown(p.cfg.NATS.Embedded.Dir, 12345, 12345))
		p.expect(Finding{"nats", StatusFail, "belongs to user 12345", "follow that message"},
			Finding{"jetstream", StatusFail, "belongs to user 12345", "set nats.embedded.dir"})
	})
	t.Run("too little room", func(t *testing.T) {
		p := newMachine(t)
		p.cfg.NATS.Stream.MaxBytes = 1 << 60
		p.expect(Finding{"jetstream", StatusWarn, "the stream may take 1099511627776 MiB: JetStream stops when the disk is full", "nats.stream.max_bytes"})
	})
	t.Run("what it holds already is not wanted again", func(t *testing.T) {
		p := newMachine(t)
		dir := t.TempDir()
		oomtest.Mount(t, "tmpfs", dir, 0)
		must(t, unix.Mount("", dir, "tmpfs", unix.MS_REMOUNT, "size=2M"))
		p.cfg.NATS.Embedded.Dir = dir
		must(t, os.Chmod(dir, 0o700))
		p.cfg.NATS.Stream.MaxBytes = 2 << 20
		p.expect()
		write(t, dir+"/jetstream/block", strings.Repeat("x", 1536<<10))
		p.expect() // of the store's own
		p.cfg.NATS.Stream.MaxBytes = 3 << 20
		p.expect(Finding{"jetstream", StatusWarn, dir + " has 2 MiB free, and the stream may take 3 MiB", "free some"})
	})
}

// natsServerOf runs a server in this process.
func natsServerOf(t *testing.T, o server.Options) (url string) {
	t.Helper()
	o.Host, o.Port, o.NoSigs, o.NoLog, o.StoreDir = "127.0.0.1", server.RANDOM_PORT, true, true, t.TempDir()
	s, err := server.NewServer(&o)
	must(t, err)
	s.Start()
	t.Cleanup(func() {
		s.Shutdown()
		s.WaitForShutdown()
	})
	if !s.ReadyForConnections(20 * time.Second) {
		t.Fatal("the NATS server does not come up")
	}
	return s.ClientURL()
}

// A server of somebody else's, as a cluster has it.
func TestDoctorExternalNATS(t *testing.T) {
	unknown := Finding{"jetstream", StatusWarn, "not known without a connection", "see nats"}
	t.Run("with JetStream", func(t *testing.T) {
		p := newMachine(t)
		p.cfg.NATS.URL = natsServerOf(t, server.Options{JetStream: true})
		p.expect(
			Finding{"nats", StatusOK, p.cfg.NATS.URL + " is reachable", ""},
			Finding{"jetstream", StatusWarn, "enabled, but check stream OOM", "oom-tap setup"},
		)
		conn, err := bus.Connect(t.Context(), p.cfg.NATS, bus.Options{Name: "test"}, slog.New(slog.DiscardHandler))
		must(t, err)
		defer conn.Close()
		must(t, bus.EnsureStreams(t.Context(), conn, p.cfg.NATS.Stream))
		p.expect(Finding{"jetstream", StatusOK, "enabled; the stream is there", ""})
	})
	t.Run("without JetStream", func(t *testing.T) {
		p := newMachine(t)
		p.cfg.NATS.URL = natsServerOf(t, server.Options{})
		p.expect(Finding{"jetstream", StatusWarn, "check jetstream at", "enable JetStream on the server"})
	})
	t.Run("not reachable", func(t *testing.T) {
		p := newMachine(t)
		p.cfg.NATS.URL = "nats://" + oomtest.FreeAddr(t)
		p.expect(Finding{"nats", StatusWarn, "nobody listens there", "until then kills wait in the journal"}, unknown)
	})
	t.Run("a password that is wrong", func(t *testing.T) {
		p := newMachine(t)
		p.cfg.NATS.URL = natsServerOf(t, server.Options{Username: "tracer", Password: "right"})
		p.cfg.NATS.User, p.cfg.NATS.PasswordFile = "tracer", filepath.Join(t.TempDir(), "password")
		write(t, p.cfg.NATS.PasswordFile, "wrong")
		p.expect(Finding{"nats", StatusWarn, "Authorization Violation", "correct nats.* in the config"}, unknown)
	})
	// With these a tracer does not start at all.
	t.Run("a password file that is not there", func(t *testing.T) {
		p := newMachine(t)
		p.cfg.NATS.URL = "nats://" + oomtest.FreeAddr(t)
		p.cfg.NATS.User, p.cfg.NATS.PasswordFile = "tracer", "/nowhere/password"
		p.expect(Finding{"nats", StatusFail, "/nowhere/password: no such file", "the tracer does not start"}, unknown)
	})
	// A tracer's own user on a shared cluster may publish its own events and receive replies to its own
	// inbox, no more.
	as := func(t *testing.T, publish ...string) *machine {
		p := newMachine(t)
		p.cfg.NATS.URL = natsServerOf(t, server.Options{JetStream: true, Users: []*server.User{{
			Username: "tracer", Password: "right",
			Permissions: &server.Permissions{
				Publish:   &server.SubjectPermission{Allow: publish},
				Subscribe: &server.SubjectPermission{Allow: []string{bus.InboxPrefix(bus.TracerName("node-1")) + ".>"}},
			},
		}}})
		p.cfg.NATS.User, p.cfg.NATS.PasswordFile = "tracer", filepath.Join(t.TempDir(), "password")
		write(t, p.cfg.NATS.PasswordFile, "right")
		return p
	}
	t.Run("a user who may not ask", func(t *testing.T) {
		as(t, "oom.v1.*.*.node-1").expect(Finding{"jetstream", StatusOK, "not known: this user may not ask", ""})
	})
	t.Run("a user who may ask too", func(t *testing.T) {
		as(t, "oom.v1.*.*.node-1", "$JS.API.INFO", "$JS.API.STREAM.INFO.OOM").expect(Finding{"jetstream", StatusWarn, "enabled, but check stream OOM", "oom-tap setup"})
	})
}

// What is printed, as text and as JSON, and the error that makes the exit status.
func TestDoctorOutput(t *testing.T) {
	findings := []Finding{
		{"kernel", StatusOK, "6.12 <&> x", ""},
		{"capabilities", StatusFail, "lacks CAP_BPF", "run it as root"},
		{"kallsyms", StatusWarn, "hides\n\x1b[31maddresses", "give CAP_SYSLOG"},
		{"nats", StatusFail, "in use", "free it"},
	}
	for _, output := range []string{"text", "json"} {
		var out bytes.Buffer
		err := printFindings(findings, "node-1", "here", output, &out)
		if err == nil || err.Error() != "tracing cannot work here: see capabilities, nats" {
			t.Errorf("%s: %v", output, err)
		}
		oomtest.Golden(t, "doctor-"+output+".golden", versions.ReplaceAllString(out.String(), `"version": "…"`), *update)
		out.Reset()
		if err := printFindings(findings[2:3], "node-1", "here", output, &out); err != nil {
			t.Errorf("%s, with a warning only: %v", output, err)
		}
		if err := printFindings(findings[:1], "node-1", "here", output, brokenPipe{}); !errors.Is(err, io.ErrClosedPipe) {
			t.Errorf("%s, into a closed pipe: %v", output, err)
		}
	}
}

var versions = regexp.MustCompile(`"version": "[^"]*"`)

type brokenPipe struct{}

func (brokenPipe) Write([]byte) (int, error) { return 0, io.ErrClosedPipe }

// This machine, as it is: all must be well here, or no other test of kills could pass.
func TestDoctorHere(t *testing.T) {
	cfg := testConfig(t)
	cfg.NATS.Stream.MaxBytes = 1 << 20
	var out bytes.Buffer
	if err := Run(t.Context(), cfg, testNode, "json", &out); err != nil {
		t.Errorf("%v\n%s", err, &out)
	}
	var got Report
	decoder := json.NewDecoder(&out)
	decoder.DisallowUnknownFields()
	must(t, decoder.Decode(&got))
	if got.Schema != "oom-tracer-doctor/v1" || got.Version == "" || got.Node != testNode || !got.CanTrace {
		t.Errorf("%+v", got)
	}
	var names []string
	for _, f := range got.Findings {
		names = append(names, f.Check)
		if f.Status == StatusFail {
			t.Errorf("%+v", f)
		}
	}
	if diff := cmp.Diff(checks, names); diff != "" {
		t.Error(diff)
	}
}

// confinedDoctor runs the real program with less than root has, behind a shell command.
func confinedDoctor(t *testing.T, cfg config.Config, shell string, c oomtest.Confinement) (Report, *exec.Cmd, string) {
	t.Helper()
	command := exec.Command("sh", "-c", shell+`exec "$0" "$@"`, oomtest.Program(t, "oom-tracer"),
		"doctor", "--config", oomtest.WriteConfig(t, cfg), "--node-name", testNode, "--output", "json")
	var out, said bytes.Buffer
	command.Stdout, command.Stderr = &out, &said
	c.Start(t, command)
	_ = command.Wait()
	var got Report
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("%v\n%s\n%s", err, &out, &said)
	}
	return got, command, said.String()
}

func readSysctl(t *testing.T, name string) int {
	t.Helper()
	data, err := os.ReadFile("/proc/sys/kernel/" + name)
	must(t, err)
	n, err := strconv.Atoi(strings.TrimSpace(string(data)))
	must(t, err)
	return n
}

// The real program on this kernel, with less than root has.
func TestDoctorReducedCapabilities(t *testing.T) {
	oomtest.Slow(t)
	paranoid := readSysctl(t, "perf_event_paranoid")
	unprivileged := readSysctl(t, "unprivileged_bpf_disabled")
	shown := readSysctl(t, "kptr_restrict") == 0 && paranoid <= 1
	// What root gets here: hooks, or the stack.
	best, hooks := loader.TierStack, Finding{"hooks", StatusWarn, "none; the owner of a limit is inferred", "CONFIG_KPROBE_EVENTS=y"}
	for _, tier := range []loader.Tier{loader.TierKprobe, loader.TierFentry} {
		if _, err := tryLoad(loader.Options{Tier: tier, JournalSize: 128 << 10, Log: slog.New(slog.DiscardHandler)}); err == nil {
			best, hooks = tier, Finding{"hooks", StatusOK, string(tier) + " works", ""}
		}
	}
	t.Logf("the best tier is %s; kallsyms shows addresses to everybody: %t", best, shown)
	works := Finding{"program", StatusOK, "loads and attaches; tier " + string(best), ""}
	refused := func(cause, why string) []Finding {
		return []Finding{{"hooks", StatusWarn, "none", "see " + cause}, {"program", StatusFail, why, "see " + cause}}
	}
	withoutSyslog := []Finding{hooks, works, {"capabilities", StatusOK, "no need of CAP_SYSLOG", ""}}
	demanded := []Finding{{"program", StatusOK, "tier stack", ""}, {"capabilities", StatusOK, "no need of CAP_SYSLOG", ""}}
	if !shown {
		const hidden = "hides the kernel's addresses from this process (kernel.kptr_restrict is "
		lacks := Finding{"capabilities", StatusWarn, "has CAP_BPF, CAP_PERFMON; lacks CAP_SYSLOG", "SYSLOG"}
		blind := func(s Status) []Finding {
			return []Finding{lacks, {"kallsyms", s, hidden, "CAP_SYSLOG"}, {"stack", s, "not available", "see kallsyms"}}
		}
		demanded = append(blind(StatusFail), Finding{"program", StatusFail, "kallsyms hides its addresses", "see kallsyms, stack"})
		if best == loader.TierStack {
			withoutSyslog = append(blind(StatusWarn), hooks, Finding{"program", StatusOK, "loads and attaches; tier none", ""})
		}
	}
	// Some machines give it to nobody.
	resource, err := unix.PrctlRetInt(unix.PR_CAPBSET_READ, unix.CAP_SYS_RESOURCE, 0, 0, 0)
	must(t, err)
	perf, ring := testConfig(t), testConfig(t)
	perf.Kernel.Notify, ring.Kernel.Notify = "perf", "ringbuf"
	// Where the kernel demands CAP_SYS_ADMIN for perf events, as Debian's do, that must be said.
	byDefault := Finding{"notify", StatusOK, "a perf buffer", ""}
	if paranoid > 2 {
		byDefault = Finding{"notify", StatusWarn, "kernel.perf_event_paranoid is ", "sysctl"}
	}
	const needless = "perf events are not needed"
	bySeccomp := func(call string) string { return "the seccomp filter of this process refuses " + call }
	stack := testConfig(t)
	stack.Kernel.Tier = "stack"
	for _, tt := range []struct {
		name  string
		cfg   config.Config
		shell string
		less  oomtest.Confinement
		want  []Finding
	}{
		{"all", testConfig(t), "", oomtest.Confinement{}, []Finding{hooks, works}},
		{"no CAP_SYS_ADMIN", testConfig(t), "", oomtest.Confinement{Drop: []uintptr{unix.CAP_SYS_ADMIN}}, []Finding{
			{"capabilities", StatusOK, "has CAP_BPF, CAP_PERFMON, CAP_SYSLOG", ""}, hooks, works,
		}},
		{"CAP_SYS_ADMIN alone", testConfig(t), "", oomtest.Confinement{Drop: []uintptr{unix.CAP_BPF, unix.CAP_PERFMON}}, []Finding{
			{"capabilities", StatusOK, "has CAP_SYS_ADMIN for CAP_BPF, CAP_SYS_ADMIN for CAP_PERFMON", ""}, hooks, works,
		}},
		{"no CAP_BPF", testConfig(t), "", oomtest.Confinement{Drop: []uintptr{unix.CAP_BPF, unix.CAP_SYS_ADMIN}},
			append(refused("capabilities", "operation not permitted"), Finding{"capabilities", StatusFail, "lacks CAP_BPF to load the program", "BPF"})},
		{"no CAP_PERFMON", testConfig(t), "", oomtest.Confinement{Drop: []uintptr{unix.CAP_PERFMON, unix.CAP_SYS_ADMIN}},
			append(refused("capabilities", "operation not permitted"), Finding{"capabilities", StatusFail, "lacks CAP_PERFMON to attach it", "PERFMON"})},
		{"no CAP_SYSLOG", testConfig(t), "", oomtest.Confinement{Drop: []uintptr{unix.CAP_SYSLOG}}, withoutSyslog},
		{"no CAP_SYSLOG, and tier stack demanded", stack, "", oomtest.Confinement{Drop: []uintptr{unix.CAP_SYSLOG}}, demanded},
		{"little to be locked, and no CAP_IPC_LOCK", testConfig(t), "ulimit -l 64 && ", oomtest.Confinement{Drop: []uintptr{unix.CAP_IPC_LOCK}}, []Finding{{"memlock", StatusOK, "limit 64 KiB", ""}, hooks, works}},
		{"as in the chart", testConfig(t), "", oomtest.Confinement{Drop: oomtest.AsInChart()}, []Finding{byDefault, hooks, works}},
		{"no perf events by seccomp", testConfig(t), "", oomtest.Confinement{Drop: oomtest.AsInChart(), Refuse: []uint32{unix.SYS_PERF_EVENT_OPEN}},
			[]Finding{{"notify", StatusWarn, "notifications use a ring buffer, all kills are reported; no perf events: " + bySeccomp("perf_event_open"), needless}, hooks, works}},
		{"no perf events by seccomp, but demanded", perf, "", oomtest.Confinement{Drop: oomtest.AsInChart(), Refuse: []uint32{unix.SYS_PERF_EVENT_OPEN}},
			append(refused("notify", "perf_event_open: operation not permitted"), Finding{"notify", StatusFail, bySeccomp("perf_event_open"), "set kernel.notify to auto"})},
		{"no perf events by seccomp, and not wanted", ring, "", oomtest.Confinement{Refuse: []uint32{unix.SYS_PERF_EVENT_OPEN}},
			[]Finding{{"notify", StatusOK, "notifications use a ring buffer", ""}, hooks, works}},
		{"no bpf by seccomp", testConfig(t), "", oomtest.Confinement{Drop: oomtest.AsInChart(), Refuse: []uint32{unix.SYS_BPF}},
			append(refused("bpf", "the bpf system call is refused"), Finding{"bpf", StatusFail, bySeccomp("bpf"), "RuntimeDefault"}, Finding{"notify", StatusWarn, "", "see bpf"})},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tt.cfg.NATS.Stream.MaxBytes = 1 << 20
			got, command, said := confinedDoctor(t, tt.cfg, tt.shell, tt.less)
			want := tt.want
			if paranoid > 2 && slices.Contains(tt.less.Drop, unix.CAP_SYS_ADMIN) {
				want = append(want, byDefault) // the first of a check counts
			}
			if slices.Contains(tt.less.Drop, unix.CAP_BPF) && slices.Contains(tt.less.Drop, unix.CAP_SYS_ADMIN) && unprivileged != 0 {
				want = append(want, Finding{"bpf", StatusFail, "this process lacks CAP_BPF", "see capabilities"}, Finding{"notify", StatusWarn, "", "see bpf"})
			}
			if slices.Contains(tt.less.Drop, unix.CAP_PERFMON) && slices.Contains(tt.less.Drop, unix.CAP_SYS_ADMIN) && paranoid > 0 {
				want = append(want, Finding{"notify", StatusWarn, "this process lacks CAP_PERFMON", "see capabilities"})
			}
			if resource == 0 {
				want = append(want, Finding{"protection", StatusWarn, "lacks CAP_SYS_RESOURCE", "SYS_RESOURCE"})
			}
			p := &machine{t: t}
			p.check(got.Findings, want)
			failed := failures(got.Findings)
			code := command.ProcessState.ExitCode()
			if len(failed) == 0 && (code != 0 || said != "" || !got.CanTrace) {
				t.Errorf("exit status %d, can_trace %t, %q", code, got.CanTrace, said)
			}
			if len(failed) > 0 && (code != 1 || got.CanTrace || !strings.HasSuffix(said, "oom-tracer: tracing cannot work here: see "+strings.Join(failed, ", ")+"\n")) {
				t.Errorf("exit status %d, can_trace %t, %q", code, got.CanTrace, said)
			}
		})
	}
}

// A password file that only root can read: another user is told to be root, not to free the address.
func TestDoctorOtherUser(t *testing.T) {
	// With the rights on files of a user who has none; the files of /proc and /sys are open to all.
	cfg := testConfig(t)
	s, err := embedded.Start(cfg.NATS.Embedded, slog.New(slog.DiscardHandler))
	must(t, err)
	defer func() { must(t, s.Shutdown(context.Background())) }()
	cfg.NATS.Embedded.Listen = strings.TrimPrefix(s.ClientURL(), "nats://")
	x := checker{cfg: cfg, node: testNode, procfs: "/proc", sysfs: "/sys"}
	var findings []Finding
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // not unlocked: the thread ends with the goroutine
		err := unix.Setfsuid(65534)
		if err == nil {
			findings = x.nats(t.Context())
		}
		done <- err
	}()
	must(t, <-done)
	if f := findings[0]; f.Status != StatusFail || !strings.Contains(f.Detail, "permission denied") || !strings.Contains(f.Remedy, "run this as the user that the tracer runs as") {
		t.Errorf("%+v", f)
	}
	if f := findings[1]; f.Status != StatusFail || !strings.Contains(f.Detail, "permission denied") {
		t.Errorf("%+v", f)
	}
}

// The cgroup check and the selftest look for the same thing.
func TestDoctorCgroupHere(t *testing.T) {
	h, err := cgroupfs.Find("/proc")
	must(t, err)
	x := checker{cfg: config.Default(), procfs: "/proc", sysfs: "/sys"}
	if f := x.cgroup(); f.Status != StatusOK || !strings.Contains(f.Detail, h.Mount) {
		t.Errorf("%+v", f)
	}
}
