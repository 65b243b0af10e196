package format

import "drc/internal/block"

const (
	magicRepo = "DRCR"
	// MaxRepoRecordBytes bounds a repository record.
	MaxRepoRecordBytes = 1 << 20
	// MaxRecipients bounds the recipients of a repository.
	MaxRecipients = 64
	// MaxStores bounds the stores of a repository.
	MaxStores = 16
)

// Profile is an erasure profile: every segment of full size becomes Data data
// shards and Parity parity shards.
type Profile struct {
	Data   int // k
	Parity int // m
}

// Total is the number of shards.
func (p Profile) Total() int { return p.Data + p.Parity }

// StoreEntry is one store in a repository's store set.
type StoreEntry struct {
	ID    block.ID
	Votes int // its weight in a majority: 1, or 2 for the tie-breaker of an even set
}

// RepoRecord is repository record N, as one store holds it. Records are a
// write-once chain: each names its predecessor's hash.
type RepoRecord struct {
	N          uint64 // 1, 2, 3, …
	Root       [32]byte
	Previous   [32]byte // SHA-256 of record N-1 in this store, zero for the first
	Created    int64    // nanoseconds since 1970 UTC
	Profile    Profile
	Recipients []string
	Stores     []StoreEntry
	This       block.ID // the store that holds this copy
}

// EncodeBody returns what root signs; the stored form is body and signature.
func (r *RepoRecord) EncodeBody() []byte {
	var e Encoder
	e.String(magicRepo)
	e.U8(1)
	e.U64(r.N)
	e.Raw(r.Root[:])
	e.Raw(r.Previous[:])
	e.I64(r.Created)
	e.U8(1) // erasure code: klauspost/reedsolomon's default matrix
	e.U8(uint8(r.Profile.Data))
	e.U8(uint8(r.Profile.Parity))
	e.Uvarint(uint64(len(r.Recipients)))
	for _, s := range r.Recipients {
		e.String(s)
	}
	e.Uvarint(uint64(len(r.Stores)))
	for _, s := range r.Stores {
		e.Raw(s.ID[:])
		e.U8(uint8(s.Votes))
	}
	e.Raw(r.This[:])
	return e.Buf
}

// DecodeRepoRecord splits raw into the record, the signed bytes and the
// signature, which the caller checks.
func DecodeRepoRecord(name string, raw []byte) (r RepoRecord, body, signature []byte, err error) {
	d := NewDecoder(name, raw)
	d.Magic(magicRepo, 1)
	r.N = d.U64()
	r.Root = d.Hash()
	r.Previous = d.Hash()
	r.Created = d.I64()
	if code := d.U8(); d.Err() == nil && code != 1 {
		d.Fail("unknown erasure code %d", code)
	}
	r.Profile.Data = int(d.U8())
	r.Profile.Parity = int(d.U8())
	if d.Err() == nil && (r.Profile.Data < 1 || r.Profile.Total() > MaxShards) {
		d.Fail("erasure profile %d+%d is out of range", r.Profile.Data, r.Profile.Parity)
	}
	for range d.Len(MaxRecipients, 1) {
		r.Recipients = append(r.Recipients, d.String(MaxRecipientBytes))
	}
	for range d.Len(MaxStores, 17) {
		s := StoreEntry{ID: d.ID(), Votes: int(d.U8())}
		if d.Err() == nil && (s.Votes < 1 || s.Votes > 2) {
			d.Fail("a store with %d votes", s.Votes)
		}
		for _, o := range r.Stores {
			if d.Err() == nil && o.ID == s.ID {
				d.Fail("it lists store %s twice", s.ID)
			}
		}
		r.Stores = append(r.Stores, s)
	}
	r.This = d.ID()
	if d.Err() == nil && (len(r.Stores) == 0 || r.N == 0) {
		d.Fail("it names no store or has number 0")
	}
	body = raw[:d.Offset()]
	signature = d.Raw(signatureSize)
	return r, body, signature, d.Done()
}
