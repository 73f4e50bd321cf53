package callout

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/oom-tracer/oom-tracer/go/event"
)

const (
	subject    = "$SYS.REQ.USER.AUTH"
	xkeyHeader = "Nats-Server-Xkey"
	account    = "OOM_TRACERS" // of accounts.conf
	// A tracer waits for two seconds (lateHint in bus), and comes again. An answer that comes later has cost a review for nothing, and
	// when thousands of nodes come at once, all would. So what exceeds atOnce under way and maxWaiting is dropped, and so is what
	// has waited for waitTime. An answer comes within answerTime, from when the question came.
	atOnce     = 64
	maxWaiting = 128
	waitTime   = 700 * time.Millisecond
	answerTime = 1700 * time.Millisecond
	// failingFor is how long a failed review counts. Tracers come again sooner.
	failingFor = time.Minute
)

// Service answers.
type Service struct {
	keys      *Keys
	reviewer  *TokenReviewer
	log       *slog.Logger
	decisions *prometheus.CounterVec
	warnings  rate.Sometimes

	mu      sync.Mutex
	failing error // of the last review
	since   time.Time
}

// Results of a decision.
const (
	permitted = "permitted"
	refused   = "refused"
	failed    = "failed"
	dropped   = "dropped" // waited too long, or too many wait
)

// New makes a service.
func New(keys *Keys, reviewer *TokenReviewer, log *slog.Logger) *Service {
	s := &Service{keys: keys, reviewer: reviewer, log: log, warnings: rate.Sometimes{First: 100, Interval: time.Second},
		decisions: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "oom_tracer_auth_decisions_total", Help: "Number of NATS logins by token that oom-auth decided on, by result.",
		}, []string{"result"})}
	for _, result := range []string{permitted, refused, failed, dropped} {
		s.decisions.WithLabelValues(result)
	}
	return s
}

// Describe implements prometheus.Collector.
func (s *Service) Describe(ch chan<- *prometheus.Desc) { s.decisions.Describe(ch) }

// Collect implements prometheus.Collector.
func (s *Service) Collect(ch chan<- prometheus.Metric) { s.decisions.Collect(ch) }

// Failing is why tokens cannot be reviewed now.
func (s *Service) Failing() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if time.Since(s.since) > failingFor {
		return nil
	}
	return s.failing
}

// note notes how a review ended.
func (s *Service) note(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failing, s.since = err, time.Now()
	if errors.Is(err, ErrRefused) {
		s.failing = nil
	}
}

// asked is a question, and when it came.
type asked struct {
	*nats.Msg
	at time.Time
}

// Serve answers until ctx ends, and then what has come by then. Any number of replicas share the questions.
func (s *Service) Serve(ctx context.Context, nc *nats.Conn) error {
	questions, last := make(chan asked, maxWaiting), make(chan struct{})
	sub, err := nc.QueueSubscribe(subject, "oom-auth", func(m *nats.Msg) {
		select {
		case questions <- asked{m, time.Now()}:
		default:
			s.decisions.WithLabelValues(dropped).Inc()
		}
	})
	if err != nil {
		return fmt.Errorf("subscribe to %s: %w", subject, err)
	}
	var answers sync.WaitGroup
	for range atOnce {
		answers.Go(func() {
			for {
				select {
				case q := <-questions:
					s.handle(context.WithoutCancel(ctx), q)
					continue
				case <-last:
				}
				select {
				case q := <-questions:
					s.handle(context.WithoutCancel(ctx), q)
				default:
					return
				}
			}
		})
	}
	<-ctx.Done()
	// What the server has sent to us already, no other replica answers.
	if err := sub.Drain(); err == nil {
		for deadline := time.Now().Add(time.Second); sub.IsValid() && time.Now().Before(deadline); {
			time.Sleep(10 * time.Millisecond)
		}
	}
	close(last)
	answers.Wait()
	return nil
}

