package vbuf

import (
	"errors"
	"fmt"

	"drc/internal/block"
)

var (
	// ErrClosed means: the buffer was closed.
	ErrClosed = errors.New("the buffer is closed")
	// ErrFull means: there is no room for a batch now. Try again after Release, Drop
	// or Placed.
	ErrFull = errors.New("the buffer has no room for this batch")
	// ErrTooLarge means: the write can never fit into this buffer.
	ErrTooLarge = errors.New("the write is larger than the journal can ever hold")
	// ErrLost means: no disk of the buffer takes anything any more. What was not
	// durable is still in memory (Journal.Unsynced); what is durable can perhaps be
	// read. Journal.Err wraps it from then on. Buffer.Renew begins on empty disks.
	ErrLost = errors.New("the buffer is lost")
	// ErrShardLost means: no good copy of the shard is in the buffer. Its segment's
	// other shards can rebuild it, as many as its parity says.
	ErrShardLost = errors.New("the shard is not in the buffer")

	// ErrRecordLost means: no good copy of a batch's record is in the buffer. What
	// its shards belong to cannot be told.
	ErrRecordLost = errors.New("the record of a batch is not in the buffer")

	// errHold: the file system below has no space although the quota has. The
	// caller waits and tries again; nothing is lost.
	errHold = errors.New("the file system of the buffer is full")
)

// Range is a stretch of a journal, both ends included.
type Range struct{ From, To block.Seq }

func (r Range) String() string { return fmt.Sprintf("%d-%d", r.From, r.To) }

// DamageError says that records are gone which were durable once, and that no
// mirror has them. Journal returns it at recovery: JournalDamaged opens what is
// left, ResetJournal begins a new one. Read returns it when it comes to them.
type DamageError struct {
	Group  block.GroupID
	Ranges []Range // in order
}

func (e *DamageError) Error() string {
	return fmt.Sprintf("the journal of group %s has lost writes that were durable: %v", e.Group, e.Ranges)
}

// SetupError says that the directories given are not the buffer they should be.
// It needs a decision by a human, and says which.
type SetupError struct {
	Path   string
	Reason string
	Hint   string // what to do
}

func (e *SetupError) Error() string {
	return fmt.Sprintf("buffer directory %s: %s; %s", e.Path, e.Reason, e.Hint)
}
