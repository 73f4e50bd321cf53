package tap

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/nats-io/nkeys"
)

// keys creates a seed for each node that has none yet, in a file DIR/<node>.nk, and prints the public keys as the
// chart's values. A seed belongs on its node only: the server never sees it.
func keys(dir string, nodes []string, stdout io.Writer) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("create keys: %w", err)
	}
	var out bytes.Buffer
	fmt.Fprintf(&out, "nats:\n  tracers: nkeys\n  nodeKeys:\n")
	for _, node := range nodes {
		public, err := nodeKey(filepath.Join(dir, node+".nk"))
		if err != nil {
			return fmt.Errorf("create key of node %s: %w", node, err)
		}
		fmt.Fprintf(&out, "    %s: %s\n", node, public)
	}
	_, err := stdout.Write(out.Bytes())
	return err
}

// nodeKey reads a seed, or creates one, and returns its public key.
func nodeKey(file string) (string, error) {
	seed, err := os.ReadFile(file)
	var pair nkeys.KeyPair
	switch {
	case err == nil:
		pair, err = nkeys.ParseDecoratedNKey(seed)
		if err != nil {
			return "", fmt.Errorf("%s does not hold a seed: %w", file, err)
		}
	case errors.Is(err, fs.ErrNotExist):
		if pair, err = nkeys.CreateUser(); err != nil {
			return "", err
		}
		if seed, err = pair.Seed(); err != nil {
			return "", err
		}
		if err := os.WriteFile(file, append(seed, '\n'), 0o600); err != nil {
			return "", err
		}
	default:
		return "", err
	}
	return pair.PublicKey()
}
