package obs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promauto"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/oom-tracer/oom-tracer/go/internal/netlimit"
)

// The bounds of the server.
const (
	// A kubelet's probe gives up after one second by default: less, so that it sees what hangs.
	checkTimeout    = 800 * time.Millisecond
	shutdownTimeout = time.Second
	// maxScrapes is how many scrapes may run at once; further ones are told 503.
	maxScrapes = 4
	// maxConns is how many connections there are at once. Those without a request under way give way to new ones.
	maxConns  = 64
	connGrace = 10 * time.Millisecond
)

// Check says what is wrong with one thing, nil if nothing is. It should return when ctx ends; one
// that does not is reported as failing, and is not called again until it has returned.
type Check func(ctx context.Context) error

// Checks are evaluated at each request, all at once, by name. An error is the reason shown.
type Checks struct {
	// Health is asked by /healthz: what only a restart cures.
	Health map[string]Check
	// Ready is asked by /readyz: what passes by itself.
	Ready map[string]Check
}

// ReadyChecks makes checks of /readyz, and registers oom_tracer_ready, which says the same: up says only that the process answers.
// help says what each check is about.
func ReadyChecks(registerer prometheus.Registerer, help string, failing map[string]func() error) map[string]Check {
	checks := map[string]Check{}
	for check, failing := range failing {
		checks[check] = func(context.Context) error { return failing() }
		promauto.With(registerer).NewGaugeFunc(prometheus.GaugeOpts{
			Name: "oom_tracer_ready", Help: "Whether a check of /readyz passes: " + help, ConstLabels: prometheus.Labels{"check": check},
		}, func() float64 {
			if failing() != nil {
				return 0
			}
			return 1
		})
	}
	return checks
}

// Server serves /metrics, /healthz and /readyz.
type Server struct {
	listener net.Listener // nil: nothing is served
	mux      *http.ServeMux
	log      *slog.Logger
	// The bounds, here so that tests can lower them.
	checkTimeout, shutdownTimeout time.Duration
}

// Listen takes the address, so that one that is in use is an error at the start; Serve then serves
// it. addr is host:port; an empty host is every address of the machine, port 0 a free port, and an
// empty addr a server that serves nothing. reg also gets the metric that counts the errors of
// scrapes.
func Listen(addr string, reg *prometheus.Registry, checks Checks, log *slog.Logger) (*Server, error) {
	s := &Server{mux: http.NewServeMux(), log: log, checkTimeout: checkTimeout, shutdownTimeout: shutdownTimeout}
	s.mux.Handle("GET /metrics", promhttp.HandlerFor(reg, promhttp.HandlerOpts{
		Registry: reg,
		ErrorLog: scrapeLog{log},
		// A metric that cannot be read must not hide the others.
		ErrorHandling:       promhttp.ContinueOnError,
		MaxRequestsInFlight: maxScrapes,
		EnableOpenMetrics:   true, // for exemplars
	}))
	s.mux.Handle("GET /healthz", s.checkHandler(checks.Health))
	s.mux.Handle("GET /readyz", s.checkHandler(checks.Ready))
	s.mux.HandleFunc("GET /{$}", func(w http.ResponseWriter, _ *http.Request) {
		plain(w, http.StatusOK, "/metrics  for Prometheus\n/healthz  503 when a restart is needed\n/readyz   503 while the program cannot work\n")
	})
	if addr == "" {
		return s, nil
	}
	listener, err := net.Listen("tcp", addr)
	if err != nil {
		return nil, fmt.Errorf("serve metrics: %w", err)
	}
	s.listener = netlimit.New(listener, maxConns, connGrace)
	return s, nil
}

// Addr is the address that is served, with its real port; empty when nothing is.
func (s *Server) Addr() string {
	if s.listener == nil {
		return ""
	}
	return s.listener.Addr().String()
}

