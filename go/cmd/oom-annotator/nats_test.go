package main

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/client-go/rest"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/kubetest"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
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
	p := (&process{out: &oomtest.Output{}, done: make(chan struct{}), cmd: exec.Command(oomtest.Program(t, "nats-server"), "-c", file)}).start(t)
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

// testAccounts: with the accounts of deploy/nats the annotator does its whole work, also after a restart.
func testAccounts(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	dir, password := t.TempDir(), filepath.Join(t.TempDir(), "password")
	files := map[string]string{filepath.Join(dir, "owner.conf"): "", password: "secret"} // the test is the owner, and publishes kills
	for _, name := range []string{"accounts", "tracers", "tracer", "annotator", "notifiers", "notify", "operator", "tap"} {
		data, err := os.ReadFile(filepath.Join("../../../deploy/nats", name+".conf"))
		if err != nil {
			t.Fatal(err)
		}
		files[filepath.Join(dir, name+".conf")] = string(data)
	}
	for path, data := range files {
		if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, who := range []string{"OWNER", "ANNOTATOR", "NOTIFY", "OPERATOR", "TAP", "TRACER"} {
		t.Setenv("OOM_"+who+"_PASSWORD", "secret")
	}
	url := "nats://" + startNATSServer(t, fmt.Sprintf(`accounts { include "%s" }`, filepath.Join("..", filepath.Base(dir), "accounts.conf")))
	owner := config.NATS{URL: url, User: "oom-owner", PasswordFile: password}
	r := externalRig(t, c, account, owner, fmt.Sprintf("nats: {url: %q, user: oom-annotator, password_file: %q}\npolicy: {budgets: {cooldown: 0s, node: 0, window: 1m, cluster: 1000}}\n", url, password))
	for i := range 3 {
		e := r.killOf(c.Pod("shop", fmt.Sprint("accounts-", i), node), "")
		e.ID = event.VictimID("accounts", 1, uint64(i+1))
		e.Incident = &event.Incident{ID: fmt.Sprint("accounts-", i)}
		r.publish(e)
		r.neighbours(e, event.PodMemory{PodUID: e.Container.PodUID, Usage: 1 << 30})
		r.want(e.ID, "annotated/marked")
		if o := r.others(); o.Kill != e.ID {
			t.Errorf("outcome %+v", o)
		}
		r.settled()
		for line := range strings.Lines(r.annotator.out.String()) {
			if strings.Contains(line, "level=WARN") || strings.Contains(line, "level=ERROR") {
				t.Errorf("logged: %s", line)
			}
		}
		if i < 2 {
			r.annotator.stop(t)
			r.start()
		}
	}
}

// testPermissions: what deploy/nats/annotator.conf permits is enough, and each of it is needed. It does not
// permit to speak for a tracer, nor to listen to others.
func testPermissions(t *testing.T, c *kubetest.Cluster, account *rest.Config) {
	shipped, err := os.ReadFile("../../../deploy/nats/annotator.conf")
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.SplitAfter(string(shipped), "\n")
	permissions := map[string]string{"all": string(shipped)}
	for i, line := range lines {
		if line := strings.TrimSpace(line); strings.HasPrefix(line, `"`) {
			permissions[strings.Trim(line, `"`)] = strings.Join(slices.Delete(slices.Clone(lines), i, i+1), "")
		}
	}
	permissions["subscribe"] = strings.ReplaceAll(string(shipped), "_INBOX_oom-annotator.>", "_INBOX_another.>")
	if len(permissions) != 11 {
		t.Fatalf("%d cases", len(permissions))
	}
	for missing, conf := range permissions {
		t.Run(missing, func(t *testing.T) {
			t.Parallel()
			c := c.In(t)
			file, password := filepath.Join(t.TempDir(), "annotator.conf"), filepath.Join(t.TempDir(), "password")
			for path, data := range map[string]string{file: conf, password: "secret"} {
				if err := os.WriteFile(path, []byte(data), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			// An include is relative to the file that it stands in, which is in a directory beside this one.
			url := "nats://" + startNATSServer(t, fmt.Sprintf(`authorization {
  users: [
    { user: owner, password: secret }
    {
      user: oom-annotator
      password: secret
      include "%s"
    }
  ]
}`, filepath.Join("..", filepath.Base(filepath.Dir(file)), "annotator.conf")))
			owner := config.NATS{URL: url, User: "owner", PasswordFile: password}
			r := externalRig(t, c, account, owner, fmt.Sprintf("nats: {url: %q, user: oom-annotator, password_file: %q}\npolicy: {budgets: {cooldown: 0s, node: 0, window: 1m, cluster: 1000}}\n", url, password))
			name := fmt.Sprintf("permitted-%x", sha256.Sum256([]byte(missing)))[:20]
			e := r.killOf(c.Pod("shop", name, node), "")
			e.ID = event.VictimID(name, 1, 1) // the test's own name is none
			e.Incident = &event.Incident{ID: name}
			r.publish(e)
			r.neighbours(e, event.PodMemory{PodUID: e.Container.PodUID, Usage: 1 << 30})
			evicted := c.Pod("shop", name+"-evicted", node)
			evict(c, evicted, func(*corev1.PodStatus) {})
			defer c.DeletePod("shop", evicted.Name) // annotators of other tests would publish it too
			isPublished := func(e event.Eviction) bool { return e.Pod.UID == string(evicted.UID) }
			if missing == "all" {
				eventually(t, "the eviction is published", func() error {
					if !slices.ContainsFunc(r.evicted(), isPublished) {
						return errors.New("it is not")
					}
					return nil
				})
				r.want(e.ID, "annotated/marked")
				if o := r.others(); o.Kill != e.ID {
					t.Errorf("outcome %+v", o)
				}
				r.settled()
				conn, err := bus.Connect(t.Context(), config.NATS{URL: url, User: "oom-annotator", PasswordFile: password}, bus.Options{Name: "oom-annotator"}, slog.New(slog.DiscardHandler))
				if err != nil {
					t.Fatal(err)
				}
				t.Cleanup(conn.Close)
				for _, subject := range []string{"oom.v1.kill.global.node-1", "oom.v1.gap.restart.node-1", "oom.v1.node.status.node-1", "$KV.OOM_ANNOTATOR.other", "$JS.API.STREAM.DELETE.OOM"} {
					if _, err := conn.NATS().Request(subject, []byte("{}"), time.Second); err == nil {
						t.Errorf("%s is permitted", subject)
					}
				}
				sub, err := conn.NATS().SubscribeSync("oom.v1.>")
				if err == nil {
					r.publish(r.killOf(c.Pod("shop", name+"-2", node), ""))
					if m, err := sub.NextMsg(2 * time.Second); err == nil {
						t.Errorf("%s was heard", m.Subject)
					}
				}
				return
			}
			eventually(t, "the log says what is not permitted", func() error {
				if !strings.Contains(strings.ToLower(r.annotator.out.String()), "permissions violation") {
					return fmt.Errorf("it does not")
				}
				return nil
			})
			time.Sleep(2 * time.Second) // for what works to have worked
			consumer, err := r.conn.JetStream().Consumer(t.Context(), event.StreamName, "oom-annotator")
			if missing == "oom.v1.eviction.>" {
				if slices.ContainsFunc(r.evicted(), isPublished) {
					t.Error("the eviction is published without the permission")
				}
				r.want(e.ID, "annotated/marked") // all the same
				return
			}
			if len(r.outcomes) > 0 && err == nil && consumer.CachedInfo().NumAckPending == 0 && consumer.CachedInfo().NumPending == 0 {
				t.Errorf("it works without %s: %+v", missing, <-r.outcomes)
			}
		})
	}
}
