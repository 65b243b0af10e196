package vbuf

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/vfs"
)

func TestOpen_RefusesWhatIsNotThisBuffer(t *testing.T) {
	cases := []struct {
		name   string
		change func(m *vfs.Mem, o *Options)
		path   string
		says   string
	}{
		{"another repository", func(_ *vfs.Mem, o *Options) { o.Repo = block.ID{9} }, "/disk0", "belongs to repository"},
		{"another host", func(_ *vfs.Mem, o *Options) { o.Host = block.ID{9} }, "/disk0", "another agent"},
		{"a missing member", func(_ *vfs.Mem, o *Options) { o.Dirs = o.Dirs[:1] }, "/disk1", "missing"},
		{"an emptied member", func(m *vfs.Mem, o *Options) {
			_ = m.Remove("/disk1/label")
			_ = m.Remove("/disk1/journal")
			_ = m.Remove("/disk1/spool")
		}, "/disk1", "missing"},
		{"a directory with other things in it", func(m *vfs.Mem, o *Options) {
			_ = m.MkdirAll("/other/photos")
			o.Dirs = append(o.Dirs, DirOptions{Path: "/other", SizeBytes: 4 << 20})
		}, "/other", "not empty"},
		{"a lost label", func(m *vfs.Mem, o *Options) { _ = m.Remove("/disk1/label") }, "/disk1", "no label"},
		{"a damaged label", func(m *vfs.Mem, o *Options) {
			f, _ := m.Open("/disk0/label")
			_, _ = f.WriteAt([]byte{0xff}, 40)
		}, "/disk0", "checksum"},
		{"a copy of a member", func(m *vfs.Mem, o *Options) {
			raw, _ := vfs.ReadFile(m, "/disk0/label", 1<<20)
			_ = m.MkdirAll("/copy")
			_ = vfs.WriteFileAtomic(m, "/copy/label", raw)
			o.Dirs = append(o.Dirs, DirOptions{Path: "/copy", SizeBytes: 4 << 20})
		}, "/copy", "copy of /disk0"},
		{"a quota that holds nothing", func(_ *vfs.Mem, o *Options) { o.Dirs[1].SizeBytes = 1000 }, "/disk1", "too small"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			m := vfs.NewMem()
			o := testOptions(m, 2)
			b := mustOpen(t, o)
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
			good := o
			good.Dirs = append([]DirOptions(nil), o.Dirs...)
			c.change(m, &o)
			_, err := Open(context.Background(), o)
			var setup *SetupError
			if !errors.As(err, &setup) || setup.Path != c.path || !strings.Contains(setup.Reason, c.says) || setup.Hint == "" {
				t.Fatalf("%v", err)
			}
		})
	}
	t.Run("in use", func(t *testing.T) {
		o := testOptions(vfs.NewMem(), 2)
		b := mustOpen(t, o)
		defer b.Close()
		var setup *SetupError
		if _, err := Open(context.Background(), o); !errors.As(err, &setup) || !strings.Contains(setup.Reason, "another process") {
			t.Fatalf("%v", err)
		}
	})
}

func TestOpen_ForgottenMemberMayBeMissing(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 2)
	b := mustOpen(t, o)
	j := mustJournal(t, b)
	for range 30 {
		put(t, j, 1)
	}
	flush(t, j)
	gone := b.Stats().Disks[1].ID
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	all := o.Dirs
	o.Dirs, o.Forget = all[:1], []block.ID{gone}
	b = mustOpen(t, o)
	checkRead(t, mustJournal(t, b), 1, 30, salted(1))
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	o.Dirs, o.Forget = all, nil
	var setup *SetupError
	if _, err := Open(context.Background(), o); !errors.As(err, &setup) || setup.Path != "/disk1" {
		t.Fatalf("the forgotten member is taken again: %v", err)
	}
}

