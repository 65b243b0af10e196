package overlay

import (
	"context"
	"crypto/rand"
	"encoding/binary"
	"slices"

	"drc/internal/format"
)

// maxUnsyncedPages bounds the pages with bits that are not durable yet: who sets
// one more syncs. It bounds memory.
const maxUnsyncedPages = 8192

// round is one sync for all who asked for it before it began.
type round struct {
	done chan struct{}
	err  error // once done is closed
}

// sync makes durable what was written before it was called. Who comes while
// another one syncs waits for the next round, which is one for all of them.
func (d *Device) sync(ctx context.Context) error {
	d.mu.Lock()
	r := d.next
	if r != nil {
		d.mu.Unlock()
		select {
		case <-r.done:
			return r.err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	r = &round{done: make(chan struct{})}
	d.next = r
	d.mu.Unlock()

	d.turn <- struct{}{}
	defer func() { <-d.turn }()
	d.mu.Lock()
	d.next = nil
	noted, touched, all := d.unsynced, d.touched, d.written == d.bits.layout.Blocks
	d.unsynced, d.touched = map[int64]*words{}, false
	d.mu.Unlock()
	r.err = d.syncNoted(noted, touched, all)
	close(r.done)
	return r.err
}

// syncNoted is a round: F2 to F6 of the package comment. noted are bits that were
// set before it began, touched says that FILE was written to, all that every
// block's bit was set.
func (d *Device) syncNoted(noted map[int64]*words, touched, all bool) (err error) {
	if f := d.failed.Load(); f != nil {
		return f
	}
	completes := all && d.phase != format.OverlayComplete
	if len(noted) > 0 || touched || completes {
		if err := d.file.Sync(); err != nil {
			return d.fail(d.name, err)
		}
	}
	if len(noted) > 0 {
		defer func() {
			if err != nil {
				d.giveBack(noted) // FILE has them for certain: the next round may try again
			}
		}()
		if err := d.list(); err != nil {
			return err
		}
		for n, w := range noted {
			if err := d.bits.promote(n, w); err != nil {
				return err
			}
		}
		if err := d.side.Sync(); err != nil {
			return d.fail(d.sideName, err)
		}
		for n := range noted {
			d.toList(n)
		}
	}
	if completes {
		return d.writeComplete()
	}
	return nil
}

// giveBack has the next round take care of noted.
func (d *Device) giveBack(noted map[int64]*words) {
	d.mu.Lock()
	defer d.mu.Unlock()
	for n, w := range noted {
		if have := d.unsynced[n]; have != nil {
			have.or(w)
		} else {
			d.unsynced[n] = w
		}
	}
}

// writeComplete says durably that all is in FILE, where it is durable.
func (d *Device) writeComplete() error {
	s := format.OverlayState{Phase: format.OverlayComplete, Activation: d.bits.activation}
	if err := d.writeState(s); err != nil {
		return err
	}
	if err := d.side.Sync(); err != nil {
		return d.fail(d.sideName, err)
	}
	d.phase = format.OverlayComplete
	d.bits.complete.Store(true)
	return nil
}

func (d *Device) writeState(s format.OverlayState) error {
	_, err := d.side.WriteAt(s.Encode(), d.bits.layout.StateOffset())
	return local("write", d.sideName, err)
}

// fail makes the device read-only, because a sync of the file name failed: the
// kernel tells of lost data once, and would say yes to the next sync.
func (d *Device) fail(name string, err error) error {
	d.failed.CompareAndSwap(nil, &SyncError{File: name, Err: err})
	// Who opens it next must not trust what is not durable. If this cannot be
	// written either, the page cache still has it in the same boot, and another
	// boot trusts nothing else anyway.
	_ = d.writeState(format.OverlayState{Phase: d.phase, Activation: newActivation()})
	return d.failed.Load()
}

func newActivation() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails, by its documentation
	return binary.LittleEndian.Uint64(b[:])
}

// toList remembers that page n is durable and that the directory must be told, if
// it does not know.
func (d *Device) toList(n int64) {
	if d.listed[n/64]&(1<<(n%64)) == 0 {
		d.listed[n/64] |= 1 << (n % 64)
		d.unlisted = append(d.unlisted, n)
	}
}

// list writes the pages of the directory that lack pages which are durable. A page
// that the directory has must be there; so it comes into it after it was synced.
func (d *Device) list() error {
	slices.Sort(d.unlisted)
	last := int64(-1)
	for _, n := range d.unlisted {
		if n/format.OverlayDirectoryPages == last {
			continue
		}
		last = n / format.OverlayDirectoryPages
		if err := d.writeDirectory(last); err != nil {
			return err
		}
	}
	d.unlisted = nil
	return nil
}

func (d *Device) writeDirectory(n int64) error {
	var p format.OverlayDirectory
	copy(p.Made[:], d.listed[n*format.OverlayDirectoryWords:])
	raw := make([]byte, format.OverlaySectorBytes)
	p.Put(raw, d.bits.overlay, uint64(n))
	_, err := d.side.WriteAt(raw, d.bits.layout.DirectoryOffset(n))
	return local("write", d.sideName, err)
}

// listAll has the directory know all that is durable, durably.
func (d *Device) listAll() error {
	d.turn <- struct{}{}
	defer func() { <-d.turn }()
	if len(d.unlisted) == 0 || d.failed.Load() != nil {
		return nil
	}
	if err := d.list(); err != nil {
		return err
	}
	if err := d.side.Sync(); err != nil {
		return d.fail(d.sideName, err)
	}
	return nil
}
