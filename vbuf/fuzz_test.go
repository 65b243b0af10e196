package vbuf

import (
	"context"
	"path"
	"strings"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/vfs"
)

// FuzzRecover changes bytes of what a buffer has on its disk, in a file of the
// fuzzer's choice: a journal file, a mark, a bitmap, a label. A start must take
// it, find the damage or fail; and what a journal then returns must be as it was
// written.
func FuzzRecover(f *testing.F) {
	f.Add(uint8(0), uint32(0), []byte{}, false)
	f.Add(uint8(0), uint32(8), []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, false)
	f.Add(uint8(1), uint32(4100), []byte{1}, false)
	f.Add(uint8(2), uint32(0), []byte{}, true)
	f.Add(uint8(3), uint32(20), []byte("hostile"), false)
	f.Add(uint8(4), uint32(4), []byte{0xff, 0xff, 0xff, 0x7f}, true)
	f.Fuzz(func(t *testing.T, which uint8, off uint32, change []byte, cut bool) {
		ctx := context.Background()
		m := vfs.NewMem()
		o := testOptions(m, 1)
		b := mustOpen(t, o)
		j := mustJournal(t, b)
		const writes = 12
		for seq := block.Seq(1); seq <= writes; seq++ {
			w := testWrite(seq, 7)
			if err := j.Reserve(ctx, int64(len(w.Data))); err != nil {
				t.Fatal(err)
			}
			j.Enqueue(w)
		}
		if err := j.Flush(ctx); err != nil {
			t.Fatal(err)
		}
		marks := mustBitmap(t, b)
		if err := marks.Prepare([]BitmapVolume{{Index: 1, SizeBytes: 1 << 30}}); err != nil {
			t.Fatal(err)
		}
		marks.Add(1, block.Extent{Off: 1 << 20, Len: 4096})
		if err := marks.Activate(time.Unix(1, 0)); err != nil {
			t.Fatal(err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
		files := filesBelow(t, m, "/disk0")
		name := files[int(which)%len(files)]
		file, err := m.Open(name)
		if err != nil {
			t.Fatal(err)
		}
		size, err := file.Size()
		if err != nil {
			t.Fatal(err)
		}
		at := int64(off) % (size + 1)
		if cut {
			if err := file.Truncate(at); err != nil {
				t.Fatal(err)
			}
		}
		if len(change) > 0 {
			if _, err := file.WriteAt(change[:min(len(change), 64<<10)], at); err != nil {
				t.Fatal(err)
			}
		}
		if err := file.Close(); err != nil {
			t.Fatal(err)
		}
		recoverHostile(t, o, writes)
	})
}

// recoverHostile opens a buffer in which anything may be damaged.
func recoverHostile(t *testing.T, o Options, writes block.Seq) {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	b, err := Open(ctx, o)
	if err != nil {
		return
	}
	defer b.Close()
	if marks, err := b.Bitmap(ctx, testGroup); err == nil {
		for v := range block.VolumeIndex(3) {
			marks.MarkedBytes(v)
		}
	}
	j, err := b.Journal(ctx, testGroup)
	if err != nil {
		if ctx.Err() != nil {
			t.Fatal("the start hangs")
		}
		return
	}
	for at := block.Seq(1); at <= j.Durable() && at <= writes; {
		next, err := j.Read(at, 1<<20, func(w block.Write) error {
			want := testWrite(w.Seq, 7)
			if w.Seq > writes || w.Extent != want.Extent || w.Kind != want.Kind || string(w.Data) != string(want.Data) {
				t.Errorf("seq %d is read as something that was never written", w.Seq)
			}
			return nil
		})
		if err != nil || next <= at {
			at++ // damaged: what is behind it may be whole
			continue
		}
		at = next
	}
}

func filesBelow(t *testing.T, m *vfs.Mem, dir string) (out []string) {
	entries, err := m.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		name := path.Join(dir, e.Name)
		if info, err := m.Stat(name); err == nil && info.IsDir {
			out = append(out, filesBelow(t, m, name)...)
		} else if !strings.HasSuffix(name, "lock") {
			out = append(out, name)
		}
	}
	return out
}
