package vfs

import (
	"bytes"
	"errors"
	"io/fs"
	"math/rand/v2"
	"path"
	"syscall"
	"testing"
)

// both runs f on the real file system and on the one in memory.
func both(t *testing.T, f func(t *testing.T, fsys FS, dir string)) {
	t.Run("os", func(t *testing.T) { f(t, OS(), t.TempDir()) })
	t.Run("mem", func(t *testing.T) {
		m := NewMem()
		if err := m.MkdirAll("/d"); err != nil {
			t.Fatal(err)
		}
		f(t, m, "/d")
	})
}

func TestFS_Contract(t *testing.T) {
	both(t, func(t *testing.T, fsys FS, dir string) {
		name := path.Join(dir, "sub/deep/file")
		if err := fsys.MkdirAll(path.Dir(name)); err != nil {
			t.Fatal(err)
		}
		if err := fsys.MkdirAll(path.Dir(name)); err != nil {
			t.Fatalf("again: %v", err)
		}
		if _, err := fsys.Open(name); !errors.Is(err, fs.ErrNotExist) {
			t.Fatalf("open of nothing: %v", err)
		}
		f, err := fsys.Create(name)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if _, err := fsys.Create(name); !errors.Is(err, fs.ErrExist) {
			t.Fatalf("create over a file: %v", err)
		}
		if err := f.Preallocate(8192); err != nil {
			t.Fatal(err)
		}
		var bufs [][]byte
		var want []byte
		for i := range 3000 { // more buffers than one call takes
			b := bytes.Repeat([]byte{byte(i)}, i%7)
			bufs, want = append(bufs, b), append(want, b...)
		}
		if err := f.WriteVecAt(bufs, 100); err != nil {
			t.Fatal(err)
		}
		got := make([]byte, len(want))
		if _, err := f.ReadAt(got, 100); err != nil || !bytes.Equal(got, want) {
			t.Fatalf("vectored write reads back wrong (%v)", err)
		}
		if err := f.Sync(); err != nil {
			t.Fatal(err)
		}
		if err := f.Truncate(50); err != nil {
			t.Fatal(err)
		}
		if size, err := f.Size(); err != nil || size != 50 {
			t.Fatalf("size %d, %v", size, err)
		}
		if err := fsys.Rename(name, name+"2"); err != nil {
			t.Fatal(err)
		}
		if err := fsys.SyncDir(path.Dir(name)); err != nil {
			t.Fatal(err)
		}
		list, err := fsys.ReadDir(path.Dir(name))
		if err != nil || len(list) != 1 || list[0] != (Entry{Name: "file2"}) {
			t.Fatalf("list %v, %v", list, err)
		}
		info, err := fsys.Stat(name + "2")
		if err != nil || info.SizeBytes != 50 || info.IsDir {
			t.Fatalf("stat %+v, %v", info, err)
		}
		if space, err := fsys.StatFS(dir); err != nil || space.FreeBytes <= 0 || space.TotalBytes < space.FreeBytes {
			t.Fatalf("space %+v, %v", space, err)
		}
		if err := fsys.Remove(path.Dir(name)); err == nil {
			t.Fatal("removed a directory that is not empty")
		}
		if err := fsys.Remove(name + "2"); err != nil {
			t.Fatal(err)
		}
	})
}

