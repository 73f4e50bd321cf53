package bus_test

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
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
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// Every server of these tests is a real one on 127.0.0.1: embedded, or a process of its own.

const node = "node-1"

// timeout is the shortest that the package has. What takes less was not waiting for one, and
// a loaded machine has time enough.
const timeout = 5 * time.Second

// begin bounds a test and checks at its end that no goroutine is left.
func begin(t *testing.T) context.Context {
	t.Helper()
	before := runtime.NumGoroutine()
	t.Cleanup(func() { // runs last
		deadline := time.Now().Add(10 * time.Second)
		for runtime.NumGoroutine() > before {
			if time.Now().After(deadline) {
				buf := make([]byte, 1<<20)
				t.Errorf("%d goroutines at the start, %d at the end:\n%s", before, runtime.NumGoroutine(), buf[:runtime.Stack(buf, true)])
				return
			}
			time.Sleep(5 * time.Millisecond) // goroutines announce no end
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantError fails unless err's text holds all the words.
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

func newLog(t testing.TB) (*slog.Logger, *oomtest.Output) {
	l := &oomtest.Output{}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log:\n%s", l)
		}
	})
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug})), l
}

func quiet() *slog.Logger { return slog.New(slog.DiscardHandler) }

var streamConfig = config.Stream{MaxAge: time.Hour, MaxBytes: 64 << 20, Replicas: 1, DedupWindow: 2 * time.Minute}

// startEmbedded starts an embedded server on a free port.
func startEmbedded(t testing.TB) (config.NATS, *embedded.Server) {
	t.Helper()
	cfg := config.NATS{Embedded: config.Embedded{Listen: "127.0.0.1:0", Dir: filepath.Join(t.TempDir(), "nats")}}
	s, err := embedded.Start(cfg.Embedded, quiet())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
		defer cancel()
		if err := s.Shutdown(ctx); err != nil {
			t.Error(err)
		}
	})
	return cfg, s
}

