package diskcache_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"

	"drc/internal/diskcache"
	"drc/internal/vfs"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const dir = "/cache"

// name is the name of value i.
func name(i int) [32]byte { return sha256.Sum256(binary.LittleEndian.AppendUint64(nil, uint64(i))) }

// value is value i, of so many bytes, or fewer of them for a few i.
func value(i, size int) []byte {
	seed := name(i)
	p := make([]byte, max(1, size-i%7))
	_, _ = rand.NewChaCha8(seed).Read(p)
	return p
}

// log collects what is said.
type log struct {
	mu    sync.Mutex
	lines []string
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.lines = append(l.lines, string(p))
	return len(p), nil
}

func (l *log) count(text string) (n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, s := range l.lines {
		if strings.Contains(s, text) {
			n++
		}
	}
	return n
}

func open(t testing.TB, fsys vfs.FS, limit int64, l *log) *diskcache.Cache {
	t.Helper()
	o := diskcache.Options{Dir: dir, LimitBytes: limit, FS: fsys}
	if l != nil {
		o.Logger = slog.New(slog.NewTextHandler(l, nil))
	}
	c, err := diskcache.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func closeIt(t testing.TB, c *diskcache.Cache) {
	t.Helper()
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
}

// has reports whether value i is found; what is found must be right.
func has(t testing.TB, c *diskcache.Cache, i, size int) bool {
	t.Helper()
	p, ok := c.Get(1, name(i))
	if ok && !bytes.Equal(p, value(i, size)) {
		t.Fatalf("value %d is another one", i)
	}
	return ok
}

// slabs lists the slab files and their content.
func slabs(t testing.TB, fsys vfs.FS) map[string][]byte {
	t.Helper()
	list, err := fsys.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]byte{}
	for _, e := range list {
		if strings.HasSuffix(e.Name, ".slab") {
			out[e.Name], err = vfs.ReadFile(fsys, dir+"/"+e.Name, 1<<30)
			if err != nil {
				t.Fatal(err)
			}
		}
	}
	return out
}

// write makes a file, in place of what has its name.
func write(t testing.TB, fsys vfs.FS, name string, p []byte) {
	t.Helper()
	_ = fsys.Remove(name)
	f, err := fsys.Create(name)
	if err == nil {
		_, err = f.WriteAt(p, 0)
	}
	if err == nil {
		err = f.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
}

// What was put is found, at once, after it was written and after a restart; under
// its own kind and name only.
func TestCache_FindsWhatWasPut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fsys := vfs.NewMem()
		for round := range 4 {
			c := open(t, fsys, 4<<20, nil)
			for i := range round * 10 {
				if !has(t, c, i, 5000) {
					t.Fatalf("value %d is not found after a restart", i)
				}
			}
			for i := round * 10; i < round*10+10; i++ {
				if has(t, c, i, 5000) {
					t.Fatal("a value is found before it was put")
				}
				p := value(i, 5000)
				c.Put(1, name(i), p)
				clear(p) // it is the caller's
				if !has(t, c, i, 5000) {
					t.Fatal("a value is not found at once")
				}
			}
			synctest.Wait()
			for i := range round*10 + 10 {
				if !has(t, c, i, 5000) {
					t.Fatal("a value is not found when it was written")
				}
			}
			if _, ok := c.Get(2, name(0)); ok {
				t.Fatal("a value is found under another kind")
			}
			s := c.Stats()
			if s.Values != round*10+10 || s.Stored != 10 || s.Hits != int64(round*10+10+round*10+10) || s.Misses != 11 || s.Dropped != 0 || s.Queued != 0 {
				t.Fatalf("round %d: %+v", round, s)
			}
			if round == 2 {
				fsys = fsys.Kill() // the next one finds no table
				closeIt(t, c)
				continue
			}
			closeIt(t, c)
			closeIt(t, c)
			if has(t, c, 0, 5000) {
				t.Fatal("a value is found after Close")
			}
			c.Put(1, name(0), []byte{1})
		}
		if n := len(slabs(t, fsys)); n != 1 {
			t.Fatalf("short lives leave %d slabs", n)
		}
	})
}

