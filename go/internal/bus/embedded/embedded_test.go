package embedded_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/bus/embedded"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// childDir, in the environment, makes this binary a second oom-tracer on that directory.
const childDir = "TEST_EMBEDDED_DIR"

func TestMain(m *testing.M) {
	if dir := os.Getenv(childDir); dir != "" {
		s, err := embedded.Start(config.Embedded{Listen: "127.0.0.1:0", Dir: dir}, slog.New(slog.DiscardHandler))
		if err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		fmt.Println("ready:", s.ClientURL())
		bufio.NewReader(os.Stdin).ReadByte() // until the parent lets go
		os.Exit(0)                           // without a shutdown
	}
	os.Exit(m.Run())
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func wantError(t *testing.T, err error, words ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error, want one with %q", words)
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("error %q does not say %q", err, w)
		}
	}
}

// logs keeps what is logged.
type logs struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logs) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logs) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

func newLog() (*slog.Logger, *logs) {
	l := &logs{}
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug})), l
}

func context10s(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func start(t *testing.T, cfg config.Embedded) *embedded.Server {
	t.Helper()
	log, _ := newLog()
	s, err := embedded.Start(cfg, log)
	check(t, err)
	t.Cleanup(func() { s.Shutdown(context10s(t)) })
	return s
}

func connect(t *testing.T, cfg config.Embedded) *bus.Conn {
	t.Helper()
	c, err := bus.Connect(context10s(t), config.NATS{Embedded: cfg}, bus.Options{Name: "test"}, slog.New(slog.DiscardHandler))
	check(t, err)
	t.Cleanup(c.Close)
	return c
}

var streamConfig = config.Stream{MaxAge: time.Hour, MaxBytes: 1 << 30, Replicas: 1, DedupWindow: 2 * time.Minute}

func modeOf(t *testing.T, path string) fs.FileMode {
	t.Helper()
	info, err := os.Lstat(path)
	check(t, err)
	return info.Mode()
}

// What was stored is there after a restart, under the same password, with and without fsync.
func TestRestart(t *testing.T) {
	for _, sync := range []bool{false, true} {
		t.Run(fmt.Sprint("sync=", sync), func(t *testing.T) {
			ctx := context10s(t)
			cfg := config.Embedded{Listen: "127.0.0.1:0", Dir: filepath.Join(t.TempDir(), "a", "b"), SyncAlways: sync}
			var password string
			for i := range 3 {
				log, logged := newLog()
				s, err := embedded.Start(cfg, log)
				check(t, err)
				if m := modeOf(t, cfg.Dir); m.Perm() != 0o700 {
					t.Errorf("directory has mode %04o", m.Perm())
				}
				if m := modeOf(t, bus.PasswordFile(cfg.Dir)); m != 0o600 {
					t.Errorf("password file has mode %v", m)
				}
				data, err := os.ReadFile(bus.PasswordFile(cfg.Dir))
				check(t, err)
				if i == 0 {
					password = string(data)
				} else if string(data) != password {
					t.Error("the password changed")
				}
				address, err := os.ReadFile(bus.AddressFile(cfg.Dir))
				check(t, err)
				if got := "nats://" + strings.TrimSpace(string(address)); got != s.ClientURL() || strings.HasSuffix(got, ":0") {
					t.Errorf("address file says %s, server %s", got, s.ClientURL())
				}

				c := connect(t, cfg)
				check(t, bus.EnsureStreams(ctx, c, streamConfig))
				stream, err := c.JetStream().Stream(ctx, event.StreamName)
				check(t, err)
				if n := stream.CachedInfo().State.Msgs; n != uint64(i) {
					t.Errorf("start %d finds %d messages", i, n)
				}
				_, err = c.JetStream().Publish(ctx, "oom.v1.kill.global.a", []byte("x"), jetstream.WithMsgID(strconv.Itoa(i)))
				check(t, err)
				// The dedup window lasts over the restart.
				ack, err := c.JetStream().Publish(ctx, "oom.v1.kill.global.a", []byte("x"), jetstream.WithMsgID("0"))
				check(t, err)
				if !ack.Duplicate {
					t.Errorf("start %d has forgotten an ID", i)
				}
				check(t, s.Healthy())
				c.Close()
				check(t, s.Shutdown(ctx))
				check(t, s.Shutdown(ctx))
				if s.Healthy() == nil {
					t.Error("healthy after its end")
				}
				if _, err := os.Stat(bus.AddressFile(cfg.Dir)); !errors.Is(err, fs.ErrNotExist) {
					t.Errorf("the address file is left: %v", err)
				}
				text := logged.String()
				if strings.Contains(text, strings.TrimSpace(password)) {
					t.Error("the password was logged")
				}
				if strings.Contains(text, "level=WARN") || strings.Contains(text, "level=ERROR") {
					t.Errorf("warnings in an ordinary life:\n%s", text)
				}
				if !strings.Contains(text, "level=DEBUG msg=\"nats-server says\" text=\"Server is ready\"") {
					t.Errorf("the server's own words are missing:\n%s", text)
				}
			}
		})
	}
}

// Only its user gets in.
func TestLogin(t *testing.T) {
	cfg := config.Embedded{Listen: "localhost:0", Dir: t.TempDir()}
	s := start(t, cfg)
	password, err := bus.ReadEmbeddedPassword(cfg.Dir)
	check(t, err)
	for _, option := range []nats.Option{
		nats.UserInfo("", ""),
		nats.UserInfo(bus.EmbeddedUser, ""),
		nats.UserInfo(bus.EmbeddedUser, password+"x"),
		nats.UserInfo(bus.EmbeddedUser, password[:10]),
		nats.UserInfo("admin", password),
		nats.Token(password),
	} {
		if nc, err := nats.Connect(s.ClientURL(), option); !errors.Is(err, nats.ErrAuthorization) {
			t.Errorf("login says %v", err)
			if nc != nil {
				nc.Close()
			}
		}
	}
	nc, err := nats.Connect(s.ClientURL(), nats.UserInfo(bus.EmbeddedUser, password))
	check(t, err)
	nc.Close()
}

func TestListen(t *testing.T) {
	log, _ := newLog()
	for listen, words := range map[string][]string{
		"0.0.0.0:4222":      {"nats.embedded.listen", `"0.0.0.0"`, "not a loopback address", "nats.url"},
		":4222":             {"not a loopback address"},
		"[::]:4222":         {"not a loopback address"},
		"192.0.2.1:4222":    {"not a loopback address"},
		"nats.example:4222": {"not a loopback address"},
		"127.0.0.1":         {"nats.embedded.listen", "missing port"},
		"127.0.0.1:nats":    {"nats.embedded.listen", "not a port"},
		"127.0.0.1:70000":   {"not a port"},
	} {
		dir := filepath.Join(t.TempDir(), "nats")
		_, err := embedded.Start(config.Embedded{Listen: listen, Dir: dir}, log)
		wantError(t, err, words...)
		if _, err := os.Stat(dir); err == nil {
			t.Errorf("%s: the directory was made", listen)
		}
	}
	if l, err := net.Listen("tcp", "[::1]:0"); err == nil {
		l.Close()
		s := start(t, config.Embedded{Listen: "[::1]:0", Dir: t.TempDir()})
		if !strings.HasPrefix(s.ClientURL(), "nats://[::1]:") {
			t.Errorf("it listens on %s", s.ClientURL())
		}
	}
}

func TestPortInUse(t *testing.T) {
	// Below the ports that the kernel hands out: nobody is given it by chance before it is used again.
	var l net.Listener
	err := errors.New("no port yet")
	for err != nil {
		l, err = net.Listen("tcp", fmt.Sprintf("127.0.0.1:%d", 15000+rand.IntN(15000)))
	}
	log, logged := newLog()
	cfg := config.Embedded{Listen: l.Addr().String(), Dir: t.TempDir()}
	_, err = embedded.Start(cfg, log)
	wantError(t, err, "address "+cfg.Listen+" is in use", "is another oom-tracer running?")
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("%v does not wrap EADDRINUSE", err)
	}
	if logged.String() != "" {
		t.Errorf("logged and returned: %s", logged)
	}
	l.Close()
	start(t, cfg) // the directory is free again
}

