package tap

import (
	"bufio"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"log/slog"
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
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/bus/embedded"
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

var update = flag.Bool("update", false, "write the files in testdata/script anew")

// patience bounds every wait for something that must happen.
const patience = 30 * time.Second

// noRaceSleep spares each program the second that the race detector waits at its end.
const noRaceSleep = "GORACE=atexit_sleep_ms=0"

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"oom-tap": func() { cli.Main(Command("oom-tap", nil)) }})
}

// TestScript runs testdata/script, with the real program and a real NATS server. Beyond testscript's own,
// the commands are
//
//	nats start [nostream]   start a server in ./nats; make ./config.yaml for it, ./url.yaml, which reaches it by URL
//	                        with the password in ./password, and the stream
//	nats stop               stop it
//	publish [key=value]...  store an event: id, seq, node, scope, outcome, comm; msgid (default: the id; none),
//	                        subject (default: the event's own), and file for other bytes than the event's:
//	                        those of the file, without the newline at its end
//	bucket key file         put the bytes of the file into the annotators' bucket
//	status N program...     run, and expect this exit status
//	start name program...   run in the background, and go on when it reads the stream
//	await name stdout N     wait until it has written so many lines (or stderr)
//	close name              close its standard output, as head does
//	signal name TERM        send a signal (or INT)
//	ended name N            wait for its end and expect this exit status; for stdout, stderr and cmp
func TestScript(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		RequireUniqueNames:  true,
		UpdateScripts:       *update,
		Setup: func(env *testscript.Env) error {
			w := &world{dir: env.WorkDir, procs: map[string]*process{}}
			env.Values["world"] = w
			env.Vars = append(env.Vars, noRaceSleep)
			env.Defer(w.end)
			return nil
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"nats": command(func(w *world, ts *testscript.TestScript, args []string) error {
				if args[0] == "stop" {
					return w.nats.stop()
				}
				var err error
				w.nats, err = startNATS(w.dir, len(args) == 1)
				return err
			}),
			"publish": command(func(w *world, ts *testscript.TestScript, args []string) error {
				return w.nats.publish(ts.ReadFile, args...)
			}),
			"bucket": command(func(w *world, ts *testscript.TestScript, args []string) error {
				ctx, cancel := context.WithTimeout(context.Background(), patience)
				defer cancel()
				data := ts.ReadFile(args[1])
				return w.nats.conn.KVEntry(args[0]).Update(ctx, func([]byte) ([]byte, error) { return []byte(strings.TrimSuffix(data, "\n")), nil })
			}),
			"status": command(func(w *world, ts *testscript.TestScript, args []string) error {
				return wantStatus(args[0], ts.Exec(args[1], args[2:]...))
			}),
			"start": command(func(w *world, ts *testscript.TestScript, args []string) error {
				p, err := w.nats.startProcess(ts.MkAbs("."), args[1], args[2:]...)
				w.procs[args[0]] = p
				return err
			}),
			"await": command(func(w *world, ts *testscript.TestScript, args []string) error {
				n, err := strconv.Atoi(args[2])
				if err != nil {
					return err
				}
				return w.procs[args[0]].await(args[1], n)
			}),
			"close": command(func(w *world, ts *testscript.TestScript, args []string) error {
				err := w.procs[args[0]].stdout.Close()
				// Another script's child has a copy until it calls exec: wait for those.
				syscall.ForkLock.RLock()
				defer syscall.ForkLock.RUnlock()
				return err
			}),
			"signal": command(func(w *world, ts *testscript.TestScript, args []string) error {
				return w.procs[args[0]].cmd.Process.Signal(map[string]os.Signal{"TERM": syscall.SIGTERM, "INT": syscall.SIGINT}[args[1]])
			}),
			"ended": command(func(w *world, ts *testscript.TestScript, args []string) error {
				p := w.procs[args[0]]
				select {
				case <-p.done:
				case <-time.After(patience):
					return fmt.Errorf("%s does not end", args[0])
				}
				fmt.Fprint(ts.Stdout(), p.text("stdout"))
				fmt.Fprint(ts.Stderr(), p.text("stderr"))
				return wantStatus(args[1], p.err)
			}),
		},
	})
}

