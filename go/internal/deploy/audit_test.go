package deploy

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// TestAuditMirror: the mirror in another account, as events.md has it made, has each message with its headers, also those that have
// expired in the source. Nobody of that account changes the source, and the auditor changes nothing.
func TestAuditMirror(t *testing.T) {
	doc := readFile(t, root+"/deploy/docs/events.md")
	s := newServers(t, func(files map[string]string) {
		accounts := files["accounts.conf"]
		const api, ack = `    {service: "$JS.API.>", response: stream, accounts: [OOM_ANNOTATOR, OOM_NOTIFY, OOM_TAPS, OOM_OPERATOR]}`, `    {service: "$JS.ACK.OOM.oom-annotator.>", accounts: [OOM_ANNOTATOR]}`
		documented := func(line string) string {
			if !strings.Contains(doc, "   "+line+"\n") {
				t.Fatalf("events.md does not say %s", line)
			}
			return "    " + line + "\n"
		}
		accounts = replaced(t, true, accounts, api+"\n", documented(`{service: "$JS.API.>", response: stream, accounts: [OOM_ANNOTATOR, OOM_NOTIFY, OOM_TAPS, OOM_OPERATOR, OOM_AUDIT]}`))
		files["accounts.conf"] = replaced(t, true, accounts, ack+"\n", ack+"\n"+documented(`{service: "$JS.FC.OOM.>", accounts: [OOM_AUDIT]}`)+documented(`{stream: "oom.audit.deliver.>", accounts: [OOM_AUDIT]}`))
		files["audit.conf"] = strings.NewReplacer("$OOM_AUDIT_OWNER_PASSWORD", "owner-of-audit", "$OOM_AUDITOR_PASSWORD", "auditor").Replace(readFile(t, root+"/deploy/examples/audit/audit.conf"))
		files["nats.conf"] = replaced(t, true, files["nats.conf"], "accounts { include accounts.conf }", "accounts {\n  include accounts.conf\n  include audit.conf\n}")
		t.Setenv("OOM_AUDIT_OWNER_PASSWORD", "owner-of-audit")
		t.Setenv("OOM_AUDITOR_PASSWORD", "auditor")
	}, "--values", root+"/deploy/examples/single-node.yaml", "--set", "nats.tracers=shared")
	s.setup()
	tracer := s.connect("oom-tracer.node-1", nats.UserInfo("oom-tracer", s.passwords["tracer"]))
	first := tracer.killed(1, nil) // before there is a mirror

	bin := t.TempDir()
	if err := os.Symlink(oomtest.Program(t, "nats"), filepath.Join(bin, "nats")); err != nil {
		t.Fatal(err)
	}
	small := filepath.Join(bin, "audit.json") // this server has less than 100 GiB
	if err := os.WriteFile(small, []byte(replaced(t, true, readFile(t, root+"/deploy/examples/audit/audit.json"), "107374182400", "104857600")), 0o600); err != nil {
		t.Fatal(err)
	}
	documented := func(command string) string {
		t.Helper()
		var line string
		for l := range strings.Lines(doc) {
			if l = strings.TrimSpace(l); strings.HasPrefix(l, "nats --user oom-audit") && strings.Contains(l, command) {
				line = l
			}
		}
		cmd := exec.Command("sh", "-c", strings.Replace(line, "deploy/examples/audit/audit.json", small, 1))
		cmd.Env = append(os.Environ(), "PATH="+bin+":"+os.Getenv("PATH"), "NATS_URL="+s.urls[0], "HOME="+bin, "XDG_CONFIG_HOME="+bin)
		out, err := cmd.CombinedOutput()
		if err != nil || line == "" {
			t.Fatalf("%s: %v\n%s", line, err, out)
		}
		return string(out)
	}
	documented("stream add")
	owner := s.connect("audit", nats.UserInfo("oom-audit-owner", "owner-of-audit"))
	mirror := func(seq uint64) *jetstream.RawStreamMsg {
		t.Helper()
		var m *jetstream.RawStreamMsg
		eventually(t, fmt.Sprintf("message %d in the mirror", seq), func() (err error) {
			stream, err := owner.js.Stream(t.Context(), "OOM_AUDIT")
			if err == nil {
				m, err = stream.GetMsg(t.Context(), seq)
			}
			return err
		})
		return m
	}
	second := tracer.killed(2, nil)
	for seq, e := range map[uint64]event.Event{1: first, 2: second} {
		m := mirror(seq)
		if id := m.Header.Get(jetstream.MsgIDHeader); id != e.ID || m.Header.Get("ce-id") != id || m.Header.Get("ce-type") != "com.github.oom-tracer.kill.v1" || m.Subject != "oom.v1.kill.cgroup.node-1" {
			t.Errorf("message %d on %s: %v", seq, m.Subject, m.Header)
		}
	}
	if out := documented("stream info"); !strings.Contains(out, "Mirror Information") {
		t.Errorf("nats stream info:\n%s", out)
	}
	if out := documented("stream get"); !strings.Contains(out, first.ID) {
		t.Errorf("nats stream get:\n%s", out)
	}

	// What the source drops, the mirror keeps.
	source := s.connect("oom-tap", nats.UserInfo("oom-owner", s.passwords["owner"]))
	cfg := s.stream(source, event.StreamName).Config
	cfg.MaxAge, cfg.Duplicates = time.Second, time.Second
	if _, err := source.js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	eventually(t, "the source is empty", func() error {
		if n := s.stream(source, event.StreamName).State.Msgs; n > 0 {
			return fmt.Errorf("%d messages", n)
		}
		return nil
	})
	cfg.MaxAge = time.Hour
	if _, err := source.js.UpdateStream(t.Context(), cfg); err != nil {
		t.Fatal(err)
	}
	third := tracer.killed(3, nil)
	for seq, id := range []string{first.ID, second.ID, third.ID} {
		if m := mirror(uint64(seq + 1)); m.Header.Get(jetstream.MsgIDHeader) != id {
			t.Errorf("message %d: %v", seq+1, m.Header)
		}
	}

	// Neither of the account's users writes or deletes in the source, and nobody in the mirror.
	before := s.stream(source, event.StreamName).State
	auditor := s.connect("audit", nats.UserInfo("oom-auditor", "auditor"))
	for name, c := range map[string]*client{"owner": owner, "auditor": auditor} {
		go func() {
			for range c.denied {
			}
		}()
		for subject, data := range map[string]string{
			"oom.v1.kill.cgroup.node-1": "{}", "oom.audit.deliver.x": "{}",
			"$JS.API.STREAM.PURGE.OOM": "", "$JS.API.STREAM.DELETE.OOM": "", "$JS.API.STREAM.MSG.DELETE.OOM": `{"seq":3}`, "$JS.API.CONSUMER.DELETE.OOM.oom-annotator": "",
			"JS.OOM.API.STREAM.PURGE.OOM": "", "JS.OOM.API.STREAM.DELETE.OOM": "", "JS.OOM.API.STREAM.MSG.DELETE.OOM": `{"seq":3}`, "JS.OOM.API.CONSUMER.DELETE.OOM.oom-annotator": "",
			"$JS.API.STREAM.PURGE.OOM_AUDIT": "", "$JS.API.STREAM.MSG.DELETE.OOM_AUDIT": `{"seq":1}`,
			"JS.OOM.API.CONSUMER.CREATE.OOM.push":  `{"stream_name":"OOM","config":{"name":"push","deliver_subject":"oom.v1.node.status.node-1","ack_policy":"none"}}`,
			"JS.OOM.API.CONSUMER.CREATE.OOM.cycle": `{"stream_name":"OOM","config":{"name":"cycle","deliver_subject":"oom.v1.kill.cgroup.node-1","ack_policy":"none"}}`,
		} {
			if answer, err := c.nc.Request(subject, []byte(data), 300*time.Millisecond); err == nil && !strings.Contains(string(answer.Data), `"error"`) && !strings.HasSuffix(subject, ".push") {
				t.Errorf("the %s may %s: %s", name, subject, answer.Data)
			}
		}
	}
	time.Sleep(time.Second)
	after := s.stream(source, event.StreamName).State
	if after.LastSeq != before.LastSeq || after.FirstSeq != before.FirstSeq || after.Msgs != before.Msgs {
		t.Errorf("the source was %+v and is %+v", before, after)
	}
	if n := s.stream(source, event.NodesStreamName).State.LastSeq; n != 0 {
		t.Errorf("%d statuses of nodes were stored", n)
	}
	if n := s.stream(owner, "OOM_AUDIT").State.Msgs; n != 3 {
		t.Errorf("the mirror has %d messages", n)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if _, err := auditor.js.CreateStream(ctx, jetstream.StreamConfig{Name: "MORE"}); err == nil {
		t.Error("the auditor makes a stream")
	}
}
