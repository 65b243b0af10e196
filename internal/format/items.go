package format

import "drc/internal/block"

// ItemKind says what an item of a log value is. Kinds of 0x8000 and above may
// be skipped by a reader that does not know them; any other unknown kind makes
// the entry unreadable to it.
type ItemKind uint16

const (
	itemGroup      ItemKind = 1
	itemVolume     ItemKind = 2
	itemRange      ItemKind = 3
	itemManifest   ItemKind = 4 // a whole manifest, inline
	itemReference  ItemKind = 5 // a manifest object
	itemSegment    ItemKind = 6 // a whole segment, inline
	itemCheckpoint ItemKind = 7
	itemPartial    ItemKind = 8
	itemGapBegin   ItemKind = 9
	itemGapEnd     ItemKind = 10
	itemDegraded   ItemKind = 11
	itemBranch     ItemKind = 13
	itemHandover   ItemKind = 14
	// Reserved for entries that are specified and not yet written. A reader
	// that meets one refuses the entry.
	//  12 key set rotation, 15 resize, 16 membership, 17 store set, 18 prune,
	//  19 repack
)

// Limits of items.
const (
	MaxNameBytes   = 255
	maxItems       = 1 << 16
	maxRegions     = 1 << 16
	maxVolumes     = 1 << 16
	MaxInlineBytes = 64 << 10 // of an inline segment
	// MinMinChunk is the chunker's window: no chunk that is cut can be smaller.
	MinMinChunk = 64
	maxAvgBits  = 31
)

// Items is the opened body of a log value.
type Items struct {
	Group       *Group // in the group's first entry only
	Volumes     []Volume
	Range       *Range // every entry that extends the history has one
	Manifest    []byte // an encoded manifest, inline; or
	Reference   *ManifestReference
	Segments    []InlineSegment
	Checkpoints []NamedCheckpoint
	Partials    []Partial
	GapBegins   []GapBegin
	GapEnds     []block.VolumeIndex
	Degraded    []Degraded
	Branch      *Branch   `json:",omitempty"` // the entry begins a branch
	Handover    *Handover `json:",omitempty"` // the author has ended its work in order
}

// Group is what holds for the whole of a group, for ever.
type Group struct {
	Name       string
	Branch     block.BranchID // the first branch
	ChunkIDKey [32]byte
	Polynomial uint64 // of the content-defined chunker
	MinChunk   uint32 // bytes
	AvgBits    uint8  // average chunk is MinChunk + 1<<AvgBits bytes
	MaxChunk   uint32 // bytes
}

// Volume says that a volume joins the group.
type Volume struct {
	Index      block.VolumeIndex
	ID         block.VolumeID
	Name       string
	SizeBytes  int64
	SectorSize uint32
}

// Range says which writes the entry makes part of the history: it ends at To.
// From is one more than the previous entry's To, or lower: then the manifest
// also covers writes that are history already, which changes nothing.
type Range struct {
	Branch   block.BranchID
	From, To block.Seq
	Time     int64 // the author's wall clock when the batch was cut, ns since 1970 UTC
	Dates    []StoreDate
}

// ManifestReference names a manifest object.
type ManifestReference struct {
	ID    block.ID
	Bytes int64
	Hash  Hash
}

// InlineSegment is a segment that travels inside the log entry.
type InlineSegment struct {
	ID      block.SegmentID
	Payload []byte
}

// NamedCheckpoint gives a checkpoint a name. Seq is the To of this or of an
// earlier entry.
type NamedCheckpoint struct {
	Name string
	Seq  block.Seq
	Time int64
}

// Partial says that the entry's To is no checkpoint of this volume: a resync
// is under way and Remaining has not been read yet.
type Partial struct {
	Volume    block.VolumeIndex
	Remaining []block.Extent
}

// GapReason says why a gap began.
type GapReason uint8

// The reasons for a gap.
const (
	GapInitialSync GapReason = 1 // the volume had data when protection began
	GapForeign     GapReason = 2 // the backing was changed without DRC
	GapBuffer      GapReason = 3 // the buffer was full or lost
	GapBufferLost  GapReason = 4 // the buffer was lost, and by somebody's decision the volume went on as it was or was rewound
)

