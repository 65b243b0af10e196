//go:build !race

package sim

import (
	"context"
	"fmt"
	"log/slog"
	"path"
	"strings"
	"sync"
	"testing"
	"time"

	"drc/capture"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/dedup"
	"drc/internal/pipeline"
	"drc/internal/vfs"
)

// bugs are what the simulator must find. Each is put into a seam of the agent, so
// that the agent behaves as if it had that bug.
var bugs = []plant{
	{name: "acknowledged before the journal has it", onJournal: func(j pipeline.Journal) pipeline.Journal {
		return &hasty{Journal: j, acks: true}
	}},
	{name: "every other flush does nothing", onJournal: func(j pipeline.Journal) pipeline.Journal {
		return &hasty{Journal: j, flushes: true}
	}},
	{name: "the backing is written ahead of the journal's durable end", onJournal: func(j pipeline.Journal) pipeline.Journal {
		return &hasty{Journal: j, ahead: true}
	}},
	{name: "the journal is released before backing and stores have it", onJournal: func(j pipeline.Journal) pipeline.Journal {
		return &hasty{Journal: j, releases: true}
	}},
	{name: "two writes of the journal are read in the other order", onJournal: func(j pipeline.Journal) pipeline.Journal {
		return &swapped{j}
	}},
	{name: "directories are not synced", onFS: sloppy(nil, func(string) bool { return true })},
	{name: "journal files are not synced", onFS: sloppy(func(name string) bool {
		return strings.Contains(name, "/buffer/") && strings.Contains(name, "/journal/")
	}, nil)},
	{name: "kept shards are not synced before their record", onFS: sloppy(func(name string) bool { return strings.HasSuffix(name, ".shard") }, nil)},
	{name: "a record of a kept batch is not synced", onFS: sloppy(func(name string) bool { return strings.Contains(name, ".batch") }, nil)},
	{name: "the record of a backing is not synced", onFS: sloppy(func(name string) bool { return strings.Contains(name, "/backings/") }, nil)},
	{name: "an epoch is not durable before its promise", onFS: sloppy(func(name string) bool { return strings.Contains(name, "epochs.json") }, func(dir string) bool { return strings.HasPrefix(dir, "/state/groups") })},
	{name: "a key set is not durable before its segments", onFS: sloppy(func(name string) bool { return strings.Contains(name, "/keysets/") }, func(dir string) bool { return path.Base(dir) == "keysets" })},
	{name: "that volumes must be compared is not noted", adjust: loses, onFS: without("resyncs.json")},
	{name: "that volumes must be compared is not durable", adjust: loses, onFS: sloppy(func(name string) bool { return strings.Contains(name, "resyncs.json") }, nil)},
	{name: "a backing is not synced before its record", onDisk: func(d capture.Disk) capture.Disk { return unsynced{d} }},
	{name: "forgotten in the overlay before the backing has it", onDisk: func(d capture.Disk) capture.Disk { return &lazy{Disk: d} }},
	{name: "a commit before its shards", onPut: func(s *store, name string, body []byte) (bool, []byte) {
		return !isShard(name) || !oneIn(s.w.dice.of("bug", name), 4), body
	}},
	{name: "an entry is called decided where it was not appended", onPut: func(s *store, name string, body []byte) (bool, []byte) {
		return !isLog(name) || !oneIn(s.w.dice.of("bug", name), 20), body
	}},
	{name: "one shard in the place of another", adjust: func(p *plan) { p.stores, p.rpo, p.maxWrite = 3, time.Second, 64<<10 }, onPut: swapShard},
	{name: "dedup gives the wrong chunk", onIndex: func(open pipeline.OpenIndex) pipeline.OpenIndex {
		return func(dir string, g block.GroupID, b block.BranchID, n uint64, l *slog.Logger) (pipeline.Index, error) {
			x, err := open(dir, g, b, n, l)
			return &confused{Index: x}, err
		}
	}},
}

// hasty is a journal that says of things that they are done before they are.
type hasty struct {
	pipeline.Journal
	acks, flushes, ahead, releases bool

	mu      sync.Mutex
	last    block.Seq
	flushed int
}

func (j *hasty) Enqueue(w block.Write) {
	j.mu.Lock()
	j.last = w.Seq
	j.mu.Unlock()
	j.Journal.Enqueue(w)
}

func (j *hasty) WaitWritten(ctx context.Context, seq block.Seq) error {
	if j.acks {
		return nil
	}
	return j.Journal.WaitWritten(ctx, seq)
}

func (j *hasty) Flush(ctx context.Context) error {
	j.mu.Lock()
	j.flushed++
	skip := j.flushes && j.flushed%2 == 0 // who needs it asks again
	j.mu.Unlock()
	if skip {
		return nil
	}
	return j.Journal.Flush(ctx)
}

func (j *hasty) Durable() block.Seq {
	j.mu.Lock()
	defer j.mu.Unlock()
	if j.ahead {
		return max(j.last, j.Journal.Durable())
	}
	return j.Journal.Durable()
}

