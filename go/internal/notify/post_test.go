package notify

import (
	"bufio"
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

const (
	secretPath  = "/services/T000/B000/hush"
	secretToken = "mumstheword"
)

// secretFile writes a file with a secret.
func secretFile(t *testing.T, text string) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// slackPoster posts to the server, whose path is a secret, with a token.
func slackPoster(t *testing.T, url string) *poster {
	t.Helper()
	p, err := newPoster("notify.slack", "", config.Receiver{URLFile: secretFile(t, url+secretPath+"\n"), TokenFile: secretFile(t, secretToken+"\n")})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// tcp is a server that reads a request, and does not answer by HTTP.
func tcp(t *testing.T, serve func(net.Conn)) (url string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				if _, err := http.ReadRequest(bufio.NewReader(c)); err == nil {
					serve(c)
				}
			}()
		}
	}()
	return "http://" + l.Addr().String()
}

// TestPostFails: servers that fail in every way. The error names what is wrong, and no secret; it is clear whether to try again.
func TestPostFails(t *testing.T) {
	var followed atomic.Int32
	elsewhere := httptest.NewServer(http.HandlerFunc(func(http.ResponseWriter, *http.Request) { followed.Add(1) }))
	t.Cleanup(elsewhere.Close)
	status := func(code int, header, value, body string) func(t *testing.T) string {
		return func(t *testing.T) string {
			s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
				if header != "" {
					w.Header().Set(header, value)
				}
				w.WriteHeader(code)
				_, _ = io.WriteString(w, body)
			}))
			t.Cleanup(s.Close)
			return s.URL
		}
	}
	for name, tt := range map[string]struct {
		server  func(t *testing.T) (url string)
		err     string
		refused bool
		after   time.Duration
	}{
		"500":       {server: status(500, "", "", ""), err: "answered 500 Internal Server Error"},
		"429":       {server: status(429, "Retry-After", "7", "slow down"), err: "answered 429 Too Many Requests: slow down", after: 7 * time.Second},
		"503":       {server: status(503, "Retry-After", "86400", ""), err: "answered 503", after: time.Hour},
		"400":       {server: status(400, "", "", "invalid_payload"), err: "answered 400 Bad Request: invalid_payload", refused: true},
		"403":       {server: status(403, "", "", "\x1b[31minvalid\n token"), err: `answered 403 Forbidden: \x1b[31minvalid token`},
		"413":       {server: status(413, "", "", ""), err: "answered 413", refused: true},
		"echo":      {server: status(404, "", "", "no "+secretPath+" for Bearer "+secretToken), err: "answered 404 Not Found: no ... for Bearer ..."},
		"redirect":  {server: status(302, "Location", elsewhere.URL+"/hush", ""), err: "answered 302 Found: redirects are not followed"},
		"redirect2": {server: status(307, "Location", elsewhere.URL, ""), err: "answered 307"},
		"refused connection": {server: func(t *testing.T) string {
			s := httptest.NewServer(nil)
			s.Close()
			return s.URL
		}, err: "connection refused"},
		"reset": {server: func(t *testing.T) string {
			return tcp(t, func(c net.Conn) { _ = c.(*net.TCPConn).SetLinger(0) })
		}, err: "post: "},
		"no http": {server: func(t *testing.T) string {
			return tcp(t, func(c net.Conn) { _, _ = io.WriteString(c, "220 mail ESMTP\r\n") })
		}, err: "malformed HTTP"},
		"endless header": {server: func(t *testing.T) string {
			return tcp(t, func(c net.Conn) {
				_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\n")
				for {
					if _, err := io.WriteString(c, "X: "+strings.Repeat("x", 1<<16)+"\r\n"); err != nil {
						return
					}
				}
			})
		}, err: "headers exceeded"},
		"unknown ca": {server: func(t *testing.T) string {
			s := httptest.NewTLSServer(nil)
			s.Config.ErrorLog = nil
			t.Cleanup(s.Close)
			return s.URL
		}, err: "certificate signed by unknown authority"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			err := slackPoster(t, tt.server(t)).post(t.Context(), []byte(`{}`))
			if err == nil || !strings.Contains(err.Error(), tt.err) || refused(err) != tt.refused {
				t.Errorf("%v, refused %t", err, refused(err))
			}
			if a, _ := errors.AsType[*answerError](err); a != nil && a.retryAfter != tt.after {
				t.Errorf("retry after %s", a.retryAfter)
			}
			for _, secret := range []string{"hush", secretToken} {
				if strings.Contains(fmt.Sprintf("%+v", err), secret) {
					t.Errorf("the error has a secret: %v", err)
				}
			}
		})
	}
	t.Cleanup(func() {
		if followed.Load() != 0 {
			t.Error("a redirect was followed")
		}
	})
}