func TestCache_WhatItDoesNotKeep(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := open(t, vfs.NewMem(), 1<<20, nil)
		defer closeIt(t, c)
		c.Put(1, name(1), nil)
		c.Put(1, name(2), make([]byte, 1<<17+1))
		c.Put(1, name(3), make([]byte, 1<<17)) // larger than a slab
		synctest.Wait()
		if s := c.Stats(); s.Values != 1 || s.Dropped != 1 || s.Stored != 1 {
			t.Fatalf("%+v", s)
		}
		c.Drop(1, name(3))
		if _, ok := c.Get(1, name(3)); ok {
			t.Fatal("a dropped value is found")
		}
		c.Put(1, name(3), []byte("another"))
		c.Drop(1, name(3)) // while it waits
		if _, ok := c.Get(1, name(3)); ok {
			t.Fatal("a dropped value is found")
		}
		c.Put(1, name(3), []byte("a third"))
		synctest.Wait()
		if p, ok := c.Get(1, name(3)); !ok || string(p) != "a third" {
			t.Fatalf("%q", p)
		}
	})
}

// Whatever is put, of whatever sizes, and used or not: what is on the disk never is
// more than the limit, and little of the limit goes to waste.
func TestCache_StaysBelowItsLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 2 << 20
		rng := rand.New(rand.NewPCG(1, 2))
		fsys := vfs.NewMem()
		if err := fsys.MkdirAll(dir); err != nil {
			t.Fatal(err)
		}
		fsys.SetLimit(dir, limit) // what goes beyond it fails
		var l log
		most := int64(0)
		for round := range 6 {
			c := open(t, fsys, limit, &l)
			size := []int{30_000, 3, 5000, 250_000, 60_000, 100}[round]
			for i := range 1500 {
				c.Put(1, name(round*10_000+i), value(i, 1+rng.IntN(size)))
				for range 3 {
					c.Get(1, name(round*10_000+rng.IntN(i+1)))
				}
				if i%16 == 0 {
					synctest.Wait()
				}
				most = max(most, c.Stats().Bytes)
			}
			synctest.Wait()
			s := c.Stats()
			if s.Dropped != 0 || s.Bytes > limit || s.Bytes < limit/2 {
				t.Fatalf("%+v", s)
			}
			if round != 1 && s.Evicted == 0 {
				t.Fatalf("nothing was evicted: %+v", s)
			}
			closeIt(t, c)
			total := int64(0)
			for _, p := range slabs(t, fsys) {
				total += int64(len(p))
			}
			if total > s.Bytes {
				t.Fatalf("%d bytes are on the disk, and it says %d", total, s.Bytes)
			}
		}
		if len(l.lines) != 0 {
			t.Fatal(l.lines)
		}
		// A smaller limit holds from the start on.
		c := open(t, fsys, 1<<20, nil)
		if s := c.Stats(); s.Bytes > 1<<20 || s.Values == 0 {
			t.Fatalf("%+v", s)
		}
		closeIt(t, c)
	})
}

// What is in use stays while a volume of many times the limit is read past it: where
// it is close together nothing is written for that, and where it is scattered little.
func TestCache_KeepsWhatIsInUse(t *testing.T) {
	for what, apart := range map[string]int{"together": 1, "scattered": 20} {
		t.Run(what, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const limit, size, hot, all = 4 << 20, 16 << 10, 40, 3000
				c := open(t, vfs.NewMem(), limit, nil)
				defer closeIt(t, c)
				for i := range all {
					c.Put(1, name(i), value(i, size))
					synctest.Wait()
					for k := range hot {
						if k*apart <= i && i%8 == 0 {
							has(t, c, k*apart, size)
						}
					}
				}
				kept := 0
				for k := range hot {
					if has(t, c, k*apart, size) {
						kept++
					}
				}
				s := c.Stats()
				if kept != hot {
					t.Errorf("%d of %d values that are used all the time are kept", kept, hot)
				}
				if (s.Moved == 0) != (apart == 1) || s.MovedBytes > s.StoredBytes/4 {
					t.Errorf("%d bytes were moved, %d stored", s.MovedBytes, s.StoredBytes)
				}
				if has(t, c, hot*apart+101, size) || !has(t, c, all-1, size) {
					t.Error("what goes is not the oldest")
				}
			})
		})
	}
}

