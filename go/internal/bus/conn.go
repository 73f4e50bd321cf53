package bus

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nats.go/jetstream"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// Errors that callers may want to tell apart.
var (
	ErrDisconnected = errors.New("not connected to nats") // there is no connection at the moment; it comes back by itself
	ErrClosed       = errors.New("closed")                // the connection, or the publisher, was closed and will not come back
)

// Options say who connects and how patient it is.
type Options struct {
	// Name is the connection's name on the server, and what its inbox prefix is made of: see
	// InboxPrefix. Name the program and, for one that runs on every node, after a dot the node's token.
	Name string
	// Background lets Connect succeed while NATS is away, and goes on trying. Otherwise the first
	// connection must succeed. In both cases a connection that was lost is sought for ever.
	Background bool
	// InProcess is the embedded server of this process, to which nothing is dialled. Ignored with an external one.
	InProcess nats.InProcessConnProvider
	// Dial reaches the servers where their addresses lead nowhere, as through a port-forward. Password and RootCAs then are those of
	// nats.user and of a tls:// URL, and are asked for at each login.
	Dial     func() (net.Conn, error)
	Password func() (string, error)
	RootCAs  func() (*x509.CertPool, error)
}

type dialer func() (net.Conn, error)

// Dial returns a new connection, whatever the address.
func (d dialer) Dial(_, _ string) (net.Conn, error) { return d() }

// InboxPrefix is the prefix of the subjects on which a client of that name receives replies: _INBOX_<name>, where letters,
// digits, '-' and '.' stay and all else becomes '_'. A client with limited permissions needs to subscribe to <prefix>.>. A
// dot begins a token, so that <program>.<node> can be permitted for one node, and for all of them.
func InboxPrefix(name string) string {
	return "_INBOX_" + regexp.MustCompile(`[^A-Za-z0-9.-]`).ReplaceAllString(name, "_")
}

// Conn is a connection to NATS that seeks its server for ever. Its methods may be called from any goroutine.
//
// It knows by itself whether it is connected: nats.go's status methods can wait as long as dialTimeout for its lock.
type Conn struct {
	nc     *nats.Conn
	js     jetstream.JetStream
	log    *slog.Logger
	server string // for messages: addresses, no secrets
	inbox  string

	closing atomic.Bool
	closed  chan struct{} // closed by nats.go's last callback

	mu       sync.Mutex
	link     context.Context // lives as long as the present connection; nil when there is none
	cut      context.CancelCauseFunc
	up       chan struct{}          // closed while there is a link
	said     map[string]bool        // what was logged since the state last changed
	noInbox  error                  // why replies cannot arrive on this link
	watchers map[*func(denial)]bool // called for each permission violation
}

// denial is one refusal by the server, which comes without any tie to the call that caused it.
type denial struct {
	subscribe bool // else publish
	subject   string
	err       error // wraps nats.ErrPermissionViolation
}

// Connect connects to the servers of cfg.URL, or, when that is empty, to the embedded server that cfg.Embedded describes, in
// this process or another one of the machine. It returns when the connection stands, ctx ends or, unless o.Background is set,
// every server was tried once (at most 5 s each). It fails at once on files of cfg that cannot be used. They are read again at
// each reconnect, so that secrets can be exchanged under a running program; only an nkey must keep its public half.
func Connect(ctx context.Context, cfg config.NATS, o Options, log *slog.Logger) (*Conn, error) {
	c := &Conn{
		log: log, inbox: InboxPrefix(o.Name), closed: make(chan struct{}), up: make(chan struct{}),
		said: map[string]bool{}, watchers: map[*func(denial)]bool{},
	}
	server, options, err := c.configure(cfg, o)
	if err != nil {
		return nil, fmt.Errorf("connect to nats: %w", err)
	}
	c.server = server
	// nats.Connect knows no context. A connection that comes too late is closed again.
	tried := make(chan error, 1)
	go func() {
		var err error
		c.nc, err = nats.Connect(c.server, options...)
		tried <- err
	}()
	select {
	case err = <-tried:
	case <-ctx.Done():
		c.closing.Store(true)
		go func() {
			if <-tried == nil {
				c.nc.Close()
			}
		}()
		return nil, fmt.Errorf("connect to nats at %s: %w", c.server, context.Cause(ctx))
	}
	if err != nil {
		return nil, fmt.Errorf("connect to nats at %s: %w%s", c.server, err, hint(err, cfg, o))
	}
	c.js, err = jetstream.New(c.nc)
	if err == nil && !o.Background {
		// The callback that notes the new link runs on another goroutine.
		_, err = c.connected(ctx)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("connect to nats at %s: %w", c.server, err)
	}
	return c, nil
}

