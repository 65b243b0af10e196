package crypt

import (
	"bufio"
	"bytes"
	"crypto/ed25519"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"
	"time"

	"filippo.io/age"

	"drc/internal/block"
	"drc/internal/format"
)

// ErrWrongKey means: the key does not belong to this repository or cannot open this.
var ErrWrongKey = errors.New("the key does not belong here")

// NoKeySetError is an ErrWrongKey: a key set is needed that the ring does not
// have. Who knows where it is adds it and tries again.
type NoKeySetError struct{ KeySet block.ID }

func (e *NoKeySetError) Error() string {
	return fmt.Sprintf("key set %s is not at hand: %v", e.KeySet, ErrWrongKey)
}

func (e *NoKeySetError) Unwrap() error { return ErrWrongKey }

// The line prefixes of identity and agent-key files.
const (
	prefixRootPublic  = "DRC-ROOT-1-"
	prefixRootSecret  = "DRC-ROOT-SECRET-1-"
	prefixAgentCert   = "DRC-AGENT-1-"
	prefixAgentSecret = "DRC-AGENT-SECRET-1-"
	prefixAgeSecret   = "AGE-SECRET-KEY-"
)

// Identity is what an identity file holds: everything that is needed to read
// the repository, and the right to say who may write it.
type Identity struct {
	Root       Root
	RootPublic RootPublic
	age        []age.Identity
	recipients []string
	lines      []string // AGE-SECRET-KEY lines, for writing the file again
}

// NewIdentity makes a fresh identity and so a fresh repository id.
func NewIdentity() (*Identity, error) {
	id, err := age.GenerateX25519Identity()
	if err != nil {
		return nil, fmt.Errorf("make identity: %w", err)
	}
	root := NewRoot()
	return &Identity{
		Root:       root,
		RootPublic: root.Public(),
		age:        []age.Identity{id},
		recipients: []string{id.Recipient().String()},
		lines:      []string{id.String()},
	}, nil
}

// Recipients are the age recipients that belong to this identity.
func (id *Identity) Recipients() []string { return id.recipients }

// Encode returns the identity file's text. It must be kept secret: mode 0600.
func (id *Identity) Encode(created time.Time) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# DRC identity of repository %s\n", id.RootPublic.RepoID())
	fmt.Fprintf(&b, "# created: %s\n", created.UTC().Format(time.RFC3339))
	for _, r := range id.recipients {
		fmt.Fprintf(&b, "# recipient: %s\n", r)
	}
	b.WriteString("# Whoever has this file can read every volume. Without it (or another\n" +
		"# recipient's key) nobody can, and nothing brings it back: keep a copy offline.\n")
	fmt.Fprintf(&b, "%s%x\n", prefixRootPublic, id.RootPublic[:])
	fmt.Fprintf(&b, "%s%x\n", prefixRootSecret, id.Root.key.Seed())
	for _, l := range id.lines {
		b.WriteString(l + "\n")
	}
	return b.Bytes()
}

// ParseIdentity reads an identity file's text; name is used in errors. The
// file of a second recipient has the root verification key (DRC-ROOT-1-) and
// an age secret key, but no root secret.
func ParseIdentity(name string, text []byte) (*Identity, error) {
	f, err := parseKeyFile(name, text)
	if err != nil {
		return nil, err
	}
	if f.cert != nil {
		return nil, fmt.Errorf("%s is an agent key, not an identity: pass it as --agent-key, or give the identity file that drc init wrote", name)
	}
	if len(f.age) == 0 {
		return nil, fmt.Errorf("%s holds no %s… line: it is not a DRC identity file", name, prefixAgeSecret)
	}
	id := &Identity{RootPublic: f.root, lines: f.ageLines}
	if f.rootSeed != nil {
		id.Root = Root{ed25519.NewKeyFromSeed(f.rootSeed)}
		if id.Root.Public() != f.root {
			return nil, fmt.Errorf("%s: the root keys in it do not belong together: restore the file from its backup", name)
		}
	}
	for _, a := range f.age {
		id.age = append(id.age, a)
		id.recipients = append(id.recipients, a.Recipient().String())
	}
	return id, nil
}

// CanSign reports whether the identity holds the root secret: only such a one
// can certify agents and sign repository records.
func (id *Identity) CanSign() bool { return id.Root.key != nil }

