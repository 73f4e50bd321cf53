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
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/bus/embedded"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
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
				check(t, s.Ready())
				c.Close()
				check(t, s.Shutdown(ctx))
				check(t, s.Shutdown(ctx))
				if s.Ready() == nil {
					t.Error("ready after its end")
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
				if !strings.Contains(text, "level=DEBUG msg=\"nats-server log\" text=\"Server is ready\"") {
					t.Errorf("the server's own words are missing:\n%s", text)
				}
			}
		})
	}
}

// Only its user gets in.
func TestLogin(t *testing.T) {
	cfg := config.Embedded{Listen: "127.0.0.1:0", Dir: t.TempDir()}
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
	for _, listen := range []string{
		"0.0.0.0:4222", ":4222", "[::]:4222", "192.0.2.1:4222", "nats.example:4222", "localhost:4222", "127.0.0.1", "127.0.0.1:nats", "127.0.0.1:70000",
	} {
		dir := filepath.Join(t.TempDir(), "nats")
		_, err := embedded.Start(config.Embedded{Listen: listen, Dir: dir}, log)
		wantError(t, err, "nats.embedded.listen", strconv.Quote(listen), "not a loopback address", "nats.url")
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
	if _, err := c.Check(context10s(t)); err != nil {
		t.Errorf("the stream of the killed process is gone: %v", err)
	}
}

// A password that others may know, or that a power cut has damaged, is made anew, and that is said.
func TestPasswordFile(t *testing.T) {
	const good = "abcdefghijklmnopqrstuvwxyzABCDEF0123456789_-\n"
	for name, c := range map[string]struct {
		text string
		mode fs.FileMode
		want string
	}{
		"good":         {good, 0o600, ""},
		"good and 400": {good, 0o400, ""},
		"group":        {good, 0o640, "has mode 0640"},
		"others":       {good, 0o604, "has mode 0604"},
		"empty":        {"", 0o600, "is empty"},
		"a line end":   {"\n", 0o600, "is empty"},
		"zeros":        {strings.Repeat("\x00", 44), 0o600, "does not hold a generated password"},
		"garbled":      {good[:20] + "\x00\xff" + good[20:], 0o600, "does not hold a generated password"},
		"cut short":    {good[:10], 0o600, "does not hold a generated password"},
		"too long":     {strings.Repeat(good, 1000), 0o600, "has 45000 bytes"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := config.Embedded{Listen: "127.0.0.1:0", Dir: filepath.Join(t.TempDir(), "nats")}
			check(t, os.Mkdir(cfg.Dir, 0o700))
			path := bus.PasswordFile(cfg.Dir)
			check(t, os.WriteFile(path, []byte(c.text), c.mode))
			check(t, os.Chmod(path, c.mode))
			log, logged := newLog()
			s, err := embedded.Start(cfg, log)
			check(t, err)
			defer s.Shutdown(context10s(t))
			connect(t, cfg)
			data, err := os.ReadFile(path)
			check(t, err)
			if (c.want == "") != (string(data) == c.text) {
				t.Errorf("the file holds %q", data)
			}
			text := logged.String()
			if (c.want != "") != strings.Contains(text, "replacing the password") || !strings.Contains(text, c.want) {
				t.Errorf("the log says:\n%s", text)
			}
			if m := modeOf(t, path); m.Perm()&0o077 != 0 {
				t.Errorf("mode %v", m)
			}
		})
	}
	t.Run("unreadable", func(t *testing.T) {
		cfg := config.Embedded{Listen: "127.0.0.1:0", Dir: filepath.Join(t.TempDir(), "nats")}
		check(t, os.Mkdir(cfg.Dir, 0o700))
		check(t, os.Mkdir(bus.PasswordFile(cfg.Dir), 0o700)) // root reads every file, but no directory
		log, _ := newLog()
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
	var err error
	for mode, words := range map[fs.FileMode]string{0o777: "chmod 0700", 0o755: "to another directory"} {
		check(t, os.Chmod(foreign, mode))
		_, err = embedded.Start(config.Embedded{Listen: listen, Dir: foreign}, log)
		wantError(t, err, foreign, fmt.Sprintf("mode %04o", mode), words)
		if m := modeOf(t, foreign); m.Perm() != mode {
			t.Errorf("mode is %04o", m.Perm())
		}
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

// What another user has put into the directory, before it was root's, leads root nowhere.
func TestForeignDir(t *testing.T) {
	for name, script := range map[string]string{
		"his":                         "true",
		"the directory is a link":     "rmdir ../nats; ln -s precious ../nats",
		"the lock is a link":          "ln -s ../precious/file lock",
		"the lock is a hard link":     "ln ../precious/file lock",
		"the lock is a FIFO":          "mkfifo lock",
		"the password is a link":      "ln -s ../precious/file password",
		"the password is his":         "echo abcdefghijklmnopqrstuvwxyzABCDEF0123456789_- >password; chmod 0600 password",
		"the password is a directory": "mkdir password",
		"the address is a link":       "ln -s ../precious/file address",
		"the store is a link":         "ln -s ../precious jetstream",
		"the store is his":            "mkdir jetstream",
		"a block of the store is his": "mkdir -p 'jetstream/$G/streams/OOM/msgs'; echo x >'jetstream/$G/streams/OOM/msgs/1.blk'",
	} {
		t.Run(name, func(t *testing.T) {
			shared := oomtest.SharedDir(t)
			precious := filepath.Join(shared, "precious")
			check(t, os.Mkdir(precious, 0o700))
			file := filepath.Join(precious, "file")
			check(t, os.WriteFile(file, []byte("precious"), 0o600))
			check(t, os.Chmod(file, 0o666)) // or the kernel forbids a hard link
			check(t, os.Chmod(precious, 0o755))
			oomtest.RunAsNobody(t, shared, "mkdir nats; cd nats; "+script)
			check(t, os.Chmod(file, 0o600))
			cfg := config.Embedded{Listen: "127.0.0.1:0", Dir: filepath.Join(shared, "nats")}
			log, _ := newLog()
			_, err := embedded.Start(cfg, log)
			wantError(t, err, cfg.Dir, "belongs to user 65534", "chown root")
			if name != "his" {
				// That remedy, without a look.
				check(t, os.Lchown(cfg.Dir, 0, 0))
				_, err = embedded.Start(cfg, log)
				wantError(t, err, cfg.Dir, "not safe from other users", "remove it")
			}
			if data, err := os.ReadFile(file); err != nil || string(data) != "precious" {
				t.Errorf("%q, %v", data, err)
			}
			if entries, err := os.ReadDir(precious); err != nil || len(entries) != 1 {
				t.Errorf("%v, %v", entries, err)
			}
		})
	}
}

// Whoever fills the port and says nothing, or guesses passwords, keeps out neither the process itself nor a client
// with the password, and takes a bounded part of memory and log.
func TestFlood(t *testing.T) {
	cfg := config.Embedded{Listen: "127.0.0.1:0", Dir: filepath.Join(t.TempDir(), "nats")}
	log, logged := newLog()
	s, err := embedded.Start(cfg, log)
	check(t, err)
	t.Cleanup(func() { s.Shutdown(context10s(t)) })
	early := connect(t, cfg)
	addr := strings.TrimPrefix(s.ClientURL(), "nats://")
	stop := make(chan struct{})
	var flood sync.WaitGroup
	var dialled atomic.Int64
	for i := range 4 {
		flood.Go(func() {
			var conns []net.Conn
			defer func() {
				for _, c := range conns {
					c.Close()
				}
			}()
			for {
				select {
				case <-stop:
					return
				default:
				}
				time.Sleep(2 * time.Millisecond) // so that this process can do something else too
				c, err := net.DialTimeout("tcp", addr, time.Second)
				if err != nil {
					continue
				}
				dialled.Add(1)
				if i%2 == 0 {
					fmt.Fprintf(c, "CONNECT {\"user\":\"%s\",\"pass\":\"guess\"}\r\nPING\r\n", bus.EmbeddedUser)
				}
				if conns = append(conns, c); len(conns) > 100 {
					conns[0].Close()
					conns = conns[1:]
				}
			}
		})
	}
	wait := func(n int64) {
		t.Helper()
		for deadline := time.Now().Add(time.Minute); dialled.Load() < n; time.Sleep(10 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("%d connections in a minute", dialled.Load())
			}
		}
	}
	wait(500)
	most := 0
	for range 5 {
		inProcess, err := bus.Connect(context10s(t), config.NATS{Embedded: cfg}, bus.Options{Name: "own", InProcess: s}, slog.New(slog.DiscardHandler))
		check(t, err)
		inProcess.Close()
		// It comes through at once, or soon where the machine is busy.
		var late *bus.Conn
		for try := range 5 {
			if late, err = bus.Connect(context10s(t), config.NATS{Embedded: cfg}, bus.Options{Name: "late"}, slog.New(slog.DiscardHandler)); err == nil {
				break
			}
			t.Logf("try %d: %v", try, err)
		}
		check(t, err)
		check(t, late.NATS().FlushTimeout(5*time.Second))
		check(t, early.NATS().FlushTimeout(5*time.Second))
		if !late.Connected() || !early.Connected() {
			t.Error("a client with the password is cut off")
		}
		late.Close()
		most = max(most, s.Clients())
		wait(dialled.Load() + 200)
	}
	if n := early.NATS().Statistics.Reconnects; n > 0 {
		t.Errorf("a client with the password was cut off %d times", n)
	}
	close(stop)
	flood.Wait()
	warnings := strings.Count(logged.String(), "level=ERROR") + strings.Count(logged.String(), "level=WARN")
	t.Logf("%d connections, %d at once in the server, %d warnings", dialled.Load(), most, warnings)
	if most > 80 || most == 0 {
		t.Errorf("the server has %d clients at once", most)
	}
	if warnings == 0 || warnings > 60 {
		t.Errorf("%d warnings", warnings)
	}
}
