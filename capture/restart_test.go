package capture_test

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"os"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"time"

	"drc/capture"
	"drc/internal/vfs"
)

func ctime(t *testing.T, path string) int64 {
	t.Helper()
	var st syscall.Stat_t
	if err := syscall.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ctim.Nano()
}

// signOfLife is a file that holds one.
func signOfLife(ns int64) []byte {
	raw := binary.LittleEndian.AppendUint64(nil, uint64(ns))
	return binary.LittleEndian.AppendUint32(raw, crc32.Checksum(raw, crc32.MakeTable(crc32.Castagnoli)))
}

// TestInspect_DamagedSignOfLife: what was acknowledged is not taken off the volume
// because a file says nothing any more.
func TestInspect_DamagedSignOfLife(t *testing.T) {
	for name, damage := range map[string]func(raw []byte) []byte{
		"empty": func([]byte) []byte { return nil },
		"cut":   func(raw []byte) []byte { return raw[:4] },
		"rot":   func(raw []byte) []byte { raw[7] ^= 0xff; return raw },
	} {
		r := newRig(t, vfs.NewMem(), rigBytes)
		r.write(bytes.Repeat([]byte{7}, 65536), 0)
		if err := r.vol.Settle(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.die()
		lives, err := filepath.Glob(filepath.Join(r.records, "*.life"))
		if err != nil || len(lives) != 1 {
			t.Fatalf("signs of life: %v, %v", lives, err)
		}
		if err := os.WriteFile(lives[0], damage(signOfLife(ctime(t, r.path))), 0o600); err != nil {
			t.Fatal(err)
		}
		finding, _ := r.inspect()
		r.backing.Close()
		if finding != capture.FindingReplay {
			t.Errorf("%s: found %d", name, finding)
		}
	}
}

// TestInspect_FindsAChangeThatSetTheTimeBack dies and has the file changed in
// place by a program that sets an older time of modification, as cp -p does.
func TestInspect_FindsAChangeThatSetTheTimeBack(t *testing.T) {
	for _, change := range []bool{false, true} {
		r := newRig(t, vfs.NewMem(), rigBytes)
		r.write(bytes.Repeat([]byte{7}, 65536), 0)
		if err := r.vol.Settle(t.Context()); err != nil {
			t.Fatal(err)
		}
		r.die()
		// The last sign of life is exact, as it is of an idle agent.
		last := ctime(t, r.path)
		lives, err := filepath.Glob(filepath.Join(r.records, "*.life"))
		if err != nil || len(lives) != 1 {
			t.Fatalf("signs of life: %v, %v", lives, err)
		}
		if err := os.WriteFile(lives[0], signOfLife(last), 0o600); err != nil {
			t.Fatal(err)
		}
		want := capture.FindingReplay
		if change {
			want = capture.FindingForeign
			for ctime(t, r.path) == last { // the file system's clock has ticks
				f, err := os.OpenFile(r.path, os.O_RDWR, 0)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := f.WriteAt([]byte("other"), 4096); err != nil {
					t.Fatal(err)
				}
				f.Close()
				old := time.Unix(1e9, 0)
				if err := os.Chtimes(r.path, old, old); err != nil {
					t.Fatal(err)
				}
			}
		}
		finding, _ := r.inspect()
		r.backing.Close()
		if finding != want {
			t.Errorf("changed %v: found %d, want %d", change, finding, want)
		}
	}
}

// rebooted is a machine that was booted just now.
type rebooted struct {
	capture.Machine
	at time.Time
}

func (r rebooted) Boot() (string, time.Time) { return "another boot", r.at }

// TestClaim_ReplayCutShortAfterAReboot: the power is cut, the next process dies
// while it replays the journal, and the one after that still knows the volume.
func TestClaim_ReplayCutShortAfterAReboot(t *testing.T) {
	r := newRig(t, vfs.NewMem(), rigBytes)
	r.write(bytes.Repeat([]byte{7}, 65536), 0)
	if err := r.vol.Settle(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.die()
	r.machine = rebooted{capture.Kernel(), time.Unix(0, ctime(t, r.path)+1)}
	for range 2 {
		finding, record := r.inspect()
		if finding != capture.FindingReplay {
			t.Fatalf("found %d", finding)
		}
		if err := r.backing.Claim(r.records, record); err != nil {
			t.Fatal(err)
		}
		time.Sleep(20 * time.Millisecond) // the file system's clock has ticks
		if err := r.backing.WriteAt(bytes.Repeat([]byte{8}, 4096), 0); err != nil {
			t.Fatal(err)
		}
		if err := r.backing.Close(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestOpenBacking_OneOfManyMakesIt has several agents make one file at once.
// Who gets it has a whole file, at its path; who does not removes nothing.
func TestOpenBacking_OneOfManyMakesIt(t *testing.T) {
	for range 100 {
		path := filepath.Join(t.TempDir(), "v")
		var mu sync.Mutex
		var got []*capture.Backing
		var all sync.WaitGroup
		for range 4 {
			all.Go(func() {
				b, _, err := capture.OpenBacking(path, capture.BackingOptions{CreateBytes: 4096})
				if err == nil {
					mu.Lock()
					got = append(got, b)
					mu.Unlock()
				}
			})
		}
		all.Wait()
		if len(got) > 1 {
			t.Fatalf("%d have it", len(got))
		}
		for _, b := range got {
			st, err := os.Stat(path)
			if err != nil || st.Size() != 4096 || b.Size() != 4096 {
				t.Fatalf("the file is gone or not whole: size %d, %v", b.Size(), err)
			}
			b.Close()
		}
		if len(got) == 0 {
			t.Fatal("nobody has it")
		}
	}
}

// TestOpenBacking_GoesOnWithWhatADeadStartLeft finds an empty file, as a kill
// between the making of a file and its growing leaves it.
func TestOpenBacking_GoesOnWithWhatADeadStartLeft(t *testing.T) {
	path := filepath.Join(t.TempDir(), "v")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	b, created, err := capture.OpenBacking(path, capture.BackingOptions{CreateBytes: 4096})
	if err != nil || !created || b.Size() != 4096 {
		t.Fatalf("created %v: %v", created, err)
	}
	// It was not made here, so it is not removed here.
	if err := b.Discard(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
	made, _, err := capture.OpenBacking(path+"2", capture.BackingOptions{CreateBytes: 4096})
	if err != nil {
		t.Fatal(err)
	}
	if err := made.Discard(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path + "2"); !os.IsNotExist(err) {
		t.Errorf("a file that was made and discarded: %v", err)
	}
}

// TestInspect_KnowsABackingThatWasMoved renames the backing between two starts.
func TestInspect_KnowsABackingThatWasMoved(t *testing.T) {
	for _, c := range []struct {
		name  string
		clean bool
		touch bool // changed by somebody else as well
		want  capture.Finding
	}{
		{"killed", false, false, capture.FindingReplay},
		{"stopped in order", true, false, capture.FindingClean},
		{"killed, and changed", false, true, capture.FindingForeign},
		{"stopped, and changed", true, true, capture.FindingForeign},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := newRig(t, nil, rigBytes)
			r.write(bytes.Repeat([]byte{7}, 65536), 0)
			if c.clean {
				r.end()
			} else {
				r.die()
			}
			old := r.path
			r.path += ".moved"
			if err := os.Rename(old, r.path); err != nil {
				t.Fatal(err)
			}
			if c.touch {
				later := time.Now().Add(time.Hour)
				if err := os.Chtimes(r.path, later, later); err != nil {
					t.Fatal(err)
				}
			}
			finding, record := r.inspect()
			r.backing.Close()
			if finding != c.want || record == nil || record.Path != old {
				t.Fatalf("found %d with record %+v, want %d", finding, record, c.want)
			}
			if c.want != capture.FindingReplay {
				return
			}
			r.revive()
			if err := capture.ForgetMoved(vfs.OS(), r.records, "volume", old); err != nil {
				t.Fatal(err)
			}
			if gone, err := capture.ReadRecord(r.records, old); gone != nil || err != nil {
				t.Errorf("the record at the old path: %v, %v", gone, err)
			}
			r.end()
			model := make([]byte, rigBytes)
			copy(model, bytes.Repeat([]byte{7}, 65536))
			r.expectFile(model)
		})
	}
}
