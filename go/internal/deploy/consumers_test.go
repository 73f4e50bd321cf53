package deploy

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/event"
)

// takeFrom tries, with one credential, to take messages from a consumer of the stream OOM, to change it, to remove it, and to learn
// of it. It returns what of that it could.
func (s *servers) takeFrom(u attacker, owner *client, name string) (could []string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), time.Minute)
	defer cancel()
	before, err := owner.js.Consumer(ctx, event.StreamName, name)
	if err != nil {
		s.t.Fatal(err)
	}
	c := s.connect(u.name, u.login)
	go func() {
		for range c.denied {
		}
	}()
	create, err := json.Marshal(map[string]any{"stream_name": event.StreamName, "config": jetstream.ConsumerConfig{
		Durable: name, AckPolicy: jetstream.AckExplicitPolicy, FilterSubject: "oom.v1.kill.nothing.>", MaxDeliver: 1,
	}})
	if err != nil {
		s.t.Fatal(err)
	}
	for subject, data := range map[string]string{
		"CONSUMER.MSG.NEXT.OOM." + name:                             `{"batch":1,"expires":500000000}`,
		"CONSUMER.INFO.OOM." + name:                                 "",
		"CONSUMER.NAMES.OOM":                                        "",
		"CONSUMER.LIST.OOM":                                         "",
		"CONSUMER.CREATE.OOM." + name:                               string(create),
		"CONSUMER.CREATE.OOM." + name + ".oom.v1.kill.nothing.>":    string(create),
		"CONSUMER.DURABLE.CREATE.OOM." + name:                       string(create),
		"CONSUMER.CREATE.OOM":                                       string(create),
		"CONSUMER.PAUSE.OOM." + name:                                `{"pause_until":"2100-01-01T00:00:00Z"}`,
		"CONSUMER.RESET.OOM." + name:                                `{"seq":1}`,
		"CONSUMER.UNPIN.OOM." + name:                                `{"group":"x"}`,
		"CONSUMER.LEADER.STEPDOWN.OOM." + name:                      "",
		"CONSUMER.DELETE.OOM." + name:                               "",
		"$JS.ACK.OOM." + name + ".1.1.1.1767225600000000000.1":      "+ACK",
		"$JS.ACK.OOM." + name + ".1.1.1.1767225600000000000.1 +NXT": "+NXT",
	} {
		if !strings.HasPrefix(subject, "$JS") {
			subject = "$JS.API." + subject
		}
		subject, _, _ = strings.Cut(subject, " ")
		answer, err := c.nc.Request(subject, []byte(data), 500*time.Millisecond)
		if err != nil || answer.Header.Get("Status") != "" || strings.Contains(string(answer.Data), `"error":`) {
			continue
		}
		could = append(could, subject)
	}
	after, err := owner.js.Consumer(ctx, event.StreamName, name)
	switch {
	case err != nil:
		return append(could, fmt.Sprintf("%s: %v", name, err))
	case after.CachedInfo().Config.FilterSubject != before.CachedInfo().Config.FilterSubject:
		could = append(could, "its filter is another one")
	}
	if d := after.CachedInfo().Delivered.Stream; d != before.CachedInfo().Delivered.Stream {
		could = append(could, fmt.Sprintf("%d messages were delivered", d))
	}
	return could
}

// TestConsumers: with one of the credentials that ship nobody takes what another one consumes: the annotator nothing of a consumer of
// somebody else, nobody anything of the annotator's or oom-notify's. The tap can, as far as it knows a name and tap.conf does not deny it.
func TestConsumers(t *testing.T) {
	s := newServers(t, func(files map[string]string) {
		files["tap.conf"] = replaced(t, true, files["tap.conf"], "    deny: [\n", `    deny: [
      "$JS.API.CONSUMER.CREATE.OOM.billing", "$JS.API.CONSUMER.CREATE.OOM.billing.>", "$JS.API.CONSUMER.MSG.NEXT.OOM.billing"
`)
	}, "--values", root+"/deploy/examples/single-node.yaml", "--values", root+"/deploy/examples/notify.yaml", "--set", "nats.tracers=shared")
	s.setup()
	owner := s.connect("oom-tap", nats.UserInfo("oom-owner", s.passwords["owner"]))
	for _, name := range []string{"audit", "billing", "oom-annotator", "oom-notify"} {
		if _, err := owner.js.CreateOrUpdateConsumer(t.Context(), event.StreamName, jetstream.ConsumerConfig{
			Durable: name, AckPolicy: jetstream.AckExplicitPolicy, FilterSubject: "oom.v1.kill.>",
		}); err != nil {
			t.Fatal(err)
		}
	}
	tracer := s.connect("oom-tracer.node-1", s.tracerLogin("node-1"))
	for range 10 {
		tracer.stores("oom.v1.kill.x.node-1")
	}
	// The attack finds something where there is something to find.
	if got := s.takeFrom(attacker{name: "oom-tap", login: nats.UserInfo("oom-owner", s.passwords["owner"])}, owner, "audit"); len(got) < 5 {
		t.Fatalf("the owner could only %q", got)
	}
	if _, err := owner.js.CreateOrUpdateConsumer(t.Context(), event.StreamName, jetstream.ConsumerConfig{
		Durable: "audit", AckPolicy: jetstream.AckExplicitPolicy, FilterSubject: "oom.v1.kill.>",
	}); err != nil {
		t.Fatal(err)
	}
	for _, u := range s.attackers() {
		for _, name := range []string{"billing", "oom-annotator", "oom-notify", "audit"} {
			if u.user == name {
				continue
			}
			got := strings.Join(s.takeFrom(u, owner, name), "\n")
			if left := u.user == "oom-tap" && name == "audit"; left != (got != "") {
				t.Errorf("%s, of the consumer %s, could:\n%s", u.user, name, got)
			}
		}
	}
}
