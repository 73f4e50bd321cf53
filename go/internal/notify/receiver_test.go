package notify

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/oom-tracer/oom-tracer/go/event"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// sent is a message, and when it was sent, from the start of the test.
type sent struct {
	at    time.Duration
	title string
	count int
}

// world is a receiver whose server is answer. The network is in post_test.go and in go/cmd/oom-notify.
type world struct {
	*receiver
	began time.Time

	mu       sync.Mutex
	messages []sent // all attempts
	answer   func(n int, title string) error
	acked    int
}

// got is what was sent and acked once the receiver waits.
func (w *world) got() (messages []sent, acked int) {
	synctest.Wait()
	w.mu.Lock()
	defer w.mu.Unlock()
	return slices.Clone(w.messages), w.acked
}

// answers sets the answer to the nth message.
func (w *world) answers(answer func(n int, title string) error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.messages, w.answer = nil, answer
}

// run runs test with a receiver, in the time of synctest.
func run(t *testing.T, change func(*config.Notify), test func(t *testing.T, w *world)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		cfg := config.Default().Notify
		cfg.Webhook.URL = "http://x"
		if change != nil {
			change(&cfg)
		}
		f, err := newFormat(webhook, "")
		if err != nil {
			t.Fatal(err)
		}
		w := &world{began: time.Now(), answer: func(int, string) error { return nil }}
		post := func(_ context.Context, body []byte) error {
			var n Notification
			if err := json.Unmarshal(body, &n); err != nil {
				t.Errorf("%v: %s", err, body)
			}
			w.mu.Lock()
			defer w.mu.Unlock()
			w.messages = append(w.messages, sent{time.Since(w.began), n.Title, n.Count})
			return w.answer(len(w.messages), n.Title)
		}
		w.receiver = newReceiver(webhook, cfg, f, post, newMetrics(prometheus.NewRegistry(), []string{webhook}), slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			w.receiver.run(ctx, ctx)
		}()
		test(t, w)
		cancel()
		<-done
	})
}

// kill adds a kill of an owner.
func (w *world) kill(owner string, pid uint32) {
	i := &item{
		kill: &event.Event{
			ID: fmt.Sprint("boot-", pid), Time: time.Now(), Node: event.Node{Name: "node-1"}, Scope: event.ScopeGlobal, Outcome: event.OutcomeKilled,
			Victim: event.Victim{PID: pid, TID: pid, Comm: "java"},
		},
		outcome: &event.Outcome{Pod: &event.PodRef{Namespace: "shop", Name: "cart-1", Owner: owner}},
		time:    time.Now(), stored: time.Now(), finish: func() {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.acked++
		},
	}
	i.left.Store(1)
	w.add(i)
}

func (w *world) check(t *testing.T, acked int, want ...sent) {
	t.Helper()
	if messages, n := w.got(); fmt.Sprint(messages) != fmt.Sprint(want) || n != acked {
		t.Errorf("after %s: %v, %d acked\nwant %v, %d", time.Since(w.began), messages, n, want, acked)
	}
}

func (w *world) counter(vec *prometheus.CounterVec, value string) float64 {
	return testutil.ToFloat64(vec.WithLabelValues(webhook, value))
}

const cart, mail = "OOM: Deployment shop/cart: ", "OOM: Deployment shop/mail: "

// The first message about an owner comes after group_wait, the next ones group_interval later; each with all kills since.
func TestGroups(t *testing.T) {
	run(t, nil, func(t *testing.T, w *world) {
		for pid := range uint32(2000) {
			w.kill("Deployment/cart", pid+1)
			if pid == 1000 {
				w.kill("Deployment/mail", 1)
			}
			time.Sleep(101 * time.Millisecond) // 202 s in all
		}
		want := []sent{{30 * time.Second, cart + "298 kills", 298}, {131 * time.Second, mail + "1 kill", 1}}
		w.check(t, 299, want...)
		time.Sleep(10 * time.Minute)
		want = append(want, sent{330 * time.Second, cart + "1702 kills", 1702})
		w.check(t, 2001, want...)
		// The group is forgotten: it begins again.
		w.kill("Deployment/cart", 1)
		time.Sleep(30 * time.Second)
		w.check(t, 2002, append(want, sent{832 * time.Second, cart + "1 kill", 1})...)
	})
}

