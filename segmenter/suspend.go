package segmenter

import (
	"context"
	"slices"

	"drc/internal/block"
	"drc/internal/format"
)

// Suspend has the segmenter cut nothing more until Resume: writes are about to go
// past the journal, where a region that is read would show what has no Seq. A
// batch that is being cut is finished, without what it has read of regions.
func (s *Segmenter) Suspend() {
	s.mu.Lock()
	s.suspended = true
	s.mu.Unlock()
	s.poke()
}

// Resume has it go on after Suspend.
func (s *Segmenter) Resume() {
	s.mu.Lock()
	s.suspended = false
	s.mu.Unlock()
	s.poke()
}

// IsQuiet reports whether it is suspended and no batch is being cut.
func (s *Segmenter) IsQuiet() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.suspended && !s.stepping
}

// Drop says that the writes up to upTo that are in no batch are not in the
// journal any more and never will be. The batch that covers them lacks them: the
// volumes that they were made to must be being resynced from then on. Names asked
// for up to there can never be given; they are returned. The segmenter must be
// quiet.
func (s *Segmenter) Drop(upTo block.Seq) (names []format.NamedCheckpoint) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.dropped = max(s.dropped, upTo)
	s.cutBytes = s.source.CapturedBytes()
	kept := s.names[:0:0]
	for _, n := range s.names {
		if n.Seq >= s.next && n.Seq <= upTo {
			names = append(names, n)
		} else {
			kept = append(kept, n)
		}
	}
	s.names = kept
	return names
}

// Rewind says that what was cut from next on is given up by the sink, with all that
// travelled with it: the next batch begins there again, at the latest. No resync is
// under way any more, nothing is to be announced, and names that were asked for stay.
// What the journal does not have of it, Drop must be told. The segmenter must be quiet.
func (s *Segmenter) Rewind(next block.Seq) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.next = min(s.next, next)
	s.inherited = min(s.inherited, s.next-1)
	s.resyncs, s.extra = nil, nil
}

// Regions are the regions of a volume that are still to be read.
func (s *Segmenter) Regions(v block.VolumeIndex) []block.Extent {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.resyncs {
		if r.Volume == v {
			return slices.Clone(r.Remaining)
		}
	}
	return nil
}

// ResyncAgain says that these regions of a volume must be resynced, besides those
// that are being resynced already if any are. It awaits a new baseline, which
// must hold all that was cut so far: what the last one says of the regions may
// have been overwritten since. Reason is why, for the history. The segmenter must
// be quiet.
func (s *Segmenter) ResyncAgain(v block.VolumeIndex, backing Backing, regions []block.Extent, reason format.GapReason) {
	s.mu.Lock()
	defer s.mu.Unlock()
	after := s.next - 1
	for _, r := range s.resyncs {
		if r.Volume == v {
			r.Remaining = Union(r.Remaining, regions)
			r.baseline, r.trouble = nil, nil
			if r.After > after && r.Begin != nil { // what was to be history before it was dropped
				r.After, r.Begin = after, &format.GapBegin{Volume: v, After: after, Reason: r.Begin.Reason}
			}
			return
		}
	}
	s.resyncs = append(s.resyncs, &resync{Resync: Resync{
		Volume: v, Backing: backing, Remaining: slices.Clone(regions), After: after,
		Begin: &format.GapBegin{Volume: v, After: after, Reason: reason},
	}})
}

// Union is what is in a or b, sorted and without overlaps.
func Union(a, b []block.Extent) (out []block.Extent) {
	all := append(slices.Clone(a), b...)
	slices.SortFunc(all, func(x, y block.Extent) int { return int(min(max(x.Off-y.Off, -1), 1)) })
	for _, e := range all {
		if n := len(out); n > 0 && e.Off <= out[n-1].End() {
			out[n-1].Len = max(out[n-1].End(), e.End()) - out[n-1].Off
		} else {
			out = append(out, e)
		}
	}
	return out
}

// awaitResumed waits while the segmenter is suspended.
func (s *Segmenter) awaitResumed(ctx context.Context) error {
	for {
		s.mu.Lock()
		suspended := s.suspended
		s.mu.Unlock()
		if !suspended {
			return ctx.Err()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-s.wake:
		}
	}
}

// begin notes that a batch is being cut; it returns false if none may be.
func (s *Segmenter) begin() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.suspended {
		return false
	}
	s.stepping = true
	return true
}

func (s *Segmenter) end() {
	s.mu.Lock()
	s.stepping = false
	s.mu.Unlock()
}

func (s *Segmenter) isSuspended() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.suspended
}
