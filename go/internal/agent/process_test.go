package agent

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

func TestMain(m *testing.M) {
	if addrs := os.Getenv(floodAddrs); addrs != "" {
		flood(strings.Fields(addrs))
	}
	os.Exit(oomtest.Alone{M: m}.Run())
}

// must ends the test on an error of its own set-up.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// The selftest's own lines are what is to be read: the log keeps quiet unless it is asked.
func TestSelftestLog(t *testing.T) {
	for _, tt := range []struct {
		flags []string
		want  string
	}{
		{nil, ""},
		{[]string{"--log-level", "info"}, "tracing oom kills"},
	} {
		run := exec.Command(oomtest.Program(t, "oom-tracer"), append([]string{"selftest", "--config", oomtest.WriteConfig(t, testConfig(t))}, tt.flags...)...)
		var log bytes.Buffer
		run.Stderr = &log
		if out, err := run.Output(); err != nil {
			t.Errorf("%v: %v\n%s", tt.flags, err, out)
		}
		if tt.want == "" && log.Len() > 0 || !strings.Contains(log.String(), tt.want) {
			t.Errorf("%v: the log says %q", tt.flags, &log)
		}
	}
}

// The printed lines are for whoever wants to read them. When that reader goes away the tracer goes on.
func TestReaderOfOutputGoesAway(t *testing.T) {
	cfg := testConfig(t)
	cfg.Metrics.Listen = oomtest.FreeAddr(t)
	tracer := exec.Command(oomtest.Program(t, "oom-tracer"), "--config", oomtest.WriteConfig(t, cfg), "--node-name", testNode)
	var log bytes.Buffer
	tracer.Stderr = &log
	reader, writer, err := os.Pipe()
	must(t, err)
	tracer.Stdout = writer
	must(t, tracer.Start())
	must(t, writer.Close())
	ended := make(chan error, 1)
	go func() { ended <- tracer.Wait() }()
	defer func() { _ = tracer.Process.Kill() }()
	for deadline := time.Now().Add(20 * time.Second); !obs.TracerRuns(t.Context(), cfg.Metrics.Listen); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the tracer does not come up:\n%s", &log)
		}
	}
	group := oomtest.New(t, 8<<20)
	oomtest.Storm(t, group, 1, 16, "plain")
	for lines := bufio.NewReader(reader); ; { // others' kills may be among them
		line, err := lines.ReadString('\n')
		must(t, err)
		if strings.Contains(line, "hog[") {
			break
		}
	}
	must(t, reader.Close())
	oomtest.Storm(t, group, 2, 16, "plain")
	ctx, cancel := context.WithTimeout(t.Context(), time.Second)
	defer cancel()
	select {
	case err := <-ended:
		t.Fatalf("it ended with its reader: %v\n%s", err, &log)
	case <-ctx.Done():
	}
	must(t, tracer.Process.Signal(syscall.SIGTERM))
	if err := <-ended; err != nil {
		t.Errorf("%v\n%s", err, &log)
	}
}

// silentServer takes connections and never says a word.
func silentServer(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			c, err := listener.Accept()
			if err != nil {
				return
			}
			t.Cleanup(func() { c.Close() })
		}
	}()
	return listener.Addr().String()
}

// A SIGTERM ends it within five seconds, also while NATS hangs and somebody hangs in a scrape; a second one ends
// it at once.
func TestSignals(t *testing.T) {
	oomtest.Slow(t)
	for _, tt := range []struct {
		name    string
		signals int
		within  time.Duration
	}{
		{"one", 1, 5 * time.Second},
		{"two", 2, time.Second},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := testConfig(t)
			cfg.NATS.URL = "nats://" + silentServer(t)
			cfg.Metrics.Listen = oomtest.FreeAddr(t)
			tracer := startProcess(t, cfg)
			until(t, "the tracer runs", func() bool { return obs.TracerRuns(t.Context(), cfg.Metrics.Listen) })
			oomtest.Storm(t, oomtest.New(t, 8<<20), 1, 16, "plain")
			slow, err := net.Dial("tcp", cfg.Metrics.Listen)
			must(t, err)
			defer slow.Close()
			_, err = slow.Write([]byte("GET /metrics HTTP/1.1\r\nHost: x\r\n"))
			must(t, err)
			begun := time.Now()
			for i := range tt.signals {
				if i > 0 {
					time.Sleep(100 * time.Millisecond) // or they may come as one
				}
				must(t, tracer.Process.Signal(syscall.SIGTERM))
			}
			stuck := time.AfterFunc(time.Minute, func() { _ = tracer.Process.Kill() })
			err = tracer.Wait()
			stuck.Stop()
			// What could not be published is said, and no success.
			if took := time.Since(begun); took > tt.within+100*time.Millisecond || err == nil {
				t.Errorf("it ended after %s with %v\n%s", took, err, &tracer.log)
			}
			if tt.signals == 1 && !strings.Contains(tracer.log.String(), "events could not be published before the stop") {
				t.Errorf("the log says\n%s", &tracer.log)
			}
		})
	}
}

// With log.format json every line on standard error is JSON, whatever the kernel refuses and however it ends; with
// log.kills json so is every kill on standard output, as it stands on NATS.
func TestJSONOutput(t *testing.T) {
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	defer taken.Close()
	for _, tt := range []struct {
		name, kills string
		change      func(*config.Config)
		fails       bool
	}{
		{"json", config.KillsJSON, func(*config.Config) {}, false},
		{"text", config.KillsText, func(*config.Config) {}, false},
		{"none", config.KillsNone, func(*config.Config) {}, false},
		{"the port is taken", config.KillsJSON, func(c *config.Config) { c.Metrics.Listen = taken.Addr().String() }, true},
		{"an unsafe directory", config.KillsJSON, func(c *config.Config) { c.NATS.Embedded.Dir = os.TempDir() }, true},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg := withListen(t, testConfig(t))
			cfg.Log = config.Log{Level: "debug", Format: "json", Kills: tt.kills}
			cfg.Metrics.Listen = oomtest.FreeAddr(t)
			tt.change(&cfg)
			tracer := exec.Command(oomtest.Program(t, "oom-tracer"), "--config", oomtest.WriteConfig(t, cfg), "--node-name", testNode)
			var out, log oomtest.Output
			tracer.Stdout, tracer.Stderr = &out, &log
			must(t, tracer.Start())
			if tt.fails {
				if tracer.Wait() == nil || !strings.Contains(log.String(), `"msg":"program failed","program":"oom-tracer"`) {
					t.Errorf("it ended well:\n%s", &log)
				}
			} else {
				until(t, "the tracer runs", func() bool { return obs.TracerRuns(t.Context(), cfg.Metrics.Listen) })
				group := oomtest.New(t, 8*mib)
				oomtest.Storm(t, group, 2, 16, "plain")
				want := stored(t, cfg, group, 2)
				must(t, tracer.Process.Signal(syscall.SIGTERM))
				must(t, tracer.Wait())
				printed := strings.Split(strings.TrimSpace(out.String()), "\n")
				if tt.kills == config.KillsNone && out.String() != "" || tt.kills == config.KillsText && strings.Contains(out.String(), "{") {
					t.Errorf("printed:\n%s", &out)
				}
				for _, e := range want {
					data, err := json.Marshal(e)
					must(t, err)
					if tt.kills == config.KillsJSON && !slices.Contains(printed, string(data)) {
						t.Errorf("not printed: %s\nbut\n%s", data, &out)
					}
				}
			}
			for line := range strings.Lines(log.String()) {
				if !json.Valid([]byte(line)) {
					t.Errorf("on standard error: %s", line)
				}
			}
		})
	}
}
