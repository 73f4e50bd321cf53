package main

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// natsd is a nats-server that can be killed.
type natsd struct {
	t            *testing.T
	listen, conf string
	store        string
	cmd          *exec.Cmd
}

func newNATS(t *testing.T) *natsd {
	t.Helper()
	return newCluster(t, t.TempDir())[0]
}

// newCluster is a server for each store. Clients are told of no other address than those that they have.
func newCluster(t *testing.T, stores ...string) []*natsd {
	t.Helper()
	var all []*natsd
	var routes []string
	for range stores {
		routes = append(routes, "nats://"+freePort(t))
	}
	for i, store := range stores {
		d := &natsd{t: t, listen: freePort(t), conf: filepath.Join(t.TempDir(), "nats.conf"), store: store}
		settings := map[string]any{
			"listen": d.listen, "server_name": fmt.Sprint("nats-", i),
			"jetstream": map[string]any{"store_dir": store, "max_file_store": 8 << 30}, // more than the disk has, as streams that fit are not tried
		}
		if len(stores) > 1 {
			settings["cluster"] = map[string]any{"name": "test", "listen": strings.TrimPrefix(routes[i], "nats://"), "routes": routes, "no_advertise": true}
		}
		conf, err := json.Marshal(settings)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(d.conf, conf, 0o600); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(d.kill)
		all = append(all, d)
	}
	return all
}

func (d *natsd) start() {
	d.t.Helper()
	d.cmd = exec.Command(oomtest.Program(d.t, "nats-server"), "-c", d.conf)
	d.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := d.cmd.Start(); err != nil {
		d.t.Fatal(err)
	}
	eventually(d.t, "nats takes connections", func() error {
		c, err := bus.Connect(d.t.Context(), config.NATS{URL: "nats://" + d.listen}, bus.Options{Name: "probe"}, slog.New(slog.DiscardHandler))
		if err == nil {
			c.Close()
		}
		return err
	})
}

func (d *natsd) kill() {
	_ = d.cmd.Process.Kill()
	_ = d.cmd.Wait()
}

// link is the way from clients to a server.
type link struct {
	listen string
	pass   func(fromClient bool) // each piece of what is said waits for it

	mu   sync.Mutex
	down bool
	open map[net.Conn]bool
}

func newLink(t *testing.T, to string, pass func(fromClient bool)) *link {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	l := &link{listen: listener.Addr().String(), pass: pass, open: map[net.Conn]bool{}}
	t.Cleanup(func() {
		listener.Close()
		l.set(true)
	})
	go func() {
		for {
			client, err := listener.Accept()
			if err != nil {
				return
			}
			server, err := net.Dial("tcp", to)
			if err != nil {
				client.Close()
				continue
			}
			if !l.add(client, server) {
				continue
			}
			go l.copy(server, client, true)
			go l.copy(client, server, false)
		}
	}()
	return l
}

// set cuts the link, with every connection over it, or repairs it.
func (l *link) set(down bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.down = down
	for conn := range l.open {
		if down {
			conn.Close()
		}
	}
}

func (l *link) add(conns ...net.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, conn := range conns {
		l.open[conn] = true
		if l.down {
			conn.Close()
			delete(l.open, conn)
		}
	}
	return !l.down
}

func (l *link) copy(to, from net.Conn, fromClient bool) {
	defer func() {
		to.Close()
		l.mu.Lock()
		defer l.mu.Unlock()
		delete(l.open, to)
	}()
	buf := make([]byte, 32<<10)
	for {
		n, err := from.Read(buf)
		if err != nil {
			return
		}
		l.pass(fromClient)
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}
