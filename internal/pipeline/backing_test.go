package pipeline_test

import (
	"bytes"
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/control"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/object"
	"drc/internal/object/mem"
	"drc/internal/pipeline"
	"drc/internal/repo"
	"drc/internal/state"
	"drc/vbuf"
)

// sick is the real machine, with disks whose syncs fail while it is sick.
type sick struct {
	capture.Machine
	is atomic.Bool
}

func (m *sick) OpenDisk(path string, o capture.BackingOptions) (capture.Disk, error) {
	d, err := m.Machine.OpenDisk(path, o)
	return &sickDisk{d, m}, err
}

type sickDisk struct {
	capture.Disk
	m *sick
}

func (d *sickDisk) Sync() error {
	if d.m.is.Load() {
		return fmt.Errorf("sync: %w", unix.EIO)
	}
	return d.Disk.Sync()
}

// TestBackingFails_StateAndHistory: an agent whose volume's disk fails says so and
// what to do, goes on to bring to the stores what clients write, and is well again
// by itself.
func TestBackingFails_StateAndHistory(t *testing.T) {
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
	m := &sick{Machine: capture.Kernel()}
	a, err := pipeline.Open(ctx, pipeline.Config{
		Repo: r, Ring: crypt.NewRing(id), Agent: crypttest.Agent(t), State: st, RPO: 20 * time.Millisecond, Embedded: true, Machine: m,
		Buffer:  []vbuf.DirOptions{{Path: filepath.Join(dir, "state", "buffer"), SizeBytes: 64 << 20}},
		Volumes: []pipeline.VolumeConfig{{Name: "v", Path: filepath.Join(dir, "v.img"), SizeBytes: 4 << 20}},
	})
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- a.Run(ctx) }()
	<-a.Ready()
	dev, ok := a.Device("v")
	if !ok {
		t.Fatal("there is no device v")
	}
	write := func(i byte) {
		t.Helper()
		if err := dev.WriteAt(ctx, bytes.Repeat([]byte{i}, 4096), int64(i)*4096, block.WriteOptions{FUA: true}); err != nil {
			t.Fatal(err)
		}
	}
	await := func(what string, ok func(control.Group) bool) control.Group {
		t.Helper()
		for until := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
			g := a.Status().Groups[0]
			if ok(g) {
				return g
			}
			if time.Now().After(until) {
				t.Fatalf("waited in vain until %s: %+v", what, g)
			}
		}
	}
	write(1)
	m.is.Store(true)
	g := await("it says that the disk fails", func(g control.Group) bool { return g.State == "error" })
	for _, part := range []string{"volume v", "v.img", "nothing that was acknowledged is lost", "--with-buffer"} {
		if !strings.Contains(g.Message, part) {
			t.Errorf("the message lacks %q: %s", part, g.Message)
		}
	}
	if g.Volumes[0].Error == "" {
		t.Error("the volume has no error")
	}
	write(2)
	await("the history goes on", func(g control.Group) bool { return g.Committed == g.Captured })
	m.is.Store(false)
	await("it is well again", func(g control.Group) bool { return g.State == "continuous" })
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if err := st.Close(); err != nil {
		t.Error(err)
	}
}
