package diskcache_test

import (
	"runtime"
	"testing"
	"testing/synctest"

	"drc/internal/diskcache"
	"drc/internal/vfs"
)

// The index takes less than IndexBytes a value, whether it was read from the disk or
// has grown.
func TestCache_IndexBytes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, limit = 60_000, 1 << 30
		live := func() int64 {
			runtime.GC()
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			return int64(m.HeapAlloc)
		}
		fsys := vfs.NewMem()
		c := open(t, fsys, limit, nil)
		for i := range n {
			c.Put(1, name(i), []byte{1})
			if i%1000 == 0 {
				synctest.Wait()
			}
		}
		synctest.Wait()
		with := live()
		closeIt(t, c)
		grown := with - live()
		without := live()
		again := open(t, fsys, limit, nil)
		read := live() - without
		t.Logf("%d bytes a value when grown, %d when read", grown/n, read/n)
		if s := again.Stats(); s.Values != n {
			t.Fatalf("%+v", s)
		}
		if grown > n*diskcache.IndexBytes || read > n*diskcache.IndexBytes || read < n*24 {
			t.Errorf("%d bytes a value when grown, %d when read, and %d are promised", grown/n, read/n, diskcache.IndexBytes)
		}
		closeIt(t, again)
		runtime.KeepAlive(c)
	})
}
