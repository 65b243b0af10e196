package format

import (
	"fmt"
	"math"
	"strconv"
	"strings"

	"drc/internal/block"
)

const (
	magicDigest = "DRCD"
	// DigestTailSize is the size of the fixed end of a digest, in bytes.
	DigestTailSize = 4 + 4 + signatureSize + 4
	// DigestRows is how many rows a full page of a digest has, of whatever kind.
	DigestRows = 256
	// MaxDigestBytes bounds a digest object.
	MaxDigestBytes = 1 << 30
	// MaxDigestHeaderBytes bounds a digest's header.
	MaxDigestHeaderBytes = MaxKeySetBytes + 64<<10
	// MaxDigestRootBytes bounds a digest's root, plain and sealed.
	MaxDigestRootBytes = 64 << 20
	// MaxDigestPageBytes bounds the plain form of a page of a digest.
	MaxDigestPageBytes = 32 << 20
	// DigestRootPart is the part number under which the root is sealed.
	DigestRootPart = math.MaxUint32
	// maxDigestLevels bounds the levels of a list: 256^8 rows.
	maxDigestLevels = 8
	maxDigestEpochs = DigestRows
)

// DigestPrefix is the folder of a group's digests.
func DigestPrefix(g block.GroupID) string { return GroupPrefix(g) + "digests/" }

// DigestName is the name of the digest of entries 1 to n. Names sort by n, the
// newest first: one listing of one name finds it.
func DigestName(g block.GroupID, n uint64, id block.ID) string {
	return fmt.Sprintf("%s%016x-%s", DigestPrefix(g), math.MaxUint64-n, id)
}

// ParseDigestName reads a digest's object name.
func ParseDigestName(g block.GroupID, name string) (n uint64, id block.ID, ok bool) {
	rest, ok := strings.CutPrefix(name, DigestPrefix(g))
	if !ok || len(rest) != 16+1+32 {
		return 0, id, false
	}
	inverse, err1 := strconv.ParseUint(rest[:16], 16, 64)
	id, err2 := block.ParseID(rest[17:])
	n = math.MaxUint64 - inverse
	return n, id, err1 == nil && err2 == nil && n > 0 && DigestName(g, n, id) == name
}

// DigestHeader begins a digest.
type DigestHeader struct {
	ID     block.ID
	Group  block.GroupID
	N      uint64 // it says what entries 1 to N say, and these are decided
	Hash   Hash   // of entry N's value
	KeySet block.ID
	Sealed []byte // the key set, as it travels
	Cert   []byte // the author's certificate
}

// Encode returns the header's bytes.
func (h *DigestHeader) Encode() []byte {
	var e Encoder
	e.String(magicDigest)
	e.U8(1)
	e.Raw(h.ID[:])
	e.Raw(h.Group[:])
	e.U64(h.N)
	e.Raw(h.Hash[:])
	e.Raw(h.KeySet[:])
	e.Bytes(h.Sealed)
	e.Bytes(h.Cert)
	return e.Buf
}

// DecodeDigestHeader reads a header from the front of raw and returns its length.
func DecodeDigestHeader(name string, raw []byte) (h DigestHeader, n int, err error) {
	d := NewDecoder(name, raw)
	d.Magic(magicDigest, 1)
	h.ID = d.ID()
	h.Group = d.ID()
	h.N = d.U64()
	h.Hash = d.Hash()
	h.KeySet = d.ID()
	h.Sealed = d.Bytes(MaxKeySetBytes)
	h.Cert = d.Bytes(MaxCertificateBytes)
	if d.Err() == nil && h.N == 0 {
		d.Fail("it is of no entries")
	}
	return h, d.Offset(), d.Err()
}

// DigestTail ends a digest: with the last DigestTailSize bytes a reader finds
// header and root.
type DigestTail struct {
	HeaderBytes uint32
	RootBytes   uint32 // sealed
	Signature   [signatureSize]byte
}

