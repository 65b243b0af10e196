package crypt

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/sha256"
	"fmt"

	"filippo.io/age"

	"drc/internal/block"
	"drc/internal/format"
)

// SignatureSize is the size of a signature, in bytes.
const SignatureSize = ed25519.SignatureSize

// What a signature is about. The context is signed in front of the message, so
// that no signed thing can be passed off as another kind of thing.
const (
	ContextRepoRecord  = "drc repository record v1"
	ContextCertificate = "drc agent certificate v1"
	ContextKeySet      = "drc key set v1"
	ContextValue       = "drc value v1"
	ContextLogObject   = "drc log object v1"
	ContextManifest    = "drc manifest v1"
	ContextDigest      = "drc digest v1"
)

func signed(context string, message []byte) []byte {
	m := make([]byte, 0, len(context)+1+len(message))
	m = append(m, context...)
	m = append(m, 0)
	return append(m, message...)
}

// RootPublic is the root verification key: the anchor of all trust.
type RootPublic [ed25519.PublicKeySize]byte

// RepoID returns the id of the repository that this root key rules.
func (r RootPublic) RepoID() block.ID {
	h := sha256.Sum256(signed("drc repository v1", r[:]))
	return block.ID(h[:16])
}

// Verify checks a signature of root.
func (r RootPublic) Verify(context string, message, signature []byte) bool {
	return len(signature) == SignatureSize && ed25519.Verify(r[:], signed(context, message), signature)
}

// Root is the root signing key.
type Root struct{ key ed25519.PrivateKey }

// NewRoot makes a root key.
func NewRoot() Root {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		panic("crypt: no randomness: " + err.Error())
	}
	return Root{key}
}

// Public returns the verification half.
func (r Root) Public() RootPublic { return RootPublic(r.key.Public().(ed25519.PublicKey)) }

// Sign signs message as context.
func (r Root) Sign(context string, message []byte) []byte {
	return ed25519.Sign(r.key, signed(context, message))
}

// Agent is an agent key: it may extend history and read its index, and cannot
// read content.
type Agent struct {
	Cert     format.Certificate
	CertRaw  []byte // Cert as encoded and signed by root
	key      ed25519.PrivateKey
	identity *age.X25519Identity
}

// NewAgent makes an agent key and has root certify it. created is in
// nanoseconds since 1970 UTC.
func NewAgent(root Root, created int64) (*Agent, error) {
	pub, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make agent key: %w", err)
	}
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, fmt.Errorf("make agent key: %w", err)
	}
	cert := format.Certificate{
		Repo:      root.Public().RepoID(),
		Agent:     block.NewID(),
		Public:    [32]byte(pub),
		Recipient: id.Recipient().String(),
		Created:   created,
	}
	body := cert.EncodeBody()
	raw := append(body, root.Sign(ContextCertificate, body)...)
	return &Agent{Cert: cert, CertRaw: raw, key: key, identity: id}, nil
}

// Sign signs message as context.
func (a *Agent) Sign(context string, message []byte) []byte {
	return ed25519.Sign(a.key, signed(context, message))
}

// VerifyCertificate decodes an agent certificate and checks that root signed it.
// One that was verified a short while ago is cheap.
func VerifyCertificate(root RootPublic, raw []byte) (format.Certificate, error) {
	if len(raw) <= format.MaxCertificateBytes {
		if cert, ok := verifiedCertificates.get(root, raw); ok {
			return cert, nil
		}
	}
	cert, body, signature, err := format.DecodeCertificate(raw)
	if err != nil {
		return cert, err
	}
	if cert.Repo != root.RepoID() || !root.Verify(ContextCertificate, body, signature) {
		return cert, format.Corrupt("agent certificate", "it is not signed by this repository's root key")
	}
	verifiedCertificates.put(root, raw, cert)
	return cert, nil
}

// VerifyAgent checks an agent's signature.
func VerifyAgent(cert format.Certificate, context string, message, signature []byte) bool {
	return len(signature) == SignatureSize && ed25519.Verify(cert.Public[:], signed(context, message), signature)
}
