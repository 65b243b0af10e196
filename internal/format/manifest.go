package format

import (
	"math"

	"drc/internal/block"
)

const (
	magicManifest = "DRCM"
	// ManifestTailSize is the size of the fixed end of a manifest, in bytes.
	ManifestTailSize = 4 + 4 + signatureSize + 4
	// MaxManifestBytes bounds a manifest object.
	MaxManifestBytes = 1 << 32
	// MaxManifestHeaderBytes bounds a manifest's header.
	MaxManifestHeaderBytes = 16 << 10
	// MaxDirectoryBytes bounds a manifest's directory, plain and sealed.
	MaxDirectoryBytes = 256 << 20
	// MaxPageBytes bounds the plain form of a page.
	MaxPageBytes = 1 << 20
	// MaxPageExtents bounds the extents of a page.
	MaxPageExtents = 8192
	// MaxVolumeBytes bounds a volume.
	MaxVolumeBytes = 1 << 60
	// DirectoryPart is the part number under which the directory is sealed.
	DirectoryPart = math.MaxUint32
)

// ManifestHeader begins a manifest.
type ManifestHeader struct {
	ID       block.ID
	Group    block.GroupID
	Branch   block.BranchID
	FromN    uint64 // first log entry covered
	ToN      uint64 // last log entry covered
	From, To block.Seq
	KeySet   block.ID
	Cert     []byte // the author's certificate
}

// Encode returns the header's bytes.
func (h *ManifestHeader) Encode() []byte {
	var e Encoder
	e.String(magicManifest)
	e.U8(1)
	e.Raw(h.ID[:])
	e.Raw(h.Group[:])
	e.Raw(h.Branch[:])
	e.U64(h.FromN)
	e.U64(h.ToN)
	e.U64(uint64(h.From))
	e.U64(uint64(h.To))
	e.Raw(h.KeySet[:])
	e.Bytes(h.Cert)
	return e.Buf
}

// DecodeManifestHeader reads a header from the front of raw and returns its
// length.
func DecodeManifestHeader(name string, raw []byte) (h ManifestHeader, n int, err error) {
	d := NewDecoder(name, raw)
	d.Magic(magicManifest, 1)
	h.ID = d.ID()
	h.Group = d.ID()
	h.Branch = d.ID()
	h.FromN = d.U64()
	h.ToN = d.U64()
	h.From = block.Seq(d.U64())
	h.To = block.Seq(d.U64())
	h.KeySet = d.ID()
	h.Cert = d.Bytes(MaxCertificateBytes)
	if d.Err() == nil && (h.FromN == 0 || h.FromN > h.ToN) {
		d.Fail("it covers entries %d to %d", h.FromN, h.ToN)
	}
	return h, d.Offset(), d.Err()
}

// ManifestTail ends a manifest: with the last ManifestTailSize bytes a reader
// finds header and directory.
type ManifestTail struct {
	HeaderBytes    uint32
	DirectoryBytes uint32 // sealed
	Signature      [signatureSize]byte
}

// Append appends the tail.
func (t *ManifestTail) Append(dst []byte) []byte {
	e := Encoder{Buf: dst}
	e.U32(t.HeaderBytes)
	e.U32(t.DirectoryBytes)
	e.Raw(t.Signature[:])
	e.Raw([]byte(magicManifest))
	return e.Buf
}

// DecodeManifestTail reads the tail of a manifest of total bytes.
func DecodeManifestTail(name string, raw []byte, total int64) (t ManifestTail, err error) {
	d := NewDecoder(name, raw)
	t.HeaderBytes = d.U32()
	t.DirectoryBytes = d.U32()
	copy(t.Signature[:], d.Raw(signatureSize))
	if m := d.Raw(4); d.Err() == nil && string(m) != magicManifest {
		d.Fail("it does not end like a manifest")
	}
	if d.Err() == nil && (t.HeaderBytes > MaxManifestHeaderBytes || t.DirectoryBytes > MaxDirectoryBytes ||
		int64(t.HeaderBytes)+int64(t.DirectoryBytes)+ManifestTailSize > total) {
		d.Fail("its parts do not fit into %d bytes", total)
	}
	return t, d.Done()
}