// Append appends the tail.
func (t *DigestTail) Append(dst []byte) []byte {
	e := Encoder{Buf: dst}
	e.U32(t.HeaderBytes)
	e.U32(t.RootBytes)
	e.Raw(t.Signature[:])
	e.Raw([]byte(magicDigest))
	return e.Buf
}

// DecodeDigestTail reads the tail of a digest of total bytes.
func DecodeDigestTail(name string, raw []byte, total int64) (t DigestTail, err error) {
	d := NewDecoder(name, raw)
	t.HeaderBytes = d.U32()
	t.RootBytes = d.U32()
	copy(t.Signature[:], d.Raw(signatureSize))
	if m := d.Raw(4); d.Err() == nil && string(m) != magicDigest {
		d.Fail("it does not end like a digest")
	}
	if d.Err() == nil && (t.HeaderBytes > MaxDigestHeaderBytes || t.RootBytes > MaxDigestRootBytes ||
		int64(t.HeaderBytes)+int64(t.RootBytes)+DigestTailSize > total) {
		d.Fail("its parts do not fit into %d bytes", total)
	}
	return t, d.Done()
}

// DigestLog is a store's log up to an object behind which nothing is of the
// digest's entries: what an acceptor that has read so far knows.
type DigestLog struct {
	Store    block.ID
	Next     uint64 // index of the object behind it
	Last     Hash   // of the object before that
	Promised Epoch
	Decided  uint64
	// The newest entry that it has accepted, N 0 if none.
	N     uint64
	Epoch Epoch // of the wrapper
	Hash  Hash  // of the value
	Index uint64
}

// DigestRef says where a page lies, and what is in it.
type DigestRef struct {
	Home       block.ID // the digest that holds it; zero: this one
	HomeN      uint64   // of that digest, where Home is not zero
	HomeKeySet block.ID
	Part       uint32
	Offset     int64 // of the sealed page in its home
	Stored     int
	Plain      int
	// Of pages of entries: the lowest and the highest time of any, ns since 1970 UTC
	// (MinTime > MaxTime if none has one), and the end of the last one.
	MinTime, MaxTime int64
	Last             block.Seq
}

// DigestList is a list that only grows. Full pages lie where they were written
// first: Levels[0] are pages of rows, Levels[1] pages of 256 references to such,
// and so on, each with less than 256 references; Tail is the page that is not full
// yet.
type DigestList struct {
	Levels [][]DigestRef
	Tail   []byte
}

// Full is how many rows are in full pages.
func (l *DigestList) Full() uint64 {
	rows, each := uint64(0), uint64(DigestRows)
	for _, level := range l.Levels {
		rows += uint64(len(level)) * each
		each *= DigestRows
	}
	return rows
}

// DigestRoot is what a reader begins with.
type DigestRoot struct {
	Logs    []DigestLog
	Entries DigestList // rows: entries 1 to N
	Marks   DigestList // rows: those entries that say more than what they extend
	KeySets DigestList // the key sets that travel in entries 1 to N
}

func (e *Encoder) digestRefs(refs []DigestRef) {
	e.Uvarint(uint64(len(refs)))
	for _, r := range refs {
		e.Raw(r.Home[:])
		if !r.Home.IsZero() {
			e.U64(r.HomeN)
			e.Raw(r.HomeKeySet[:])
		}
		e.Uvarint(uint64(r.Part))
		e.Uvarint(uint64(r.Offset))
		e.Uvarint(uint64(r.Stored))
		e.Uvarint(uint64(r.Plain))
		e.I64(r.MinTime)
		e.I64(r.MaxTime)
		e.U64(uint64(r.Last))
	}
}