func command(run func(*world, *testscript.TestScript, []string) error) func(*testscript.TestScript, bool, []string) {
	return func(ts *testscript.TestScript, neg bool, args []string) {
		if neg {
			ts.Fatalf("! is not understood here")
		}
		ts.Check(run(ts.Value("world").(*world), ts, args))
	}
}

// wantStatus compares an exit status with what a command ended with.
func wantStatus(want string, err error) error {
	status := 0
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		status = exit.ExitCode()
	case err != nil:
		return err
	}
	if strconv.Itoa(status) != want {
		return fmt.Errorf("exit status %d (%v), want %s", status, err, want)
	}
	return nil
}

// world is what a script has made.
type world struct {
	dir   string
	nats  *natsServer
	procs map[string]*process
}

func (w *world) end() {
	for _, p := range w.procs {
		p.kill()
	}
	if w.nats != nil {
		w.nats.stop()
	}
}

// natsServer is an embedded server on a free port, and a connection to it.
type natsServer struct {
	config string // the path of a config for it
	srv    *embedded.Server
	conn   *bus.Conn
	stop   func() error // once
}

func startNATS(dir string, stream bool) (*natsServer, error) {
	s := &natsServer{config: filepath.Join(dir, "config.yaml")}
	yaml := fmt.Sprintf("nats:\n  embedded:\n    listen: 127.0.0.1:0\n    dir: %s\n    sync_always: false\n", filepath.Join(dir, "nats"))
	if err := os.WriteFile(s.config, []byte(yaml), 0o600); err != nil {
		return nil, err
	}
	cfg, err := config.Load(s.config)
	if err != nil {
		return nil, err
	}
	log := slog.New(slog.DiscardHandler)
	if s.srv, err = embedded.Start(cfg.NATS.Embedded, log); err != nil {
		return nil, err
	}
	s.stop = sync.OnceValue(func() error {
		if s.conn != nil {
			s.conn.Close()
		}
		ctx, cancel := context.WithTimeout(context.Background(), patience)
		defer cancel()
		return s.srv.Shutdown(ctx)
	})
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if s.conn, err = bus.Connect(ctx, cfg.NATS, bus.Options{Name: "test"}, log); err != nil {
		return nil, errors.Join(err, s.stop())
	}
	password, err := os.ReadFile(bus.PasswordFile(cfg.NATS.Embedded.Dir))
	if err != nil {
		return nil, errors.Join(err, s.stop())
	}
	url := fmt.Sprintf("nats:\n  url: %s\n  user: %s\n  password_file: %s\n", s.srv.ClientURL(), bus.EmbeddedUser, filepath.Join(dir, "password"))
	err = errors.Join(
		os.WriteFile(filepath.Join(dir, "password"), password, 0o600),
		os.WriteFile(filepath.Join(dir, "url.yaml"), []byte(url), 0o600),
	)
	if stream {
		err = errors.Join(err, bus.EnsureStreams(ctx, s.conn, cfg.NATS.Stream))
	}
	if err != nil {
		return nil, errors.Join(err, s.stop())
	}
	return s, nil
}

