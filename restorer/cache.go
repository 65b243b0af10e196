package restorer

import (
	"crypto/sha256"
	"encoding/binary"
	"slices"

	"drc/internal/format"
)

// Cache keeps sealed bytes on the local disk: frames, segment indexes, pages and
// directories of manifests, pages of digests, as they are in the stores. It may forget anything at any time, and
// return anything: what it returns is verified like what a store returns, and asked of
// the stores if it is no good. It never sees anything that was not verified, and
// nothing in the clear. It is safe for concurrent use, by histories of any repositories.
type Cache interface {
	// Get returns what was put under a kind and a name. It is not to be changed.
	Get(kind uint8, name [32]byte) ([]byte, bool)
	// Put keeps sealed, which it copies, and may leave that be. It does not wait for
	// the disk.
	Put(kind uint8, name [32]byte, sealed []byte)
	// Drop forgets what Get has returned and was no good.
	Drop(kind uint8, name [32]byte)
}

// Kinds of what is in a Cache.
const (
	keptFrame    = 1
	keptIndex    = 2
	keptPage     = 3
	keptManifest = 4
	keptDigest   = 5
)

// kept is the place of one thing in the cache. Without a cache it is always empty.
type kept struct {
	cache Cache
	kind  uint8
	name  [32]byte
}

func (k kept) get() ([]byte, bool) {
	if k.cache == nil {
		return nil, false
	}
	return k.cache.Get(k.kind, k.name)
}

func (k kept) put(sealed []byte) {
	if k.cache != nil && len(sealed) > 0 {
		k.cache.Put(k.kind, k.name, sealed)
	}
}

func (k kept) drop() {
	if k.cache != nil {
		k.cache.Drop(k.kind, k.name)
	}
}

// kept returns the place of what is named by an object's name, or other bytes that
// stand for it, and by numbers.
func (c *Config) kept(kind uint8, object []byte, numbers ...uint64) kept {
	if c.Cache == nil {
		return kept{}
	}
	raw := append(make([]byte, 0, 256), "drc sealed cache v1\x00"...)
	raw = append(raw, c.Repo.ID[:]...)
	raw = append(raw, kind)
	raw = binary.LittleEndian.AppendUint64(raw, uint64(len(object)))
	raw = append(raw, object...)
	for _, n := range numbers {
		raw = binary.LittleEndian.AppendUint64(raw, n)
	}
	return kept{c.Cache, kind, sha256.Sum256(raw)}
}

// keptFrame is the place of a segment's frame. Segments that travel in the log have
// none: log values have a cache of their own.
func (c *Config) keptFrame(row format.SegmentRow, ordinal int) kept {
	if row.Inline != 0 {
		return kept{}
	}
	return c.kept(keptFrame, segmentName(row), uint64(ordinal))
}

// keptIndex is the place of a segment's index.
func (c *Config) keptIndex(row format.SegmentRow) kept {
	if row.Inline != 0 {
		return kept{}
	}
	return c.kept(keptIndex, segmentName(row), uint64(row.Payload), uint64(row.IndexBytes))
}

// segmentName stands for a segment and the keys that it is opened with.
func segmentName(row format.SegmentRow) []byte { return slices.Concat(row.ID[:], row.KeySet[:]) }

// keptPage is the place of a page in a manifest object.
func (c *Config) keptPage(object string, row format.PageRow) kept {
	return c.kept(keptPage, []byte(object), uint64(row.Offset), uint64(row.StoredBytes))
}

// keptManifest is the place of a manifest's skeleton.
func (c *Config) keptManifest(object string) kept { return c.kept(keptManifest, []byte(object)) }

// keptDigest is the place of n bytes from off of a digest.
func (c *Config) keptDigest(object string, off, n int64) kept {
	return c.kept(keptDigest, []byte(object), uint64(off), uint64(n))
}
