package blocktest

import (
	"context"
	"fmt"
	"sync"

	"drc/internal/block"
)

const (
	pageBytes  = 4096
	slabPages  = 1024
	slabBytes  = slabPages * pageBytes
	sectorSize = 512
)

// Kind is the kind of a request to a Memory.
type Kind int

// The kinds of requests.
const (
	Read Kind = iota
	Write
	Zero
	Flush
	Allocation
)

func (k Kind) String() string {
	switch k {
	case Read:
		return "read"
	case Write:
		return "write"
	case Zero:
		return "zero"
	case Flush:
		return "flush"
	case Allocation:
		return "allocation"
	}
	return fmt.Sprintf("Kind(%d)", int(k))
}

// Request is what a Hook gets to see.
type Request struct {
	Kind   Kind
	Extent block.Extent // of Flush: empty
	FUA    bool
	NoHole bool
	Fast   bool
}

// Hook sees each valid request before it takes effect. If it returns an error,
// the request fails with it and has no effect; if it blocks, the request is held
// and others go on. It is called from many goroutines at once.
type Hook func(ctx context.Context, r Request) error

// Memory is a sparse block.Device in memory. Its pages of 4 KiB appear when they
// are written and go when they are zeroed. A zeroed range is a hole even after
// NoHole: nothing here can run out of space.
//
// Each request takes effect at one moment, after its Hook.
type Memory struct {
	geometry block.Geometry
	hook     Hook

	mu    sync.RWMutex
	slabs map[int64]*slab // by offset / slabBytes
}

type slab struct {
	pages [slabPages]*[pageBytes]byte // nil: reads as zeroes
	used  int
}

var _ block.Device = (*Memory)(nil)

// NewMemory returns a device of sizeBytes zeroes, with sectors of 512 bytes. hook
// may be nil.
func NewMemory(sizeBytes int64, hook Hook) *Memory {
	return NewMemoryGeometry(block.Geometry{SizeBytes: sizeBytes, SectorSize: sectorSize}, hook)
}

// NewMemoryGeometry is NewMemory with another sector size, or read-only.
func NewMemoryGeometry(g block.Geometry, hook Hook) *Memory {
	if g.SizeBytes < 0 || g.SectorSize <= 0 || g.SizeBytes%int64(g.SectorSize) != 0 {
		panic(fmt.Sprintf("blocktest: impossible geometry %+v", g))
	}
	return &Memory{geometry: g, hook: hook, slabs: make(map[int64]*slab)}
}

// Geometry implements block.Device.
func (m *Memory) Geometry() block.Geometry { return m.geometry }

func (m *Memory) check(ctx context.Context, r Request) error {
	if (r.Kind == Write || r.Kind == Zero) && m.geometry.ReadOnly {
		return block.ErrReadOnly
	}
	if err := m.geometry.CheckRange(r.Extent); err != nil {
		return err
	}
	if m.hook != nil {
		return m.hook(ctx, r)
	}
	return nil
}

// pieces calls f for the part of each page that e covers: page n of slab s from
// at to end.
func pieces(e block.Extent, f func(s int64, n, at, end int)) {
	for off := e.Off; off < e.End(); {
		end := min(off-off%pageBytes+pageBytes, e.End())
		at := int(off % pageBytes)
		f(off/slabBytes, int(off%slabBytes/pageBytes), at, at+int(end-off))
		off = end
	}
}

