// Package embedded runs a NATS server with JetStream inside the process: the default of a node agent
// that has no NATS cluster to talk to. It listens on loopback only and has one user with a random password,
// for a pod on the host network shares the loopback device.
package embedded

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"encoding/base64"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/netlimit"
	"github.com/oom-tracer/oom-tracer/go/internal/statedir"
)

// What others on the machine can take of it. They share the loopback device, and need no password to connect.
const (
	maxConns    = 64
	loginGrace  = 50 * time.Millisecond // times a full queue of the kernel (4096) is less than a client waits
	authTimeout = 2 * time.Second
	maxLine     = 4 << 10
	maxPayload  = 1 << 20
	maxPending  = 16 << 20 // of what a client does not read
)

// Server is the server, and what keeps it working: see Supervise.
type Server struct {
	cfg      config.Embedded
	log      *slog.Logger
	listener *netlimit.Listener
	suspect  chan struct{} // holds a token while something may be wrong

	life   sync.Mutex // held by Shutdown and restart
	closed bool       // by Shutdown; guarded by life

	restarting atomic.Pointer[time.Time] // since when; nil: it is not

	mu       sync.Mutex
	instance *instance // nil while the server is down
	trouble  error     // why nothing is stored, as Supervise found it
	hopeless bool      // restarts do not help, and it is not the disk
}

// instance is one nats-server on the directory, from its start to its shutdown.
type instance struct {
	*server.Server
	release func() // gives the directory up
}

// Start starts the server and returns when JetStream has read its store and clients can connect: with bus.Connect and the
// same configuration; from within the process also with bus.Options.InProcess.
//
// A disk that is full, read-only or broken is no error: Supervise then starts the server later. Start fails when cfg.Listen
// is not a loopback address or is taken, and when cfg.Dir is in use or not safe from other users.
func Start(cfg config.Embedded, log *slog.Logger) (_ *Server, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start embedded nats-server: %w", err)
		}
	}()
	if listen, err := netip.ParseAddrPort(cfg.Listen); err != nil || !listen.Addr().IsLoopback() {
		return nil, fmt.Errorf("nats.embedded.listen: %q is not a loopback address and a port: the embedded server serves this machine only; "+
			"for other machines set nats.url", cfg.Listen)
	}
	listener, err := net.Listen("tcp", cfg.Listen)
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("address %s is in use: is another oom-tracer running? (%w)", cfg.Listen, err)
	} else if err != nil {
		return nil, err
	}
	s := &Server{
		cfg: cfg, log: log, suspect: make(chan struct{}, 1),
		listener: netlimit.New(listener, maxConns, loginGrace),
	}
	if err := s.start(); DiskTrouble(err) {
		log.Warn("embedded nats-server cannot use its disk, will retry: kills wait in the journal", "dir", cfg.Dir, "error", err)
		s.trouble = err
		s.Suspect()
	} else if err != nil {
		s.listener.Close()
		return nil, err
	}
	go s.serve()
	return s, nil
}

func (s *Server) start() (err error) {
	dir, err := statedir.Make(s.cfg.Dir)
	if err != nil {
		return fmt.Errorf("nats.embedded.dir: %w", err)
	}
	var lock *os.File
	if err = secure(dir); err == nil {
		lock, err = lockDir(dir)
	}
	if err != nil {
		dir.Close()
		return fmt.Errorf("nats.embedded.dir: %w", err)
	}
	pickedPort := strings.HasSuffix(s.cfg.Listen, ":0") // then a file says which
	i := &instance{release: func() {
		if pickedPort {
			_ = dir.Remove(bus.AddressName)
		}
		lock.Close()
		dir.Close()
	}}
	defer func() {
		if err != nil {
			if i.Server != nil {
				i.Shutdown()
			}
			i.release()
		}
	}()
	password, err := ensurePassword(dir, s.log)
	if err != nil {
		return err
	}
	i.Server, err = server.NewServer(&server.Options{
		ServerName: "oom-tracer",
		// The port is ours, and so is the bound of its connections: nats-server's own would count this process's
		// connection too, and whoever fills the port would keep it out.
		DontListen:                 true,
		CustomClientAuthentication: onlyUser(password),
		AuthTimeout:                authTimeout.Seconds(),
		MaxControlLine:             maxLine,
		MaxPayload:                 maxPayload,
		MaxPending:                 maxPending,
		JetStream:                  true,
		StoreDir:                   s.cfg.Dir,
		SyncAlways:                 s.cfg.SyncAlways,
		// The stream's own max_bytes is the bound. The default, three quarters of what the disk has free at
		// this moment, would refuse to bring back a stream that has filled the disk.
		JetStreamMaxStore: 1 << 50,
		// Only consumers without a durable state live in memory.
		JetStreamMaxMemory:     64 << 20,
		DisableJetStreamBanner: true,
		NoSigs:                 true, // signals belong to main
		NoLog:                  true, // no logger of its own
	})
	if err != nil {
		return err
	}
	bridge := newLogger(s.log, s.Suspect)
	i.SetLoggerV2(bridge, false, false, false)
	// Start returns when the server runs, or when something made it give up, which it only logs.
	i.Start()
	if failure := bridge.started(); failure != "" {
		return fmt.Errorf("%s (nats.embedded.dir is %s)", failure, s.cfg.Dir)
	}
	if !i.ReadyForConnections(10 * time.Second) {
		return errors.New("not ready after 10s")
	}
	if pickedPort {
		if err := dir.WriteFile(bus.AddressName, []byte(s.listener.Addr().String()+"\n")); err != nil {
			return err
		}
	}
	s.mu.Lock()
	s.instance = i
	s.mu.Unlock()
	s.log.Info("embedded nats-server is ready", "address", s.listener.Addr().String(), "dir", s.cfg.Dir, "sync_always", s.cfg.SyncAlways)
	return nil
}

