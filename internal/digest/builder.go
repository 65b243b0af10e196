package digest

import (
	"encoding/binary"
	"fmt"
	"math"
	"slices"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/segment"
)

// Builder makes digests, each from the one before it. It is not safe for concurrent
// use.
type Builder struct {
	group   block.GroupID
	n       uint64
	hash    format.Hash
	entries list[format.DigestRow]
	marks   list[format.DigestRow]
	keySets list[[]byte]
}

// list is a growing list of rows, of which those behind the last full page are in
// memory.
type list[R any] struct {
	levels [][]format.DigestRef
	tail   []R
	plain  bool // its pages are not sealed
	encode func([]R) []byte
	about  func([]R, *format.DigestRef) // says of a page of rows what is in it; nil: nothing
}

// NewBuilder begins with no entries.
func NewBuilder(group block.GroupID) *Builder {
	return &Builder{
		group:   group,
		entries: list[format.DigestRow]{encode: format.EncodeDigestRows, about: about},
		marks:   list[format.DigestRow]{encode: format.EncodeDigestRows},
		keySets: list[[]byte]{encode: format.EncodeDigestKeySets, plain: true},
	}
}

// Builder goes on from a digest.
func (d *Digest) Builder() *Builder {
	b := NewBuilder(d.Header.Group)
	b.n, b.hash = d.Header.N, d.Header.Hash
	own := func(levels [][]format.DigestRef) [][]format.DigestRef {
		out := make([][]format.DigestRef, len(levels))
		for i, refs := range levels {
			out[i] = slices.Clone(refs)
			settle(out[i], &d.Header)
		}
		return out
	}
	b.entries.levels, b.marks.levels, b.keySets.levels = own(d.root.Entries.Levels), own(d.root.Marks.Levels), own(d.root.KeySets.Levels)
	b.entries.tail, b.marks.tail = slices.Clone(d.entries), slices.Clone(d.marks)
	b.keySets.tail = slices.Clone(d.keySets)
	return b
}

// settle gives references to pages of one digest that one as their home.
func settle(refs []format.DigestRef, h *format.DigestHeader) {
	for i := range refs {
		if refs[i].Home.IsZero() {
			refs[i].Home, refs[i].HomeN, refs[i].HomeKeySet = h.ID, h.N, h.KeySet
		}
	}
}

// N is the newest entry that was added.
func (b *Builder) N() uint64 { return b.n }

// Hash is the hash of its value.
func (b *Builder) Hash() format.Hash { return b.hash }

// Pending is how many entries are in no full page yet.
func (b *Builder) Pending() int { return len(b.entries.tail) }

// Row is what a digest says of an entry: its items without what only a reader of
// the entry itself needs.
func Row(n uint64, hash format.Hash, epoch format.Epoch, items *format.Items, places []format.DigestPlace) format.DigestRow {
	bare := *items
	bare.Manifest, bare.Segments = nil, nil
	if items.Range != nil {
		rg := *items.Range
		rg.Dates = nil
		bare.Range = &rg
	}
	bare.Partials = nil
	for _, p := range items.Partials {
		bare.Partials = append(bare.Partials, format.Partial{Volume: p.Volume})
	}
	return format.DigestRow{N: n, Hash: hash, Epoch: epoch, Inline: items.Manifest != nil, Places: places, Items: &bare}
}

// isMark reports whether an entry says more than what it extends.
func isMark(it *format.Items) bool {
	return it.Group != nil || len(it.Volumes) > 0 || len(it.Checkpoints) > 0 || len(it.GapBegins) > 0 || len(it.GapEnds) > 0 ||
		it.Branch != nil || it.Handover != nil
}

// Add adds the next entry, and the key sets that travel in it.
func (b *Builder) Add(r format.DigestRow, keySets [][]byte) {
	if r.N != b.n+1 {
		panic(fmt.Sprintf("digest: entry %d added behind entry %d", r.N, b.n))
	}
	b.n, b.hash = r.N, r.Hash
	b.entries.tail = append(b.entries.tail, r)
	if isMark(r.Items) {
		b.marks.tail = append(b.marks.tail, r)
	}
	b.keySets.tail = append(b.keySets.tail, keySets...)
}

// about has a reference say what is in a page of entries.
func about(rows []format.DigestRow, ref *format.DigestRef) {
	for _, r := range rows {
		if rg := r.Items.Range; rg != nil {
			ref.MinTime, ref.MaxTime, ref.Last = min(ref.MinTime, rg.Time), max(ref.MaxTime, rg.Time), max(ref.Last, rg.To)
		}
	}
}

