package pipeline

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"sync"
	"time"

	"drc/internal/block"
	"drc/internal/erasure"
	"drc/internal/format"
	"drc/internal/object"
	"drc/internal/repo"
	"drc/internal/segment"
	"drc/internal/vfs"
	"drc/restorer"
	"drc/uploader"
)

// Shards that nobody holds.
//
// While a store is down entries become history with fewer shards than there should
// be, and the buffer keeps the others until the store is back. Where that buffer is
// not this host's, after a takeover, or was lost, nobody would bring them: the loss of
// one more store could then take history away although so many are allowed to be lost.
//
// So it is noted, durably and before the old buffer is given up, that there may be such
// shards. While the note is there, the entries of the history that were degraded are
// looked through; of their segments the shards that their stores lack are made again
// from others, as the bytes that they were, and brought. The note goes when none is
// missing any more. A crash anywhere leaves the note, and to bring a shard twice
// changes nothing.

// lackingFile is the note in the state folder of a group.
const lackingFile = "lacking.json"

func (f groupFiles) noteLacking() error { return f.dir.SaveJSON(struct{}{}, f.path(lackingFile)...) }

// lacking is whether there may be shards of the history that neither their stores nor
// this host's buffer have.
type lacking struct {
	files groupFiles
	wake  chan struct{} // holds one when it is noted

	mu    sync.Mutex
	since int // counts the notes; 0: there is none
}

func (l *lacking) load(f groupFiles) error {
	var none struct{}
	found, err := f.dir.LoadJSON(&none, f.path(lackingFile)...)
	l.files, l.wake = f, make(chan struct{}, 1)
	if found {
		l.told()
	}
	return err
}

// note notes it, durably.
func (l *lacking) note() error {
	if err := l.files.noteLacking(); err != nil {
		return err
	}
	l.told()
	return nil
}

func (l *lacking) told() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.since++
	tell(l.wake)
}

func (l *lacking) noted() bool { return l.at() > 0 }

// at tells one note from a later one.
func (l *lacking) at() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.since
}

// forget removes the note, unless there is a later one than at.
func (l *lacking) forget(at int) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.since != at {
		return nil
	}
	if err := vfs.RemoveAll(l.files.dir.Files(), l.files.dir.Path(l.files.path(lackingFile)...)); err != nil {
		return err
	}
	l.since = 0
	return nil
}

// Pauses between two looks at what is missing.
const (
	leastLackingPause = 30 * time.Second
	mostLackingPause  = 10 * time.Minute
)

// restoreRedundancy brings the shards that are noted to be missing.
func (g *group) restoreRedundancy(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case <-g.lacking.wake:
		}
		said := ""
		for pause := leastLackingPause; g.lacking.noted(); pause = min(2*pause, mostLackingPause) {
			if g.log.AwaitOffice(ctx) != nil { // who is not in office does not know what is history
				return
			}
			at := g.lacking.at()
			err := g.bringLacking(ctx)
			if err == nil {
				if err = g.lacking.forget(at); err == nil {
					continue
				}
			}
			if ctx.Err() != nil {
				return
			}
			if err.Error() != said {
				said = err.Error()
				g.logger.Warn("some of the history may lack shards on the stores, and they cannot be made again yet; trying again", "error", err)
			}
			if sleep(ctx, pause) != nil {
				return
			}
		}
	}
}

// bringLacking goes through the history. A segment that cannot be made whole now is
// no reason to leave out the others; the error is that of one of them.
func (g *group) bringLacking(ctx context.Context) error {
	end := decidedBy(g.log)
	if end.N == 0 {
		return nil
	}
	cfg := g.a.restorerConfig()
	cfg.UpTo = &end
	cfg.CacheDir = "" // another one may have it open
	h, err := restorer.OpenHistory(ctx, cfg, g.st.ID)
	if err != nil {
		return err
	}
	defer h.Close()
	made, segments := 0, 0
	var failed error
	err = h.Each(ctx, 1, func(e *restorer.Entry) bool {
		for _, d := range e.Degraded {
			n, err := g.makeWhole(ctx, d)
			if ctx.Err() != nil {
				return false
			}
			if made += n; n > 0 {
				segments++
			}
			switch {
			case errors.Is(err, erasure.ErrTooFew):
				g.logger.Error("a segment of the history cannot be made whole again: what it holds is lost unless a store finds more of it", "entry", e.N, "segment", d.Segment, "error", err)
			case err != nil:
				failed = fmt.Errorf("entry %d: %w", e.N, err)
			}
		}
		return true
	})
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		return err
	}
	if made > 0 {
		g.logger.Info("shards that the stores lacked were made again from others", "shards", made, "segments", segments)
	}
	return failed
}