func (d *Decoder) digestRefs() (out []DigestRef) {
	for range d.Len(DigestRows, 44) {
		r := DigestRef{Home: d.ID()}
		if !r.Home.IsZero() {
			r.HomeN, r.HomeKeySet = d.U64(), d.ID()
		}
		part, off, stored, plain := d.Uvarint(), d.Uvarint(), d.Uvarint(), d.Uvarint()
		r.MinTime, r.MaxTime, r.Last = d.I64(), d.I64(), block.Seq(d.U64())
		if d.Err() == nil && (part >= DigestRootPart || off > MaxDigestBytes || stored > MaxDigestPageBytes || plain > MaxDigestPageBytes) {
			d.Fail("a page of %d bytes at %d, part %d", stored, off, part)
		}
		r.Part, r.Offset, r.Stored, r.Plain = uint32(part), int64(off), int(stored), int(plain)
		out = append(out, r)
	}
	return out
}

func (e *Encoder) digestList(l *DigestList) {
	e.Uvarint(uint64(len(l.Levels)))
	for _, refs := range l.Levels {
		e.digestRefs(refs)
	}
	e.Bytes(l.Tail)
}

func (d *Decoder) digestList() (l DigestList) {
	for range d.Len(maxDigestLevels, 1) {
		refs := d.digestRefs()
		if d.Err() == nil && len(refs) == DigestRows {
			d.Fail("a full page of references has not become a page")
		}
		l.Levels = append(l.Levels, refs)
	}
	l.Tail = d.Bytes(MaxDigestPageBytes)
	return l
}

// Encode returns the plain root.
func (x *DigestRoot) Encode() []byte {
	var e Encoder
	e.U8(1)
	e.Uvarint(uint64(len(x.Logs)))
	for _, l := range x.Logs {
		e.Raw(l.Store[:])
		e.U64(l.Next)
		e.Raw(l.Last[:])
		e.epoch(l.Promised)
		e.U64(l.Decided)
		e.U64(l.N)
		e.epoch(l.Epoch)
		e.Raw(l.Hash[:])
		e.U64(l.Index)
	}
	e.digestList(&x.Entries)
	e.digestList(&x.Marks)
	e.digestList(&x.KeySets)
	return e.Buf
}

// DecodeDigestRoot reads a plain root. Tails alias raw.
func DecodeDigestRoot(name string, raw []byte) (*DigestRoot, error) {
	d := NewDecoder(name, raw)
	d.version(1)
	x := &DigestRoot{}
	for range d.Len(MaxStores, 16+8+32+24+8+8+24+32+8) {
		l := DigestLog{Store: d.ID(), Next: d.U64(), Last: d.Hash(), Promised: d.epoch(), Decided: d.U64(), N: d.U64(), Epoch: d.epoch(), Hash: d.Hash(), Index: d.U64()}
		if d.Err() == nil && (l.Next == 0 || (l.N > 0 && l.Index >= l.Next)) {
			d.Fail("a log of %d objects with an entry at %d", l.Next, l.Index)
		}
		x.Logs = append(x.Logs, l)
	}
	x.Entries, x.Marks, x.KeySets = d.digestList(), d.digestList(), d.digestList()
	return x, d.Done()
}

// EncodeDigestRefs returns a page of references.
func EncodeDigestRefs(refs []DigestRef) []byte {
	var e Encoder
	e.U8(1)
	e.digestRefs(refs)
	return e.Buf
}

// DecodeDigestRefs reads a page of references.
func DecodeDigestRefs(name string, raw []byte) ([]DigestRef, error) {
	d := NewDecoder(name, raw)
	d.version(1)
	refs := d.digestRefs()
	return refs, d.Done()
}

// DigestPlace is where a store's log holds an entry's value.
type DigestPlace struct {
	Store block.ID
	Index uint64
}

// DigestRow is what a digest says of one entry.
type DigestRow struct {
	N      uint64
	Hash   Hash  // of the value
	Epoch  Epoch // of its author
	Inline bool  // its manifest travels in it
	Places []DigestPlace
	// Items are those of the entry without its manifest, its segments, the stores'
	// clocks and what partials have still to read.
	Items *Items
}

