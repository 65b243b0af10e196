package restorer

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/manifest"
)

const (
	// restoreConcurrency is how many segments are worked on at a time.
	restoreConcurrency = 16
	// A pass takes consecutive windows of the volume until it has so many
	// extents, and fetches each frame that they need once.
	passExtents = 192 << 10
	// progressInterval is how often Options.Progress is called.
	progressInterval = 200 * time.Millisecond
	// maxRow is how many parts one call writes.
	maxRow = 512
)

// Options of Restore. The zero value is fit for use.
type Options struct {
	// Force replaces a file and overwrites a device that holds data.
	Force bool
	// Progress is told now and then how far the restore is, never from two
	// goroutines at once.
	Progress func(Progress)
	// Concurrency is how many segments are worked on at a time; 0 means 16.
	Concurrency int
}

// Progress is how far a restore is.
type Progress struct {
	VolumeBytes  int64
	DoneBytes    int64 // of the volume, in whole regions
	FetchedBytes int64
}

// Summary is what a restore did.
type Summary struct {
	Point        Point
	Target       string
	VolumeBytes  int64
	FetchedBytes int64 // from the stores, this run
	WrittenBytes int64 // to the target, this run
	ZeroBytes    int64 // of the volume, this run: they cost nothing in a new file
	ResumedBytes int64 // that an earlier run had done
	Requests     int64
	Duration     time.Duration
	Damage       []Damage // found, and worked around
}

// restore is one under way.
type restore struct {
	im       *Image
	o        Options
	t        *target
	resume   string // name of the side file
	progress *progress

	saving  sync.Mutex
	mu      sync.Mutex
	pending map[int64]int // region -> pieces that are not written yet
	resumed bool          // an earlier run's part is gone on with
	done    int64         // bytes of regions done
	earlier int64         // of these, done by an earlier run
	unsaved int64         // bytes written since progress was saved
	told    time.Time
	written atomic.Int64
	zeroed  int64
	fetched int64 // before this restore
}

// Restore writes an image to a file that is made for it, or to a block device.
// A file appears under its name only when it is whole and durable; before that
// it is TARGET.drc-partial, and TARGET.drc-resume says how far it is. After an
// interruption or a full disk the same call goes on where it stopped.
func Restore(ctx context.Context, im *Image, name string, o Options) (Summary, error) {
	if o.Concurrency <= 0 {
		o.Concurrency = restoreConcurrency
	}
	began := time.Now()
	s := im.history.stores
	requests := s.requests.Load()
	r := &restore{im: im, o: o, progress: newProgress(im), pending: map[int64]int{}, fetched: s.bytes.Load()}
	err := r.open(name)
	if err == nil {
		err = r.run(ctx)
	}
	sum := Summary{
		Point: im.point, Target: name, VolumeBytes: im.point.Volume.SizeBytes,
		FetchedBytes: s.bytes.Load() - r.fetched, WrittenBytes: r.written.Load(), ZeroBytes: r.zeroed,
		Requests: s.requests.Load() - requests, Duration: time.Since(began), Damage: im.Damage(),
	}
	if r.t != nil {
		sum.ResumedBytes = r.earlier
	}
	if err != nil {
		return sum, fmt.Errorf("restore volume %q to %s: %w", im.point.Volume.Name, name, err)
	}
	return sum, nil
}

func (r *restore) open(name string) error {
	if real, err := filepath.EvalSymlinks(name); err == nil {
		name = real
	}
	r.resume = name + ResumeSuffix
	var err error
	r.t, err = openTarget(name, r.im.point.Volume.SizeBytes, r.o, func(path string) bool {
		r.resumed = r.progress.load(r.resume, inode(path))
		return r.resumed
	})
	if err != nil {
		return err
	}
	// The note has its room before the data takes it: a disk that becomes full
	// is when it is needed. A device takes no room where the note is.
	if r.t.device {
		return nil
	}
	if err := r.progress.save(r.resume); err != nil {
		return errors.Join(r.t.failed(err), r.t.close())
	}
	return nil
}

func inode(path string) uint64 {
	info, err := os.Stat(path)
	if err != nil {
		return 0
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return 0
	}
	return st.Ino
}

// region is the extent of a region.
func (r *restore) region(n int64) block.Extent {
	e := block.Extent{Off: n * regionBytes, Len: regionBytes}
	e.Len = max(0, min(e.Len, r.im.point.Volume.SizeBytes-e.Off))
	return e
}

// run does the work and leaves either the finished target, or the part and the
// note that the next run goes on from.
func (r *restore) run(ctx context.Context) error {
	err := r.goOn(ctx)
	if err == nil {
		err = r.passes(ctx)
	}
	if err == nil {
		if err = r.t.finish(); err == nil {
			r.tell(true)
			return removeProgress(r.resume)
		}
		return err
	}
	if serr := r.save(); serr != nil && !errors.Is(err, syscall.ENOSPC) {
		err = errors.Join(err, serr)
	}
	return errors.Join(err, r.t.close())
}

// passes goes through the volume. A device gets its beginning last, and has
// zeroes there until then: what is not whole shall not look as if it were.
func (r *restore) passes(ctx context.Context) error {
	size := r.im.point.Volume.SizeBytes
	first := r.region(0)
	if !r.t.device || r.progress.isDone(0) {
		if err := r.through(ctx, block.Extent{Len: size}); err != nil {
			return err
		}
		return r.writes(ctx, block.Extent{Len: size})
	}
	if _, err := r.t.zero(first); err != nil {
		return err
	}
	if err := r.t.sync(); err != nil {
		return err
	}
	rest := block.Extent{Off: first.End(), Len: size - first.End()}
	if err := r.through(ctx, rest); err != nil {
		return err
	}
	if err := r.writes(ctx, rest); err != nil {
		return err
	}
	if err := r.through(ctx, first); err != nil {
		return err
	}
	return r.writes(ctx, first)
}

