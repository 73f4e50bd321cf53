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
	"io/fs"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/nats-io/nats-server/v2/server"

	"github.com/oom-tracer/oom-tracer/go/internal/bus"
	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// Server is a running server.
type Server struct {
	srv      *server.Server
	shutdown func() // stops srv; once
	release  func() // gives the directory up; once
}

// Start starts the server and returns when it takes connections, which it does after JetStream has
// read its store. Connect to it with bus.Connect and the same configuration.
//
// It fails when cfg.Listen is not a loopback address or is taken, and when cfg.Dir is in use by another
// process, belongs to somebody else, or holds a password file that cannot be trusted.
func Start(cfg config.Embedded, log *slog.Logger) (_ *Server, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("start embedded nats-server: %w", err)
		}
	}()
	listen, err := loopback(cfg.Listen)
	if err != nil {
		return nil, err
	}
	if err := prepareDir(cfg.Dir); err != nil {
		return nil, err
	}
	lock, err := lockDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	s := &Server{}
	address := "" // the file with the address, when the kernel picked the port
	s.release = sync.OnceFunc(func() {
		if address != "" {
			os.Remove(address)
		}
		lock.Close()
	})
	defer func() {
		if err != nil {
			s.release()
		}
	}()
	password, err := ensurePassword(cfg.Dir)
	if err != nil {
		return nil, err
	}
	// nats-server would say so only in a log line.
	if probe, err := net.Listen("tcp", listen.String()); errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("address %s is in use: is another oom-tracer running? (%w)", listen, err)
	} else if err != nil {
		return nil, err
	} else {
		probe.Close()
	}

	port := int(listen.Port())
	if port == 0 {
		port = server.RANDOM_PORT
	}
	bridge := &logger{log: log}
	s.srv, err = server.NewServer(&server.Options{
		ServerName:                 "oom-tracer",
		Host:                       listen.Addr().String(),
		Port:                       port,
		CustomClientAuthentication: onlyUser(password),
		JetStream:                  true,
		StoreDir:                   cfg.Dir,
		SyncAlways:                 cfg.SyncAlways,
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
		return nil, err
	}
	s.shutdown = sync.OnceFunc(s.srv.Shutdown)
	s.srv.SetLoggerV2(bridge, false, false, false)
	// Start returns when the listener stands, or when something made it give up, which it only logs.
	s.srv.Start()
	if failure := bridge.started(); failure != "" {
		s.shutdown()
		return nil, fmt.Errorf("%s (nats.embedded.dir is %s)", failure, cfg.Dir)
	}
	if !s.srv.ReadyForConnections(10 * time.Second) {
		s.shutdown()
		return nil, errors.New("not ready after 10s")
	}
	if listen.Port() == 0 {
		address = bus.AddressFile(cfg.Dir)
		if err := writeFile(address, s.srv.Addr().String()+"\n"); err != nil {
			s.shutdown()
			return nil, err
		}
	}
	log.Info("embedded nats-server is ready", "address", s.srv.Addr().String(), "dir", cfg.Dir, "sync_always", cfg.SyncAlways)
	return s, nil
}

// ClientURL is where it listens: nats://host:port.
func (s *Server) ClientURL() string { return "nats://" + s.srv.Addr().String() }

// Healthy fails when JetStream has switched itself off, as nats-server does, until it is restarted, when
// its disk is full or broken.
func (s *Server) Healthy() error {
	if !s.srv.JetStreamEnabled() {
		return errors.New("embedded nats-server: jetstream has switched itself off, see its errors in the log (disk full?); a restart brings it back")
	}
	return nil
}

// Shutdown stops the server, writes its state to disk and releases the directory. It fails when that
// takes longer than ctx allows; the directory then stays locked until the process ends. It may be
// called more than once.
func (s *Server) Shutdown(ctx context.Context) error {
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.shutdown()
		s.srv.WaitForShutdown()
	}()
	select {
	case <-done:
	case <-ctx.Done():
		return fmt.Errorf("shut down embedded nats-server: %w", context.Cause(ctx))
	}
	s.release()
	return nil
}

