package overlay

import (
	"math/bits"
	"sync"
	"sync/atomic"

	"drc/internal/format"
	"drc/internal/vfs"
)

const (
	pageBlocks = format.OverlayPageBlocks
	// pageShards is how many locks the pages share.
	pageShards = 64
	// maxShardPages bounds the pages that a shard keeps in memory.
	maxShardPages = 128
)

// words are a bit for each block of a page.
type words [format.OverlayPageWords]uint64

func (w *words) has(i int) bool { return w[i/64]&(1<<(i%64)) != 0 }

// mask returns the bits [from, to).
func mask(from, to int) (w words) {
	for i := range w {
		lo, hi := max(from-64*i, 0), min(to-64*i, 64)
		if lo < hi {
			w[i] = ^uint64(0) >> (64 - (hi - lo)) << lo
		}
	}
	return w
}

func (w *words) or(o *words) {
	for i := range w {
		w[i] |= o[i]
	}
}

func (w *words) remove(o *words) {
	for i := range w {
		w[i] &^= o[i]
	}
}

// without returns the bits of w that o lacks.
func (w words) without(o *words) words {
	w.remove(o)
	return w
}

func (w *words) and(o *words) {
	for i := range w {
		w[i] &= o[i]
	}
}

func (w *words) none() bool { return *w == words{} }

func (w *words) count() (n int64) {
	for _, x := range w {
		n += int64(bits.OnesCount64(x))
	}
	return n
}

// runEnd is the end of the run of equal bits that begins at i, at most to.
func (w *words) runEnd(i, to int) int {
	flip := uint64(0)
	if w.has(i) {
		flip = ^uint64(0)
	}
	for at := i; at < to; {
		if x := (w[at/64] ^ flip) >> (at % 64); x != 0 {
			return min(at+bits.TrailingZeros64(x), to)
		}
		at += 64 - at%64
	}
	return to
}

// page is what is known of the blocks of a page. durable is part of written.
type page struct {
	written words
	durable words
	// space are those for which FILE surely has space, since this process wrote them
	// and punched nothing there; it is not stored.
	space words
}

// bitmap is the bits of an overlay: pages in the sidecar, of which the ones last
// used are in memory too. What is in memory is never newer than the file, so any
// page may be forgotten at any time.
type bitmap struct {
	file       vfs.SparseFile
	name       string
	layout     format.OverlayLayout
	overlay    uint64
	activation uint64
	// complete: all blocks are in FILE, and the pages do not matter any more.
	complete atomic.Bool
	// made has a bit for each page that is not all zeroes in the sidecar.
	made   []atomic.Uint64
	shards [pageShards]pageShard
}

// pageShard is a part of the pages. Its lock is held across reads and writes of
// single pages, each a sector in the kernel's cache: two changes of a page must
// not cross.
type pageShard struct {
	mu    sync.Mutex
	pages map[int64]*page
}

func newBitmap(file vfs.SparseFile, name string, layout format.OverlayLayout, overlay, activation uint64) *bitmap {
	b := &bitmap{file: file, name: name, layout: layout, overlay: overlay, activation: activation, made: make([]atomic.Uint64, (layout.Pages+63)/64)}
	for i := range b.shards {
		b.shards[i].pages = map[int64]*page{}
	}
	return b
}

func (b *bitmap) isMade(n int64) bool { return b.made[n/64].Load()&(1<<(n%64)) != 0 }
func (b *bitmap) setMade(n int64)     { b.made[n/64].Or(1 << (n % 64)) }

// with calls f with page n under its lock.
func (b *bitmap) with(n int64, f func(p *page) error) error {
	s := &b.shards[n%pageShards]
	s.mu.Lock()
	defer s.mu.Unlock()
	p := s.pages[n]
	if p == nil {
		var err error
		if p, err = b.load(n); err != nil {
			return err
		}
		for old := range s.pages {
			if len(s.pages) < maxShardPages {
				break
			}
			delete(s.pages, old) // whichever comes first
		}
		s.pages[n] = p
	}
	return f(p)
}

// load reads page n.
func (b *bitmap) load(n int64) (*page, error) {
	if b.complete.Load() {
		all := mask(0, b.layout.PageBlocks(n))
		return &page{written: all, durable: all}, nil
	}
	if !b.isMade(n) {
		return &page{}, nil
	}
	raw := make([]byte, format.OverlaySectorBytes)
	if _, err := b.file.ReadAt(raw, b.layout.PageOffset(n)); err != nil {
		return nil, local("read", b.name, err)
	}
	p, made, err := b.parse(n, raw)
	if err == nil && !made {
		err = format.Corrupt(b.name, "page %d was written, and there are only zeroes in its place", n)
	}
	return p, err
}

