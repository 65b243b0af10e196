package format

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"drc/internal/block"
)

const (
	magicLog   = "DRCL"
	magicValue = "DRCV"
	// MaxValueBytes bounds an encoded log value.
	MaxValueBytes = 4 << 20
	// MaxLogObjectBytes bounds a log object: a value and its wrapper.
	MaxLogObjectBytes = MaxValueBytes + 64<<10
)

// Hash is a SHA-256 of a stored structure's whole bytes.
type Hash [32]byte

// HashOf hashes the bytes of a stored structure.
func HashOf(raw []byte) Hash { return sha256.Sum256(raw) }

func (h Hash) String() string { return hex.EncodeToString(h[:]) }

// MarshalText and UnmarshalText let hashes stand in JSON.
func (h Hash) MarshalText() ([]byte, error) { return []byte(h.String()), nil }

func (h *Hash) UnmarshalText(text []byte) error {
	raw, err := hex.DecodeString(string(text))
	if err != nil || len(raw) != len(h) {
		return fmt.Errorf("%q is not a hash: want %d hexadecimal digits", text, 2*len(h))
	}
	*h = Hash(raw)
	return nil
}

// Epoch is one writer's time in office. Epochs are ordered as pairs.
type Epoch struct {
	Number uint64
	Random block.ID
}

// Compare orders epochs.
func (e Epoch) Compare(o Epoch) int {
	switch {
	case e.Number < o.Number:
		return -1
	case e.Number > o.Number:
		return 1
	}
	return e.Random.Compare(o.Random)
}

// Less reports whether o fences e.
func (e Epoch) Less(o Epoch) bool { return e.Compare(o) < 0 }

// IsZero reports whether e is no epoch at all.
func (e Epoch) IsZero() bool { return e == Epoch{} }

func (e Epoch) String() string { return fmt.Sprintf("%d-%s", e.Number, e.Random.String()[:8]) }

// LogKind tells the two kinds of log objects apart.
type LogKind uint8

const (
	// LogPromise announces an epoch: entries of lower epochs that follow it in
	// this store's log do not count.
	LogPromise LogKind = 1
	// LogCommit appends a value.
	LogCommit LogKind = 2
)

// Tail is the end of one store's log, as far as the author knew it.
type Tail struct {
	Store block.ID
	Next  uint64 // index of the first free place
	Last  Hash   // hash of the object before it, zero if Next is 0
}

// StoreDate is what a store's own clock said in its latest answer.
type StoreDate struct {
	Store block.ID
	Time  int64 // nanoseconds since 1970 UTC
}

// LogObject is one object of a store's log: the wrapper, and for a commit the
// value in it.
type LogObject struct {
	Kind     LogKind
	Repo     block.ID
	Group    block.GroupID
	Store    block.ID
	Index    uint64
	Previous Hash // the object at Index-1 of this store, zero at index 0
	Epoch    Epoch
	Decided  uint64 // the highest n that the author knew to be decided
	Tails    []Tail
	Time     int64  // the author's wall clock, nanoseconds since 1970 UTC
	Cert     []byte // certificate of the author, who signed the object
	Value    []byte // an encoded value, for LogCommit
}

// EncodeBody returns what the author signs; the stored form is body and
// signature.
func (o *LogObject) EncodeBody() []byte {
	var e Encoder
	e.String(magicLog)
	e.U8(1)
	e.U8(uint8(o.Kind))
	e.Raw(o.Repo[:])
	e.Raw(o.Group[:])
	e.Raw(o.Store[:])
	e.U64(o.Index)
	e.Raw(o.Previous[:])
	e.epoch(o.Epoch)
	e.U64(o.Decided)
	e.Uvarint(uint64(len(o.Tails)))
	for _, t := range o.Tails {
		e.Raw(t.Store[:])
		e.U64(t.Next)
		e.Raw(t.Last[:])
	}
	e.I64(o.Time)
	e.Bytes(o.Cert)
	e.Bytes(o.Value)
	return e.Buf
}