// TestPostHangs: a server that does not answer holds nobody up for longer than the timeout, and not at the end.
func TestPostHangs(t *testing.T) {
	p := slackPoster(t, tcp(t, func(c net.Conn) { _, _ = io.Copy(io.Discard, c) }))
	p.client.Timeout = 200 * time.Millisecond
	if err := p.post(t.Context(), []byte(`{}`)); err == nil || refused(err) || strings.Contains(err.Error(), "hush") {
		t.Errorf("%v", err)
	}
	p.client.Timeout = time.Minute
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if err := p.post(ctx, []byte(`{}`)); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
}

// TestPost: the request; secrets that change between two messages; an answer of any size; a CA of one's own.
func TestPost(t *testing.T) {
	var got []string
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		body, _ := io.ReadAll(r.Body)
		got = append(got, strings.Join([]string{r.Method, r.URL.String(), r.Header.Get("Authorization"), r.Header.Get("Content-Type"), string(body)}, " "))
		for range 1000 { // 64 MB, unless the client goes away
			if _, err := w.Write(make([]byte, 64<<10)); err != nil {
				return
			}
		}
		got = append(got, "all of the answer was read")
	}))
	t.Cleanup(s.Close)
	ca := secretFile(t, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw})))
	cfg := config.Receiver{URLFile: secretFile(t, s.URL+"/a?b=c"), TokenFile: secretFile(t, "one"), CAFile: ca}
	p, err := newPoster("notify.webhook", "", cfg)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.post(t.Context(), []byte(`{"n":1}`)); err != nil {
		t.Error(err)
	}
	for file, text := range map[string]string{cfg.URLFile: s.URL + "/d", cfg.TokenFile: "two"} {
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := p.post(t.Context(), []byte(`{"n":2}`)); err != nil {
		t.Error(err)
	}
	s.Close()
	want := []string{`POST /a?b=c Bearer one application/json {"n":1}`, `POST /d Bearer two application/json {"n":2}`}
	if strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("%q\nwant %q", got, want)
	}
	if err := os.Remove(cfg.TokenFile); err != nil {
		t.Fatal(err)
	}
	if err := p.post(t.Context(), nil); err == nil || !strings.Contains(err.Error(), "read notify.webhook.token_file: ") {
		t.Errorf("without the file: %v", err)
	}
}

// TestPosterRefuses: files that cannot be used are an error at the start, which does not show what they hold.
func TestPosterRefuses(t *testing.T) {
	for want, cfg := range map[string]config.Receiver{
		"read notify.slack.url_file: ":                     {URLFile: "/nowhere"},
		"notify.slack.url_file: must be an http":           {URLFile: secretFile(t, "hush")},
		"user and password":                                {URLFile: secretFile(t, "http://hush:hush@x")},
		"must hold one word":                               {URL: "http://x", TokenFile: secretFile(t, "hush\nhush")},
		"read notify.slack.token_file: ":                   {URL: "http://x", TokenFile: "/nowhere"},
		"read notify.slack.ca_file: ":                      {URL: "http://x", CAFile: "/nowhere"},
		"secret holds no certificate in PEM":               {URL: "http://x", CAFile: secretFile(t, "hush")},
		"notify.slack.url: must be an http:// or https://": {URL: "http://%zz/hush"},
	} {
		if _, err := newPoster("notify.slack", "", cfg); err == nil || !strings.Contains(err.Error(), want) || strings.Contains(err.Error(), "hush") {
			t.Errorf("%v, want %s", err, want)
		}
	}
}

func TestRetryAfterHeader(t *testing.T) {
	now := time.Date(2026, 11, 29, 2, 0, 0, 0, time.UTC)
	for value, want := range map[string]time.Duration{
		"": 0, "0": 0, "120": 2 * time.Minute, "-5": 0, "soon": 0, "99999999999": 0, "4000": time.Hour,
		"Sun, 29 Nov 2026 02:00:30 GMT": 30 * time.Second, "Sun, 29 Nov 2026 01:00:00 GMT": 0,
	} {
		if got := retryAfter(value, now); got != want {
			t.Errorf("%q: %s, want %s", value, got, want)
		}
	}
}
