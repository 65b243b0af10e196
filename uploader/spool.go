package uploader

import (
	"context"

	"drc/internal/batch"
	"drc/internal/block"
)

// Spool keeps batches in the buffer, durably, when the stores cannot take
// them. Its methods name batches by their To and shards by segment and index.
type Spool interface {
	// Persist makes the record and shards of whole durable: any one disk can be
	// lost. It waits for room if need be. Batches are persisted in order; b is
	// what Load and Logged will be given for it. After an error it is called
	// again for the same batch, unless that is logged without.
	Persist(ctx context.Context, b, whole *batch.Batch) error
	// Load returns the record of a batch that was persisted.
	Load(b *batch.Batch) (*batch.Batch, error)
	// ReadShard returns a shard of a batch that was persisted.
	ReadShard(seg block.SegmentID, index int) ([]byte, error)
	// Placed says that a shard is on its store: its local copy can go.
	Placed(seg block.SegmentID, index int)
	// Logged says that the batch is in a decided entry: its record can go, and
	// its shards that are not placed stay. Persist was called for it, and may
	// have failed.
	Logged(b *batch.Batch)
}
