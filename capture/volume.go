package capture

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"drc/internal/block"
)

const (
	// overlayLimit is how much memory one volume's overlay may take up, zeroes
	// and what is kept by remnants of larger writes included; writers wait while
	// it is full. While remnants are copied it may be half as much again.
	overlayLimit = 48 << 20
	// applyAt is how many bytes the overlay gathers before it is worth applying
	// without waiting for more to be overwritten.
	applyAt = 8 << 20
	// applyBytes is how much one step applies.
	applyBytes = 4 << 20
	// applyPause is how long a piece may wait for being overwritten.
	applyPause = 250 * time.Millisecond
)

// Ack says when a write is acknowledged.
type Ack int

const (
	// AckJournal means: when it is in the journal's files.
	AckJournal Ack = iota
	// AckDurable means: when it survives a power cut of this host.
	AckDurable
)

// Options describe one volume of a group.
type Options struct {
	Name       string
	Index      block.VolumeIndex
	Backing    *Backing
	SectorSize int
	Ack        Ack
	RecordDir  string
	Record     Record // what the identity record says besides Applied, Clean and Stamp
	Logger     *slog.Logger
}

// Volume is a protected volume: the Device that clients use. It is safe for
// concurrent use.
type Volume struct {
	o       Options
	group   *Group
	overlay *overlay

	applying sync.Mutex   // one at a time applies: an older version must never follow a newer one
	syncing  sync.Mutex   // one at a time syncs the backing
	settling turn         // one at a time settles: Applied must never go back
	space    sync.RWMutex // held shared from reserving space to the overlay, exclusively while holes are punched

	mu       sync.Mutex
	applied  block.Seq // as the record says
	dirty    bool      // something was applied since the record was written
	kick     chan struct{}
	failed   error         // the backing failed when it was last tried
	failedAt time.Time     // when failed was set after it had worked
	taken    int64         // bytes and pieces admitted since then
	changed  *ChangedError // what somebody else has done to the backing
	noted    bool          // the record says so
	full     error         // the backing's file system had no room when last tried
	lost     error         // a sync of the backing failed: nothing is applied or synced until recall

	unsynced atomic.Bool // something was written past the journal since the last sync
}

// New makes a volume of a group. From now on its record says that it is not
// clean: applied is durable, and the journal holds what follows. What others
// wrote to the backing before is synced: history may be about to be made of it.
func New(g *Group, o Options, applied block.Seq) (*Volume, error) {
	if o.Logger == nil {
		o.Logger = slog.New(slog.DiscardHandler)
	}
	v := &Volume{o: o, group: g, overlay: newOverlay(), applied: applied, settling: newTurn(), kick: make(chan struct{}, 1)}
	if err := o.Backing.SignLife(o.RecordDir); err != nil {
		return nil, err
	}
	if err := o.Backing.Sync(); err != nil {
		return nil, err
	}
	if err := v.record(applied, false); err != nil {
		return nil, err
	}
	o.Backing.rest()
	g.mu.Lock()
	g.volumes = append(slices.Clone(g.volumes), v)
	g.mu.Unlock()
	return v, nil
}

// record writes the identity record.
func (v *Volume) record(applied block.Seq, clean bool) error {
	r := v.o.Record
	var err error
	if r.Stamp, err = v.o.Backing.stamp(); err != nil {
		return err
	}
	changed := v.Changed()
	r.Foreign = changed != nil && changed.lasts
	r.Path, r.Applied, r.Clean, r.SectorSz = v.o.Backing.path, applied, clean, v.o.SectorSize
	return r.write(v.o.Backing.machine, v.o.RecordDir)
}

// Name is the volume's name.
func (v *Volume) Name() string { return v.o.Name }

// Index is its number in its group.
func (v *Volume) Index() block.VolumeIndex { return v.o.Index }

// Geometry implements block.Device.
func (v *Volume) Geometry() block.Geometry {
	return block.Geometry{SizeBytes: v.o.Backing.size, SectorSize: v.o.SectorSize}
}

// ReadAt implements block.Device.
func (v *Volume) ReadAt(_ context.Context, p []byte, off int64) error {
	e := block.Extent{Off: off, Len: int64(len(p))}
	if err := v.Geometry().CheckRange(e); err != nil {
		return err
	}
	// The overlay first: what it does not hold now is on the backing already.
	for _, gap := range v.overlay.read(e, p) {
		if err := v.o.Backing.ReadAt(p[gap.Off-off:gap.End()-off], gap.Off); err != nil {
			if errors.Is(err, io.EOF) {
				_ = v.look() // it says more than that the file has ended
			}
			return err
		}
	}
	return nil
}

