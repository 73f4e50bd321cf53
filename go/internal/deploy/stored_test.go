package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"
	appsv1 "k8s.io/api/apps/v1"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// attacker is one credential, and what its role may store.
type attacker struct {
	user  string
	name  string // of the connection
	login nats.Option
	may   func(subject string) bool
}

// ofAnnotator tells the subjects that the annotator publishes from those of the tracers.
func ofAnnotator(subject string) bool {
	return strings.HasPrefix(subject, "oom.v1.outcome.") || strings.HasPrefix(subject, "oom.v1.eviction.")
}

// attackers are the users of the chart, but for the owner, who may do everything.
func (s *servers) attackers() []attacker {
	state := "$KV." + bus.BucketName + ".state"
	password := func(user string) nats.Option {
		return nats.UserInfo(user, s.passwords[strings.TrimPrefix(user, "oom-")])
	}
	tracer := attacker{"oom-tracer", "oom-tracer.node-1", s.tracerLogin("node-1"), func(subject string) bool {
		return strings.HasPrefix(subject, "oom.v1.") && !ofAnnotator(subject) && (s.seeds == "" && s.token == nil || strings.HasSuffix(subject, ".node-1"))
	}}
	all := []attacker{
		tracer,
		{"oom-annotator", "oom-annotator", password("oom-annotator"), func(subject string) bool {
			return ofAnnotator(subject) || subject == state
		}},
		{"oom-tap", "oom-tap", password("oom-tap"), func(string) bool { return false }},
		{"oom-operator", "oom-tap", password("oom-operator"), func(subject string) bool { return subject == state || subject == "$KV."+bus.BucketName+".pausing" }},
	}
	if get[appsv1.Deployment](s.t, s.objects, "Deployment", "oom-notify") != nil {
		all = append(all, attacker{"oom-notify", "oom-notify", password("oom-notify"), func(string) bool { return false }})
	}
	if s.token != nil {
		all = append(all, attacker{"oom-auth", "oom-auth", password("oom-auth"), func(string) bool { return false }})
	}
	return all
}

// tracerLogin is what the tracer of a node shows: its token, its key, or the password of all.
func (s *servers) tracerLogin(node string) nats.Option {
	s.t.Helper()
	if s.token != nil {
		return nats.Token(s.token(node))
	}
	if s.seeds == "" {
		return nats.UserInfo("oom-tracer", s.passwords["tracer"])
	}
	key, err := nats.NkeyOptionFromSeed(filepath.Join(s.seeds, node+".nk"))
	if err != nil {
		s.t.Fatal(err)
	}
	return key
}