func (s *Server) current() *instance {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.instance
}

func (s *Server) serve() {
	for {
		conn, err := s.listener.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		if err != nil { // such as too many open files
			time.Sleep(100 * time.Millisecond)
			continue
		}
		go s.forward(conn.(*netlimit.Conn))
	}
}

func (s *Server) forward(client *netlimit.Conn) {
	defer client.Close()
	inner, err := s.InProcessConn()
	if err != nil {
		return
	}
	defer inner.Close()
	go func() {
		_, _ = io.Copy(inner, client)
		inner.Close()
	}()
	// The server speaks first. What it says next to a client that has not logged in is an error, and the end.
	buffer := make([]byte, maxLine)
	for replies := 0; err == nil; replies++ {
		var n int
		if n, err = inner.Read(buffer); err == nil {
			if replies == 1 && buffer[0] != '-' {
				client.Hold()
			}
			_, err = client.Write(buffer[:n])
		}
	}
}

// InProcessConn is a connection that needs no port. It implements nats.InProcessConnProvider.
func (s *Server) InProcessConn() (net.Conn, error) {
	if i := s.current(); i != nil {
		return i.InProcessConn()
	}
	return nil, errors.New("embedded nats-server is down")
}

// ClientURL is where it listens: nats://host:port.
func (s *Server) ClientURL() string { return "nats://" + s.listener.Addr().String() }

// Shutdown stops the server, writes its state to disk and releases the directory. If ctx ends first, it fails, and the
// directory stays locked until the process ends. It may be called more than once.
func (s *Server) Shutdown(ctx context.Context) error {
	s.listener.Close()
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.life.Lock()
		defer s.life.Unlock()
		s.closed = true
		s.stop()
	}()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("shut down embedded nats-server: %w", context.Cause(ctx))
	}
}

func (s *Server) stop() {
	s.mu.Lock()
	i := s.instance
	s.instance = nil
	s.mu.Unlock()
	if i != nil {
		i.Server.Shutdown()
		i.WaitForShutdown()
		i.release()
	}
}

// onlyUser lets in the one user. nats-server's own check would do the same, and warn at each start of a
// password that is not hashed: it is random, and lies in the file beside the data that it protects.
type onlyUser string

func (password onlyUser) Check(c server.ClientAuthentication) bool {
	o := c.GetOpts()
	return o.Username == bus.EmbeddedUser && subtle.ConstantTimeCompare([]byte(o.Password), []byte(password)) == 1
}

// Files of ours in the directory, beside jetstream/, bus.PasswordName and bus.AddressName.
const lockName = "lock"

// secure checks the directory. One that is empty, or that was ours before, is closed to others; any other is refused rather
// than changed, for it may be /tmp.
func secure(dir *statedir.Dir) error {
	// nats-server knows nothing of statedir.
	if err := dir.CheckContents(); err != nil {
		return err
	}
	open := dir.Private()
	if open == nil {
		return nil
	}
	entries, err := fs.ReadDir(dir.FS(), ".")
	if err != nil {
		return err
	}
	foreign := slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() != "lost+found" })
	if foreign && !slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == lockName }) {
		return fmt.Errorf("%w; or set nats.embedded.dir to another directory: this one holds other files", open)
	}
	return dir.Chmod(".", 0o700)
}

// lockDir keeps other processes out: two servers would write over each other. The lock ends with the process.
func lockDir(dir *statedir.Dir) (*os.File, error) {
	f, err := dir.OpenFile(lockName, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			var pid [32]byte
			n, _ := f.Read(pid[:])
			return nil, fmt.Errorf("%s is in use by process %s: is another oom-tracer running? (%w)", dir.Path("."), strings.TrimSpace(string(pid[:n])), err)
		}
		return nil, fmt.Errorf("lock %s: %w", dir.Path(lockName), err)
	}
	// The pid is for the message above alone: a full disk may leave it out.
	if err := f.Truncate(0); err == nil {
		_, _ = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	return f, nil
}

// ensurePassword reads the password, and makes one when there is none, or none that can be used: a power cut may
// have emptied the file, and what others may know is no password. Clients read the file again when they connect.
func ensurePassword(dir *statedir.Dir, log *slog.Logger) (string, error) {
	password, before := bus.ReadPassword(dir)
	if before == nil {
		return password, nil
	}
	if !errors.Is(before, fs.ErrNotExist) {
		log.Warn("replacing the password of the embedded nats-server", "reason", before)
	}
	var secret [32]byte
	rand.Read(secret[:]) // never fails
	if err := dir.WriteFile(bus.PasswordName, []byte(base64.RawURLEncoding.EncodeToString(secret[:])+"\n")); err != nil {
		return "", fmt.Errorf("make a password: %w (%w)", err, before)
	}
	return bus.ReadPassword(dir)
}
