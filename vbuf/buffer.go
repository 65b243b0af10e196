package vbuf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"path"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// DirOptions is one directory of the buffer.
type DirOptions struct {
	Path string
	// SizeBytes is the quota; 0 means 10 GiB or 80 % of what is free when the
	// buffer is opened, whichever is less.
	SizeBytes int64
}

// Options say what the buffer is and where.
type Options struct {
	Repo block.ID // the repository that the buffer belongs to
	Host block.ID // the state directory that owns it
	Dirs []DirOptions
	// Forget lists disks that are members by their labels but were taken out by
	// hand; what only they held is lost.
	Forget []block.ID
	FS     vfs.FS       // nil: the real one
	Logger *slog.Logger // nil: none

	// MaxUnsyncedBytes bounds what is enqueued and not durable, and so the
	// memory that the journal of a group keeps; 0 means 32 MiB.
	MaxUnsyncedBytes int64
	// FileBytes is the size of a journal file; 0 means a 32nd of the smallest
	// quota, at least 256 KiB and at most 64 MiB.
	FileBytes int64
	// Held, if not nil, is told each time a writer of a group begins to wait because
	// the buffer is full. It must not block.
	Held func(block.GroupID)
	// StallAfter is how long an operation on a disk may make no progress while
	// another disk does, before the disk is taken for failed; 0 means 30 s. The only
	// disk of a buffer is waited for without end.
	StallAfter time.Duration
	// OnLoss, if not nil, is told of everything that was durable and is lost with
	// the disks that held it, once. It is called without locks, from the goroutine
	// that found it out; it must not wait for the buffer.
	OnLoss func(Loss)
	// FullAfter is how long the file system of a disk may be full, while others have
	// room, before the disk is taken out of use; 0 means 30 s.
	FullAfter time.Duration
	// RetryEvery is how often a file system without space is tried again; 0
	// means 1 s.
	RetryEvery time.Duration
}

const (
	defaultQuotaBytes       = 10 << 30
	defaultMaxUnsyncedBytes = 32 << 20
	fileBytesMin            = 256 << 10
	fileBytesMax            = 64 << 20
	// quotaBytesMin is the least quota: some journal files and a batch.
	quotaBytesMin = 64 << 10
	// journalShare of the quota, in quarters, is what the journal may use; the
	// rest lets batches be persisted when the journal is full, so that it can be
	// released.
	journalShare = 3
)

// Buffer is the virtual local buffer. Its methods may be called from many
// goroutines at once.
//
// Lock order: openMu, Journal.markMu, Spool.ioMu, setMu, Spool.mu, Journal.mu, mu. No
// I/O is done under the last three; the others are there to be held across I/O.
type Buffer struct {
	opt       Options
	fs        vfs.FS
	log       *slog.Logger
	fileBytes int64
	readOnly  bool        // see Reading: nothing is changed
	locks     []io.Closer // of a Reading's directories

	// openMu is held while a journal or a spool is recovered.
	openMu sync.Mutex

	// setMu is held while the set of disks changes, labels included.
	setMu      sync.Mutex
	generation uint64
	labelled   uint64 // the generation that is durable on the disks of the set

	takingOut sync.Mutex // held while a full disk is taken out

	mendDue atomic.Bool   // the set has changed, or a group was opened
	wanting atomic.Bool   // mend waits for room or its turn
	several atomic.Bool   // there is more than one disk in the set
	quit    chan struct{} // closed by Close

	scrubNow chan struct{} // holds one when a batch is to be checked at once

	mu           sync.Mutex
	disks        []*disk // in the order of Options.Dirs, then as they came; replaced, never changed in place
	journals     map[block.GroupID]*Journal
	spools       map[block.GroupID]*Spool
	scrubbed     ScrubStats
	bitmaps      []*Bitmap                     // that are open
	found        map[block.GroupID][]foundFile // journal files seen at Open and not yet claimed
	space        waiters                       // who waits for room
	waiting      int                           // writers that Reserve holds back
	waitingFiles map[int64]int                 // those of them who wait for a large file: how many by the files that it is in the place of
	holding      bool                          // the file system below was full, and it was logged
	closed       bool

	jobPool   sync.Pool // of *job: operations that are done
	timerPool sync.Pool // of *time.Timer

	began time.Time     // when it was opened
	kick  chan struct{} // tells Run that there is work
}