// attack tries, with one credential, to store a message on every subject that a stream stores: directly, as the reply subject
// of every request, as the destination of a trace, and as the subject that a consumer delivers to. It returns what it stored
// there that its role may not store, and what it did to streams and consumers.
func (s *servers) attack(u attacker) (stored []string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	owner := s.connect("oom-tap", nats.UserInfo("oom-owner", s.passwords["owner"]))
	var targets []string
	last := map[string]uint64{}
	names := []string{event.StreamName, event.NodesStreamName, "KV_" + bus.BucketName}
	for _, name := range names {
		info := s.stream(owner, name)
		for _, pattern := range info.Config.Subjects {
			root, ok := strings.CutSuffix(pattern, ".>")
			if !ok {
				s.t.Fatalf("stream %s stores %s", name, pattern)
			}
			if strings.HasPrefix(root, "$KV.") {
				targets = append(targets, root+".state", root+".pausing", root+".other")
				continue
			}
			for _, node := range []string{"node-1", "node-2"} {
				targets = append(targets, root+".x."+node)
			}
		}
	}
	if len(targets) != 17 {
		s.t.Fatalf("%d subjects: %v", len(targets), targets)
	}
	const victim = "audit" // a consumer of somebody else
	if _, err := owner.js.CreateOrUpdateConsumer(ctx, event.StreamName, jetstream.ConsumerConfig{Durable: victim, AckPolicy: jetstream.AckExplicitPolicy}); err != nil {
		s.t.Fatal(err)
	}
	// There is something to read in each stream.
	tracer := s.connect("oom-tracer.node-1", s.tracerLogin("node-1"))
	tracer.stores("oom.v1.kill.x.node-1")
	tracer.stores("oom.v1.node.x.node-1")
	s.connect("oom-annotator", nats.UserInfo("oom-annotator", s.passwords["annotator"])).stores("oom.v1.outcome.x.node-1")
	for _, name := range names {
		last[name] = s.stream(owner, name).State.LastSeq
	}

	c := s.connect(u.name, u.login)
	go func() {
		for range c.denied { // there are many
		}
	}()
	// Where somebody listens, a consumer delivers.
	for _, subject := range append(targets, "oom.v1.>", ">") {
		if _, err := c.nc.Subscribe(subject, func(*nats.Msg) {}); err != nil {
			s.t.Fatal(err)
		}
	}
	type request struct {
		subject string
		data    string
	}
	requests := []request{{"$JS.API.INFO", ""}, {"$JS.API.STREAM.NAMES", ""}, {"$JS.API.STREAM.LIST", ""}, {"$JS.ACK.OOM.oom-annotator.1.1.1.1.1", "+NXT"}}
	for _, name := range names {
		for _, subject := range []string{"STREAM.INFO.", "CONSUMER.NAMES.", "CONSUMER.LIST.", "STREAM.PURGE.", "STREAM.DELETE."} {
			requests = append(requests, request{"$JS.API." + subject + name, ""})
		}
		requests = append(requests,
			request{"$JS.API.STREAM.MSG.GET." + name, `{"seq":1,"next_by_subj":">"}`},
			request{"$JS.API.DIRECT.GET." + name, `{"seq":1}`},
			request{"$JS.API.CONSUMER.MSG.NEXT." + name + ".pull", `{"batch":1,"expires":1000000000}`},
			request{"$JS.API.CONSUMER.INFO." + name + ".pull", ""},
		)
	}
	requests = append(requests,
		request{"$JS.API.DIRECT.GET.KV_OOM_ANNOTATOR.$KV.OOM_ANNOTATOR.state", ""},
		request{"$JS.API.CONSUMER.MSG.NEXT.OOM.oom-annotator", `{"batch":1,"expires":1000000000}`},
	)
	for _, subject := range targets {
		requests = append(requests, request{subject, "direct"})
	}
	publish := func(m *nats.Msg) {
		s.t.Helper()
		if err := c.nc.PublishMsg(m); err != nil {
			s.t.Fatalf("publish on %s: %v", m.Subject, err)
		}
	}
	create := func(stream, name, filter, deliver string) {
		config := map[string]any{"name": name, "deliver_policy": "all", "ack_policy": "none", "inactive_threshold": time.Minute}
		subject := "$JS.API.CONSUMER.CREATE." + stream + "." + name
		if filter != "" {
			config["filter_subject"] = filter
			subject += "." + filter
		}
		if deliver != "" {
			config["deliver_subject"] = deliver
		}
		data, err := json.Marshal(map[string]any{"stream_name": stream, "config": config})
		if err != nil {
			s.t.Fatal(err)
		}
		publish(&nats.Msg{Subject: subject, Reply: c.nc.NewInbox(), Data: data})
	}
	for _, name := range names {
		create(name, "pull", "", "")
		for i, target := range append(targets, "$JS.API.STREAM.PURGE."+event.NodesStreamName, "$JS.API.STREAM.DELETE."+event.NodesStreamName) {
			create(name, fmt.Sprint("push-", i), "", target)
			create(name, fmt.Sprint("push-outcome-", i), "oom.v1.outcome.>", target)
		}
	}
	create(event.StreamName, "pull", "oom.v1.outcome.>", "")
	if err := c.nc.FlushTimeout(10 * time.Second); err != nil {
		s.t.Fatal(err)
	}
	time.Sleep(500 * time.Millisecond) // for the consumers to be there
	for _, target := range targets {
		for _, r := range requests {
			publish(&nats.Msg{Subject: r.subject, Reply: target, Data: []byte(r.data)})
			publish(&nats.Msg{Subject: r.subject, Reply: target, Data: []byte(r.data), Header: nats.Header{"Nats-Trace-Dest": {target}}})
			publish(&nats.Msg{Subject: r.subject, Reply: c.nc.NewInbox(), Data: []byte(r.data), Header: nats.Header{"Nats-Trace-Dest": {target}, "Nats-Trace-Only": {"true"}}})
		}
		if err := c.nc.FlushTimeout(10 * time.Second); err != nil {
			s.t.Fatal(err)
		}
	}
	// Answers that come late, from whichever server leads.
	time.Sleep(2 * time.Second)
	seen, mine := map[string]bool{}, false
	for _, name := range names {
		stream, err := owner.js.Stream(ctx, name)
		if err != nil {
			stored = append(stored, fmt.Sprintf("stream %s: %v", name, err))
			continue
		}
		info := stream.CachedInfo()
		if info.State.LastSeq < last[name] {
			stored = append(stored, fmt.Sprintf("stream %s was at %d, and is at %d", name, last[name], info.State.LastSeq))
		}
		for seq := last[name] + 1; seq <= min(info.State.LastSeq, last[name]+5000); seq++ { // a consumer that feeds a stream never ends
			m, err := stream.GetMsg(ctx, seq)
			if err != nil {
				continue // replaced by a later one on its subject
			}
			if !u.may(m.Subject) && !seen[m.Subject] {
				seen[m.Subject] = true
				stored = append(stored, fmt.Sprintf("%s: %.60q", m.Subject, m.Data))
			}
			mine = mine || u.may(m.Subject)
		}
	}
	if !mine && u.user != "oom-tap" && u.user != "oom-auth" && u.user != "oom-notify" {
		s.t.Errorf("%s stored nothing at all", u.user)
	}
	return stored
}