// publish stores a message; see TestScript.
func (s *natsServer) publish(readFile func(string) string, args ...string) error {
	values := map[string]string{"id": "id-1", "seq": "1", "node": "node-1", "scope": "global", "outcome": "killed", "comm": "java"}
	for _, arg := range args {
		key, value, _ := strings.Cut(arg, "=")
		values[key] = value
	}
	seq, err := strconv.ParseUint(values["seq"], 10, 64)
	if err != nil {
		return err
	}
	e := event.Event{
		Schema: event.Schema, ID: values["id"], Seq: seq,
		Time:    time.Date(2026, 11, 23, 2, 3, 4, 5_000_000, time.UTC),
		Node:    event.Node{Name: values["node"]},
		Scope:   event.Scope(values["scope"]),
		Outcome: event.KillOutcome(values["outcome"]),
		Victim: event.Victim{
			PID: 4242, TID: 4242, Comm: values["comm"],
			Cgroup: &event.Cgroup{Path: "/system.slice", ID: 1, Version: 2},
			Memory: &event.Memory{AnonRSS: 1 << 30},
		},
		Limit: &event.Limit{Level: event.LevelNode},
	}
	data, err := json.Marshal(&e)
	if err != nil {
		return err
	}
	if values["file"] != "" {
		data = []byte(strings.TrimSuffix(readFile(values["file"]), "\n"))
	}
	subject := values["subject"]
	if subject == "" {
		if subject, err = e.Subject(); err != nil {
			return err
		}
	}
	var options []jetstream.PublishOpt
	if id := cmp.Or(values["msgid"], values["id"]); id != "none" {
		options = append(options, jetstream.WithMsgID(id))
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	ack, err := s.conn.JetStream().Publish(ctx, subject, data, options...)
	if err == nil && ack.Duplicate {
		return fmt.Errorf("the server has %s already", e.ID)
	}
	return err
}

// process is a program in the background.
type process struct {
	cmd    *exec.Cmd
	stdout *os.File
	done   chan struct{} // closed when it has ended
	err    error         // how; after done

	mu      sync.Mutex
	lines   map[string][]string // by stdout and stderr
	changed chan struct{}       // closed, and made anew, with each line
}

// startProcess returns when the process has made its consumer on the stream, or has ended: whatever is
// published after that, it will read.
func (s *natsServer) startProcess(dir, program string, args ...string) (*process, error) {
	created := make(chan *nats.Msg, 1)
	nc := s.conn.JetStream().Conn()
	sub, err := nc.ChanSubscribe("$JS.EVENT.ADVISORY.CONSUMER.CREATED."+event.StreamName+".>", created)
	if err != nil {
		return nil, err
	}
	defer sub.Unsubscribe()
	if err := nc.Flush(); err != nil {
		return nil, err
	}

	p := &process{done: make(chan struct{}), lines: map[string][]string{}, changed: make(chan struct{})}
	p.cmd = exec.Command(program, args...)
	p.cmd.Dir = dir
	p.cmd.Env = append(os.Environ(), noRaceSleep)
	// Not to outlive a test that panics.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var readers sync.WaitGroup
	pipe := func(name string) (read, write *os.File, err error) {
		if read, write, err = os.Pipe(); err != nil {
			return nil, nil, err
		}
		readers.Go(func() {
			defer read.Close()
			for lines := bufio.NewScanner(read); lines.Scan(); {
				p.mu.Lock()
				p.lines[name] = append(p.lines[name], lines.Text())
				close(p.changed)
				p.changed = make(chan struct{})
				p.mu.Unlock()
			}
		})
		return read, write, nil
	}
	stdout, out, err := pipe("stdout")
	if err != nil {
		return nil, err
	}
	defer out.Close()
	_, errOut, err := pipe("stderr")
	if err != nil {
		return nil, err
	}
	defer errOut.Close()
	p.stdout, p.cmd.Stdout, p.cmd.Stderr = stdout, out, errOut
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		defer close(p.done)
		p.err = p.cmd.Wait()
		readers.Wait()
	}()
	select {
	case <-created:
	case <-p.done:
	case <-time.After(patience):
		return p, errors.New("it does not read the stream")
	}
	return p, nil
}

// await waits until n lines were written to stdout or stderr.
func (p *process) await(name string, n int) error {
	deadline := time.After(patience)
	for {
		ended := false
		select {
		case <-p.done: // after the last line
			ended = true
		default:
		}
		p.mu.Lock()
		lines, changed := len(p.lines[name]), p.changed
		p.mu.Unlock()
		if lines >= n {
			return nil
		}
		if ended {
			return fmt.Errorf("it ended (%v) after\n%s%s", p.err, p.text("stdout"), p.text("stderr"))
		}
		select {
		case <-changed:
		case <-p.done:
		case <-deadline:
			return fmt.Errorf("%d lines on %s, want %d:\n%s%s", lines, name, n, p.text("stdout"), p.text("stderr"))
		}
	}
}

func (p *process) text(name string) string {
	p.mu.Lock()
	defer p.mu.Unlock()
	var all strings.Builder
	for _, line := range p.lines[name] {
		fmt.Fprintln(&all, line)
	}
	return all.String()
}

func (p *process) kill() {
	if p != nil && p.cmd.Process != nil {
		p.cmd.Process.Kill()
		<-p.done
	}
}
