package capture

import (
	"bytes"
	"context"
	"math/rand/v2"
	"runtime"
	"testing"
	"unsafe"

	"drc/internal/block"
)

// pinned is the memory that an overlay keeps: the buffers that its pieces are
// part of, each once, and the pieces.
func pinned(o *overlay, buffers map[*byte]int64) (n int64) {
	o.mu.RLock()
	defer o.mu.RUnlock()
	seen := map[*byte]bool{}
	o.m.All(func(_ block.Extent, p piece) bool {
		n += pieceBytes
		if len(p.data) == 0 {
			return true
		}
		at := uintptr(unsafe.Pointer(&p.data[0]))
		for first, size := range buffers {
			if from := uintptr(unsafe.Pointer(first)); at >= from && at < from+uintptr(size) {
				if !seen[first] {
					seen[first] = true
					n += size
				}
				return true
			}
		}
		n += int64(len(p.data)) // a copy of its own
		return true
	})
	return n
}

// TestOverlay_KeepsNoMoreThanItCounts overwrites parts of large writes, so that
// remnants of all sizes are left, and removes some.
func TestOverlay_KeepsNoMoreThanItCounts(t *testing.T) {
	const size, large = 4 << 20, 256 << 10
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 1))
		o, want := newOverlay(), make([]byte, size)
		buffers := map[*byte]int64{}
		admitted := int64(0)
		for seq := block.Seq(1); seq < 400; seq++ {
			n := int64(512 * (1 + rng.IntN(16)))
			if rng.IntN(4) == 0 {
				n = large
			}
			e := block.Extent{Off: rng.Int64N((size-n)/512) * 512, Len: n}
			p := piece{seq: seq}
			if rng.IntN(5) > 0 {
				p.data = bytes.Repeat([]byte{byte(1 + seq%250)}, int(n))
				buffers[&p.data[0]] = n
			}
			if ok, _, _ := o.admit(int64(len(p.data)), 1<<40); !ok {
				t.Fatal("not admitted")
			}
			admitted += writeCost(int64(len(p.data)))
			o.set(e, p)
			clear(want[e.Off:e.End()])
			copy(want[e.Off:], p.data)
			if rng.IntN(8) == 0 {
				gone, _ := o.ready(seq, rng.Int64N(size), 100<<10)
				for _, g := range gone {
					o.remove(g.Extent, g.seq)
					clear(want[g.Off:g.End()])
				}
			}
			data, cost := o.size()
			if keeps := pinned(o, buffers); keeps > cost || cost > admitted*3/2 || o.promised != 0 {
				t.Fatalf("seed %d, write %d: %d bytes of data keep %d bytes, counted as %d; admitted %d", seed, seq, data, keeps, cost, admitted)
			}
			if data > 0 && cost > 2*data+int64(o.pieces())*pieceBytes {
				t.Fatalf("seed %d, write %d: %d bytes for %d bytes of data in %d pieces", seed, seq, cost, data, o.pieces())
			}
		}
		got := make([]byte, size)
		for _, gap := range o.read(block.Extent{Len: size}, got) {
			clear(got[gap.Off:gap.End()])
		}
		if !bytes.Equal(got, want) {
			t.Fatalf("seed %d: what is read is not what was written", seed)
		}
		all, _ := o.ready(1<<40, 0, 1<<40)
		for _, p := range all {
			o.remove(p.Extent, p.seq)
		}
		if data, cost := o.size(); data != 0 || cost != 0 {
			t.Fatalf("seed %d: empty, and %d bytes of data and %d in all are counted", seed, data, cost)
		}
	}
}

// TestZero_ManyAreHeldBack trims more places than the overlay may remember while
// nothing is applied: the trims must wait.
func TestZero_ManyAreHeldBack(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	const most = overlayLimit / pieceBytes
	v, _ := newVolume(t, (2*most+2)*1024)
	done := make(chan int, 1)
	go func() {
		n := 0
		for off := int64(0); n <= most+1 && v.Zero(ctx, block.Extent{Off: off, Len: 512}, block.ZeroOptions{}) == nil; off += 1024 {
			n++
		}
		done <- n
	}()
	for { // until the writer waits
		_, cost := v.overlay.size()
		if cost+3*pieceBytes > overlayLimit || len(done) > 0 {
			break
		}
		runtime.Gosched()
	}
	cancel()
	if n := <-done; n > most {
		t.Errorf("%d pieces were taken, of at least %d bytes each", n, pieceBytes)
	}
}