// TestOpen_CrashWhileLabelling: a set that is made or grows survives a crash at
// every step of it.
func TestOpen_CrashWhileLabelling(t *testing.T) {
	for _, before := range []int{0, 1} {
		for stop := range 60 {
			for seed := range uint64(6) {
				rng := rand.New(rand.NewPCG(seed, uint64(stop)))
				m := vfs.NewMem()
				o := testOptions(m, 3)
				all := o.Dirs
				if before > 0 {
					o.Dirs = all[:before]
					b := mustOpen(t, o)
					j := mustJournal(t, b)
					put(t, j, 1)
					flush(t, j)
					if err := b.Close(); err != nil {
						t.Fatal(err)
					}
				}
				o.Dirs = all
				left := stop
				m.SetHook(func(op vfs.Op, name string) error {
					if left--; left < 0 {
						return errPowerCut
					}
					return nil
				})
				b, err := Open(context.Background(), o)
				if err == nil {
					b.unlock()
				}
				m.SetHook(nil)
				m = m.Crash(rng)
				o.FS = m
				b, err = Open(context.Background(), o)
				if err != nil {
					t.Fatalf("before %d stop %d seed %d: %v", before, stop, seed, err)
				}
				if before > 0 {
					checkRead(t, mustJournal(t, b), 1, 1, salted(1))
				}
				if err := b.Close(); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
}

func TestOpen_DefaultQuota(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 1)
	o.Dirs[0].SizeBytes, o.FileBytes = 0, 0
	b := mustOpen(t, o)
	if st := b.Stats(); st.CapacityBytes != defaultQuotaBytes {
		t.Fatalf("capacity %d", st.CapacityBytes)
	}
	if b.fileBytes != fileBytesMax {
		t.Fatalf("file size %d", b.fileBytes)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestOpen_MakesDurableWhatAKilledProcessLeft: the process dies between the rename
// of a label and the sync of its folder. What the next one writes names the disk by
// that label, so a power cut must not bring another one.
func TestOpen_MakesDurableWhatAKilledProcessLeft(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 1)
	labelled := false
	m.SetHook(func(op vfs.Op, name string) error {
		labelled = labelled || op == vfs.OpRename
		if labelled && op == vfs.OpSyncDir {
			return errors.New("killed")
		}
		return nil
	})
	if _, err := Open(context.Background(), o); err == nil || !labelled {
		t.Fatal("it was not killed")
	}
	o.FS = m.Kill()
	id := mustOpen(t, o).Stats().Disks[0].ID
	for seed := range uint64(20) {
		o := o
		o.FS = o.FS.(*vfs.Mem).Clone().Crash(rand.New(rand.NewPCG(seed, 0)))
		if got := mustOpen(t, o).Stats().Disks[0].ID; got != id {
			t.Fatalf("after a power cut the disk is %s, and was %s", got, id)
		}
	}
}

// TestOpen_TwoBuffersAtOnce: somebody starts with an empty directory in place of
// the buffer, and then with both. Nobody may be told to empty the one that holds
// acknowledged writes.
func TestOpen_TwoBuffersAtOnce(t *testing.T) {
	m := vfs.NewMem()
	right := testOptions(m, 1)
	b := mustOpen(t, right)
	j := mustJournal(t, b)
	for range 30 {
		put(t, j, 1)
	}
	flush(t, j)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	wrong := right
	wrong.Dirs = []DirOptions{{Path: "/wrong", SizeBytes: right.Dirs[0].SizeBytes}}
	if err := mustOpen(t, wrong).Close(); err != nil {
		t.Fatal(err)
	}
	for _, dirs := range [][]DirOptions{{right.Dirs[0], wrong.Dirs[0]}, {wrong.Dirs[0], right.Dirs[0]}} {
		both := right
		both.Dirs = dirs
		_, err := Open(context.Background(), both)
		var setup *SetupError
		if !errors.As(err, &setup) || !strings.Contains(setup.Reason, "two different buffers") || !strings.Contains(setup.Hint, "empty neither") {
			t.Fatalf("%s first: %v", dirs[0].Path, err)
		}
	}
	checkRead(t, mustJournal(t, mustOpen(t, right)), 1, 30, salted(1))
}
