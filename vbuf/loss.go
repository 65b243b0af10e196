package vbuf

import (
	"fmt"

	"drc/internal/block"
)

// Loss says that something that was durable is gone with the disks that held it.
// Options.OnLoss is told of it. What to do is the pipeline's: what a lost stretch
// of the journal or a lost batch changed is not known any more, so the volumes are
// to be compared with their history there, or in full.
type Loss struct {
	Group block.GroupID
	Range Range // the Seqs that are affected
	// Batch is the sealed batch that is lost; nil if a stretch of the journal is.
	// It stays in the Spool until it is dropped. Its record is on no disk any
	// more, or of its segments at least one has fewer shards here and on the stores than
	// its code needs.
	Batch *Batch
	// InJournal: the journal still holds all of Range, so that the batch can be
	// cut again and nothing is lost in the end.
	InJournal bool
	Cause     error
}

func (l Loss) Error() string {
	switch {
	case l.Batch == nil:
		return fmt.Sprintf("the journal of group %s has lost writes %s, which were durable: %v", l.Group, l.Range, l.Cause)
	case l.InJournal:
		return fmt.Sprintf("the sealed batch %s of group %s is lost, and can be cut again from the journal: %v", l.Range, l.Group, l.Cause)
	}
	return fmt.Sprintf("the sealed batch %s of group %s is lost: %v", l.Range, l.Group, l.Cause)
}

// report logs losses and tells the owner of the buffer; no lock is held.
func (b *Buffer) report(losses []Loss) {
	for _, l := range losses {
		b.log.Error("a part of the buffer is lost", "group", l.Group, "seqs", l.Range.String(), "batch", l.Batch != nil, "in_journal", l.InJournal, "err", l.Cause)
		if b.opt.OnLoss != nil {
			b.opt.OnLoss(l)
		}
	}
}

// holds reports whether all records of r can be read from the journal.
func (j *Journal) holds(r Range) bool {
	j.mu.Lock()
	defer j.mu.Unlock()
	if r.From <= j.released || r.To > j.durable {
		return false
	}
	for _, d := range j.damaged {
		if d.From <= r.To && r.From <= d.To {
			return false
		}
	}
	return true
}
