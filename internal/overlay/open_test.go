package overlay_test

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/overlay"
	"drc/internal/vfs"
)

func openErr(t testing.TB, c overlay.Config) (*overlay.Device, error) {
	t.Helper()
	return overlay.Open(t.Context(), c)
}

// flip changes a bit of the sidecar's byte at.
func flip(t testing.TB, m vfs.FS, at int64) {
	t.Helper()
	change(t, m, sidecar, at, func(p []byte) { p[0] ^= 0x10 }, 1)
}

func change(t testing.TB, m vfs.FS, name string, at int64, f func(p []byte), n int) {
	t.Helper()
	x, err := m.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer x.Close()
	p := make([]byte, n)
	if _, err := x.ReadAt(p, at); err != nil {
		t.Fatal(err)
	}
	f(p)
	if _, err := x.WriteAt(p, at); err != nil {
		t.Fatal(err)
	}
}

// pagesAt is where the sidecar's pages begin.
func pagesAt(t testing.TB, m vfs.FS) int64 {
	t.Helper()
	id, _, err := overlay.Peek(m, file)
	if err != nil {
		t.Fatal(err)
	}
	return format.LayOutOverlay(id.SizeBytes).PageOffset(0)
}

func sidecarOf(t testing.TB, m vfs.FS) []byte {
	t.Helper()
	p, err := vfs.ReadFile(m, sidecar, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// written returns a file system with an overlay in which something is written, in
// each page.
func written(t testing.TB, b *testBase) *vfs.Mem {
	t.Helper()
	m := newMem(t)
	d := open(t, config(m, b, bootA))
	for at := int64(0); at < b.Geometry().SizeBytes-oneBlock; at += 4 << 20 {
		write(t, d, filled(oneBlock, uint64(at)), at)
	}
	closeIt(t, d)
	return m
}

func TestOpen_AnotherBaseIsRefused(t *testing.T) {
	b := newBase(t, small(512), 1)
	m := written(t, b)
	is := identity(b.Geometry().SizeBytes, 512)
	for what, f := range map[string]func(i *overlay.Identity){
		"repository": func(i *overlay.Identity) { i.Repo[15]++ },
		"group":      func(i *overlay.Identity) { i.Group[15]++ },
		"volume":     func(i *overlay.Identity) { i.Volume[15]++ },
		"branch":     func(i *overlay.Identity) { i.Branch[15]++ },
		"entry":      func(i *overlay.Identity) { i.Entry++ },
		"hash":       func(i *overlay.Identity) { i.Hash[0]++ },
		"seq":        func(i *overlay.Identity) { i.Seq++ },
	} {
		c := config(m, b, bootA)
		f(&c.Identity)
		_, err := openErr(t, c)
		var other *overlay.OtherBaseError
		if !errors.As(err, &other) || other.Is != is || other.Asked != c.Identity {
			t.Fatalf("another %s: %v", what, err)
		}
		for _, part := range []string{file, "overlay of another base", `volume "pgdata" at seq`, "was asked for"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("another %s: %q is not in %q", what, part, err)
			}
		}
		swapped := &overlay.OtherBaseError{File: other.File, Is: other.Asked, Asked: other.Is}
		if is.String() == c.Identity.String() || swapped.Error() == other.Error() {
			t.Errorf("the message does not tell one %s from another", what)
		}
	}
	for _, g := range []block.Geometry{{SizeBytes: small(512).SizeBytes + 4096, SectorSize: 512}, {SizeBytes: small(512).SizeBytes, SectorSize: 4096}} {
		var other *overlay.OtherBaseError
		if _, err := openErr(t, config(m, blank(g), bootA)); !errors.As(err, &other) {
			t.Errorf("another geometry %+v: %v", g, err)
		}
	}
	c := config(m, b, bootA)
	c.Identity.VolumeName = "renamed since"
	open(t, c)
}

func TestOpen_NeedsABaseUntilComplete(t *testing.T) {
	b := newBase(t, small(512), 2)
	m := written(t, b)
	c := overlay.Config{FS: m, File: file, Boot: bootA}
	if _, err := openErr(t, c); !errors.Is(err, overlay.ErrNeedsBase) {
		t.Fatalf("partial: %v", err)
	}
	c.File = "/d/other"
	if _, err := openErr(t, c); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("nothing: %v", err)
	}
	if _, _, err := overlay.Peek(m, "/d/other"); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("peek at nothing: %v", err)
	}
	if id, complete, err := overlay.Peek(m, file); err != nil || complete || id != identity(b.Geometry().SizeBytes, 512) {
		t.Fatalf("peek: %s, %t, %v", id, complete, err)
	}
	// Zeroing all of it makes it complete, without any hydration.
	d := open(t, config(m, b, bootA))
	b.fail(errors.New("the base is not needed"))
	zero(t, d, block.Extent{Len: b.Geometry().SizeBytes})
	if d.Complete() {
		t.Fatal("complete before it is durable")
	}
	flush(t, d)
	if !d.Complete() {
		t.Fatal("not complete")
	}
	closeIt(t, d)
	c.File = file
	d = open(t, c)
	expect(t, d, make([]byte, b.Geometry().SizeBytes), 0)
	closeIt(t, d)
	// Of another base it is all the same.
	other := config(m, b, bootA)
	other.Identity.Seq++
	var refused *overlay.OtherBaseError
	if _, err := openErr(t, other); !errors.As(err, &refused) {
		t.Errorf("complete, of another base: %v", err)
	}
}