func (g GapReason) String() string {
	switch g {
	case GapInitialSync:
		return "initial sync"
	case GapForeign:
		return "the backing was changed without DRC"
	case GapBuffer:
		return "the buffer was full or lost"
	case GapBufferLost:
		return "the buffer was lost with writes that the volume may lack"
	}
	return "unknown reason"
}

// GapBegin says that from After on the volume's history is not known, until a
// GapEnd.
type GapBegin struct {
	Volume block.VolumeIndex
	After  block.Seq
	Reason GapReason
}

// Degraded says which shards of a segment were on their stores when the entry
// was written; the others were safe in the writer's buffer.
type Degraded struct {
	Segment block.SegmentID
	Placed  uint64 // bit i: shard i is placed
}

// Branch says that a new branch begins with this entry: what stands in the log behind
// it, up to the next such entry, goes on from entry ForkN, and not from the entries
// between. Those stay the history of the branch that they are of. The entry's range is
// of the new branch, and extends nothing.
type Branch struct {
	ID       block.BranchID
	Parent   block.BranchID // of which entry ForkN is history
	ForkN    uint64         // a checkpoint of all volumes that had joined
	ForkHash Hash           // of its value
	ForkSeq  block.Seq      // at which it ends
	Volumes  []BranchVolume // all that had joined
}

// BranchVolume is the name of a volume on a new branch: another one than it has on
// any other, since a client of that one is not to find itself in another history.
type BranchVolume struct {
	Index block.VolumeIndex
	Name  string
}

// Handover says that the author has committed all that was acknowledged, takes no more
// writes, and lets go of the group. It holds as long as no other entry follows: who
// takes office then goes on with the branch, and nothing is missing.
type Handover struct {
	Seq  block.Seq // the end of the entry's range
	Time int64     // the author's wall clock, ns since 1970 UTC
}

// Encode returns the plain body of a value.
func (it *Items) Encode() []byte {
	var e Encoder
	item := func(kind ItemKind, f func(e *Encoder)) {
		var b Encoder
		f(&b)
		e.U16(uint16(kind))
		e.Bytes(b.Buf)
	}
	if g := it.Group; g != nil {
		item(itemGroup, func(e *Encoder) {
			e.String(g.Name)
			e.Raw(g.Branch[:])
			e.Raw(g.ChunkIDKey[:])
			e.U64(g.Polynomial)
			e.U32(g.MinChunk)
			e.U8(g.AvgBits)
			e.U32(g.MaxChunk)
		})
	}
	for _, v := range it.Volumes {
		item(itemVolume, func(e *Encoder) {
			e.U16(uint16(v.Index))
			e.Raw(v.ID[:])
			e.String(v.Name)
			e.I64(v.SizeBytes)
			e.U32(v.SectorSize)
		})
	}
	if r := it.Range; r != nil {
		item(itemRange, func(e *Encoder) {
			e.Raw(r.Branch[:])
			e.U64(uint64(r.From))
			e.U64(uint64(r.To))
			e.I64(r.Time)
			e.Uvarint(uint64(len(r.Dates)))
			for _, d := range r.Dates {
				e.Raw(d.Store[:])
				e.I64(d.Time)
			}
		})
	}
	if it.Manifest != nil {
		item(itemManifest, func(e *Encoder) { e.Raw(it.Manifest) })
	}
	if r := it.Reference; r != nil {
		item(itemReference, func(e *Encoder) {
			e.Raw(r.ID[:])
			e.I64(r.Bytes)
			e.Raw(r.Hash[:])
		})
	}
	for _, s := range it.Segments {
		item(itemSegment, func(e *Encoder) {
			e.Raw(s.ID[:])
			e.Raw(s.Payload)
		})
	}
	for _, c := range it.Checkpoints {
		item(itemCheckpoint, func(e *Encoder) {
			e.String(c.Name)
			e.U64(uint64(c.Seq))
			e.I64(c.Time)
		})
	}
	for _, p := range it.Partials {
		item(itemPartial, func(e *Encoder) {
			e.U16(uint16(p.Volume))
			e.Uvarint(uint64(len(p.Remaining)))
			for _, x := range p.Remaining {
				e.I64(x.Off)
				e.I64(x.Len)
			}
		})
	}
	for _, g := range it.GapBegins {
		item(itemGapBegin, func(e *Encoder) {
			e.U16(uint16(g.Volume))
			e.U64(uint64(g.After))
			e.U8(uint8(g.Reason))
		})
	}
	for _, v := range it.GapEnds {
		item(itemGapEnd, func(e *Encoder) { e.U16(uint16(v)) })
	}
	for _, g := range it.Degraded {
		item(itemDegraded, func(e *Encoder) {
			e.Raw(g.Segment[:])
			e.U64(g.Placed)
		})
	}
	if b := it.Branch; b != nil {
		item(itemBranch, func(e *Encoder) {
			e.Raw(b.ID[:])
			e.Raw(b.Parent[:])
			e.U64(b.ForkN)
			e.Raw(b.ForkHash[:])
			e.U64(uint64(b.ForkSeq))
			e.Uvarint(uint64(len(b.Volumes)))
			for _, v := range b.Volumes {
				e.U16(uint16(v.Index))
				e.String(v.Name)
			}
		})
	}
	if h := it.Handover; h != nil {
		item(itemHandover, func(e *Encoder) {
			e.U64(uint64(h.Seq))
			e.I64(h.Time)
		})
	}
	return e.Buf
}

