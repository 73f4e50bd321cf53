package loader

import (
	"context"
	"encoding/binary"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
	"github.com/oom-tracer/oom-tracer/go/internal/statedir"
	"github.com/oom-tracer/oom-tracer/go/internal/wire"
)

func openPinned(t *testing.T, dir string, size uint64) *Loader {
	t.Helper()
	l, err := Open(t.Context(), Options{Tier: TierAuto, JournalSize: size, PinDir: dir, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(l.Close)
	return l
}

// reading is what a Run has handed over.
type reading struct {
	mu     sync.Mutex
	pids   []int
	seqs   []uint64
	lost   [][2]uint64
	handed [][2]uint64
	stop   func()
}

func read(t *testing.T, l *Loader, settle bool) *reading {
	t.Helper()
	r := &reading{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() {
		done <- l.Run(ctx, Handler{
			Record: func(seq uint64, sample []byte) bool {
				r.mu.Lock()
				defer r.mu.Unlock()
				record, err := wire.Decode(sample)
				if err != nil {
					t.Error(err)
					return true
				}
				r.seqs, r.pids = append(r.seqs, seq), append(r.pids, int(record.Victim.TGID))
				if settle {
					l.Ack(seq, seq)
				}
				return true
			},
			Lost: func(first, last uint64, handed bool) bool {
				r.mu.Lock()
				defer r.mu.Unlock()
				if handed {
					r.handed = append(r.handed, [2]uint64{first, last})
				} else {
					r.lost = append(r.lost, [2]uint64{first, last})
				}
				if settle {
					l.Ack(first, last)
				}
				return true
			},
		})
	}()
	r.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(r.stop)
	return r
}

// caughtUp waits until everything is settled that the program has recorded.
func caughtUp(t *testing.T, l *Loader) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); l.Counts().Acked < l.Counts().Head; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%+v", l.Counts())
		}
	}
}

func mustHave(t *testing.T, pids, killed []int) {
	t.Helper()
	told := map[int]int{}
	for _, pid := range pids {
		told[pid]++
	}
	for _, pid := range killed {
		if told[pid] != 1 {
			t.Errorf("process %d was killed, and is told of %d times", pid, told[pid])
		}
	}
}

// TestPinned: recording goes on between two tracers, and the next one takes over what the one before did not
// settle, with another size of journal too. In the end nothing is left.
func TestPinned(t *testing.T) {
	dir := filepath.Join(oomtest.BPFFS(t), "oom")
	group := oomtest.New(t, 8*mib)

	first := openPinned(t, dir, 128<<10)
	if !first.Fresh() || !first.Pinned() {
		t.Error("the first is not a fresh, pinned one")
	}
	if info, err := os.Stat(dir); err != nil || info.Mode().Perm() != 0o700 {
		t.Errorf("%v, %v", info, err)
	}
	first.SetKernelBase(0)
	r := read(t, first, true)
	killed := oomtest.Storm(t, group, 5, 16, "plain")
	caughtUp(t, first)
	r.stop()
	mustHave(t, r.pids, killed)
	epoch := first.EpochNS()
	first.Close()

	between := oomtest.Storm(t, group, 10, 16, "plain")

	second := openPinned(t, dir, 128<<10)
	if second.Fresh() || second.EpochNS() != epoch {
		t.Error("the second begins anew")
	}
	r = read(t, second, false) // and dies before anything of it is settled
	for deadline := time.Now().Add(30 * time.Second); second.CaughtUp() < 10; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("read %d", second.CaughtUp())
		}
	}
	r.stop()
	mustHave(t, r.pids, between)
	second.Close()

	third := openPinned(t, dir, 256<<10) // another journal, beside which the old one is read
	more := oomtest.Storm(t, group, 3, 16, "plain")
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 3 {
		t.Errorf("with an unread journal: %v, %v", entries, err)
	}
	r = read(t, third, true)
	caughtUp(t, third)
	r.stop()
	mustHave(t, r.pids, append(between, more...))
	for i := 1; i < len(r.seqs); i++ {
		if r.seqs[i] != r.seqs[i-1]+1 {
			t.Errorf("seq %d after %d", r.seqs[i], r.seqs[i-1])
		}
	}
	if len(r.lost) > 0 {
		t.Errorf("lost %v", r.lost)
	}
	if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
		t.Errorf("with everything read: %v, %v", entries, err)
	}

	// While one runs, no other may, and nothing is unloaded.
	if _, err := Unload(ended(t), dir, true); !errors.Is(err, context.Canceled) {
		t.Errorf("unload beside a tracer: %v", err)
	}
	third.Close()
	gone := oomtest.Storm(t, group, 2, 16, "plain")
	if n, err := Unload(t.Context(), dir, false); err == nil || n < uint64(len(gone)) || !strings.Contains(err.Error(), "not published yet") {
		t.Errorf("unload with %d unread: %d, %v", len(gone), n, err)
	}
	if n, err := Unload(t.Context(), dir, true); err != nil || n < uint64(len(gone)) {
		t.Errorf("unload: %d, %v", n, err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
	if _, err := Unload(t.Context(), dir, false); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("unload with nothing there: %v", err)
	}
}

