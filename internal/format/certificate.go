package format

import "drc/internal/block"

const (
	magicCertificate = "DRCA"
	signatureSize    = 64
	// MaxRecipientBytes bounds the text of an age recipient; plugin recipients
	// are longer than native ones.
	MaxRecipientBytes = 4096
	// MaxCertificateBytes bounds an encoded certificate.
	MaxCertificateBytes = 8192
)

// Certificate says that root lets an agent sign history of a repository.
type Certificate struct {
	Repo      block.ID
	Agent     block.ID // names the agent key
	Public    [32]byte // ed25519 verification key
	Recipient string   // age recipient to which index keys are sealed
	Created   int64    // nanoseconds since 1970 UTC
}

// EncodeBody returns what root signs; the stored form is body and signature.
func (c Certificate) EncodeBody() []byte {
	var e Encoder
	e.String(magicCertificate)
	e.U8(1)
	e.Raw(c.Repo[:])
	e.Raw(c.Agent[:])
	e.Raw(c.Public[:])
	e.String(c.Recipient)
	e.I64(c.Created)
	return e.Buf
}

// DecodeCertificate splits raw into the certificate, the signed bytes and the
// signature, which the caller checks before it believes anything.
func DecodeCertificate(raw []byte) (c Certificate, body, signature []byte, err error) {
	d := NewDecoder("agent certificate", raw)
	d.Magic(magicCertificate, 1)
	c.Repo = d.ID()
	c.Agent = d.ID()
	c.Public = d.Hash()
	c.Recipient = d.String(MaxRecipientBytes)
	c.Created = d.I64()
	body = raw[:d.Offset()]
	signature = d.Raw(signatureSize)
	return c, body, signature, d.Done()
}
