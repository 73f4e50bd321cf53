//go:build vm

package agent

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/doctor"
	"github.com/oom-tracer/oom-tracer/go/internal/loader"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// confinedCase is a tracer with less than root has, and what must come of it.
type confinedCase struct {
	name     string
	paranoid int    // kernel.perf_event_paranoid; 3 is Debian's default
	kernel   string // the tier, and other keys of the config
	less     oomtest.Confinement

	// Either it runs with this tier and way to notify, and a kill comes back, or it ends with this error.
	tier   loader.Tier
	notify loader.Notify
	fails  string
	logs   string
	doctor []doctor.Finding // among what doctor finds
}

func finding(check string, status doctor.Status, detail, remedy string) doctor.Finding {
	return doctor.Finding{Check: check, Status: status, Detail: detail, Remedy: remedy}
}

func confinedCases(t *testing.T) []confinedCase {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	var link *btf.Struct
	multi := kernel.TypeByName("bpf_kprobe_multi_link", &link) == nil
	counts := doctor.CountsBPF(kernel)

	chart := oomtest.Confinement{Drop: oomtest.AsInChart()}
	without := func(bits ...uintptr) oomtest.Confinement {
		return oomtest.Confinement{Drop: oomtest.AsInChart(bits...)}
	}
	cases := []confinedCase{
		{name: "paranoid-3", paranoid: 3, kernel: "auto", less: chart, tier: loader.TierFentry, notify: loader.NotifyRingbuf, logs: "permission denied", doctor: []doctor.Finding{
			finding("notify", doctor.StatusWarn, "notifications use a ring buffer, all kills are reported; no perf events: kernel.perf_event_paranoid is 3", "sysctl"),
			finding("hooks", doctor.StatusOK, "fentry works", ""),
		}},
		{name: "paranoid-2", paranoid: 2, kernel: "auto", less: chart, tier: loader.TierFentry, notify: loader.NotifyPerf, doctor: []doctor.Finding{
			finding("notify", doctor.StatusOK, "notifications use a perf buffer", ""),
		}},
		{name: "polled", paranoid: 2, kernel: "auto, notify: poll", less: chart, tier: loader.TierFentry, notify: loader.NotifyPoll},
		{name: "perf-demanded", paranoid: 3, kernel: "auto, notify: perf", less: chart, fails: "notify by perf: perf_event_open: permission denied", doctor: []doctor.Finding{
			finding("notify", doctor.StatusFail, "kernel.perf_event_paranoid is 3", "kernel.notify to auto"),
		}},
		{name: "kprobe-paranoid-3", paranoid: 3, kernel: "kprobe", less: chart, tier: loader.TierKprobe, notify: loader.NotifyRingbuf, doctor: []doctor.Finding{
			finding("hooks", doctor.StatusOK, "kprobe works", ""),
		}},
		{name: "stack-paranoid-3", paranoid: 3, kernel: "stack", less: chart, tier: loader.TierStack, notify: loader.NotifyRingbuf},
		{name: "no-CAP_BPF", paranoid: 2, kernel: "auto", less: without(unix.CAP_BPF), fails: "operation not permitted", doctor: []doctor.Finding{
			finding("capabilities", doctor.StatusFail, "lacks CAP_BPF to load the program", "BPF"),
			finding("bpf", doctor.StatusFail, "this process lacks CAP_BPF", "see capabilities"),
		}},
		{name: "no-CAP_PERFMON", paranoid: 2, kernel: "auto", less: without(unix.CAP_PERFMON), fails: "operation not permitted", doctor: []doctor.Finding{
			finding("capabilities", doctor.StatusFail, "lacks CAP_PERFMON to attach it", "PERFMON"),
			finding("notify", doctor.StatusWarn, "this process lacks CAP_PERFMON", "see capabilities"),
		}},
		{name: "no-CAP_SYSLOG", paranoid: 3, kernel: "auto", less: without(unix.CAP_SYSLOG), tier: loader.TierFentry, notify: loader.NotifyRingbuf, doctor: []doctor.Finding{
			finding("capabilities", doctor.StatusOK, "no need of CAP_SYSLOG", ""),
		}},
		{name: "no-CAP_SYSLOG-stack", paranoid: 3, kernel: "stack", less: without(unix.CAP_SYSLOG), fails: "kallsyms hides its addresses", doctor: []doctor.Finding{
			finding("capabilities", doctor.StatusWarn, "lacks CAP_SYSLOG", "SYSLOG"),
			finding("kallsyms", doctor.StatusFail, "hides the kernel's addresses", "CAP_SYSLOG"),
		}},
		{name: "no-CAP_SYS_RESOURCE", paranoid: 3, kernel: "auto", less: without(unix.CAP_SYS_RESOURCE), tier: loader.TierFentry, notify: loader.NotifyRingbuf, doctor: []doctor.Finding{finding("protection", doctor.StatusWarn, "lacks CAP_SYS_RESOURCE", "SYS_RESOURCE")}},
		{name: "seccomp-perf", paranoid: 2, kernel: "auto", less: oomtest.Confinement{Drop: oomtest.AsInChart(), Refuse: []uint32{unix.SYS_PERF_EVENT_OPEN}},
			tier: loader.TierFentry, notify: loader.NotifyRingbuf, logs: "operation not permitted", doctor: []doctor.Finding{
				finding("notify", doctor.StatusWarn, "notifications use a ring buffer, all kills are reported; no perf events: the seccomp filter of this process refuses perf_event_open", "RuntimeDefault of containerd 1.7"),
				finding("hooks", doctor.StatusOK, "fentry works", ""),
			}},
		{name: "seccomp-bpf", paranoid: 2, kernel: "auto", less: oomtest.Confinement{Drop: oomtest.AsInChart(), Refuse: []uint32{unix.SYS_BPF}}, fails: "the bpf system call is refused", doctor: []doctor.Finding{
			finding("bpf", doctor.StatusFail, "the seccomp filter of this process refuses bpf", "RuntimeDefault of containerd 1.7"),
			finding("hooks", doctor.StatusWarn, "none", "see bpf"),
			finding("program", doctor.StatusFail, "the bpf system call is refused", "see bpf"),
		}},
	}
	for i := range cases {
		switch c := &cases[i]; {
		case c.name == "kprobe-paranoid-3" && !multi:
			c.tier, c.notify, c.fails = "", "", "perf_event_open: permission denied; and it has no kprobe.multi links"
			c.doctor = []doctor.Finding{finding("hooks", doctor.StatusFail, "no kprobe.multi links", "permit perf events, which kprobes need on this kernel: sysctl")}
		case c.name == "no-CAP_SYS_RESOURCE" && counts:
			c.tier, c.notify, c.fails = "", "", "operation not permitted"
			c.doctor = append(c.doctor, finding("memlock", doctor.StatusWarn, "before 5.11, counts the program's maps against it", "CAP_SYS_RESOURCE"), finding("program", doctor.StatusFail, "operation not permitted", "see memlock"))
		}
	}
	return cases
}