// makeWhole brings the shards of a segment that their stores lack, and returns how
// many. An error that wraps erasure.ErrTooFew is for good: all stores have answered.
func (g *group) makeWhole(ctx context.Context, d format.Degraded) (made int, err error) {
	select {
	case g.a.repairing <- struct{}{}:
		defer func() { <-g.a.repairing }()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
	objects, missing, unsure, err := g.remake(ctx, d)
	if err != nil {
		return 0, err
	}
	brought := make(chan error, len(objects))
	for i := range objects {
		if missing&(1<<i) != 0 {
			g.up.Replace(uploader.Shard{Segment: d.Segment, Index: i}, objects[i], func(err error) { brought <- err })
		}
	}
	clear(objects)
	for range bits.OnesCount64(missing) {
		select { // without a time-out: what is queued holds its memory until it is brought
		case err := <-brought:
			if err != nil {
				unsure = errors.Join(unsure, err)
			} else {
				made++
			}
		case <-ctx.Done():
			return made, ctx.Err()
		}
	}
	return made, unsure
}

// remake makes the shards of a segment again that their stores say they lack: the bits
// of missing. unsure says why some store could not be asked.
func (g *group) remake(ctx context.Context, d format.Degraded) (objects [][]byte, missing uint64, unsure, err error) {
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	h, err := g.headerOf(ctx, d)
	if err != nil {
		return nil, 0, nil, err
	}
	there := uint64(0)
	for i := range h.Profile.Total() {
		m, name := g.shardAt(d.Segment, i)
		err := errNotAtHand
		if m.Store != nil {
			_, err = m.Store.Stat(ctx, name)
		}
		switch {
		case err == nil:
			there |= 1 << i
		case errors.Is(err, object.ErrNotFound):
			missing |= 1 << i
		default:
			unsure = fmt.Errorf("look for %s on %s: %w", name, m.URL(), err)
		}
	}
	if missing == 0 {
		return nil, 0, unsure, nil
	}
	if err := g.loadKeySet(h.KeySet); err != nil {
		return nil, 0, nil, err
	}
	keys, _ := g.a.cfg.Ring.Set(h.KeySet)
	objects = make([][]byte, h.Profile.Total())
	bad := error(nil)
	for i, have := 0, 0; i < len(objects) && have < h.Profile.Data; i++ {
		if there&(1<<i) == 0 {
			continue
		}
		raw, err := g.fetchShard(ctx, d.Segment, i)
		if err == nil {
			_, _, err = segment.VerifyShard(keys, fmt.Sprintf("shard %d of segment %s", i, d.Segment), d.Segment, i, raw)
		}
		var damage *format.CorruptError
		switch {
		case err == nil:
			objects[i] = raw
			have++
		case errors.As(err, &damage):
			bad = err
			g.logger.Error("a shard on a store is damaged; others of its segment serve", "segment", d.Segment, "index", i, "error", err)
		default:
			unsure = err
		}
	}
	err = segment.Repair(keys, d.Segment, objects, missing)
	switch {
	case errors.Is(err, erasure.ErrTooFew) && unsure != nil: // there may be more of them than was seen
		return nil, 0, nil, unsure
	case err != nil:
		return nil, 0, nil, errors.Join(err, bad)
	}
	return objects, missing, unsure, nil
}

// headerOf reads what all shards of a segment say of it.
func (g *group) headerOf(ctx context.Context, d format.Degraded) (format.ShardHeader, error) {
	var unsure error
	for i := range max(g.a.cfg.Repo.Profile().Total(), bits.Len64(d.Placed)) {
		m, name := g.shardAt(d.Segment, i)
		err := errNotAtHand
		if m.Store != nil {
			var raw []byte
			if raw, err = m.Store.GetRange(ctx, name, 0, format.ShardHeaderSize, nil); err == nil {
				var h format.ShardHeader
				if h, err = format.DecodeShardHeader(name, raw); err == nil && h.Segment == d.Segment {
					return h, nil
				}
			}
		}
		var damage *format.CorruptError
		if err != nil && !errors.Is(err, object.ErrNotFound) && !errors.As(err, &damage) {
			unsure = fmt.Errorf("read %s from %s: %w", name, m.URL(), err)
		}
	}
	if unsure != nil {
		return format.ShardHeader{}, unsure
	}
	return format.ShardHeader{}, fmt.Errorf("segment %s: no store has a shard of it: %w", d.Segment, erasure.ErrTooFew)
}

// errNotAtHand: a store was not there when the agent began.
var errNotAtHand = errors.New("it is not at hand")

// shardAt is where a shard belongs, and its name there.
func (g *group) shardAt(s block.SegmentID, i int) (repo.Member, string) {
	members := g.a.gated.Members
	return members[repo.ShardMember(s, i, len(members))], format.SegmentName(g.st.ID, s, format.ExpiryNone, i)
}
