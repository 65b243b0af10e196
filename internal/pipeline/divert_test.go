package pipeline

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/object"
	"drc/internal/object/mem"
	"drc/internal/repo"
	"drc/internal/state"
	"drc/vbuf"
)

// syncs is the real machine, with disks that ask before each sync.
type syncs struct {
	capture.Machine
	before atomic.Pointer[func() error]
}

func (m *syncs) set(before func() error) { m.before.Store(&before) }

func (m *syncs) OpenDisk(path string, o capture.BackingOptions) (capture.Disk, error) {
	d, err := m.Machine.OpenDisk(path, o)
	return &syncsDisk{d, m}, err
}

type syncsDisk struct {
	capture.Disk
	m *syncs
}

func (d *syncsDisk) Sync() error {
	if err := (*d.m.before.Load())(); err != nil {
		return err
	}
	return d.Disk.Sync()
}

// runGroup runs an agent with one volume, which has been written to.
func runGroup(t *testing.T, m *syncs) (*Agent, *group) {
	t.Helper()
	m.set(func() error { return nil })
	ctx, cancel := context.WithCancel(context.Background())
	id := crypttest.Identity(t)
	r, err := repo.Create(ctx, []object.Store{mem.New(mem.Options{Name: "s"})}, id.Root, repo.DefaultProfile(1), id.Recipients(), time.Now().UnixNano())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	st, err := state.Open(filepath.Join(dir, "state"))
	if err == nil {
		err = st.Lock()
	}
	if err != nil {
		t.Fatal(err)
	}
	a, err := Open(ctx, Config{
		Repo: r, Ring: crypt.NewRing(id), Agent: crypttest.Agent(t), State: st, RPO: 20 * time.Millisecond, Embedded: true, Machine: m,
		Buffer:  []vbuf.DirOptions{{Path: filepath.Join(dir, "buffer"), SizeBytes: 64 << 20}},
		Volumes: []VolumeConfig{{Name: "v", Path: filepath.Join(dir, "v.img"), SizeBytes: 4 << 20}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	<-a.Ready()
	t.Cleanup(func() {
		m.set(func() error { return nil })
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
		if err := st.Close(); err != nil {
			t.Error(err)
		}
	})
	dev, _ := a.Device("v")
	if err := dev.WriteAt(ctx, bytes.Repeat([]byte{1}, 4096), 4096, block.WriteOptions{FUA: true}); err != nil {
		t.Fatal(err)
	}
	return a, a.all()[0]
}

// until waits for something that must come.
func until(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain until %s", what)
		}
	}
}

// TestLoss_TriedUntilTheGapHasBegun: a stretch of the journal is lost while the
// volume's disk fails. The gap begins as soon as the disk works, also if no writer
// waits for room: nothing else would ever tell that the history lacks something.
func TestLoss_TriedUntilTheGapHasBegun(t *testing.T) {
	t.Parallel()
	m := &syncs{Machine: capture.Kernel()}
	a, g := runGroup(t, m)
	tried := make(chan struct{}, 100)
	m.set(func() error {
		select {
		case tried <- struct{}{}:
		default:
		}
		return fmt.Errorf("sync: %w", unix.EIO)
	})
	a.lossOf(vbuf.Loss{Group: g.st.ID, Range: vbuf.Range{From: 1, To: 1}})
	<-tried
	time.Sleep(100 * time.Millisecond) // the first try ends
	m.set(func() error { return nil })
	until(t, "the gap has begun", g.capture.Diverted)
	until(t, "writes go through the journal again", func() bool { return !g.capture.Diverted() })
	// All that was captured is history, so that nothing has to be compared.
	until(t, "the gap has ended", func() bool { return g.inGap().IsZero() })
}

// TestLoss_WhileTheWritesAreTakenPastTheJournal: a part of the buffer is found to be
// lost while the writes are on their way past the journal because all of it is. The
// one that comes second leaves the first one's work as it is: nothing may be cut
// from then on.
func TestLoss_WhileTheWritesAreTakenPastTheJournal(t *testing.T) {
	t.Parallel()
	m := &syncs{Machine: capture.Kernel()}
	a, g := runGroup(t, m)
	begun, goOn := make(chan struct{}, 100), make(chan struct{})
	m.set(func() error {
		begun <- struct{}{}
		<-goOn
		return nil
	})
	g.capture.Hold()
	g.lost <- struct{}{}
	<-begun
	a.lossOf(vbuf.Loss{Group: g.st.ID, Range: vbuf.Range{From: 1, To: 1}})
	time.Sleep(200 * time.Millisecond) // it is noticed
	close(goOn)
	until(t, "the writes go past the journal", g.capture.Diverted)
	for range 20 {
		if time.Sleep(10 * time.Millisecond); !g.seg.IsQuiet() {
			t.Fatal("the segmenter goes on while writes go past the journal")
		}
	}
	if err := g.capture.Refusal(); err != nil {
		t.Errorf("writes are refused: %v", err)
	}
}