// hint says where to look, for errors that do not say it themselves.
func hint(err error, cfg config.NATS, o Options) string {
	switch {
	case errors.Is(err, nats.ErrAuthorization) && o.Password != nil:
		return fmt.Sprintf(" (user %q: were the servers restarted since the Secret changed?)", cfg.User)
	case errors.Is(err, nats.ErrAuthorization) && cfg.URL == "":
		return fmt.Sprintf(" (the server there does not accept the password in %s: does another nats-server listen there?)", PasswordFile(cfg.Embedded.Dir))
	case errors.Is(err, nats.ErrAuthorization) && cfg.TokenFile != "":
		return fmt.Sprintf(" (token in %s: see the log of oom-auth)", cfg.TokenFile)
	case errors.Is(err, nats.ErrAuthorization) && cfg.User != "":
		return fmt.Sprintf(" (user %q: check nats.user and nats.password_file)", cfg.User)
	case errors.Is(err, nats.ErrAuthorization):
		return " (check nats.creds_file, nats.nkey_file, nats.token_file or nats.user)"
	case errors.Is(err, nats.ErrNoServers) && cfg.URL == "":
		return " (nobody listens there: is oom-tracer running on this node, with its embedded server?)"
	case errors.Is(err, nats.ErrNoServers):
		return " (nobody listens there)"
	case errors.Is(err, nats.ErrSecureConnWanted):
		return " (nats.url or nats.tls requires TLS and the server does not offer it)"
	case errors.Is(err, nats.ErrTLS) && o.RootCAs != nil:
		return " (does the server's certificate have this name, and is it signed by the authority in the Secret?)"
	case errors.Is(err, nats.ErrTLS):
		return " (check nats.tls, and whether the server wants a client certificate)"
	case lateLogin(err):
		return lateHint
	}
	return ""
}

// While a server waits for an auth callout it pings the client after two seconds, and nats.go takes that for an error.
const lateHint = " (the server did not decide on this login in time: is oom-auth running?)"

func lateLogin(err error) bool { return strings.HasSuffix(err.Error(), "expected 'PONG', got 'PING'") }

// configure turns the configuration into nats.go's: the servers' URLs, with commas between, and the options.
func (c *Conn) configure(cfg config.NATS, o Options) (servers string, options []nats.Option, err error) {
	// The retry loop may call back before nats.Connect has returned.
	var early atomic.Pointer[nats.Conn]
	options = []nats.Option{
		nats.Name(o.Name),
		nats.CustomInboxPrefix(c.inbox),
		nats.Timeout(dialTimeout),
		nats.FlusherTimeout(dialTimeout),
		// The dialer resolves too, and within its timeout; nats.go's own lookup has none.
		nats.SkipHostLookup(),
		nats.PingInterval(pingInterval),
		nats.MaxPingsOutstanding(2),
		nats.MaxReconnects(-1),
		nats.RetryOnFailedConnect(o.Background),
		// Secrets may be exchanged while we run: a refusal today is not one for ever.
		nats.IgnoreAuthErrorAbort(),
		// No buffer: it would send later, behind the back of the publisher, what that has sent again meanwhile.
		nats.ReconnectBufSize(-1),
		nats.CustomReconnectDelay(func(attempts int) time.Duration {
			// No callback reports a failed login or handshake while the first connection is sought.
			if nc := early.Load(); nc != nil {
				c.attemptFailed(nc.LastError())
			}
			return backoff(attempts)
		}),
		nats.ReconnectErrHandler(func(nc *nats.Conn, err error) {
			early.Store(nc)
			c.attemptFailed(err)
		}),
		nats.ConnectHandler(func(nc *nats.Conn) { early.Store(nc); c.linkUp(nc) }),
		nats.ReconnectHandler(c.linkUp),
		nats.DisconnectErrHandler(func(_ *nats.Conn, err error) { c.linkDown(err) }),
		nats.ClosedHandler(c.linkClosed),
		nats.ErrorHandler(func(_ *nats.Conn, sub *nats.Subscription, err error) { c.asyncError(sub, err) }),
		nats.LameDuckModeHandler(func(nc *nats.Conn) {
			c.log.Info("nats server is shutting down, connecting to another", "server", nc.ConnectedUrlRedacted())
		}),
	}

	login := func(user string, password func() (string, error)) nats.Option {
		return nats.UserInfoHandler(func() (string, string) { return user, c.secret(password) })
	}
	if cfg.URL == "" {
		password := func() (string, error) { return ReadEmbeddedPassword(cfg.Embedded.Dir) }
		options = append(options, login(EmbeddedUser, password))
		if o.InProcess != nil { // the password is there when the server is up
			return "nats://in-process", append(options, nats.InProcessServer(o.InProcess)), nil
		}
		addr, err := embeddedAddress(cfg.Embedded)
		if err != nil {
			return "", nil, err
		}
		if _, err := password(); err != nil {
			return "", nil, fmt.Errorf("%w (is oom-tracer running on this node, with its embedded server?)", err)
		}
		return "nats://" + addr, options, nil
	}
	if o.Dial != nil {
		options = append(options, nats.SetCustomDialer(dialer(o.Dial)), login(cfg.User, o.Password))
		if o.RootCAs != nil {
			options = append(options, nats.ClientTLSConfig(nil, o.RootCAs))
		}
		return cfg.URL, options, nil
	}
	// A file that cannot be read fails here: nats.go would only notice at the first login, and then for ever.
	switch {
	case cfg.CredsFile != "":
		_, err = readSecretFile("nats.creds_file", cfg.CredsFile)
		options = append(options, nats.UserCredentials(cfg.CredsFile))
	case cfg.NKeyFile != "":
		nkey, seedErr := nats.NkeyOptionFromSeed(cfg.NKeyFile)
		if seedErr != nil {
			err = fmt.Errorf("read nats.nkey_file: %w", seedErr)
		}
		options = append(options, nkey)
	case cfg.TokenFile != "":
		token := func() (string, error) { return readSecretFile("nats.token_file", cfg.TokenFile) }
		_, err = token()
		options = append(options, nats.TokenHandler(func() string { return c.secret(token) }))
	case cfg.User != "":
		password := func() (string, error) { return readSecretFile("nats.password_file", cfg.PasswordFile) }
		_, err = password()
		options = append(options, login(cfg.User, password))
	}
	if cfg.TLS.CAFile != "" {
		options = append(options, nats.RootCAs(cfg.TLS.CAFile))
	}
	if cfg.TLS.CertFile != "" || cfg.TLS.KeyFile != "" {
		options = append(options, nats.ClientCert(cfg.TLS.CertFile, cfg.TLS.KeyFile))
	}
	return cfg.URL, options, err
}

