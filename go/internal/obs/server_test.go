package obs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

func listen(t *testing.T, reg *prometheus.Registry, checks Checks) *Server {
	t.Helper()
	s, err := Listen("127.0.0.1:0", reg, checks, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// start runs a server until the test's end, or until stop is called, which returns Serve's error.
func start(t *testing.T, s *Server) (stop func() error) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	stop = sync.OnceValue(func() error {
		cancel()
		select {
		case err := <-done:
			return err
		case <-time.After(30 * time.Second):
			return errors.New("Serve does not return")
		}
	})
	t.Cleanup(func() { _ = stop() })
	return stop
}

func serveLogging(t *testing.T, reg *prometheus.Registry, checks Checks, log *slog.Logger) (url string) {
	t.Helper()
	s, err := Listen("127.0.0.1:0", reg, checks, log)
	if err != nil {
		t.Fatal(err)
	}
	stop := start(t, s)
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("stop: %v", err)
		}
	})
	return "http://" + s.Addr()
}

func serve(t *testing.T, reg *prometheus.Registry, checks Checks) (url string) {
	t.Helper()
	return serveLogging(t, reg, checks, slog.New(slog.DiscardHandler))
}

func request(t *testing.T, method, url string) (*http.Response, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, url, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp, string(body)
}

func get(t *testing.T, url string) (status int, body string) {
	t.Helper()
	resp, body := request(t, http.MethodGet, url)
	return resp.StatusCode, body
}

func pass(context.Context) error { return nil }

func fail(reason string) Check {
	return func(context.Context) error { return errors.New(reason) }
}

func TestRoutes(t *testing.T) {
	url := serve(t, prometheus.NewRegistry(), Checks{
		Health: map[string]Check{"reader": pass},
		Ready:  map[string]Check{"nats": fail("not connected:\n dial tcp\t127.0.0.1:4222"), "attach": pass, "stream": fail("absent")},
	})
	for _, tt := range []struct {
		method, path string
		status       int
		body         string // empty: any
	}{
		{"GET", "/healthz", 200, "reader: ok\n"},
		{"HEAD", "/healthz", 200, ""},
		{"GET", "/healthz?verbose", 200, "reader: ok\n"},
		{"GET", "/readyz", 503, "attach: ok\nnats: not connected: dial tcp 127.0.0.1:4222\nstream: absent\n"},
		{"HEAD", "/readyz", 503, ""},
		{"GET", "/metrics", 200, ""},
		{"GET", "/", 200, "/metrics  for Prometheus\n/healthz  503 when a restart is needed\n/readyz   503 while the program cannot work\n"},
		{"GET", "/nothing", 404, ""},
		{"GET", "/metrics/x", 404, ""},
		{"GET", "/debug/pprof/", 404, ""},
		{"POST", "/healthz", 405, ""},
		{"DELETE", "/metrics", 405, ""},
	} {
		resp, body := request(t, tt.method, url+tt.path)
		if resp.StatusCode != tt.status || tt.body != "" && body != tt.body {
			t.Errorf("%s %s: %d %q, want %d %q", tt.method, tt.path, resp.StatusCode, body, tt.status, tt.body)
		}
		if got := resp.Header.Get("Content-Type"); !strings.HasPrefix(got, "text/plain") {
			t.Errorf("%s %s: Content-Type %q", tt.method, tt.path, got)
		}
	}
}

func TestNoChecks(t *testing.T) {
	url := serve(t, prometheus.NewRegistry(), Checks{})
	for _, path := range []string{"/healthz", "/readyz"} {
		if status, body := get(t, url+path); status != 200 || body != "ok\n" {
			t.Errorf("%s: %d %q", path, status, body)
		}
	}
}

// Checks are asked at each request.
func TestCheckChanges(t *testing.T) {
	var broken atomic.Bool
	url := serve(t, prometheus.NewRegistry(), Checks{Ready: map[string]Check{"switch": func(context.Context) error {
		if broken.Load() {
			return errors.New("off")
		}
		return nil
	}}})
	for _, off := range []bool{false, true, false} {
		broken.Store(off)
		want := map[bool]int{false: 200, true: 503}[off]
		if status, body := get(t, url+"/readyz"); status != want {
			t.Errorf("off=%t: %d %q", off, status, body)
		}
	}
}