// EncodeDigestRows returns a page of rows, in order of their entries.
func EncodeDigestRows(rows []DigestRow) []byte {
	var stores []block.ID
	var epochs []Epoch
	storeAt, epochAt := map[block.ID]uint64{}, map[Epoch]uint64{}
	for _, r := range rows {
		if _, ok := epochAt[r.Epoch]; !ok {
			epochAt[r.Epoch] = uint64(len(epochs))
			epochs = append(epochs, r.Epoch)
		}
		for _, p := range r.Places {
			if _, ok := storeAt[p.Store]; !ok {
				storeAt[p.Store] = uint64(len(stores))
				stores = append(stores, p.Store)
			}
		}
	}
	var e Encoder
	e.U8(1)
	e.Uvarint(uint64(len(stores)))
	for _, s := range stores {
		e.Raw(s[:])
	}
	e.Uvarint(uint64(len(epochs)))
	for _, p := range epochs {
		e.epoch(p)
	}
	e.Uvarint(uint64(len(rows)))
	last := uint64(0)
	for _, r := range rows {
		e.Uvarint(r.N - last)
		last = r.N
		e.Raw(r.Hash[:])
		e.Uvarint(epochAt[r.Epoch])
		flags := uint8(0)
		if r.Inline {
			flags = 1
		}
		e.U8(flags)
		e.Uvarint(uint64(len(r.Places)))
		for _, p := range r.Places {
			e.Uvarint(storeAt[p.Store])
			e.Uvarint(p.Index)
		}
		e.Bytes(r.Items.Encode())
	}
	return e.Buf
}

// DecodeDigestRows reads a page of rows.
func DecodeDigestRows(name string, raw []byte) ([]DigestRow, error) {
	d := NewDecoder(name, raw)
	d.version(1)
	var stores []block.ID
	for range d.Len(MaxStores, 16) {
		stores = append(stores, d.ID())
	}
	var epochs []Epoch
	for range d.Len(maxDigestEpochs, 24) {
		epochs = append(epochs, d.epoch())
	}
	var rows []DigestRow
	last := uint64(0)
	for range d.Len(DigestRows, 1+32+1+1+1+1) {
		step := d.Uvarint()
		r := DigestRow{N: last + step, Hash: d.Hash()}
		if d.Err() == nil && (step == 0 || r.N < last) {
			d.Fail("its rows are not in order")
		}
		last = r.N
		epoch, flags := d.Uvarint(), d.U8()
		if d.Err() == nil && (epoch >= uint64(len(epochs)) || flags > 1) {
			d.Fail("a row of epoch %d of %d, flags %#x", epoch, len(epochs), flags)
		}
		if d.Err() != nil {
			break
		}
		r.Epoch, r.Inline = epochs[epoch], flags == 1
		for range d.Len(MaxStores, 2) {
			store, index := d.Uvarint(), d.Uvarint()
			if d.Err() == nil && store >= uint64(len(stores)) {
				d.Fail("a place in store %d of %d", store, len(stores))
			}
			if d.Err() != nil {
				break
			}
			r.Places = append(r.Places, DigestPlace{stores[store], index})
		}
		body := d.Bytes(MaxValueBytes)
		if d.Err() != nil {
			break
		}
		items, err := DecodeItems(name, body)
		if err != nil {
			return nil, err
		}
		if items.Manifest != nil || len(items.Segments) > 0 {
			d.Fail("a row has what only an entry can have")
		}
		r.Items = items
		rows = append(rows, r)
	}
	return rows, d.Done()
}

// EncodeDigestKeySets returns a page of sealed key sets.
func EncodeDigestKeySets(sets [][]byte) []byte {
	var e Encoder
	e.U8(1)
	e.Uvarint(uint64(len(sets)))
	for _, s := range sets {
		e.Bytes(s)
	}
	return e.Buf
}

// DecodeDigestKeySets reads a page of sealed key sets. They alias raw.
func DecodeDigestKeySets(name string, raw []byte) ([][]byte, error) {
	d := NewDecoder(name, raw)
	d.version(1)
	var out [][]byte
	for range d.Len(DigestRows, 1) {
		out = append(out, d.Bytes(MaxKeySetBytes))
	}
	return out, d.Done()
}