// A full disk is nobody's error, is said once, and costs no more than what cannot be
// stored. When there is room the cache stores again.
func TestCache_DiskFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 10_000
		fsys := vfs.NewMem()
		fsys.SetLimit("/", 1<<20)
		var l log
		c := open(t, fsys, 4<<20, &l)
		defer func() { closeIt(t, c) }()
		for i := range 300 {
			c.Put(1, name(i), value(i, size))
			synctest.Wait()
		}
		if l.count("cannot store") != 1 {
			t.Fatal(l.lines)
		}
		s := c.Stats()
		if s.Dropped == 0 || s.Stored < 50 || s.Bytes > 1<<20 {
			t.Fatalf("%+v", s)
		}
		found := 0
		for i := range 300 {
			if has(t, c, i, size) {
				found++
			}
		}
		if found < 50 {
			t.Fatalf("%d values are found", found)
		}
		// A limit larger than the disk: the oldest go for the youngest.
		for i := 300; i < 1000; i++ {
			time.Sleep(diskcache.StoringPause / 10)
			c.Put(1, name(i), value(i, size))
			synctest.Wait()
		}
		if c.Stats().Stored < s.Stored+50 {
			t.Fatalf("%+v", c.Stats())
		}
		fsys.SetLimit("/", 8<<20)
		time.Sleep(diskcache.StoringPause)
		before := c.Stats().Dropped
		for i := 1000; i < 1100; i++ {
			c.Put(1, name(i), value(i, size))
			synctest.Wait()
			if !has(t, c, i, size) {
				t.Fatal("there is room, and nothing is stored")
			}
		}
		if c.Stats().Dropped != before || l.count("stores again") == 0 {
			t.Fatalf("%+v %v", c.Stats(), l.lines)
		}
		closeIt(t, c)
		c = open(t, fsys, 4<<20, &l)
		if !has(t, c, 1099, size) {
			t.Fatal("what was stored after the disk was full is not found")
		}
	})
}

// A disk that fails, in whatever operation: no error, no wrong value, and all is well
// again with the disk.
func TestCache_FailingDisk(t *testing.T) {
	for _, op := range []vfs.Op{vfs.OpWrite, vfs.OpRead, vfs.OpCreate, vfs.OpRemove, vfs.OpTruncate, ""} {
		t.Run("op "+string(op), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				const size = 20_000
				fsys := vfs.NewMem()
				var l log
				c := open(t, fsys, 1<<20, &l)
				put := func(from, to int) {
					for i := from; i < to; i++ {
						c.Put(1, name(i), value(i, size))
						synctest.Wait()
						has(t, c, i/2, size)
					}
				}
				put(0, 100)
				f := &vfs.Fault{Err: syscall.EIO}
				if op != "" {
					f.Ops = []vfs.Op{op}
				}
				fsys.SetFault(dir, f)
				put(100, 200)
				time.Sleep(diskcache.StoringPause)
				put(200, 300)
				if n := l.count("cannot store"); n > 1 || n == 0 && op != vfs.OpRead && op != vfs.OpTruncate {
					t.Fatal(l.lines)
				}
				fsys.SetFault(dir, nil)
				time.Sleep(diskcache.StoringPause)
				put(300, 400)
				for i := 390; i < 400; i++ {
					if !has(t, c, i, size) {
						t.Fatalf("value %d is not stored", i)
					}
				}
				if s := c.Stats(); s.Bytes > 1<<20 {
					t.Fatalf("%+v", s)
				}
				closeIt(t, c)
				c = open(t, fsys, 1<<20, &l)
				for i := 390; i < 400; i++ {
					if !has(t, c, i, size) {
						t.Fatalf("value %d is not found after a restart", i)
					}
				}
				closeIt(t, c)
			})
		})
	}
}

// A disk that does not answer holds up neither who puts nor who gets what is not
// there or waits still; what does not fit in the queue is not kept.
func TestCache_PutDoesNotWaitForTheDisk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fsys := vfs.NewMem()
		c, err := diskcache.Open(diskcache.Options{Dir: dir, LimitBytes: 4 << 20, FS: fsys, QueueBytes: 100_000})
		if err != nil {
			t.Fatal(err)
		}
		c.Put(1, name(0), value(0, 10_000))
		synctest.Wait()
		answer := make(chan struct{})
		fsys.SetFault(dir, &vfs.Fault{Ops: []vfs.Op{vfs.OpWrite}, Hang: answer})
		for i := 1; i < 100; i++ {
			c.Put(1, name(i), value(i, 10_000))
		}
		synctest.Wait()
		if !has(t, c, 0, 10_000) || !has(t, c, 9, 10_000) || has(t, c, 99, 10_000) {
			t.Error("what is found is not what was written and what waits")
		}
		if s := c.Stats(); s.Dropped != 89 || s.Queued > 100_000 || s.Queued < 90_000 {
			t.Errorf("%+v", s)
		}
		closed := make(chan struct{})
		go func() { closeIt(t, c); close(closed) }()
		synctest.Wait()
		select {
		case <-closed:
			t.Error("Close has not waited")
		default:
		}
		fsys.SetFault(dir, nil)
		close(answer)
		<-closed
	})
}

