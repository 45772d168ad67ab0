package pki

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"net"
	"strings"
	"time"
)

// The ways in which a join token can be refused.
var (
	ErrTokenMalformed = errors.New("join token is malformed: copy it whole, from \"perdure-join-\" to its last character")
	ErrTokenVersion   = errors.New("join token has a version this program does not know")
	ErrTokenExpired   = errors.New("join token has expired: make a new one on a host of the cluster")
	ErrTokenUsed      = errors.New("join token is unknown or was used already: each lets one host in; make a new one on a host of the cluster")
)

// tokenPrefix is followed by the version, a dash and the body.
const tokenPrefix = "perdure-join-"

// TokenVersion is the version of the token's text form written by this program.
const TokenVersion = 1

// Token lets one host into the cluster. Its text form is
//
//	perdure-join-1-BASE64URL(JSON + CRC-32C of the JSON, big-endian)
//
// and carries all a host needs to find the cluster and to be sure of it.
type Token struct {
	ID      string    `json:"id"`
	Secret  string    `json:"s"`
	CA      string    `json:"ca"`              // fingerprint of the cluster's authority
	Addrs   []string  `json:"a"`               // IP:port of agents' APIs, most likely first
	Expires time.Time `json:"x"`               // whole seconds, UTC
	Witness bool      `json:"w,omitempty"`     // lets a witness in, not a host
	Cluster string    `json:"cname,omitempty"` // name of the cluster, for people
}

// NewToken draws a token that ends at expires.
func NewToken(caFingerprint string, addrs []string, witness bool, expires time.Time) (Token, error) {
	var b [32]byte
	if _, err := rand.Read(b[:]); err != nil {
		return Token{}, fmt.Errorf("draw token secret: %w", err)
	}
	return Token{
		ID:      hex.EncodeToString(b[:6]),
		Secret:  hex.EncodeToString(b[8:]),
		CA:      caFingerprint,
		Addrs:   addrs,
		Witness: witness,
		Expires: expires.UTC().Truncate(time.Second),
	}, nil
}

// SecretHash is what the cluster keeps of a token's secret.
func (t Token) SecretHash() string { return HashSecret(t.Secret) }

// HashSecret is the SHA-256 of a secret in hexadecimal. The secret has 192
// random bits, so no salt or slow hash is needed.
func HashSecret(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

var tokenCRC = crc32.MakeTable(crc32.Castagnoli)

// String is the token's text form.
func (t Token) String() string {
	body, err := json.Marshal(t)
	if err != nil {
		panic("pki: a token cannot fail to marshal: " + err.Error())
	}
	body = binary.BigEndian.AppendUint32(body, crc32.Checksum(body, tokenCRC))
	return fmt.Sprintf("%s%d-%s", tokenPrefix, TokenVersion, base64.RawURLEncoding.EncodeToString(body))
}

// ParseToken reads a token's text form and refuses one that is malformed or has
// expired at now. Errors are (wrapped) ErrTokenMalformed, ErrTokenVersion or
// ErrTokenExpired.
func ParseToken(s string, now time.Time) (Token, error) {
	rest, ok := strings.CutPrefix(strings.TrimSpace(s), tokenPrefix)
	if !ok {
		return Token{}, ErrTokenMalformed
	}
	version, body64, ok := strings.Cut(rest, "-")
	if !ok {
		return Token{}, ErrTokenMalformed
	}
	if version != fmt.Sprint(TokenVersion) {
		return Token{}, fmt.Errorf("%w: %q, known is %d", ErrTokenVersion, version, TokenVersion)
	}
	raw, err := base64.RawURLEncoding.DecodeString(body64)
	if err != nil || len(raw) < 5 {
		return Token{}, ErrTokenMalformed
	}
	body, sum := raw[:len(raw)-4], binary.BigEndian.Uint32(raw[len(raw)-4:])
	if crc32.Checksum(body, tokenCRC) != sum {
		return Token{}, ErrTokenMalformed
	}
	var t Token
	if err := json.Unmarshal(body, &t); err != nil {
		return Token{}, ErrTokenMalformed
	}
	if t.ID == "" || t.Secret == "" || len(t.CA) != 2*sha256.Size || len(t.Addrs) == 0 {
		return Token{}, ErrTokenMalformed
	}
	for _, a := range t.Addrs {
		if _, _, err := net.SplitHostPort(a); err != nil {
			return Token{}, ErrTokenMalformed
		}
	}
	if !now.Before(t.Expires) {
		return Token{}, fmt.Errorf("%w (it ended at %s)", ErrTokenExpired, t.Expires.Format(time.RFC3339))
	}
	return t, nil
}
