package tap

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/cli"
	"github.com/oom-tracer/oom-tracer/go/internal/fifo"
)

// start starts a NATS server with its stream, for the life of the test.
func start(t *testing.T) *natsServer {
	t.Helper()
	s, err := startNATS(t.TempDir(), true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.stop(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func publish(t *testing.T, s *natsServer, args ...string) {
	t.Helper()
	if err := s.publish(func(data string) string { return data }, args...); err != nil {
		t.Fatal(err)
	}
}

// writerFunc is a writer.
type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(p []byte) (int, error) { return f(p) }

// A signal is a good end of what has no end. A replay that it cuts short is not whole, and says so.
func TestCancel(t *testing.T) {
	s := start(t)
	const n = 600 // more than are fetched at once
	for i := range n {
		publish(t, s, fmt.Sprint("id=", i))
	}
	for _, tt := range []struct {
		args   []string
		status int
		stderr string
	}{
		{[]string{"--since", "1h"}, 0, ""},
		{[]string{"--since", "1h", "--count", "1000"}, 0, ""},
		{[]string{"--since", "1h", "--no-follow"}, 1, "oom-tap: tail stream OOM: context canceled\n"},
	} {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		lines := 0
		stdout := writerFunc(func(p []byte) (int, error) {
			lines += bytes.Count(p, []byte("\n"))
			cancel()
			return len(p), nil
		})
		var stderr strings.Builder
		if status := cli.Run(ctx, Command("oom-tap", nil), append(tt.args, "--config", s.config), stdout, &stderr); status != tt.status || stderr.String() != tt.stderr {
			t.Errorf("%q: status %d, want %d; stderr %q, want %q", tt.args, status, tt.status, stderr.String(), tt.stderr)
		}
		if lines == 0 || lines == n {
			t.Errorf("%q: %d lines", tt.args, lines)
		}
	}
}

// Only the output's own pipe may close without a word.
func TestWriteErrors(t *testing.T) {
	s := start(t)
	publish(t, s)
	for _, tt := range []struct {
		err    error
		status int
		stderr string
	}{
		{&os.PathError{Op: "write", Path: "x", Err: syscall.EPIPE}, 0, ""},
		{&os.PathError{Op: "write", Path: "x", Err: syscall.ENOSPC}, 1, "oom-tap: write: write x: no space left on device\n"},
		{errors.New("no"), 1, "oom-tap: write: no\n"},
	} {
		var stderr strings.Builder
		stdout := writerFunc(func([]byte) (int, error) { return 0, tt.err })
		status := cli.Run(t.Context(), Command("oom-tap", nil), []string{"--config", s.config, "--since", "1h"}, stdout, &stderr)
		if status != tt.status || stderr.String() != tt.stderr {
			t.Errorf("%v: status %d, stderr %q", tt.err, status, stderr.String())
		}
	}
}

// openTerminal returns both ends of a pseudo-terminal: what it shows is read from the first.
func openTerminal(t *testing.T) (screen, terminal *os.File) {
	t.Helper()
	screen, err := os.OpenFile("/dev/ptmx", os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { screen.Close() })
	if err := unix.IoctlSetPointerInt(int(screen.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	n, err := unix.IoctlGetInt(int(screen.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|syscall.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	return screen, terminal
}

func TestTerminal(t *testing.T) {
	s := start(t)
	publish(t, s, "comm=a\u009b2J\u202e\U0001f4a5") // JSON leaves all of them as they are
	const (
		plainComm  = ` a\u009b2J\u202e\U0001f4a5[4242] `
		storedJSON = "\"a\u009b2J\u202e\U0001f4a5\""
		safeJSON   = `"a\u009b2J\u202e\ud83d\udca5"`
		bold       = "\x1b[1ma"
	)
	for _, tt := range []struct {
		name          string
		env           [2]string
		args          []string
		pipe          bool
		want, wantNot string
	}{
		{name: "color", want: bold},
		{name: "NO_COLOR", env: [2]string{"NO_COLOR", "1"}, want: plainComm, wantNot: "\x1b"},
		{name: "empty NO_COLOR", env: [2]string{"NO_COLOR", ""}, want: bold},
		{name: "dumb", env: [2]string{"TERM", "dumb"}, want: plainComm, wantNot: "\x1b"},
		{name: "never", args: []string{"--color", "never"}, want: plainComm, wantNot: "\x1b"},
		{name: "always", env: [2]string{"NO_COLOR", "1"}, args: []string{"--color", "always"}, want: bold},
		{name: "json", args: []string{"--output", "json"}, want: safeJSON, wantNot: "\u009b"},
		{name: "pipe", pipe: true, want: plainComm, wantNot: "\x1b"},
		{name: "pipe always", pipe: true, args: []string{"--color", "always"}, want: bold},
		{name: "pipe json", pipe: true, args: []string{"--output", "json"}, want: storedJSON, wantNot: `\u`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Setenv("NO_COLOR", "")
			t.Setenv("TERM", "xterm")
			if tt.env[0] != "" {
				t.Setenv(tt.env[0], tt.env[1])
			}
			var screen, stdout *os.File
			if tt.pipe {
				var err error
				if screen, stdout, err = os.Pipe(); err != nil {
					t.Fatal(err)
				}
				defer screen.Close()
			} else {
				screen, stdout = openTerminal(t)
			}
			var stderr strings.Builder
			status := cli.Run(t.Context(), Command("oom-tap", nil), append([]string{"--config", s.config, "--since", "1h", "--no-follow"}, tt.args...), stdout, &stderr)
			stdout.Close()
			shown, err := io.ReadAll(screen)
			if err != nil && !errors.Is(err, syscall.EIO) { // EIO is how a terminal ends
				t.Fatal(err)
			}
			if status != 0 || stderr.Len() != 0 {
				t.Errorf("status %d, stderr %s", status, &stderr)
			}
			if got := string(shown); strings.Count(got, "\n") != 1 || !strings.Contains(got, tt.want) || tt.wantNot != "" && strings.Contains(got, tt.wantNot) {
				t.Errorf("%q, want %q and not %q", got, tt.want, tt.wantNot)
			}
		})
	}
}

// However long the stream is, no more of it is kept; and what is not kept is shown, or counted.
func TestBounded(t *testing.T) {
	const kills = 3 * maxKills
	lines := 0
	stdout := writerFunc(func(p []byte) (int, error) {
		lines += bytes.Count(p, []byte("\n"))
		return len(p), nil
	})
	j := &joiner{out: &printer{out: stdout}, seen: fifo.New[struct{}](4 * maxKills), kills: map[string]*killed{}}
	s := &story{o: options{program: &program{name: "oom-tap"}, namespace: "shop", pod: "cart-0"}, results: map[string]event.Result{}, waiting: fifo.New[struct{}](maxKills)}
	for i := range kills {
		e := event.Event{Schema: event.Schema, ID: fmt.Sprint("k-", i), Node: event.Node{Name: "node-1"}, Scope: event.ScopeGlobal, Outcome: event.OutcomeKilled,
			Seq: uint64(i + 1), BoottimeNS: 1, Victim: event.Victim{PID: 1, TID: 1, Comm: "java"}, Time: time.Unix(1000, 0).UTC(), Container: &event.Container{PodUID: fmt.Sprint(i)}}
		r := message{id: e.ID, kill: &e}
		if err := j.take(bus.Stored{Time: time.Unix(1000, 0)}, r); err != nil {
			t.Fatal(err)
		}
		if s.take(&r) {
			t.Fatal("a kill of another pod is of the pod")
		}
	}
	if len(j.kills) != maxKills || len(j.order) != maxKills || lines != kills-maxKills {
		t.Errorf("%d kills are kept, %d are shown", len(j.kills), lines)
	}
	if err := s.unknown(); s.waiting.Len() != maxKills || err == nil || !strings.Contains(err.Error(), fmt.Sprintf("%d kills in pods have no outcome", kills)) {
		t.Errorf("%d kills are kept: %v", s.waiting.Len(), err)
	}
	// An hour later.
	if err := j.overdue(time.Unix(4600, 0)); err != nil || lines != kills {
		t.Errorf("%d kills are shown, %v", lines, err)
	}
}
