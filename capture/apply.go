package capture

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"drc/internal/block"
)

// settleEvery is how long after its last write a volume that has become idle
// is settled, so that a restart finds nothing to replay.
const settleEvery = 3 * time.Second

// fullPauseMin and fullPauseMax are how long Run waits before it tries a backing
// again whose file system had no room.
const (
	fullPauseMin = 100 * time.Millisecond
	fullPauseMax = 5 * time.Second
)

func (v *Volume) poke() {
	select {
	case v.kick <- struct{}{}:
	default:
	}
}

// Step applies some pieces that are durable in the journal, from address from
// on, and returns where to go on and whether it did anything.
func (v *Volume) Step(from int64) (next int64, worked bool, err error) {
	v.applying.Lock()
	defer v.applying.Unlock()
	if err := v.lostError(); err != nil {
		return 0, false, err
	}
	pieces, next := v.overlay.ready(v.group.journal.Durable(), from, applyBytes)
	if len(pieces) == 0 {
		return 0, false, nil
	}
	v.mu.Lock()
	v.dirty = true
	v.mu.Unlock()
	for len(pieces) > 0 {
		n := 1
		if pieces[0].data == nil {
			err = v.punch(pieces[0])
		} else {
			for n < len(pieces) && n < 512 && pieces[n].data != nil && pieces[n].Off == pieces[n-1].End() {
				n++
			}
			err = v.write(pieces[:n])
		}
		if isNoSpace(err) {
			v.setFull(err)
			return 0, false, err
		}
		if err != nil {
			v.mu.Lock()
			v.failed = err
			v.mu.Unlock()
			v.overlay.wake() // who waits for room is told
			return 0, false, err
		}
		for _, p := range pieces[:n] {
			v.overlay.remove(p.Extent, p.seq)
		}
		pieces = pieces[n:]
	}
	v.setFull(nil)
	return next, true, nil
}

func isNoSpace(err error) bool {
	return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT)
}

// write puts adjacent pieces on the backing with one call.
func (v *Volume) write(run []placed) error {
	parts := make([][]byte, len(run))
	for i, p := range run {
		parts[i] = p.data[:p.Len]
	}
	return v.o.Backing.writeVec(parts, run[0].Off)
}

// punch zeroes what is still to be zeroed of a piece, a part at a time, so that
// no writer waits long for the lock: a write must not reserve space in a part
// that is being punched.
func (v *Volume) punch(p placed) error {
	for e := p.Extent; e.Len > 0; e = rest(e, sweepBytes) {
		if err := v.punchPart(p.piece, block.Extent{Off: e.Off, Len: min(e.Len, sweepBytes)}); err != nil {
			return err
		}
	}
	return nil
}

func (v *Volume) punchPart(p piece, e block.Extent) error {
	v.space.Lock()
	defer v.space.Unlock()
	var still []block.Extent
	v.overlay.mu.RLock()
	v.overlay.m.Visit(e, func(part block.Extent, now piece) bool {
		if now.seq == p.seq {
			still = append(still, part)
		}
		return true
	})
	v.overlay.mu.RUnlock()
	for _, e := range still {
		if err := v.o.Backing.Zero(e, p.noHole); err != nil {
			return err
		}
	}
	return nil
}

// Run keeps the backing behind the journal's durable end until ctx ends. An
// error means that the backing has failed; what it lacks stays readable from
// the overlay and safe in the journal. That the backing's file system is full is
// no failure: see Full.
func (v *Volume) Run(ctx context.Context) error {
	pause := fullPauseMin
	for {
		if err := v.waitForWork(ctx); err != nil {
			return nil
		}
		var from int64
		for ctx.Err() == nil {
			next, worked, err := v.Step(from)
			if isNoSpace(err) {
				t := time.NewTimer(pause)
				select {
				case <-ctx.Done():
				case <-t.C:
				}
				t.Stop()
				pause = min(2*pause, fullPauseMax)
				from = 0
				continue
			}
			if err != nil {
				return err
			}
			pause = fullPauseMin
			if !worked && from == 0 {
				break
			}
			from = next
			if _, cost := v.overlay.size(); from == 0 && cost < applyAt {
				break
			}
		}
		if ctx.Err() != nil {
			return nil
		}
		if err := v.noteMTime(); err != nil && !isNoSpace(err) { // then it stays as far ahead as it is
			return err
		}
	}
}

// noteMTime makes the sign of life exact once nothing is being applied.
func (v *Volume) noteMTime() error {
	v.applying.Lock()
	defer v.applying.Unlock()
	v.space.Lock() // nor may anybody reserve space
	defer v.space.Unlock()
	st, err := v.o.Backing.stamp()
	if err != nil {
		return err
	}
	return v.o.Backing.life.exact(st.last())
}