func TestHangingCheck(t *testing.T) {
	var calls atomic.Int32
	release := make(chan struct{})
	s := listen(t, prometheus.NewRegistry(), Checks{Health: map[string]Check{
		"good": pass,
		"hang": func(context.Context) error { calls.Add(1); <-release; return nil },
		"slow": func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() },
	}})
	s.checkTimeout = 20 * time.Millisecond
	start(t, s)
	url := "http://" + s.Addr() + "/healthz"
	status, body := get(t, url)
	if status != 503 || !strings.Contains(body, "good: ok\nhang: the check has not returned: context deadline exceeded\nslow: ") {
		t.Errorf("first: %d %q", status, body)
	}
	for range 10 {
		if status, body := get(t, url); status != 503 || !strings.Contains(body, "hang: an earlier check has not returned: ") {
			t.Errorf("later: %d %q", status, body)
		}
	}
	if n := calls.Load(); n != 1 {
		t.Errorf("the check that hangs was called %d times, want 1", n)
	}
	close(release)
	for range 100 { // it recovers, once the goroutine has run
		if _, body = get(t, url); strings.Contains(body, "hang: ok\n") {
			return
		}
	}
	t.Errorf("not recovered: %q", body)
}

func TestShutdownUnderHangingCheck(t *testing.T) {
	entered, release := make(chan struct{}), make(chan struct{})
	defer close(release)
	s := listen(t, prometheus.NewRegistry(), Checks{Health: map[string]Check{"hang": func(context.Context) error {
		close(entered)
		<-release
		return nil
	}}})
	s.checkTimeout, s.shutdownTimeout = time.Hour, time.Hour
	stop := start(t, s)
	answer := make(chan string, 1)
	go func() {
		resp, err := http.Get("http://" + s.Addr() + "/healthz")
		if err != nil {
			answer <- err.Error()
			return
		}
		defer resp.Body.Close()
		body, _ := io.ReadAll(resp.Body)
		answer <- resp.Status + " " + string(body)
	}()
	<-entered
	if err := stop(); err != nil {
		t.Fatalf("stop: %v", err)
	}
	if got, want := <-answer, "503 Service Unavailable hang: the check has not returned: context canceled\n"; got != want {
		t.Errorf("the probe under way got %q, want %q", got, want)
	}
	if _, err := net.Dial("tcp", s.Addr()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the address is still served: %v", err)
	}
}

// hangingCollector is a scrape that ends when it is closed.
type hangingCollector struct{ entered, release chan struct{} }

func (h hangingCollector) Describe(chan<- *prometheus.Desc) {}
func (h hangingCollector) Collect(chan<- prometheus.Metric) { close(h.entered); <-h.release }

func TestShutdownUnderHangingScrape(t *testing.T) {
	h := hangingCollector{make(chan struct{}), make(chan struct{})}
	defer close(h.release)
	reg := prometheus.NewRegistry()
	reg.MustRegister(h)
	s := listen(t, reg, Checks{})
	s.shutdownTimeout = 20 * time.Millisecond
	stop := start(t, s)
	go func() {
		if resp, err := http.Get("http://" + s.Addr() + "/metrics"); err == nil {
			resp.Body.Close()
		}
	}()
	<-h.entered
	if err := stop(); !errors.Is(err, context.DeadlineExceeded) || !strings.HasPrefix(err.Error(), "shut down metrics server: ") {
		t.Errorf("stop: %v", err)
	}
}

// A client that sends half a request does not hold up the end either.
func TestShutdownUnderSlowClient(t *testing.T) {
	s := listen(t, prometheus.NewRegistry(), Checks{})
	s.shutdownTimeout = 20 * time.Millisecond
	stop := start(t, s)
	get(t, "http://"+s.Addr()+"/healthz")
	c, err := net.Dial("tcp", s.Addr())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := c.Write([]byte("GET /healthz HTTP/1.1\r\nHost:")); err != nil {
		t.Fatal(err)
	}
	if err := stop(); err != nil && !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("stop: %v", err)
	}
}

