package overlay_test

import (
	"bytes"
	"context"
	"errors"
	"path/filepath"
	"sync"
	"testing"

	"drc/internal/block"
	"drc/internal/block/blocktest"
	"drc/internal/overlay"
)

func small(sector int) block.Geometry {
	return block.Geometry{SizeBytes: 24<<20 + int64(sector)*8, SectorSize: sector}
}

// blank is a base of zeroes, as the suite wants it.
func blank(g block.Geometry) *testBase {
	return &testBase{Memory: blocktest.NewMemoryGeometry(g, nil)}
}

func TestDevice_KeepsTheContract(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		g := small(sector)
		t.Run("mem", func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device { return open(t, config(newMem(t), blank(g), bootA)) })
		})
		t.Run("os", func(t *testing.T) {
			blocktest.Run(t, func(t *testing.T) block.Device {
				c := config(nil, blank(g), "")
				c.File = filepath.Join(t.TempDir(), "volume")
				return open(t, c)
			})
		})
	}
}

// TestDevice_KeepsTheContractWhenComplete: the file alone is as good.
func TestDevice_KeepsTheContractWhenComplete(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device {
		m := newMem(t)
		b := blank(block.Geometry{SizeBytes: 5<<20 + 512, SectorSize: 512})
		d := open(t, config(m, b, bootA))
		hydrate(t, d)
		closeIt(t, d)
		return open(t, overlay.Config{FS: m, File: file, Boot: bootA})
	})
}

func TestRead_WhatWasNotWrittenIsTheBases(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		b := newBase(t, small(sector), 1)
		d := open(t, config(newMem(t), b, bootA))
		want := bytes.Clone(b.content)
		s := int64(sector)
		for i, e := range []block.Extent{{Off: 0, Len: s}, {Off: 65536 + 3*s, Len: 21 * s}, {Off: 1 << 20, Len: 8192}, {Off: int64(len(want)) - s, Len: s}, {Off: 7864320 - s, Len: 2 * s}} {
			copy(want[e.Off:e.End()], filled(e.Len, uint64(i)))
			write(t, d, want[e.Off:e.End()], e.Off)
		}
		for _, e := range []block.Extent{{Off: 200 * s, Len: s}, {Off: 3<<20 + s, Len: 10<<20 - 2*s}} {
			clear(want[e.Off:e.End()])
			zero(t, d, e)
		}
		expect(t, d, want, 0)
		expect(t, d, want[5*s:900*s], 5*s)
	}
}

// TestBase_IsReadOnlyWhereItMustBe: a write of whole blocks asks for nothing, one
// of a part of a block for the rest of it, and a read for what is not written.
func TestBase_IsReadOnlyWhereItMustBe(t *testing.T) {
	b := newBase(t, small(512), 2)
	d := open(t, config(newMem(t), b, bootA))
	var mu sync.Mutex
	var asked []block.Extent
	b.on(func(_ context.Context, r blocktest.Request) error {
		mu.Lock()
		defer mu.Unlock()
		if r.Kind == blocktest.Read {
			asked = append(asked, r.Extent)
		}
		return nil
	})
	check := func(what string, want ...block.Extent) {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		left := map[block.Extent]int{}
		for _, e := range asked {
			left[e]++
		}
		for _, e := range want {
			left[e]--
		}
		for _, n := range left {
			if n != 0 {
				t.Fatalf("%s asked the base for %v, want %v", what, asked, want)
			}
		}
		asked = nil
	}
	write(t, d, filled(3*oneBlock, 1), 10*oneBlock)
	check("a write of whole blocks")
	expect(t, d, filled(3*oneBlock, 1), 10*oneBlock)
	check("a read of what was written")
	write(t, d, filled(512, 2), 11*oneBlock+512)
	check("a write of a part of a written block")
	write(t, d, filled(oneBlock, 3), 12*oneBlock+1024)
	check("a write across two blocks, one of which is written", block.Extent{Off: 13*oneBlock + 1024, Len: oneBlock - 1024})
	write(t, d, filled(512, 4), 20*oneBlock+1024)
	check("a write within a block", block.Extent{Off: 20 * oneBlock, Len: 1024}, block.Extent{Off: 20*oneBlock + 1536, Len: oneBlock - 1536})
	read(t, d, 8*oneBlock+512, 13*oneBlock)
	check("a read across written and other blocks", block.Extent{Off: 8*oneBlock + 512, Len: 2*oneBlock - 512},
		block.Extent{Off: 14 * oneBlock, Len: 6 * oneBlock}, block.Extent{Off: 21 * oneBlock, Len: 512})
	zero(t, d, block.Extent{Off: 1 << 20, Len: 20 << 20})
	check("zeroing whole blocks")
	read(t, d, 1<<20, 4<<20)
	check("a read of zeroes")
	tail := b.Geometry().SizeBytes / oneBlock * oneBlock
	write(t, d, filled(b.Geometry().SizeBytes-tail, 5), tail)
	check("a write of the last block")
}

