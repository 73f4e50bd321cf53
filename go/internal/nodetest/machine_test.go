//go:build node

package nodetest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
)

const (
	// The machine's address in QEMU's user network, and that of this machine's loopback as it sees it.
	nodeIP = "10.0.2.15"
	hostIP = "10.0.2.2"
	// A root shell, which QEMU forwards to the node's port 2222 (tools/node/files).
	shellAddr = "127.0.0.1:2222"
	// The port of the Service of testdata/nats.yaml.
	natsAddr = "127.0.0.1:30422"
)

// Machine is a virtual machine that goes with the test.
type Machine struct {
	t       testing.TB
	qemu    *kubetest.Process
	console string
}

// boot starts QEMU. dir is that of tools/node/root.sh; images and settings are further disks. Nothing that the
// machine writes to root.img is kept, but it outlives a reboot.
func boot(t testing.TB, dir, images, settings, name string) *Machine {
	t.Helper()
	work := t.TempDir()
	m := &Machine{t: t, console: filepath.Join(work, "console")}
	m.qemu = &kubetest.Process{
		Path: "/usr/bin/qemu-system-x86_64",
		Log:  filepath.Join(work, "qemu.log"),
		Args: []string{
			// Without KVM. -cx16 and no_timer_check keep faults of the emulator away (see tools/vm/test-vm.sh).
			"-accel", "tcg,thread=multi", "-cpu", "Nehalem,-cx16", "-smp", "2", "-m", "2048", "-nodefaults", "-no-user-config", "-nographic",
			"-serial", "file:" + m.console, "-monitor", "none", "-device", "virtio-rng-pci",
			"-drive", "file=" + filepath.Join(dir, "root.img") + ",if=virtio,format=raw,cache=unsafe,snapshot=on",
			"-drive", "file=" + images + ",if=virtio,format=raw,cache=unsafe",
			"-drive", "file=" + settings + ",if=virtio,format=raw,readonly=on",
			"-netdev", "user,id=net0,hostfwd=tcp:" + shellAddr + "-:2222,hostfwd=tcp:" + natsAddr + "-:30422,hostfwd=tcp:" + nodeIP + ":10250-:10250",
			"-device", "virtio-net-pci,netdev=net0",
			"-kernel", filepath.Join(dir, "vmlinuz"), "-initrd", filepath.Join(dir, "initrd"),
			"-append", "console=ttyS0 net.ifnames=0 mitigations=off no_timer_check panic=-1 systemd.show_status=0 node.name=" + name,
		},
	}
	t.Cleanup(func() {
		m.qemu.End(t)
		if t.Failed() {
			t.Logf("the machine's console:\n%s", m.consoleTail())
		}
	})
	m.qemu.Start(t)
	return m
}

// Run runs a script in a root shell on the node and returns what it prints. It outlives nothing of the test.
func (m *Machine) Run(ctx context.Context, script string) (string, error) {
	var dialer net.Dialer
	conn, err := dialer.DialContext(ctx, "tcp", shellAddr)
	if err != nil {
		return "", fmt.Errorf("connect to the node: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	const end = "EXIT-STATUS-OF-THE-SCRIPT="
	if _, err := fmt.Fprintf(conn, "(\n%s\n) </dev/null 2>&1\necho %s$?\nexit\n", script, end); err != nil {
		return "", fmt.Errorf("write to the node: %w", err)
	}
	out, err := io.ReadAll(conn)
	text, status, found := strings.Cut(string(out), end)
	switch {
	case !found:
		return "", fmt.Errorf("the node ended the connection before the script had ended: %w", errors.Join(err, ctx.Err()))
	case strings.TrimSpace(status) != "0":
		return text, fmt.Errorf("the script ended with status %s: %s", strings.TrimSpace(status), text)
	}
	return text, nil
}

// Must is Run for what cannot fail.
func (m *Machine) Must(script string) string {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), 2*time.Minute)
	defer cancel()
	out, err := m.Run(ctx, script)
	if err != nil {
		m.t.Fatalf("on the node: %s: %v", script, err)
	}
	return strings.TrimSpace(out)
}

// offset is how far the node's clock is ahead of this machine's.
func (m *Machine) offset() (ahead time.Duration, err error) {
	best := time.Hour
	for range 3 {
		ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
		before := time.Now()
		out, err := m.Run(ctx, "date +%s.%N")
		round := time.Since(before)
		cancel()
		if err != nil {
			return 0, err
		}
		var s, ns int64
		if _, err := fmt.Sscanf(strings.TrimSpace(out), "%d.%d", &s, &ns); err != nil {
			return 0, fmt.Errorf("the node's date %q: %w", out, err)
		}
		if round < best {
			best = round
			ahead = time.Unix(s, ns).Sub(before.Add(round / 2))
		}
	}
	return ahead, nil
}

// Console is what the kernel and systemd have written.
func (m *Machine) Console() string {
	data, err := os.ReadFile(m.console)
	if err != nil {
		return err.Error()
	}
	return string(data)
}

func (m *Machine) consoleTail() string { return lastLines(m.Console(), 60) }