// through goes through a part of the volume.
func (r *restore) through(ctx context.Context, e block.Extent) error {
	for at := e.Off; at < e.End(); {
		var extents []manifest.Extent
		from := at
		for at < e.End() && len(extents) < passExtents {
			w := block.Extent{Off: at, Len: min((at/windowBytes+1)*windowBytes, e.End()) - at}
			part, err := r.window(ctx, w)
			if err != nil {
				return err
			}
			extents = append(extents, part...)
			at = w.End()
		}
		if err := r.pass(ctx, block.Extent{Off: from, Len: at - from}, extents); err != nil {
			return err
		}
	}
	return nil
}

// window returns what must be fetched for a window, and zeroes the rest. What
// is done already is left out.
func (r *restore) window(ctx context.Context, w block.Extent) ([]manifest.Extent, error) {
	var out []manifest.Extent
	for at := w.Off; at < w.End(); {
		region := at / regionBytes
		e := r.region(region)
		at = e.End()
		if r.progress.isDone(region) {
			continue
		}
		extents, err := r.im.Extents(ctx, e)
		if err != nil {
			return nil, err
		}
		if !r.t.device {
			if _, err := r.t.zero(e); err != nil { // nothing but a look, in a new file
				return nil, err
			}
		}
		pieces, end := 0, e.Off
		for _, x := range extents {
			if x.Zero {
				continue
			}
			if err := r.zero(block.Extent{Off: end, Len: x.Off - end}); err != nil {
				return nil, err
			}
			end = x.End()
			pieces++
			out = append(out, x)
		}
		if err := r.zero(block.Extent{Off: end, Len: e.End() - end}); err != nil {
			return nil, err
		}
		r.mu.Lock()
		if pieces > 0 {
			r.pending[region] = pieces
		} else {
			r.regionDone(region)
		}
		r.mu.Unlock()
	}
	return out, nil
}

func (r *restore) zero(e block.Extent) error {
	if e.Empty() {
		return nil
	}
	r.zeroed += e.Len
	if !r.t.device {
		return nil // its region was made empty as a whole
	}
	n, err := r.t.zero(e)
	r.written.Add(n)
	return err
}

// pass fetches extents, segment after segment, and writes them.
func (r *restore) pass(ctx context.Context, e block.Extent, extents []manifest.Extent) error {
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(r.o.Concurrency)
	for _, w := range groupPieces(extents) {
		if gctx.Err() != nil {
			break
		}
		g.Go(func() error { return r.im.fetch(gctx, w, dropFrames, r.write) })
	}
	if err := g.Wait(); err != nil {
		return err
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	r.mu.Lock()
	left := len(r.pending)
	r.mu.Unlock()
	if left > 0 {
		panic(fmt.Sprintf("restorer: %d regions of %s are not done after their pass", left, e))
	}
	return nil
}

// write writes parts of the volume: what lies in a row goes with one call.
func (r *restore) write(parts []piece) error {
	slices.SortFunc(parts, func(a, b piece) int { return cmp.Compare(a.Off, b.Off) })
	var row [][]byte
	for i, x := range parts {
		row = append(row, x.data)
		if i+1 < len(parts) && parts[i+1].Off == x.End() && len(row) < maxRow {
			continue
		}
		first := parts[i+1-len(row)]
		if err := r.t.write(row, first.Off); err != nil {
			return err
		}
		row = row[:0]
	}
	save := false
	for _, x := range parts {
		r.written.Add(x.Len)
		save = r.wrote(x.Extent, pieceSum(x.data, x.Off)) || save
	}
	if save {
		return r.save()
	}
	return nil
}

// wrote notes that an extent is written, and reports whether progress is to be
// saved.
func (r *restore) wrote(x manifest.Extent, sum uint32) (save bool) {
	region := x.Off / regionBytes
	r.mu.Lock()
	defer r.mu.Unlock()
	r.unsaved += x.Len
	r.progress.sums[region] ^= sum
	r.pending[region]--
	if r.pending[region] == 0 {
		delete(r.pending, region)
		r.regionDone(region)
	}
	save = r.unsaved >= saveEveryBytes
	if save {
		r.unsaved = 0
	}
	return save
}

// regionDone notes that a region is written; r.mu is held.
func (r *restore) regionDone(region int64) {
	r.progress.set(region)
	r.done += r.region(region).Len
	r.tell(false)
}

// tell calls Options.Progress if it is time; r.mu is held, or no worker runs.
func (r *restore) tell(last bool) {
	if r.o.Progress == nil {
		return
	}
	if now := time.Now(); last || now.Sub(r.told) >= progressInterval {
		r.told = now
		r.o.Progress(Progress{
			VolumeBytes: r.im.point.Volume.SizeBytes, DoneBytes: r.done,
			FetchedBytes: r.im.history.stores.bytes.Load() - r.fetched,
		})
	}
}

// save makes durable what is written, and then that it is.
func (r *restore) save() error {
	r.saving.Lock() // one at a time, so that the newest note stands last
	defer r.saving.Unlock()
	r.mu.Lock()
	note := r.progress.clone()
	r.mu.Unlock()
	if err := r.t.sync(); err != nil {
		return err
	}
	return note.save(r.resume)
}