// Open checks the directories, or makes them a buffer if they are new, locks
// them and looks through what is there. It fails with a *SetupError if they are
// not one whole buffer of this repository and host.
func Open(ctx context.Context, opt Options) (*Buffer, error) {
	if opt.FS == nil {
		opt.FS = vfs.OS()
	}
	if opt.Logger == nil {
		opt.Logger = slog.New(slog.DiscardHandler)
	}
	if opt.MaxUnsyncedBytes <= 0 {
		opt.MaxUnsyncedBytes = defaultMaxUnsyncedBytes
	}
	if opt.StallAfter <= 0 {
		opt.StallAfter = defaultStallAfter
	}
	if opt.FullAfter <= 0 {
		opt.FullAfter = fullAfterDefault
	}
	if opt.RetryEvery <= 0 {
		opt.RetryEvery = time.Second
	}
	if len(opt.Dirs) == 0 || len(opt.Dirs) > format.MaxBufferDisks {
		return nil, fmt.Errorf("a buffer has 1 to %d directories, not %d", format.MaxBufferDisks, len(opt.Dirs))
	}
	b := &Buffer{
		opt: opt, fs: opt.FS, log: opt.Logger,
		journals: map[block.GroupID]*Journal{}, waitingFiles: map[int64]int{},
		spools: map[block.GroupID]*Spool{},
		found:  map[block.GroupID][]foundFile{},
		kick:   make(chan struct{}, 1), scrubNow: make(chan struct{}, 1),
		quit:  make(chan struct{}),
		began: time.Now(),
	}
	err := b.open(ctx)
	if err != nil {
		close(b.quit)
		b.unlock()
		return nil, err
	}
	return b, nil
}

func (b *Buffer) open(ctx context.Context) error {
	if err := b.openDisks(); err != nil {
		return err
	}
	b.fileBytes = b.opt.FileBytes
	if b.fileBytes <= 0 {
		least := b.disks[0].quotaBytes
		for _, d := range b.disks {
			least = min(least, d.quotaBytes)
		}
		b.fileBytes = min(max(least/32, fileBytesMin), fileBytesMax)
	}
	b.fileBytes = alignUp(b.fileBytes, format.JournalBlockBytes)
	for _, d := range b.disks {
		if d.quotaBytes < quotaBytesMin || d.journalMaxBytes() < 2*b.fileBytes {
			return b.tooSmall(d)
		}
	}
	for _, d := range b.disks {
		if err := ctx.Err(); err != nil {
			return err
		}
		if err := b.loadDisk(d); err != nil {
			return fmt.Errorf("open buffer directory %s: %w", d.path, err)
		}
	}
	devices := map[string]string{}
	for _, d := range b.disks {
		if other, ok := devices[d.device]; ok && len(b.disks) > 1 {
			b.log.Warn("two buffer directories are on one device and fail together", "path", d.path, "other", other, "device", d.device)
		}
		devices[d.device] = d.path
	}
	return nil
}

// Close makes the journals durable, notes that they end where they end, and
// gives up the locks. Nobody may use the buffer's journals and spools any more.
func (b *Buffer) Close() error {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return nil
	}
	b.closed = true
	b.space.wakeAll()
	var journals []*Journal
	for _, j := range b.journals {
		journals = append(journals, j)
	}
	b.mu.Unlock()
	var errs []error
	for _, j := range journals {
		if err := j.close(); err != nil {
			errs = append(errs, fmt.Errorf("close the journal of group %s: %w", j.group, err))
		}
	}
	b.unlock()
	close(b.quit)
	return errors.Join(errs...)
}

// unlock gives up the directories.
func (b *Buffer) unlock() {
	for _, d := range b.disks {
		d.unlock()
	}
}