// Two servers never share a directory, neither in one process nor in two.
func TestDirInUse(t *testing.T) {
	cfg := config.Embedded{Listen: "127.0.0.1:0", Dir: t.TempDir()}
	log, _ := newLog()
	child := func() (*exec.Cmd, func(), string) {
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), childDir+"="+cfg.Dir)
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		in, err := cmd.StdinPipe()
		check(t, err)
		out, err := cmd.StdoutPipe()
		check(t, err)
		check(t, cmd.Start())
		line, _ := bufio.NewReader(out).ReadString('\n')
		return cmd, func() { in.Close(); cmd.Wait() }, line
	}

	s, err := embedded.Start(cfg, log)
	check(t, err)
	_, err = embedded.Start(cfg, log)
	wantError(t, err, cfg.Dir, fmt.Sprintf("in use by process %d", os.Getpid()), "is another oom-tracer running?")
	_, stop, line := child()
	stop()
	if !strings.HasPrefix(line, "error:") || !strings.Contains(line, fmt.Sprintf("in use by process %d", os.Getpid())) {
		t.Errorf("the second process says %q", line)
	}
	check(t, s.Shutdown(context10s(t)))

	cmd, stop, line := child()
	if !strings.HasPrefix(line, "ready:") {
		t.Fatalf("the process alone says %q", line)
	}
	_, err = embedded.Start(cfg, log)
	wantError(t, err, fmt.Sprintf("in use by process %d", cmd.Process.Pid))
	// This process finds the other's server from the configuration alone.
	c := connect(t, cfg)
	check(t, bus.EnsureStreams(context10s(t), c, streamConfig))
	c.Close()
	check(t, cmd.Process.Kill())
	stop()
	start(t, cfg) // whatever ended the other, the directory is free
	c = connect(t, cfg)
	if h := c.Check(context10s(t)); !h.Stream {
		t.Errorf("the stream of the killed process is gone: %+v", h)
	}
}

