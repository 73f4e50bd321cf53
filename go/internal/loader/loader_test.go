package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
	"github.com/oom-tracer/oom-tracer/go/internal/wire"
)

const mib = 1 << 20

func TestMain(m *testing.M) { os.Exit(oomtest.Alone{M: m}.Run()) }

func open(t *testing.T, tier Tier) *Loader { return openNotified(t, tier, NotifyAuto) }

func openNotified(t *testing.T, tier Tier, notify Notify) *Loader {
	t.Helper()
	l, err := Open(t.Context(), Options{Tier: tier, Notify: notify, JournalSize: 2 << 20, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

// collect runs l until stop is called, and returns what it read.
func collect(t *testing.T, l *Loader) (stop func() []*wire.Record) {
	t.Helper()
	ctx, cancel := context.WithCancel(t.Context())
	var records []*wire.Record
	done := make(chan error, 1)
	go func() {
		done <- l.Run(ctx, Handler{
			Record: func(seq uint64, sample []byte) bool {
				r, err := wire.Decode(sample)
				if err != nil || r.Seq != seq {
					t.Errorf("seq %d: %+v, %v", seq, r, err)
					return true
				}
				records = append(records, r)
				return true
			},
			Lost: func(first, last uint64, _ bool) bool {
				t.Errorf("%d to %d are lost", first, last)
				return true
			},
		})
	}()
	stop = sync.OnceValue(func() []*wire.Record {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		return records
	})
	t.Cleanup(func() { stop() })
	return stop
}

// of picks the records whose victims were in the cgroup. A loader sees every kill of the machine, and
// others may cause some meanwhile.
func of(group *cgroupfs.Cgroup, records []*wire.Record) (ours []*wire.Record) {
	for _, r := range records {
		if c := toEvent(r).Victim.Cgroup; c == nil || c.ID == group.ID {
			ours = append(ours, r)
		}
	}
	return ours
}

func toEvent(r *wire.Record) event.Event {
	c := wire.Converter{
		Node: event.Node{Name: "test", BootID: "boot"}, CgroupRoot: "/", PageSize: uint64(os.Getpagesize()),
		Now: func() (time.Time, uint64) {
			var boot unix.Timespec
			_ = unix.ClockGettime(unix.CLOCK_BOOTTIME, &boot)
			return time.Now(), uint64(boot.Nano())
		},
	}
	return c.Event(r)
}

// TestLayout proves Go's structs against the object, and that a difference would be seen.
func TestLayout(t *testing.T) {
	if err := CheckLayout(); err != nil {
		t.Fatal(err)
	}
	spec, err := objectSpec()
	if err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		c      string
		change func(*btf.Struct)
		goType reflect.Type
		want   string
	}{
		{"renamed", "oom_stats", func(s *btf.Struct) { s.Members[1].Name = "posted" }, reflect.TypeFor[Stats](), `posted is field Sent`},
		{"moved", "oom_stats", func(s *btf.Struct) { s.Members[1].Offset = 16 * 8 }, reflect.TypeFor[Stats](), "sent is at 16"},
		{"swapped", "oom_stats", func(s *btf.Struct) { s.Members[0], s.Members[1] = s.Members[1], s.Members[0] }, reflect.TypeFor[Stats](), "sent is field Seen"},
		{"added", "oom_stats", func(s *btf.Struct) { s.Members = append(s.Members, s.Members[0]) }, reflect.TypeFor[Stats](), "has 5 members"},
		{"grown", "oom_stats", func(s *btf.Struct) { s.Size += 8 }, reflect.TypeFor[Stats](), "has 40 bytes"},
		{"narrowed", "oom_stats", func(s *btf.Struct) { s.Members[0].Type = &btf.Int{Name: "int", Size: 4} }, reflect.TypeFor[Stats](), "seen is"},
		{"signed", "oom_stats", func(s *btf.Struct) { s.Members[0].Type = &btf.Int{Name: "long", Size: 8, Encoding: btf.Signed} }, reflect.TypeFor[Stats](), "seen is"},
		{"nested", "oom_event", func(s *btf.Struct) {
			for i, m := range s.Members {
				if m.Name == "victim" {
					inner := btf.Copy(m.Type).(*btf.Struct)
					inner.Members[0].Name = "pid"
					s.Members[i].Type = inner
				}
			}
		}, reflect.TypeFor[wire.Header](), "struct oom_victim: pid is field TGID"},
		{"more roles", "oom_event", func(s *btf.Struct) {
			for i, m := range s.Members {
				if m.Name == "cgroup" {
					inner := *m.Type.(*btf.Array)
					inner.Nelems++
					s.Members[i].Type = &inner
				}
			}
		}, reflect.TypeFor[wire.Header](), "cgroup is an array of 5"},
		{"data moved", "oom_event", func(s *btf.Struct) { s.Members[len(s.Members)-1].Offset += 64 }, reflect.TypeFor[wire.Header](), "data is at 320"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			var original *btf.Struct
			if err := spec.TypeByName(tt.c, &original); err != nil {
				t.Fatal(err)
			}
			changed := btf.Copy(original).(*btf.Struct)
			tt.change(changed)
			err := sameStruct(changed, tt.goType, tt.c != "oom_event")
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

// TestPrototype reads both prototypes, and refuses what is neither.
func TestPrototype(t *testing.T) {
	integer := &btf.Int{Name: "int", Size: 4, Encoding: btf.Signed}
	task := &btf.Pointer{Target: &btf.Struct{Name: "task_struct", Size: 8}}
	void := &btf.Pointer{Target: &btf.Void{}}
	param := func(types ...btf.Type) []btf.FuncParam {
		params := []btf.FuncParam{{Type: void}}
		for _, typ := range types {
			params = append(params, btf.FuncParam{Type: typ})
		}
		return params
	}
	for _, tt := range []struct {
		name   string
		params []btf.FuncParam
		want   Prototype
	}{
		{"before v6.9", param(integer), PrototypePID},
		{"since v6.9", param(task, &btf.Typedef{Name: "uid_t", Type: integer}), PrototypeTask},
		{"another struct", param(&btf.Pointer{Target: &btf.Struct{Name: "mm_struct", Size: 8}}), ""},
		{"two integers", param(integer, integer), ""},
		{"nothing", param(), ""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			proto := &btf.FuncProto{Return: &btf.Void{}, Params: tt.params}
			b, err := btf.NewBuilder([]btf.Type{&btf.Typedef{Name: "btf_trace_mark_victim", Type: &btf.Pointer{Target: proto}}}, nil)
			if err != nil {
				t.Fatal(err)
			}
			raw, err := b.Marshal(nil, nil)
			if err != nil {
				t.Fatal(err)
			}
			spec, err := btf.LoadSpecFromReader(strings.NewReader(string(raw)))
			if err != nil {
				t.Fatal(err)
			}
			got, err := MarkVictimPrototype(spec)
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("got %q, %v; want %q", got, err, tt.want)
			}
		})
	}
}

func TestStackSymbols(t *testing.T) {
	const whole = `ffffffff81000000 T _text
ffffffff81212300 t __oom_kill_process.cold
ffffffff81212346 t oom_kill_process.cold
ffffffff81595b90 t mark_oom_victim
ffffffff81596eb0 t __oom_kill_process
ffffffff81597310 t oom_kill_process
ffffffff815974b0 t oom_kill_memcg_member
ffffffff81597ce0 T out_of_memory
ffffffff81597ce0 T out_of_memory_alias
ffffffff815981f0 T next
ffffffff8161e720 t __alloc_pages_slowpath.constprop.0
ffffffff8161f000 d not_text
ffffffff8161f720 t after
ffffffff81620000 T __alloc_pages_noprof
ffffffff81620100 t end_of_that
ffffffff81630000 t kswapd
ffffffff81630100 t end_of_kswapd
ffffffff8168bab0 t mem_cgroup_out_of_memory
ffffffff8168bbb0 t end
ffffffffc0000000 t out_of_memory	[evil]
`
	symbols, err := stackSymbols(strings.NewReader(whole))
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []symbol{
		{0xffffffff81212300, 0xffffffff81212346, frameKill, 0},
		{0xffffffff81596eb0, 0xffffffff81597310, frameKill, 0},
		{0xffffffff815974b0, 0xffffffff81597ce0, frameGroup, 0},
		{0xffffffff81597ce0, 0xffffffff815981f0, frameOOM, 0},
		{0xffffffff8161e720, 0xffffffff8161f720, framePageAlloc, 0},
		{0xffffffff81630000, 0xffffffff81630100, frameKswapd, 0},
		{0xffffffff8168bab0, 0xffffffff8168bbb0, frameMemcg, 0},
	} {
		found := false
		for _, s := range symbols {
			found = found || s == want
		}
		if !found {
			t.Errorf("%x is not among %x", want, symbols)
		}
	}
	for _, s := range symbols {
		if s.Start >= 0xffffffffc0000000 {
			t.Errorf("a module's function is taken for the kernel's: %x", s)
		}
	}

	for _, tt := range []struct{ name, text, want string }{
		{"inlined", strings.Replace(whole, "t __oom_kill_process\n", "t x\n", 1), ""}, // the .cold part is still one
		{"missing", strings.ReplaceAll(whole, "oom_kill_process", "x"), "no __oom_kill_process"},
		{"slow path inlined", strings.ReplaceAll(whole, "__alloc_pages_slowpath", "x"), ""}, // into __alloc_pages_noprof
		{"no page allocator", strings.NewReplacer("__alloc_pages_slowpath", "x", "__alloc_pages_noprof", "x").Replace(whole), "no __alloc_pages_may_oom"},
		{"two missing", strings.NewReplacer("T out_of_memory", "T x", "oom_kill_process", "x").Replace(whole), "no __oom_kill_process, no out_of_memory"},
		{"no memcg", strings.ReplaceAll(whole, "mem_cgroup_out", "x"), "no mem_cgroup_out_of_memory"},
		{"hidden", regexp.MustCompile(`(?m)^[0-9a-f]{16}`).ReplaceAllString(whole, "0000000000000000"), "hides"},
		{"empty", "", "no __oom_kill_process"},
		{"rubbish", "zzzz t x\n", "read kallsyms"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			_, err := stackSymbols(strings.NewReader(tt.text))
			switch {
			case tt.want == "" && err != nil:
				t.Error(err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
	if _, err := CheckStack(t.TempDir()); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without kallsyms: %v", err)
	}
}

// Recorded from Debian's kernels: what they have of the functions, and where each ends. (The addresses are not those of
// a running kernel.)
func TestStackSymbolsOfKernels(t *testing.T) {
	const dir = "testdata/kallsyms/"
	read := func(kernel string) string {
		text, err := os.ReadFile(dir + kernel)
		if err != nil {
			t.Fatal(err)
		}
		return string(text)
	}
	// chosen names the functions in which frames of a kind end, by the text.
	chosen := func(text string) map[frame][]string {
		t.Helper()
		symbols, err := stackSymbols(strings.NewReader(text))
		if err != nil {
			t.Fatal(err)
		}
		names := map[frame][]string{}
		for _, s := range symbols {
			m := regexp.MustCompile(fmt.Sprintf(`(?m)^%016x . (.*)$`, s.Start)).FindStringSubmatch(text)
			if m == nil || !strings.Contains(text, fmt.Sprintf("%016x", s.End)) {
				t.Fatalf("%x is not in\n%s", s, text)
			}
			names[s.Frame] = append(names[s.Frame], m[1])
		}
		return names
	}
	for kernel, allocator := range map[string][]string{
		"amd64-5.10.223":   {"__alloc_pages_slowpath.constprop.0", "pagefault_out_of_memory", "pagefault_out_of_memory.cold"},
		"amd64-6.1.192":    {"__alloc_pages_slowpath.constprop.0", "pagefault_out_of_memory", "pagefault_out_of_memory.cold"},
		"amd64-6.12.95":    {"__alloc_pages_slowpath.constprop.0", "pagefault_out_of_memory"},
		"amd64-7.2.13":     {"__alloc_pages_slowpath.constprop.0.cold", "__alloc_pages_slowpath.constprop.0", "pagefault_out_of_memory.cold", "pagefault_out_of_memory"},
		"arm64-5.10.223":   {"__alloc_pages_nodemask", "pagefault_out_of_memory"},
		"arm64-6.1.192":    {"__alloc_pages", "pagefault_out_of_memory"},
		"arm64-6.12.95":    {"__alloc_pages_noprof", "pagefault_out_of_memory"},
		"arm64-7.2.13":     {"__alloc_pages_noprof", "__alloc_frozen_pages_noprof", "pagefault_out_of_memory"},
		"arm64-7.2.13-16k": {"__alloc_pages_noprof", "__alloc_frozen_pages_noprof", "pagefault_out_of_memory"},
	} {
		t.Run(kernel, func(t *testing.T) {
			text := read(kernel)
			names := chosen(text)
			if got := names[framePageAlloc]; !slices.Equal(got, allocator) {
				t.Errorf("page allocator: %q, want %q", got, allocator)
			}
			for frame, want := range map[frame]string{
				frameKill: "__oom_kill_process", frameGroup: "oom_kill_memcg_member", frameOOM: "out_of_memory",
				frameMemcg: "mem_cgroup_out_of_memory", frameSysrq: "moom_callback", frameKswapd: "kswapd",
			} {
				if !slices.Contains(names[frame], want) {
					t.Errorf("frame %d: %q, want %s", frame, names[frame], want)
				}
			}
			if len(names[frameKillProcess]) > 0 {
				t.Errorf("beside __oom_kill_process there is %q", names[frameKillProcess])
			}

			// As if a compiler had inlined them.
			inlined := chosen(regexp.MustCompile(`(?m) (__oom_kill_process|mem_cgroup_out_of_memory)\b`).ReplaceAllString(text, " x"))
			charge := slices.ContainsFunc(inlined[frameMemcg], func(name string) bool { return strings.HasPrefix(name, "try_charge") })
			if !charge || !slices.Contains(inlined[frameMemcg], "memory_max_write") {
				t.Errorf("mem_cgroup_out_of_memory is inlined: %q", inlined[frameMemcg])
			}
			if len(inlined[frameKill]) > 0 || !slices.Contains(inlined[frameKillProcess], "oom_kill_process") {
				t.Errorf("__oom_kill_process is inlined: %q, %q", inlined[frameKill], inlined[frameKillProcess])
			}
		})
	}
	if files, err := os.ReadDir(dir); err != nil || len(files) != 9 {
		t.Errorf("%d recordings, %v", len(files), err)
	}
}

// TestStackSymbolsGarbage: reading kallsyms allocates as much for many lines as for few.
func TestStackSymbolsGarbage(t *testing.T) {
	var text strings.Builder
	for _, name := range []string{"__oom_kill_process", "oom_kill_process", "out_of_memory", "mem_cgroup_out_of_memory", "__alloc_pages_slowpath"} {
		fmt.Fprintf(&text, "%x t %s\n", 0xffffffff81000000+uint64(text.Len()), name)
	}
	few := text.String() + "ffffffff82000000 t end\n"
	for range 10000 {
		fmt.Fprintf(&text, "%x t some_function\n", 0xffffffff81000000+uint64(text.Len()))
	}
	allocated := func(text string) uint64 {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		if _, err := stackSymbols(strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		return after.TotalAlloc - before.TotalAlloc
	}
	allocated(few) // what is allocated once
	if a, b := allocated(few), allocated(text.String()); b > 2*a {
		t.Errorf("%d bytes for %d lines, %d bytes for %d", a, strings.Count(few, "\n"), b, strings.Count(text.String(), "\n"))
	}
}

// TestGFPFlags: the names are those that a library finds when it decodes all types.
func TestGFPFlags(t *testing.T) {
	kernel, err := btf.LoadKernelSpec()
	if err != nil {
		t.Fatal(err)
	}
	want := map[int]string{}
	for typ, err := range kernel.All() {
		if err != nil {
			t.Fatal(err)
		}
		if enum, ok := typ.(*btf.Enum); ok && len(enum.Values) > 0 && enum.Values[0].Name == "___GFP_DMA_BIT" {
			for _, v := range enum.Values {
				if name, ok := strings.CutSuffix(v.Name, "_BIT"); ok && v.Value < 32 {
					want[int(v.Value)] = name[1:]
				}
			}
		}
	}
	if got := GFPFlags(); !maps.Equal(got, want) {
		t.Errorf("got %v, want %v", got, want)
	}
	raw, err := os.ReadFile("/sys/kernel/btf/vmlinux")
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{0, 10, 24, 1000, len(raw) / 2, len(raw) - 1} {
		file := filepath.Join(t.TempDir(), "btf")
		if err := os.WriteFile(file, raw[:n], 0o600); err != nil {
			t.Fatal(err)
		}
		if got := gfpFlags(file); len(got) > 0 {
			t.Errorf("%v in the first %d bytes", got, n)
		}
	}
}

// loads counts the attempts to load the object, and what is refused of them.
type loads struct {
	slog.Handler
	n *atomic.Int32
}

func (l loads) Handle(_ context.Context, r slog.Record) error {
	r.Attrs(func(a slog.Attr) bool {
		if strings.HasPrefix(a.Value.String(), "libbpf: loading object 'oom_tracer'") {
			l.n.Add(1)
		}
		return true
	})
	return nil
}

func (loads) Enabled(context.Context, slog.Level) bool { return true }

// TestLoadedOnce: a tier that the kernel refuses costs no attempt to load the object.
func TestLoadedOnce(t *testing.T) {
	counted := loads{slog.DiscardHandler, new(atomic.Int32)}
	l, err := Open(t.Context(), Options{Tier: TierAuto, JournalSize: 2 << 20, Log: slog.New(counted)})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if n := counted.n.Load(); n != 1 {
		t.Errorf("tier %s: the object was loaded %d times", l.Tier(), n)
	}
}

func TestOneMemoryNode(t *testing.T) {
	for list, want := range map[string]bool{"0\n": true, "0-1\n": false, "0,2\n": false, "1\n": true} {
		dir := t.TempDir()
		node := filepath.Join(dir, "devices/system/node")
		if err := os.MkdirAll(node, 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(node+"/has_memory", []byte(list), 0o644); err != nil {
			t.Fatal(err)
		}
		if got, err := oneMemoryNode(dir); got != want || err != nil {
			t.Errorf("%q: %t, %v", list, got, err)
		}
	}
	if got, err := oneMemoryNode(t.TempDir()); !got || err != nil {
		t.Errorf("without NUMA: %t, %v", got, err)
	}
}

func TestOpenFails(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	if _, err := Open(t.Context(), Options{Tier: TierAuto, Notify: "mail", JournalSize: 128 << 10, Log: log}); err == nil || !strings.Contains(err.Error(), `"mail" is not known`) {
		t.Errorf("an unknown way to notify: %v", err)
	}
	if _, err := Open(t.Context(), Options{Tier: TierAuto, JournalSize: 96 << 10, Log: log}); err == nil || !strings.Contains(err.Error(), "98304 bytes") {
		t.Errorf("a journal of 48 records: %v", err)
	}
}

// best is the best of the tiers that can be had here, each tried by its name.
func best(t *testing.T) Tier {
	t.Helper()
	for _, candidate := range tiers {
		l, err := Open(t.Context(), Options{Tier: candidate.tier, JournalSize: 128 << 10, Log: slog.New(slog.DiscardHandler)})
		if err == nil {
			l.Close()
			return candidate.tier
		}
	}
	t.Fatal("no tier can be had")
	return ""
}

// TestTiers: with a stack the kill is proved to be one of a cgroup, without any context it is not.
func TestTiers(t *testing.T) {
	for tier, want := range map[Tier]struct {
		scope   event.Scope
		outcome event.KillOutcome
		limit   bool
	}{
		TierAuto:  {event.ScopeCgroup, event.OutcomeKilled, true},
		TierStack: {event.ScopeCgroup, event.OutcomeKilled, true},
		TierNone:  {event.ScopeUnknown, event.OutcomeUnknown, false},
	} {
		t.Run(string(tier), func(t *testing.T) {
			l := open(t, tier)
			stop := collect(t, l)
			group := oomtest.New(t, 16*mib)
			killed := oomtest.Storm(t, group, 1, 32, "plain")
			records := of(group, stop())
			if len(records) != 1 || len(killed) != 1 {
				t.Fatalf("%d records of %d kills", len(records), len(killed))
			}
			e := toEvent(records[0])
			if e.Scope != want.scope || e.Outcome != want.outcome || (e.Limit != nil) != want.limit || (e.Incident != nil) != want.limit {
				t.Errorf("scope %s, outcome %s, limit %+v, incident %+v", e.Scope, e.Outcome, e.Limit, e.Incident)
			}
			if int(e.Victim.PID) != killed[0] || e.Victim.Cgroup == nil || e.Victim.Cgroup.ID != group.ID {
				t.Errorf("victim %+v, want process %d in %+v", e.Victim, killed[0], group)
			}
			became := tier
			if tier == TierAuto {
				became = best(t)
			}
			if l.Tier() != became || e.Node.Tier != string(became) {
				t.Errorf("%s became %s, and says %s; want %s", tier, l.Tier(), e.Node.Tier, became)
			}
			if e.Limit != nil && e.Limit.Inferred != (became == TierStack) {
				t.Errorf("the limit of tier %s is inferred: %t", became, e.Limit.Inferred)
			}
		})
	}
}

// TestSlowReader: a reader that does not wait is not notified, however many kills there are, and misses none of them.
func TestSlowReader(t *testing.T) {
	for _, notify := range []Notify{NotifyPerf, NotifyRingbuf} {
		t.Run(string(notify), func(t *testing.T) { testSlowReader(t, notify) })
	}
}

func testSlowReader(t *testing.T, notify Notify) {
	const kills = 100
	l := openNotified(t, TierAuto, notify)
	group := oomtest.New(t, 4*mib)
	atomic.StoreUint32(l.notifier.waiting, 1) // one that waited, and then was slow
	killed := oomtest.Storm(t, group, kills, 8, "plain")
	counted := oomtest.Kills(t, group)
	if counted != kills || len(killed) != kills {
		t.Fatalf("the cgroup counts %d kills and the hog %d of %d", counted, len(killed), kills)
	}
	before, err := l.Stats()
	if err != nil {
		t.Fatal(err)
	}
	records := collect(t, l)()
	after, err := l.Stats()
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d kills: %+v, %d read", counted, after, len(records))
	// Another program's kills, on a shared machine, are among them.
	if before.Seen < kills || before.Sent != 1 || after.Refused != 0 {
		t.Errorf("%+v, then %+v, of %d kills", before, after, kills)
	}
	if uint64(len(records)) != after.Seen || l.Received() > after.Sent {
		t.Errorf("read %d of %+v; %d notified, %d not", len(records), after, l.Received(), l.CaughtUp())
	}
	var ours []int
	for i, r := range records {
		if r.Seq != uint64(i+1) {
			t.Fatalf("record %d has seq %d", i, r.Seq)
		}
		if slices.Contains(killed, int(r.Victim.TGID)) {
			ours = append(ours, int(r.Victim.TGID))
		}
	}
	if !slices.Equal(ours, killed) {
		t.Errorf("told of %v, killed %v", ours, killed)
	}
}

// TestNotify: each way to notify brings a kill in its time, and a storm in order and whole.
func TestNotify(t *testing.T) {
	for notify, soon := range map[Notify]time.Duration{
		NotifyPerf: pollTime / 2, NotifyRingbuf: pollTime / 2, NotifyPoll: 2 * pollTime,
	} {
		t.Run(string(notify), func(t *testing.T) {
			l := openNotified(t, TierAuto, notify)
			if l.Notify() != notify {
				t.Fatalf("notified by %s", l.Notify())
			}
			arrived := make(chan time.Time, 1024)
			var seqs []uint64
			ctx, cancel := context.WithCancel(t.Context())
			done := make(chan error, 1)
			go func() {
				done <- l.Run(ctx, Handler{
					Record: func(seq uint64, _ []byte) bool {
						seqs = append(seqs, seq)
						arrived <- time.Now()
						return true
					},
					Lost: func(first, last uint64, _ bool) bool { t.Errorf("%d to %d are lost", first, last); return true },
				})
			}()
			group := oomtest.New(t, 4*mib)
			var took []time.Duration
			for range 5 {
				time.Sleep(50 * time.Millisecond)
				for len(arrived) > 0 { // somebody else's
					<-arrived
				}
				oomtest.Storm(t, group, 1, 8, "plain")
				killed := time.Now() // or a moment before
				select {
				case at := <-arrived:
					took = append(took, at.Sub(killed))
				case <-time.After(30 * time.Second):
					t.Fatal("the kill does not arrive")
				}
			}
			slices.Sort(took)
			t.Logf("from the victim's end to the handler: %v", took)
			if took[len(took)/2] > soon+visibleTime {
				t.Errorf("a kill takes %s", took[len(took)/2])
			}

			killed := oomtest.Storm(t, group, 100, 8, "plain")
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
			stats, err := l.Stats()
			if err != nil || len(killed) != 100 || uint64(len(seqs)) != stats.Seen || stats.Seen < 105 {
				t.Errorf("read %d of %+v: %v", len(seqs), stats, err)
			}
			for i, seq := range seqs {
				if seq != uint64(i+1) {
					t.Fatalf("record %d has seq %d", i, seq)
				}
			}
			if notify == NotifyPoll && (stats.Sent > 0 || stats.Refused > 0 || l.Received() > 0) ||
				notify != NotifyPoll && (stats.Sent < 5 || stats.Sent > stats.Seen || stats.Refused > 0) {
				t.Errorf("%+v", stats)
			}
		})
	}
}

// TestWait: a record that comes before the program can see that the reader waits is not waited for. After the reader has
// asked for a notification, it looks once more soon, and then no more.
func TestWait(t *testing.T) {
	n, _, err := openNotifier(NotifyRingbuf, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer n.close()
	n.waiting = new(uint32)
	asked := false
	if seq, err := n.wait(t.Context(), time.Now().Add(time.Hour), func() bool {
		asked = atomic.LoadUint32(n.waiting) == 1
		return true
	}); seq != 0 || err != nil || !asked {
		t.Errorf("seq %d, %v; asked before it looked: %t", seq, err, asked)
	}
	none := func() bool { return false }
	atomic.StoreUint32(n.waiting, 0)
	if seq, err := n.wait(t.Context(), time.Now().Add(time.Hour), none); seq != 0 || err != nil {
		t.Errorf("seq %d, %v", seq, err)
	}
	soon := time.Now().Add(20 * visibleTime)
	if seq, err := n.wait(t.Context(), soon, none); seq != 0 || err != nil || time.Now().Before(soon.Add(-time.Millisecond)) { // epoll_wait(2) counts whole milliseconds
		t.Errorf("seq %d, %v, %s before the deadline", seq, err, time.Until(soon))
	}
}

// TestAllNotified: without the look at the idle interval, every record of a storm is read, although most of them are not
// notified while the reader is awake.
func TestAllNotified(t *testing.T) {
	for _, notify := range []Notify{NotifyPerf, NotifyRingbuf} {
		t.Run(string(notify), func(t *testing.T) {
			l := openNotified(t, TierAuto, notify)
			l.idleTime = time.Hour
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			done := make(chan error, 1)
			var read atomic.Uint64
			go func() {
				done <- l.Run(ctx, Handler{
					Record: func(seq uint64, _ []byte) bool {
						// Some kills find it awake.
						for awake := time.Now(); seq%8 == 0 && l.Counts().Head == seq && time.Since(awake) < 2*time.Second; {
							time.Sleep(time.Millisecond)
						}
						read.Store(seq)
						return true
					},
					Lost: func(first, last uint64, _ bool) bool { t.Errorf("%d to %d are lost", first, last); return true },
				})
			}()
			oomtest.Storm(t, oomtest.New(t, 4*mib), 100, 8, "plain")
			for deadline := time.Now().Add(20 * time.Second); read.Load() < l.Counts().Head; time.Sleep(10 * time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatalf("%d of %d are read", read.Load(), l.Counts().Head)
				}
			}
			stats, err := l.Stats()
			if err != nil || stats.Sent == stats.Seen {
				t.Errorf("%+v, %v", stats, err)
			}
			t.Logf("%+v", stats)
			cancel()
			if err := <-done; err != nil {
				t.Error(err)
			}
		})
	}
}

// TestGiveWay: only a record of a kill that may have been for the whole node waits, and only while the kill is fresh.
func TestGiveWay(t *testing.T) {
	const killed = 1e12
	for _, tt := range []struct {
		name  string
		scope event.Scope
		age   time.Duration
		want  time.Duration
	}{
		{"global", event.ScopeGlobal, 0, giveWayTime},
		{"a part is over", event.ScopeGlobal, 30 * time.Millisecond, giveWayTime - 30*time.Millisecond},
		{"not known", event.ScopeUnknown, time.Millisecond, giveWayTime - time.Millisecond},
		{"sysrq", event.ScopeSysrq, time.Millisecond, giveWayTime - time.Millisecond},
		{"of a cgroup", event.ScopeCgroup, time.Millisecond, 0},
		{"old", event.ScopeGlobal, time.Minute, 0},
		{"of another clock", event.ScopeGlobal, -time.Minute, 0},
	} {
		scopes := []event.Scope{event.ScopeUnknown, event.ScopeGlobal, event.ScopeCgroup, event.ScopeCpuset, event.ScopeMempolicy, event.ScopeSysrq}
		header := wire.Header{BoottimeNS: killed, Scope: uint8(slices.Index(scopes, tt.scope))}
		record, err := binary.Append(nil, binary.NativeEndian, &header)
		if err != nil {
			t.Fatal(err)
		}
		if got := giveWay(record, uint64(killed+int64(tt.age))); got != tt.want {
			t.Errorf("%s: %s, want %s", tt.name, got, tt.want)
		}
	}
	if got := giveWay(make([]byte, recordPrefix), 0); got != 0 {
		t.Errorf("a record of another version waits %s", got)
	}
}

// TestOpenNotifier: where perf events are refused a ring buffer takes their place, and it is said why. What is
// demanded and refused is an error.
func TestOpenNotifier(t *testing.T) {
	refused := fmt.Errorf("perf_event_open: %w", unix.EACCES)
	n, why, err := openNotifier(NotifyAuto, refused)
	if err != nil || n.way != NotifyRingbuf || why == nil || why.Error() != "notify by perf: perf_event_open: permission denied" {
		t.Fatalf("%+v, %v, %v", n, why, err)
	}
	n.close()
	if _, _, err := openNotifier(NotifyPerf, refused); !errors.Is(err, unix.EACCES) || !strings.Contains(err.Error(), "kernel.notify") {
		t.Errorf("%v", err)
	}
	n, why, err = openNotifier(NotifyAuto, nil)
	if err != nil || n.way != NotifyPerf || why != nil {
		t.Fatalf("%+v, %v, %v", n, why, err)
	}
	n.close()
}

// TestKprobeWay: by perf events where they are permitted, else by kprobe.multi where the kernel has that.
func TestKprobeWay(t *testing.T) {
	types := func(types ...btf.Type) *btf.Spec {
		b, err := btf.NewBuilder(append(types, &btf.Int{Name: "int", Size: 4}), nil)
		if err != nil {
			t.Fatal(err)
		}
		raw, err := b.Marshal(nil, nil)
		if err != nil {
			t.Fatal(err)
		}
		spec, err := btf.LoadSpecFromReader(strings.NewReader(string(raw)))
		if err != nil {
			t.Fatal(err)
		}
		return spec
	}
	old, multiKernel := types(), types(&btf.Struct{Name: "bpf_kprobe_multi_link", Size: 8})
	with, without := t.TempDir(), t.TempDir()
	if err := os.MkdirAll(filepath.Join(with, "bus/event_source/devices/kprobe/type"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name   string
		sysfs  string
		kernel *btf.Spec
		perf   error
		multi  bool
		want   string
	}{
		{"all there", with, multiKernel, nil, false, ""},
		{"refused", with, multiKernel, unix.EPERM, true, ""},
		{"refused, and an old kernel", with, old, unix.EPERM, false, "operation not permitted; and it has no kprobe.multi links"},
		{"no kprobes", without, multiKernel, nil, true, ""},
		{"nothing there", without, old, nil, false, "no kprobe events (CONFIG_KPROBE_EVENTS); and it has no kprobe.multi links"},
	} {
		multi, err := kprobeWay(tt.sysfs, tt.kernel, tt.perf)
		if multi != tt.multi || (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %t, %v", tt.name, multi, err)
		}
	}
}

// TestAlive: the reader is alive while it comes around, even where nothing notifies it any more.
func TestAlive(t *testing.T) {
	for _, notify := range []Notify{NotifyPerf, NotifyRingbuf} {
		t.Run(string(notify), func(t *testing.T) { testAlive(t, notify) })
	}
}

func testAlive(t *testing.T, notify Notify) {
	before := epolls(t)
	l := openNotified(t, TierAuto, notify)
	l.idleTime, l.stuckTime = 100*time.Millisecond, 300*time.Millisecond
	if err := l.Alive(t.Context()); err == nil {
		t.Error("alive before Run")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	read := make(chan uint64, 1024)
	hang := make(chan struct{}, 1)
	go func() {
		done <- l.Run(ctx, Handler{Record: func(seq uint64, _ []byte) bool {
			read <- seq
			select {
			case <-hang:
				<-hang
			default:
			}
			return true
		}})
	}()
	group := oomtest.New(t, 8*mib)
	next := uint64(1)
	arrives := func() {
		t.Helper()
		oomtest.Storm(t, group, 1, 16, "plain")
		for head := l.Counts().Head; next <= head; next++ {
			select {
			case seq := <-read:
				if seq != next {
					t.Errorf("read %d, want %d", seq, next)
				}
			case <-time.After(30 * time.Second):
				t.Fatalf("record %d is not read", next)
			}
		}
	}
	arrives()
	if err := l.Alive(t.Context()); err != nil || l.Received() == 0 || l.Notify() != notify {
		t.Errorf("%v; %d notifications by %s", err, l.Received(), l.Notify())
	}
	time.Sleep(l.stuckTime + l.idleTime)
	if err := l.Alive(t.Context()); err != nil {
		t.Errorf("with nothing to read: %v", err)
	}

	// The notifications fail: their descriptor becomes one that cannot be polled. It is seen at the next wait.
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	for fd := range epolls(t) {
		if !before[fd] {
			if err := unix.Dup2(int(null.Fd()), fd); err != nil {
				t.Fatal(err)
			}
		}
	}
	time.Sleep(2 * l.idleTime)
	received := l.Received()
	arrives()
	if err := l.Alive(t.Context()); err != nil || l.Received() != received || l.Notify() != NotifyPoll {
		t.Errorf("%v; %d notifications, then %d by %s", err, received, l.Received(), l.Notify())
	}

	// The handler hangs.
	hang <- struct{}{}
	oomtest.Storm(t, group, 2, 16, "plain")
	time.Sleep(2 * l.stuckTime)
	if err := l.Alive(t.Context()); err == nil || !strings.Contains(err.Error(), "records wait") {
		t.Errorf("with a handler that hangs: %v", err)
	}
	close(hang)
	arrives()
	if err := l.Alive(t.Context()); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Errorf("Run ended with %v", err)
	}
}

// epolls are this process's epoll descriptors.
func epolls(t *testing.T) map[int]bool {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	found := map[int]bool{}
	for _, fd := range fds {
		link, _ := os.Readlink("/proc/self/fd/" + fd.Name())
		if n, err := strconv.Atoi(fd.Name()); err == nil && link == "anon_inode:[eventpoll]" {
			found[n] = true
		}
	}
	return found
}