// Run does in the background what makes the foreground fast, until ctx ends: it
// fills journal files ahead of need, gives back released ones, syncs before
// writers have to, removes placed shards, and checks what lies here for long. The
// buffer is correct without it.
func (b *Buffer) Run(ctx context.Context) error {
	var scrubbing sync.WaitGroup
	defer scrubbing.Wait()
	scrubbing.Go(func() { b.runScrub(ctx) })
	retry := time.NewTimer(time.Hour) // of what failed, or waits for room
	retry.Stop()
	defer retry.Stop()
	for {
		for {
			b.takeOutFull()
			did, err := b.Step(ctx)
			if ctx.Err() != nil {
				return nil
			}
			if err != nil {
				b.log.Warn("the buffer's background work failed; it is tried again", "err", err)
				retry.Reset(b.opt.RetryEvery)
				break
			}
			if !did {
				if b.unfinished() {
					retry.Reset(b.opt.RetryEvery)
				}
				break
			}
		}
		select {
		case <-ctx.Done():
			return nil
		case <-b.kick:
		case <-retry.C:
		}
		retry.Stop()
	}
}

// Step does one bounded unit of Run's work and reports whether there was any.
func (b *Buffer) Step(ctx context.Context) (did bool, err error) {
	b.mu.Lock()
	if b.closed {
		b.mu.Unlock()
		return false, nil
	}
	journals := make([]*Journal, 0, len(b.journals))
	for _, j := range b.journals {
		journals = append(journals, j)
	}
	spools := make([]*Spool, 0, len(b.spools))
	for _, s := range b.spools {
		spools = append(spools, s)
	}
	b.mu.Unlock()
	for _, j := range journals {
		if j.UnsyncedBytes() > b.opt.MaxUnsyncedBytes/2 {
			return true, j.Flush(ctx)
		}
		if did, err := j.reclaim(); did || err != nil {
			return did, err
		}
	}
	for _, s := range spools {
		if did, err := s.reclaim(); did || err != nil {
			return did, err
		}
	}
	if did, err := b.mend(ctx); did || err != nil {
		return did, err
	}
	return b.prepareSpare()
}

func (b *Buffer) wakeRun() {
	select {
	case b.kick <- struct{}{}:
	default:
	}
}

// Stats is the state of the buffer for status, metrics and the dashboard.
type Stats struct {
	CapacityBytes int64 // sum of the quotas of the disks in use
	UsedBytes     int64 // journal files and shards
	JournalBytes  int64 // journal files that hold records
	SegmentBytes  int64 // shards
	Waiting       int   // writers that are held back because the buffer is full
	Full          bool  // Waiting > 0, or the last attempt to get room failed
	Scrub         ScrubStats
	Disks         []DiskStats
}

// DiskStats is the state of one directory.
type DiskStats struct {
	Path   string
	ID     block.ID
	Device string // two directories with different ones do not fail together
	// State is "ok"; "full": its file system has no space; "slow": an operation has
	// taken long; "draining": what it holds moves to the others; "suspect": not
	// written any more, and taken out once what it alone holds is elsewhere;
	// "failed": out of the set.
	State         string
	CapacityBytes int64
	UsedBytes     int64
	JournalBytes  int64
	SegmentBytes  int64
	LastError     string
}

// Stats returns the present state.
func (b *Buffer) Stats() Stats {
	b.mu.Lock()
	defer b.mu.Unlock()
	s := Stats{Scrub: b.scrubbed}
	for _, d := range b.disks {
		ds := DiskStats{Path: d.path, ID: d.id, Device: d.device, State: "ok", CapacityBytes: d.quotaBytes, SegmentBytes: d.shardBytes}
		ds.JournalBytes = d.journalBytes
		for _, f := range d.free {
			ds.JournalBytes -= f.sizeBytes
		}
		ds.UsedBytes = ds.JournalBytes + ds.SegmentBytes
		switch {
		case d.failed != nil:
			ds.State = "failed"
		case d.suspect:
			ds.State = "suspect"
		case d.draining:
			ds.State = "draining"
		case d.isSlow():
			ds.State = "slow"
		case d.isFull():
			ds.State = "full"
		}
		if d.lastErr != nil {
			ds.LastError = d.lastErr.Error()
		}
		s.Disks = append(s.Disks, ds)
		if d.failed != nil {
			continue
		}
		s.CapacityBytes += ds.CapacityBytes
		s.UsedBytes += ds.UsedBytes
		s.JournalBytes += ds.JournalBytes
		s.SegmentBytes += ds.SegmentBytes
	}
	s.Waiting = b.waiting
	s.Full = b.waiting > 0
	for _, d := range b.disks {
		s.Full = s.Full || d.failed == nil && d.isFull()
	}
	return s
}

