package capture

import (
	"context"

	"drc/internal/block"
)

// Journal is the buffer's ordered durable log, as far as capture needs it.
type Journal interface {
	// Reserve waits until there is room for a write of payloadBytes. That there
	// is none is no error: writers are held back until there is.
	Reserve(ctx context.Context, payloadBytes int64) error
	// Unreserve gives back what Reserve took for a write that is not enqueued.
	Unreserve(payloadBytes int64)
	// Divert has everybody who waits for room, and who would have to from now on,
	// fail with err; nil lifts it.
	Divert(err error)
	// Enqueue takes the next write. Writes come in the order of their Seq,
	// without holes. Data must not change until the write is durable.
	Enqueue(w block.Write)
	// WaitWritten returns when the write's record is in the journal's files.
	WaitWritten(ctx context.Context, seq block.Seq) error
	// Flush makes everything durable that was enqueued before it was called.
	Flush(ctx context.Context) error
	// Durable is the Seq up to which everything survives a power cut.
	Durable() block.Seq
	// WaitDurable returns when Durable is at or behind seq. It makes nothing
	// durable by itself.
	WaitDurable(ctx context.Context, seq block.Seq) error
	// Read visits durable writes from from on, in order, until about limitBytes
	// were visited, and returns the Seq after the last.
	Read(from block.Seq, limitBytes int64, visit func(block.Write) error) (block.Seq, error)
}
