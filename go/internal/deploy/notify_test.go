package deploy

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/oomtest"
)

// startNotify runs oom-notify as rendered until the test ends, with a webhook, and returns the address of its metrics and its log.
func startNotify(t *testing.T, s *servers) (address, log string) {
	t.Helper()
	file := s.config("notify")
	address = regexp.MustCompile(`(?m)^notify:\n(?:  .*\n)*?  listen: (\S+)`).FindStringSubmatch(readFile(t, file))[1]
	return address, startLogged(t, exec.Command(oomtest.Program(t, "oom-notify"), "--config", file))
}

// webhook is a server that takes messages, and the values that name it.
func webhook(t *testing.T) (messages chan string, args []string) {
	t.Helper()
	messages = make(chan string, 100)
	server := httptest.NewServer(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
		body := make([]byte, 64<<10)
		n, _ := r.Body.Read(body)
		messages <- string(body[:n])
	}))
	t.Cleanup(server.Close)
	return messages, []string{"--set", "notify.enabled=true,config.notify.group_wait=0s,config.notify.webhook.url=" + server.URL}
}

// TestNotify: with the rights that the chart gives it oom-notify does its whole work, however tracers log in, and has no other rights.
func TestNotify(t *testing.T) {
	for _, tracers := range []string{"shared", "tokens"} {
		t.Run(tracers, func(t *testing.T) {
			messages, args := webhook(t)
			s := startServers(t, append(args, "--values", root+"/deploy/examples/single-node.yaml", "--set", "nats.tracers="+tracers)...)
			address, log := startNotify(t, s)
			eventually(t, "oom-notify is ready", func() error {
				r, err := http.Get("http://" + address + "/readyz")
				if err == nil {
					if r.Body.Close(); r.StatusCode != http.StatusOK {
						err = fmt.Errorf("status %d", r.StatusCode)
					}
				}
				return err
			})
			if tracers == "shared" {
				full, err := os.ReadFile("../../event/testdata/full.json")
				if err != nil {
					t.Fatal(err)
				}
				e, err := event.Parse(full)
				if err != nil {
					t.Fatal(err)
				}
				subject, err := event.OutcomeSubject(e.ID, event.StageAnnotate, e.Node.Name)
				if err != nil {
					t.Fatal(err)
				}
				annotator := s.connect("oom-annotator", nats.UserInfo("oom-annotator", s.passwords["annotator"]))
				outcome := fmt.Sprintf(`{"schema":"oom-tracer/v1","id":"o","kill":%q,"stage":"annotate","time":"2026-01-01T00:00:00Z","result":"skipped","reason":"level",`+
					`"node":%q,"pod":{"namespace":"shop","name":"cart-1","uid":"u","owner":"Deployment/cart"}}`, e.ID, e.Node.Name)
				if _, err := annotator.js.Publish(t.Context(), subject, []byte(outcome)); err != nil {
					t.Fatal(err)
				}
				if subject, err = e.Subject(); err != nil {
					t.Fatal(err)
				}
				tracer := s.connect("oom-tracer.node-1", nats.UserInfo("oom-tracer", s.passwords["tracer"]))
				if _, err := tracer.js.Publish(t.Context(), subject, full); err != nil {
					t.Fatal(err)
				}
				select {
				case m := <-messages:
					if !strings.Contains(m, "OOM: Deployment shop/cart: 1 kill") {
						t.Errorf("message %s", m)
					}
				case <-time.After(30 * time.Second):
					t.Error("no message")
				}
				owner := s.connect("oom-tap", nats.UserInfo("oom-owner", s.passwords["owner"]))
				eventually(t, "the message is acknowledged", func() error {
					consumer, err := owner.js.Consumer(t.Context(), event.StreamName, "oom-notify")
					if err == nil && (consumer.CachedInfo().NumAckPending > 0 || consumer.CachedInfo().NumPending > 0) {
						err = fmt.Errorf("%+v", consumer.CachedInfo())
					}
					return err
				})
			}
			if text := readFile(t, log); strings.Contains(text, "level=WARN") || strings.Contains(text, "level=ERROR") {
				t.Errorf("logged:\n%s", text)
			}
			c := s.connect("oom-notify", nats.UserInfo("oom-notify", s.passwords["notify"]))
			c.mayNot("oom.v1.kill.global.node-1", "oom.v1.outcome.x.node-1", "$JS.API.STREAM.DELETE.OOM", "$JS.API.CONSUMER.CREATE.OOM.other",
				"$JS.API.CONSUMER.CREATE.OOM.oom-annotator.oom.v1.kill.>", "$JS.API.CONSUMER.MSG.NEXT.OOM.oom-annotator", "$JS.ACK.OOM.oom-annotator.1.1.1.1.1",
				"$JS.API.CONSUMER.DELETE.OOM.oom-notify", "$KV.OOM_ANNOTATOR.state", "$JS.API.STREAM.MSG.GET.KV_OOM_ANNOTATOR")
			c.mayNotHear("oom.v1.>", ">", "_INBOX_oom-annotator.>", "_INBOX_oom-tap.>", "$SYS.>")
		})
	}
}

// scrapeNotify reads the metrics of an oom-notify with each receiver.
func scrapeNotify(t *testing.T) (metrics exposed) {
	t.Helper()
	address := freeAddr(t)
	file := values(t, fmt.Sprintf("nats: {url: 'nats://127.0.0.1:1'}\nnotify: {slack: {url: 'http://x'}, alertmanager: {url: 'http://x'}, webhook: {url: 'http://x'}, listen: %q}\n", address))[1]
	startLogged(t, exec.Command(oomtest.Program(t, "oom-notify"), "--config", file))
	eventually(t, "oom-notify has metrics", func() (err error) {
		metrics, err = scrape(address)
		return err
	})
	return metrics
}