// A password that others may know or have changed is neither used nor replaced.
func TestPasswordFile(t *testing.T) {
	const good = "abcdefghijklmnopqrstuvwxyzABCDEF0123456789_-\n"
	log, _ := newLog()
	for name, c := range map[string]struct {
		text string
		mode fs.FileMode
		want string
	}{
		"good":         {good, 0o600, ""},
		"good and 400": {good, 0o400, ""},
		"group":        {good, 0o640, "has mode 0640"},
		"others":       {good, 0o604, "has mode 0604"},
		"writable":     {good, 0o622, "has mode 0622"},
		"empty":        {"", 0o600, "is empty"},
		"garbled":      {good[:20] + "\x00\xff" + good[20:], 0o600, "does not hold a generated password"},
		"cut short":    {good[:10], 0o600, "does not hold a generated password"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config.Embedded{Listen: "127.0.0.1:0", Dir: filepath.Join(t.TempDir(), "nats")}
			check(t, os.Mkdir(cfg.Dir, 0o700))
			path := bus.PasswordFile(cfg.Dir)
			check(t, os.WriteFile(path, []byte(c.text), c.mode))
			check(t, os.Chmod(path, c.mode))
			if c.want == "" {
				start(t, cfg)
				connect(t, cfg)
				return
			}
			_, err := embedded.Start(cfg, log)
			wantError(t, err, path, c.want, "delete it")
			data, err := os.ReadFile(path)
			check(t, err)
			if string(data) != c.text {
				t.Error("the file was changed")
			}
			check(t, os.Remove(path))
			start(t, cfg)
		})
	}
	t.Run("unreadable", func(t *testing.T) {
		cfg := config.Embedded{Listen: "127.0.0.1:0", Dir: filepath.Join(t.TempDir(), "nats")}
		check(t, os.Mkdir(cfg.Dir, 0o700))
		check(t, os.Mkdir(bus.PasswordFile(cfg.Dir), 0o700)) // root reads every file, but no directory
		_, err := embedded.Start(cfg, log)
		wantError(t, err, bus.PasswordFile(cfg.Dir), "not a regular file")
	})
}

// The directory is made private when it is ours, and left alone when it is not.
func TestDir(t *testing.T) {
	log, _ := newLog()
	listen := "127.0.0.1:0"
	empty := filepath.Join(t.TempDir(), "empty")
	check(t, os.Mkdir(empty, 0o755)) // as the kubelet makes it
	s := start(t, config.Embedded{Listen: listen, Dir: empty})
	if m := modeOf(t, empty); m.Perm() != 0o700 {
		t.Errorf("mode is %04o", m.Perm())
	}
	check(t, s.Shutdown(context10s(t)))
	check(t, os.Chmod(empty, 0o755))
	start(t, config.Embedded{Listen: listen, Dir: empty})
	if m := modeOf(t, empty); m.Perm() != 0o700 {
		t.Errorf("mode is %04o", m.Perm())
	}

	foreign := t.TempDir()
	check(t, os.WriteFile(filepath.Join(foreign, "file"), nil, 0o600))
	check(t, os.Chmod(foreign, 0o777))
	_, err := embedded.Start(config.Embedded{Listen: listen, Dir: foreign}, log)
	wantError(t, err, foreign, "mode 0777", "a directory of its own")
	if m := modeOf(t, foreign); m.Perm() != 0o777 {
		t.Errorf("mode is %04o", m.Perm())
	}

	file := filepath.Join(t.TempDir(), "file")
	check(t, os.WriteFile(file, nil, 0o600))
	_, err = embedded.Start(config.Embedded{Listen: listen, Dir: file}, log)
	wantError(t, err, "nats.embedded.dir", file)

	// What nats-server itself gives up on becomes an error, and the process lives.
	broken := t.TempDir()
	check(t, os.Chmod(broken, 0o700))
	check(t, os.WriteFile(filepath.Join(broken, "jetstream"), nil, 0o600))
	_, err = embedded.Start(config.Embedded{Listen: listen, Dir: broken}, log)
	wantError(t, err, "start embedded nats-server", "JetStream", broken)
	if os.Geteuid() == 0 {
		other := filepath.Join(t.TempDir(), "other")
		check(t, os.Mkdir(other, 0o700))
		check(t, os.Chown(other, 65534, 65534))
		_, err = embedded.Start(config.Embedded{Listen: listen, Dir: other}, log)
		wantError(t, err, other, "belongs to user 65534")
	}
}