// onlyUser lets in the one user. nats-server's own check would do the same, and warn at each start of a
// password that is not hashed: it is random, and lies in the file beside the data that it protects.
type onlyUser string

func (password onlyUser) Check(c server.ClientAuthentication) bool {
	o := c.GetOpts()
	return o.Username == bus.EmbeddedUser && subtle.ConstantTimeCompare([]byte(o.Password), []byte(password)) == 1
}

// loopback parses nats.embedded.listen.
func loopback(listen string) (netip.AddrPort, error) {
	host, port, err := net.SplitHostPort(listen)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("nats.embedded.listen: %w", err)
	}
	if host == "localhost" {
		host = "127.0.0.1"
	}
	addr, err := netip.ParseAddr(host)
	if err != nil || !addr.IsLoopback() {
		return netip.AddrPort{}, fmt.Errorf("nats.embedded.listen: %q is not a loopback address: the embedded server is for its own machine, for others set nats.url", host)
	}
	n, err := strconv.ParseUint(port, 10, 16)
	if err != nil {
		return netip.AddrPort{}, fmt.Errorf("nats.embedded.listen: %q is not a port, 0..65535", port)
	}
	return netip.AddrPortFrom(addr, uint16(n)), nil
}

// Files of ours in the directory, beside jetstream/, bus.PasswordFile and bus.AddressFile.
const lockName = "lock"

// prepareDir makes the directory, or makes sure of it. One that is empty, or that was ours before, is closed to
// others; any other is refused rather than changed, for it may be /tmp.
func prepareDir(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make nats.embedded.dir: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return fmt.Errorf("look at nats.embedded.dir: %w", err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return fmt.Errorf("nats.embedded.dir %s belongs to user %d and not to %d, who runs this", dir, st.Uid, os.Geteuid())
	}
	if info.Mode().Perm()&0o077 == 0 {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("look at nats.embedded.dir: %w", err)
	}
	foreign := slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() != "lost+found" })
	ours := !foreign || slices.ContainsFunc(entries, func(e fs.DirEntry) bool { return e.Name() == lockName })
	if !ours {
		return fmt.Errorf("nats.embedded.dir %s has mode %04o and holds other files: give the embedded server a directory of its own", dir, info.Mode().Perm())
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		return fmt.Errorf("close nats.embedded.dir to others: %w", err)
	}
	return nil
}

// lockDir makes sure that no other process uses the directory: two servers would write over each other.
// The lock ends with the process, whatever ends it.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, lockName)
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock nats.embedded.dir: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		defer f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			var pid [32]byte
			n, _ := f.Read(pid[:])
			return nil, fmt.Errorf("nats.embedded.dir %s is in use by process %s: is another oom-tracer running? (%w)", dir, strings.TrimSpace(string(pid[:n])), err)
		}
		return nil, fmt.Errorf("lock nats.embedded.dir: lock %s: %w", path, err)
	}
	// The pid is for the message above alone.
	err = f.Truncate(0)
	if err == nil {
		_, err = f.WriteAt([]byte(strconv.Itoa(os.Getpid())+"\n"), 0)
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("lock nats.embedded.dir: %w", err)
	}
	return f, nil
}

// ensurePassword reads the password, and makes one when there is none. It never replaces one: whoever
// tampered with it, or whatever damaged it, should be noticed.
func ensurePassword(dir string) (string, error) {
	password, err := bus.ReadEmbeddedPassword(dir)
	if !errors.Is(err, fs.ErrNotExist) {
		return password, err
	}
	var secret [32]byte
	rand.Read(secret[:]) // never fails
	if err := writeFile(bus.PasswordFile(dir), base64.RawURLEncoding.EncodeToString(secret[:])+"\n"); err != nil {
		return "", err
	}
	return bus.ReadEmbeddedPassword(dir)
}

// writeFile writes a file of mode 0600 that is either there as a whole or not at all.
func writeFile(path, text string) (err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("write %s: %w", path, err)
		}
	}()
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*") // 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	defer f.Close()
	if _, err := f.WriteString(text); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
