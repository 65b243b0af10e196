package segmenter

import (
	"context"
	"fmt"
	"slices"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/manifest"
)

const (
	// regionBytes is how much of a backing a resync reads at a time.
	regionBytes = 4 << 20
	// resyncBatchBytes is how many changed bytes a batch takes from a resync at most.
	resyncBatchBytes = 16 << 20
	// resyncScanBytes is how far a resync goes through regions that have not
	// changed before it logs its progress.
	resyncScanBytes = 8 << 30
)

// Resync says which regions of a volume must be read from its backing.
type Resync struct {
	Volume    block.VolumeIndex
	Backing   Backing
	Remaining []block.Extent // sorted
	// Begin is set if the log does not know of this resync yet: its first entry
	// then begins the gap.
	Begin *format.GapBegin
	// After is the last Seq of the volume's history that is known to be right:
	// entries up to there are checkpoints of it, and no later one is until the
	// resync has ended.
	After block.Seq
}

// resync is one under way.
type resync struct {
	Resync
	baseline Baseline // nil until it is at hand: nothing is read before
	trouble  error    // why its last regions could not be read
	pause    time.Duration
	retryAt  time.Time // not read before
}

// resyncProgress is what the regions of one batch do to a resync.
type resyncProgress struct {
	of   *resync
	left []block.Extent
}

// AddResync says that a volume must be resynced. From now on its entries are
// partial; reading begins when StartResync gives the baseline.
func (s *Segmenter) AddResync(r Resync) {
	s.mu.Lock()
	r.Remaining = slices.Clone(r.Remaining)
	s.resyncs = append(s.resyncs, &resync{Resync: r})
	s.mu.Unlock()
}

// StartResync begins or resumes reading a volume that AddResync named.
func (s *Segmenter) StartResync(v block.VolumeIndex, b Baseline) {
	s.mu.Lock()
	for _, r := range s.resyncs {
		if r.Volume == v {
			r.baseline = b
		}
	}
	s.mu.Unlock()
	s.poke()
}

// ResyncRemaining is how many bytes of a volume are still to be read.
func (s *Segmenter) ResyncRemaining(v block.VolumeIndex) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := int64(0)
	for _, r := range s.resyncs {
		if r.Volume == v {
			for _, e := range r.Remaining {
				n += e.Len
			}
		}
	}
	return n
}

// ResyncTrouble is why the resync of a volume gets no further at present, nil
// if it does.
func (s *Segmenter) ResyncTrouble(v block.VolumeIndex) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.resyncs {
		if r.Volume == v {
			return r.trouble
		}
	}
	return nil
}

// resyncRead takes note that regions of r were read, or failed to be: then they
// are tried again after a pause.
func (s *Segmenter) resyncRead(r *resync, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r.trouble = err
	if err == nil {
		r.pause = 0
		return
	}
	r.pause = longer(r.pause)
	r.retryAt = s.cfg.Now().Add(r.pause)
	time.AfterFunc(r.pause, s.poke)
}

// openResync is the resync to work on; s.mu is held.
func (s *Segmenter) openResync() *resync {
	for _, r := range s.resyncs {
		if r.baseline != nil && s.next > r.After && (r.trouble == nil || !s.cfg.Now().Before(r.retryAt)) {
			return r
		}
	}
	return nil
}

// boundary is the last Seq that a batch from s.next on may have: the known
// history of a volume that awaits its resync ends with an entry of its own.
// s.mu is held.
func (s *Segmenter) boundary() block.Seq {
	limit := ^block.Seq(0)
	for _, r := range s.resyncs {
		if r.After >= s.next {
			limit = min(limit, r.After)
		}
	}
	return limit
}

// readRegions reads the next regions of r into d, leaving out what equals the
// baseline.
func (s *Segmenter) readRegions(ctx context.Context, r *resync, d *draft) (*resyncProgress, error) {
	s.mu.Lock()
	baseline := r.baseline // another one may be given meanwhile, which is as good
	s.mu.Unlock()
	left := slices.Clone(r.Remaining)
	changed, scanned := int64(0), int64(0)
	started, waiting := s.cfg.Now(), s.source.Captured()
	for len(left) > 0 && changed < min(resyncBatchBytes, s.cfg.BatchBytes) && scanned < resyncScanBytes {
		if s.source.Captured() > waiting && s.cfg.Now().Sub(started) > s.cfg.RPO/2 {
			break // writes have come in and must not wait for the scan
		}
		e := left[0]
		e.Len = min(e.Len, regionBytes-e.Off%regionBytes)
		n, err := s.readRegion(ctx, r, baseline, e, d)
		if err != nil {
			return nil, err
		}
		changed += n
		scanned += e.Len
		if left[0].Len -= e.Len; left[0].Len == 0 {
			left = left[1:]
		} else {
			left[0].Off += e.Len
		}
	}
	return &resyncProgress{of: r, left: left}, nil
}