func TestFS_LockIsExclusive(t *testing.T) {
	both(t, func(t *testing.T, fsys FS, dir string) {
		l, err := fsys.Lock(path.Join(dir, "lock"))
		if err != nil {
			t.Fatal(err)
		}
		if _, err := fsys.Lock(path.Join(dir, "lock")); !errors.Is(err, ErrLocked) {
			t.Fatalf("second lock: %v", err)
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		l, err = fsys.Lock(path.Join(dir, "lock"))
		if err != nil {
			t.Fatalf("after unlock: %v", err)
		}
		l.Close()
	})
}

// TestWriteFileAtomic_OldOrNew holds the promise of WriteFileAtomic at every
// point at which it may stop.
func TestWriteFileAtomic_OldOrNew(t *testing.T) {
	boom := errors.New("stop here")
	for stop := range 12 {
		for seed := range uint64(40) {
			rng := rand.New(rand.NewPCG(seed, uint64(stop)))
			m := NewMem()
			if err := WriteFileAtomic(m, "/f", bytes.Repeat([]byte("old"), 500)); err != nil {
				t.Fatal(err)
			}
			left := stop
			m.SetHook(func(op Op, name string) error {
				if left--; left < 0 {
					return boom
				}
				return nil
			})
			want := bytes.Repeat([]byte("new content"), 300)
			err := WriteFileAtomic(m, "/f", want)
			m.SetHook(nil)
			m = m.Crash(rng)
			got, rerr := ReadFile(m, "/f", 1<<20)
			if rerr != nil {
				t.Fatalf("stop %d seed %d: %v", stop, seed, rerr)
			}
			isNew, isOld := bytes.Equal(got, want), bytes.Equal(got, bytes.Repeat([]byte("old"), 500))
			if !isNew && (!isOld || err == nil) {
				t.Fatalf("stop %d seed %d: err %v, new %v, old %v", stop, seed, err, isNew, isOld)
			}
			if err := WriteFileAtomic(m, "/f", want); err != nil {
				t.Fatalf("afterwards: %v", err)
			}
		}
	}
}

func TestMem_CrashKeepsWhatWasSynced(t *testing.T) {
	lost := false
	for seed := range uint64(50) {
		m := NewMem()
		f, _ := m.Create("/f")
		_, _ = f.WriteAt(bytes.Repeat([]byte{1}, 4096), 0)
		_ = f.Sync()
		_ = m.SyncDir("/")
		_, _ = f.WriteAt(bytes.Repeat([]byte{2}, 1024), 1024)
		_, _ = m.Create("/new")
		c := m.Crash(rand.New(rand.NewPCG(seed, 0)))
		got, err := ReadFile(c, "/f", 1<<20)
		if err != nil || len(got) != 4096 {
			t.Fatalf("%d bytes, %v", len(got), err)
		}
		for i, b := range got {
			if first := got[i/512*512]; b != first || (b != 1 && (i < 1024 || i >= 2048)) {
				t.Fatalf("byte %d is %d", i, b)
			}
		}
		if got[1024] != got[1536] {
			lost = true // torn between sectors
		}
		if _, err := f.WriteAt([]byte{3}, 0); err == nil {
			t.Fatal("the dead process wrote")
		}
	}
	if !lost {
		t.Fatal("no crash tore a write")
	}
}

func TestMem_FailedSyncLosesTheBytes(t *testing.T) {
	m := NewMem()
	f, _ := m.Create("/f")
	_, _ = f.WriteAt(make([]byte, 512), 0)
	_ = f.Sync()
	_ = m.SyncDir("/")
	_, _ = f.WriteAt(bytes.Repeat([]byte{9}, 512), 0)
	m.SetHook(func(op Op, name string) error {
		if op == OpSync {
			return syscall.EIO
		}
		return nil
	})
	if err := f.Sync(); !errors.Is(err, syscall.EIO) {
		t.Fatal(err)
	}
	m.SetHook(nil)
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	got, _ := ReadFile(m.Crash(rand.New(rand.NewPCG(1, 1))), "/f", 1<<20)
	if got[0] != 0 {
		t.Fatal("a sync after a failed one made the bytes durable")
	}
}

// A process that is killed in a sync leaves what it wrote to the kernel: the next
// one's sync makes it durable.
func TestMem_KilledInASync(t *testing.T) {
	m := NewMem()
	f, _ := m.Create("/f")
	_ = m.SyncDir("/")
	_, _ = f.WriteAt(bytes.Repeat([]byte{9}, 512), 0)
	m.SetHook(func(Op, string) error { return ErrDown })
	if err := f.Sync(); !errors.Is(err, ErrDown) {
		t.Fatal(err)
	}
	next := m.Kill()
	f, err := next.Open("/f")
	if err != nil {
		t.Fatal(err)
	}
	if err := f.Sync(); err != nil {
		t.Fatal(err)
	}
	got, err := ReadFile(next.Crash(rand.New(rand.NewPCG(1, 1))), "/f", 1<<20)
	if err != nil || len(got) != 512 || got[0] != 9 {
		t.Fatalf("after a power cut there is %v, %v", got, err)
	}
}

func TestMem_LimitIsENOSPC(t *testing.T) {
	m := NewMem()
	_ = m.MkdirAll("/d")
	m.SetLimit("/d", 1000)
	f, _ := m.Create("/d/f")
	if err := f.Preallocate(1000); err != nil {
		t.Fatal(err)
	}
	if err := f.Preallocate(1001); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte{1}, 1000); !errors.Is(err, syscall.ENOSPC) {
		t.Fatal(err)
	}
}
