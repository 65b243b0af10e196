package grouplog

import (
	"fmt"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
)

// Draft is what an author needs to make the value of an entry.
type Draft struct {
	Group   block.GroupID
	N       uint64
	Parent  format.Hash
	Epoch   format.Epoch
	Keys    *crypt.KeySet // its index key seals the body
	KeySets [][]byte      // sealed key sets that travel with the entry
	Items   *format.Items
}

// Make seals and signs the value.
func (d Draft) Make(agent *crypt.Agent) []byte {
	v := format.Value{
		Group: d.Group, N: d.N, Parent: d.Parent, Epoch: d.Epoch, Cert: agent.CertRaw,
		KeySet: d.Keys.ID, KeySets: d.KeySets, Salt: block.NewID(),
	}
	head := v.EncodeHead()
	sealer := crypt.NewSealer(d.Keys.Index.Derive(v.Salt[:], crypt.LabelValue))
	v.Body = sealer.Seal(nil, 0, d.Items.Encode(), head)
	body := v.EncodeBody()
	return append(body, agent.Sign(crypt.ContextValue, body)...)
}

// Entry is an opened value.
type Entry struct {
	format.Value
	Hash  format.Hash
	Raw   []byte
	Items *format.Items
}

// VerifyValue checks a value's signature and form without opening its body.
func VerifyValue(root crypt.RootPublic, name string, raw []byte) (format.Value, error) {
	v, _, err := verifyValue(root, name, raw)
	return v, err
}

func verifyValue(root crypt.RootPublic, name string, raw []byte) (format.Value, []byte, error) {
	v, head, body, signature, err := format.DecodeValue(name, raw)
	if err != nil {
		return v, nil, err
	}
	cert, err := crypt.VerifyCertificate(root, v.Cert)
	if err != nil {
		return v, nil, err
	}
	if !crypt.VerifyAgent(cert, crypt.ContextValue, body, signature) {
		return v, nil, format.Corrupt(name, "the value's signature is wrong")
	}
	return v, head, nil
}

// OpenValue verifies a value and opens its body. Key sets that travel in it
// are added to ring. raw is kept.
func OpenValue(ring *crypt.Ring, name string, raw []byte) (*Entry, error) {
	v, head, err := verifyValue(ring.Root(), name, raw)
	if err != nil {
		return nil, err
	}
	return openValue(ring, name, raw, v, head)
}

// OpenVerifiedValue is OpenValue for bytes that have passed VerifyValue under
// the same root key: their signature is not checked again.
func OpenVerifiedValue(ring *crypt.Ring, name string, raw []byte) (*Entry, error) {
	v, head, _, _, err := format.DecodeValue(name, raw)
	if err != nil {
		return nil, err
	}
	return openValue(ring, name, raw, v, head)
}

func openValue(ring *crypt.Ring, name string, raw []byte, v format.Value, head []byte) (*Entry, error) {
	for _, k := range v.KeySets {
		if _, err := ring.Add(k); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	keys, ok := ring.Set(v.KeySet)
	if !ok {
		return nil, format.Corrupt(name, "no entry before it brings key set %s", v.KeySet)
	}
	sealer := crypt.NewSealer(keys.Index.Derive(v.Salt[:], crypt.LabelValue))
	plain, err := sealer.Open(nil, 0, v.Body, head)
	if err != nil {
		return nil, format.Corrupt(name, "the value's body fails authentication")
	}
	items, err := format.DecodeItems(name, plain)
	if err != nil {
		return nil, err
	}
	return &Entry{Value: v, Hash: format.HashOf(raw), Raw: raw, Items: items}, nil
}

// SignObject encodes and signs a log object for its place in a store's log.
func SignObject(agent *crypt.Agent, o format.LogObject) []byte {
	o.Cert = agent.CertRaw
	body := o.EncodeBody()
	return append(body, agent.Sign(crypt.ContextLogObject, body)...)
}

// Place is where a log object was found: it must say the same of itself.
type Place struct {
	Repo  block.ID
	Group block.GroupID
	Store block.ID
	Index uint64
}

// VerifyObject decodes a log object found at a place and checks its signature
// and that it belongs there. The value inside is not looked at.
func VerifyObject(root crypt.RootPublic, name string, at Place, raw []byte) (format.LogObject, error) {
	o, body, signature, err := format.DecodeLogObject(name, raw)
	if err != nil {
		return o, err
	}
	cert, err := crypt.VerifyCertificate(root, o.Cert)
	if err != nil {
		return o, fmt.Errorf("%s: %w", name, err)
	}
	if !crypt.VerifyAgent(cert, crypt.ContextLogObject, body, signature) {
		return o, format.Corrupt(name, "its signature is wrong")
	}
	if o.Repo != at.Repo || o.Group != at.Group || o.Store != at.Store || o.Index != at.Index {
		return o, format.Corrupt(name, "it belongs to another place (store %s, index %d)", o.Store, o.Index)
	}
	return o, nil
}