func (s *servers) stream(c *client, name string) *jetstream.StreamInfo {
	s.t.Helper()
	stream, err := c.js.Stream(s.t.Context(), name)
	if err != nil {
		s.t.Fatal(err)
	}
	return stream.CachedInfo()
}

// oneAccount is the configuration of a server without accounts, with the same permissions for the same users.
const oneAccount = `authorization {
  users: [
    { user: oom-owner, password: $OOM_OWNER_PASSWORD
      include owner.conf }
    { user: oom-annotator, password: $OOM_ANNOTATOR_PASSWORD
      include annotator.conf }
    { user: oom-operator, password: $OOM_OPERATOR_PASSWORD
      include operator.conf }
    { user: oom-tap, password: $OOM_TAP_PASSWORD
      include tap.conf }
    { user: oom-tracer, password: $OOM_TRACER_PASSWORD
      include tracer.conf }
  ]
}`

// TestStoredSubjects: whoever has one of the credentials that ship stores what its role may store, and nothing else; TestNodeKeys
// and TestNodeTokens have the same on three servers. Where all users share one account, the same attack finds the hole.
func TestStoredSubjects(t *testing.T) {
	t.Run("accounts", func(t *testing.T) {
		s := startServers(t, "--values", root+"/deploy/examples/single-node.yaml", "--values", root+"/deploy/examples/notify.yaml", "--set", "nats.tracers=shared")
		for _, u := range s.attackers() {
			if got := s.attack(u); len(got) > 0 {
				t.Errorf("%s stored what it may not:\n%s", u.user, strings.Join(got, "\n"))
			}
		}
	})
	t.Run("keys", func(t *testing.T) {
		seeds := filepath.Join(t.TempDir(), "seeds")
		printed, err := exec.Command(oomtest.Program(t, "oom-tap"), "keys", seeds, "node-1", "node-2").Output()
		if err != nil {
			t.Fatal(err)
		}
		s := startServers(t, append(values(t, string(printed)), "--values", root+"/deploy/examples/single-node.yaml")...)
		s.seeds = seeds
		if got := s.attack(s.attackers()[0]); len(got) > 0 {
			t.Errorf("a node stored what it may not:\n%s", strings.Join(got, "\n"))
		}
	})
	t.Run("one account", func(t *testing.T) {
		s := newServers(t, func(files map[string]string) {
			files["nats.conf"] = replaced(t, true, files["nats.conf"], "authorization { timeout: 10 }", "")
			files["nats.conf"] = replaced(t, true, files["nats.conf"], "accounts { include accounts.conf }", oneAccount)
		}, "--values", root+"/deploy/examples/single-node.yaml", "--set", "nats.tracers=shared")
		s.setup()
		for _, u := range s.attackers() {
			got := strings.Join(s.attack(u), "\n")
			t.Logf("%s:\n%s", u.user, got)
			for subject, found := range map[string]bool{
				"$KV.OOM_ANNOTATOR.state:": u.user == "oom-tracer" || u.user == "oom-tap",
				"oom.v1.kill.":             u.user != "oom-tracer",
				"oom.v1.outcome.":          u.user != "oom-annotator",
			} {
				if strings.Contains(got, subject) != found {
					t.Errorf("%s without accounts, %s: found %t, want %t", u.user, subject, !found, found)
				}
			}
		}
	})
}