// WriteAt implements block.Device.
func (v *Volume) WriteAt(ctx context.Context, p []byte, off int64, o block.WriteOptions) error {
	e := block.Extent{Off: off, Len: int64(len(p))}
	if err := v.Geometry().CheckRange(e); err != nil || e.Empty() {
		return err
	}
	w := block.Write{Volume: v.o.Index, Kind: block.KindData, Extent: e, Data: append([]byte(nil), p...)}
	return v.take(ctx, w, e.Len, piece{data: w.Data}, o.FUA)
}

// Zero implements block.Device.
func (v *Volume) Zero(ctx context.Context, e block.Extent, o block.ZeroOptions) error {
	if err := v.Geometry().CheckRange(e); err != nil || e.Empty() {
		return err
	}
	w := block.Write{Volume: v.o.Index, Kind: block.KindZero, Extent: e}
	return v.take(ctx, w, 0, piece{noHole: o.NoHole}, o.FUA)
}

// take captures one write and waits as long as its acknowledgement demands.
func (v *Volume) take(ctx context.Context, w block.Write, payload int64, p piece, fua bool) error {
	for {
		marks, err := v.group.settled(ctx)
		if err != nil {
			return err
		}
		if marks != nil {
			err = v.direct(ctx, marks, w, p, fua)
		} else {
			err = v.journaled(ctx, w, payload, p, fua)
		}
		if !errors.Is(err, ErrDiverted) {
			return err
		}
	}
}

// journaled takes a write the usual way. It fails with ErrDiverted, and does
// nothing, if writes go another way.
func (v *Volume) journaled(ctx context.Context, w block.Write, payload int64, p piece, fua bool) error {
	if err := v.group.Refusal(); err != nil {
		return err
	}
	if err := v.overlayRoom(ctx, payload); err != nil {
		return err
	}
	if err := v.journalRoom(ctx, payload); err != nil {
		v.overlay.giveBack(payload)
		return err
	}
	seq, err := v.number(w, p)
	if err != nil {
		v.overlay.giveBack(payload)
		v.group.journal.Unreserve(payload)
		return err
	}
	// From here on the write is part of the order and will be carried out,
	// whatever becomes of the one who asked.
	return v.group.await(ctx, func() error {
		if err := v.group.journal.WaitWritten(ctx, seq); err != nil {
			return err
		}
		if fua || v.o.Ack == AckDurable {
			return v.group.journal.Flush(ctx)
		}
		return nil
	})
}

// await waits by do for what was captured. Should the group's writes be taken
// past the journal meanwhile, all of it is on the backings, durably, in the end.
func (g *Group) await(ctx context.Context, do func() error) error {
	for {
		err := do()
		if !errors.Is(err, ErrDiverted) {
			return err
		}
		marks, err := g.settled(ctx)
		if marks != nil || err != nil {
			return err
		}
	}
}

// number reserves space on the backing and puts the write in its place in the
// order.
func (v *Volume) number(w block.Write, p piece) (block.Seq, error) {
	if w.Kind == block.KindData || p.noHole {
		// Piece by piece, so that nobody waits long for the lock.
		for e := w.Extent; e.Len > sweepBytes; e = rest(e, sweepBytes) {
			if err := v.reserve(block.Extent{Off: e.Off, Len: sweepBytes}); err != nil {
				return 0, err
			}
		}
	}
	v.space.RLock()
	defer v.space.RUnlock()
	if w.Kind == block.KindData || p.noHole {
		// What is left, and what was punched meanwhile.
		if err := v.o.Backing.Reserve(w.Extent); err != nil {
			return 0, err
		}
	}
	return v.group.number(w, func(w block.Write) {
		p.seq = w.Seq
		v.overlay.set(w.Extent, p)
	})
}

func (v *Volume) reserve(e block.Extent) error {
	v.space.RLock()
	defer v.space.RUnlock()
	return v.o.Backing.Reserve(e)
}

// overlayRoom waits until the overlay has room for a write of n bytes of data,
// and has it admitted. What is in it can be applied only once it is durable, so it
// sees to that.
func (v *Volume) overlayRoom(ctx context.Context, n int64) error {
	for {
		freed := v.overlay.woken()
		left, room, failed := v.whileFailing(n)
		if room {
			ok, held, woken := v.overlay.admit(n, overlayLimit)
			if held >= applyAt {
				v.poke()
			}
			if ok {
				v.takeWhileFailing(n)
				return nil
			}
			freed = woken
		}
		if err := v.group.Refusal(); err != nil {
			return err
		}
		if failed != nil && left <= 0 {
			return fmt.Errorf("the volume's backing has failed, and no more fits into memory: %w", failed)
		}
		if err := v.group.journal.Flush(ctx); err != nil {
			return err
		}
		v.poke()
		var late <-chan time.Time
		if failed != nil {
			late = time.After(left)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-freed:
		case <-late:
		}
	}
}