// ended is a context that is about to end: nobody has ten seconds.
func ended(t *testing.T) context.Context {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	return ctx
}

// TestGeneration: while the state says that another program speaks, this one records nothing, and tells what it
// records as its own when its turn comes.
func TestGeneration(t *testing.T) {
	l := open(t, TierAuto)
	stop := collect(t, l)
	group := oomtest.New(t, 8*mib)
	before := l.Counts().Head
	atomic.StoreUint64(&l.state.Generation, l.generation+1)
	oomtest.Storm(t, group, 2, 16, "plain")
	if now := l.Counts().Head; now > before+1 { // one may have been under way
		t.Errorf("it recorded %d marks that are another's", now-before)
	}
	atomic.StoreUint64(&l.state.Generation, l.generation)
	killed := oomtest.Storm(t, group, 2, 16, "plain")
	var pids []int
	for _, r := range stop() {
		pids = append(pids, int(r.Victim.TGID))
	}
	mustHave(t, pids, killed)
}

// TestWrapped: what the journal had no room for is lost, exactly, and said to be.
func TestWrapped(t *testing.T) {
	dir := filepath.Join(oomtest.BPFFS(t), "oom")
	l := openPinned(t, dir, 128<<10)
	l.Close()
	killed := oomtest.Storm(t, oomtest.New(t, 4*mib), 400, 8, "plain")
	l = openPinned(t, dir, 128<<10)
	head := l.Counts().Head
	r := read(t, l, true)
	caughtUp(t, l)
	r.stop()
	// Three of its four segments are read, for one may be under way to be written over.
	if len(r.lost) != 1 || r.lost[0] != [2]uint64{1, r.seqs[0] - 1} || l.Counts().Lost != r.seqs[0]-1 || head-r.seqs[0] < 100 {
		t.Errorf("lost %v (%d), read from %d on, of %d", r.lost, l.Counts().Lost, r.seqs[0], head)
	}
	t.Logf("%d of %d records are read from %d bytes", head-r.seqs[0]+1, head, 128<<10)
	mustHave(t, r.pids, killed[len(killed)-100:])
	if _, err := Unload(ended(t), dir, false); err == nil {
		t.Error("unloaded beside a loader")
	}
	l.Close()
	if _, err := Unload(t.Context(), dir, false); err != nil {
		t.Error(err)
	}
}

// TestJournalRemoved: of what was in a journal that is gone, an earlier reader had some and may have published them.
func TestJournalRemoved(t *testing.T) {
	dir, group := filepath.Join(oomtest.BPFFS(t), "oom"), oomtest.New(t, 8*mib)
	l := openPinned(t, dir, 128<<10)
	r := read(t, l, false)
	oomtest.Storm(t, group, 3, 16, "plain")
	for deadline := time.Now().Add(30 * time.Second); l.next.Load() <= l.Counts().Head; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%+v", l.Counts())
		}
	}
	r.stop()
	l.Ack(1, 1)
	handed := l.Counts().Head
	l.Close()
	oomtest.Storm(t, group, 2, 16, "plain")
	// The next one ends when it has read only one of them again.
	l = openPinned(t, dir, 128<<10)
	again, stop := context.WithCancel(t.Context())
	if err := l.Run(again, Handler{
		Record: func(seq uint64, _ []byte) bool { stop(); return seq < 2 },
		Lost:   func(first, last uint64, _ bool) bool { t.Errorf("lost %d-%d", first, last); return true },
	}); err != nil {
		t.Error(err)
	}
	l.Close()
	pins, err := filepath.Glob(filepath.Join(dir, "*", journalPin+"*"))
	if err != nil || len(pins) != 1 {
		t.Fatal(pins, err)
	}
	if err := os.Remove(pins[0]); err != nil {
		t.Fatal(err)
	}
	l = openPinned(t, dir, 128<<10)
	head := l.Counts().Head
	r = read(t, l, true)
	caughtUp(t, l)
	r.stop()
	if !slices.Equal(r.handed, [][2]uint64{{2, handed}}) || !slices.Equal(r.lost, [][2]uint64{{handed + 1, head}}) {
		t.Errorf("handed %v, want 2 to %d; lost %v, want the rest up to %d", r.handed, handed, r.lost, head)
	}
	l.Close()
	if _, err := Unload(t.Context(), dir, false); err != nil {
		t.Error(err)
	}
}

