package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"drc/internal/block"
)

// A backing that fails, and works again.
//
// What was acknowledged is in the journal, and the journal is kept from the
// record's Applied on, which only a sync that has succeeded moves. A write that
// fails leaves its piece in the overlay: reads come from there, and it is tried
// again with pauses for as long as it takes.
//
// A sync that fails means that some of what was written since the last good one
// may be lost, and that the kernel will not say so again: it may hold pages for
// clean that the disk never got, drop them, and read old data. So the next sync
// comes only after all of that was written once more. It is read from the journal
// (recall), newest versions only, and put back into the overlay, where readers see
// it in place of what the backing may have lost; then it is applied as at first.
// Until that has succeeded nothing is applied or synced. For that long, and only
// then, an overlay holds more than overlayLimit: as much as may be written between
// two syncs of a backing, and overlayLimit once more.
//
// A crash at any step leaves Applied where it was, and the next start replays the
// journal from there. While writes go past the journal (Group.Divert) there is
// nothing to write again from: then a failed sync is the client's error, and stays.

const (
	// failedPauseMin and failedPauseMax are how long Run waits before it tries a
	// backing again that has failed.
	failedPauseMin = 250 * time.Millisecond
	failedPauseMax = 30 * time.Second
	// failedPatience is how long a writer waits for room in the overlay while the
	// backing fails: as long as kernels wait for disks. A device that loses its
	// path for a moment is nobody's error; one that is dead must not hang its
	// clients.
	failedPatience = 30 * time.Second
)

// Failed is how the backing failed when it was last tried, or nil. What it lacks is
// in the journal, and what it may have lost is read from the overlay. Run tries it
// again by itself, and Failed is nil again when all of it has been synced.
func (v *Volume) Failed() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.failed
}

// setFailed notes how the backing fails; nil: it does not any more.
func (v *Volume) setFailed(err error) {
	v.mu.Lock()
	was := v.failed
	v.failed = err
	if was == nil && err != nil {
		v.failedAt, v.taken = time.Now(), 0
	}
	v.mu.Unlock()
	if (was == nil) != (err == nil) {
		v.overlay.wake() // who waits for room looks at the clock, or goes on
	}
	switch {
	case was == nil && err != nil:
		v.o.Logger.Error("the volume's backing has failed: nothing that was acknowledged is lost, the buffer holds it, and it is tried again until it works",
			"volume", v.o.Name, "path", v.o.Backing.path, "error", err)
	case was != nil && err == nil:
		v.o.Logger.Info("the volume's backing works again, and has everything", "volume", v.o.Name)
	}
}

// whileFailing tells how long a writer may still wait for a backing that fails,
// whether it may take n bytes more into memory, and how the backing fails, nil if
// it does not. The memory is bounded apart from the overlay: what a backing takes whose syncs fail leaves the
// overlay, and comes back with the next recall.
func (v *Volume) whileFailing(n int64) (left time.Duration, room bool, failed error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.failed == nil {
		return 0, true, nil
	}
	return failedPatience - time.Since(v.failedAt), v.taken+writeCost(n) <= overlayLimit, v.failed
}

// takeWhileFailing counts what was taken.
func (v *Volume) takeWhileFailing(n int64) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.failed != nil {
		v.taken += writeCost(n)
	}
}

// journalRoom reserves room in the journal, which is not released while the
// backing fails, and waits for it no longer than for the backing.
func (v *Volume) journalRoom(ctx context.Context, n int64) error {
	left, _, failed := v.whileFailing(n)
	if failed == nil {
		return v.group.journal.Reserve(ctx, n)
	}
	wait, cancel := context.WithTimeout(ctx, left)
	defer cancel()
	err := v.group.journal.Reserve(wait, n)
	if err != nil && ctx.Err() == nil && errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the volume's backing has failed, and the buffer is full: %w", failed)
	}
	return err
}

// lostError is why the backing cannot be brought up to the journal: a sync has
// failed, and what that has lost is not in the overlay again.
func (v *Volume) lostError() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.lost
}

// sync makes durable what was written to the backing. After one that has failed
// there is none until recall.
func (v *Volume) sync() error {
	v.syncing.Lock() // of two at a time, the kernel would tell only one that something is lost
	defer v.syncing.Unlock()
	if err := v.lostError(); err != nil {
		return err
	}
	if err := v.look(); err != nil {
		return err
	}
	err := v.o.Backing.Sync()
	if err != nil {
		v.mu.Lock()
		v.lost = err
		v.mu.Unlock()
	}
	v.setFailed(err)
	return err
}

// recall puts back into the overlay what a failed sync may have lost. v.settling
// is held.
func (v *Volume) recall(ctx context.Context) error {
	lost := v.lostError()
	if lost == nil {
		return nil
	}
	if marks, switching := v.group.way(); marks != nil || switching != nil {
		return lost // what went past the journal is not in it
	}
	// All that was applied, also by a Divert that failed, was captured by now.
	if err := v.group.journal.Flush(ctx); err != nil {
		return errors.Join(lost, err)
	}
	v.applying.Lock() // nothing is applied meanwhile, so nothing leaves the overlay
	defer v.applying.Unlock()
	newest := block.NewMap(piece.advance)
	upTo := v.group.journal.Durable()
	for next := v.Applied() + 1; next <= upTo; {
		after, err := v.group.journal.Read(next, applyBytes, func(w block.Write) error {
			if w.Volume != v.o.Index {
				return nil
			}
			p := piece{seq: w.Seq}
			if w.Kind == block.KindData {
				p.data, p.whole = bytes.Clone(w.Data), int64(len(w.Data))
			}
			newest.Set(w.Extent, p)
			return nil
		})
		if err == nil && after <= next {
			err = errors.New("it ends too early")
		}
		if err != nil {
			return errors.Join(lost, fmt.Errorf("read seqs from %s on of the journal, to write them to volume %s again: %w", next, v.o.Name, err))
		}
		next = after
	}
	v.overlay.putBack(newest)
	v.mu.Lock()
	v.lost, v.dirty = nil, true
	v.mu.Unlock()
	v.o.Logger.Warn("a sync of the volume's backing has failed: what was written since the last good one is written again", "volume", v.o.Name, "from", (v.Applied() + 1).String(), "to", upTo.String())
	return nil
}

// putBack puts pieces where nothing is held: what is held is newer, or the same.
func (o *overlay) putBack(m *block.Map[piece]) {
	o.mu.Lock()
	defer o.mu.Unlock()
	m.All(func(e block.Extent, p piece) bool {
		var gaps []block.Extent
		o.m.Gaps(e, func(gap block.Extent) bool {
			gaps = append(gaps, gap)
			return true
		})
		for _, gap := range gaps {
			part := p.advance(gap.Off - e.Off)
			if part.data != nil {
				part.data = part.data[:gap.Len]
				if 2*gap.Len < part.whole {
					part.data, part.whole = bytes.Clone(part.data), gap.Len
				}
			}
			o.m.Set(gap, part)
			o.count(gap, part)
		}
		return true
	})
}
