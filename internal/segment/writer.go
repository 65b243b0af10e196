package segment

import (
	"encoding/binary"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/erasure"
	"drc/internal/format"
)

const (
	// FrameBytes is how much plain content a frame gathers before it is sealed.
	FrameBytes = 128 << 10
	// leastShardBytes: below this much payload for each data shard, k shrinks.
	leastShardBytes = 64 << 10
)

// encoder is shared: EncodeAll is safe for concurrent use. The checksum of
// zstd is left out because every frame is under an AEAD.
var encoder = sync.OnceValue(func() *zstd.Encoder {
	e, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderCRC(false),
		zstd.WithWindowSize(512<<10), zstd.WithLowerEncoderMem(true))
	if err != nil {
		panic("segment: zstd refuses its options: " + err.Error())
	}
	return e
})

// Compress returns the better of plain and its compressed form, and which it
// is. dst is scratch space.
func Compress(dst, plain []byte) ([]byte, format.Compression) {
	packed := encoder().EncodeAll(plain, dst[:0])
	if len(packed) >= len(plain) {
		return plain, format.CompressionNone
	}
	return packed, format.CompressionZstd
}

// Writer fills one segment. It is not safe for concurrent use.
type Writer struct {
	id      block.SegmentID
	keys    *crypt.KeySet
	seal    *crypt.Sealer
	index   format.SegmentIndex
	payload []byte
	frame   []byte // plain chunks of the open frame
	chunks  []int  // their lengths
	scratch []byte
	count   int
}

// NewWriter begins a segment under keys, which need the content key.
func NewWriter(keys *crypt.KeySet) *Writer {
	w := &Writer{frame: make([]byte, 0, FrameBytes+format.MaxChunkBytes/4)}
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
	w.payload = nil
	w.frame = w.frame[:0]
	w.chunks = nil
	w.count = 0
}

// ID is the segment's id.
func (w *Writer) ID() block.SegmentID { return w.id }

// Add appends a chunk and returns its ordinal. It does not keep chunk.
func (w *Writer) Add(chunk []byte) (ordinal int) {
	if len(w.frame) > 0 && len(w.frame)+len(chunk) > FrameBytes+FrameBytes/4 {
		w.closeFrame()
	}
	w.frame = append(w.frame, chunk...)
	w.chunks = append(w.chunks, len(chunk))
	w.count++
	if len(w.frame) >= FrameBytes {
		w.closeFrame()
	}
	return w.count - 1
}

// Bytes is how large the payload is so far, the open frame counted plain.
func (w *Writer) Bytes() int { return len(w.payload) + len(w.frame) }

// Chunks is how many chunks the segment holds so far.
func (w *Writer) Chunks() int { return w.count }

func (w *Writer) closeFrame() {
	if len(w.chunks) == 0 {
		return
	}
	packed, compression := Compress(w.scratch, w.frame)
	if compression == format.CompressionZstd {
		w.scratch = packed
	}
	before := len(w.payload)
	ordinal := uint64(len(w.index.Frames))
	w.payload = w.seal.Seal(w.payload, ordinal, packed, frameAD(w.id, ordinal))
	w.index.Frames = append(w.index.Frames, format.Frame{
		Stored: len(w.payload) - before, Compression: compression, Chunks: w.chunks,
	})
	w.chunks = nil
	w.frame = w.frame[:0]
}

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
	before := len(w.payload)
	payload := sealer.Seal(w.payload, 0, w.index.Encode(), indexAD(w.id))
	s := &Sealed{ID: w.id, Keys: w.keys, Payload: payload, IndexBytes: len(payload) - before}
	w.reset(w.keys)
	return s
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