// ReadAt implements block.Device.
func (m *Memory) ReadAt(ctx context.Context, p []byte, off int64) error {
	e := block.Extent{Off: off, Len: int64(len(p))}
	if err := m.check(ctx, Request{Kind: Read, Extent: e}); err != nil {
		return err
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	pieces(e, func(s int64, n, at, end int) {
		if sl := m.slabs[s]; sl != nil && sl.pages[n] != nil {
			copy(p, sl.pages[n][at:end])
		} else {
			clear(p[:end-at])
		}
		p = p[end-at:]
	})
	return nil
}

// WriteAt implements block.Device.
func (m *Memory) WriteAt(ctx context.Context, p []byte, off int64, o block.WriteOptions) error {
	e := block.Extent{Off: off, Len: int64(len(p))}
	if err := m.check(ctx, Request{Kind: Write, Extent: e, FUA: o.FUA}); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	pieces(e, func(s int64, n, at, end int) {
		sl := m.slabs[s]
		if sl == nil {
			sl = &slab{}
			m.slabs[s] = sl
		}
		if sl.pages[n] == nil {
			sl.pages[n] = new([pageBytes]byte)
			sl.used++
		}
		copy(sl.pages[n][at:end], p)
		p = p[end-at:]
	})
	return nil
}

// Zero implements block.Device. Its time depends on what is allocated in e, not
// on e's length.
func (m *Memory) Zero(ctx context.Context, e block.Extent, o block.ZeroOptions) error {
	if err := m.check(ctx, Request{Kind: Zero, Extent: e, FUA: o.FUA, NoHole: o.NoHole, Fast: o.Fast}); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.eachSlab(e, func(s int64, part block.Extent) {
		sl := m.slabs[s]
		if part.Len == slabBytes {
			delete(m.slabs, s)
			return
		}
		pieces(part, func(_ int64, n, at, end int) {
			switch {
			case sl.pages[n] == nil:
			case end-at == pageBytes:
				sl.pages[n] = nil
				sl.used--
			default:
				clear(sl.pages[n][at:end])
			}
		})
		if sl.used == 0 {
			delete(m.slabs, s)
		}
	})
	return nil
}

// eachSlab calls f for the part of e in each existing slab, in no order.
func (m *Memory) eachSlab(e block.Extent, f func(s int64, part block.Extent)) {
	visit := func(s int64) {
		if part := e.Intersect(block.Extent{Off: s * slabBytes, Len: slabBytes}); !part.Empty() {
			f(s, part)
		}
	}
	first, behind := e.Off/slabBytes, (e.End()+slabBytes-1)/slabBytes
	if behind-first > int64(len(m.slabs)) {
		for s := range m.slabs {
			visit(s)
		}
		return
	}
	for s := first; s < behind; s++ {
		if m.slabs[s] != nil {
			visit(s)
		}
	}
}

// Flush implements block.Device; there is nothing to do but to call the Hook.
func (m *Memory) Flush(ctx context.Context) error {
	return m.check(ctx, Request{Kind: Flush})
}

// Allocation implements block.Device. The answer is that of one moment.
func (m *Memory) Allocation(ctx context.Context, e block.Extent, visit func(piece block.Extent, hole bool) bool) error {
	if err := m.check(ctx, Request{Kind: Allocation, Extent: e}); err != nil {
		return err
	}
	type run struct {
		block.Extent
		hole bool
	}
	var runs []run
	add := func(off, end int64, hole bool) {
		if n := len(runs); n > 0 && runs[n-1].hole == hole {
			runs[n-1].Len = end - runs[n-1].Off
			return
		}
		runs = append(runs, run{block.Extent{Off: off, Len: end - off}, hole})
	}
	m.mu.RLock()
	for off := e.Off; off < e.End(); {
		sl := m.slabs[off/slabBytes]
		step, hole := int64(slabBytes), true
		if sl != nil {
			step, hole = pageBytes, sl.pages[off%slabBytes/pageBytes] == nil
		}
		end := min(off-off%step+step, e.End())
		add(off, end, hole)
		off = end
	}
	m.mu.RUnlock()
	for _, r := range runs {
		if !visit(r.Extent, r.hole) {
			return nil
		}
	}
	return nil
}

// Pages is the number of 4 KiB pages that hold data.
func (m *Memory) Pages() int {
	m.mu.RLock()
	defer m.mu.RUnlock()
	n := 0
	for _, sl := range m.slabs {
		n += sl.used
	}
	return n
}
