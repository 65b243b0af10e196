package vfs

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"path"
	"testing"
)

func TestSparse_Contract(t *testing.T) {
	both(t, func(t *testing.T, fsys FS, dir string) {
		name := path.Join(dir, "volume")
		made, err := fsys.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		defer made.Close()
		f := made.(SparseFile)
		const size = 1 << 20
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		if at, err := f.NextData(0); err != nil || at != size {
			t.Fatalf("data of an empty file at %d, %v", at, err)
		}
		want := make([]byte, size)
		copy(want[65536:], bytes.Repeat([]byte{7}, 131072))
		if _, err := f.WriteAt(want[65536:196608], 65536); err != nil {
			t.Fatal(err)
		}
		if at, err := f.NextData(0); err != nil || at > 65536 {
			t.Fatalf("data at %d, %v", at, err)
		}
		if at, err := f.NextHole(65536); err != nil || at < 196608 {
			t.Fatalf("hole at %d, %v", at, err)
		}
		if err := f.Reserve(0, 65536); err != nil && !errors.Is(err, ErrNoHoles) {
			t.Fatal(err)
		}
		if err := f.PunchHole(70000, 50000); err == nil {
			clear(want[70000:120000])
		} else if !errors.Is(err, ErrNoHoles) {
			t.Fatal(err)
		}
		if err := f.ZeroRange(150001, 777); err == nil {
			clear(want[150001:150778])
		} else if !errors.Is(err, ErrNoHoles) {
			t.Fatal(err)
		}
		got := make([]byte, size)
		if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("the content is wrong (%v)", err)
		}
		if n, err := f.Size(); err != nil || n != size {
			t.Fatalf("%d bytes, %v", n, err)
		}
	})
}

func TestSparse_LockIsOfTheFile(t *testing.T) {
	both(t, func(t *testing.T, fsys FS, dir string) {
		name := path.Join(dir, "a")
		first, err := fsys.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := first.(SparseFile).TryLock(); err != nil {
			t.Fatal(err)
		}
		if err := fsys.Rename(name, name+"2"); err != nil {
			t.Fatal(err)
		}
		second, err := fsys.Open(name + "2")
		if err != nil {
			t.Fatal(err)
		}
		defer second.Close()
		if err := second.(SparseFile).TryLock(); !errors.Is(err, ErrLocked) {
			t.Fatalf("second lock: %v", err)
		}
		if err := first.Close(); err != nil {
			t.Fatal(err)
		}
		if err := second.(SparseFile).TryLock(); err != nil {
			t.Fatalf("after the first was closed: %v", err)
		}
	})
}

func TestMem_PowerCutBringsBackWhatWasPunched(t *testing.T) {
	seen := map[byte]bool{}
	for seed := range uint64(30) {
		m := NewMem()
		f, _ := m.Create("/f")
		_, _ = f.WriteAt(bytes.Repeat([]byte{1}, 4096), 0)
		_ = f.Sync()
		_ = m.SyncDir("/")
		if err := f.(SparseFile).PunchHole(512, 1024); err != nil {
			t.Fatal(err)
		}
		got, err := ReadFile(m.Crash(rand.New(rand.NewPCG(seed, 1))), "/f", 1<<20)
		if err != nil || got[0] != 1 || got[1536] != 1 {
			t.Fatalf("seed %d: %v", seed, err)
		}
		seen[got[512]] = true
	}
	if !seen[0] || !seen[1] {
		t.Fatalf("the hole was always or never on the disk: %v", seen)
	}
}