// Any byte changed, anywhere, and any length: a value is found as it was or not at
// all, and the cache can be used.
func TestCache_EveryChangedByte(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size, n = 40, 6
		fsys := vfs.NewMem()
		c := open(t, fsys, 1<<20, nil)
		for i := range n {
			c.Put(1, name(i), value(i, size))
		}
		synctest.Wait()
		dead := fsys.Clone() // before there is a table
		closeIt(t, c)
		for what, from := range map[string]*vfs.Mem{"complete": fsys, "unfinished": dead} {
			for file, whole := range slabs(t, from) {
				for at := range 2 * len(whole) {
					p := bytes.Clone(whole)
					if at < len(whole) {
						p[at] ^= 0x41
					} else {
						p = p[:at-len(whole)]
					}
					fsys := vfs.NewMem()
					if err := fsys.MkdirAll(dir); err != nil {
						t.Fatal(err)
					}
					write(t, fsys, dir+"/"+file, p)
					c := open(t, fsys, 1<<20, nil)
					found := 0
					for i := range n {
						if has(t, c, i, size) {
							found++
						}
					}
					if what == "complete" && at >= 16 && at < len(whole) && found < n-1 {
						t.Errorf("byte %d is changed, and %d values are lost", at, n-found)
					}
					for i := range n {
						c.Put(1, name(i), value(i, size))
					}
					synctest.Wait()
					for i := range n {
						if !has(t, c, i, size) {
							t.Fatalf("%s, byte %d: value %d cannot be stored again", what, at, i)
						}
					}
					closeIt(t, c)
				}
			}
		}
	})
}

// After a power cut at any moment what is found is right, and the limit holds.
func TestCache_PowerCuts(t *testing.T) {
	for seed := range uint64(40) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 3))
			fsys := vfs.NewMem()
			for range 5 {
				c := open(t, fsys, 1<<20, nil)
				for range rng.IntN(80) {
					i := rng.IntN(200)
					c.Put(1, name(i), value(i, 20_000))
					has(t, c, rng.IntN(200), 20_000)
					synctest.Wait()
				}
				if rng.IntN(3) == 0 {
					for _, e := range must(fsys.ReadDir(dir)) { // the disk had time
						f := must(fsys.Open(dir + "/" + e.Name))
						if err := f.Sync(); err != nil {
							t.Fatal(err)
						}
					}
					if err := fsys.SyncDir(dir); err != nil {
						t.Fatal(err)
					}
				}
				if s := c.Stats(); s.Bytes > 1<<20 {
					t.Fatalf("%+v", s)
				}
				fsys = fsys.Crash(rng)
				closeIt(t, c)
			}
		})
	}
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// Files that the cache has not made stay as they are, whatever their names, also when
// room is needed.
func TestCache_LeavesOtherFilesAlone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fsys := vfs.NewMem()
		if err := fsys.MkdirAll(dir + "/drc-cache-0000000000000005.slab"); err != nil {
			t.Fatal(err)
		}
		others := map[string][]byte{
			"thesis.tex":                      []byte("all my work"),
			"drc-cache-0000000000000000.slab": []byte("not a slab at all, but long enough to be one"),
			"drc-cache-0000000000000003.slab": []byte("short"),
			"drc-cache-0000000000000004.slab": append([]byte("DRCCACHE\x02\x00\x00\x00"), make([]byte, 100)...), // of a later version
			"drc-cache-ffffffffffffffff.slab": []byte("DRCCACHE"),
			"drc-cache-00000000000000AA.slab": []byte("DRCCACHE"),
			"drc-cache-1.slab":                {},
			"drc-cache-.slab":                 {},
		}
		for name, p := range others {
			write(t, fsys, dir+"/"+name, p)
		}
		var l log
		for range 2 {
			c := open(t, fsys, 1<<20, &l)
			for i := range 200 {
				c.Put(1, name(i), value(i, 20_000))
				synctest.Wait()
				if !has(t, c, i, 20_000) {
					t.Fatalf("value %d is not kept: %v", i, l.lines)
				}
			}
			closeIt(t, c)
		}
		for name, want := range others {
			if p, err := vfs.ReadFile(fsys, dir+"/"+name, 1<<20); err != nil || !bytes.Equal(p, want) {
				t.Errorf("%s is not what it was: %v", name, err)
			}
		}
		if l.count("0000000000000003.slab") != 2 || l.count("remove it if nobody needs it") == 0 {
			t.Error(l.lines)
		}
	})
}

