package embedded_test

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/bus/embedded"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// tmpfs mounts a small disk.
func tmpfs(t *testing.T, options string) string {
	t.Helper()
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, options+",mode=0700"); err != nil {
		t.Fatalf("mount a tmpfs (this test runs as root): %v", err)
	}
	t.Cleanup(func() { check(t, unix.Unmount(dir, unix.MNT_DETACH)) })
	return dir
}

// fill fills the disk that dir is on, and returns how to free it again.
func fill(t *testing.T, dir string) (free func()) {
	t.Helper()
	path := filepath.Join(dir, "filler")
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE, 0o600)
	check(t, err)
	for _, size := range []int{1 << 16, 1 << 12, 1} {
		for err = nil; err == nil; {
			_, err = f.Write(make([]byte, size))
		}
		if !errors.Is(err, syscall.ENOSPC) {
			t.Fatal(err)
		}
	}
	check(t, f.Close())
	return func() { check(t, os.Remove(path)) }
}

// supervised is a server with the client that publishes to it.
type supervised struct {
	*embedded.Server
	conn      *bus.Conn
	publisher *bus.Publisher
	log       *oomtest.Output
	next      int
}

func supervise(t *testing.T, dir string) *supervised {
	t.Helper()
	log, logged := newLog()
	cfg := config.Embedded{Listen: "127.0.0.1:0", Dir: dir, SyncAlways: true}
	s, err := embedded.Start(cfg, log)
	check(t, err)
	t.Cleanup(func() { s.Shutdown(context10s(t)) })
	conn, err := bus.Connect(context10s(t), config.NATS{Embedded: cfg}, bus.Options{Name: "test", InProcess: s, Background: true}, log)
	check(t, err)
	t.Cleanup(conn.Close)
	set := func(ctx context.Context) error { return bus.EnsureStreams(ctx, conn, streamConfig) }
	if err := s.Ready(); err == nil {
		check(t, set(context10s(t)))
	} else {
		s.Suspect()
	}
	hooks := bus.Hooks{OnRetry: func(bus.Msg, error) { s.Suspect() }}
	publisher, err := bus.NewPublisher(conn, 1000, hooks, log)
	check(t, err)
	ctx, stop := context.WithCancel(context.Background())
	done := make(chan struct{}, 2)
	go func() { publisher.Run(ctx); done <- struct{}{} }()
	go func() {
		s.Supervise(ctx, set, publisher.Failing)
		done <- struct{}{}
	}()
	t.Cleanup(func() { stop(); <-done; <-done })
	return &supervised{Server: s, conn: conn, publisher: publisher, log: logged}
}

// publish hands over n messages of 4 KiB.
func (s *supervised) publish(t *testing.T, n int) {
	t.Helper()
	for range n {
		s.next++
		check(t, s.publisher.Enqueue(bus.Msg{ID: fmt.Sprint(s.next), Subject: "oom.v1.kill.global.test", Data: make([]byte, 4<<10)}))
	}
}

func until(t *testing.T, within time.Duration, what string, done func() bool) {
	t.Helper()
	for start := time.Now(); !done(); time.Sleep(50 * time.Millisecond) {
		if time.Since(start) > within {
			t.Fatalf("not within %s: %s", within, what)
		}
	}
}

// stored waits until every message is acknowledged, and holds the stream against that.
func (s *supervised) stored(t *testing.T, within time.Duration) {
	t.Helper()
	start := time.Now()
	until(t, within, "all is stored", func() bool { return s.publisher.Pending() == 0 })
	t.Logf("stored after %s", time.Since(start).Round(time.Millisecond))
	stream, err := s.conn.JetStream().Stream(context10s(t), "OOM")
	check(t, err)
	ids := map[string]bool{}
	for seq := stream.CachedInfo().State.FirstSeq; seq <= stream.CachedInfo().State.LastSeq; seq++ {
		m, err := stream.GetMsg(context10s(t), seq)
		check(t, err)
		ids[m.Header.Get("Nats-Msg-Id")] = true
	}
	if len(ids) != s.next || int(stream.CachedInfo().State.Msgs) != s.next {
		t.Errorf("%d messages with %d ids in the stream, want %d", stream.CachedInfo().State.Msgs, len(ids), s.next)
	}
	until(t, 10*time.Second, "it is ready", func() bool { return s.Ready() == nil })
	check(t, s.Healthy())
}