// PageRow is one row of a manifest's directory: a page of extents of one
// volume. Rows are sorted by volume and address and do not overlap.
type PageRow struct {
	Volume      block.VolumeIndex
	First, End  int64 // the page's extents lie in [First, End), bytes
	Extents     int
	Home        block.ID // manifest object that holds the page; zero: this one
	HomeName    string   // that object's name, where Home is not zero
	HomeKeySet  block.ID // key set of that manifest
	Offset      int64    // of the sealed page in its manifest
	StoredBytes int
	PlainBytes  int // uncompressed
	Part        uint32
}

// Directory lists what a manifest holds.
type Directory struct {
	Pages   []PageRow
	KeySets [][]byte // sealed key sets that a reader needs, where the manifest stands alone
}

// Encode returns the plain directory.
func (x *Directory) Encode() []byte {
	var e Encoder
	e.U8(1)
	e.Uvarint(uint64(len(x.KeySets)))
	for _, k := range x.KeySets {
		e.Bytes(k)
	}
	e.Uvarint(uint64(len(x.Pages)))
	for _, p := range x.Pages {
		e.U16(uint16(p.Volume))
		e.Uvarint(uint64(p.First))
		e.Uvarint(uint64(p.End - p.First))
		e.Uvarint(uint64(p.Extents))
		if p.Home.IsZero() {
			e.U8(0)
		} else {
			e.U8(1)
			e.Raw(p.Home[:])
			e.String(p.HomeName)
			e.Raw(p.HomeKeySet[:])
		}
		e.Uvarint(uint64(p.Offset))
		e.Uvarint(uint64(p.StoredBytes))
		e.Uvarint(uint64(p.PlainBytes))
		e.Uvarint(uint64(p.Part))
	}
	return e.Buf
}

// DecodeDirectory reads a plain directory.
func DecodeDirectory(name string, raw []byte) (*Directory, error) {
	d := NewDecoder(name, raw)
	if v := d.U8(); d.Err() == nil && v != 1 {
		d.Fail("version %d is unknown", v)
	}
	x := &Directory{}
	for range d.Len(1<<20, 1) {
		x.KeySets = append(x.KeySets, d.Bytes(MaxKeySetBytes))
	}
	var last PageRow
	for i := range d.Len(1<<24, 10) {
		p := PageRow{Volume: block.VolumeIndex(d.U16()), First: d.Int64()}
		n := d.Int64()
		if d.Err() == nil && (p.First > MaxVolumeBytes || n > MaxVolumeBytes-p.First) {
			d.Fail("page reaches past the largest volume")
		}
		if d.Err() == nil && n == 0 {
			d.Fail("a page of no bytes")
		}
		p.End = p.First + n
		p.Extents = d.Len(MaxPageExtents, 0)
		switch d.U8() {
		case 0:
		case 1:
			p.Home, p.HomeName, p.HomeKeySet = d.ID(), d.String(1024), d.ID()
			if d.Err() == nil && p.Home.IsZero() {
				d.Fail("a page whose home has no id")
			}
		default:
			d.Fail("unknown kind of page")
		}
		if p.Offset = d.Int64(); p.Offset > MaxManifestBytes {
			d.Fail("a page at byte %d of its manifest", p.Offset)
		}
		p.StoredBytes = d.Len(MaxPageBytes+1024, 0)
		p.PlainBytes = d.Len(MaxPageBytes, 0)
		p.Part = uint32(d.Len(math.MaxUint32-1, 0))
		if d.Err() != nil {
			break
		}
		if i > 0 && (p.Volume < last.Volume || (p.Volume == last.Volume && p.First < last.End)) {
			d.Fail("pages are not in order")
		}
		last = p
		x.Pages = append(x.Pages, p)
	}
	return x, d.Done()
}

// SegmentRow says where a segment's bytes are.
type SegmentRow struct {
	ID         block.SegmentID
	KeySet     block.ID
	Profile    Profile // zero for an inline segment
	Payload    int64   // bytes
	IndexBytes int     // length of the sealed index at the payload's end
	Inline     uint64  // number of the log entry that holds the segment, or 0
	Expiry     int
}

// ManifestExtent says what an extent of a volume holds: a piece of a chunk, or
// zeroes.
type ManifestExtent struct {
	block.Extent
	Zero     bool
	Segment  int      // index into the page's segments
	Chunk    int      // ordinal of the chunk in the segment
	Offset   int64    // of the extent's first byte in the chunk
	ChunkID  [16]byte // of the whole chunk
	ChunkLen int      // of the whole chunk, bytes
}

// Page is the plain form of a page.
type Page struct {
	Segments []SegmentRow
	Extents  []ManifestExtent // sorted, not overlapping
}

