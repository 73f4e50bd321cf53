package bus

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
)

// EmbeddedUser is the only user of the embedded server.
const EmbeddedUser = "oom-tracer"

// generatedPassword is what the embedded server writes: at least 32 characters of base64url. Anything
// else in the file is damage, or somebody's own idea of a password.
var generatedPassword = regexp.MustCompile(`^[A-Za-z0-9_-]{32,256}$`)

// PasswordFile is where the embedded server that stores in dir keeps its password.
func PasswordFile(dir string) string { return filepath.Join(dir, "password") }

// AddressFile is where the embedded server that stores in dir writes host:port while it runs, when its
// port was picked by the kernel (nats.embedded.listen with port 0).
func AddressFile(dir string) string { return filepath.Join(dir, "address") }

// ReadEmbeddedPassword reads the password of the embedded server that stores in dir.
//
// It fails, and names the file, when the file is missing (wraps [fs.ErrNotExist]), cannot be read, is
// open to others, or does not hold what the server wrote.
func ReadEmbeddedPassword(dir string) (string, error) {
	path := PasswordFile(dir)
	const again = "delete it and restart oom-tracer to have a new one made"
	// Lstat: a link would let whoever owns its target choose the password.
	info, err := os.Lstat(path)
	if err != nil {
		return "", fmt.Errorf("read password of the embedded nats-server: %w", err)
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("read password of the embedded nats-server: %s is not a regular file: %s", path, again)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return "", fmt.Errorf("read password of the embedded nats-server: %s has mode %04o and must have 0600, others may know it: %s", path, perm, again)
	}
	data, err := readSmall(path)
	if err != nil {
		return "", fmt.Errorf("read password of the embedded nats-server: %w", err)
	}
	password := string(bytes.TrimSuffix(data, []byte("\n")))
	if password == "" {
		return "", fmt.Errorf("read password of the embedded nats-server: %s is empty: %s", path, again)
	}
	if !generatedPassword.MatchString(password) {
		return "", fmt.Errorf("read password of the embedded nats-server: %s does not hold a generated password: %s", path, again)
	}
	return password, nil
}

// readPasswordFile reads the password of an external server. Its mode is the operator's affair:
// Kubernetes mounts secrets as links to files that the group may read.
func readPasswordFile(path string) (string, error) {
	data, err := readSmall(path)
	if err != nil {
		return "", fmt.Errorf("read nats.password_file: %w", err)
	}
	password := string(bytes.TrimRight(data, "\r\n"))
	if password == "" {
		return "", fmt.Errorf("read nats.password_file: %s is empty", path)
	}
	return password, nil
}

// readSmall reads a file of at most 4 KiB.
func readSmall(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const limit = 4 << 10
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	if len(data) > limit {
		return nil, fmt.Errorf("read %s: more than %d bytes are not a secret", path, limit)
	}
	return data, nil
}

// embeddedAddress is the host:port of the embedded server, as another process finds it.
func embeddedAddress(cfg config.Embedded) (string, error) {
	_, port, err := net.SplitHostPort(cfg.Listen)
	if err != nil {
		return "", fmt.Errorf("nats.embedded.listen: %w", err)
	}
	if port != "0" {
		return cfg.Listen, nil
	}
	data, err := readSmall(AddressFile(cfg.Dir))
	if errors.Is(err, fs.ErrNotExist) {
		return "", fmt.Errorf("nats.embedded.listen is %s, and %s, where a running oom-tracer writes its port, does not exist: %w", cfg.Listen, AddressFile(cfg.Dir), err)
	}
	if err != nil {
		return "", fmt.Errorf("find the port of the embedded nats-server: %w", err)
	}
	return string(bytes.TrimSpace(data)), nil
}