// Between two messages to a receiver is min_interval, whatever they are about.
func TestMinInterval(t *testing.T) {
	run(t, func(cfg *config.Notify) { cfg.GroupWait, cfg.MinInterval = 0, 20*time.Second }, func(t *testing.T, w *world) {
		for n := range 4 {
			w.kill(fmt.Sprint("Deployment/", n), 1)
			time.Sleep(time.Millisecond)
		}
		time.Sleep(time.Hour)
		w.check(t, 4, sent{0, "OOM: Deployment shop/0: 1 kill", 1}, sent{20 * time.Second, "OOM: Deployment shop/1: 1 kill", 1},
			sent{40 * time.Second, "OOM: Deployment shop/2: 1 kill", 1}, sent{60 * time.Second, "OOM: Deployment shop/3: 1 kill", 1})
	})
}

// While a receiver is away the kills of an owner stay one message, nothing is acknowledged, and it is asked once a minute at most. When it is
// back, the message is sent.
func TestAway(t *testing.T) {
	run(t, nil, func(t *testing.T, w *world) {
		w.answers(func(int, string) error { return errors.New("away") })
		for pid := range uint32(120) {
			w.kill("Deployment/cart", pid+1)
			time.Sleep(time.Minute)
		}
		if messages, acked := w.got(); len(messages) < 120 || len(messages) > 260 || acked != 0 || w.failing() == nil {
			t.Errorf("%d attempts in 2 h, %d acked, failing: %v", len(messages), acked, w.failing())
		}
		w.answers(func(int, string) error { return nil })
		time.Sleep(2 * time.Minute)
		if messages, acked := w.got(); len(messages) != 1 || messages[0].count != 120 || acked != 120 || w.failing() != nil {
			t.Errorf("back: %v, %d acked, failing: %v", messages, acked, w.failing())
		}
		if failed := w.counter(w.metrics.messages, resultFailed); failed < 120 || w.counter(w.metrics.notified, "kill") != 120 {
			t.Errorf("failed %v, notified %v", failed, w.counter(w.metrics.notified, "kill"))
		}
	})
}

// A message that always fails holds up no other one.
func TestPoison(t *testing.T) {
	run(t, nil, func(t *testing.T, w *world) {
		w.answers(func(_ int, title string) error {
			if strings.HasPrefix(title, mail) {
				return &answerError{status: http.StatusInternalServerError}
			}
			return nil
		})
		w.kill("Deployment/mail", 1)
		for pid := range uint32(20) {
			w.kill("Deployment/cart", pid+1)
			time.Sleep(5*time.Minute + 31*time.Second)
		}
		if messages, acked := w.got(); acked != 20 {
			t.Errorf("%d acked: %v", acked, messages)
		}
	})
}

// Retry-After holds for all messages to the receiver.
func TestRetryAfter(t *testing.T) {
	run(t, nil, func(t *testing.T, w *world) {
		w.answers(func(n int, _ string) error {
			if n == 1 {
				return &answerError{status: http.StatusTooManyRequests, retryAfter: 10 * time.Minute}
			}
			return nil
		})
		w.kill("Deployment/cart", 1)
		time.Sleep(time.Second)
		w.kill("Deployment/mail", 1)
		time.Sleep(20 * time.Minute)
		if messages, acked := w.got(); len(messages) != 3 || messages[1].at != 630*time.Second || messages[2].at != 631*time.Second || acked != 2 {
			t.Errorf("%v, %d acked", messages, acked)
		}
	})
}

// What the receiver refuses, and what is too old, is given up and counted.
func TestGivenUp(t *testing.T) {
	run(t, func(cfg *config.Notify) { cfg.MaxAge = time.Hour }, func(t *testing.T, w *world) {
		w.answers(func(n int, _ string) error {
			if n == 1 {
				return &answerError{status: http.StatusBadRequest}
			}
			return errors.New("away")
		})
		w.kill("Deployment/mail", 1)
		time.Sleep(time.Minute)
		_, acked := w.got()
		if refused := w.counter(w.metrics.givenUp, reasonRefused); refused != 1 || acked != 1 || w.failing() == nil {
			t.Errorf("refused %v, %d acked, failing: %v", refused, acked, w.failing())
		}
		w.kill("Deployment/cart", 1)
		time.Sleep(59 * time.Minute)
		w.kill("Deployment/cart", 2)
		if _, acked := w.got(); acked != 1 {
			t.Errorf("%d acked after 59 minutes", acked)
		}
		time.Sleep(3 * time.Minute) // its first kill goes, the second stays
		_, acked = w.got()
		if old := w.counter(w.metrics.givenUp, reasonTooOld); old != 1 || acked != 2 {
			t.Errorf("too old %v, %d acked", old, acked)
		}
		w.answers(func(int, string) error { return nil })
		time.Sleep(time.Minute)
		if messages, acked := w.got(); acked != 3 || len(messages) != 1 || messages[0].count != 1 {
			t.Errorf("%d acked, %v", acked, messages)
		}
	})
}
