package segment

import (
	"crypto/subtle"
	"fmt"
	"sync"

	"github.com/klauspost/compress/zstd"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
)

// decoder is shared: DecodeAll is safe for concurrent use. Its memory is
// bounded by the capacity that callers pass.
var decoder = sync.OnceValue(func() *zstd.Decoder {
	d, err := zstd.NewReader(nil, zstd.WithDecodeAllCapLimit(true), zstd.WithDecoderLowmem(true),
		zstd.WithDecoderMaxWindow(8<<20), zstd.IgnoreChecksum(true))
	if err != nil {
		panic("segment: zstd refuses its options: " + err.Error())
	}
	return d
})

// SpareBytes beyond a frame let the decoder copy whole words up to its end: without
// them it takes a path that was measured to be a fifth slower.
const SpareBytes = 16

// Decompress returns the plain form of packed, which must have exactly plain
// bytes. It allocates hardly more than that, and nothing if into, which may be
// nil, has room for it and SpareBytes.
func Decompress(into, packed []byte, c format.Compression, plain int) ([]byte, error) {
	switch c {
	case format.CompressionNone:
		if len(packed) != plain {
			return nil, fmt.Errorf("has %d bytes, not %d", len(packed), plain)
		}
		return packed, nil
	case format.CompressionZstd:
		out, err := decoder().DecodeAll(packed, room(into, plain+SpareBytes))
		if err != nil {
			return nil, fmt.Errorf("does not decompress: %w", err)
		}
		if len(out) != plain {
			return nil, fmt.Errorf("decompresses to %d bytes, not %d", len(out), plain)
		}
		return out, nil
	}
	return nil, fmt.Errorf("unknown compression %d", c)
}

// room is memory for n bytes and no more: into if that is large enough.
func room(into []byte, n int) []byte {
	if cap(into) < n {
		return make([]byte, 0, n)
	}
	return into[:0:n]
}

// OpenIndex opens a segment's sealed index: the last row.IndexBytes of its
// payload.
func OpenIndex(keys *crypt.KeySet, row format.SegmentRow, sealed []byte) (*format.SegmentIndex, error) {
	name := "index of segment " + row.ID.String()
	sealer := crypt.NewSealer(keys.Index.Derive(row.ID[:], crypt.LabelSegmentIndex))
	plain, err := sealer.Open(nil, 0, sealed, indexAD(row.ID))
	if err != nil {
		return nil, format.Corrupt(name, "%v", err)
	}
	return format.DecodeSegmentIndex(name, plain, row.Payload-int64(row.IndexBytes))
}

// packedFrames is memory for frames that are decrypted and not decompressed yet.
var packedFrames = sync.Pool{New: func() any { return new([]byte) }}

// OpenFrame opens frame ordinal of a segment from its stored bytes. What it
// returns is in into if that, which may be nil, has room for it and SpareBytes.
func OpenFrame(keys *crypt.KeySet, id block.SegmentID, ordinal int, f format.Frame, stored, into []byte) ([]byte, error) {
	name := func() string { return fmt.Sprintf("frame %d of segment %s", ordinal, id) }
	if !keys.HasContent {
		return nil, fmt.Errorf("%s: %w: reading content needs the identity", name(), crypt.ErrWrongKey)
	}
	sealer := crypt.NewSealer(keys.Content.Derive(id[:], crypt.LabelSegmentContent))
	open := func(into []byte) ([]byte, error) {
		packed, err := sealer.Open(room(into, max(0, len(stored)-crypt.Overhead)), uint64(ordinal), stored, frameAD(id, uint64(ordinal)))
		if err != nil {
			return nil, format.Corrupt(name(), "%v", err)
		}
		return packed, nil
	}
	var packed []byte
	var err error
	if f.Compression == format.CompressionNone {
		packed, err = open(into) // stays there
	} else {
		scratch := packedFrames.Get().(*[]byte)
		defer packedFrames.Put(scratch)
		if packed, err = open(*scratch); err == nil {
			*scratch = packed
		}
	}
	if err != nil {
		return nil, err
	}
	plain, err := Decompress(into, packed, f.Compression, f.Plain())
	if err != nil {
		return nil, format.Corrupt(name(), "it %v", err)
	}
	return plain, nil
}

// VerifyShard checks a whole shard object: header, every checksum, and that it
// is shard index of that segment. It returns the shard's bytes, which alias
// object.
func VerifyShard(keys *crypt.KeySet, name string, id block.SegmentID, index int, object []byte) (format.ShardHeader, []byte, error) {
	if len(object) < format.ShardHeaderSize {
		return format.ShardHeader{}, nil, format.Corrupt(name, "it has only %d bytes", len(object))
	}
	h, err := format.DecodeShardHeader(name, object[:format.ShardHeaderSize])
	if err != nil {
		return h, nil, err
	}
	if h.Segment != id || h.Index != index {
		return h, nil, format.Corrupt(name, "it is shard %d of segment %s", h.Index, h.Segment)
	}
	if int64(len(object)) != format.ShardObjectBytes(h.ShardBytes) {
		return h, nil, format.Corrupt(name, "it has %d bytes, not %d", len(object), format.ShardObjectBytes(h.ShardBytes))
	}
	body := object[format.ShardHeaderSize : format.ShardHeaderSize+h.ShardBytes]
	sums := crypt.NewSummer(keys.Index.Derive(id[:], crypt.LabelShardSums))
	want := appendSums(object[:format.ShardHeaderSize+h.ShardBytes:format.ShardHeaderSize+h.ShardBytes], sums, index)
	if subtle.ConstantTimeCompare(want[format.ShardHeaderSize+h.ShardBytes:], object[format.ShardHeaderSize+h.ShardBytes:]) != 1 {
		return h, nil, format.Corrupt(name, "a checksum is wrong")
	}
	return h, body, nil
}