func TestBase_FailureIsTheReadersOnly(t *testing.T) {
	b := newBase(t, small(512), 3)
	d := open(t, config(newMem(t), b, bootA))
	write(t, d, filled(oneBlock, 1), 0)
	gone := errors.New("the stores are gone")
	b.fail(gone)
	if err := d.ReadAt(t.Context(), make([]byte, 2*oneBlock), 0); !errors.Is(err, gone) {
		t.Fatalf("read: %v", err)
	}
	if err := d.WriteAt(t.Context(), make([]byte, 512), 5*oneBlock, block.WriteOptions{}); !errors.Is(err, gone) {
		t.Fatalf("write of a part: %v", err)
	}
	if err := d.Zero(t.Context(), block.Extent{Off: 5*oneBlock + 512, Len: 512}, block.ZeroOptions{Fast: true}); !errors.Is(err, block.ErrUnsupported) {
		t.Fatalf("fast zero of a part: %v", err)
	}
	expect(t, d, filled(oneBlock, 1), 0)
	write(t, d, filled(2*oneBlock, 2), oneBlock)
	expect(t, d, filled(2*oneBlock, 2), oneBlock)
	flush(t, d)
}

// TestBase_ThatHangsHoldsUpNobodyElse: who waits for the base has no lock.
func TestBase_ThatHangsHoldsUpNobodyElse(t *testing.T) {
	b := newBase(t, small(512), 4)
	d := open(t, config(newMem(t), b, bootA))
	asked, answer := make(chan struct{}, 10), make(chan struct{})
	b.on(func(_ context.Context, r blocktest.Request) error {
		if r.Kind == blocktest.Read {
			asked <- struct{}{}
			<-answer
		}
		return nil
	})
	got := make([]byte, 4*oneBlock)
	done := make(chan error, 2)
	go func() { done <- d.ReadAt(context.Background(), got, 0) }()
	<-asked
	go func() {
		done <- d.WriteAt(context.Background(), filled(512, 8), 3*oneBlock+512, block.WriteOptions{})
	}()
	<-asked
	<-asked
	write(t, d, filled(oneBlock, 7), oneBlock)
	write(t, d, filled(oneBlock, 9), 3*oneBlock)
	expect(t, d, filled(oneBlock, 7), oneBlock)
	flush(t, d)
	close(answer)
	for range 2 {
		if err := <-done; err != nil {
			t.Fatal(err)
		}
	}
	// The reader sees the write that was answered before its own answer.
	same(t, got[oneBlock:2*oneBlock], filled(oneBlock, 7), oneBlock)
	same(t, got[:oneBlock], b.content[:oneBlock], 0)
	// The write of a part lies over the whole block that came before it.
	want := filled(oneBlock, 9)
	copy(want[512:], filled(512, 8))
	expect(t, d, want, 3*oneBlock)
}