// EncodeAgent returns the text of an agent-key file. It must be kept secret.
func (a *Agent) EncodeFile(root RootPublic) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "# DRC agent key %s of repository %s\n", a.Cert.Agent, a.Cert.Repo)
	b.WriteString("# Whoever has this file can extend the history and cannot read any content.\n")
	fmt.Fprintf(&b, "%s%x\n", prefixRootPublic, root[:])
	fmt.Fprintf(&b, "%s%x\n", prefixAgentCert, a.CertRaw)
	fmt.Fprintf(&b, "%s%x\n", prefixAgentSecret, a.key.Seed())
	b.WriteString(a.identity.String() + "\n")
	return b.Bytes()
}

// ParseAgent reads an agent-key file's text and checks its certificate.
func ParseAgent(name string, text []byte) (*Agent, RootPublic, error) {
	f, err := parseKeyFile(name, text)
	if err != nil {
		return nil, RootPublic{}, err
	}
	if f.cert == nil || f.agentSeed == nil || len(f.age) != 1 {
		return nil, RootPublic{}, fmt.Errorf("%s is not an agent key: make one with drc key agent, or pass an identity file as --identity", name)
	}
	cert, err := VerifyCertificate(f.root, f.cert)
	if err != nil {
		return nil, RootPublic{}, fmt.Errorf("%s: %w", name, err)
	}
	a := &Agent{Cert: cert, CertRaw: f.cert, key: ed25519.NewKeyFromSeed(f.agentSeed), identity: f.age[0]}
	if [32]byte(a.key.Public().(ed25519.PublicKey)) != cert.Public || a.identity.Recipient().String() != cert.Recipient {
		return nil, RootPublic{}, fmt.Errorf("%s: its keys do not belong to its certificate: make a new one with drc key agent", name)
	}
	return a, f.root, nil
}

type keyFile struct {
	root      RootPublic
	rootSeed  []byte
	cert      []byte
	agentSeed []byte
	age       []*age.X25519Identity
	ageLines  []string
}

func parseKeyFile(name string, text []byte) (*keyFile, error) {
	f := &keyFile{}
	haveRoot := false
	scan := bufio.NewScanner(bytes.NewReader(text))
	scan.Buffer(nil, 4*format.MaxCertificateBytes)
	for n := 1; scan.Scan(); n++ {
		line := strings.TrimSpace(scan.Text())
		var err error
		switch {
		case line == "" || strings.HasPrefix(line, "#"):
		case strings.HasPrefix(line, prefixRootSecret):
			f.rootSeed, err = unhex(line, prefixRootSecret, ed25519.SeedSize)
		case strings.HasPrefix(line, prefixRootPublic):
			var p []byte
			if p, err = unhex(line, prefixRootPublic, len(f.root)); err == nil {
				f.root, haveRoot = RootPublic(p), true
			}
		case strings.HasPrefix(line, prefixAgentSecret):
			f.agentSeed, err = unhex(line, prefixAgentSecret, ed25519.SeedSize)
		case strings.HasPrefix(line, prefixAgentCert):
			f.cert, err = unhex(line, prefixAgentCert, 0)
		case strings.HasPrefix(line, prefixAgeSecret):
			var a *age.X25519Identity
			if a, err = age.ParseX25519Identity(line); err == nil {
				f.age = append(f.age, a)
				f.ageLines = append(f.ageLines, line)
			}
		default:
			err = errors.New("unknown kind of line")
		}
		if err != nil {
			return nil, fmt.Errorf("%s, line %d: %w: it is not a DRC key file, or it is damaged", name, n, err)
		}
	}
	if err := scan.Err(); err != nil {
		return nil, fmt.Errorf("%s is not a DRC key file: %w", name, err)
	}
	if !haveRoot {
		return nil, fmt.Errorf("%s holds no %s… line: it is not a DRC key file", name, prefixRootPublic)
	}
	return f, nil
}

func unhex(line, prefix string, want int) ([]byte, error) {
	p, err := hex.DecodeString(strings.TrimPrefix(line, prefix))
	if err != nil || (want > 0 && len(p) != want) {
		return nil, fmt.Errorf("bad value behind %s", prefix)
	}
	return p, nil
}
