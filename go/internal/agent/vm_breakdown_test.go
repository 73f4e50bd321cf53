//go:build vm

package agent

import (
	"fmt"
	"io"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/cgroupfs"
	"github.com/oom-tracer/oom-tracer/go/internal/kmsg"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

// The kernel prints its dump before the kill, and the tracer reads after it. What the victim does not hold differs by what
// the machine does meanwhile.
const (
	cgroupSlack = mib / 4
	nodeSlack   = 2 * mib
)

// TestVMBreakdown compares what the memory was used for with the kernel's own dump of the same kill.
func TestVMBreakdown(t *testing.T) {
	cfg := testConfig(t)
	runTracer(t, cfg, io.Discard)

	root := oomtest.New(t, cgroupfs.Unlimited)
	for i, scenario := range []string{"anon", "tmpfs"} {
		limit := oomtest.Child(t, root, scenario, 64*mib)
		oomtest.Hold(t, limit, 8)
		console := openConsole(t)
		if scenario == "anon" {
			hogProcess(t, limit, 0, "1", "100")
		} else if !oomtest.FillTmpfs(t, limit, 100) {
			t.Fatal("the process that fills a tmpfs was not killed")
		}
		k := oneKill(t, console)
		b := neighboursStored(t, cfg, i+1)[i].Breakdown
		dump := cgroupDump(console.Messages())
		if b == nil || len(dump) < 5 {
			t.Fatalf("breakdown %+v, the console has %v", b, dump)
		}
		t.Logf("%s: %s", scenario, show(b))
		c := comparison{t: t, name: scenario, slack: cgroupSlack}
		c.victims("anon", b.Anon, dump["anon"], k.AnonRSS)
		c.near("file", b.File, dump["file"])
		c.near("shmem", b.Shmem, dump["shmem"])
		if want := map[string]uint64{"anon": 0, "tmpfs": 40 * mib}[scenario]; *b.Shmem < want {
			t.Errorf("%s: shmem %d, want at least %d", scenario, *b.Shmem, want)
		}
		if limit.Version == 2 {
			for name, got := range map[string]*uint64{
				"slab": b.Slab, "slab_unreclaimable": b.SlabUnreclaimable, "kernel_stack": b.KernelStack, "pagetables": b.PageTables, "sock": b.Sock, "zswap": b.Zswap,
			} {
				if want, ok := dump[name]; ok {
					c.near(name, got, want)
				}
			}
			if e := b.Events; e == nil || e.OOMKill == nil || *e.OOMKill != 1 || *e.Max == 0 {
				t.Errorf("%s: events %+v", scenario, e)
			}
			if b.Pressure == nil || b.Pressure.Some == nil || b.Pressure.Full == nil {
				t.Errorf("%s: pressure %+v", scenario, b.Pressure)
			}
		}
		// The emulator may be slower than the time for one reading.
		if (b.ProcessesSeen == nil || len(b.Processes) == 0) && !b.Incomplete {
			t.Errorf("%s: processes %v", scenario, b.Processes)
		}
		if b.NodePressure == nil || b.NodePressure.Full == nil {
			t.Errorf("%s: pressure of the node %+v", scenario, b.NodePressure)
		}
	}

	console := openConsole(t)
	hogProcess(t, oomtest.Child(t, root, "node", cgroupfs.Unlimited), 0, "1", fmt.Sprint(tooMuch))
	k := oneKill(t, console)
	b := neighboursStored(t, cfg, 3)[2].Breakdown
	dump := nodeDump(console.Messages())
	if b == nil || b.Source != event.SourceMeminfo || len(dump) < 8 {
		t.Fatalf("breakdown %+v, the console has %v", b, dump)
	}
	t.Logf("node: %s", show(b))
	c := comparison{t: t, name: "node", slack: nodeSlack}
	c.victims("anon", b.Anon, dump["active_anon"]+dump["inactive_anon"]-dump["shmem"], k.AnonRSS)
	c.near("file", b.File, dump["total pagecache"])
	c.near("shmem", b.Shmem, dump["shmem"])
	c.near("slab", b.Slab, dump["slab_reclaimable"]+dump["slab_unreclaimable"])
	c.near("slab_unreclaimable", b.SlabUnreclaimable, dump["slab_unreclaimable"])
	c.near("kernel_stack", b.KernelStack, dump["kernel_stack"])
	c.near("pagetables", b.PageTables, dump["pagetables"])
	if b.Total == nil || *b.Total < 256*mib || b.NodePressure == nil || len(b.Processes) < 2 && !b.Incomplete {
		t.Errorf("node: %+v", b)
	}
}

func openConsole(t *testing.T) *kmsg.Reader {
	t.Helper()
	console, err := kmsg.Open()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { console.Close() })
	return console
}