func TestOpen_SomebodysFileIsLeftAlone(t *testing.T) {
	b := newBase(t, small(512), 3)
	m := newMem(t)
	for _, content := range [][]byte{nil, []byte("a diary"), make([]byte, b.Geometry().SizeBytes)} {
		f, err := m.Create(file)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(content, 0); err != nil {
			t.Fatal(err)
		}
		if _, err := openErr(t, config(m, b, bootA)); !errors.Is(err, overlay.ErrNotOverlay) || !strings.Contains(err.Error(), "choose another file") {
			t.Fatalf("open: %v", err)
		}
		if _, _, err := overlay.Peek(m, file); !errors.Is(err, overlay.ErrNotOverlay) {
			t.Fatalf("peek: %v", err)
		}
		same(t, rawFile(t, m), content, 0)
		if names, _ := m.ReadDir("/d"); len(names) != 1 {
			t.Fatalf("%v", names)
		}
		if err := m.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOpen_FileThatAppearsWhileItIsMade: the sidecar of an interrupted start does
// not make somebody's file an overlay.
func TestOpen_FileThatAppearsWhileItIsMade(t *testing.T) {
	b := newBase(t, small(512), 3)
	m := newMem(t)
	m.SetHook(func(op vfs.Op, name string) error {
		if op == vfs.OpCreate && name == file {
			return vfs.ErrDown
		}
		return nil
	})
	if _, err := openErr(t, config(m, b, bootA)); err == nil {
		t.Fatal("made without a file")
	}
	m.SetHook(nil)
	m = m.Kill()
	f, err := m.Create(file)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("a diary"), 0); err != nil {
		t.Fatal(err)
	}
	if _, err := openErr(t, config(m, b, bootA)); !errors.Is(err, overlay.ErrNotOverlay) {
		t.Fatal(err)
	}
	same(t, rawFile(t, m), []byte("a diary"), 0)
}

func TestOpen_FilesThatDoNotFit(t *testing.T) {
	b := newBase(t, small(512), 4)
	size := b.Geometry().SizeBytes
	resize := func(name string, n int64) func(t *testing.T, m *vfs.Mem) {
		return func(t *testing.T, m *vfs.Mem) {
			f, err := m.Open(name)
			if err != nil {
				t.Fatal(err)
			}
			if err := f.Truncate(n); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, c := range []struct {
		name string
		do   func(t *testing.T, m *vfs.Mem)
		says string
		is   error
	}{
		{"no file", func(t *testing.T, m *vfs.Mem) { _ = m.Remove(file) }, "missing", overlay.ErrNoFile},
		{"a shorter file", resize(file, size-512), fmt.Sprintf("has %d bytes", size-512), nil},
		{"a longer file", resize(file, size+512), fmt.Sprintf("has %d bytes", size+512), nil},
		{"no sidecar", func(t *testing.T, m *vfs.Mem) { _ = m.Remove(sidecar) }, "not an overlay", overlay.ErrNotOverlay},
		{"an empty sidecar", resize(sidecar, 0), "ends after 0 bytes", nil},
		{"a cut sidecar", resize(sidecar, 9000), "9000 bytes", nil},
		{"a long sidecar", resize(sidecar, 1<<20), "1048576 bytes", nil},
		{"another version", func(t *testing.T, m *vfs.Mem) {
			change(t, m, sidecar, 4, func(p []byte) { p[0] = 2 }, 1)
		}, "version 2", nil},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := written(t, b)
			c.do(t, m)
			_, err := openErr(t, config(m, b, bootA))
			if err == nil || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), file) || (c.is != nil && !errors.Is(err, c.is)) {
				t.Errorf("%v", err)
			}
		})
	}
}

// TestDamage_IsAnErrorAndNeverData: each sector of the sidecar, changed or
// zeroed.
func TestDamage_IsAnErrorAndNeverData(t *testing.T) {
	b := newBase(t, small(512), 5)
	whole := written(t, b)
	f, err := whole.Open(sidecar)
	if err != nil {
		t.Fatal(err)
	}
	size, err := f.Size()
	if err != nil {
		t.Fatal(err)
	}
	pages := pagesAt(t, whole)
	found := 0
	for at := int64(0); at < size; at += 512 {
		if at == 4608 {
			at = 8192 // nothing is there
		}
		if at == 8704 {
			at = pages
		}
		for _, f := range []func(p []byte){func(p []byte) { clear(p) }, func(p []byte) { p[9] ^= 4 }, func(p []byte) { p[511] ^= 128 }} {
			m := whole.Clone()
			change(t, m, sidecar, at, f, 512)
			_, err := openErr(t, config(m, b, bootA))
			var corrupt *format.CorruptError
			if err == nil && bytes.Equal(sidecarOf(t, m), sidecarOf(t, whole)) {
				continue // zeroes that stay zeroes
			}
			if !errors.As(err, &corrupt) || corrupt.Object != sidecar {
				t.Fatalf("byte %d: %v", at, err)
			}
			found++
		}
	}
	if found < 20 {
		t.Errorf("only %d damages: the test looks in the wrong place", found)
	}
}

