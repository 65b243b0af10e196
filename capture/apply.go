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
	return v.apply(v.group.journal.Durable(), from)
}

// apply is Step of what was captured up to upTo.
func (v *Volume) apply(upTo block.Seq, from int64) (next int64, worked bool, err error) {
	v.applying.Lock()
	defer v.applying.Unlock()
	if err := v.lostError(); err != nil {
		return 0, false, err
	}
	pieces, next := v.overlay.ready(upTo, from, applyBytes)
	if len(pieces) == 0 {
		return 0, false, nil
	}
	if err := v.look(); err != nil {
		return 0, false, err
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
			v.setFailed(err)
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

// Run keeps the backing behind the journal's durable end until ctx ends. Whatever
// goes wrong it tries again, with pauses: see Failed and Full. What the backing
// lacks meanwhile stays readable from the overlay and safe in the journal.
func (v *Volume) Run(ctx context.Context) error {
	pause, told := time.Duration(0), false
	for {
		err := v.waitForWork(ctx)
		if err == nil {
			err = v.bringUp(ctx)
		}
		v.noteChanged(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if err == nil {
			pause, told = 0, false
			continue
		}
		least, most := failedPauseMin, failedPauseMax
		if isNoSpace(err) {
			least, most = fullPauseMin, fullPauseMax
		}
		pause = min(max(2*pause, least), most)
		if v.Failed() == nil && v.Full() == nil && !told {
			v.o.Logger.Warn("bring the backing up to date; trying again", "volume", v.o.Name, "error", err)
			told = true
		}
		t := time.NewTimer(pause)
		select {
		case <-ctx.Done():
		case <-t.C:
		}
		t.Stop()
	}
}

// bringUp applies what is ready. After a failure it also syncs, to learn whether
// the backing works again.
func (v *Volume) bringUp(ctx context.Context) error {
	if v.lostError() != nil {
		return v.Settle(ctx)
	}
	var from int64
	for ctx.Err() == nil {
		next, worked, err := v.Step(from)
		if err != nil {
			return err
		}
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
	if v.Failed() != nil {
		return v.Settle(ctx)
	}
	if err := v.noteMTime(); err != nil && !isNoSpace(err) { // then it stays as far ahead as it is
		return err
	}
	return nil
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
// happened for a while it settles the backing, once, and returns how that failed.
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
			if err := v.waitIdle(ctx, seen); err != nil {
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
			if err := v.Settle(ctx); err != nil {
				return err
			}
		}
	}
}

// Settle brings the backing up to the journal's durable end, syncs it, and
// moves the record's Applied there, so that the journal before it is no longer
// needed for this volume.
//
// While writes go past the journal it syncs the backing.
func (v *Volume) Settle(ctx context.Context) error {
	for {
		marks, err := v.group.settled(ctx)
		if err != nil {
			return err
		}
		if marks != nil {
			return v.settleDirect(ctx, v.Applied())
		}
		if err := v.settle(ctx); !errors.Is(err, ErrDiverted) {
			return err
		}
	}
}

func (v *Volume) settle(ctx context.Context) error {
	if err := v.settling.take(ctx); err != nil {
		return err
	}
	defer v.settling.give()
	if err := v.recall(ctx); err != nil {
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
	// After a failure Applied stays where it is, so that the journal is replayed at
	// the next start, and it is tried again.
	err := v.sync()
	if err == nil {
		err = v.record(upTo, false)
	}
	if err != nil {
		v.mu.Lock()
		v.dirty = true
		v.mu.Unlock()
		// At once, so that readers see what the backing may have lost.
		return errors.Join(err, v.recall(ctx))
	}
	v.mu.Lock()
	v.applied = upTo
	v.mu.Unlock()
	return nil
}

// errPast ends a read of the journal behind the last wanted Seq.
var errPast = errors.New("past the wanted seq")

// keptHint says what to do when the backing cannot be written at a start.
const keptHint = "what was acknowledged is safe in the buffer: mend what is wrong and start again; if the volume is lost, restore it onto another: drc restore VOLUME TARGET --with-buffer DIR"

// Replay applies the journal's writes from the one behind applied to last to a
// backing that is ours, before any client is served, and syncs it. It returns
// the Seq that the backing has then reached.
//
// It needs no more room than the backing had when the writes were acknowledged: where
// the file system is full it makes the holes first, and leaves out what goes into one
// of them. The room of data that was zeroed later is another write's by then.
func Replay(b *Backing, index block.VolumeIndex, j Journal, applied, last block.Seq) (block.Seq, error) {
	r := replay{b: b, index: index, journal: j, last: last}
	err := r.apply(applied)
	if errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) {
		if err = r.makeHoles(applied); err == nil {
			err = r.apply(applied)
		}
	}
	if err != nil {
		return applied, fmt.Errorf("replay the journal onto %s: %w: %s", b.path, err, keptHint)
	}
	if err := b.Sync(); err != nil {
		return applied, fmt.Errorf("replay the journal: %w: %s", err, keptHint)
	}
	return max(applied, last), nil
}

// replay is the state of a Replay.
type replay struct {
	b       *Backing
	index   block.VolumeIndex
	journal Journal
	last    block.Seq
	zeroed  *block.Map[block.Seq] // if not nil: what is zeroed, and by which write for the last time
}

// apply applies the writes behind applied, in order.
func (r *replay) apply(applied block.Seq) error {
	return r.visit(applied, func(w block.Write) error {
		if w.Kind == block.KindZero {
			return r.b.Zero(w.Extent, false)
		}
		if r.zeroed == nil {
			return r.b.WriteAt(w.Data, w.Extent.Off)
		}
		return r.writeAround(w)
	})
}

// makeHoles zeroes all that the writes behind applied zero. They are applied in full
// after it, in order, so that this is not too early for any of it.
func (r *replay) makeHoles(applied block.Seq) error {
	r.zeroed = block.NewMap[block.Seq](nil)
	return r.visit(applied, func(w block.Write) error {
		if w.Kind != block.KindZero {
			return nil
		}
		r.zeroed.Set(w.Extent, w.Seq)
		return r.b.Zero(w.Extent, false)
	})
}

// writeAround writes what no later write zeroes.
func (r *replay) writeAround(w block.Write) error {
	at := w.Extent.Off
	var err error
	write := func(end int64) bool {
		if end > at {
			err = r.b.WriteAt(w.Data[at-w.Extent.Off:end-w.Extent.Off], at)
		}
		return err == nil
	}
	r.zeroed.Visit(w.Extent, func(part block.Extent, by block.Seq) bool {
		if by < w.Seq {
			return true
		}
		ok := write(part.Off)
		at = part.End()
		return ok
	})
	if err == nil {
		write(w.Extent.End())
	}
	return err
}

// visit visits the volume's writes behind applied, in order.
func (r *replay) visit(applied block.Seq, f func(block.Write) error) error {
	for next := applied + 1; next <= r.last; {
		before := next
		_, err := r.journal.Read(next, 16<<20, func(w block.Write) error {
			if w.Seq > r.last {
				return errPast
			}
			if w.Volume == r.index {
				if err := f(w); err != nil {
					return err
				}
			}
			next = w.Seq + 1
			return nil
		})
		if err == nil && next == before {
			err = fmt.Errorf("it ends before seq %s", r.last)
		}
		if next > r.last {
			break // what is wrong behind that is not asked for
		}
		if err != nil && !errors.Is(err, errPast) {
			return err
		}
	}
	return nil
}
