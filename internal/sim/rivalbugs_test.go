//go:build !race

package sim

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"testing"

	"drc/capture"
	"drc/internal/object"
	"drc/internal/pipeline"
	"drc/internal/vfs"
)

// rivalBugs are what the simulator of two hosts must find.
var rivalBugs = []plant{
	{name: "a place in a log that the other one has taken counts as the own", onAnswer: func(_ *store, name string, err error) error {
		if isLog(name) && errors.Is(err, object.ErrExists) {
			return nil
		}
		return err
	}},
	{name: "a store keeps no create-only puts", onPut: func(s *store, name string, body []byte) (bool, []byte) {
		if isLog(name) {
			_ = s.mem.Delete(context.Background(), name)
		}
		return true, body
	}},
	{name: "decided by a minority", adjust: func(p *plan) { p.stores = 3 }, onPut: func(s *store, name string, body []byte) (bool, []byte) {
		return !isLog(name) || s.index == 0, body
	}},
	{name: "where history was to be this host's is not noted", onFS: without("life.json")},
	{name: "what was taken over is not noted durably", onFS: without("adopted.json")},
	{name: "the buffer gives back what is not in the history", onJournal: func(j pipeline.Journal) pipeline.Journal {
		return &hasty{Journal: j, releases: true}
	}},
	{name: "some writes to the volume are lost", onDisk: func(d capture.Disk) capture.Disk { return &forgetful{Disk: d} }},
}

// without is a file system on which a file of some name is never there.
func without(name string) func(vfs.FS) vfs.FS {
	return func(f vfs.FS) vfs.FS { return &lossyFS{f, name} }
}

type lossyFS struct {
	vfs.FS
	name string
}

func (l *lossyFS) Rename(from, to string) error {
	if err := l.FS.Rename(from, to); err != nil || path.Base(to) != l.name {
		return err
	}
	return l.Remove(to)
}

// forgetful is a disk of which every tenth write is lost.
type forgetful struct {
	capture.Disk
	n int
}

func (d *forgetful) WriteVec(parts [][]byte, off int64) (n int, err error) {
	if d.n++; d.n%10 != 0 {
		return d.Disk.WriteVec(parts, off)
	}
	for _, p := range parts {
		n += len(p)
	}
	return n, nil
}

// TestTwoHosts_Planted: the simulator of two hosts finds bugs.
func TestTwoHosts_Planted(t *testing.T) {
	for _, b := range rivalBugs {
		t.Run(strings.ReplaceAll(b.name, " ", "_"), func(t *testing.T) {
			for seed := uint64(1); seed <= plantedSeeds; seed++ {
				if _, _, err := runPair(t, seed, &b); err != nil {
					t.Logf("found by seed %d: %.200s", seed, err)
					fmt.Printf("%-60s seed %d: %.150s\n", b.name, seed, err)
					return
				}
			}
			t.Errorf("not found by %d seeds: %s", plantedSeeds, b.name)
		})
	}
}
