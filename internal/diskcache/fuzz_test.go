package diskcache_test

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"strings"
	"testing"
	"testing/synctest"

	"drc/internal/diskcache"
	"drc/internal/vfs"
)

// FuzzOpen gives Open hostile bytes for a slab, as they are and with the checksums of
// its table made right, so that they get behind these. It opens, it finds nothing that
// was not put, and it can be used.
func FuzzOpen(f *testing.F) {
	const file = "drc-cache-0000000000000007.slab"
	fsys := vfs.NewMem()
	c, err := diskcache.Open(diskcache.Options{Dir: dir, LimitBytes: 1 << 20, FS: fsys})
	if err != nil {
		f.Fatal(err)
	}
	for i := range 4 {
		c.Put(1, name(i), value(i, 30))
	}
	if err := c.Close(); err != nil {
		f.Fatal(err)
	}
	for _, p := range slabs(f, fsys) {
		f.Add(p, uint16(4))
		f.Add(p[:len(p)-3], uint16(0))
		f.Add(p[:16], uint16(0))
	}
	f.Add([]byte{}, uint16(0))
	f.Fuzz(func(t *testing.T, p []byte, rows uint16) {
		if n := len(p) - 16*int(rows) - 16; rows > 0 && n >= 0 {
			p = bytes.Clone(p)
			table := crc32.MakeTable(crc32.Castagnoli)
			tail := p[len(p)-16:]
			copy(tail, "DRCT")
			binary.LittleEndian.PutUint32(tail[4:], uint32(rows))
			binary.LittleEndian.PutUint32(tail[8:], crc32.Checksum(p[n:len(p)-16], table))
			binary.LittleEndian.PutUint32(tail[12:], crc32.Checksum(tail[:12], table))
		}
		synctest.Test(t, func(t *testing.T) {
			fsys := vfs.NewMem()
			if err := fsys.MkdirAll(dir); err != nil {
				t.Fatal(err)
			}
			write(t, fsys, dir+"/"+file, p)
			ours := strings.HasPrefix(string(p), "DRCCACHE\x01\x00\x00\x00")
			for range 2 {
				c := open(t, fsys, 1<<20, nil)
				for i := range 4 {
					has(t, c, i, 30)
				}
				c.Put(1, name(9), value(9, 30))
				synctest.Wait()
				if !has(t, c, 9, 30) {
					t.Fatal("nothing can be stored")
				}
				if s := c.Stats(); s.Bytes > 1<<20 {
					t.Fatalf("%+v", s)
				}
				closeIt(t, c)
			}
			if now, there := slabs(t, fsys)[file]; len(p) > 0 && !ours && p[0] != 0 && (!there || !bytes.Equal(now, p)) {
				t.Fatal("a file that is not ours was changed")
			}
		})
	})
}
