package vbuf

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"drc/internal/block"
	"drc/internal/vfs"
)

// changing are the operations that leave something else behind.
var changing = []vfs.Op{vfs.OpCreate, vfs.OpRemove, vfs.OpRename, vfs.OpMkdir, vfs.OpSyncDir, vfs.OpWrite, vfs.OpSync, vfs.OpPreallocate, vfs.OpTruncate}

// TestOpenToRead_TellsAllAndChangesNothing reads a buffer as an agent that was
// killed leaves it, with all that the next start would mend: records that were
// never synced, a damaged copy, a record of a batch that one disk lacks, labels
// between two generations, and rubbish.
func TestOpenToRead_TellsAllAndChangesNothing(t *testing.T) {
	for _, disks := range []int{1, 2, 3} {
		t.Run(fmt.Sprint(disks), func(t *testing.T) {
			m := vfs.NewMem()
			o := testOptions(m, disks)
			b, j, _ := stocked(t, o)
			for range 25 {
				put(t, j, 1)
			}
			if err := j.WaitWritten(context.Background(), 85); err != nil {
				t.Fatal(err)
			}
			var killed *SetupError
			if _, err := OpenToRead(context.Background(), ReadOptions{Dirs: []string{"/disk0"}, FS: m}); !errors.As(err, &killed) {
				t.Fatalf("a buffer at work: %v", err)
			}
			_ = b // its process dies here
			m = m.Kill()
			if disks > 1 {
				for _, e := range mustReadDir(t, m, "/disk1/journal") {
					if strings.HasSuffix(e.Name, fileSuffix) {
						flip(t, m, "/disk1/journal/"+e.Name, 6000)
						break
					}
				}
				group := mustReadDir(t, m, "/disk1/spool")[0].Name
				for _, e := range mustReadDir(t, m, "/disk1/spool/"+group) {
					if strings.HasSuffix(e.Name, recordSuffix) {
						if err := m.Remove("/disk1/spool/" + group + "/" + e.Name); err != nil {
							t.Fatal(err)
						}
						break
					}
				}
			}
			for _, name := range []string{"/disk0/journal/x" + vfs.TempSuffix, "/disk0/journal/00ffffff" + fileSuffix} {
				if err := writeSynced(m, name, make([]byte, 8192)); err != nil {
					t.Fatal(err)
				}
			}
			m.SetHook(func(op vfs.Op, name string) error {
				if slices.Contains(changing, op) {
					t.Errorf("%s of %s", op, name)
				}
				return nil
			})
			r, err := OpenToRead(context.Background(), ReadOptions{Dirs: []string{"/disk0"}, FS: m})
			if err != nil {
				t.Fatal(err)
			}
			groups, err := r.Groups()
			if err != nil || len(groups) != 1 || r.Repo() != testRepo || r.Host() != testHost || len(r.Dirs()) != disks {
				t.Fatalf("groups %v, %v, of %s and %s on %v", groups, err, r.Repo(), r.Host(), r.Dirs())
			}
			rj, err := r.Journal(context.Background(), groups[0])
			if err != nil {
				t.Fatal(err)
			}
			rs, err := r.Spool(context.Background(), groups[0])
			if err != nil {
				t.Fatal(err)
			}
			if n := rj.Next(); n != 86 || len(rj.Damaged()) != 0 {
				t.Fatalf("the journal goes on at %d, damaged: %v", n, rj.Damaged())
			}
			checkStock(t, rj, rs)
			checkRead(t, rj, 1, 85, salted(1))
			if bits, err := r.Bitmap(context.Background(), groups[0]); err != nil || bits.Active() {
				t.Fatalf("the bitmap: %v", err)
			}
			m.SetHook(nil)
			if _, err := Open(context.Background(), withFS(o, m)); !errors.As(err, &killed) {
				t.Fatalf("an agent starts on what is being read: %v", err)
			}
			r.Close()
			r.Close()
			// And the next start finds it all.
			b = mustOpen(t, withFS(o, m))
			checkStock(t, mustJournal(t, b), mustSpool(t, b))
			checkRead(t, mustJournal(t, b), 1, 85, salted(1))
			if err := b.Close(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestOpenToRead_SaysWhatIsMissing: what cannot be told is an error, or damage,
// and never left out without a word.
func TestOpenToRead_SaysWhatIsMissing(t *testing.T) {
	m := vfs.NewMem()
	o := testOptions(m, 2)
	b, _, _ := stocked(t, o)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	var setup *SetupError
	gone := m.Clone()
	gone.Vanish("/disk1")
	if _, err := OpenToRead(context.Background(), ReadOptions{Dirs: []string{"/disk0"}, FS: gone}); !errors.As(err, &setup) || setup.Path != "/disk1" {
		t.Errorf("a member is missing: %v", err)
	}
	if _, err := OpenToRead(context.Background(), ReadOptions{Dirs: []string{"/elsewhere"}, FS: m}); !errors.As(err, &setup) || setup.Path != "/elsewhere" {
		t.Errorf("no buffer: %v", err)
	}
	for _, dir := range []string{"/disk0", "/disk1"} {
		for _, e := range mustReadDir(t, m, dir+"/journal") {
			if strings.HasSuffix(e.Name, fileSuffix) {
				flip(t, m, dir+"/journal/"+e.Name, 9000)
			}
		}
	}
	r, err := OpenToRead(context.Background(), ReadOptions{Dirs: []string{"/disk0"}, FS: m})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	groups, _ := r.Groups()
	j, err := r.Journal(context.Background(), groups[0])
	if err != nil || len(j.Damaged()) == 0 {
		t.Fatalf("damage on both disks: %v, %v", j.Damaged(), err)
	}
	var damage *DamageError
	if _, err := j.Read(1, 1<<30, func(block.Write) error { return nil }); !errors.As(err, &damage) {
		t.Errorf("reading what is damaged: %v", err)
	}
}

func withFS(o Options, m *vfs.Mem) Options {
	o.FS = m
	return o
}

func mustReadDir(t *testing.T, m *vfs.Mem, dir string) []vfs.Entry {
	t.Helper()
	entries, err := m.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return entries
}

// flip damages one byte of a file.
func flip(t *testing.T, m *vfs.Mem, name string, off int64) {
	t.Helper()
	f, err := m.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p := make([]byte, 1)
	if _, err := f.ReadAt(p, off); err != nil {
		t.Fatal(err)
	}
	p[0] ^= 0x40
	if _, err := f.WriteAt(p, off); err != nil {
		t.Fatal(err)
	}
}
