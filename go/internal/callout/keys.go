// Package callout answers NATS servers that ask about a client that shows the token of a service account (auth callout):
// the client may publish for the node that the token's pod runs on, for as long as the token is valid.
//
// Rule of the package: what is not proven is refused, and the answer ends with the token.
package callout

import (
	"crypto/hkdf"
	"crypto/sha256"
	"errors"
	"fmt"

	"github.com/nats-io/nkeys"
)

// minSecret is the least length of the secret. The chart's has 31 random letters and digits.
const minSecret = 16

// Keys sign the answers, and encrypt them and the questions. All replicas derive the same ones from the same secret.
type Keys struct {
	issuer, curve nkeys.KeyPair
	// Public halves, as the server's configuration has them.
	Issuer, XKey string
}

// DeriveKeys makes the keys from a secret.
func DeriveKeys(secret string) (k *Keys, err error) {
	defer func() {
		if err != nil {
			err = fmt.Errorf("derive the issuer's keys: %w", err)
		}
	}()
	if len(secret) < minSecret {
		return nil, fmt.Errorf("the secret has %d characters, and needs at least %d", len(secret), minSecret)
	}
	derive := func(kind nkeys.PrefixByte, purpose string) ([]byte, error) {
		raw, err := hkdf.Key(sha256.New, []byte(secret), nil, "oom-tracer nats auth callout "+purpose, 32)
		if err != nil {
			return nil, err
		}
		return nkeys.EncodeSeed(kind, raw)
	}
	issuer, err1 := derive(nkeys.PrefixByteAccount, "issuer")
	curve, err2 := derive(nkeys.PrefixByteCurve, "xkey")
	if err := errors.Join(err1, err2); err != nil {
		return nil, err
	}
	k = &Keys{}
	if k.issuer, err = nkeys.FromSeed(issuer); err != nil {
		return nil, err
	}
	if k.curve, err = nkeys.FromCurveSeed(curve); err != nil {
		return nil, err
	}
	if k.Issuer, err = k.issuer.PublicKey(); err != nil {
		return nil, err
	}
	k.XKey, err = k.curve.PublicKey()
	return k, err
}

// Config is what stands in the server's auth_callout block.
func (k *Keys) Config() string {
	return fmt.Sprintf("# Written by oom-auth issuer.\nissuer: %s\nxkey: %s\n", k.Issuer, k.XKey)
}
