package overlay

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/jitter"
)

const (
	// pieceBytes is what a worker of Hydrate fetches at once.
	pieceBytes = 1 << 20
	// defaultWorkers is how many pieces are fetched side by side.
	defaultWorkers = 4
	// flushEveryBytes is how much is brought before it is made durable: what a power
	// cut takes back is fetched again.
	flushEveryBytes = 256 << 20

	firstPause   = time.Second
	longestPause = time.Minute
)

// HydrateOptions say how Hydrate goes about it. The zero value is fine.
type HydrateOptions struct {
	// Workers is how many pieces of 1 MiB are fetched side by side; 0 means 4.
	Workers int
	// Base, if not nil, is what is fetched from. Its content is that of Config.Base,
	// which is read by clients too.
	Base block.Device
	// Progress, if not nil, is called after each piece. Calls of it and of Trouble
	// come one after the other, and hold up a worker.
	Progress func(Progress)
	// Trouble, if not nil, is called when something failed that is tried again after
	// the pause: the base cannot be read, or the disk is full.
	Trouble func(err error, pause time.Duration)
}

// Hydrate brings into FILE what the base has and nobody has written yet, while
// others read and write, and returns nil when all is there, durably: Complete. It
// goes on where an earlier one has stopped. A base that fails does not end it, nor
// does a full disk: it tries again until ctx ends. Other errors end it: ctx's, a
// *SyncError, a damaged sidecar, block.ErrStopping after Close.
func (d *Device) Hydrate(ctx context.Context, o HydrateOptions) error {
	if o.Workers <= 0 {
		o.Workers = defaultWorkers
	}
	if o.Base == nil {
		o.Base = d.base
	}
	h := &hydration{d: d, o: o}
	if err := h.all(ctx); err != nil {
		return err
	}
	if err := h.again(ctx, func() error { return d.Flush(ctx) }); err != nil {
		return err
	}
	if !d.Complete() {
		panic(fmt.Sprintf("overlay: %s has every block and is not complete", d.name))
	}
	h.tell()
	return nil
}

// hydration is a run of Hydrate.
type hydration struct {
	d *Device
	o HydrateOptions

	mu       sync.Mutex // held while a callback is called; guards what follows
	unsynced int64      // bytes that were brought since the last flush began
}

// all brings all blocks. One page's blocks after the other are looked at; the
// workers fetch what is data in the base.
func (h *hydration) all(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(h.o.Workers + 1) // and the one that follows
	g.Go(func() error {
		for n := range h.d.bits.layout.Pages {
			if err := ctx.Err(); err != nil {
				return err
			}
			if err := h.page(ctx, n, g); err != nil {
				return err
			}
		}
		return nil
	})
	return g.Wait()
}

// page brings the blocks of page n: stretches that are holes at once, each piece
// with data in it by a worker.
func (h *hydration) page(ctx context.Context, n int64, g *errgroup.Group) error {
	r := blocks{n * pageBlocks, n*pageBlocks + int64(h.d.bits.layout.PageBlocks(n))}
	missing, err := h.missing(r)
	if err != nil || len(missing) == 0 {
		return err
	}
	span := block.Extent{Off: missing[0].Off, Len: missing[len(missing)-1].End() - missing[0].Off}
	var datas []block.Extent
	err = h.again(ctx, func() (err error) {
		datas, err = h.datas(ctx, span)
		return err
	})
	if err != nil {
		return err
	}
	empty := block.Extent{Off: span.Off} // the stretch without data before at
	for at := span.Off; at < span.End(); {
		piece := block.Extent{Off: at, Len: min(span.End(), (at/pieceBytes+1)*pieceBytes) - at}
		at = piece.End()
		var parts []block.Extent
		for _, e := range datas {
			if x := e.Intersect(piece); !x.Empty() {
				parts = append(parts, x)
			}
		}
		if len(parts) == 0 {
			empty.Len = at - empty.Off
			continue
		}
		if err := h.empty(ctx, empty); err != nil {
			return err
		}
		empty = block.Extent{Off: at}
		g.Go(func() error { return h.piece(ctx, piece, parts) })
	}
	return h.empty(ctx, empty)
}

// datas returns what of e is data in the base, rounded to whole blocks: in order,
// and not overlapping.
func (h *hydration) datas(ctx context.Context, e block.Extent) (out []block.Extent, err error) {
	err = h.o.Base.Allocation(ctx, e, func(piece block.Extent, hole bool) bool {
		if hole || piece.Empty() {
			return true
		}
		x := h.d.extent(blocksOf(piece))
		if n := len(out); n > 0 && out[n-1].End() >= x.Off {
			out[n-1].Len = x.End() - out[n-1].Off
		} else {
			out = append(out, x)
		}
		return true
	})
	if err != nil {
		return nil, &baseError{fmt.Errorf("find out what is at %s: %w", e, err)}
	}
	return out, nil
}