func TestZero_LeavesHoles(t *testing.T) {
	for _, c := range []struct {
		name string
		o    block.ZeroOptions
	}{{"trim", block.ZeroOptions{}}, {"fua", block.ZeroOptions{FUA: true}}, {"fast", block.ZeroOptions{Fast: true}}, {"no hole", block.ZeroOptions{NoHole: true}}} {
		t.Run(c.name, func(t *testing.T) {
			b := newBase(t, small(512), 5)
			conf := config(nil, b, "")
			conf.File = filepath.Join(t.TempDir(), "volume")
			d := open(t, conf)
			write(t, d, filled(4<<20, 1), 0)
			e := block.Extent{Off: 1 << 20, Len: 16 << 20}
			if err := d.Zero(t.Context(), e, c.o); err != nil {
				t.Fatal(err)
			}
			expect(t, d, make([]byte, e.Len), e.Off)
			expect(t, d, b.content[e.End():e.End()+65536], e.End())
			holes := int64(0)
			if err := d.Allocation(t.Context(), e, func(piece block.Extent, hole bool) bool {
				if hole {
					holes += piece.Len
				}
				return true
			}); err != nil {
				t.Fatal(err)
			}
			if !c.o.NoHole && holes != e.Len {
				t.Errorf("%d of %d bytes are holes", holes, e.Len)
			}
		})
	}
}

// TestZero_OfATebibyte: neither time nor memory are those of the length.
func TestZero_OfATebibyte(t *testing.T) {
	g := block.Geometry{SizeBytes: 1 << 40, SectorSize: 512}
	c := config(nil, blank(g), "")
	c.File = filepath.Join(t.TempDir(), "volume")
	d := open(t, c)
	write(t, d, filled(oneBlock, 1), 1<<39)
	zero(t, d, block.Extent{Off: 1 << 30, Len: 1<<40 - 2<<30})
	expect(t, d, make([]byte, 65536), 1<<39)
	flush(t, d)
	closeIt(t, d)
	d = open(t, c)
	if p := d.Progress(); p.DoneBytes != 1<<40-2<<30 || p.TotalBytes != 1<<40 || p.Complete {
		t.Errorf("%+v", p)
	}
}

func TestAllocation_IsThatOfFileAndBase(t *testing.T) {
	for _, sector := range []int{512, 4096} {
		b := newBase(t, small(sector), 6)
		d := open(t, config(newMem(t), b, bootA))
		want := bytes.Clone(b.content)
		copy(want[5<<20:], filled(3<<20, 1))
		write(t, d, want[5<<20:8<<20], 5<<20)
		clear(want[6<<20 : 7<<20])
		zero(t, d, block.Extent{Off: 6 << 20, Len: 1 << 20})
		zero(t, d, block.Extent{Off: 12 << 20, Len: 9 << 20})
		clear(want[12<<20 : 21<<20])
		size := int64(len(want))
		at, holes, last := int64(0), int64(0), -1
		err := d.Allocation(t.Context(), block.Extent{Len: size}, func(piece block.Extent, hole bool) bool {
			if piece.Off != at || piece.Len <= 0 || piece.Off%int64(sector) != 0 || piece.Len%int64(sector) != 0 {
				t.Fatalf("piece %s at %d", piece, at)
			}
			at = piece.End()
			kind := 0
			if hole {
				kind = 1
				holes += piece.Len
				if len(bytes.Trim(want[piece.Off:piece.End()], "\x00")) != 0 {
					t.Fatalf("%s is called a hole", piece)
				}
			}
			if kind == last {
				t.Fatalf("%s and the piece before it are of one kind", piece)
			}
			last = kind
			return true
		})
		if err != nil || at != size {
			t.Fatalf("up to %d: %v", at, err)
		}
		if holes < 10<<20 {
			t.Errorf("only %d bytes of holes", holes)
		}
	}
}

func TestClose_IsTheEnd(t *testing.T) {
	b := newBase(t, small(512), 7)
	d := open(t, config(newMem(t), b, bootA))
	write(t, d, filled(oneBlock, 1), 0)
	closeIt(t, d)
	closeIt(t, d)
	for what, err := range map[string]error{
		"read":       d.ReadAt(t.Context(), make([]byte, 512), 0),
		"write":      d.WriteAt(t.Context(), make([]byte, 512), 0, block.WriteOptions{}),
		"zero":       d.Zero(t.Context(), block.Extent{Len: 512}, block.ZeroOptions{}),
		"flush":      d.Flush(t.Context()),
		"hydration":  d.Hydrate(t.Context(), overlay.HydrateOptions{}),
		"allocation": d.Allocation(t.Context(), block.Extent{Len: 512}, func(block.Extent, bool) bool { return true }),
	} {
		if !errors.Is(err, block.ErrStopping) {
			t.Errorf("%s: %v", what, err)
		}
	}
}
