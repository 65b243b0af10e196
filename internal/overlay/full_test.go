package overlay_test

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"sync"
	"syscall"
	"testing"

	"drc/internal/block"
	"drc/internal/vfs"
)

var osFS = vfs.OS()

func readOS(name string) ([]byte, error) { return os.ReadFile(name) }

// smallDisk is a file system with room for so many blocks of 4 KiB. A write that
// needs more writes as much as there is room for, as a disk does.
type smallDisk struct {
	vfs.FS
	mu   sync.Mutex
	room int // blocks
}

func newSmallDisk(fsys vfs.FS, room int) *smallDisk {
	return &smallDisk{FS: fsys, room: room}
}

func (s *smallDisk) grow(room int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.room += room
}

func (s *smallDisk) left() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.room
}

func (s *smallDisk) Create(name string) (vfs.File, error) { return s.file(s.FS.Create(name)) }
func (s *smallDisk) Open(name string) (vfs.File, error)   { return s.file(s.FS.Open(name)) }

func (s *smallDisk) file(f vfs.File, err error) (vfs.File, error) {
	if err != nil {
		return nil, err
	}
	return &smallFile{SparseFile: f.(vfs.SparseFile), disk: s, taken: map[int64]bool{}}, nil
}

type smallFile struct {
	vfs.SparseFile
	disk  *smallDisk
	taken map[int64]bool
}

// take takes space for [off, off+n) and returns how far it went.
func (f *smallFile) take(off, n int64) (end int64, err error) {
	f.disk.mu.Lock()
	defer f.disk.mu.Unlock()
	for at := off; at < off+n; at = (at/oneBlock + 1) * oneBlock {
		if f.taken[at/oneBlock] {
			continue
		}
		if f.disk.room == 0 {
			return at, syscall.ENOSPC
		}
		f.disk.room--
		f.taken[at/oneBlock] = true
	}
	return off + n, nil
}

func (f *smallFile) WriteAt(p []byte, off int64) (int, error) {
	end, full := f.take(off, int64(len(p)))
	n, err := f.SparseFile.WriteAt(p[:max(0, end-off)], off)
	return n, errors.Join(err, full)
}

func (f *smallFile) WriteVecAt(bufs [][]byte, off int64) error {
	_, err := f.WriteAt(bytes.Join(bufs, nil), off)
	return err
}

func (f *smallFile) Reserve(off, n int64) error {
	_, err := f.take(off, n)
	return err
}

func (f *smallFile) ZeroRange(off, n int64) error {
	if err := f.Reserve(off, n); err != nil {
		return err
	}
	return f.SparseFile.ZeroRange(off, n)
}

func (f *smallFile) PunchHole(off, n int64) error {
	f.disk.mu.Lock()
	for b := (off + oneBlock - 1) / oneBlock; (b+1)*oneBlock <= off+n; b++ {
		if f.taken[b] {
			delete(f.taken, b)
			f.disk.room++
		}
	}
	f.disk.mu.Unlock()
	return f.SparseFile.PunchHole(off, n)
}

// TestFull_NothingIsTorn: a write without room fails and changes nothing, be it
// over the base, over what was written, over holes, or a mixture; everything else
// goes on.
func TestFull_NothingIsTorn(t *testing.T) {
	for seed := range uint64(12) {
		rng := rand.New(rand.NewPCG(seed, 8))
		g := block.Geometry{SizeBytes: 1 << 20, SectorSize: 512}
		b := newBase(t, g, seed)
		m := newMem(t)
		disk := newSmallDisk(m, 4+rng.IntN(200))
		d := open(t, config(disk, b, bootA))
		want := bytes.Clone(b.content)
		refused, taken := 0, 0
		for i := range 300 {
			n := 1 + rng.Int64N(100)
			off := rng.Int64N(g.SizeBytes/512-n+1) * 512
			e := block.Extent{Off: off, Len: n * 512}
			next := make([]byte, e.Len)
			var err error
			switch rng.IntN(5) {
			case 0:
				err = d.Zero(t.Context(), e, block.ZeroOptions{})
			case 1:
				err = d.Zero(t.Context(), e, block.ZeroOptions{NoHole: true})
			default:
				fill(next, rng.Uint64())
				err = d.WriteAt(t.Context(), next, e.Off, block.WriteOptions{FUA: rng.IntN(9) == 0})
			}
			switch {
			case err == nil:
				copy(want[e.Off:], next)
				taken++
			case errors.Is(err, block.ErrNoSpace):
				refused++
			default:
				t.Fatalf("seed %d: %v", seed, err)
			}
			if i%40 == 0 {
				expect(t, d, want, 0)
			} else if err != nil {
				expect(t, d, want[e.Off:e.End()], e.Off)
			}
			if i == 150 {
				flush(t, d)
			}
		}
		if seed < 5 && (refused == 0 || taken == 0) {
			t.Errorf("seed %d: %d refused, %d taken", seed, refused, taken)
		}
		disk.grow(10000)
		write(t, d, filled(65536, 1), 0)
		copy(want, filled(65536, 1))
		flush(t, d)
		m = m.Crash(rng)
		d = open(t, config(m, b, bootB))
		expect(t, d, want, 0)
		hydrate(t, d)
		expect(t, d, want, 0)
	}
}

// TestFull_TheSidecarNeedsSpaceFirst: a write that finds room for its data, and
// none for the bits, leaves the blocks alone that have bits already.
func TestFull_TheSidecarNeedsSpaceFirst(t *testing.T) {
	// Eight pages of the sidecar are in one block of the disk, the ninth in another.
	const border = 8 * 1920 * oneBlock
	b := blank(block.Geometry{SizeBytes: border + 1<<20, SectorSize: 512})
	disk := newSmallDisk(newMem(t), 10)
	d := open(t, config(disk, b, bootA))
	write(t, d, filled(oneBlock, 1), border-oneBlock)
	disk.grow(1 - disk.left())
	if err := d.WriteAt(t.Context(), filled(2*oneBlock, 2), border-oneBlock, block.WriteOptions{}); !errors.Is(err, block.ErrNoSpace) {
		t.Fatal(err)
	}
	expect(t, d, append(filled(oneBlock, 1), make([]byte, oneBlock)...), border-oneBlock)
	disk.grow(2)
	write(t, d, filled(2*oneBlock, 2), border-oneBlock)
	expect(t, d, filled(2*oneBlock, 2), border-oneBlock)
}

// TestFull_FromTheStart: there is no room even for the sidecar.
func TestFull_FromTheStart(t *testing.T) {
	b := newBase(t, small(512), 1)
	m := newMem(t)
	for room := range 4 {
		disk := newSmallDisk(m, room)
		d, err := openErr(t, config(disk, b, bootA))
		if err == nil {
			if room < 3 {
				t.Fatalf("%d blocks are enough", room)
			}
			closeIt(t, d)
			continue
		}
		if !errors.Is(err, block.ErrNoSpace) {
			t.Fatal(err)
		}
		if names, _ := m.ReadDir("/d"); len(names) != 0 {
			t.Fatalf("%v is left", names)
		}
	}
}
