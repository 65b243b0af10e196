package segment

import (
	"encoding/binary"
	"fmt"
	"slices"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/erasure"
	"drc/internal/format"
)

// leastShardBytes: below this much payload for each data shard, k shrinks.
const leastShardBytes = 64 << 10

// Writer fills one segment. It is not safe for concurrent use.
type Writer struct {
	id      block.SegmentID
	keys    *crypt.KeySet
	seal    *crypt.Sealer
	index   format.SegmentIndex
	payload []byte
	spare   []byte // memory for the next payload
	open    Frame
	count   int // chunks in payload
}

// NewWriter begins a segment under keys, which need the content key.
func NewWriter(keys *crypt.KeySet) *Writer {
	w := &Writer{}
	w.reset(keys)
	return w
}

func (w *Writer) reset(keys *crypt.KeySet) {
	if !keys.HasContent {
		panic("segment: a writer needs a key set with its content key")
	}
	w.id = block.SegmentID(block.NewID())
	w.keys = keys
	w.seal = crypt.NewSealer(keys.Content.Derive(w.id[:], crypt.LabelSegmentContent))
	w.index = format.SegmentIndex{}
	w.payload, w.spare = w.spare, nil
	w.open.Reset()
	w.count = 0
}

// ID is the segment's id.
func (w *Writer) ID() block.SegmentID { return w.id }

// Add appends a chunk and returns its ordinal. It does not keep chunk.
func (w *Writer) Add(chunk []byte) (ordinal int) {
	if !w.open.Fits(len(chunk)) {
		w.closeFrame()
	}
	w.open.Add(chunk)
	ordinal = w.count + w.open.Chunks() - 1
	if w.open.Full() {
		w.closeFrame()
	}
	return ordinal
}

func (w *Writer) closeFrame() {
	if w.open.Chunks() > 0 {
		w.AddFrame(&w.open)
		w.open.Reset()
	}
}

// AddFrame appends a frame, which must hold a chunk, and returns the ordinal of
// its first chunk. It compresses f if that was not done. It does not keep f.
func (w *Writer) AddFrame(f *Frame) (first int) {
	if f != &w.open {
		w.closeFrame()
	}
	if f.packed == nil {
		f.Compress()
	}
	before, ordinal := len(w.payload), uint64(len(w.index.Frames))
	w.reserve(len(f.packed) + crypt.Overhead)
	w.payload = w.seal.Seal(w.payload, ordinal, f.packed, frameAD(w.id, ordinal))
	w.index.Frames = append(w.index.Frames, format.Frame{
		Stored: len(w.payload) - before, Compression: f.compression, Chunks: slices.Clone(f.chunks),
	})
	first = w.count
	w.count += len(f.chunks)
	return first
}

// reserve makes room for n more bytes of payload. Sealing alone would make just
// enough for one frame, and copy everything for each.
func (w *Writer) reserve(n int) {
	if need := len(w.payload) + n; need > cap(w.payload) {
		w.payload = append(make([]byte, 0, max(need, 2*cap(w.payload))), w.payload...)
	}
}

// Bytes is how large the payload is so far, the open frame counted plain.
func (w *Writer) Bytes() int { return len(w.payload) + len(w.open.plain) }

// Chunks is how many chunks the segment holds so far.
func (w *Writer) Chunks() int { return w.count + w.open.Chunks() }

func frameAD(id block.SegmentID, ordinal uint64) []byte {
	ad := make([]byte, 0, 40)
	ad = append(ad, "drc frame v1"...)
	ad = append(ad, id[:]...)
	return binary.LittleEndian.AppendUint64(ad, ordinal)
}

func indexAD(id block.SegmentID) []byte { return append([]byte("drc segment index v1"), id[:]...) }

// Sealed is a finished segment.
type Sealed struct {
	ID         block.SegmentID
	Keys       *crypt.KeySet
	Payload    []byte // frames and sealed index
	IndexBytes int
}

// Finish seals what is left and the index, and makes w ready for the next
// segment under the same keys.
func (w *Writer) Finish() *Sealed {
	w.closeFrame()
	sealer := crypt.NewSealer(w.keys.Index.Derive(w.id[:], crypt.LabelSegmentIndex))
	index := w.index.Encode()
	before := len(w.payload)
	w.reserve(len(index) + crypt.Overhead)
	payload := sealer.Seal(w.payload, 0, index, indexAD(w.id))
	s := &Sealed{ID: w.id, Keys: w.keys, Payload: payload, IndexBytes: len(payload) - before}
	w.reset(w.keys)
	return s
}

// Recycle gives w the memory of a finished segment's Payload, which nobody
// uses any more, for a later one.
func (w *Writer) Recycle(payload []byte) {
	if cap(w.payload) == 0 {
		w.payload = payload[:0]
	} else {
		w.spare = payload[:0]
	}
}

// Row describes the segment for a manifest; inline is the number of the log
// entry that will hold it, or 0 if it goes out as shards of profile p.
func (s *Sealed) Row(p format.Profile, inline uint64) format.SegmentRow {
	row := format.SegmentRow{ID: s.ID, KeySet: s.Keys.ID, Payload: int64(len(s.Payload)), IndexBytes: s.IndexBytes, Inline: inline}
	if inline == 0 {
		row.Profile = s.Profile(p)
	}
	return row
}

// Profile is the profile of this segment in a repository of profile p: small
// segments use fewer data shards.
func (s *Sealed) Profile(p format.Profile) format.Profile {
	return erasure.Shrink(p, int64(len(s.Payload)), leastShardBytes)
}

// Shards cuts the segment into its shard objects, with parity, headers and
// checksums: index i of the result is shard i.
func (s *Sealed) Shards(p format.Profile) ([][]byte, error) {
	p = s.Profile(p)
	n := format.ShardBytes(int64(len(s.Payload)), p.Data)
	objects := make([][]byte, p.Total())
	parts := make([][]byte, p.Total())
	for i := range objects {
		h := format.ShardHeader{
			Segment: s.ID, KeySet: s.Keys.ID, Profile: p, Index: i,
			Payload: int64(len(s.Payload)), ShardBytes: n,
		}
		o := h.Append(make([]byte, 0, format.ShardObjectBytes(n)))
		o = o[:format.ShardHeaderSize+n]
		parts[i] = o[format.ShardHeaderSize:]
		if i < p.Data {
			from := min(int64(i)*n, int64(len(s.Payload)))
			to := min(from+n, int64(len(s.Payload)))
			copy(parts[i], s.Payload[from:to])
		}
		objects[i] = o
	}
	if err := erasure.Encode(p, parts); err != nil {
		return nil, fmt.Errorf("segment %s: %w", s.ID, err)
	}
	sums := crypt.NewSummer(s.Keys.Index.Derive(s.ID[:], crypt.LabelShardSums))
	for i := range objects {
		objects[i] = appendSums(objects[i], sums, i)
	}
	return objects, nil
}

// appendSums appends the trailer to header and shard.
func appendSums(object []byte, sums *crypt.Summer, shard int) []byte {
	body := object[format.ShardHeaderSize:]
	trailer := len(object)
	part := uint64(0)
	for len(body) > 0 {
		n := min(len(body), format.ShardSumBlock)
		sum := sums.Sum(shard, part, body[:n])
		object = append(object, sum[:]...)
		body, part = body[n:], part+1
	}
	sum := sums.Sum(shard, part, object[:format.ShardHeaderSize], object[trailer:])
	return append(object, sum[:]...)
}
