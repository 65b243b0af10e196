package crypt

import (
	"encoding/binary"

	"github.com/zeebo/blake3"
)

// ChunkID names a chunk by its content: keyed BLAKE3 cut to 128 bits, under
// the group's chunk-id key. Without that key an id tells nothing of the chunk
// and nobody can look for a chunk of known content.
type ChunkID [16]byte

// ChunkHasher computes the ids of one group's chunks. It is not safe for
// concurrent use; Clone gives each goroutine its own.
type ChunkHasher struct{ h *blake3.Hasher }

// NewChunkHasher returns a hasher under the group's chunk-id key.
func NewChunkHasher(key Key) *ChunkHasher { return &ChunkHasher{keyed(key)} }

// Clone returns an independent hasher under the same key.
func (c *ChunkHasher) Clone() *ChunkHasher {
	h := c.h.Clone()
	h.Reset()
	return &ChunkHasher{h}
}

// ID returns the id of a chunk.
func (c *ChunkHasher) ID(chunk []byte) (id ChunkID) {
	c.h.Reset()
	_, _ = c.h.Write(chunk)
	var sum [32]byte
	c.h.Sum(sum[:0])
	copy(id[:], sum[:])
	return id
}

// SumSize is the size of a keyed checksum, in bytes.
const SumSize = 16

// Summer computes the keyed checksums of one segment's shards: they tell which
// shard is damaged without any key to the content.
type Summer struct{ h *blake3.Hasher }

// NewSummer returns a Summer under a key derived with LabelShardSums.
func NewSummer(key Key) *Summer { return &Summer{keyed(key)} }

// Sum returns the checksum of part number of shard index. The last part number
// of a shard covers its header and the other sums.
func (s *Summer) Sum(shard int, part uint64, p ...[]byte) (sum [SumSize]byte) {
	var place [9]byte
	place[0] = byte(shard)
	binary.LittleEndian.PutUint64(place[1:], part)
	s.h.Reset()
	_, _ = s.h.Write(place[:])
	for _, b := range p {
		_, _ = s.h.Write(b)
	}
	var full [32]byte
	s.h.Sum(full[:0])
	copy(sum[:], full[:])
	return sum
}

func keyed(key Key) *blake3.Hasher {
	h, err := blake3.NewKeyed(key[:])
	if err != nil {
		panic("crypt: BLAKE3 refuses a 32-byte key: " + err.Error())
	}
	return h
}