// TestDamage_WhileServing: a page that has rotted since it was read at open is
// an error of those requests that need it.
func TestDamage_WhileServing(t *testing.T) {
	b := newBase(t, small(512), 6)
	for _, f := range []func(p []byte){func(p []byte) { clear(p) }, func(p []byte) { p[100] ^= 1 }} {
		m := written(t, b)
		d := open(t, config(m, b, bootA))
		change(t, m, sidecar, pagesAt(t, m), f, 512)
		var corrupt *format.CorruptError
		if err := d.ReadAt(t.Context(), make([]byte, 512), oneBlock); !errors.As(err, &corrupt) {
			t.Fatalf("read: %v", err)
		}
		if err := d.WriteAt(t.Context(), make([]byte, 512), oneBlock, block.WriteOptions{}); !errors.As(err, &corrupt) {
			t.Fatalf("write: %v", err)
		}
		if err := d.Zero(t.Context(), block.Extent{Len: oneBlock}, block.ZeroOptions{}); !errors.As(err, &corrupt) {
			t.Fatalf("zero: %v", err)
		}
		read(t, d, 8<<20, 65536)
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

func TestOpen_TwiceIsRefused(t *testing.T) {
	b := newBase(t, small(512), 7)
	m := newMem(t)
	c := config(m, b, bootA)
	d := open(t, c)
	if _, err := openErr(t, c); !errors.Is(err, overlay.ErrInUse) {
		t.Fatal(err)
	}
	if _, _, err := overlay.Peek(m, file); err != nil {
		t.Fatalf("peek while it is in use: %v", err)
	}
	closeIt(t, d)
	open(t, c)
}

// TestOpen_AtOnce: of several that want to make one, one does.
func TestOpen_AtOnce(t *testing.T) {
	for range 30 {
		b := blank(block.Geometry{SizeBytes: 1 << 20, SectorSize: 512})
		c := config(nil, b, "")
		c.File = t.TempDir() + "/volume"
		type result struct {
			d   *overlay.Device
			err error
		}
		results := make(chan result)
		for range 4 {
			go func() {
				d, err := openErr(t, c)
				results <- result{d, err}
			}()
		}
		var won *overlay.Device
		for range 4 {
			r := <-results
			if r.err == nil {
				if won != nil {
					t.Fatal("two have it open")
				}
				won = r.d
			}
		}
		if won != nil {
			closeIt(t, won)
		}
		d := open(t, c)
		expect(t, d, make([]byte, 65536), 0)
		closeIt(t, d)
	}
}

func TestOpen_BaseThatIsNotWhatItIsSaidToBe(t *testing.T) {
	b := newBase(t, small(512), 8)
	c := config(newMem(t), b, bootA)
	c.Identity.SizeBytes += 512
	if _, err := openErr(t, c); err == nil || !strings.Contains(err.Error(), "the base has") {
		t.Error(err)
	}
	c.Identity.SizeBytes++
	if _, err := openErr(t, c); err == nil {
		t.Error("a size that is no whole number of sectors")
	}
}

// FuzzSidecar: whatever happens to the bytes of a sidecar, the volume is as it
// was or there is an error.
func FuzzSidecar(f *testing.F) {
	b := newBase(f, block.Geometry{SizeBytes: 512<<10 + 512, SectorSize: 512}, 9)
	whole := written(f, b)
	want := append([]byte(nil), b.content...)
	copy(want, filled(oneBlock, 0))
	pages := pagesAt(f, whole)
	f.Add(uint32(0), []byte{1})
	f.Add(uint32(4), []byte{3})
	f.Add(uint32(4096+16), []byte{1})
	f.Add(uint32(8192+32), []byte{1, 2})
	f.Add(uint32(pages+32), []byte{0xff, 0xff})
	f.Fuzz(func(t *testing.T, at uint32, xor []byte) {
		m := whole.Clone()
		x, err := m.Open(sidecar)
		if err != nil {
			t.Fatal(err)
		}
		size, err := x.Size()
		if err != nil {
			t.Fatal(err)
		}
		if int64(at) >= size {
			return
		}
		change(t, m, sidecar, int64(at), func(p []byte) {
			for i := range p {
				p[i] ^= xor[i]
			}
		}, min(len(xor), int(size-int64(at))))
		_, _, _ = overlay.Peek(m, file)
		d, err := openErr(t, config(m, b, bootA))
		if err != nil {
			return
		}
		defer d.Close()
		expect(t, d, want, 0)
	})
}
