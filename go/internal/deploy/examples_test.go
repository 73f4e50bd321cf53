package deploy

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	"github.com/santhosh-tekuri/jsonschema/v6"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// killed publishes a kill as a tracer does, and returns it.
func (c *client) killed(pid uint32, container *event.Container) event.Event {
	c.t.Helper()
	e := event.Event{
		Schema: event.Schema, ID: event.VictimID("boot", pid, 1), Seq: uint64(pid), Time: time.Now().UTC(), BoottimeNS: 1,
		Node:  event.Node{Name: "node-1", BootID: "boot", Kernel: "6.1", Tier: "fentry"},
		Scope: event.ScopeCgroup, Outcome: event.OutcomeKilled, Victim: event.Victim{PID: pid, TID: pid, Comm: "java"}, Container: container,
	}
	data, err := json.Marshal(e)
	if err != nil {
		c.t.Fatal(err)
	}
	subject, err := e.Subject()
	if err != nil {
		c.t.Fatal(err)
	}
	if _, err := c.js.PublishMsg(c.t.Context(), (&bus.Msg{ID: e.ID, Subject: subject, Data: data}).NATS()); err != nil {
		c.t.Fatal(err)
	}
	return e
}

// TestConsumerExamples: the examples of consumers print each kill once, with the tap's user and the CA of a NATS with TLS, also over a
// restart. What they read is valid by the JSON Schema.
func TestConsumerExamples(t *testing.T) {
	a, certificates := newAuthority(t), t.TempDir()
	a.write(certificates, 1)
	s := newServers(t, func(files map[string]string) {
		files["nats.conf"] = replaced(t, true, files["nats.conf"], "/etc/nats-tls/", certificates+"/")
	}, "--values", root+"/deploy/examples/single-node.yaml", "--set", "nats.tracers=shared,nats.tlsSecret=a")
	roots := x509.NewCertPool()
	roots.AddCert(a.cert)
	login := func(user string) nats.Option {
		return func(o *nats.Options) error {
			o.User, o.Password = "oom-"+user, s.passwords[user]
			return nats.Secure(&tls.Config{RootCAs: roots})(o)
		}
	}
	eventually(t, "a server with TLS", func() error {
		nc, err := nats.Connect(s.urls[0], login("owner"))
		if err == nil {
			nc.Close()
		}
		return err
	})
	owner := s.connect("oom-tap", login("owner"))
	eventually(t, "the stream", func() error {
		_, err := owner.js.CreateOrUpdateStream(t.Context(), jetstream.StreamConfig{Name: event.StreamName, Subjects: event.StreamSubjects()})
		return err
	})
	tracer := s.connect("oom-tracer.node-1", login("tracer"))
	pod := &event.Container{PodUID: "5b1a7a5e-1c1d-4b6f-8a55-2b7f0c9d1e2f", ContainerID: "0123456789abcdef"}
	line := func(e event.Event) string {
		c := event.Container{PodUID: "-", ContainerID: "-"}
		if e.Container != nil {
			c = *e.Container
		}
		return fmt.Sprintf("pod %s container %s: java[%d] was killed on node-1, scope cgroup\n", c.PodUID, c.ContainerID, e.Victim.PID)
	}
	before := line(tracer.killed(1, pod)) + line(tracer.killed(2, nil))

	built, examples := oomtest.Program(t, "consumers"), root+"/deploy/examples/consumers/"
	script := filepath.Join(t.TempDir(), "consumer.mjs") // Node.js looks for node_modules beside it
	if err := os.WriteFile(script, []byte(readFile(t, examples+"consumer.mjs")), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(built, "node_modules"), filepath.Join(filepath.Dir(script), "node_modules")); err != nil {
		t.Fatal(err)
	}
	consumers := map[string][]string{"consumer.go": {filepath.Join(built, "consumer")}, "consumer.py": {"python3", examples + "consumer.py"}, "consumer.mjs": {"node", script}}
	run := func(want string) {
		t.Helper()
		for name, args := range consumers {
			t.Run(name, func(t *testing.T) {
				if n := strings.Count(readFile(t, examples+name), "\n"); n >= 30 {
					t.Errorf("it has %d lines", n)
				}
				cmd := exec.Command(args[0], args[1:]...)
				cmd.Env = append(os.Environ(), "NATS_URL="+strings.Replace(s.urls[0], "127.0.0.1", "localhost", 1), "NATS_PASSWORD="+s.passwords["tap"], "NATS_CA="+filepath.Join(certificates, "ca.crt"))
				log := startLogged(t, cmd)
				eventually(t, "its output", func() error {
					if got := readFile(t, log); got != want {
						return fmt.Errorf("%q, want %q", got, want)
					}
					return nil
				})
				time.Sleep(200 * time.Millisecond)
				if got := readFile(t, log); got != want {
					t.Errorf("later: %q, want %q", got, want)
				}
				if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
					t.Error(err)
				}
			})
		}
	}
	run(before)
	run(line(tracer.killed(3, pod)))

	schema, err := jsonschema.NewCompiler().Compile(root + "/go/event/schema/event.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	stream, err := owner.js.Stream(t.Context(), event.StreamName)
	if err != nil {
		t.Fatal(err)
	}
	for seq := range uint64(3) {
		m, err := stream.GetMsg(t.Context(), seq+1)
		if err != nil {
			t.Fatal(err)
		}
		value, err := jsonschema.UnmarshalJSON(bytes.NewReader(m.Data))
		if err != nil {
			t.Fatal(err)
		}
		if err := schema.Validate(value); err != nil || m.Header.Get("ce-type") != "com.github.oom-tracer.kill.v1" {
			t.Errorf("message %d: %v, %v", seq+1, m.Header, err)
		}
	}
}
