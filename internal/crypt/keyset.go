package crypt

import (
	"bytes"
	"crypto/rand"
	"fmt"
	"io"
	"sync"

	"filippo.io/age"

	"drc/internal/block"
	"drc/internal/format"
)

const (
	sealedContent = "drc content key v1"
	sealedIndex   = "drc index key v1"
)

// KeySet is an opened key set.
type KeySet struct {
	ID         block.ID
	Index      Key
	Content    Key
	HasContent bool   // false where only an agent key is at hand and the set is not this process's own
	Raw        []byte // the sealed and signed form, as it travels
}

// NewKeySet makes the key set of one start of an agent: random keys, sealed to
// the repository's recipients (and the index key to the agent), signed by the
// agent. The caller makes Raw durable before the first use.
func NewKeySet(agent *Agent, recipients []string, created int64) (*KeySet, error) {
	ks := &KeySet{ID: block.NewID(), HasContent: true}
	_, _ = rand.Read(ks.Index[:])
	_, _ = rand.Read(ks.Content[:])
	var to []age.Recipient
	for _, text := range recipients {
		r, err := ParseRecipient(text)
		if err != nil {
			return nil, err
		}
		to = append(to, r)
	}
	content, err := sealKey(sealedContent, ks.ID, ks.Content, to)
	if err != nil {
		return nil, err
	}
	index, err := sealKey(sealedIndex, ks.ID, ks.Index, append(to, agent.identity.Recipient()))
	if err != nil {
		return nil, err
	}
	rec := format.KeySet{ID: ks.ID, Repo: agent.Cert.Repo, Created: created, Cert: agent.CertRaw, Content: content, Index: index}
	body := rec.EncodeBody()
	ks.Raw = append(body, agent.Sign(ContextKeySet, body)...)
	return ks, nil
}

// ParseRecipient reads an age recipient: the public half to which keys are
// sealed.
func ParseRecipient(text string) (age.Recipient, error) {
	r, err := age.ParseX25519Recipient(text)
	if err != nil {
		return nil, fmt.Errorf("recipient %q is not an age public key (age1…): %w", text, err)
	}
	return r, nil
}

func sealKey(label string, id block.ID, k Key, to []age.Recipient) ([]byte, error) {
	var b bytes.Buffer
	w, err := age.Encrypt(&b, to...)
	if err != nil {
		return nil, fmt.Errorf("seal key set: %w", err)
	}
	// The label and id are sealed with the key, so that a sealed key cannot be
	// moved to another place or set.
	plain := append(append([]byte(label), id[:]...), k[:]...)
	if _, err := w.Write(plain); err != nil {
		return nil, fmt.Errorf("seal key set: %w", err)
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("seal key set: %w", err)
	}
	return b.Bytes(), nil
}

func openKey(label string, id block.ID, sealed []byte, with []age.Identity) (Key, error) {
	r, err := age.Decrypt(bytes.NewReader(sealed), with...)
	if err != nil {
		return Key{}, ErrWrongKey
	}
	head := append([]byte(label), id[:]...)
	plain, err := io.ReadAll(io.LimitReader(r, int64(len(head)+KeySize+1)))
	if err != nil || len(plain) != len(head)+KeySize || !bytes.HasPrefix(plain, head) {
		return Key{}, ErrForged
	}
	return Key(plain[len(head):]), nil
}

// Ring opens key sets with what a process holds: an identity or an agent key.
// It is safe for concurrent use.
type Ring struct {
	root       RootPublic
	identities []age.Identity
	content    bool // whether the identities may open content keys

	mu   sync.Mutex
	sets map[block.ID]*KeySet
}

// NewRing returns the ring of an identity: it opens everything.
func NewRing(id *Identity) *Ring {
	return &Ring{root: id.RootPublic, identities: id.age, content: true, sets: map[block.ID]*KeySet{}}
}

// NewAgentRing returns the ring of an agent key: it opens index keys only.
func NewAgentRing(agent *Agent, root RootPublic) *Ring {
	return &Ring{root: root, identities: []age.Identity{agent.identity}, sets: map[block.ID]*KeySet{}}
}

// Root returns the root verification key that the ring trusts.
func (r *Ring) Root() RootPublic { return r.root }

// CanReadContent reports whether the ring may open content keys.
func (r *Ring) CanReadContent() bool { return r.content }

// AddOwn adds a key set that this process made.
func (r *Ring) AddOwn(ks *KeySet) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.sets[ks.ID] = ks
}

// Add verifies a sealed key set, opens it and keeps it. Adding one again is
// cheap. ErrWrongKey means that the ring's keys cannot open it. Of one id there
// is one set: the same keys sealed anew are taken for it, other keys are a
// *format.CorruptError, and what the ring has stays. Otherwise it would depend
// on the order of reading which bytes can be opened.
func (r *Ring) Add(raw []byte) (*KeySet, error) {
	rec, body, signature, err := format.DecodeKeySet(raw)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	have := r.sets[rec.ID]
	r.mu.Unlock()
	if have != nil && bytes.Equal(have.Raw, raw) {
		return have, nil
	}
	cert, err := VerifyCertificate(r.root, rec.Cert)
	if err != nil {
		return nil, err
	}
	if rec.Repo != cert.Repo || !VerifyAgent(cert, ContextKeySet, body, signature) {
		return nil, format.Corrupt("key set "+rec.ID.String(), "its signature is wrong")
	}
	ks := &KeySet{ID: rec.ID, Raw: bytes.Clone(raw)}
	if ks.Index, err = openKey(sealedIndex, rec.ID, rec.Index, r.identities); err != nil {
		return nil, fmt.Errorf("open index key of key set %s: %w", rec.ID, err)
	}
	if r.content {
		if ks.Content, err = openKey(sealedContent, rec.ID, rec.Content, r.identities); err != nil {
			return nil, fmt.Errorf("open content key of key set %s: %w", rec.ID, err)
		}
		ks.HasContent = true
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if have := r.sets[rec.ID]; have != nil {
		if have.Index != ks.Index || (have.HasContent && ks.HasContent && have.Content != ks.Content) {
			return nil, format.Corrupt("key set "+rec.ID.String(), "another key set of the same id, with other keys, was read before it")
		}
		return have, nil
	}
	r.sets[rec.ID] = ks
	return ks, nil
}

// Set returns the key set of that id, or false if it was not added.
func (r *Ring) Set(id block.ID) (*KeySet, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	ks, ok := r.sets[id]
	return ks, ok
}