// parse reads page n from raw. made is false if it was never written.
func (b *bitmap) parse(n int64, raw []byte) (_ *page, made bool, err error) {
	stored, made, err := format.ParseOverlayPage(b.name, raw, b.overlay, uint64(n))
	if err != nil {
		return nil, false, err
	}
	p := &page{written: stored.Written, durable: stored.Durable}
	if stored.Activation != b.activation {
		p.written = p.durable
	}
	all := mask(0, b.layout.PageBlocks(n))
	if beyond := words(stored.Written).without(&all); !beyond.none() {
		return nil, false, format.Corrupt(b.name, "page %d has blocks behind the end of the volume", n)
	}
	return p, made, nil
}

// save writes page n, whose lock is held.
func (b *bitmap) save(n int64, p *page) error {
	raw := make([]byte, format.OverlaySectorBytes)
	stored := format.OverlayPage{Activation: b.activation, Written: p.written, Durable: p.durable}
	stored.Put(raw, b.overlay, uint64(n))
	_, err := b.file.WriteAt(raw, b.layout.PageOffset(n))
	return local("write", b.name, err)
}

// onPages calls f for the part of r in each page: blocks [from, to) of page n.
func (r blocks) onPages(f func(n int64, from, to int) error) error {
	for at := r.first; at < r.end; {
		n := at / pageBlocks
		end := min(r.end, (n+1)*pageBlocks)
		if err := f(n, int(at-n*pageBlocks), int(end-n*pageBlocks)); err != nil {
			return err
		}
		at = end
	}
	return nil
}

// prepare sees to it that the pages of r have their place on the disk, so that
// setting bits needs no space. No bit changes.
func (b *bitmap) prepare(r blocks) error {
	if b.complete.Load() {
		return nil
	}
	return r.onPages(func(n int64, _, _ int) error {
		if b.isMade(n) {
			return nil
		}
		return b.with(n, func(p *page) error {
			if b.isMade(n) {
				return nil
			}
			if err := b.save(n, p); err != nil {
				return err
			}
			b.setMade(n)
			return nil
		})
	})
}

// runs calls visit for the runs of r that are written or not, in order. It holds
// no lock meanwhile: bits that are set meanwhile may not show.
func (b *bitmap) runs(r blocks, visit func(run blocks, written bool) error) error {
	var open blocks
	kind := false
	err := r.onPages(func(n int64, from, to int) error {
		w, err := b.written(n)
		if err != nil {
			return err
		}
		for i := from; i < to; {
			end := w.runEnd(i, to)
			if has := w.has(i); open.first == open.end || has != kind {
				if open.first < open.end {
					if err := visit(open, kind); err != nil {
						return err
					}
				}
				open.first, kind = n*pageBlocks+int64(i), has
			}
			open.end = n*pageBlocks + int64(end)
			i = end
		}
		return nil
	})
	if err == nil && open.first < open.end {
		err = visit(open, kind)
	}
	return err
}

// written returns the written bits of page n.
func (b *bitmap) written(n int64) (w words, err error) {
	err = b.with(n, func(p *page) error { w = p.written; return nil })
	return w, err
}

// ends reports whether the first and the last block of r are written.
func (b *bitmap) ends(r blocks) (first, last bool, err error) {
	if first, err = b.has(r.first); err == nil {
		last, err = b.has(r.end - 1)
	}
	return first, last, err
}

func (b *bitmap) has(n int64) (bool, error) {
	w, err := b.written(n / pageBlocks)
	return w.has(int(n % pageBlocks)), err
}

// survey reports whether some block of r is written, and whether FILE has space
// for all of them for certain.
func (b *bitmap) survey(r blocks) (some, space bool, err error) {
	space = true
	err = r.onPages(func(n int64, from, to int) error {
		m := mask(from, to)
		return b.with(n, func(p *page) error {
			lacking := m.without(&p.space)
			space = space && lacking.none()
			blank := m.without(&p.written)
			some = some || blank != m
			return nil
		})
	})
	return some, space, err
}

// content is what FILE was given for blocks.
type content int

const (
	data content = iota // it has space for them
	hole                // it may have none
)

// set sets the written bits [from, to) of page n, which prepare was called for,
// and returns those that were not set before.
func (b *bitmap) set(n int64, from, to int, c content) (fresh words, err error) {
	m := mask(from, to)
	err = b.with(n, func(p *page) error {
		if c == data {
			p.space.or(&m)
		} else {
			p.space.remove(&m)
		}
		fresh = m.without(&p.written)
		if fresh.none() {
			return nil
		}
		p.written.or(&fresh)
		if err := b.save(n, p); err != nil {
			p.written.remove(&fresh)
			return err
		}
		return nil
	})
	if err != nil {
		return words{}, err
	}
	return fresh, nil
}

// promote sets the durable bits of w in page n: FILE was synced since they were
// written.
func (b *bitmap) promote(n int64, w *words) error {
	return b.with(n, func(p *page) error {
		before := p.durable
		p.durable.or(w)
		p.durable.and(&p.written)
		if p.durable == before {
			return nil
		}
		if err := b.save(n, p); err != nil {
			p.durable = before
			return err
		}
		return nil
	})
}