func (s *Service) handle(ctx context.Context, m asked) {
	if time.Since(m.at) > waitTime {
		s.decisions.WithLabelValues(dropped).Inc()
		return
	}
	ctx, cancel := context.WithDeadline(ctx, m.at.Add(answerTime))
	defer cancel()
	reply, err := s.answer(ctx, m.Data, m.Header.Get(xkeyHeader))
	if err != nil {
		s.decisions.WithLabelValues(failed).Inc()
		s.warn("cannot read the request of a nats server", "error", err)
		return
	}
	if err := m.Respond(reply); err != nil {
		s.warn("cannot answer a nats server", "error", err)
	}
}

// warn logs, but not each of thousands.
func (s *Service) warn(msg string, args ...any) {
	s.warnings.Do(func() { s.log.Warn(msg, args...) })
}

// answer makes the answer to a question that was encrypted for us by the server of that public key.
func (s *Service) answer(ctx context.Context, data []byte, server string) ([]byte, error) {
	plain, err := s.keys.curve.Open(data, server)
	if err != nil {
		return nil, fmt.Errorf("decrypt (is the issuer's secret the one that the server uses?): %w", err)
	}
	question, err := jwt.DecodeAuthorizationRequestClaims(string(plain))
	if err != nil {
		return nil, fmt.Errorf("decode: %w", err)
	}
	response := jwt.NewAuthorizationResponseClaims(question.UserNkey)
	if response == nil {
		return nil, errors.New("decode: no user")
	}
	response.Audience = question.Server.ID
	client := []any{"client", question.ConnectOptions.Name, "host", question.ClientInformation.Host, "server", question.Server.Name}
	response.Jwt, err = s.decide(ctx, question, &client)
	switch {
	case err == nil:
		s.decisions.WithLabelValues(permitted).Inc()
		s.log.Info("login permitted", client...)
	case errors.Is(err, ErrRefused):
		s.decisions.WithLabelValues(refused).Inc()
		s.warn("login refused", append(client, "error", err)...)
		response.Error = err.Error()
	default:
		s.decisions.WithLabelValues(failed).Inc()
		s.warn("could not decide on a login, the client will retry", append(client, "error", err)...)
		response.Error = "token could not be reviewed"
	}
	text, err := response.Encode(s.keys.issuer)
	if err != nil {
		return nil, fmt.Errorf("sign the answer: %w", err)
	}
	return s.keys.curve.Seal([]byte(text), server)
}

// decide reviews the token and makes the user that its client becomes.
func (s *Service) decide(ctx context.Context, question *jwt.AuthorizationRequestClaims, client *[]any) (string, error) {
	if question.ConnectOptions.Token == "" {
		return "", fmt.Errorf("%w: no token, and no user of the server's configuration", ErrRefused)
	}
	who, err := s.reviewer.Review(ctx, question.ConnectOptions.Token)
	s.note(err)
	if err != nil {
		return "", err
	}
	token, err := event.NodeToken(who.Node)
	if err != nil {
		return "", fmt.Errorf("%w: %w", ErrRefused, err)
	}
	*client = append(*client, "node", who.Node, "expires", who.Expires.UTC().Format(time.RFC3339))
	return s.keys.user(question.UserNkey, token, who)
}

// user is what an nkey's user of that node has (oom.nodeUsers in the chart), until the token expires.
func (k *Keys) user(key, token string, who Identity) (string, error) {
	u := jwt.NewUserClaims(key)
	u.Name = "oom-tracer." + token // in the place of the token in the server's monitoring
	u.Audience = account
	u.Expires = who.Expires.Unix()
	u.AllowedConnectionTypes.Add(jwt.ConnectionTypeStandard)
	u.Pub.Allow.Add("oom.v1.*.*." + token)
	u.Pub.Deny.Add("oom.v1.outcome.>", "oom.v1.eviction.>")
	u.Sub.Allow.Add("_INBOX_oom-tracer." + token + ".>")
	text, err := u.Encode(k.issuer)
	if err != nil {
		return "", fmt.Errorf("sign the user: %w", err)
	}
	return text, nil
}