// DecodeItems reads the plain body of a value. Byte slices alias raw.
func DecodeItems(name string, raw []byte) (*Items, error) {
	it := &Items{}
	d := NewDecoder(name, raw)
	for n := 0; d.Err() == nil && d.Left() > 0; n++ {
		if n == maxItems {
			d.Fail("more than %d items", maxItems)
			break
		}
		kind := ItemKind(d.U16())
		b := NewDecoder(name, d.Bytes(MaxValueBytes))
		if d.Err() != nil {
			break
		}
		if err := it.decode(kind, b); err != nil {
			return nil, err
		}
	}
	if err := d.Done(); err != nil {
		return nil, err
	}
	if it.Manifest != nil && it.Reference != nil {
		return nil, Corrupt(name, "it has two manifests")
	}
	if err := it.together(name); err != nil {
		return nil, err
	}
	return it, nil
}

// together checks what items say of each other.
func (it *Items) together(name string) error {
	to := block.Seq(0)
	if it.Range != nil {
		to = it.Range.To
	}
	if b := it.Branch; b != nil {
		switch {
		case it.Range == nil || it.Range.Branch != b.ID || to != b.ForkSeq:
			return Corrupt(name, "it begins a branch, and its range is not where that forks")
		case it.Manifest != nil || it.Reference != nil || it.Group != nil || len(it.Volumes) > 0 || len(it.Partials) > 0 || len(it.GapBegins) > 0 || len(it.GapEnds) > 0 ||
			len(it.Segments) > 0 || len(it.Checkpoints) > 0 || it.Handover != nil:
			return Corrupt(name, "it begins a branch, and says more than that")
		case b.ID == b.Parent || b.ForkN == 0:
			return Corrupt(name, "it begins a branch that has no parent")
		}
		names := map[string]bool{}
		for i, v := range b.Volumes {
			if v.Name == "" || names[v.Name] || (i > 0 && v.Index <= b.Volumes[i-1].Index) {
				return Corrupt(name, "it begins a branch, of which the volumes have no names or indexes of their own")
			}
			names[v.Name] = true
		}
	}
	if h := it.Handover; h != nil && (it.Range == nil || to != h.Seq) {
		return Corrupt(name, "it hands over at another seq than the history ends at")
	}
	return nil
}

