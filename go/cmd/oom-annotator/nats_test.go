package main

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/scratch/scratchtest"
)

// startNATSServer runs build/nats-server with JetStream, and more of its configuration, until the test ends.
func startNATSServer(t *testing.T, more string) (addr string) {
	t.Helper()
	addr, dir := freePort(t), t.TempDir()
	file := filepath.Join(dir, "nats.conf")
	text := fmt.Sprintf("listen: %q\njetstream { store_dir: %q }\n%s\n", addr, dir, more)
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	p := (&process{out: &output{}, done: make(chan struct{}), cmd: exec.Command(scratchtest.Program(t, "nats-server"), "-c", file)}).start(t)
	eventually(t, "nats-server is ready", func() error {
		select {
		case <-p.done:
			t.Fatal("nats-server has ended")
		default:
		}
		if !strings.Contains(p.out.String(), "Server is ready") {
			return fmt.Errorf("not ready")
		}
		return nil
	})
	return addr
}

// externalRig starts an annotator with a NATS of its own to go to and, but for what more says, the shipped
// configuration. The test is the user owner there.
func externalRig(t *testing.T, c *kubetest.Cluster, account *rest.Config, owner config.NATS, more string) *rig {
	t.Helper()
	r := &rig{t: t, kubeconfig: c.Kubeconfig(account), configPath: filepath.Join(t.TempDir(), "config.yaml")}
	if err := os.WriteFile(r.configPath, fmt.Appendf(nil, "annotator: {listen: %q}\n%s", freePort(t), more), 0o600); err != nil {
		t.Fatal(err)
	}
	var err error
	if r.cfg, err = config.Load(r.configPath); err != nil {
		t.Fatal(err)
	}
	r.cfg.NATS = owner
	r.connect()
	if err := bus.EnsureStreams(t.Context(), r.conn, config.Default().NATS.Stream); err != nil {
		t.Fatal(err)
	}
	r.tail()
	r.start()
	return r
}