// unstored waits until the server says why nothing is stored; that is no reason to restart the process.
func (s *supervised) unstored(t *testing.T, reason string) {
	t.Helper()
	until(t, 30*time.Second, "it is not ready: "+reason, func() bool {
		err := s.Ready()
		return err != nil && strings.Contains(err.Error(), reason)
	})
	check(t, s.Healthy())
}

// The disk was full once. When it is free again all is stored, without a restart of the process.
func TestDiskFull(t *testing.T) {
	oomtest.Slow(t)
	dir := tmpfs(t, "size=12m")
	s := supervise(t, filepath.Join(dir, "nats"))
	s.publish(t, 20)
	s.stored(t, 10*time.Second)
	for round := range 2 { // a second time too
		free := fill(t, dir)
		s.publish(t, 3)
		s.unstored(t, "no space left on device")
		if round == 0 {
			time.Sleep(7 * time.Second) // more than one check
			s.unstored(t, "no space left on device")
		}
		if s.publisher.Pending() != 3 {
			t.Fatalf("%d of 3 messages wait", s.publisher.Pending())
		}
		free()
		s.stored(t, 30*time.Second)
	}
	if n := strings.Count(s.log.String(), "cannot store messages"); n > 6 {
		t.Errorf("%d warnings:\n%s", n, s.log)
	}
}

// The same where the stream's own messages have filled the disk, and the disk grows.
func TestDiskGrows(t *testing.T) {
	dir := tmpfs(t, "size=4m")
	s := supervise(t, filepath.Join(dir, "nats"))
	s.publish(t, 999)
	s.unstored(t, "no space left on device")
	check(t, unix.Mount("", dir, "tmpfs", unix.MS_REMOUNT, "size=24m"))
	s.stored(t, 30*time.Second)
}

// A disk that is full or read-only at the start.
func TestStartWithoutDisk(t *testing.T) {
	oomtest.Slow(t)
	t.Run("full", func(t *testing.T) {
		t.Parallel()
		dir := tmpfs(t, "size=12m")
		free := fill(t, dir)
		s := supervise(t, filepath.Join(dir, "nats"))
		s.publish(t, 3)
		s.unstored(t, "no space left on device")
		free()
		s.stored(t, 30*time.Second)
	})
	t.Run("full, with a store", func(t *testing.T) {
		t.Parallel()
		dir := tmpfs(t, "size=12m")
		log := slog.New(slog.DiscardHandler)
		store := filepath.Join(dir, "nats")
		before, err := embedded.Start(config.Embedded{Listen: "127.0.0.1:0", Dir: store}, log)
		check(t, err)
		check(t, bus.EnsureStreams(context10s(t), connect(t, config.Embedded{Listen: "127.0.0.1:0", Dir: store}), streamConfig))
		check(t, before.Shutdown(context10s(t)))
		free := fill(t, dir)
		s := supervise(t, store)
		s.publish(t, 3)
		s.unstored(t, "no space left on device")
		free()
		s.stored(t, 30*time.Second)
	})
	t.Run("read-only", func(t *testing.T) {
		t.Parallel()
		dir := tmpfs(t, "size=12m")
		check(t, unix.Mount("", dir, "tmpfs", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		s := supervise(t, filepath.Join(dir, "nats"))
		s.publish(t, 3)
		s.unstored(t, "read-only file system")
		check(t, unix.Mount("", dir, "tmpfs", unix.MS_REMOUNT, ""))
		s.stored(t, 30*time.Second)
	})
}

// A stream that somebody has deleted is made again.
func TestStreamDeleted(t *testing.T) {
	s := supervise(t, filepath.Join(t.TempDir(), "nats"))
	check(t, s.conn.JetStream().DeleteStream(context10s(t), "OOM"))
	s.publish(t, 3)
	s.stored(t, 40*time.Second)
}