// Serve serves until ctx ends, and then gives the requests under way a second. Call it once.
//
// It returns nil when it came to its end that way, an error when it could not go on serving or had
// to cut requests off.
func (s *Server) Serve(ctx context.Context) error {
	if s.listener == nil {
		<-ctx.Done()
		return nil
	}
	srv := &http.Server{
		Handler:           holding(s.mux),
		BaseContext:       func(net.Listener) context.Context { return ctx }, // checks end with the program
		ConnContext:       func(ctx context.Context, c net.Conn) context.Context { return context.WithValue(ctx, connKey{}, c) },
		ReadHeaderTimeout: 5 * time.Second,
		ReadTimeout:       10 * time.Second,
		WriteTimeout:      10 * time.Second, // what Prometheus waits by default
		IdleTimeout:       2 * time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(s.log.Handler(), slog.LevelWarn),
	}
	served := make(chan error, 1)
	go func() { served <- srv.Serve(s.listener) }()
	select {
	case err := <-served:
		return fmt.Errorf("serve metrics: %w", err)
	case <-ctx.Done():
	}
	bounded, cancel := context.WithTimeout(context.WithoutCancel(ctx), s.shutdownTimeout)
	defer cancel()
	err := srv.Shutdown(bounded)
	if err != nil {
		err = fmt.Errorf("shut down metrics server: %w", errors.Join(err, srv.Close()))
	}
	<-served //nolint:errcheck // always http.ErrServerClosed
	return err
}

// connKey is the key of a request's connection in its context.
type connKey struct{}

// holding holds the connection of a request while it is answered.
func holding(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if c, ok := r.Context().Value(connKey{}).(*netlimit.Conn); ok {
			c.Hold()
			defer c.Release()
		}
		h.ServeHTTP(w, r)
	})
}

// checkHandler answers 200 when every check passes and 503 when one does not, with a line for each:
// "name: ok" or "name: reason".
func (s *Server) checkHandler(checks map[string]Check) http.Handler {
	names := slices.Sorted(maps.Keys(checks))
	guarded := make([]Check, len(names))
	for i, name := range names {
		guarded[i] = guard(checks[name])
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		ctx, cancel := context.WithTimeout(r.Context(), s.checkTimeout)
		defer cancel()
		errs := make([]error, len(names))
		var wg sync.WaitGroup
		for i, check := range guarded {
			wg.Go(func() { errs[i] = check(ctx) })
		}
		wg.Wait()
		status, body := http.StatusOK, ""
		for i, err := range errs {
			reason := "ok"
			if err != nil {
				status = http.StatusServiceUnavailable
				reason = strings.Join(strings.Fields(err.Error()), " ") // one line
			}
			body += names[i] + ": " + reason + "\n"
		}
		if len(names) == 0 {
			body = "ok\n"
		}
		plain(w, status, body)
	})
}

// guard makes a check return when ctx ends, even if it hangs. At most one call is under way at any
// time, so that probes of a check that hangs for ever do not pile up.
func guard(check Check) Check {
	free := make(chan struct{}, 1)
	return func(ctx context.Context) error {
		select {
		case free <- struct{}{}:
		case <-ctx.Done():
			return fmt.Errorf("an earlier check has not returned: %w", ctx.Err())
		}
		result := make(chan error, 1)
		go func() {
			defer func() { <-free }()
			result <- check(ctx)
		}()
		select {
		case err := <-result:
			return err
		case <-ctx.Done():
			return fmt.Errorf("the check has not returned: %w", ctx.Err())
		}
	}
}

// scrapeLog bridges promhttp's messages to slog.
type scrapeLog struct{ *slog.Logger }

// Println implements promhttp.Logger.
func (l scrapeLog) Println(v ...any) {
	l.Warn("scrape is incomplete", "err", strings.TrimSpace(fmt.Sprintln(v...)))
}

// plain writes an answer in plain text that nobody keeps.
func plain(w http.ResponseWriter, status int, body string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(status)
	_, _ = io.WriteString(w, body) // the client is gone: nobody is left to tell
}