// empty brings e, which is a hole in the base.
func (h *hydration) empty(ctx context.Context, e block.Extent) error {
	if e.Empty() {
		return nil
	}
	if err := h.again(ctx, func() error { return h.bring(ctx, e, nil, nil) }); err != nil {
		return err
	}
	h.tell()
	return nil
}

// missing returns what of r is not written.
func (h *hydration) missing(r blocks) (out []block.Extent, err error) {
	if err := h.d.enter(); err != nil {
		return nil, err
	}
	defer h.d.leave()
	err = h.d.bits.runs(r, func(run blocks, written bool) error {
		if !written {
			out = append(out, h.d.extent(run))
		}
		return nil
	})
	return out, err
}

// piece fetches what is not written of e, which begins and ends with blocks, and
// brings it. datas is what of e is data in the base.
func (h *hydration) piece(ctx context.Context, e block.Extent, datas []block.Extent) error {
	var p []byte
	err := h.again(ctx, func() error {
		missing, err := h.missing(blocksOf(e))
		if err != nil || len(missing) == 0 {
			return err
		}
		if p == nil {
			p = make([]byte, e.Len)
		}
		var parts []part
		for _, m := range missing {
			// From the first data to the last: holes between cost no more than another
			// request would.
			var x block.Extent
			for _, data := range datas {
				if y := data.Intersect(m); x.Empty() {
					x = y
				} else if !y.Empty() {
					x.Len = y.End() - x.Off
				}
			}
			if !x.Empty() {
				parts = append(parts, part{x, p[x.Off-e.Off : x.End()-e.Off]})
			}
		}
		if len(parts) > 0 {
			// No lock is held: a base that hangs holds up nobody.
			if err := fetch(ctx, h.o.Base, parts); err != nil {
				return err
			}
		}
		return h.bring(ctx, e, p, datas)
	})
	if err != nil {
		return err
	}
	h.tell()
	return h.flushNowAndThen(ctx, e.Len)
}

// bring puts into FILE what of e is still not written: where datas are what p, the
// base's content at e, has there, and holes elsewhere.
func (h *hydration) bring(ctx context.Context, e block.Extent, p []byte, datas []block.Extent) error {
	d := h.d
	put := func(x block.Extent, c content) error {
		if x.Empty() {
			return nil
		}
		var err error
		if c == hole {
			err = d.zeroFile(x, block.ZeroOptions{})
		} else {
			_, err = d.file.WriteAt(p[x.Off-e.Off:x.End()-e.Off], x.Off)
			err = local("write", d.name, err)
		}
		d.touch()
		if err != nil {
			return err
		}
		return d.set(ctx, blocksOf(x), c)
	}
	return d.change(ctx, e, edges{}, func(r blocks, _ edges) error {
		return d.bits.runs(r, func(run blocks, written bool) error {
			if written {
				return nil
			}
			rest := d.extent(run)
			for _, x := range datas {
				x = x.Intersect(rest)
				if x.Empty() {
					continue
				}
				if err := put(block.Extent{Off: rest.Off, Len: x.Off - rest.Off}, hole); err != nil {
					return err
				}
				if err := put(x, data); err != nil {
					return err
				}
				rest = block.Extent{Off: x.End(), Len: rest.End() - x.End()}
			}
			return put(rest, hole)
		})
	})
}

// flushNowAndThen bounds what a power cut takes back.
func (h *hydration) flushNowAndThen(ctx context.Context, broughtBytes int64) error {
	h.mu.Lock()
	h.unsynced += broughtBytes
	due := h.unsynced >= flushEveryBytes
	if due {
		h.unsynced = 0
	}
	h.mu.Unlock()
	if !due {
		return nil
	}
	return h.again(ctx, func() error { return h.d.Flush(ctx) })
}

// again calls f until it succeeds, with growing pauses, or until it fails in a way
// that does not pass.
func (h *hydration) again(ctx context.Context, f func() error) error {
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		err := f()
		if err == nil {
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if lasts(err) {
			return fmt.Errorf("bring the volume to %s: %w", h.d.name, err)
		}
		wait := jitter.Of(pause)
		h.trouble(err, wait)
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
	}
}

// lasts reports whether trying again is of no use. Whatever is wrong with the base
// may pass: the stores may be repaired.
func lasts(err error) bool {
	if base := (*baseError)(nil); errors.As(err, &base) {
		return false
	}
	var failed *SyncError
	var corrupt *format.CorruptError
	return errors.As(err, &failed) || errors.As(err, &corrupt) || errors.Is(err, block.ErrStopping)
}

func (h *hydration) tell() {
	if h.o.Progress == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.o.Progress(h.d.Progress())
}

func (h *hydration) trouble(err error, pause time.Duration) {
	if h.o.Trouble == nil {
		return
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	h.o.Trouble(err, pause)
}
