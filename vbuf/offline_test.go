package vbuf

import (
	"context"
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"drc/internal/vfs"
)

// TestOffline_MissingMemberIsTakenOut cures a start that fails because a disk is
// gone, with a crash at each step.
func TestOffline_MissingMemberIsTakenOut(t *testing.T) {
	first := vfs.NewMem()
	o := testOptions(first, 3)
	all := o.Dirs
	b, _, _ := stocked(t, o)
	settle(t, b)
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
	first.Vanish("/disk1")
	o.Dirs = []DirOptions{all[0], all[2]}
	var setup *SetupError
	if _, err := Open(context.Background(), o); !errors.As(err, &setup) || !strings.Contains(err.Error(), "drc buffer remove /disk1") {
		t.Fatalf("%v", err)
	}
	list, err := ListOffline(first, []string{"/disk0"})
	if err != nil || len(list) != 3 || list[0].State != "ok" || list[1].State != "missing" || list[1].Path != "/disk1" || list[2].State != "ok" {
		t.Fatalf("%+v, %v", list, err)
	}
	if list[0].JournalBytes == 0 || list[2].SegmentBytes == 0 || list[0].UsedBytes != list[0].JournalBytes+list[0].SegmentBytes || list[1].UsedBytes != 0 {
		t.Errorf("a buffer that holds much is said to hold %+v", list)
	}
	if err := RemoveOffline(first, []string{"/disk0"}, RemoveOptions{Path: "/disk2"}); err == nil || !strings.Contains(err.Error(), "--force") {
		t.Errorf("one that is there: %v", err)
	}
	if err := RemoveOffline(first, []string{"/disk0"}, RemoveOptions{Path: "/disk7"}); !errors.Is(err, ErrNoDisk) {
		t.Errorf("one that is none: %v", err)
	}
	for stop := range 30 {
		m := first.Clone()
		left := stop
		m.SetHook(func(vfs.Op, string) error {
			if left--; left < 0 {
				return errPowerCut
			}
			return nil
		})
		err := RemoveOffline(m, []string{"/disk2"}, RemoveOptions{Path: "/disk1"})
		m.SetHook(nil)
		m = m.Crash(rand.New(rand.NewPCG(uint64(stop), 1)))
		if err != nil { // once more
			if err := RemoveOffline(m, []string{"/disk0"}, RemoveOptions{Path: "/disk1"}); err != nil && !errors.Is(err, ErrNoDisk) {
				t.Fatalf("stop %d: %v", stop, err)
			}
		}
		o.FS = m
		b := mustOpen(t, o)
		j, s := mustJournal(t, b), mustSpool(t, b)
		checkStock(t, j, s)
		settle(t, b)
		checkMirrored(t, j, s)
		if _, err := ListOffline(m, []string{"/disk0"}); !errors.As(err, &setup) {
			t.Fatalf("a buffer at work: %v", err)
		}
		if err := b.Close(); err != nil {
			t.Fatal(err)
		}
	}
}
