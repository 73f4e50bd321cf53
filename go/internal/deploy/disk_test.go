package deploy

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"

	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// TestNATSDiskFull: the disk of the chart's one NATS server was full, and is free again. The server stores nothing until it is
// restarted. Its liveness probe fails, the probe before this one did not, and the kubelet's restart cures it.
func TestNATSDiskFull(t *testing.T) {
	set := get[appsv1.StatefulSet](t, render(t, "--set", "nats.replicas=1"), "StatefulSet", "oom-tracer-nats")
	liveness := set.Spec.Template.Spec.Containers[0].LivenessProbe.HTTPGet.Path
	disk := t.TempDir()
	if err := unix.Mount("tmpfs", disk, "tmpfs", 0, "size=12m"); err != nil {
		t.Fatalf("mount a tmpfs (this test runs as root): %v", err)
	}
	t.Cleanup(func() { _ = unix.Unmount(disk, unix.MNT_DETACH) })
	addr, monitor := freeAddr(t), freeAddr(t)
	conf := filepath.Join(t.TempDir(), "nats.conf")
	if err := os.WriteFile(conf, fmt.Appendf(nil, "listen: %q\nhttp: %q\njetstream { store_dir: %q, sync_interval: always, max_file_store: 2147483648 }\n",
		addr, monitor, filepath.Join(disk, "data")), 0o600); err != nil {
		t.Fatal(err)
	}
	server := func() *exec.Cmd {
		cmd := exec.Command(oomtest.Program(t, "nats-server"), "--config", conf)
		startLogged(t, cmd)
		return cmd
	}
	alive := func(path string) error {
		response, err := http.Get("http://" + monitor + path)
		if err != nil {
			return err
		}
		defer response.Body.Close()
		body, _ := io.ReadAll(response.Body)
		if response.StatusCode != http.StatusOK {
			return fmt.Errorf("%s: %s", path, body)
		}
		return nil
	}
	publish := func(js jetstream.JetStream) error {
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, err := js.Publish(ctx, "oom.v1.kill.global.a", make([]byte, 4<<10))
		return err
	}

	first := server()
	eventually(t, "the server is alive", func() error { return alive(liveness) })
	conn, err := nats.Connect("nats://"+addr, nats.MaxReconnects(-1), nats.ReconnectWait(100*time.Millisecond))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	js, err := jetstream.New(conn)
	if err != nil {
		t.Fatal(err)
	}
	stream, err := js.CreateStream(t.Context(), jetstream.StreamConfig{Name: "OOM", Subjects: []string{"oom.v1.>"}, MaxBytes: 1 << 30})
	if err != nil {
		t.Fatal(err)
	}
	acked := uint64(0)
	for range 100 {
		if err := publish(js); err != nil {
			t.Fatal(err)
		}
		acked++
	}
	filler := filepath.Join(disk, "filler")
	if err := os.WriteFile(filler, make([]byte, 64<<20), 0o600); err == nil {
		t.Fatal("the disk takes everything")
	}
	for i := 0; publish(js) == nil; i++ {
		if acked++; i > 100 {
			t.Fatal("the full disk takes everything")
		}
	}
	if err := alive(liveness); err == nil {
		t.Errorf("%s is green on a full disk", liveness)
	}
	if err := alive("/healthz?js-enabled-only=true"); err != nil {
		t.Logf("the probe before would have done: %v", err)
	}
	if err := os.Remove(filler); err != nil {
		t.Fatal(err)
	}
	if err := publish(js); err == nil {
		t.Error("the server has recovered by itself: then the probe need not restart it")
	}
	if err := alive(liveness); err == nil {
		t.Errorf("%s is green, and nothing is stored", liveness)
	}

	// As the kubelet does.
	if err := first.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	_ = first.Wait()
	server()
	eventually(t, "the server is alive again", func() error { return alive(liveness) })
	eventually(t, "the server stores", func() error { return publish(js) })
	info, err := stream.Info(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.State.Msgs < acked+1 {
		t.Errorf("%d of %d acknowledged messages are stored", info.State.Msgs, acked+1)
	}
}
