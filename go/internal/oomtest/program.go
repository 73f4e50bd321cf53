package oomtest

import (
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// FreeAddr is a loopback address that nobody uses now, and that nobody is given by chance: its port is
// below the range from which the kernel picks.
func FreeAddr(t testing.TB) string {
	t.Helper()
	for {
		addr := fmt.Sprintf("127.0.0.1:%d", 15000+rand.IntN(15000))
		if l, err := net.Listen("tcp", addr); err == nil {
			l.Close()
			return addr
		}
	}
}

// WriteConfig writes what the tests change of the default.
func WriteConfig(t testing.TB, cfg config.Config) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config.yaml")
	text := fmt.Sprintf(`node: {state_file: %q, status_interval: %s, cgroup_root: %q}
kernel: {tier: %s, notify: %s, journal_size: %d, pin_dir: %q}
nats:
  url: %q
  embedded: {dir: %q, listen: %q, sync_always: %t}
  stream: {max_bytes: %d}
metrics: {listen: %q}
log: {level: %s, format: %s, kills: %q}
`, cfg.Node.StateFile, cfg.Node.StatusInterval, cfg.Node.CgroupRoot, cfg.Kernel.Tier, cfg.Kernel.Notify, cfg.Kernel.JournalSize, cfg.Kernel.PinDir,
		cfg.NATS.URL, cfg.NATS.Embedded.Dir, cfg.NATS.Embedded.Listen, cfg.NATS.Embedded.SyncAlways, cfg.NATS.Stream.MaxBytes, cfg.Metrics.Listen,
		cfg.Log.Level, cfg.Log.Format, cfg.Log.Kills)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// Mount mounts a file system of a test's own, with these options.
func Mount(t testing.TB, fstype, dir string, flags uintptr, options ...string) {
	t.Helper()
	if err := unix.Mount(fstype, dir, fstype, flags, strings.Join(options, ",")); err != nil {
		t.Fatalf("mount %s at %s, which needs root: %v", fstype, dir, err)
	}
	t.Cleanup(func() {
		// With a bpffs goes everything that is still pinned in it.
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Error(err)
		}
	})
}

// SmallDisk mounts a disk that a test can fill.
func SmallDisk(t testing.TB, size string) (dir string, fill, free func()) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	dir = t.TempDir()
	Mount(t, "tmpfs", dir, 0, "size="+size, "mode=0700")
	filler := filepath.Join(dir, "filler")
	fill = func() {
		t.Helper()
		f, err := os.Create(filler)
		must(err)
		defer f.Close()
		for _, size := range []int{1 << 16, 1 << 12, 1} {
			for err == nil {
				_, err = f.Write(make([]byte, size))
			}
			err = nil
		}
	}
	return dir, fill, func() { must(os.Remove(filler)) }
}

// Golden compares got with a file of testdata, or writes it.
func Golden(t testing.TB, name, got string, update bool) {
	t.Helper()
	path := "testdata/" + name
	if update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), got); diff != "" {
		t.Errorf("%s (-golden +got; -update writes it):\n%s", path, diff)
	}
}

// Slow skips a test that takes more than some seconds in make quick, which runs with -short.
func Slow(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("slow: runs in make test")
	}
}