func (j *hasty) Release(upTo block.Seq) {
	if j.releases {
		upTo = j.Journal.Durable()
	}
	j.Journal.Release(upTo)
}

// swapped is a journal of which some writes are read in each other's place.
type swapped struct{ pipeline.Journal }

func (j *swapped) Read(from block.Seq, limit int64, visit func(block.Write) error) (block.Seq, error) {
	var held *block.Write
	next, err := j.Journal.Read(from, limit, func(w block.Write) error {
		if held == nil && w.Seq%5 == 0 {
			w.Data = append([]byte(nil), w.Data...)
			held = &w
			return nil
		}
		if held != nil {
			first := *held
			held = nil
			first.Seq, w.Seq = w.Seq, first.Seq
			if err := visit(w); err != nil {
				return err
			}
			return visit(first)
		}
		return visit(w)
	})
	if err == nil && held != nil {
		err = visit(*held)
	}
	return next, err
}

// sloppyFS leaves out syncs.
type sloppyFS struct {
	vfs.FS
	file, dir func(name string) bool
}

func sloppy(file, dir func(string) bool) func(vfs.FS) vfs.FS {
	never := func(string) bool { return false }
	if file == nil {
		file = never
	}
	if dir == nil {
		dir = never
	}
	return func(f vfs.FS) vfs.FS { return &sloppyFS{f, file, dir} }
}

func (s *sloppyFS) SyncDir(dir string) error {
	if s.dir(dir) {
		return nil
	}
	return s.FS.SyncDir(dir)
}

func (s *sloppyFS) Create(name string) (vfs.File, error) { return s.wrap(name)(s.FS.Create(name)) }
func (s *sloppyFS) Open(name string) (vfs.File, error)   { return s.wrap(name)(s.FS.Open(name)) }

func (s *sloppyFS) wrap(name string) func(vfs.File, error) (vfs.File, error) {
	return func(f vfs.File, err error) (vfs.File, error) {
		if err != nil || !s.file(name) {
			return f, err
		}
		return sloppyFile{f}, nil
	}
}

type sloppyFile struct{ vfs.File }

func (sloppyFile) Sync() error { return nil }

// unsynced is a disk that is never synced.
type unsynced struct{ capture.Disk }

func (unsynced) Sync() error { return nil }

// lazy is a disk that is written to at the next sync only.
type lazy struct {
	capture.Disk
	mu   sync.Mutex
	todo []func() error
}

func (d *lazy) WriteVec(parts [][]byte, off int64) (n int, err error) {
	var p []byte
	for _, x := range parts {
		p = append(p, x...)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.todo = append(d.todo, func() error {
		_, err := d.WriteAt(p, off)
		return err
	})
	return len(p), nil
}

func (d *lazy) Sync() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, do := range d.todo {
		if err := do(); err != nil {
			return err
		}
	}
	d.todo = nil
	return d.Disk.Sync()
}

// swapShard puts the bytes of one shard in the place of another one: of both parity
// shards where a segment has two of data (2+2), of data where it has more.
func swapShard(s *store, name string, body []byte) (bool, []byte) {
	const last, other = ".03", ".02"
	if isShard(name) && strings.HasSuffix(name, other) {
		s.w.mu.Lock()
		defer s.w.mu.Unlock()
		if s.w.swapped == nil {
			s.w.swapped = map[string][]byte{}
		}
		s.w.swapped[strings.TrimSuffix(name, other)] = body
	}
	if isShard(name) && strings.HasSuffix(name, last) {
		s.w.mu.Lock()
		defer s.w.mu.Unlock()
		if p := s.w.swapped[strings.TrimSuffix(name, last)]; p != nil {
			return true, p
		}
	}
	return true, body
}

// confused is an index that sometimes takes one chunk for another.
type confused struct {
	pipeline.Index
	mu  sync.Mutex
	old []dedup.Location
}

func (x *confused) Lookup(id crypt.ChunkID) (dedup.Location, bool) {
	l, ok := x.Index.Lookup(id)
	x.mu.Lock()
	defer x.mu.Unlock()
	if !ok {
		return l, ok
	}
	for _, o := range x.old {
		if o != l {
			return o, true
		}
	}
	x.old = append(x.old, l)
	return l, ok
}

// plantedSeeds is within how many seeds each bug must be found.
const plantedSeeds = 100

// TestPlanted: the simulator finds bugs.
func TestPlanted(t *testing.T) {
	for _, b := range bugs {
		t.Run(strings.ReplaceAll(b.name, " ", "_"), func(t *testing.T) {
			for seed := uint64(1); seed <= plantedSeeds; seed++ {
				if o := runSeed(t, seed, &b, false); o.err != nil {
					t.Logf("found by seed %d: %.200s", seed, o.err)
					fmt.Printf("%-60s seed %d: %.150s\n", b.name, seed, o.err)
					return
				}
			}
			t.Errorf("not found by %d seeds: %s", plantedSeeds, b.name)
		})
	}
}

// loses has all of the buffer be lost in every world.
func loses(p *plan) { p.loses, p.badBackings, p.tightDisk = true, false, false }