func TestOpen_RefusesTheSecond(t *testing.T) {
	folder := filepath.Join(t.TempDir(), "a", "b")
	o := diskcache.Options{Dir: folder, LimitBytes: 1 << 20}
	c, err := diskcache.Open(o)
	if err != nil {
		t.Fatal(err)
	}
	_, err = diskcache.Open(o)
	var inUse *diskcache.InUseError
	if !errors.As(err, &inUse) || inUse.Dir != folder || !errors.Is(err, vfs.ErrLocked) || !strings.Contains(err.Error(), folder) {
		t.Fatalf("the second one: %v", err)
	}
	closeIt(t, c)
	if c, err = diskcache.Open(o); err != nil {
		t.Fatalf("after the first one: %v", err)
	}
	closeIt(t, c)
	o.LimitBytes = 1000
	if _, err := diskcache.Open(o); err == nil {
		t.Error("a limit of 1000 bytes is taken")
	}
	o = diskcache.Options{Dir: filepath.Join(folder, "file"), LimitBytes: 1 << 20}
	if err := os.WriteFile(o.Dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := diskcache.Open(o); err == nil || !strings.Contains(err.Error(), o.Dir) {
		t.Errorf("a file for a folder: %v", err)
	}
}

// Many readers and writers at once, with slabs coming and going below them, on a real
// disk: what is found is right.
func TestCache_ManyAtOnce(t *testing.T) {
	folder := t.TempDir()
	for range 3 {
		c, err := diskcache.Open(diskcache.Options{Dir: folder, LimitBytes: 1 << 20})
		if err != nil {
			t.Fatal(err)
		}
		var g sync.WaitGroup
		for worker := range 8 {
			g.Go(func() {
				rng := rand.New(rand.NewPCG(uint64(worker), 5))
				for range 600 {
					i := int(100 * rng.ExpFloat64())
					switch rng.IntN(10) {
					case 0:
						c.Drop(1, name(i))
					case 1:
						c.Stats()
					default:
						if p, ok := c.Get(1, name(i)); !ok {
							c.Put(1, name(i), value(i, 15_000))
						} else if !bytes.Equal(p, value(i, 15_000)) {
							t.Errorf("value %d is another one", i)
						}
					}
				}
			})
		}
		g.Wait()
		s := c.Stats()
		closeIt(t, c)
		if s.Hits == 0 || s.Stored == 0 || s.Evicted == 0 || s.Bytes > 1<<20 {
			t.Errorf("%+v", s)
		}
		total := int64(0)
		for _, e := range must(os.ReadDir(folder)) {
			var st syscall.Stat_t
			if err := syscall.Stat(filepath.Join(folder, e.Name()), &st); err != nil {
				t.Fatal(err)
			}
			total += st.Blocks * 512
		}
		if most := int64(1<<20 + 32*4096); total > most {
			t.Errorf("%d bytes are on the disk, more than %d", total, most)
		}
	}
}

// Open reads no values: some few pieces of each slab.
func TestOpen_ReadsNoValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		fsys := vfs.NewMem()
		c := open(t, fsys, 16<<20, nil)
		for i := range 3000 {
			c.Put(1, name(i), value(i, 4000))
			synctest.Wait()
		}
		closeIt(t, c)
		reads := 0
		fsys.SetHook(func(op vfs.Op, name string) error {
			if op == vfs.OpRead {
				reads++
			}
			return nil
		})
		c = open(t, fsys, 16<<20, nil)
		fsys.SetHook(nil)
		defer closeIt(t, c)
		n := len(slabs(t, fsys))
		if s := c.Stats(); s.Values < 2900 || reads > 3*n {
			t.Errorf("%d reads of %d slabs with %d values", reads, n, s.Values)
		}
	})
}

func ExampleOpen() {
	folder, err := os.MkdirTemp("", "cache")
	if err != nil {
		panic(err)
	}
	defer os.RemoveAll(folder)
	c, err := diskcache.Open(diskcache.Options{Dir: folder, LimitBytes: 1 << 30})
	if err != nil {
		panic(err)
	}
	defer c.Close()
	n := sha256.Sum256([]byte("what the value is of"))
	c.Put(1, n, []byte("fetched from far away"))
	p, ok := c.Get(1, n)
	fmt.Println(string(p), ok)
	// Output: fetched from far away true
}
