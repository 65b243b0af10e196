package capture_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/vfs"
)

// TestChanged_InUse has another program do things to the file behind a volume
// whose agent runs, while it is idle and before the next write is applied. Each is
// noticed and says what to do, what clients wrote can be read and reaches the file
// unless that was cut short, and what must be compared is noted.
func TestChanged_InUse(t *testing.T) {
	replace := func(t testing.TB, path string) {
		must(t, os.WriteFile(path+".new", make([]byte, rigBytes), 0o600))
		must(t, os.Rename(path+".new", path))
	}
	for _, c := range []struct {
		name    string
		do      func(t testing.TB, path string)
		says    string
		isCut   bool
		foreign bool // the next start compares
	}{
		{"written to", func(t testing.TB, path string) {
			f, err := os.OpenFile(path, os.O_WRONLY, 0)
			must(t, err)
			_, err = f.WriteAt([]byte("not by a client"), 300<<10)
			must(t, errors.Join(err, f.Close()))
		}, "was written to by another program", false, true},
		{"cut short", func(t testing.TB, path string) { must(t, os.Truncate(path, 8192)) }, "was cut short", true, true},
		{"emptied", func(t testing.TB, path string) { must(t, os.Truncate(path, 0)) }, "was cut short", true, true},
		{"cut short and extended again", func(t testing.TB, path string) {
			must(t, os.Truncate(path, 8192))
			must(t, os.Truncate(path, rigBytes))
		}, "was written to by another program", false, true},
		{"renamed", func(t testing.TB, path string) { must(t, os.Rename(path, path+".away")) }, "was moved or replaced", false, false},
		{"replaced", replace, "was removed", false, false},
		{"removed", func(t testing.TB, path string) { must(t, os.Remove(path)) }, "was removed", false, false},
		{"attributes only", func(t testing.TB, path string) { must(t, os.Chmod(path, 0o640)) }, "", false, false},
	} {
		for name, idle := range map[string]bool{"idle": true, "before a write": false} {
			t.Run(c.name+"/"+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					changedInUse(t, idle, c.do, c.says, c.isCut, c.foreign)
				})
			})
		}
	}
}

func changedInUse(t *testing.T, idle bool, do func(testing.TB, string), says string, isCut, foreign bool) {
	ctx, cancel := context.WithCancel(context.Background())
	r := newRig(t, vfs.NewMem(), rigBytes)
	var work sync.WaitGroup
	defer work.Wait()
	defer cancel()
	work.Go(func() { _ = r.buf.Run(ctx) })
	work.Go(func() { _ = r.vol.Run(ctx) })
	want := bytes.Repeat([]byte{1}, 64<<10)
	put := func(p []byte, off int64) {
		t.Helper()
		if err := r.vol.WriteAt(ctx, p, off, block.WriteOptions{FUA: true}); err != nil {
			t.Fatal(err)
		}
	}
	put(want, 512<<10)
	time.Sleep(20 * time.Second) // it is settled, and nothing but ours has happened
	if changed := r.vol.Changed(); changed != nil {
		t.Fatal(changed)
	}
	do(t, r.path)
	if idle {
		time.Sleep(10 * time.Second)
	} else {
		put(bytes.Repeat([]byte{2}, 4096), 640<<10)
		time.Sleep(time.Second)
	}
	changed := r.vol.Changed()
	switch {
	case changed == nil && says == "":
	case changed == nil || says == "" || !strings.Contains(changed.Error(), says) || !strings.Contains(changed.Error(), r.path) || changed.IsCut != isCut:
		t.Fatalf("it says %v", changed)
	}
	put(bytes.Repeat([]byte{3}, 4096), 700<<10)
	time.Sleep(20 * time.Second)
	if (r.vol.Changed() == nil) != (says == "") {
		t.Errorf("after the next write: %v", r.vol.Changed())
	}
	p := make([]byte, 4096)
	if err := r.vol.ReadAt(ctx, p, 700<<10); err != nil || p[0] != 3 {
		t.Errorf("what was written is not read: %v", err)
	}
	if isCut {
		if st, err := os.Stat(r.path); err != nil || st.Size() > 8192 {
			t.Errorf("the file was written to: %v, %v", st, err)
		}
		if r.vol.Applied() >= r.group.Captured() || r.vol.Failed() == nil {
			t.Errorf("applied %s of %s, failed %v", r.vol.Applied(), r.group.Captured(), r.vol.Failed())
		}
		if err := r.vol.ReadAt(ctx, p, 520<<10); err == nil {
			t.Error("what was cut off is read")
		}
		must(t, os.Truncate(r.path, rigBytes)) // which brings nothing back
		time.Sleep(time.Minute)
		if c := r.vol.Changed(); c == nil || !c.IsCut || r.vol.Applied() >= r.group.Captured() {
			t.Errorf("made as long as before it is taken for whole: %v", c)
		}
	} else if r.vol.Applied() != r.group.Captured() || r.vol.Failed() != nil {
		t.Errorf("applied %s of %s: %v", r.vol.Applied(), r.group.Captured(), r.vol.Failed())
	}
	cancel()
	work.Wait()
	rec, err := capture.ReadRecord(r.records, r.path)
	if err != nil || rec == nil || rec.Foreign != foreign {
		t.Errorf("the record says %+v (%v)", rec, err)
	}
	if err := r.vol.Close(context.Background()); (err != nil) != isCut {
		t.Errorf("closed: %v", err)
	}
	if rec, err = capture.ReadRecord(r.records, r.path); err != nil || rec.Foreign != foreign || rec.Clean == isCut {
		t.Errorf("after a stop in order the record says %+v (%v)", rec, err)
	}
	must(t, r.buf.Close())
}

// TestChanged_Extended: writes go on, and it says how to cut it back.
func TestChanged_Extended(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(context.Background())
		r := newRig(t, vfs.NewMem(), rigBytes)
		var work sync.WaitGroup
		defer work.Wait()
		defer cancel()
		work.Go(func() { _ = r.vol.Run(ctx) })
		p := bytes.Repeat([]byte{5}, 4096)
		if err := r.vol.WriteAt(ctx, p, 0, block.WriteOptions{FUA: true}); err != nil {
			t.Fatal(err)
		}
		must(t, os.Truncate(r.path, 2*rigBytes)) // while it is busy: told by its length only
		time.Sleep(20 * time.Second)
		if c := r.vol.Changed(); c == nil || !strings.Contains(c.Error(), "truncate -s 1048576") {
			t.Fatalf("it says %v", c)
		}
		if r.vol.Applied() != 1 || r.vol.Failed() != nil {
			t.Errorf("applied %s: %v", r.vol.Applied(), r.vol.Failed())
		}
		cancel()
		work.Wait()
		r.end()
	})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
