package segmenter

import (
	"context"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/manifest"
)

// Source is the journal, as far as segmenter needs it.
type Source interface {
	// Captured is the newest write's Seq.
	Captured() block.Seq
	// CapturedBytes counts the bytes of all writes captured so far by this
	// process; it only grows.
	CapturedBytes() int64
	// WaitCaptured returns when a write behind after has been captured.
	WaitCaptured(ctx context.Context, after block.Seq) error
	// Flush makes durable all that was captured before the call.
	Flush(ctx context.Context) error
	// Durable is the end of what Read may return.
	Durable() block.Seq
	// Read calls visit for the durable writes from from to upTo, in order, until
	// about limitBytes of data were visited, and returns the Seq after the last
	// one. A Write's Data is valid only during visit.
	Read(from, upTo block.Seq, limitBytes int64, visit func(block.Write) error) (next block.Seq, err error)
}

// Sink takes finished batches, in order. It blocks while uploader and buffer
// hold as much as they may.
type Sink interface {
	Put(ctx context.Context, b *batch.Batch) error
}

// Location says where a chunk that is part of the history is.
type Location struct {
	Segment format.SegmentRow
	Chunk   int // ordinal
	Len     int // bytes
}

// Index looks chunks up by id. It knows only chunks in logged segments; an
// answer may be missing, never wrong.
type Index interface {
	Lookup(id crypt.ChunkID) (Location, bool)
}

// Baseline is the newest history of a volume, against which a resync compares.
// It may be older than what has been cut since: the writes of the journal
// cover the difference.
type Baseline interface {
	// Extents returns what the history has at e: sorted extents within e.
	// What is not covered is zeroes.
	Extents(ctx context.Context, v block.VolumeIndex, e block.Extent) ([]manifest.Extent, error)
}

// Backing is a volume as its clients see it, for the reader of a resync.
type Backing interface {
	// ReadAt reads what a client would read. Concurrent writes may be seen in
	// part.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// Allocation visits holes, which need not be read; see block.Device.
	Allocation(ctx context.Context, e block.Extent, visit func(piece block.Extent, hole bool) bool) error
}