// readRegion lays what differs from the baseline in e into d and returns how
// many bytes that is.
func (s *Segmenter) readRegion(ctx context.Context, r *resync, baseline Baseline, e block.Extent, d *draft) (int64, error) {
	base, err := baseline.Extents(ctx, r.Volume, e)
	if err != nil {
		return 0, fmt.Errorf("look up the history of volume %d at %s: %w", r.Volume, e, err)
	}
	m := d.volume(r.Volume)
	memory := blocks.Get().(*[blockBytes]byte)
	data, err := readAllocated(ctx, r.Backing, e, memory[:e.Len])
	if err != nil {
		blocks.Put(memory)
		return 0, fmt.Errorf("read volume %d at %s for its resync: %w", r.Volume, e, err)
	}
	var parts []block.Extent
	changed := int64(0)
	put := func(part block.Extent) {
		parts = append(parts, part)
		changed += part.Len
	}
	at := e.Off
	gap := func(end int64) { // where the history has zeroes
		if end > at && data != nil {
			splitZeroes(block.Extent{Off: at, Len: end - at}, data[at-e.Off:end-e.Off],
				func(part block.Extent, _ []byte) { put(part) }, func(block.Extent) {})
		}
	}
	for _, x := range base {
		gap(x.Off)
		at = x.End()
		if !s.unchanged(x, e, data) {
			put(x.Extent)
		}
	}
	gap(e.End())
	// Where little has changed only that is kept: there may be thousands of
	// such regions in a batch.
	whole := data != nil && changed >= blockBytes/2
	for _, part := range parts {
		switch {
		case data == nil:
			m.Set(part, nil)
		case whole:
			m.Set(part, content(data[part.Off-e.Off:part.End()-e.Off]))
		default:
			m.Set(part, d.memory.keep(data[part.Off-e.Off:part.End()-e.Off]))
		}
	}
	if whole {
		d.memory.keepBlock(memory)
	} else {
		blocks.Put(memory)
	}
	return changed, nil
}

// readAllocated reads e into p, or returns nil if all of e is a hole.
func readAllocated(ctx context.Context, from Backing, e block.Extent, p []byte) ([]byte, error) {
	var rerr error
	at, any := e.Off, false
	err := from.Allocation(ctx, e, func(piece block.Extent, hole bool) bool {
		if hole {
			return true
		}
		clear(p[at-e.Off : piece.Off-e.Off])
		at, any = piece.End(), true
		rerr = from.ReadAt(ctx, p[piece.Off-e.Off:piece.End()-e.Off], piece.Off)
		return rerr == nil
	})
	if err == nil {
		err = rerr
	}
	if err != nil || !any {
		return nil, err
	}
	clear(p[at-e.Off:])
	return p, nil
}

// unchanged reports whether region e, with the bytes data (nil: zeroes), holds
// at x what the history has there. A chunk that is only partly visible counts
// as different, because its id says nothing of its parts.
func (s *Segmenter) unchanged(x manifest.Extent, e block.Extent, data []byte) bool {
	if x.Zero {
		return data == nil || isZero(data[x.Off-e.Off:x.End()-e.Off])
	}
	if x.Offset != 0 || x.Len != int64(x.ChunkLen) {
		return false
	}
	if data == nil {
		return s.hasher.ID(make([]byte, x.Len)) == x.ChunkID
	}
	return s.hasher.ID(data[x.Off-e.Off:x.End()-e.Off]) == crypt.ChunkID(x.ChunkID)
}

// resyncItems says in it what is partial after the batch; s.mu is held.
func (s *Segmenter) resyncItems(it *format.Items, progress *resyncProgress) {
	for _, r := range s.resyncs {
		if s.next <= r.After {
			continue // still history from before the resync
		}
		if r.Begin != nil {
			it.GapBegins = append(it.GapBegins, *r.Begin)
		}
		left := r.Remaining
		if progress != nil && progress.of == r {
			left = progress.left
			if len(left) == 0 {
				it.GapEnds = append(it.GapEnds, r.Volume)
				continue
			}
		}
		it.Partials = append(it.Partials, format.Partial{Volume: r.Volume, Remaining: slices.Clone(left)})
	}
}

// resyncDone takes note that a batch from first on with progress is out; s.mu
// is held.
func (s *Segmenter) resyncDone(first block.Seq, progress *resyncProgress) {
	for _, r := range s.resyncs {
		if first > r.After {
			r.Begin = nil
		}
	}
	if progress == nil {
		return
	}
	progress.of.Remaining = progress.left
	if len(progress.left) == 0 {
		s.resyncs = slices.DeleteFunc(s.resyncs, func(r *resync) bool { return r == progress.of })
	}
}
