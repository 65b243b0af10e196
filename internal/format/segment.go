package format

import "drc/internal/block"

const (
	// MaxShards bounds k+m.
	MaxShards = 64
	// MaxSegmentBytes bounds a segment's payload.
	MaxSegmentBytes = 64 << 20
	// MaxFrameBytes bounds a frame's plain form.
	MaxFrameBytes = 4 << 20
	// MaxChunkBytes bounds a chunk.
	MaxChunkBytes = 1 << 20
	maxFrames     = 1 << 16
	maxChunks     = 1 << 20
)

// Compression is how a frame's plain form was compressed before sealing.
type Compression uint8

// The kinds of compression.
const (
	CompressionNone Compression = 0
	CompressionZstd Compression = 1
)

// Frame is one unit of reading of a segment: some chunks, compressed and
// sealed together.
type Frame struct {
	Stored      int // bytes in the segment's payload, sealed
	Compression Compression
	Chunks      []int // length of each chunk in the plain frame, bytes
}

// Plain is the length of the frame's plain form.
func (f Frame) Plain() int {
	n := 0
	for _, c := range f.Chunks {
		n += c
	}
	return n
}

// SegmentIndex says where in a segment's payload each chunk is. The frames
// stand one behind the other from the payload's start; the sealed index
// follows them. Chunk ordinals count through all frames from 0.
type SegmentIndex struct{ Frames []Frame }

// Encode returns the plain index.
func (x *SegmentIndex) Encode() []byte {
	var e Encoder
	e.U8(1)
	e.Uvarint(uint64(len(x.Frames)))
	for _, f := range x.Frames {
		e.Uvarint(uint64(f.Stored))
		e.U8(uint8(f.Compression))
		e.Uvarint(uint64(len(f.Chunks)))
		for _, c := range f.Chunks {
			e.Uvarint(uint64(c))
		}
	}
	return e.Buf
}

// DecodeSegmentIndex reads a plain index of a segment whose frames take
// framesBytes of its payload.
func DecodeSegmentIndex(name string, raw []byte, framesBytes int64) (*SegmentIndex, error) {
	d := NewDecoder(name, raw)
	if v := d.U8(); d.Err() == nil && v != 1 {
		d.Fail("version %d is unknown", v)
	}
	x := &SegmentIndex{}
	var sum int64
	chunks := 0
	for range d.Len(maxFrames, 3) {
		f := Frame{Stored: d.Len(2*MaxFrameBytes, 0), Compression: Compression(d.U8())}
		if d.Err() == nil && f.Compression > CompressionZstd {
			d.Fail("unknown compression %d", f.Compression)
		}
		n := d.Len(maxChunks, 1)
		if d.Err() == nil && n == 0 {
			d.Fail("a frame without chunks")
		}
		if chunks += n; chunks > maxChunks {
			d.Fail("more than %d chunks", maxChunks)
			break
		}
		f.Chunks = make([]int, n)
		plain := 0
		for i := range f.Chunks {
			c := d.Len(MaxChunkBytes, 0)
			if plain += c; d.Err() == nil && (c == 0 || plain > MaxFrameBytes) {
				d.Fail("frame of more than %d bytes, or an empty chunk", MaxFrameBytes)
			}
			f.Chunks[i] = c
		}
		if d.Err() != nil {
			break
		}
		sum += int64(f.Stored)
		x.Frames = append(x.Frames, f)
	}
	if d.Err() == nil && sum != framesBytes {
		d.Fail("its frames take %d bytes, not %d", sum, framesBytes)
	}
	return x, d.Done()
}

const (
	magicShard = "DRCS"
	// ShardHeaderSize is the size of a shard object's header, in bytes.
	ShardHeaderSize = 64
	// ShardSumBlock is how many bytes of a shard one keyed checksum covers.
	ShardSumBlock = 64 << 10
	// ShardSumSize is the size of one checksum.
	ShardSumSize = 16
)

// ShardHeader stands at the start of each shard object. The shard's bytes
// follow, then one keyed checksum for each ShardSumBlock of them, then one
// over header and checksums.
type ShardHeader struct {
	Segment    block.SegmentID
	KeySet     block.ID
	Profile    Profile // of this segment: k may be lower than the repository's
	Index      int     // 0..k-1 data, k..k+m-1 parity
	Payload    int64   // bytes of the segment
	ShardBytes int64   // bytes of each shard
}

// Append appends the header.
func (h *ShardHeader) Append(dst []byte) []byte {
	e := Encoder{Buf: dst}
	e.Raw([]byte(magicShard))
	e.U8(1) // version
	e.U8(1) // erasure code
	e.U8(uint8(h.Profile.Data))
	e.U8(uint8(h.Profile.Parity))
	e.U8(uint8(h.Index))
	e.Raw(make([]byte, 7))
	e.Raw(h.Segment[:])
	e.Raw(h.KeySet[:])
	e.U64(uint64(h.Payload))
	e.U64(uint64(h.ShardBytes))
	return e.Buf
}

// DecodeShardHeader reads a shard object's first ShardHeaderSize bytes.
func DecodeShardHeader(name string, raw []byte) (h ShardHeader, err error) {
	d := NewDecoder(name, raw)
	if m := d.Raw(4); d.Err() == nil && string(m) != magicShard {
		d.Fail("it begins with %q, not %q", m, magicShard)
	}
	if v := d.U8(); d.Err() == nil && v != 1 {
		d.Fail("version %d is unknown", v)
	}
	if c := d.U8(); d.Err() == nil && c != 1 {
		d.Fail("erasure code %d is unknown", c)
	}
	h.Profile = Profile{Data: int(d.U8()), Parity: int(d.U8())}
	h.Index = int(d.U8())
	for _, z := range d.Raw(7) {
		if z != 0 {
			d.Fail("reserved bytes are not zero")
		}
	}
	h.Segment = d.ID()
	h.KeySet = d.ID()
	h.Payload = d.I64()
	h.ShardBytes = d.I64()
	if d.Err() == nil && (h.Profile.Data < 1 || h.Profile.Total() > MaxShards || h.Index >= h.Profile.Total() ||
		h.Payload < 1 || h.Payload > MaxSegmentBytes || h.ShardBytes != ShardBytes(h.Payload, h.Profile.Data)) {
		d.Fail("its numbers do not fit together")
	}
	return h, d.Done()
}

// ShardBytes is the length of each shard of a payload cut into k: the payload
// divided by k, rounded up to a multiple of 64 bytes. The last data shards are
// filled up with zeroes.
func ShardBytes(payload int64, k int) int64 {
	s := (payload + int64(k) - 1) / int64(k)
	return (s + 63) / 64 * 64
}

// ShardSums is the number of checksums over a shard of n bytes.
func ShardSums(n int64) int64 { return (n + ShardSumBlock - 1) / ShardSumBlock }

// ShardObjectBytes is the length of a shard object with n bytes of shard.
func ShardObjectBytes(n int64) int64 {
	return ShardHeaderSize + n + (ShardSums(n)+1)*ShardSumSize
}
