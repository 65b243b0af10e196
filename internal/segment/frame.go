package segment

import (
	"sync"

	"github.com/klauspost/compress/zstd"

	"drc/internal/format"
)

// FrameBytes is how much plain content a frame gathers before it is sealed.
const FrameBytes = 128 << 10

// frameLimit is what a frame of several chunks may hold.
const frameLimit = FrameBytes + FrameBytes/4

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

// Frame is some plain chunks that are compressed and sealed as one. Frames can
// be filled and compressed beside each other, so that all processors help with
// one segment; a Writer then seals them in the order of the content. The zero
// Frame is empty. A Frame is not safe for concurrent use.
type Frame struct {
	plain       []byte
	chunks      []int // their lengths
	scratch     []byte
	packed      []byte // nil before Compress
	compression format.Compression
}

// Fits reports whether a chunk of n bytes belongs into f, not the next frame.
func (f *Frame) Fits(n int) bool {
	return len(f.chunks) == 0 || len(f.plain) < FrameBytes && len(f.plain)+n <= frameLimit
}

// Add appends a chunk. It does not keep chunk.
func (f *Frame) Add(chunk []byte) {
	f.plain = append(f.plain, chunk...)
	f.chunks = append(f.chunks, len(chunk))
	f.packed = nil
}

// Full reports whether nothing more fits, whatever its size.
func (f *Frame) Full() bool { return len(f.plain) >= FrameBytes }

// Chunks is how many chunks f holds.
func (f *Frame) Chunks() int { return len(f.chunks) }

// Compress does the expensive part of sealing f.
func (f *Frame) Compress() {
	f.packed, f.compression = Compress(f.scratch, f.plain)
	if f.compression == format.CompressionZstd {
		f.scratch = f.packed
	}
}

// Reset empties f and keeps its memory.
func (f *Frame) Reset() {
	f.plain, f.chunks, f.packed = f.plain[:0], f.chunks[:0], nil
}
