package format

import "drc/internal/block"

const (
	magicKeySet = "DRCK"
	// MaxKeySetBytes bounds an encoded key set: two age files with all
	// recipients.
	MaxKeySetBytes = 256 << 10
)

// KeySet is the sealed form of the keys of one start of an agent.
type KeySet struct {
	ID      block.ID
	Repo    block.ID
	Created int64  // nanoseconds since 1970 UTC
	Cert    []byte // certificate of the agent that made and signed it
	Content []byte // age file: the content key, for recipients
	Index   []byte // age file: the index key, for recipients and the agent
}

// EncodeBody returns what the agent signs; the stored form is body and
// signature.
func (k *KeySet) EncodeBody() []byte {
	var e Encoder
	e.String(magicKeySet)
	e.U8(1)
	e.Raw(k.ID[:])
	e.Raw(k.Repo[:])
	e.I64(k.Created)
	e.Bytes(k.Cert)
	e.Bytes(k.Content)
	e.Bytes(k.Index)
	return e.Buf
}

// DecodeKeySet splits raw into the key set, the signed bytes and the
// signature, which the caller checks. The byte slices alias raw.
func DecodeKeySet(raw []byte) (k KeySet, body, signature []byte, err error) {
	d := NewDecoder("key set", raw)
	d.Magic(magicKeySet, 1)
	k.ID = d.ID()
	k.Repo = d.ID()
	k.Created = d.I64()
	k.Cert = d.Bytes(MaxCertificateBytes)
	k.Content = d.Bytes(MaxKeySetBytes)
	k.Index = d.Bytes(MaxKeySetBytes)
	body = raw[:d.Offset()]
	signature = d.Raw(signatureSize)
	return k, body, signature, d.Done()
}
