package pipeline

import (
	"errors"
	"testing"

	"drc/internal/control"
	"drc/internal/state"
	"drc/internal/vfs"
	"drc/vbuf"
)

// A directory was added at work and dropped since, and those that it was a member with
// are gone, too: a start refuses it. It is in no configuration, and can be taken out.
func TestRemoveBufferOffline_OfAnotherBuffer(t *testing.T) {
	m := vfs.NewMem()
	dir, err := state.OpenOn(m, "/state")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	open := func(paths ...string) error {
		var dirs []vbuf.DirOptions
		for _, p := range paths {
			dirs = append(dirs, vbuf.DirOptions{Path: p, SizeBytes: 16 << 20})
		}
		b, err := vbuf.Open(t.Context(), vbuf.Options{Dirs: dirs, FS: m})
		if err != nil {
			return err
		}
		return b.Close()
	}
	for _, paths := range [][]string{{"/stale"}, {"/last"}, {"/last", "/joined"}} {
		if err := open(paths...); err != nil {
			t.Fatal(err)
		}
	}
	n := bufferNotes{Added: []bufferDir{{Path: "/stale"}, {Path: "/last"}, {Path: "/joined"}}, Removed: []string{dir.Path("buffer")}}
	if err := dir.SaveJSON(n, bufferFile); err != nil {
		t.Fatal(err)
	}
	var setup *vbuf.SetupError
	if err := open("/stale", "/last", "/joined"); !errors.As(err, &setup) {
		t.Fatalf("two buffers are opened as one: %v", err)
	}
	if err := RemoveBufferOffline(dir, control.BufferRequest{Path: setup.Path}); err != nil {
		t.Fatal(err)
	}
	dirs, err := BufferDirs(dir, nil)
	if err != nil || len(dirs) != 2 || setup.Path != "/stale" {
		t.Errorf("the next start uses %v: %v", dirs, err)
	}
	var coded *control.CodedError
	if err := RemoveBufferOffline(dir, control.BufferRequest{Path: "/never"}); !errors.As(err, &coded) || coded.Code != 3 {
		t.Errorf("one that was never there: %v", err)
	}
}

// All disks of a buffer are gone for good but one that had just joined, of which the
// agent had not noted yet where it is. A start with it says that another one is
// missing; then that can be taken out.
func TestRemoveBufferOffline_OfWhatAStartCouldNotUse(t *testing.T) {
	m := vfs.NewMem()
	dir, err := state.OpenOn(m, "/state")
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	open := func(paths ...string) error {
		var dirs []vbuf.DirOptions
		for _, p := range paths {
			dirs = append(dirs, vbuf.DirOptions{Path: p, SizeBytes: 16 << 20})
		}
		b, err := vbuf.Open(t.Context(), vbuf.Options{Dirs: dirs, FS: m})
		if len(paths) == 1 { // else the agent went down before it noted the other one
			if err := noteBuffer(dir, dirs, err == nil); err != nil {
				t.Fatal(err)
			}
		}
		if err != nil {
			return err
		}
		return b.Close()
	}
	for _, paths := range [][]string{{"/old"}, {"/old", "/joined"}} {
		if err := open(paths...); err != nil {
			t.Fatal(err)
		}
	}
	m.Vanish("/old")
	var setup *vbuf.SetupError
	if err := open("/joined"); !errors.As(err, &setup) || setup.Path != "/old" {
		t.Fatalf("a start without one of two directories: %v", err)
	}
	if b, err := ListBufferOffline(dir); err != nil || len(b.Disks) != 2 {
		t.Errorf("the list has %+v: %v", b.Disks, err)
	}
	if err := RemoveBufferOffline(dir, control.BufferRequest{Path: setup.Path}); err != nil {
		t.Fatal(err)
	}
	if err := open("/joined"); err != nil {
		t.Errorf("without it: %v", err)
	}
}