func (it *Items) decode(kind ItemKind, d *Decoder) error {
	switch kind {
	case itemGroup:
		g := &Group{Name: d.String(MaxNameBytes), Branch: d.ID(), ChunkIDKey: d.Hash(), Polynomial: d.U64(),
			MinChunk: d.U32(), AvgBits: d.U8(), MaxChunk: d.U32()}
		if it.Group != nil {
			d.Fail("it has two group items")
		}
		if d.Err() == nil && (g.MinChunk < MinMinChunk || g.MinChunk > g.MaxChunk || g.MaxChunk > MaxChunkBytes || g.AvgBits > maxAvgBits) {
			d.Fail("chunks of %d to %d bytes, cut at %d bits", g.MinChunk, g.MaxChunk, g.AvgBits)
		}
		it.Group = g
	case itemVolume:
		v := Volume{Index: block.VolumeIndex(d.U16()), ID: d.ID(), Name: d.String(MaxNameBytes), SizeBytes: d.I64(), SectorSize: d.U32()}
		if d.Err() == nil && (v.SizeBytes < 0 || v.SizeBytes > MaxVolumeBytes || (v.SectorSize != 512 && v.SectorSize != 4096) || v.SizeBytes%int64(v.SectorSize) != 0) {
			d.Fail("volume of %d bytes in sectors of %d", v.SizeBytes, v.SectorSize)
		}
		it.Volumes = append(it.Volumes, v)
	case itemRange:
		r := &Range{Branch: d.ID(), From: block.Seq(d.U64()), To: block.Seq(d.U64()), Time: d.I64()}
		for range d.Len(MaxStores, 24) {
			r.Dates = append(r.Dates, StoreDate{Store: d.ID(), Time: d.I64()})
		}
		if it.Range != nil {
			d.Fail("it has two ranges")
		}
		it.Range = r
	case itemManifest:
		if it.Manifest != nil {
			d.Fail("it has two manifests")
		}
		it.Manifest = d.Raw(d.Left())
	case itemReference:
		if it.Reference != nil {
			d.Fail("it has two manifests")
		}
		it.Reference = &ManifestReference{ID: d.ID(), Bytes: d.I64(), Hash: d.Hash()}
		if d.Err() == nil && (it.Reference.Bytes < 0 || it.Reference.Bytes > MaxManifestBytes) {
			d.Fail("manifest of %d bytes", it.Reference.Bytes)
		}
	case itemSegment:
		s := InlineSegment{ID: d.ID(), Payload: d.Raw(d.Left())}
		if d.Err() == nil && len(s.Payload) > MaxInlineBytes {
			d.Fail("inline segment of %d bytes", len(s.Payload))
		}
		it.Segments = append(it.Segments, s)
	case itemCheckpoint:
		it.Checkpoints = append(it.Checkpoints, NamedCheckpoint{Name: d.String(MaxNameBytes), Seq: block.Seq(d.U64()), Time: d.I64()})
	case itemPartial:
		p := Partial{Volume: block.VolumeIndex(d.U16())}
		for range d.Len(maxRegions, 16) {
			x := block.Extent{Off: d.I64(), Len: d.I64()}
			if d.Err() == nil && (x.Off < 0 || x.Len <= 0 || x.Off > MaxVolumeBytes-x.Len) {
				d.Fail("region %s is out of range", x)
			}
			p.Remaining = append(p.Remaining, x)
		}
		it.Partials = append(it.Partials, p)
	case itemGapBegin:
		it.GapBegins = append(it.GapBegins, GapBegin{Volume: block.VolumeIndex(d.U16()), After: block.Seq(d.U64()), Reason: GapReason(d.U8())})
	case itemGapEnd:
		it.GapEnds = append(it.GapEnds, block.VolumeIndex(d.U16()))
	case itemDegraded:
		it.Degraded = append(it.Degraded, Degraded{Segment: d.ID(), Placed: d.U64()})
	case itemBranch:
		b := &Branch{ID: d.ID(), Parent: d.ID(), ForkN: d.U64(), ForkHash: d.Hash(), ForkSeq: block.Seq(d.U64())}
		for range d.Len(maxVolumes, 3) {
			b.Volumes = append(b.Volumes, BranchVolume{Index: block.VolumeIndex(d.U16()), Name: d.String(MaxNameBytes)})
		}
		if it.Branch != nil {
			d.Fail("it begins two branches")
		}
		it.Branch = b
	case itemHandover:
		if it.Handover != nil {
			d.Fail("it has two handovers")
		}
		it.Handover = &Handover{Seq: block.Seq(d.U64()), Time: d.I64()}
	default:
		if kind < 0x8000 {
			return Corrupt(d.name, "it has an item of kind %d, which this DRC does not know: use a newer drc", kind)
		}
		return nil
	}
	return d.Done()
}