// object is a digest that is being made.
type object struct {
	header format.DigestHeader
	sealer *crypt.Sealer
	buf    []byte
	part   uint32
}

// page adds a page and returns where it is.
func (o *object) page(plain []byte, sealed bool) format.DigestRef {
	packed, compression := segment.Compress(nil, plain)
	body := append([]byte{byte(compression)}, packed...)
	before := len(o.buf)
	if sealed {
		o.buf = o.sealer.Seal(o.buf, uint64(o.part), body, partAD(o.header.ID, o.part))
	} else {
		o.buf = append(o.buf, body...)
	}
	o.part++
	return format.DigestRef{
		Part: o.part - 1, Offset: int64(before), Stored: len(o.buf) - before, Plain: len(plain),
		MinTime: math.MaxInt64, MaxTime: math.MinInt64,
	}
}

func partAD(id block.ID, part uint32) []byte {
	ad := append([]byte("drc digest part v1"), id[:]...)
	return binary.LittleEndian.AppendUint32(ad, part)
}

// close makes pages of what is full and returns the list as a root has it.
func (l *list[R]) close(o *object) format.DigestList {
	for len(l.tail) >= format.DigestRows {
		rows := l.tail[:format.DigestRows]
		ref := o.page(l.encode(rows), !l.plain)
		if l.about != nil {
			l.about(rows, &ref)
		}
		l.tail = slices.Clone(l.tail[format.DigestRows:])
		l.refer(o, 0, ref)
	}
	out := format.DigestList{}
	for _, refs := range l.levels {
		out.Levels = append(out.Levels, slices.Clone(refs))
	}
	if len(l.tail) > 0 {
		out.Tail = l.encode(l.tail)
	}
	return out
}

// refer adds a reference to a level; a level that is full becomes a page.
func (l *list[R]) refer(o *object, level int, ref format.DigestRef) {
	if level == len(l.levels) {
		l.levels = append(l.levels, nil)
	}
	l.levels[level] = append(l.levels[level], ref)
	refs := l.levels[level]
	if len(refs) < format.DigestRows {
		return
	}
	// A page of references says itself where those lie that have a home; the
	// others are beside it.
	up := o.page(format.EncodeDigestRefs(refs), !l.plain)
	for _, r := range refs {
		up.MinTime, up.MaxTime, up.Last = min(up.MinTime, r.MinTime), max(up.MaxTime, r.MaxTime), max(up.Last, r.Last)
	}
	l.levels[level] = nil
	l.refer(o, level+1, up)
}

// Finish returns the digest of all entries added so far. logs are the stores' logs
// up to a place behind which nothing is of these entries. The builder goes on from
// there, as if what is returned were on the stores: if it does not get there, the
// builder is of no use any more.
func (b *Builder) Finish(agent *crypt.Agent, keys *crypt.KeySet, logs []format.DigestLog) (name string, raw []byte) {
	if b.n == 0 {
		panic("digest: of no entries")
	}
	o := &object{header: format.DigestHeader{
		ID: block.NewID(), Group: b.group, N: b.n, Hash: b.hash, KeySet: keys.ID, Sealed: keys.Raw, Cert: agent.CertRaw,
	}}
	o.sealer = crypt.NewSealer(keys.Index.Derive(o.header.ID[:], crypt.LabelDigest))
	o.buf = o.header.Encode()
	head := len(o.buf)
	root := format.DigestRoot{Logs: logs, Entries: b.entries.close(o), Marks: b.marks.close(o), KeySets: b.keySets.close(o)}
	for _, levels := range [][][]format.DigestRef{b.entries.levels, b.marks.levels, b.keySets.levels} {
		for _, refs := range levels {
			settle(refs, &o.header)
		}
	}
	plain := root.Encode()
	packed, compression := segment.Compress(nil, plain)
	body := binary.LittleEndian.AppendUint32([]byte{byte(compression)}, uint32(len(plain)))
	body = append(body, packed...)
	before := len(o.buf)
	o.buf = o.sealer.Seal(o.buf, format.DigestRootPart, body, partAD(o.header.ID, format.DigestRootPart))
	tail := format.DigestTail{HeaderBytes: uint32(head), RootBytes: uint32(len(o.buf) - before)}
	copy(tail.Signature[:], agent.Sign(crypt.ContextDigest, slices.Concat(o.buf[:head], o.buf[before:])))
	return format.DigestName(b.group, b.n, o.header.ID), tail.Append(o.buf)
}