// connect connects and closes at the end.
func connect(ctx context.Context, t testing.TB, cfg config.NATS, o bus.Options, log *slog.Logger) *bus.Conn {
	t.Helper()
	if o.Name == "" {
		o.Name = "test"
	}
	c, err := bus.Connect(ctx, cfg, o, log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// natsd is a nats-server process.
type natsd struct {
	t      testing.TB
	conf   string // without listen and store
	dir    string
	listen string
	cmd    *exec.Cmd
	done   chan struct{} // closed when it has ended
}

// buildNatsd builds nats-server once.
var buildNatsd = sync.OnceValues(func() (string, error) {
	cmd := exec.Command("../../../tools/build-module.sh", ".", "github.com/nats-io/nats-server/v2")
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	return strings.TrimSpace(string(out)), err
})

// startNatsd starts a server with JetStream, and conf added to its configuration.
func startNatsd(t testing.TB, conf string) *natsd {
	t.Helper()
	d := &natsd{t: t, dir: t.TempDir(), listen: freePort(t)}
	d.conf = jetstreamConf(d.dir) + conf + "\n"
	d.start()
	return d
}

// jetstreamConf syncs each message, which makes the server slow enough to be killed in the middle.
func jetstreamConf(dir string) string {
	return fmt.Sprintf("jetstream { store_dir: %q, sync_interval: always }\n", dir)
}

// start starts the process and waits until it takes connections. A second start uses the same port.
func (d *natsd) start() {
	d.t.Helper()
	binary, err := buildNatsd()
	if err != nil {
		d.t.Fatalf("build nats-server: %v", err)
	}
	conf := filepath.Join(d.t.TempDir(), "nats.conf")
	if err := os.WriteFile(conf, []byte("listen: "+d.listen+"\n"+d.conf), 0o600); err != nil {
		d.t.Fatal(err)
	}
	d.cmd = exec.Command(binary, "-c", conf)
	// Not to outlive a test that panics.
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	out, err := d.cmd.StderrPipe()
	if err != nil {
		d.t.Fatal(err)
	}
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	cmd, done, ready := d.cmd, make(chan struct{}), make(chan string, 1)
	d.done = done
	go func() {
		defer close(done)
		var seen strings.Builder
		for s := bufio.NewScanner(out); s.Scan(); {
			fmt.Fprintln(&seen, s.Text())
			if _, addr, ok := strings.Cut(s.Text(), "Listening for client connections on "); ok {
				d.listen = addr
			}
			if strings.HasSuffix(s.Text(), "Server is ready") {
				ready <- ""
			}
		}
		cmd.Wait()
		select {
		case ready <- seen.String():
		default:
		}
	}()
	d.t.Cleanup(func() {
		cmd.Process.Signal(syscall.SIGCONT)
		cmd.Process.Kill()
		<-done
	})
	select {
	case failed := <-ready:
		if failed != "" {
			d.t.Fatalf("nats-server ended:\n%s", failed)
		}
	case <-time.After(20 * time.Second):
		d.t.Fatal("nats-server is not ready after 20s")
	}
}

// kill ends the process without a warning.
func (d *natsd) kill() {
	d.cmd.Process.Kill()
	<-d.done
}

func (d *natsd) url() string { return "nats://" + d.listen }

// owner is the configuration of a client that may do everything.
func (d *natsd) owner() config.NATS { return config.NATS{URL: d.url()} }

// secret writes a file for a *_file key.
func secret(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "secret")
	check(t, os.WriteFile(path, []byte(text), 0o600))
	return path
}

// freePort returns an address on which nobody listens, and that nobody is given by chance, for its port is
// below the range from which the kernel picks: it is still free when a server is started there later, or
// again.
func freePort(t testing.TB) string {
	t.Helper()
	for {
		addr := fmt.Sprintf("127.0.0.1:%d", 15000+rand.IntN(15000))
		if l, err := net.Listen("tcp", addr); err == nil {
			l.Close()
			return addr
		}
	}
}

// recorder keeps what the hooks say.
type recorder struct {
	mu      sync.Mutex
	acks    []string
	dups    []string
	retries map[string][]error
	drops   map[string]error
	tags    []any
	changed chan struct{}
	onAck   func(n int) // n acks so far
}

func newRecorder() *recorder {
	return &recorder{retries: map[string][]error{}, drops: map[string]error{}, changed: make(chan struct{}, 1)}
}

func (r *recorder) note(f func()) {
	r.mu.Lock()
	f()
	r.mu.Unlock()
	select {
	case r.changed <- struct{}{}:
	default:
	}
}

func (r *recorder) hooks() bus.Hooks {
	return bus.Hooks{
		OnAck: func(m bus.Msg, duplicate bool) {
			n := 0
			r.note(func() {
				r.acks = append(r.acks, m.ID)
				r.tags = append(r.tags, m.Tag)
				if duplicate {
					r.dups = append(r.dups, m.ID)
				}
				n = len(r.acks)
			})
			if r.onAck != nil {
				r.onAck(n)
			}
		},
		OnRetry: func(m bus.Msg, err error) { r.note(func() { r.retries[m.ID] = append(r.retries[m.ID], err) }) },
		OnDrop: func(m bus.Msg, err error) *bus.Msg {
			r.note(func() { r.drops[m.ID] = err })
			return nil
		},
	}
}

// wait waits until cond holds of the record.
func (r *recorder) wait(ctx context.Context, t testing.TB, what string, cond func() bool) {
	t.Helper()
	for {
		r.mu.Lock()
		ok := cond()
		r.mu.Unlock()
		if ok {
			return
		}
		select {
		case <-r.changed:
		case <-ctx.Done():
			t.Fatalf("waiting for %s: %v", what, ctx.Err())
		}
	}
}

func (r *recorder) waitAcks(ctx context.Context, t testing.TB, n int) {
	t.Helper()
	r.wait(ctx, t, fmt.Sprintf("%d acks", n), func() bool { return len(r.acks) >= n })
}

// waiting makes a publisher that does not run yet: what is put into it then goes out together.
func waiting(t testing.TB, c *bus.Conn, capacity int, h bus.Hooks, log *slog.Logger) *bus.Publisher {
	t.Helper()
	p, err := bus.NewPublisher(c, capacity, h, log)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// publisher makes one and runs it until the end of the test, or until the returned function is called.
func publisher(t testing.TB, c *bus.Conn, capacity int, h bus.Hooks, log *slog.Logger) (*bus.Publisher, func()) {
	t.Helper()
	p := waiting(t, c, capacity, h, log)
	return p, run(t, p)
}

func run(t testing.TB, p *bus.Publisher) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := p.Run(ctx); err != nil {
			t.Errorf("run publisher: %v", err)
		}
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	return stop
}

func subject(t testing.TB, class, node string) string {
	t.Helper()
	s, err := event.Subject(event.KindKill, class, node)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// message is the i-th of many.
func message(t testing.TB, i int) bus.Msg {
	return bus.Msg{
		ID:      fmt.Sprintf("boot-%d-%d", i, 1000+i),
		Subject: subject(t, "global", node),
		Data:    fmt.Appendf(nil, `{"schema":"oom-tracer/v1","seq":%d}`, i),
		Tag:     i,
	}
}

func enqueue(t testing.TB, p *bus.Publisher, from, to int) {
	t.Helper()
	for i := from; i < to; i++ {
		if err := p.Enqueue(message(t, i)); err != nil {
			t.Fatal(err)
		}
	}
}

// stored reads the whole stream, not by way of Tail.
func stored(ctx context.Context, t *testing.T, cfg config.NATS) []*jetstream.RawStreamMsg {
	t.Helper()
	c := connect(ctx, t, cfg, bus.Options{Name: "reader"}, quiet())
	s, err := c.JetStream().Stream(ctx, event.StreamName)
	check(t, err)
	state := s.CachedInfo().State
	var all []*jetstream.RawStreamMsg
	for seq := state.FirstSeq; state.Msgs > 0 && seq <= state.LastSeq; seq++ {
		m, err := s.GetMsg(ctx, seq)
		check(t, err)
		all = append(all, m)
	}
	return all
}

// wantOnce checks that the messages 0..n-1 are stored, each once.
func wantOnce(t *testing.T, all []*jetstream.RawStreamMsg, n int) {
	t.Helper()
	times := map[string]int{}
	for _, m := range all {
		times[m.Header.Get(nats.MsgIdHdr)]++
	}
	for i := range n {
		if id := message(t, i).ID; times[id] != 1 {
			t.Errorf("%s is stored %d times", id, times[id])
		}
	}
	if len(all) != n {
		t.Errorf("%d messages are stored, want %d", len(all), n)
	}
}

// proxy stands between a client and a server, and can break what nothing else breaks on purpose.
type proxy struct {
	listener net.Listener
	mu       sync.Mutex
	conns    []net.Conn
	mute     bool       // what the server says does not arrive
	deaf     bool       // what the client says does not arrive
	gate     sync.Mutex // while it is locked, what the client says waits
	wg       sync.WaitGroup
}

func startProxy(t *testing.T, to string) *proxy {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	check(t, err)
	p := &proxy{listener: l}
	p.wg.Go(func() {
		for {
			client, err := l.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				client.Close()
				continue
			}
			p.mu.Lock()
			p.conns = append(p.conns, client, server)
			p.mu.Unlock()
			pump := func(dst, src net.Conn, lost *bool) {
				defer dst.Close()
				buf := make([]byte, 32<<10)
				for {
					n, err := src.Read(buf)
					if err != nil {
						return
					}
					p.mu.Lock()
					drop := *lost
					p.mu.Unlock()
					if drop {
						continue
					}
					if lost == &p.deaf {
						p.gate.Lock()
					}
					_, err = dst.Write(buf[:n])
					if lost == &p.deaf {
						p.gate.Unlock()
					}
					if err != nil {
						return
					}
				}
			}
			p.wg.Go(func() { pump(server, client, &p.deaf) })
			p.wg.Go(func() { pump(client, server, &p.mute) })
		}
	})
	t.Cleanup(func() {
		l.Close()
		p.cut()
		p.wg.Wait()
	})
	return p
}

func (p *proxy) addr() string { return p.listener.Addr().String() }

func (p *proxy) set(mute, deaf bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.mute, p.deaf = mute, deaf
}

// cut ends all connections.
func (p *proxy) cut() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, c := range p.conns {
		c.Close()
	}
	p.conns = nil
}

// idsOf lists the message IDs.
func idsOf(all []*jetstream.RawStreamMsg) []string {
	var ids []string
	for _, m := range all {
		ids = append(ids, m.Header.Get(nats.MsgIdHdr))
	}
	return ids
}
