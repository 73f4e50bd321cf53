package agent

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// floodAddrs, in the environment, makes this binary open connections to these addresses without end and say nothing.
const floodAddrs = "TEST_FLOOD_ADDRS"

// flood is what TestFlooded runs as a user without any right.
func flood(addrs []string) {
	var all sync.WaitGroup
	for _, addr := range addrs {
		for range 4 {
			all.Go(func() {
				var conns []net.Conn
				for n := 1; ; n++ {
					c, err := net.DialTimeout("tcp", addr, 5*time.Second)
					if err != nil {
						time.Sleep(10 * time.Millisecond)
						continue
					}
					if conns = append(conns, c); len(conns) > 1000 {
						conns[0].Close()
						conns = conns[1:]
					}
					if n%100 == 0 {
						fmt.Println(addr, n)
					}
				}
			})
		}
	}
	all.Wait()
}

// TestFlooded: a user without any right opens thousands of connections to each port of the tracer. It takes little of its
// memory; kills are published, probes are answered, and a client with the password comes in.
func TestFlooded(t *testing.T) {
	oomtest.Slow(t)
	const connections = 5000
	cfg := withListen(t, pinnedConfig(t))
	cfg.Metrics.Listen = oomtest.FreeAddr(t)
	tracer := startProcess(t, cfg)
	until(t, "the tracer runs", func() bool { return obs.TracerRuns(t.Context(), cfg.Metrics.Listen) })
	group := oomtest.New(t, 8*mib)
	oomtest.Storm(t, group, 3, 16, "plain")
	stored(t, cfg, group, 3)
	before := rss(t, tracer.Process.Pid)

	child := exec.Command("/proc/self/exe")
	child.Env = []string{floodAddrs + "=" + cfg.NATS.Embedded.Listen + " " + cfg.Metrics.Listen}
	child.Dir = "/"
	oomtest.AsNobody(t, child)
	out := &oomtest.Output{}
	child.Stdout, child.Stderr = out, out
	if err := child.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = child.Process.Kill(); _ = child.Wait() })
	opened := func(addr string) int { return 100 * strings.Count(out.String(), addr+" ") }
	most, probes, failed := before, 0, 0
	oomtest.Storm(t, group, 3, 16, "plain")
	for deadline := time.Now().Add(2 * time.Minute); probes < 30 || opened(cfg.NATS.Embedded.Listen) < connections || opened(cfg.Metrics.Listen) < connections; time.Sleep(200 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("only so many connections in two minutes:\n%s", out)
		}
		most = max(most, rss(t, tracer.Process.Pid))
		probes++
		if ready, said, err := obs.Readiness(t.Context(), cfg.Metrics.Listen); err != nil {
			failed++
		} else if !ready {
			t.Errorf("not ready: %s", said)
		}
	}
	until(t, "a client with the password comes in", func() bool {
		conn, err := bus.Connect(t.Context(), cfg.NATS, bus.Options{Name: "tap"}, slog.New(slog.DiscardHandler))
		if err != nil {
			t.Log(err)
			return false
		}
		conn.Close()
		return true
	})
	most = max(most, rss(t, tracer.Process.Pid))
	_ = child.Process.Kill()
	_ = child.Wait()
	stored(t, cfg, group, 6)
	if ready, said, err := obs.Readiness(t.Context(), cfg.Metrics.Listen); !ready || err != nil {
		t.Errorf("afterwards: %s, %v", said, err)
	}
	tracer.stop(t)
	t.Logf("RSS %d -> %d KiB; %d and %d connections; %d of %d probes failed", before, most,
		opened(cfg.NATS.Embedded.Listen), opened(cfg.Metrics.Listen), failed, probes)
	if most > before+32<<10 {
		t.Errorf("RSS grew from %d to %d KiB", before, most)
	}
	if failed > probes/5 {
		t.Errorf("%d of %d probes were not answered", failed, probes)
	}
	if n := strings.Count(tracer.log.String(), "\n"); n > 200 {
		t.Errorf("%d lines of log", n)
	}
}

// rss is what a process has in memory, in KiB.
func rss(t *testing.T, pid int) int {
	t.Helper()
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	_, value, _ := strings.Cut(string(data), "\nVmRSS:")
	n, err := strconv.Atoi(strings.Fields(value)[0])
	if err != nil {
		t.Fatal(err)
	}
	return n
}