func (c *Conn) secret(read func() (string, error)) string {
	secret, err := read()
	c.attemptFailed(err)
	return secret
}

func (c *Conn) linkUp(nc *nats.Conn) {
	c.mu.Lock()
	if c.link == nil {
		c.link, c.cut = context.WithCancelCause(context.Background())
		close(c.up)
	}
	c.noInbox = nil
	clear(c.said)
	c.mu.Unlock()
	c.log.Info("connected to nats", "server", nc.ConnectedUrlRedacted(), "server_name", nc.ConnectedServerName())
}

func (c *Conn) linkDown(err error) {
	cause := ErrDisconnected
	if err != nil {
		cause = fmt.Errorf("%w: %w", ErrDisconnected, err)
	}
	c.mu.Lock()
	had := c.link != nil
	if had {
		c.cut(cause)
		c.link, c.cut = nil, nil
		c.up = make(chan struct{})
	}
	clear(c.said)
	c.mu.Unlock()
	if had && !c.closing.Load() {
		c.log.Warn("disconnected from nats, reconnecting", "server", c.server, "error", err)
	}
}

// linkClosed is nats.go's last word.
func (c *Conn) linkClosed(nc *nats.Conn) {
	err := nc.LastError()
	c.linkDown(err)
	if !c.closing.Load() {
		c.log.Error("nats connection is closed, will not reconnect", "server", c.server, "error", err)
	}
	close(c.closed)
}

// attemptFailed says once per outage why the server cannot be reached.
func (c *Conn) attemptFailed(err error) {
	if err == nil || c.closing.Load() {
		return
	}
	key := err.Error()
	// nats.go hides the first refused connection behind ErrNoServers.
	if errors.Is(err, nats.ErrNoServers) || errors.Is(err, syscall.ECONNREFUSED) {
		key, err = "refused", fmt.Errorf("%w: nobody listens there", err)
	} else if lateLogin(err) {
		err = fmt.Errorf("%w%s", err, lateHint)
	}
	c.once(slog.LevelWarn, key, "cannot connect to nats, will retry", "server", c.server, "error", err)
}

// once logs a key once until the connection's state changes, and at most 32 keys: error texts carry port numbers.
func (c *Conn) once(level slog.Level, key, msg string, args ...any) {
	c.mu.Lock()
	again := c.said[key] || len(c.said) >= 32
	if !again {
		c.said[key] = true
	}
	c.mu.Unlock()
	if !again {
		c.log.Log(context.Background(), level, msg, args...)
	}
}