// TestStrangePins: what another version has pinned is drained by its own header or refused, never misread.
func TestStrangePins(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	try := func(dir string) (*Loader, error) {
		return Open(t.Context(), Options{Tier: TierAuto, JournalSize: 128 << 10, PinDir: dir, Log: log})
	}
	t.Run("no bpffs", func(t *testing.T) {
		l, err := try(filepath.Join(t.TempDir(), "oom"))
		if err != nil || l.Pinned() {
			t.Fatalf("%v", err)
		}
		l.Close()
	})
	t.Run("another program", func(t *testing.T) {
		dir := filepath.Join(oomtest.BPFFS(t), "oom")
		l := openPinned(t, dir, 128<<10)
		l.state.Magic = 17
		l.Close()
		if _, err := try(dir); err == nil || !strings.Contains(err.Error(), "begins with 0x11") || !strings.Contains(err.Error(), "unload --force") {
			t.Errorf("open: %v", err)
		}
		if _, err := Unload(t.Context(), dir, false); err == nil {
			t.Error("unloaded without force")
		}
		if _, err := Unload(t.Context(), dir, true); err != nil {
			t.Error(err)
		}
	})
	// What another version has not published is left, exactly, and its program records no more.
	t.Run("another version", func(t *testing.T) {
		dir := filepath.Join(oomtest.BPFFS(t), "oom")
		l := openPinned(t, dir, 128<<10)
		l.SetKernelBase(0)
		group := oomtest.New(t, 8*mib)
		oomtest.Storm(t, group, 3, 16, "plain")
		l.Ack(1, 1)
		l.state.Version = stateVersion + 1
		l.Close()
		oomtest.Storm(t, group, 2, 16, "plain")
		if n, err := Unload(t.Context(), dir, false); err == nil || n < 4 {
			t.Errorf("unloaded with %d unread: %v", n, err)
		}
		l, err := try(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(l.Close)
		if left := l.Left(); left == nil || left.Acked != 1 || left.Head < 5 || !l.Fresh() || l.Counts().Head != 0 {
			t.Errorf("left %+v, fresh %t, %+v", left, l.Fresh(), l.Counts())
		}
		l.SetKernelBase(0)
		r := read(t, l, true)
		killed := oomtest.Storm(t, group, 2, 16, "plain")
		caughtUp(t, l)
		r.stop()
		mustHave(t, r.pids, killed)
		l.Close()
		// The next one goes on in the new state.
		if l, err = try(dir); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(l.Close)
		if l.Left() != nil || l.Fresh() {
			t.Error("the state of the other version is still there")
		}
		l.Close()
		if _, err := Unload(t.Context(), dir, true); err != nil {
			t.Error(err)
		}
	})
	t.Run("no state", func(t *testing.T) {
		dir := filepath.Join(oomtest.BPFFS(t), "oom")
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		m, err := ebpf.NewMap(&ebpf.MapSpec{Type: ebpf.Array, KeySize: 4, ValueSize: 24, MaxEntries: 1, Flags: unix.BPF_F_MMAPABLE})
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		if err := m.Pin(filepath.Join(dir, statePin)); err != nil {
			t.Fatal(err)
		}
		if _, err := try(dir); err == nil || !strings.Contains(err.Error(), "is not the state of an oom-tracer") {
			t.Errorf("open: %v", err)
		}
		if _, err := Unload(t.Context(), dir, true); err != nil {
			t.Error(err)
		}
	})
	t.Run("records of another version", func(t *testing.T) {
		dir := filepath.Join(oomtest.BPFFS(t), "oom")
		l := openPinned(t, dir, 128<<10)
		killed := oomtest.Storm(t, oomtest.New(t, 8*mib), 2, 16, "plain")
		own := l.pins.generation(l.generation)
		// As if a later version had written them.
		data := l.journal.slot(0)[segmentHeader:]
		for range l.Counts().Head {
			data[0] = wire.ABIVersion + 1
			data = data[(binary.NativeEndian.Uint32(data[sizeOffset:])+7)/8*8:]
		}
		head := l.Counts().Head
		l.Close()
		if err := os.Rename(filepath.Join(own, journalPin+journalVersion), filepath.Join(own, journalPin+"99")); err != nil {
			t.Fatal(err)
		}
		l, err := try(dir)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(l.Close)
		// They come, each with its seq, and the decoder says that it cannot read them.
		var seqs []uint64
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() {
			done <- l.Run(ctx, Handler{
				Record: func(seq uint64, sample []byte) bool {
					if _, err := wire.Decode(sample); seq <= head && !errors.Is(err, wire.ErrSample) {
						t.Errorf("seq %d is read as one of ours: %v", seq, err)
					}
					seqs = append(seqs, seq)
					l.Ack(seq, seq)
					return true
				},
				Lost: func(first, last uint64, _ bool) bool { t.Errorf("lost %d-%d", first, last); return true },
			})
		}()
		caughtUp(t, l)
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		if len(seqs) < len(killed) || seqs[0] != 1 {
			t.Errorf("seqs %v of %d records", seqs, head)
		}
		l.Close()
		if _, err := Unload(t.Context(), dir, false); err != nil {
			t.Error(err)
		}
	})
	t.Run("half a generation", func(t *testing.T) {
		// A tracer was killed while it pinned: what it left is removed, and what speaks goes on.
		dir := filepath.Join(oomtest.BPFFS(t), "oom")
		l := openPinned(t, dir, 128<<10)
		l.Close()
		if err := os.Mkdir(filepath.Join(dir, "7"), 0o700); err != nil {
			t.Fatal(err)
		}
		killed := oomtest.Storm(t, oomtest.New(t, 8*mib), 2, 16, "plain")
		l = openPinned(t, dir, 128<<10)
		r := read(t, l, true)
		caughtUp(t, l)
		r.stop()
		mustHave(t, r.pids, killed)
		if l.generation != 8 {
			t.Errorf("generation %d", l.generation)
		}
		if entries, err := os.ReadDir(dir); err != nil || len(entries) != 2 {
			t.Errorf("left: %v, %v", entries, err)
		}
		l.Close()
		if _, err := Unload(t.Context(), dir, false); err != nil {
			t.Error(err)
		}
	})
}

// TestTakeOver: tracers take over from each other all through a storm, without a pause. Each kill is recorded
// once, by one of them.
func TestTakeOver(t *testing.T) {
	dir := filepath.Join(oomtest.BPFFS(t), "oom")
	l := openPinned(t, dir, 2<<20)
	group, hog := oomtest.New(t, 4*mib), oomtest.Program(t, "hog")
	var over atomic.Bool
	storm := make(chan []int, 1)
	go func() {
		var killed []int
		for !over.Load() {
			some, err := oomtest.RunStorm(t.Context(), group, hog, 10, 8, "plain")
			if err != nil {
				t.Error(err)
			}
			killed = append(killed, some...)
		}
		storm <- killed
	}()
	for range 4 {
		l.Close()
		l = openPinned(t, dir, 2<<20)
	}
	over.Store(true)
	killed := <-storm
	r := read(t, l, true)
	caughtUp(t, l)
	r.stop()
	if len(killed) < 20 || len(r.lost) > 0 {
		t.Errorf("%d kills, lost %v", len(killed), r.lost)
	}
	mustHave(t, r.pids, killed)
	l.Close()
	if _, err := Unload(t.Context(), dir, false); err != nil {
		t.Error(err)
	}
}

// TestForeignPins: in a bpffs that everybody can write to, as mount -t bpf makes it, another user leads the tracer
// nowhere: it deletes nothing, pins nothing there, and watches all the same.
func TestForeignPins(t *testing.T) {
	oomtest.Slow(t)
	sharedBPFFS := func(t *testing.T) string {
		dir := oomtest.SharedDir(t)
		if err := unix.Mount("bpf", dir, "bpf", 0, "mode=1777"); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Error(err)
			}
		})
		return dir
	}
	// precious is a directory of root's, with files that are named as ours are.
	precious := func(t *testing.T) (dir string, intact func()) {
		dir = oomtest.SharedDir(t)
		if err := os.Chmod(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		files := []string{"journal-v1", "oom_mark_victim", "state", "passwd"}
		for _, name := range files {
			if err := os.WriteFile(filepath.Join(dir, name), []byte("precious"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return dir, func() {
			t.Helper()
			for _, name := range files {
				if data, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(data) != "precious" {
					t.Errorf("%s: %q, %v", name, data, err)
				}
			}
		}
	}
	try := func(t *testing.T, dir string) (pinned bool, err error) {
		log := &oomtest.Output{}
		l, err := Open(t.Context(), Options{Tier: TierNone, JournalSize: 128 << 10, PinDir: dir, Log: slog.New(slog.NewTextHandler(log, nil))})
		if err != nil {
			return false, err
		}
		defer l.Close()
		if !l.Pinned() && !strings.Contains(log.String(), "mode=0700") {
			t.Errorf("no remedy in:\n%s", log)
		}
		return l.Pinned(), nil
	}
	for name, script := range map[string]string{
		"a link to a directory":            "ln -s TARGET oom",
		"a generation that is a link":      "mkdir oom; ln -s TARGET oom/1",
		"a generation of links":            "mkdir oom; mkdir oom/1; for f in journal-v1 oom_mark_victim; do ln -s TARGET/$f oom/1/$f; done",
		"a state that is a link":           "mkdir oom; ln -s TARGET/state oom/state",
		"a directory that others may read": "mkdir -m 0755 oom",
	} {
		t.Run(name, func(t *testing.T) {
			shared := sharedBPFFS(t)
			dir := filepath.Join(shared, "oom")
			target, intact := precious(t)
			oomtest.RunAsNobody(t, shared, strings.ReplaceAll(script, "TARGET", target))
			if pinned, err := try(t, dir); err != nil || pinned {
				t.Errorf("pinned %v, %v", pinned, err)
			}
			if _, err := Unload(t.Context(), dir, true); !errors.Is(err, statedir.ErrUnsafe) {
				t.Errorf("unload: %v", err)
			}
			intact()
			// The remedy of the error, without a look at what is in the directory.
			if err := os.Lchown(dir, 0, 0); err != nil {
				t.Fatal(err)
			}
			if info, err := os.Lstat(dir); err == nil && info.IsDir() {
				if err := os.Chmod(dir, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			_, err := try(t, dir)
			_, unloadErr := Unload(t.Context(), dir, true)
			t.Logf("after chown root: %v; unload: %v", err, unloadErr)
			intact()
		})
	}
	t.Run("a race", func(t *testing.T) {
		shared := sharedBPFFS(t)
		target, intact := precious(t)
		oomtest.LoopAsNobody(t, shared, "mkdir oom; ln -s "+target+" oom/1; rm oom/1; rmdir oom; ln -s "+target+" oom; rm oom")
		dir := filepath.Join(shared, "oom")
		refused, opened := 0, 0
		for deadline := time.Now().Add(30 * time.Second); min(refused, opened) < 1000 && time.Now().Before(deadline); {
			p, err := lockPins(ended(t), dir)
			if err != nil {
				refused++
				continue
			}
			opened++
			p.close()
			if _, err := Unload(ended(t), dir, true); err != nil {
				t.Errorf("our own: %v", err)
			}
		}
		t.Logf("refused %d times, opened %d times", refused, opened)
		if min(refused, opened) < 1000 {
			t.Error("the race was not run")
		}
		intact()
	})
	t.Run("what is no pin", func(t *testing.T) {
		target, _ := precious(t)
		own := filepath.Join(t.TempDir(), "1")
		if err := os.Mkdir(own, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{"journal-v1", "oom_mark_victim", "fentry_out_of_memory", "kprobe_out_of_memory", "passwd"} {
			if err := os.WriteFile(filepath.Join(own, name), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if err := os.Symlink(target, filepath.Join(own, "oom_link")); err != nil {
			t.Fatal(err)
		}
		if err := remove(own); err != nil {
			t.Error(err)
		}
		var left []string
		entries, err := os.ReadDir(own)
		for _, entry := range entries {
			left = append(left, entry.Name())
		}
		if err != nil || strings.Join(left, " ") != "oom_link passwd" {
			t.Errorf("left: %v, %v", left, err)
		}
	})
}
