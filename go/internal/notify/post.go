package notify

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/obs"
	"github.com/oom-tracer/oom-tracer/go/internal/text"
)

const (
	postTimeout   = 10 * time.Second
	maxAnswer     = 4 << 10   // bytes that are read of an answer
	maxHeader     = 64 << 10  // bytes of its header
	maxSecret     = 64 << 10  // bytes of a file with a URL or a token
	maxRetryAfter = time.Hour // of what a receiver asks for
	shownAnswer   = 200       // bytes of an answer in an error
)

// poster sends messages to one receiver. Its errors hold neither its URL nor its token.
type poster struct {
	key    string // in the config, for errors
	path   string // behind the URL
	cfg    config.Receiver
	client *http.Client
}

// newPoster makes a poster. It fails if a file cannot be used.
func newPoster(key, path string, cfg config.Receiver) (*poster, error) {
	transport := &http.Transport{
		Proxy: http.ProxyFromEnvironment, ForceAttemptHTTP2: true, MaxIdleConns: 2, IdleConnTimeout: time.Minute,
		MaxResponseHeaderBytes: maxHeader, TLSHandshakeTimeout: postTimeout,
	}
	if cfg.CAFile != "" {
		pem, err := os.ReadFile(cfg.CAFile)
		if err != nil {
			return nil, fmt.Errorf("read %s.ca_file: %w", key, err)
		}
		roots := x509.NewCertPool()
		if !roots.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("%s.ca_file: %s holds no certificate in PEM", key, cfg.CAFile)
		}
		transport.TLSClientConfig = &tls.Config{RootCAs: roots, MinVersion: tls.VersionTLS12}
	}
	p := &poster{key: key, path: path, cfg: cfg, client: &http.Client{
		Transport: transport, Timeout: postTimeout,
		// Elsewhere the URL and the token are nobody's business.
		CheckRedirect: func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse },
	}}
	_, _, err := p.secrets()
	return p, err
}

// secrets reads the URL and the token again: they may have changed.
func (p *poster) secrets() (target *url.URL, token string, err error) {
	address, key := p.cfg.URL, p.key+".url"
	if p.cfg.URLFile != "" {
		key = p.key + ".url_file"
		if address, err = readSecret(key, p.cfg.URLFile); err != nil {
			return nil, "", err
		}
	}
	target, err = url.Parse(address)
	if err != nil || target.Scheme != "http" && target.Scheme != "https" || target.Hostname() == "" || target.User != nil {
		return nil, "", fmt.Errorf("%s: must be an http:// or https:// URL without user and password", key) // and not shown
	}
	if p.path != "" {
		target = target.JoinPath(p.path)
	}
	if p.cfg.TokenFile != "" {
		key := p.key + ".token_file"
		if token, err = readSecret(key, p.cfg.TokenFile); err != nil {
			return nil, "", err
		}
		if token == "" || strings.ContainsFunc(token, func(r rune) bool { return r <= ' ' || r > '~' }) {
			return nil, "", fmt.Errorf("%s: %s must hold one word of printable ASCII", key, p.cfg.TokenFile)
		}
	}
	return target, token, nil
}

func readSecret(key, file string) (string, error) {
	f, err := os.Open(file)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", key, err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxSecret))
	if err != nil {
		return "", fmt.Errorf("read %s: %w", key, err)
	}
	return strings.TrimSpace(string(data)), nil
}

// answerError is an answer that is no success.
type answerError struct {
	status     int
	retryAfter time.Duration // 0: it does not say
	text       string        // of the answer; may be empty
}

func (e *answerError) Error() string {
	s := fmt.Sprintf("the receiver answered %d %s", e.status, http.StatusText(e.status))
	if e.status/100 == 3 {
		s += ": redirects are not followed, set the final URL"
	}
	if e.text != "" {
		s += ": " + e.text
	}
	return s
}

// refused reports whether the receiver will never take this message. The other errors may pass: with a changed secret or route, too.
func refused(err error) bool {
	a, ok := errors.AsType[*answerError](err)
	return ok && (a.status == http.StatusBadRequest || a.status == http.StatusRequestEntityTooLarge || a.status == http.StatusUnprocessableEntity)
}

// post sends a message. It returns nil once the receiver has taken it.
func (p *poster) post(ctx context.Context, body []byte) error {
	target, token, err := p.secrets()
	if err != nil {
		return err
	}
	request, err := http.NewRequestWithContext(ctx, http.MethodPost, target.String(), bytes.NewReader(body))
	if err != nil {
		return errors.New("make the request: the URL is not valid")
	}
	request.Header.Set("Content-Type", "application/json")
	request.Header.Set("User-Agent", Name+"/"+obs.Version().Version)
	if token != "" {
		request.Header.Set("Authorization", "Bearer "+token)
	}
	response, err := p.client.Do(request)
	if err != nil {
		if e, ok := errors.AsType[*url.Error](err); ok { // it has the URL
			err = e.Err
		}
		return fmt.Errorf("post: %w", err)
	}
	defer response.Body.Close()
	answer, _ := io.ReadAll(io.LimitReader(response.Body, maxAnswer)) // the status counts
	if response.StatusCode/100 == 2 {
		return nil
	}
	// An answer may repeat what it was sent.
	said := string(answer)
	for _, secret := range []string{token, target.String(), target.RequestURI(), target.Path} {
		if len(secret) > 1 {
			said = strings.ReplaceAll(said, secret, "...")
		}
	}
	return &answerError{
		status: response.StatusCode, text: text.Truncate(text.Printable(strings.Join(strings.Fields(said), " ")), shownAnswer),
		retryAfter: retryAfter(response.Header.Get("Retry-After"), time.Now()),
	}
}

// retryAfter reads the header: seconds, or a date (RFC 9110, section 10.2.3).
func retryAfter(value string, now time.Time) time.Duration {
	var d time.Duration
	if seconds, err := strconv.ParseUint(value, 10, 31); err == nil {
		d = time.Duration(seconds) * time.Second
	} else if at, err := http.ParseTime(value); err == nil {
		d = at.Sub(now)
	}
	return min(max(d, 0), maxRetryAfter)
}
