package capture_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/vfs"
	"drc/vbuf"
)

// lastMarks are marks that only know whether they count.
type lastMarks struct{ active bool }

func (m *lastMarks) Add(block.VolumeIndex, block.Extent)                         {}
func (m *lastMarks) Activate(time.Time) error                                    { m.active = true; return nil }
func (m *lastMarks) Mark(context.Context, block.VolumeIndex, block.Extent) error { return nil }
func (m *lastMarks) Deactivate() error                                           { m.active = false; return nil }

// TestDivert_FailsBehindTheJournal: while writes are taken past the journal the
// backing gets what the journal has not durable. If that then fails, and the marks
// are given up, the journal must have it: after a power cut it would be on the volume
// and in no history.
func TestDivert_FailsBehindTheJournal(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprintf("seed%d", seed), func(t *testing.T) {
			m := &dying{Machine: capture.Kernel()}
			r := newRigOn(t, m, vfs.NewMem(), 1<<20)
			r.write(bytes.Repeat([]byte{1}, 8192), 0)
			if err := r.vol.Flush(context.Background()); err != nil {
				t.Fatal(err)
			}
			want := bytes.Repeat([]byte{2}, 8192)
			r.write(want, 65536)
			r.write(want, 196608)
			n := 0
			m.set(func(op string) bool { // the backing fails when some of it is written
				if op == "write" {
					n++
				}
				return n > 2
			})
			marks := &lastMarks{}
			if _, err := r.group.Divert(context.Background(), marks, 0); !errors.Is(err, unix.EIO) {
				t.Fatalf("diverted: %v", err)
			}
			if r.group.Diverted() {
				t.Fatal("writes go past the journal after an error")
			}
			captured := r.group.Captured()
			if !bytes.Contains(r.file(), want) {
				t.Fatal("nothing was written to the backing")
			}
			if err := r.vol.Abandon(); err != nil {
				t.Fatal(err)
			}
			r.fs = r.fs.Crash(rand.New(rand.NewPCG(seed, 1)))
			r.buf.Close()
			if last := r.openBuffer(); last < captured && !marks.active {
				t.Errorf("the volume has seq %s, the journal ends at %s, and nothing is marked", captured, last)
			}
			_ = r.buf.Close()
		})
	}
}

// lostJournal is one whose flush says to try again, as one that is lost does.
type lostJournal struct{ *vbuf.Journal }

func (lostJournal) Flush(context.Context) error { return capture.ErrDiverted }

// TestDivert_FailsWithALostJournal: what a Divert fails with is told to writers, and
// must not say to them that they shall try again.
func TestDivert_FailsWithALostJournal(t *testing.T) {
	m := &dying{Machine: capture.Kernel()}
	r := newRigOn(t, m, vfs.NewMem(), 1<<20)
	r.group = capture.NewGroup(lostJournal{r.journal}, 0, nil)
	var err error
	if r.vol, err = capture.New(r.group, capture.Options{Name: "v", Index: 1, Backing: r.backing, SectorSize: 512, RecordDir: r.records}, 0); err != nil {
		t.Fatal(err)
	}
	r.write(bytes.Repeat([]byte{2}, 8192), 65536)
	m.set(func(op string) bool { return op == "write" })
	marks := &lastMarks{}
	_, err = r.group.Divert(context.Background(), marks, 0)
	if err == nil || errors.Is(err, capture.ErrDiverted) || !errors.Is(err, unix.EIO) {
		t.Errorf("diverted: %v", err)
	}
	if !marks.active {
		t.Error("the marks were given up, and the journal does not have what may be on the backing")
	}
	if err := r.vol.Abandon(); err != nil {
		t.Fatal(err)
	}
	_ = r.buf.Close()
}