// asyncError takes what the server says without being asked.
func (c *Conn) asyncError(sub *nats.Subscription, err error) {
	if c.closing.Load() {
		return
	}
	if errors.Is(err, nats.ErrPermissionViolation) {
		d := parseDenial(err)
		c.mu.Lock()
		if c.isInbox(d) {
			c.noInbox = err
		}
		watchers := slices.Collect(maps.Keys(c.watchers))
		c.mu.Unlock()
		for _, w := range watchers {
			(*w)(d)
		}
		c.once(slog.LevelWarn, err.Error(), "nats denied a permission", "server", c.server, "error", err)
		return
	}
	if !c.Connected() {
		c.attemptFailed(err)
		return
	}
	if sub == nil {
		sub = &nats.Subscription{}
	}
	c.once(slog.LevelWarn, sub.Subject+err.Error(), "nats reports an error", "server", c.server, "subject", sub.Subject, "error", err)
}

// parseDenial reads Permissions Violation for Publish to "subject" (server/client.go, pubPermissionViolation).
func parseDenial(err error) denial {
	text := err.Error()
	d := denial{subscribe: strings.Contains(text, "Violation for Subscription"), err: err}
	if _, rest, ok := strings.Cut(text, `"`); ok {
		d.subject, _, _ = strings.Cut(rest, `"`)
	}
	return d
}

func (c *Conn) isInbox(d denial) bool {
	return d.subscribe && strings.HasPrefix(d.subject, c.inbox+".")
}

// watch has tell called for every denial until the returned function is called. tell must not block.
func (c *Conn) watch(tell func(denial)) (stop func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.watchers[&tell] = true
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		delete(c.watchers, &tell)
	}
}

func (c *Conn) inboxDenied() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.noInbox
}

// connected waits for a connection and returns a context that ends with it, with a cause that wraps
// ErrDisconnected. It fails with ErrClosed, or with ctx's cause.
func (c *Conn) connected(ctx context.Context) (link context.Context, err error) {
	for {
		c.mu.Lock()
		link, up := c.link, c.up
		c.mu.Unlock()
		if link != nil {
			return link, nil
		}
		select {
		case <-up:
		case <-c.closed:
			return nil, fmt.Errorf("nats connection: %w", ErrClosed)
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

// Connected tells whether there is a connection now. It never blocks.
func (c *Conn) Connected() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.link != nil
}

// Closed is closed when the connection will not come back: after Close, or after an error that nats.go does not know.
func (c *Conn) Closed() <-chan struct{} { return c.closed }

// NATS is the connection itself, for plain subscriptions. Do not close it: use Close.
func (c *Conn) NATS() *nats.Conn { return c.nc }

// JetStream is the connection's JetStream API, without a domain or a prefix.
func (c *Conn) JetStream() jetstream.JetStream { return c.js }

// Close ends the connection and all that waits on it, within 6 s. It may be called more than once.
func (c *Conn) Close() {
	c.closing.Store(true)
	// Close needs the lock under which nats.go dials.
	go c.nc.Close()
	select {
	case <-c.closed:
	case <-time.After(closeTimeout):
		c.log.Warn("nats connection did not close in time", "server", c.server, "timeout", closeTimeout)
	}
}

// call makes one request of the JetStream API. subject is the request's, or how it begins: the server
// reports a missing permission apart from the request, which would otherwise only time out.
func (c *Conn) call(ctx context.Context, subject string, request func(context.Context) error) error {
	link, err := c.connected(ctx)
	if err != nil {
		return err
	}
	bounded, cancel := context.WithTimeoutCause(ctx, requestTimeout, fmt.Errorf("no answer within %s: %w", requestTimeout, context.DeadlineExceeded))
	defer cancel()
	err = c.guarded(bounded, link, subject, request)
	if denied := c.inboxDenied(); err != nil && denied != nil && ctx.Err() == nil {
		return denied // the server reported it to whoever asked first
	}
	return plain(err)
}

// guarded runs do with a context that also ends when link does, and when the server denies replies, or requests whose
// subject begins so. The cause of its end is then the error.
func (c *Conn) guarded(ctx, link context.Context, subject string, do func(context.Context) error) error {
	ctx, cut := context.WithCancelCause(ctx)
	defer cut(nil)
	defer context.AfterFunc(link, func() { cut(context.Cause(link)) })()
	defer c.watch(func(d denial) {
		if c.isInbox(d) || !d.subscribe && strings.HasPrefix(d.subject, subject) {
			cut(d.err)
		}
	})()
	err := do(ctx)
	if err != nil && ctx.Err() != nil {
		return context.Cause(ctx)
	}
	return err
}

// disconnected are the errors with which nats.go says that it is not connected. With its buffer switched off it speaks of the buffer.
var disconnected = []error{nats.ErrReconnectBufExceeded, nats.ErrDisconnected, nats.ErrConnectionReconnecting, nats.ErrConnectionClosed}

// plain has those errors wrap ErrDisconnected.
func plain(err error) error {
	is := func(e error) bool { return errors.Is(err, e) }
	if is(ErrDisconnected) || !slices.ContainsFunc(disconnected, is) {
		return err
	}
	return fmt.Errorf("%w: %w", ErrDisconnected, err)
}