// Journal opens the journal of group g, or makes it, and recovers what is in
// it. It fails with a *DamageError if durable records are lost. The buffer owns
// the journal; a second call returns the same one.
func (b *Buffer) Journal(ctx context.Context, g block.GroupID) (*Journal, error) {
	return b.journal(ctx, g, recoverStrict)
}

// JournalDamaged opens a journal in spite of damage. Journal.Damaged tells what
// is lost; Read fails there; writing goes on behind the last record.
func (b *Buffer) JournalDamaged(ctx context.Context, g block.GroupID) (*Journal, error) {
	return b.journal(ctx, g, recoverDamaged)
}

// ResetJournal drops whatever the journal of group g holds, readable or not,
// durably, and returns an empty one whose first record will be next.
func (b *Buffer) ResetJournal(ctx context.Context, g block.GroupID, next block.Seq) (*Journal, error) {
	if next == 0 {
		return nil, errors.New("a journal cannot begin at 0")
	}
	b.mu.Lock()
	open := b.journals[g]
	b.mu.Unlock()
	if open != nil {
		return open, open.reset(next)
	}
	j, err := b.journal(ctx, g, recoverNothing)
	if err != nil {
		return nil, err
	}
	return j, j.reset(next)
}

func (b *Buffer) journal(ctx context.Context, g block.GroupID, mode recoverMode) (*Journal, error) {
	b.openMu.Lock()
	defer b.openMu.Unlock()
	b.mu.Lock()
	j, closed := b.journals[g], b.closed
	b.mu.Unlock()
	switch {
	case closed:
		return nil, ErrClosed
	case j != nil:
		return j, nil
	}
	return b.recoverJournal(ctx, g, mode)
}

// Groups returns the groups of which there is something in the buffer, opened or
// not, in the order of their ids.
func (b *Buffer) Groups() ([]block.GroupID, error) {
	seen := map[block.GroupID]bool{}
	note := func(text string) {
		if id, err := block.ParseID(text); err == nil {
			seen[block.GroupID(id)] = true
		}
	}
	for _, d := range b.aliveDisks() {
		marks, err := b.readDir(d, journalFolder)
		if b.isSuspect(d) && err != nil {
			continue // it is about to be given up
		} else if err != nil {
			return nil, err
		}
		for _, e := range marks {
			if name, ok := strings.CutSuffix(e.Name, markSuffix); ok {
				note(name)
			}
		}
		spools, err := b.readDir(d, spoolFolder)
		if b.isSuspect(d) && err != nil {
			continue
		} else if err != nil {
			return nil, err
		}
		for _, e := range spools {
			note(e.Name)
		}
	}
	b.mu.Lock()
	for g := range b.found {
		seen[g] = true
	}
	for g := range b.journals {
		seen[g] = true
	}
	for g := range b.spools {
		seen[g] = true
	}
	b.mu.Unlock()
	list := slices.Collect(maps.Keys(seen))
	slices.SortFunc(list, func(x, y block.GroupID) int { return block.ID(x).Compare(block.ID(y)) })
	return list, nil
}

// readDir lists a folder of a disk. One that only is to be read may lack it: a
// start that was interrupted has left it so.
func (b *Buffer) readDir(d *disk, folder string) ([]vfs.Entry, error) {
	entries, err := d.fs.ReadDir(b.path(d, folder))
	if b.readOnly && errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	return entries, err
}

// alignUp rounds n up to a multiple of to.
func alignUp(n, to int64) int64 { return (n + to - 1) / to * to }

func (b *Buffer) path(d *disk, parts ...string) string {
	return path.Join(append([]string{d.path}, parts...)...)
}
