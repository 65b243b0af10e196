package crypt

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/binary"
	"errors"
)

// KeySize is the size of every symmetric key, in bytes.
const KeySize = 32

// Overhead is how many bytes sealing adds.
const Overhead = 16

// ErrForged means: the bytes are damaged, forged, or sealed under another key or for
// another place. None of them may be used.
var ErrForged = errors.New("authentication failed: damaged or forged")

// Key is a symmetric key of a key set: content or index.
type Key [KeySize]byte

// Labels of derived keys. Each names one use; see docs/FORMAT.md.
const (
	LabelSegmentContent = "drc segment content v1"
	LabelSegmentIndex   = "drc segment index v1"
	LabelShardSums      = "drc shard sums v1"
	LabelManifest       = "drc manifest v1"
	LabelDigest         = "drc digest v1"
	LabelValue          = "drc value v1"
)

// Derive returns HKDF-SHA-256(k, salt, label): the key of one thing for one
// purpose. The salt is the thing's random id, so no two things share a key.
func (k Key) Derive(salt []byte, label string) Key {
	out, err := hkdf.Key(sha256.New, k[:], salt, label, KeySize)
	if err != nil {
		panic("crypt: HKDF refuses a fixed key length: " + err.Error())
	}
	return Key(out)
}

// Sealer seals and opens the parts of one thing under its own key. Each part
// has a number, used as the nonce: a number must be sealed only once.
type Sealer struct{ aead cipher.AEAD }

// NewSealer returns a Sealer for key, which must belong to one thing only.
func NewSealer(key Key) *Sealer {
	block, err := aes.NewCipher(key[:])
	if err != nil {
		panic("crypt: AES refuses a 32-byte key: " + err.Error())
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		panic("crypt: GCM refuses AES: " + err.Error())
	}
	return &Sealer{aead}
}

func nonce(part uint64) (n [12]byte) {
	binary.LittleEndian.PutUint64(n[:], part)
	return n
}

// Seal appends the sealed form of plain to dst. ad is authenticated but not
// stored: what the bytes are and where they belong.
func (s *Sealer) Seal(dst []byte, part uint64, plain, ad []byte) []byte {
	n := nonce(part)
	return s.aead.Seal(dst, n[:], plain, ad)
}

// Open appends the plain form of sealed to dst, or returns ErrForged.
func (s *Sealer) Open(dst []byte, part uint64, sealed, ad []byte) ([]byte, error) {
	n := nonce(part)
	out, err := s.aead.Open(dst, n[:], sealed, ad)
	if err != nil {
		return nil, ErrForged
	}
	return out, nil
}