// Flush implements block.Device: it covers all volumes of the group.
func (v *Volume) Flush(ctx context.Context) error {
	for {
		marks, err := v.group.settled(ctx)
		switch {
		case err != nil:
			return err
		case marks != nil:
			return v.group.flushDirect()
		}
		if err := v.group.journal.Flush(ctx); !errors.Is(err, ErrDiverted) {
			return err
		}
	}
}

// Allocation implements block.Device.
func (v *Volume) Allocation(_ context.Context, e block.Extent, visit func(piece block.Extent, hole bool) bool) error {
	if err := v.Geometry().CheckRange(e); err != nil {
		return err
	}
	// Collected first: visit must not run under the overlay's lock.
	type part struct {
		block.Extent
		covered, hole bool
	}
	var parts []part
	at := e.Off
	v.overlay.mu.RLock()
	v.overlay.m.Visit(e, func(x block.Extent, p piece) bool {
		if x.Off > at {
			parts = append(parts, part{Extent: block.Extent{Off: at, Len: x.Off - at}})
		}
		parts = append(parts, part{x, true, p.data == nil && !p.noHole})
		at = x.End()
		return true
	})
	v.overlay.mu.RUnlock()
	if at < e.End() {
		parts = append(parts, part{Extent: block.Extent{Off: at, Len: e.End() - at}})
	}
	for _, p := range parts {
		more := true
		if p.covered {
			more = visit(p.Extent, p.hole)
		} else if err := v.o.Backing.Allocation(p.Extent, func(x block.Extent, hole bool) bool {
			more = visit(x, hole)
			return more
		}); err != nil {
			return err
		}
		if !more {
			return nil
		}
	}
	return nil
}

// Applied is the Seq up to which everything is durably on the backing.
func (v *Volume) Applied() block.Seq {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.applied
}

// Full is how the backing's file system refused room for what was acknowledged,
// as one that copies on write may although the space was reserved; nil if it did
// not, or has room again. Nothing is lost: it is tried again for ever, and the
// journal holds what the backing lacks. Writers wait once the overlay is full.
func (v *Volume) Full() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.full
}

// setFull notes whether there is room for what is applied.
func (v *Volume) setFull(err error) {
	v.mu.Lock()
	was := v.full
	v.full = err
	v.mu.Unlock()
	switch {
	case was == nil && err != nil:
		v.o.Logger.Warn("there is no room for what must be written to the volume's backing: nothing is lost, the buffer holds it, and it goes on by itself when there is room",
			"volume", v.o.Name, "path", v.o.Backing.path, "error", err)
	case was != nil && err == nil:
		v.o.Logger.Info("there is room for the volume's backing again", "volume", v.o.Name)
	}
}

// OverlayBytes is how much data waits for the backing.
func (v *Volume) OverlayBytes() int64 {
	n, _ := v.overlay.size()
	return n
}

// Close settles the backing, marks it clean, and releases it. The group's
// writers must have stopped. After an error the record says "not clean", and
// the journal still holds what the backing lacks.
func (v *Volume) Close(ctx context.Context) error {
	err := v.Settle(ctx)
	if err == nil {
		// Settle may have found nothing to sync, but the time of a change that the
		// record will name must be durable before it.
		err = v.o.Backing.Sync()
	}
	if err == nil {
		err = v.record(v.Applied(), true)
	}
	return errors.Join(err, v.o.Backing.Close())
}

// Abandon releases the backing as it is; the journal holds what it lacks.
func (v *Volume) Abandon() error { return v.o.Backing.Close() }

// Discard is Abandon of a volume that is not to be, see Backing.Discard.
func (v *Volume) Discard() error { return v.o.Backing.Discard() }

// Touch writes the volume's last sector as it is: a write that changes nothing
// and takes a Seq. A state that did not come about by writes, such as a backing
// that was changed without DRC, gets a Seq of its own by it. No client may be
// writing yet.
func (v *Volume) Touch(ctx context.Context) error {
	p := make([]byte, v.o.SectorSize)
	off := v.o.Backing.size - int64(len(p))
	if err := v.ReadAt(ctx, p, off); err != nil {
		return err
	}
	if bytes.Equal(p, make([]byte, len(p))) { // it may be a hole
		return v.Zero(ctx, block.Extent{Off: off, Len: int64(len(p))}, block.ZeroOptions{})
	}
	return v.WriteAt(ctx, p, off, block.WriteOptions{})
}