// Encode returns the plain page.
func (p *Page) Encode() []byte {
	var e Encoder
	e.U8(1)
	sets := map[block.ID]uint64{}
	var order []block.ID
	for _, s := range p.Segments {
		if _, ok := sets[s.KeySet]; !ok {
			sets[s.KeySet] = uint64(len(order))
			order = append(order, s.KeySet)
		}
	}
	e.Uvarint(uint64(len(order)))
	for _, id := range order {
		e.Raw(id[:])
	}
	e.Uvarint(uint64(len(p.Segments)))
	for _, s := range p.Segments {
		e.Raw(s.ID[:])
		e.Uvarint(sets[s.KeySet])
		e.U8(uint8(s.Profile.Data))
		e.U8(uint8(s.Profile.Parity))
		e.U8(uint8(s.Expiry))
		e.Uvarint(uint64(s.Payload))
		e.Uvarint(uint64(s.IndexBytes))
		e.Uvarint(s.Inline)
	}
	e.Uvarint(uint64(len(p.Extents)))
	at := int64(0)
	for _, x := range p.Extents {
		e.Uvarint(uint64(x.Off - at))
		e.Uvarint(uint64(x.Len))
		at = x.End()
		if x.Zero {
			e.Uvarint(0)
			continue
		}
		e.Uvarint(uint64(x.Segment) + 1)
		e.Uvarint(uint64(x.Chunk))
		e.Uvarint(uint64(x.Offset))
		e.Uvarint(uint64(x.ChunkLen))
		e.Raw(x.ChunkID[:])
	}
	return e.Buf
}

// DecodePage reads a plain page.
func DecodePage(name string, raw []byte) (*Page, error) {
	d := NewDecoder(name, raw)
	if v := d.U8(); d.Err() == nil && v != 1 {
		d.Fail("version %d is unknown", v)
	}
	sets := make([]block.ID, d.Len(MaxPageExtents, 16))
	for i := range sets {
		sets[i] = d.ID()
	}
	p := &Page{Segments: make([]SegmentRow, d.Len(MaxPageExtents, 23))}
	for i := range p.Segments {
		s := SegmentRow{ID: d.ID()}
		set := d.Len(MaxPageExtents, 0)
		if d.Err() == nil && set >= len(sets) {
			d.Fail("key set %d of %d", set, len(sets))
		}
		if d.Err() != nil {
			return nil, d.Err()
		}
		s.KeySet = sets[set]
		s.Profile = Profile{Data: int(d.U8()), Parity: int(d.U8())}
		s.Expiry = int(d.U8())
		s.Payload = int64(d.Len(MaxSegmentBytes, 0))
		s.IndexBytes = d.Len(MaxSegmentBytes, 0)
		s.Inline = d.Uvarint()
		if d.Err() == nil && (int64(s.IndexBytes) > s.Payload || s.Expiry > 15 || s.Profile.Total() > MaxShards ||
			(s.Inline == 0) != (s.Profile.Data > 0) || (s.Inline != 0 && s.Profile.Parity != 0)) {
			d.Fail("segment %s has numbers that do not fit together", s.ID)
		}
		p.Segments[i] = s
	}
	p.Extents = make([]ManifestExtent, d.Len(MaxPageExtents, 3))
	at := int64(0)
	for i := range p.Extents {
		gap, n := d.Int64(), d.Int64()
		if d.Err() == nil && (n == 0 || gap > MaxVolumeBytes-at || n > MaxVolumeBytes-at-gap) {
			d.Fail("extent %d is empty or out of range", i)
		}
		x := ManifestExtent{Extent: block.Extent{Off: at + gap, Len: n}}
		at = x.End()
		s := d.Len(MaxPageExtents, 0)
		if s == 0 {
			x.Zero = true
		} else {
			x.Segment = s - 1
			x.Chunk = d.Len(maxChunks, 0)
			x.Offset = int64(d.Len(MaxChunkBytes, 0))
			x.ChunkLen = d.Len(MaxChunkBytes, 0)
			x.ChunkID = d.ID()
			if d.Err() == nil && (x.Segment >= len(p.Segments) || x.Offset+x.Len > int64(x.ChunkLen)) {
				d.Fail("extent %d does not fit its chunk", i)
			}
		}
		if d.Err() != nil {
			return nil, d.Err()
		}
		p.Extents[i] = x
	}
	return p, d.Done()
}