func oneKill(t *testing.T, console *kmsg.Reader) kmsg.Kill {
	t.Helper()
	kills, err := console.Read(func(kills []kmsg.Kill) bool { return len(kills) > 0 }, 60*time.Second)
	if err != nil || len(kills) != 1 {
		t.Fatalf("the console has the kills %+v, %v", kills, err)
	}
	return kills[0]
}

// cgroupDump is what mem_cgroup_print_oom_meminfo() printed. Kernels before 6.6 print it in one message, and cut that.
func cgroupDump(messages []string) map[string]uint64 {
	dump := map[string]uint64{}
	begun := false
	for line := range strings.Lines(strings.Join(messages, "\n")) {
		begun = begun || strings.Contains(line, "Memory cgroup stats for ")
		fields := strings.Fields(line)
		if !begun || len(fields) != 2 {
			continue
		}
		if n, err := strconv.ParseUint(fields[1], 10, 64); err == nil {
			dump[fields[0]] = n
		}
	}
	return dump
}

var pairs = regexp.MustCompile(`(\w+):(\d+)(kB)?\b`)

// nodeDump is what show_mem() printed, in bytes.
func nodeDump(messages []string) map[string]uint64 {
	page := uint64(os.Getpagesize())
	dump := map[string]uint64{}
	for _, message := range messages {
		node := strings.HasPrefix(message, "Node ")
		if strings.Contains(message, "slab_unreclaimable:") && !node || node && strings.Contains(message, " kernel_stack:") {
			for _, m := range pairs.FindAllStringSubmatch(message, -1) {
				n, _ := strconv.ParseUint(m[2], 10, 64)
				switch {
				case m[3] == "" && !node:
					dump[m[1]] = n * page
				case m[3] != "" && m[1] == "kernel_stack":
					dump[m[1]] += n << 10
				}
			}
		}
		if pages, ok := strings.CutSuffix(message, " total pagecache pages"); ok {
			n, _ := strconv.ParseUint(pages, 10, 64)
			dump["total pagecache"] = n * page
		}
	}
	return dump
}

// comparison compares figures of a breakdown with the console's.
type comparison struct {
	t     *testing.T
	name  string
	slack uint64
}

func (c *comparison) near(name string, got *uint64, want uint64) { c.victims(name, got, want, 0) }

// victims compares a figure of which the victim held a part: that may be freed.
func (c *comparison) victims(name string, got *uint64, want, victim uint64) {
	c.t.Helper()
	if got == nil {
		c.t.Errorf("%s: %s is absent, the console has %d", c.name, name, want)
		return
	}
	fmt.Printf("BREAKDOWN %s %s: console %d, read %d, the victim had %d\n", c.name, name, want, *got, victim)
	if *got > want+c.slack || *got+victim+c.slack < want {
		c.t.Errorf("%s: %s is %d, the console has %d, of which the victim had %d", c.name, name, *got, want, victim)
	}
}

func show(b *event.Breakdown) string {
	var table text.Table
	return table.NeighboursLine(&event.Neighbours{Breakdown: b})
}
