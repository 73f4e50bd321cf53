package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/oom-tracer/oom-tracer/go/event"
)

var update = flag.Bool("update", false, "write the golden JSON anew (the .bin and .txt come from tools/goldens.c)")

// words says of a record what tools/goldens.c says of it.
func words(r *Record) string {
	var b strings.Builder
	bit := func(mask uint32) int {
		if r.Flags&mask != 0 {
			return 1
		}
		return 0
	}
	fmt.Fprintf(&b, "seq %d boottime %d tier %s scope %s outcome %s\n", r.Seq, r.BoottimeNS, tiers[r.Tier], scopes[r.Scope], outcomes[r.Outcome])
	v := r.Victim
	fmt.Fprintf(&b, "victim %d/%d ns %d uid %d start %d comm %s adj %d\n", v.TGID, v.TID, v.NSTGID, v.UID, v.StartBoottimeNS, comm(v.Comm), v.OOMScoreAdj)
	fmt.Fprintf(&b, "trigger %d/%d comm %s\n", r.Trigger.TGID, r.Trigger.TID, comm(r.Trigger.Comm))
	m := r.Memory
	fmt.Fprintf(&b, "memory total_vm %d pgtables %d\n", m.TotalVM, m.PgTables)
	fmt.Fprintf(&b, "rss file %d anon %d swap %d shmem %d\n", m.RSS[rssFile], m.RSS[rssAnon], m.RSS[rssSwap], m.RSS[rssShmem])
	fmt.Fprintf(&b, "batched file %d anon %d swap %d shmem %d\n", m.Batched[rssFile], m.Batched[rssAnon], m.Batched[rssSwap], m.Batched[rssShmem])
	fmt.Fprintf(&b, "limit max %d usage %d swap_max %d swap_usage %d\n", r.Limit.Max, r.Limit.Usage, r.Limit.SwapMax, r.Limit.SwapUsage)
	fmt.Fprintf(&b, "alloc gfp_mask %d order %d total_pages %d\n", r.Alloc.GFPMask, r.Alloc.Order, r.Alloc.TotalPages)
	fmt.Fprintf(&b, "incident %d index %d\n", r.Incident.BoottimeNS, r.Incident.Index)
	fmt.Fprintf(&b, "flags victim %d memory %d exact %d limit %d inferred %d incident %d group %d alloc %d\n",
		bit(flagVictim), bit(flagMemory), bit(flagExact), bit(flagLimit), bit(flagLimitInferred), bit(flagIncident), bit(flagGroup), bit(flagAlloc))
	for role, name := range []string{roleVictim: "victim", roleVictimMemcg: "victim_memcg", roleLimit: "limit", roleTrigger: "trigger"} {
		c := r.cgroup(role)
		if c == nil {
			fmt.Fprintf(&b, "%s: absent\n", name)
			continue
		}
		truncated := 0
		if c.Truncated {
			truncated = 1
		}
		fmt.Fprintf(&b, "%s: id %d v%d truncated %d path %s\n", name, c.ID, c.Version, truncated, c.Path)
	}
	return b.String()
}

// converter belongs to a node that booted 2000 s before 2026-01-02 03:04:05 UTC.
func converter(root string) *Converter {
	return &Converter{
		Node:       event.Node{Name: "n1", BootID: "b0071d00-0000-4000-8000-000000000000", Kernel: "6.18.0"},
		CgroupRoot: root,
		PageSize:   4096,
		GFPFlags:   map[int]string{1: "GFP_TWO", 3: "GFP_EIGHT"},
		Now: func() (time.Time, uint64) {
			return time.Date(2026, 1, 2, 3, 4, 5, 0, time.FixedZone("x", 3600)), 2000e9
		},
	}
}

