package bus

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"

	"github.com/oom-tracer/oom-tracer/go/internal/config"
	"github.com/oom-tracer/oom-tracer/go/internal/statedir"
)

// EmbeddedUser is the only user of the embedded server.
const EmbeddedUser = "oom-tracer"

// generatedPassword is what the embedded server writes: 32 characters of base64url or more. Anything else is damage.
var generatedPassword = regexp.MustCompile(`^[A-Za-z0-9_-]{32,256}$`)

// Files in the directory of the embedded server.
const (
	PasswordName = "password" // a file
	// AddressName is that of a file with host:port, while the server runs on a port that the kernel picked (port 0).
	AddressName = "address"
)

// PasswordFile is where the embedded server that stores in dir keeps its password.
func PasswordFile(dir string) string { return filepath.Join(dir, PasswordName) }

// AddressFile is where the embedded server that stores in dir writes its address.
func AddressFile(dir string) string { return filepath.Join(dir, AddressName) }

// ReadEmbeddedPassword reads the password of the embedded server that stores in dir.
//
// It fails, and names the file, when the directory is not safe from other users, and when the file is missing (wraps
// [fs.ErrNotExist]), cannot be read, is open to others, or does not hold what the server wrote.
func ReadEmbeddedPassword(dir string) (string, error) {
	d, err := statedir.Open(dir)
	if err != nil {
		return "", fmt.Errorf("read password of the embedded nats-server (%s): %w", PasswordFile(dir), err)
	}
	defer d.Close()
	return ReadPassword(d)
}

// ReadPassword is ReadEmbeddedPassword for a directory that is open.
func ReadPassword(d *statedir.Dir) (string, error) {
	data, err := d.ReadSecret(PasswordName, maxSecret)
	password := string(bytes.TrimSuffix(data, []byte("\n")))
	switch {
	case errors.Is(err, fs.ErrNotExist): // whoever asks knows why
		return "", fmt.Errorf("read password of the embedded nats-server: %w", err)
	case err == nil && password == "":
		err = fmt.Errorf("%s is empty", d.Path(PasswordName))
	case err == nil && !generatedPassword.MatchString(password):
		err = fmt.Errorf("%s does not hold a generated password", d.Path(PasswordName))
	}
	if err != nil {
		return "", fmt.Errorf("read password of the embedded nats-server: %w (restart oom-tracer to generate a new one)", err)
	}
	return password, nil
}

// readSecretFile reads the password or token for an external server from the file that a key of the config names. Its
// mode is the operator's affair: Kubernetes mounts secrets as links to files that the group may read.
func readSecretFile(key, path string) (string, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return "", fmt.Errorf("read %s: %w", key, err)
	}
	secret := string(bytes.TrimRight(data, "\r\n"))
	if secret == "" {
		return "", fmt.Errorf("read %s: %s is empty", key, path)
	}
	return secret, nil
}

// maxSecret is the size of the largest file of the embedded server.
const maxSecret = 4 << 10

// embeddedAddress is the host:port of the embedded server, as another process finds it.
func embeddedAddress(cfg config.Embedded) (string, error) {
	_, port, err := net.SplitHostPort(cfg.Listen)
	if err != nil {
		return "", fmt.Errorf("nats.embedded.listen: %w", err)
	}
	if port != "0" {
		return cfg.Listen, nil
	}
	dir, err := statedir.Open(cfg.Dir)
	var data []byte
	if err == nil {
		defer dir.Close()
		data, err = dir.ReadFile(AddressName, maxSecret)
	}
	switch {
	case err == nil:
		return string(bytes.TrimSpace(data)), nil
	case errors.Is(err, fs.ErrNotExist):
		return "", fmt.Errorf("nats.embedded.listen is %s, and %s, where a running oom-tracer writes its port, does not exist: %w", cfg.Listen, AddressFile(cfg.Dir), err)
	}
	return "", fmt.Errorf("find the port of the embedded nats-server: %w", err)
}