// TestVMConfined: what a pod may be denied, taken away in turn: the tracer works, with what is left, or says what it
// lacks; and doctor says the same, and blames the right one.
func TestVMConfined(t *testing.T) {
	for _, tt := range confinedCases(t) {
		ok := t.Run(tt.name, func(t *testing.T) { tt.run(t) })
		result := "FAIL"
		if ok {
			result = "ok"
		}
		tier := tt.tier
		if tier == "" {
			tier = "-"
		}
		row(tier, "confined:"+tt.name, result, string(tt.notify)+tt.fails)
	}
}

func (tt *confinedCase) run(t *testing.T) {
	const file = "/proc/sys/kernel/perf_event_paranoid"
	before, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, fmt.Append(nil, tt.paranoid), 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.WriteFile(file, before, 0); err != nil {
			t.Error(err)
		}
	})
	config := vmConfig(t, tt.kernel)
	// This test is at -1000, and its children inherit that.
	program := func(args ...string) *exec.Cmd {
		return exec.Command("/bin/sh", append([]string{"-c", `echo 0 >/proc/self/oom_score_adj; exec "$0" "$@"`, oomtest.Program(t, "oom-tracer")}, args...)...)
	}
	p := &process{Cmd: program("--config", config, "--node-name", "vm")}
	p.Stderr = &p.log
	tt.less.Start(t, p.Cmd)
	t.Cleanup(p.kill)
	if tt.fails != "" {
		err := p.Wait()
		last := strings.TrimSpace(p.log.String())
		last = last[strings.LastIndex(last, "\n")+1:]
		if err == nil || !strings.Contains(last, tt.fails) {
			t.Errorf("it ended with %v, and said %q; want %q", err, last, tt.fails)
		}
	} else {
		until(t, "the tracer runs", func() bool { return p.ProcessState != nil || obs.TracerRuns(t.Context(), "127.0.0.1:9105") })
		hog := hogProcess(t, oomtest.New(t, 16*mib), 0, "0", "64")
		e := eventOf(t, config, hog.Process.Pid)
		if e.Node.Tier != string(tt.tier) || e.Scope != event.ScopeCgroup || e.Outcome != event.OutcomeKilled {
			t.Errorf("tier %s, scope %s, outcome %s", e.Node.Tier, e.Scope, e.Outcome)
		}
		said := regexp.MustCompile(`msg="tracing oom kills".* tier=(\w+) notify=(\w+)`).FindStringSubmatch(p.log.String())
		if said == nil || said[1] != string(tt.tier) || said[2] != string(tt.notify) {
			t.Errorf("it says %q, want %s, %s", said, tt.tier, tt.notify)
		}
		p.stop(t)
	}
	if !strings.Contains(p.log.String(), tt.logs) {
		t.Errorf("the log does not have %q", tt.logs)
	}
	if t.Failed() {
		t.Log(p.log.String())
	}
	if tt.doctor == nil {
		return
	}
	examine := program("doctor", "--config", config, "--node-name", "vm", "--output", "json")
	var out, said bytes.Buffer
	examine.Stdout, examine.Stderr = &out, &said
	tt.less.Start(t, examine)
	_ = examine.Wait()
	var got doctor.Report
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("%v\n%s\n%s", err, &out, &said)
	}
	if got.CanTrace != (tt.fails == "") {
		t.Errorf("doctor says that tracing works: %t", got.CanTrace)
	}
	for _, want := range tt.doctor {
		f := got.Findings[slices.IndexFunc(got.Findings, func(f doctor.Finding) bool { return f.Check == want.Check })]
		if f.Status != want.Status || !strings.Contains(f.Detail, want.Detail) || !strings.Contains(f.Remedy, want.Remedy) {
			t.Errorf("doctor:\n got %+v\nwant %+v", f, want)
		}
	}
}