func TestAddressInUse(t *testing.T) {
	s := listen(t, prometheus.NewRegistry(), Checks{})
	start(t, s)
	_, err := Listen(s.Addr(), prometheus.NewRegistry(), Checks{}, slog.New(slog.DiscardHandler))
	if !errors.Is(err, syscall.EADDRINUSE) || !strings.HasPrefix(err.Error(), "serve metrics: listen tcp "+s.Addr()) {
		t.Errorf("error: %v", err)
	}
}

func TestListenMalformed(t *testing.T) {
	for _, addr := range []string{"9105", "127.0.0.1:http-no", "127.0.0.1:99999"} {
		if _, err := Listen(addr, prometheus.NewRegistry(), Checks{}, slog.New(slog.DiscardHandler)); err == nil || !strings.Contains(err.Error(), "serve metrics: ") {
			t.Errorf("%s: %v", addr, err)
		}
	}
}

func TestEmptyAddress(t *testing.T) {
	s, err := Listen("", prometheus.NewRegistry(), Checks{}, slog.New(slog.DiscardHandler))
	if err != nil || s.Addr() != "" {
		t.Fatalf("address %q, %v", s.Addr(), err)
	}
	if err := start(t, s)(); err != nil {
		t.Errorf("Serve: %v", err)
	}
}

// The end may come before the start.
func TestServeAfterEnd(t *testing.T) {
	s := listen(t, prometheus.NewRegistry(), Checks{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := s.Serve(ctx); err != nil {
		t.Errorf("Serve: %v", err)
	}
	if _, err := net.Dial("tcp", s.Addr()); !errors.Is(err, syscall.ECONNREFUSED) {
		t.Errorf("the address is still taken: %v", err)
	}
}

func TestServeError(t *testing.T) {
	s := listen(t, prometheus.NewRegistry(), Checks{})
	s.listener.Close()
	if err := s.Serve(t.Context()); !errors.Is(err, net.ErrClosed) {
		t.Errorf("Serve: %v", err)
	}
}

// Whoever fills the port and asks for nothing keeps no probe out; and no request that is being answered gives way.
func TestFlood(t *testing.T) {
	entered, leave := make(chan struct{}), make(chan struct{})
	s, err := Listen("127.0.0.1:0", NewRegistry("test"), Checks{
		Ready: map[string]Check{"slow": func(context.Context) error { close(entered); <-leave; return nil }},
	}, slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	s.checkTimeout = time.Minute
	ctx, stop := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- s.Serve(ctx) }()
	get := func(path string) (int, error) {
		client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
		r, err := client.Get("http://" + s.Addr() + path)
		if err != nil {
			return 0, err
		}
		return r.StatusCode, r.Body.Close()
	}
	slow := make(chan error, 1)
	go func() {
		code, err := get("/readyz")
		if err == nil && code != http.StatusOK {
			err = fmt.Errorf("status %d", code)
		}
		slow <- err
	}()
	<-entered
	var conns []net.Conn
	for i := range 3 * maxConns {
		c, err := net.Dial("tcp", s.Addr())
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if i%2 == 0 {
			_, _ = io.WriteString(c, "GET /healthz HTTP/1.1\r\nHost: x\r\n") // and no end
		}
		conns = append(conns, c)
	}
	if code, err := get("/healthz"); code != http.StatusOK || err != nil {
		t.Errorf("healthz: %d, %v", code, err)
	}
	open := 0
	for _, c := range conns {
		_ = c.SetReadDeadline(time.Now().Add(10 * time.Millisecond))
		var netErr net.Error
		if _, err := c.Read(make([]byte, 1)); errors.As(err, &netErr) && netErr.Timeout() {
			open++
		}
	}
	if open == 0 || open > maxConns {
		t.Errorf("%d connections are open", open)
	}
	close(leave)
	if err := <-slow; err != nil {
		t.Errorf("the request that was being answered: %v", err)
	}
	stop()
	if err := <-served; err != nil {
		t.Logf("the end: %v", err) // half a request was cut off
	}
}