func read(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestGoldens holds what Go reads against what C wrote.
func TestGoldens(t *testing.T) {
	bins, err := filepath.Glob("testdata/*.bin")
	if err != nil || len(bins) == 0 {
		t.Fatalf("no goldens: %v", err)
	}
	for _, bin := range bins {
		name := strings.TrimSuffix(filepath.Base(bin), ".bin")
		t.Run(name, func(t *testing.T) {
			r, err := Decode(read(t, name+".bin"))
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(string(read(t, name+".txt")), words(r)); diff != "" {
				t.Errorf("-C +Go:\n%s", diff)
			}
			e := converter("/").Event(r)
			got, err := json.MarshalIndent(&e, "", "  ")
			if err != nil {
				t.Fatal(err)
			}
			got = append(got, '\n')
			if *update {
				if err := os.WriteFile("testdata/"+name+".json", got, 0o644); err != nil {
					t.Fatal(err)
				}
			}
			if diff := cmp.Diff(string(read(t, name+".json")), string(got)); diff != "" {
				t.Errorf("the event: -want +got:\n%s", diff)
			}
			if _, err := event.Parse(got); err != nil {
				t.Errorf("what is written cannot be read: %v", err)
			}
		})
	}
}

// TestEveryLength feeds each golden cut off, and padded, at every length.
func TestEveryLength(t *testing.T) {
	for _, name := range []string{"full", "bare", "truncated"} {
		golden := read(t, name+".bin")
		for n := range len(golden) + 64 {
			sample := append([]byte{}, golden...)
			if n <= len(golden) {
				sample = sample[:n]
			} else {
				sample = append(sample, make([]byte, n-len(golden))...)
			}
			_, err := Decode(sample)
			whole := n == len(golden)
			if whole != (err == nil) {
				t.Errorf("%s with %d of %d bytes: %v", name, n, len(golden), err)
			}
			if err != nil && !errors.Is(err, ErrSample) {
				t.Errorf("%s with %d bytes: %v does not wrap ErrSample", name, n, err)
			}
		}
	}
}

// TestMalformed breaks one field at a time; the error must name it.
func TestMalformed(t *testing.T) {
	ne := binary.NativeEndian
	cgroupAt := HeaderSize - 4*16
	for _, tt := range []struct {
		name   string
		damage func(s []byte)
		want   string
	}{
		{"version", func(s []byte) { ne.PutUint16(s[0:], 2) }, "abi_version 2"},
		{"header size", func(s []byte) { ne.PutUint16(s[2:], 311) }, "header_size 311"},
		{"size below the header", func(s []byte) { ne.PutUint32(s[4:], 311) }, "size 311"},
		{"size above the sample", func(s []byte) { ne.PutUint32(s[4:], uint32(len(s)+1)) }, "size 539 in a sample of 538"},
		{"size far above", func(s []byte) { ne.PutUint32(s[4:], 1<<31) }, "size 2147483648"},
		{"size far below the sample", func(s []byte) { ne.PutUint32(s[4:], uint32(len(s)-8)) }, "size 530 in a sample of 538"},
		{"seq", func(s []byte) { ne.PutUint64(s[8:], 0) }, "seq 0"},
		{"tid", func(s []byte) { ne.PutUint32(s[36:], 0) }, "victim.tid 0"},
		{"tier", func(s []byte) { s[28] = 99 }, "tier 99"},
		{"scope", func(s []byte) { s[29] = 6 }, "scope 6"},
		{"outcome", func(s []byte) { s[30] = 3 }, "outcome 3"},
		{"path beyond the data", func(s []byte) { ne.PutUint16(s[cgroupAt+8:], 65000) }, "cgroup[0] ends at"},
		{"path too long", func(s []byte) { ne.PutUint16(s[cgroupAt+3*16+10:], 65000) }, "cgroup[3] ends at"},
		{"path without end", func(s []byte) { s[len(s)-1] = 'x' }, "cgroup[3]: the last name is not terminated"},
		{"path with an empty name", func(s []byte) { s[HeaderSize] = 0 }, `cgroup[0]: "" is not the name`},
		{"name with a slash", func(s []byte) { s[HeaderSize] = '/' }, `cgroup[0]: "/pp" is not the name`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sample := read(t, "full.bin")
			tt.damage(sample)
			_, err := Decode(sample)
			if !errors.Is(err, ErrSample) || !strings.Contains(fmt.Sprint(err), tt.want) {
				t.Errorf("got %v, want an error with %q", err, tt.want)
			}
		})
	}
}

// TestOnNode: with several nodes on one kernel each tells its own kills, and those nobody can place.
func TestOnNode(t *testing.T) {
	for _, tt := range []struct {
		golden, root string
		want         bool
	}{
		{"full", "/", true},
		{"full", "/kubepods.slice", true},
		{"full", "/kubepods", false},
		{"full", "/docker/x", false},
		{"bare", "/docker/x", true},
		{"truncated", "/docker/x", true},
	} {
		r, err := Decode(read(t, tt.golden+".bin"))
		if err != nil {
			t.Fatal(err)
		}
		if got := converter(tt.root).OnNode(r); got != tt.want {
			t.Errorf("%s on the node at %s: %t", tt.golden, tt.root, got)
		}
	}
}

// TestAbsent: what no flag proves is not in the JSON, whatever the fields hold.
func TestAbsent(t *testing.T) {
	sample := read(t, "full.bin")
	binary.NativeEndian.PutUint32(sample[24:], 0) // flags
	for role := range roles {
		binary.NativeEndian.PutUint32(sample[HeaderSize-16*(roles-role)+12:], 0)
	}
	r, err := Decode(sample)
	if err != nil {
		t.Fatal(err)
	}
	e := converter("/").Event(r)
	got, err := json.Marshal(&e)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []string{`"memory"`, `"limit"`, `"incident"`, `"alloc"`, `"container"`, `"cgroup":`, `"memcg"`, `"uid"`, `"ns_pid"`, `"start_boottime_ns"`} {
		if strings.Contains(string(got), key) {
			t.Errorf("%s is in %s", key, got)
		}
	}
}

func FuzzDecode(f *testing.F) {
	for _, name := range []string{"full", "bare", "truncated"} {
		f.Add(read(f, name+".bin"))
	}
	f.Fuzz(func(t *testing.T, sample []byte) {
		r, err := Decode(sample)
		if err != nil {
			if !errors.Is(err, ErrSample) || r != nil {
				t.Fatalf("%v, %v", r, err)
			}
			return
		}
		e := converter("/").Event(r)
		data, err := json.Marshal(&e)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := e.Subject(); err != nil {
			t.Fatal(err)
		}
		if _, err := event.Parse(data); err != nil {
			t.Fatal(err)
		}
	})
}

func BenchmarkDecode(b *testing.B) {
	sample := read(b, "full.bin")
	c := converter("/")
	b.ReportAllocs()
	for b.Loop() {
		r, err := Decode(sample)
		if err != nil {
			b.Fatal(err)
		}
		e := c.Event(r)
		if _, err := json.Marshal(&e); err != nil {
			b.Fatal(err)
		}
	}
}

// PAGE_COUNTER_MAX stands for no limit, and is LONG_MAX in pages of the kernel.
func TestNoLimit(t *testing.T) {
	for _, page := range []uint64{4 << 10, 16 << 10, 64 << 10} {
		c := Converter{PageSize: page}
		none := math.MaxInt64 / page
		if got := c.bounded(none); got != nil {
			t.Errorf("pages of %d bytes: no limit is %d bytes", page, *got)
		}
		if got := c.bounded(none - 1); got == nil || *got != (none-1)*page {
			t.Errorf("pages of %d bytes: a limit of %d pages is %v", page, none-1, got)
		}
	}
}