func (e *Encoder) epoch(p Epoch) { e.U64(p.Number); e.Raw(p.Random[:]) }
func (d *Decoder) epoch() Epoch  { return Epoch{Number: d.U64(), Random: d.ID()} }

// DecodeLogObject splits raw into the object, the signed bytes and the
// signature, which the caller checks. The byte slices alias raw.
func DecodeLogObject(name string, raw []byte) (o LogObject, body, signature []byte, err error) {
	d := NewDecoder(name, raw)
	d.Magic(magicLog, 1)
	o.Kind = LogKind(d.U8())
	if d.Err() == nil && o.Kind != LogPromise && o.Kind != LogCommit {
		d.Fail("unknown kind %d of log object", o.Kind)
	}
	o.Repo = d.ID()
	o.Group = d.ID()
	o.Store = d.ID()
	o.Index = d.U64()
	o.Previous = d.Hash()
	o.Epoch = d.epoch()
	o.Decided = d.U64()
	for range d.Len(MaxStores, 56) {
		o.Tails = append(o.Tails, Tail{Store: d.ID(), Next: d.U64(), Last: d.Hash()})
	}
	o.Time = d.I64()
	o.Cert = d.Bytes(MaxCertificateBytes)
	o.Value = d.Bytes(MaxValueBytes)
	if d.Err() == nil && (o.Kind == LogCommit) != (len(o.Value) > 0) {
		d.Fail("a value where none belongs, or none where one does")
	}
	body = raw[:d.Offset()]
	signature = d.Raw(signatureSize)
	return o, body, signature, d.Done()
}

// Value is the value of log entry N: what its author made part of the history.
// It is re-appended byte for byte by whoever adopts it.
type Value struct {
	Group   block.GroupID
	N       uint64 // entry number: 1, 2, 3, …
	Parent  Hash   // hash of value N-1, zero for the first
	Epoch   Epoch  // the author's
	Cert    []byte // the author's certificate
	KeySet  block.ID
	KeySets [][]byte // sealed key sets that travel with this entry
	Salt    block.ID // random: derives the key of Body
	Body    []byte   // sealed items, under KeySet's index key
}

// EncodeHead returns everything before the body: the sealing of Body
// authenticates its hash.
func (v *Value) EncodeHead() []byte {
	var e Encoder
	e.String(magicValue)
	e.U8(1)
	e.Raw(v.Group[:])
	e.U64(v.N)
	e.Raw(v.Parent[:])
	e.epoch(v.Epoch)
	e.Bytes(v.Cert)
	e.Raw(v.KeySet[:])
	e.Uvarint(uint64(len(v.KeySets)))
	for _, k := range v.KeySets {
		e.Bytes(k)
	}
	e.Raw(v.Salt[:])
	return e.Buf
}

// EncodeBody returns what the author signs; the stored form is that and the
// signature.
func (v *Value) EncodeBody() []byte {
	e := Encoder{Buf: v.EncodeHead()}
	e.Bytes(v.Body)
	return e.Buf
}

// DecodeValue splits raw into the value, its head (see EncodeHead), the signed
// bytes and the signature, which the caller checks. The slices alias raw.
func DecodeValue(name string, raw []byte) (v Value, head, body, signature []byte, err error) {
	d := NewDecoder(name, raw)
	d.Magic(magicValue, 1)
	v.Group = d.ID()
	v.N = d.U64()
	v.Parent = d.Hash()
	v.Epoch = d.epoch()
	v.Cert = d.Bytes(MaxCertificateBytes)
	v.KeySet = d.ID()
	for range d.Len(1024, 1) {
		v.KeySets = append(v.KeySets, d.Bytes(MaxKeySetBytes))
	}
	v.Salt = d.ID()
	head = raw[:d.Offset()]
	v.Body = d.Bytes(MaxValueBytes)
	if d.Err() == nil && (v.N == 0 || (v.N == 1) != (v.Parent == Hash{})) {
		d.Fail("entry %d does not fit its parent", v.N)
	}
	body = raw[:d.Offset()]
	signature = d.Raw(signatureSize)
	return v, head, body, signature, d.Done()
}
