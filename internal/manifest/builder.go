package manifest

import (
	"encoding/binary"
	"fmt"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/segment"
)

// pageExtents is how many extents a page gets before the next one begins.
const pageExtents = 1024

// Extent is what a manifest says of one extent: zeroes, or a piece of a chunk.
type Extent struct {
	block.Extent
	Zero     bool
	Segment  format.SegmentRow
	Chunk    int   // ordinal in the segment
	Offset   int64 // of the first byte in the chunk
	ChunkID  crypt.ChunkID
	ChunkLen int
}

// Advance is what remains of x when its first by bytes are cut off; it suits
// block.NewMap.
func (x Extent) Advance(by int64) Extent {
	x.Off += by
	x.Len -= by
	if !x.Zero {
		x.Offset += by
	}
	return x
}

// Builder makes one manifest. Extents and pages are added in order of volume
// and address.
type Builder struct {
	header  format.ManifestHeader
	agent   *crypt.Agent
	keys    *crypt.KeySet
	sealer  *crypt.Sealer
	buf     []byte
	head    int
	dir     format.Directory
	part    uint32
	volume  block.VolumeIndex
	open    format.Page
	segs    map[block.SegmentID]int
	scratch []byte
}

// NewBuilder begins a manifest. It fills in header's ID, KeySet and Cert.
func NewBuilder(header format.ManifestHeader, agent *crypt.Agent, keys *crypt.KeySet) *Builder {
	b := &Builder{header: header, agent: agent, segs: map[block.SegmentID]int{}}
	b.begin(keys)
	return b
}

// begin gives the manifest an id, and with it its key.
func (b *Builder) begin(keys *crypt.KeySet) {
	b.keys = keys
	b.header.ID = block.NewID()
	b.header.KeySet = keys.ID
	b.header.Cert = b.agent.CertRaw
	b.sealer = crypt.NewSealer(keys.Index.Derive(b.header.ID[:], crypt.LabelManifest))
	b.buf = b.header.Encode()
	b.head = len(b.buf)
}

// ID is the manifest's id.
func (b *Builder) ID() block.ID { return b.header.ID }

// AddKeySet lists a sealed key set that a reader of this manifest needs.
func (b *Builder) AddKeySet(raw []byte) { b.dir.KeySets = append(b.dir.KeySets, raw) }

// Add appends an extent of volume v.
func (b *Builder) Add(v block.VolumeIndex, x Extent) {
	if v != b.volume || len(b.open.Extents) >= pageExtents {
		b.closePage()
		b.volume = v
	}
	row := format.ManifestExtent{Extent: x.Extent, Zero: x.Zero}
	if !x.Zero {
		i, ok := b.segs[x.Segment.ID]
		if !ok {
			i = len(b.open.Segments)
			b.segs[x.Segment.ID] = i
			b.open.Segments = append(b.open.Segments, x.Segment)
		}
		row.Segment, row.Chunk, row.Offset, row.ChunkID, row.ChunkLen = i, x.Chunk, x.Offset, x.ChunkID, x.ChunkLen
	}
	if n := len(b.open.Extents); n > 0 && b.open.Extents[n-1].End() > x.Off {
		panic(fmt.Sprintf("manifest: extent %s added behind %s", x.Extent, b.open.Extents[n-1].Extent))
	}
	b.open.Extents = append(b.open.Extents, row)
}

// AddPage appends a page that lives in another manifest.
func (b *Builder) AddPage(row format.PageRow) {
	b.closePage()
	if row.Home.IsZero() {
		panic("manifest: a page of another manifest has no home")
	}
	b.dir.Pages = append(b.dir.Pages, row)
}

// Size is how many bytes of the manifest are sealed so far.
func (b *Builder) Size() int { return len(b.buf) }

// Spill ends b as a page store: a manifest of its own pages only, which no
// entry refers to and no reader plans with. next goes on in b's place and
// refers to these pages by their home. Key sets stay with next.
func (b *Builder) Spill() (name string, raw []byte, next *Builder) {
	b.closePage()
	stored := b.header
	stored.FromN = stored.ToN
	name = format.ManifestName{Branch: stored.Branch, From: stored.ToN, To: stored.ToN, ID: stored.ID}.Name(stored.Group)
	copy(b.buf[:b.head], stored.Encode())

	next = &Builder{header: b.header, agent: b.agent, segs: map[block.SegmentID]int{}, scratch: b.scratch}
	next.begin(b.keys)
	next.dir.KeySets = b.dir.KeySets
	var own []format.PageRow
	for _, row := range b.dir.Pages {
		if row.Home.IsZero() {
			own = append(own, row)
			row.Home, row.HomeName, row.HomeKeySet = stored.ID, name, stored.KeySet
		}
		next.dir.Pages = append(next.dir.Pages, row)
	}
	b.dir = format.Directory{Pages: own}
	return name, b.Finish(), next
}

func (b *Builder) closePage() {
	n := len(b.open.Extents)
	if n == 0 {
		return
	}
	plain := b.open.Encode()
	packed, compression := segment.Compress(b.scratch, plain)
	if compression == format.CompressionZstd {
		b.scratch = packed
	}
	body := append([]byte{byte(compression)}, packed...)
	before := len(b.buf)
	b.buf = b.sealer.Seal(b.buf, uint64(b.part), body, partAD(b.header.ID, b.part))
	b.dir.Pages = append(b.dir.Pages, format.PageRow{
		Volume: b.volume, First: b.open.Extents[0].Off, End: b.open.Extents[n-1].End(), Extents: n,
		Offset: int64(before), StoredBytes: len(b.buf) - before, PlainBytes: len(plain), Part: b.part,
	})
	b.part++
	b.open = format.Page{}
	clear(b.segs)
}

func partAD(id block.ID, part uint32) []byte {
	ad := append([]byte("drc manifest part v1"), id[:]...)
	return binary.LittleEndian.AppendUint32(ad, part)
}

// Finish seals and signs the manifest and returns its bytes.
func (b *Builder) Finish() []byte {
	b.closePage()
	dir := b.dir.Encode()
	packed, compression := segment.Compress(nil, dir)
	body := binary.LittleEndian.AppendUint32([]byte{byte(compression)}, uint32(len(dir)))
	body = append(body, packed...)
	before := len(b.buf)
	b.buf = b.sealer.Seal(b.buf, format.DirectoryPart, body, partAD(b.header.ID, format.DirectoryPart))
	signedBytes := append(append([]byte(nil), b.buf[:b.head]...), b.buf[before:]...)
	tail := format.ManifestTail{HeaderBytes: uint32(b.head), DirectoryBytes: uint32(len(b.buf) - before)}
	copy(tail.Signature[:], b.agent.Sign(crypt.ContextManifest, signedBytes))
	b.buf = tail.Append(b.buf)
	return b.buf
}