// waitForWork returns when pieces should be applied: soon after they have
// become durable, or at once when the overlay is filling. When nothing has
// happened for a while it settles the backing, once.
func (v *Volume) waitForWork(ctx context.Context) error {
	for {
		v.mu.Lock()
		dirty := v.dirty
		v.mu.Unlock()
		seen := v.group.Captured()
		if v.overlay.pieces() > 0 {
			t := time.NewTimer(applyPause)
			select {
			case <-ctx.Done():
			case <-v.kick:
			case <-t.C:
			}
			t.Stop()
			if ctx.Err() != nil {
				return ctx.Err()
			}
			if p, _ := v.overlay.ready(v.group.journal.Durable(), 0, 1); len(p) > 0 {
				return nil
			}
			// What is left is not durable yet: nothing to do until it is.
			wait, cancel := context.WithTimeout(ctx, settleEvery)
			_ = v.group.journal.WaitDurable(wait, v.group.journal.Durable()+1)
			cancel()
			continue
		}
		if !dirty {
			if err := v.group.WaitCaptured(ctx, seen); err != nil {
				return err
			}
			continue
		}
		quiet, cancel := context.WithTimeout(ctx, settleEvery)
		err := v.group.WaitCaptured(quiet, seen)
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil { // quiet for long enough
			if err := v.Settle(ctx); err != nil && ctx.Err() == nil {
				v.o.Logger.Warn("settle the backing", "volume", v.o.Name, "error", err)
				v.mu.Lock()
				v.dirty = false // tried again after the next write
				v.mu.Unlock()
			}
		}
	}
}

// Settle brings the backing up to the journal's durable end, syncs it, and
// moves the record's Applied there, so that the journal before it is no longer
// needed for this volume.
func (v *Volume) Settle(ctx context.Context) error {
	v.settling.Lock()
	defer v.settling.Unlock()
	if err := v.lostError(); err != nil {
		return err
	}
	if err := v.group.journal.Flush(ctx); err != nil {
		return err
	}
	upTo := v.group.journal.Durable()
	for {
		from, left := int64(0), false
		for {
			next, worked, err := v.Step(from)
			if err != nil {
				return err
			}
			if from = next; !worked || next == 0 {
				break
			}
		}
		if p, _ := v.overlay.ready(upTo, 0, 1); len(p) > 0 {
			left = true
		}
		if !left {
			break
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	// A write up to upTo that is not on the backing was overwritten by one
	// captured by now. Only when that one is durable too may the older one be
	// called applied: else a power cut would leave neither.
	superseders := v.group.Captured()
	if v.group.journal.Durable() < superseders {
		if err := v.group.journal.Flush(ctx); err != nil {
			return err
		}
	}
	v.applying.Lock() // a step that has set dirty is over before the sync
	v.mu.Lock()
	done := v.applied >= upTo && !v.dirty
	v.dirty = v.dirty && done
	v.mu.Unlock()
	v.applying.Unlock()
	if done {
		return nil
	}
	if err := v.o.Backing.Sync(); err != nil {
		// A later sync that succeeds proves nothing: Applied stays where it is, so
		// that the journal is replayed at the next start.
		v.mu.Lock()
		v.failed, v.lost = err, err
		v.mu.Unlock()
		v.overlay.wake()
		return err
	}
	if err := v.record(upTo, false); err != nil {
		return err
	}
	v.mu.Lock()
	v.applied = upTo
	v.mu.Unlock()
	return nil
}

// lostError is why the backing can no longer be brought up to the journal.
func (v *Volume) lostError() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.lost
}

// Replay applies the journal's writes from the one behind applied on to a
// backing that is ours, before any client is served, and syncs it. It returns
// the Seq that the backing has then reached.
func Replay(b *Backing, index block.VolumeIndex, j Journal, applied, last block.Seq) (block.Seq, error) {
	for next := applied + 1; next <= last; {
		var err error
		next, err = j.Read(next, 16<<20, func(w block.Write) error {
			if w.Volume != index {
				return nil
			}
			if w.Kind == block.KindZero {
				return b.Zero(w.Extent, false)
			}
			return b.WriteAt(w.Data, w.Extent.Off)
		})
		if err != nil {
			return applied, fmt.Errorf("replay the journal onto %s: %w", b.path, err)
		}
	}
	if err := b.Sync(); err != nil {
		return applied, err
	}
	return max(applied, last), nil
}
