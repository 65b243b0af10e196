package vbuf

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash/crc32"
	"io/fs"
	"maps"
	"slices"
	"sort"
	"strings"
	"sync"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// Batch is a sealed batch on its way to the stores. The exported fields are set
// before Add and not changed afterwards, but that Record and Data are dropped once
// the batch is persisted and Placed and Logged follow what the Spool was told. Read
// those only through the Spool's methods while others use it.
type Batch struct {
	From, To block.Seq
	Record   []byte // opaque: what the uploader needs to log it; see Spool.ReadRecord
	Shards   []Shard
	Logged   bool // the batch is in the log

	s *spooled
}

// Shard is one shard of a segment of a batch.
type Shard struct {
	Segment block.SegmentID
	Index   int
	// Parity is how many shards of its segment may be lost. It decides how the
	// shards are spread over the disks.
	Parity int
	// HeadBytes and TailBytes are how many of the first and last bytes of Data the
	// erasure code does not cover. They are kept with the batch's record, so that
	// the shard can be rebuilt from what the code covers of the others.
	HeadBytes, TailBytes int
	SizeBytes            int64  // set by Add from Data
	Data                 []byte // nil once it is in the buffer's files only
	Placed               bool   // is on its store
}

// Spool holds the sealed batches of one group that are not everywhere yet, in
// memory or, once persisted, in files. All methods may be called from many
// goroutines at once.
type Spool struct {
	b     *Buffer
	group block.GroupID

	// ioMu is held while files of the spool change, the I/O included: batches
	// are persisted and dropped one at a time.
	ioMu sync.Mutex

	mu          sync.Mutex
	batches     []*Batch // in the order of To
	shards      map[shardKey]shardRef
	memoryBytes int64
	diskBytes   int64
	elsewhere   func(ctx context.Context, segment block.SegmentID, index int) (map[int][]byte, error) // see SetElsewhere
}

type shardKey struct {
	segment block.SegmentID
	index   int
}

// shardRef says where a shard is: Batch.Shards[i].
type shardRef struct {
	batch *Batch
	i     int
}

// spooled is what the spool knows about a batch beside what its user sees.
type spooled struct {
	id        block.ID
	persisted bool
	dropped   bool
	serial    uint64
	copies    [][]*disk       // per shard
	sums      []uint32        // per shard
	ends      []ends          // per shard
	unnoted   bool            // shards were placed since the record was written
	noted     map[*disk]bool  // has the newest record
	charged   map[*disk]int64 // has a record, which takes up so much of the quota
	gone      []bool          // per shard: neither a copy nor enough others are left
	lost      bool            // see Spool.Lost
	unknown   bool            // its record cannot be read: nothing of it is of use
	scrubAt   time.Time       // not checked for rot before
}

// ends are the bytes of a shard that the erasure code does not cover.
type ends struct{ head, tail []byte }

// Spool opens the spool of group g. What was persisted is there again; what a
// crash left unfinished is removed.
func (b *Buffer) Spool(ctx context.Context, g block.GroupID) (*Spool, error) {
	b.openMu.Lock()
	defer b.openMu.Unlock()
	b.mu.Lock()
	s, closed := b.spools[g], b.closed
	b.mu.Unlock()
	switch {
	case closed:
		return nil, ErrClosed
	case s != nil:
		return s, nil
	}
	s = &Spool{b: b, group: g, shards: map[shardKey]shardRef{}}
	if err := s.load(ctx); err != nil {
		return nil, fmt.Errorf("open the spool of group %s: %w", g, err)
	}
	b.mu.Lock()
	b.spools[g] = s
	b.mu.Unlock()
	s.noteLost(errDisksLost)
	b.mendSoon()
	return s, nil
}

// Add takes a batch, in memory only. Batches are added in the order of To; only
// those that are logged may be ahead: who has forgotten that they are, over a power
// cut, cuts the same writes again. The data of the shards must stay unchanged.
func (s *Spool) Add(batch *Batch) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if batch.s != nil {
		panic("vbuf: a batch is added twice")
	}
	at := len(s.batches)
	for at > 0 && s.batches[at-1].Logged && s.batches[at-1].To > batch.To {
		at--
	}
	if at > 0 && s.batches[at-1].To > batch.To {
		panic(fmt.Sprintf("vbuf: the batch up to %d is added behind the one up to %d", batch.To, s.batches[at-1].To))
	}
	batch.s = &spooled{id: block.NewID(), copies: make([][]*disk, len(batch.Shards)), sums: make([]uint32, len(batch.Shards)), noted: map[*disk]bool{}, charged: map[*disk]int64{}, gone: make([]bool, len(batch.Shards))}
	for i := range batch.Shards {
		sh := &batch.Shards[i]
		sh.SizeBytes = int64(len(sh.Data))
		batch.s.ends = append(batch.s.ends, ends{bytes.Clone(sh.Data[:sh.HeadBytes]), bytes.Clone(sh.Data[len(sh.Data)-sh.TailBytes:])})
		s.memoryBytes += sh.SizeBytes
		s.shards[shardKey{sh.Segment, sh.Index}] = shardRef{batch, i}
	}
	s.batches = slices.Insert(s.batches, at, batch)
}

// Batches returns the batches that are not dropped, oldest first.
func (s *Spool) Batches() []*Batch {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.batches)
}

// Persisted reports whether a batch survives a power cut.
func (s *Spool) Persisted(batch *Batch) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return batch.s != nil && batch.s.persisted
}

// MemoryBytes is what the shards in memory take up.
func (s *Spool) MemoryBytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.memoryBytes
}

// DiskBytes is what the shards in files take up, second copies included.
func (s *Spool) DiskBytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.diskBytes
}

// Persist makes a batch survive a power cut and, where there are disks for that,
// the loss of any one disk; its memory is given up then. Shards that are placed
// already are left out. It fails with ErrFull, and leaves all as it was, if there
// is no room now.
func (s *Spool) Persist(ctx context.Context, batch *Batch) error {
	s.ioMu.Lock()
	defer s.ioMu.Unlock()
	for {
		s.mu.Lock()
		if batch.s == nil || batch.s.dropped {
			s.mu.Unlock()
			return errors.New("the batch is not in the spool")
		}
		if batch.s.persisted {
			s.mu.Unlock()
			return nil
		}
		wanted := make([]bool, len(batch.Shards))
		data := make([][]byte, len(batch.Shards)) // Placed may drop it meanwhile
		for i := range batch.Shards {
			wanted[i], data[i] = !batch.Shards[i].Placed, batch.Shards[i].Data
		}
		s.mu.Unlock()
		if err := ctx.Err(); err != nil {
			return err
		}
		plan, err := s.b.placement(batch.Shards, wanted, batch.recordBytesMax())
		if err != nil {
			return err
		}
		failed, err := s.persist(batch, plan, data)
		if err == nil {
			s.mu.Lock()
			batch.s.persisted, batch.s.copies, batch.s.scrubAt = true, plan, time.Now().Add(scrubEvery)
			batch.Record = nil
			for i := range batch.Shards {
				sh := &batch.Shards[i]
				if sh.Data != nil {
					s.memoryBytes -= sh.SizeBytes
					sh.Data = nil
				}
				s.diskBytes += sh.SizeBytes * int64(len(plan[i]))
				batch.s.unnoted = batch.s.unnoted || sh.Placed && len(plan[i]) > 0
			}
			s.mu.Unlock()
			return nil
		}
		s.removeShards(batch, plan)
		if isNoSpace(err) {
			return fmt.Errorf("%w: %w", ErrFull, err)
		}
		if failed == nil {
			return err
		}
		if ferr := s.b.failDisk(failed, err); ferr != nil {
			return fmt.Errorf("persist the batch up to %d on %s: %w", batch.To, failed.path, err)
		}
	}
}

// makeDir makes the group's folder on a disk, and not where a disk was: nobody
// would find there again what is called durable.
func (s *Spool) makeDir(d *disk) error {
	if err := d.isThere(); err != nil {
		return err
	}
	return d.fs.MkdirAll(s.dir(d))
}

// persist writes the shards, makes them durable with their names, and then the
// record: the batch exists from the moment that one disk has that. On error it
// says which disk was to blame.
func (s *Spool) persist(batch *Batch, plan [][]*disk, data [][]byte) (*disk, error) {
	dirs := map[*disk]bool{}
	for i, disks := range plan {
		sh := &batch.Shards[i]
		if len(disks) > 0 {
			batch.s.sums[i] = crc32.Checksum(data[i], format.Castagnoli)
		}
		for _, d := range disks {
			if !dirs[d] {
				if err := s.makeDir(d); err != nil {
					return d, err
				}
				dirs[d] = true
			}
			if err := writeSynced(d.fs, s.shardName(d, sh.Segment, sh.Index), data[i]); err != nil {
				return d, err
			}
		}
	}
	for _, d := range s.b.all() {
		if !dirs[d] {
			continue
		}
		if err := d.fs.SyncDir(s.dir(d)); err != nil {
			return d, err
		}
	}
	return s.writeRecord(batch, plan)
}

// writeSynced writes a new file and syncs it; a file of the same name is the
// remains of an attempt that failed.
func writeSynced(fsys vfs.FS, name string, data []byte) error {
	f, err := fsys.Create(name)
	if errors.Is(err, fs.ErrExist) {
		if err = fsys.Remove(name); err == nil {
			f, err = fsys.Create(name)
		}
	}
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	return err
}

// writeRecord makes the batch's record durable on every disk of the set that is
// written to.
func (s *Spool) writeRecord(batch *Batch, plan [][]*disk) (*disk, error) {
	s.mu.Lock()
	logged := batch.Logged
	s.mu.Unlock()
	var record []byte
	if !logged {
		var err error
		if record, err = s.ReadRecord(batch); err != nil {
			return nil, err
		}
	}
	s.mu.Lock()
	batch.s.serial++
	rec := format.SpooledBatch{Repo: s.b.opt.Repo, Group: s.group, ID: batch.s.id, Serial: batch.s.serial,
		From: batch.From, To: batch.To, Logged: logged, Record: record}
	index := map[*disk]int{}
	for i, sh := range batch.Shards {
		fs := format.SpooledShard{Segment: sh.Segment, Index: sh.Index, Parity: sh.Parity, SizeBytes: sh.SizeBytes,
			Checksum: batch.s.sums[i], Placed: sh.Placed}
		fs.Head, fs.Tail = batch.s.ends[i].head, batch.s.ends[i].tail
		for _, d := range plan[i] {
			if _, ok := index[d]; !ok {
				index[d] = len(rec.Disks)
				rec.Disks = append(rec.Disks, d.id)
			}
			fs.Copies = append(fs.Copies, index[d])
		}
		rec.Shards = append(rec.Shards, fs)
	}
	clear(batch.s.noted)
	s.mu.Unlock()
	raw := rec.Encode()
	for _, d := range s.b.writtenDisks() {
		if err := s.makeDir(d); err != nil {
			return d, err
		}
		if err := vfs.WriteFileAtomic(d.fs, s.recordName(d, batch.s.id), raw); err != nil {
			return d, err
		}
		if err := d.isThere(); err != nil { // it may have gone meanwhile
			return d, err
		}
		s.mu.Lock()
		batch.s.noted[d] = true
		s.charge(batch, d, recordRoom(int64(len(raw))))
		s.mu.Unlock()
	}
	return nil, nil
}

const (
	// recordExtraBytes is more than a shard, or all else, adds to a record.
	recordExtraBytes = 256
	// recordStepBytes is in which steps a file system gives room to small files.
	recordStepBytes = 4 << 10
)

// recordBytesMax is more than the record of a batch in memory has.
func (batch *Batch) recordBytesMax() int64 {
	n := int64(len(batch.Record) + recordExtraBytes)
	for i := range batch.Shards { // not a copy of it: Placed may be changing the rest
		n += int64(recordExtraBytes + batch.Shards[i].HeadBytes + batch.Shards[i].TailBytes)
	}
	return n
}

// recordRoom is what a record of so many bytes counts against the quota.
func recordRoom(bytes int64) int64 {
	return (bytes + recordStepBytes - 1) / recordStepBytes * recordStepBytes
}

// charge counts what a batch's record takes up on a disk; s.mu is held.
func (s *Spool) charge(batch *Batch, d *disk, bytes int64) {
	s.b.giveBack(d, batch.s.charged[d]-bytes)
	if bytes == 0 {
		delete(batch.s.charged, d)
	} else {
		batch.s.charged[d] = bytes
	}
}

// ReadRecord returns the Record of a batch that is not logged, from memory or,
// once the batch is persisted, from whichever disk has it right. It fails with
// ErrRecordLost if none has; where that is for good the batch is lost (Lost), and
// OnLoss is told.
func (s *Spool) ReadRecord(batch *Batch) ([]byte, error) {
	s.mu.Lock()
	record, persisted := batch.Record, batch.s.persisted
	on := slices.Collect(maps.Keys(batch.s.charged))
	s.mu.Unlock()
	if !persisted {
		return record, nil
	}
	errs := []error{fmt.Errorf("%w: seqs %s to %s", ErrRecordLost, batch.From, batch.To)}
	gone := true // and will not come back by itself, as a disk that cannot be read now may
	for _, d := range on {
		name := s.recordName(d, batch.s.id)
		raw, err := vfs.ReadFile(d.fs, name, format.MaxSpoolFileBytes)
		var rec *format.SpooledBatch
		if err == nil {
			rec, err = format.DecodeSpooledBatch(name, raw)
		}
		if err == nil && (rec.ID != batch.s.id || rec.Logged) {
			err = format.Corrupt(name, "it is another one")
		}
		if err == nil {
			return rec.Record, nil
		}
		var damage *format.CorruptError
		gone = gone && (errors.As(err, &damage) || errors.Is(err, fs.ErrNotExist))
		s.b.log.Warn("the record of a spooled batch cannot be read", "file", name, "err", err)
		errs = append(errs, err)
	}
	err := errors.Join(errs...)
	if gone {
		s.recordLost(batch, err)
	}
	return nil, err
}

// recordLost notes that no disk has a batch's record as it was: without it nothing
// says what the batch holds.
func (s *Spool) recordLost(batch *Batch, cause error) {
	s.mu.Lock()
	already := batch.s.lost || batch.s.dropped
	batch.s.lost = batch.s.lost || !already
	s.mu.Unlock()
	if !already {
		s.b.report([]Loss{{Group: s.group, Range: Range{batch.From, batch.To}, Batch: batch, Cause: cause}})
	}
}

// updateRecord writes the record again, giving up disks that fail.
func (s *Spool) updateRecord(batch *Batch) error {
	for {
		failed, err := s.writeRecord(batch, batch.s.copies)
		if err == nil {
			return nil
		}
		if isNoSpace(err) || failed == nil {
			return err
		}
		if ferr := s.b.failDisk(failed, err); ferr != nil {
			return fmt.Errorf("note the batch up to %d on %s: %w", batch.To, failed.path, err)
		}
	}
}

// Placed says that a shard is on its store, durably: its copy here is given up,
// from memory at once, from the disks with the next step of Run.
func (s *Spool) Placed(segment block.SegmentID, index int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ref, ok := s.shards[shardKey{segment, index}]
	if !ok {
		return
	}
	sh := &ref.batch.Shards[ref.i]
	if sh.Placed {
		return
	}
	sh.Placed = true
	if sh.Data != nil {
		s.memoryBytes -= sh.SizeBytes
		sh.Data = nil
	}
	if ref.batch.s.persisted {
		ref.batch.s.unnoted = true
		s.b.wakeRun()
	}
}

// IsPlaced reports whether Placed was called for a shard of a batch that is here.
func (s *Spool) IsPlaced(segment block.SegmentID, index int) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	ref, ok := s.shards[shardKey{segment, index}]
	return ok && ref.batch.Shards[ref.i].Placed
}

// Logged says that the batch is in the log: its record is no longer needed, the
// shards that are not placed are. It is durable on return if the batch was
// persisted.
func (s *Spool) Logged(batch *Batch) error {
	s.ioMu.Lock()
	defer s.ioMu.Unlock()
	s.mu.Lock()
	if batch.s == nil || batch.s.dropped || batch.Logged {
		s.mu.Unlock()
		return nil
	}
	batch.Logged = true
	persisted := batch.s.persisted
	s.mu.Unlock()
	if !persisted {
		return nil
	}
	return s.note(batch)
}

// note writes the record of a batch with what is placed and removes the files of
// that. Under ioMu.
func (s *Spool) note(batch *Batch) error {
	s.mu.Lock()
	batch.s.unnoted = false
	placed := make([]bool, len(batch.Shards))
	for i := range batch.Shards {
		placed[i] = batch.Shards[i].Placed && len(batch.s.copies[i]) > 0
	}
	s.mu.Unlock()
	// The record first: a missing file would be a lost shard.
	if err := s.updateRecord(batch); err != nil {
		s.mu.Lock()
		batch.s.unnoted = true
		s.mu.Unlock()
		return err
	}
	gone := make([][]*disk, len(placed))
	s.mu.Lock()
	for i, ok := range placed {
		if ok {
			gone[i] = batch.s.copies[i]
			batch.s.copies[i] = nil
			s.diskBytes -= batch.Shards[i].SizeBytes * int64(len(gone[i]))
		}
	}
	s.mu.Unlock()
	s.removeShards(batch, gone)
	return nil
}

// reclaim gives back the space of placed shards; one batch a call.
func (s *Spool) reclaim() (did bool, err error) {
	s.ioMu.Lock()
	defer s.ioMu.Unlock()
	s.mu.Lock()
	i := slices.IndexFunc(s.batches, func(b *Batch) bool { return b.s.unnoted })
	if i < 0 {
		s.mu.Unlock()
		return false, nil
	}
	batch := s.batches[i]
	s.mu.Unlock()
	return true, s.note(batch)
}

// Drop forgets a batch that is logged and whose shards are all placed.
func (s *Spool) Drop(batch *Batch) error {
	s.ioMu.Lock()
	defer s.ioMu.Unlock()
	s.mu.Lock()
	if batch.s == nil || batch.s.dropped {
		s.mu.Unlock()
		return nil
	}
	batch.s.dropped = true
	s.batches = slices.DeleteFunc(s.batches, func(o *Batch) bool { return o == batch })
	for i := range batch.Shards {
		sh := &batch.Shards[i]
		if sh.Data != nil {
			s.memoryBytes -= sh.SizeBytes
			sh.Data = nil
		}
		if ref, ok := s.shards[shardKey{sh.Segment, sh.Index}]; ok && ref.batch == batch {
			delete(s.shards, shardKey{sh.Segment, sh.Index})
		}
		s.diskBytes -= sh.SizeBytes * int64(len(batch.s.copies[i]))
	}
	persisted, copies := batch.s.persisted, batch.s.copies
	batch.s.copies = nil
	s.mu.Unlock()
	if !persisted {
		return nil
	}
	// The record goes first, durably: with it and without its shards the batch
	// would look damaged.
	for _, d := range s.b.aliveDisks() {
		err := d.fs.Remove(s.recordName(d, batch.s.id))
		if err == nil {
			err = d.fs.SyncDir(s.dir(d))
		} else if errors.Is(err, fs.ErrNotExist) {
			err = nil
		}
		if err == nil {
			s.mu.Lock()
			s.charge(batch, d, 0)
			s.mu.Unlock()
			continue
		}
		if ferr := s.b.failDisk(d, err); ferr != nil {
			return fmt.Errorf("drop the batch up to %d on %s: %w", batch.To, d.path, err)
		}
	}
	s.removeShards(batch, copies)
	return nil
}

// ReadShard returns a shard, from memory, from whichever file has it right, or
// rebuilt from the other shards of its segment. It fails with ErrShardLost if that
// cannot be. The caller must not change it.
func (s *Spool) ReadShard(segment block.SegmentID, index int) ([]byte, error) {
	s.mu.Lock()
	ref, ok := s.shards[shardKey{segment, index}]
	persisted := ok && ref.batch.s.persisted
	s.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("shard %d of segment %s: %w", index, segment, ErrShardLost)
	}
	data, err := s.readCopy(ref.batch, ref.i)
	if err == nil || !persisted {
		return data, err
	}
	s.scrubSoon(ref.batch)
	data, rerr := s.rebuild(ref.batch, ref.i, nil)
	if rerr == nil {
		return data, nil
	}
	return nil, errors.Join(err, rerr)
}

// Rebuild is ReadShard with the help of other shards of the segment, whole and by
// index, that are elsewhere: on stores.
func (s *Spool) Rebuild(segment block.SegmentID, index int, others map[int][]byte) ([]byte, error) {
	s.mu.Lock()
	ref, ok := s.shards[shardKey{segment, index}]
	s.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("shard %d of segment %s: %w", index, segment, ErrShardLost)
	}
	return s.rebuild(ref.batch, ref.i, others)
}

// Head returns the first HeadBytes of a shard, also if the shard is lost.
func (s *Spool) Head(segment block.SegmentID, index int) []byte {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ref, ok := s.shards[shardKey{segment, index}]; ok {
		return ref.batch.s.ends[ref.i].head
	}
	return nil
}

// removeShards removes files of shards and gives back their room.
func (s *Spool) removeShards(batch *Batch, copies [][]*disk) {
	for i, disks := range copies {
		sh := &batch.Shards[i]
		for _, d := range disks {
			if err := d.fs.Remove(s.shardName(d, sh.Segment, sh.Index)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				s.b.log.Warn("a shard could not be removed from the buffer", "path", d.path, "segment", sh.Segment, "err", err)
			}
			s.b.giveBack(d, sh.SizeBytes)
		}
	}
	s.b.roomChanged()
}

const (
	shardSuffix  = ".shard"
	recordSuffix = ".batch"
)

func (s *Spool) dir(d *disk) string { return s.b.path(d, spoolFolder, s.group.String()) }

func (s *Spool) shardName(d *disk, segment block.SegmentID, index int) string {
	return s.b.path(d, spoolFolder, s.group.String(), fmt.Sprintf("%s.%d%s", segment, index, shardSuffix))
}

func (s *Spool) recordName(d *disk, id block.ID) string {
	return s.b.path(d, spoolFolder, s.group.String(), id.String()+recordSuffix)
}

// load reads the records of all disks and removes what belongs to none.
func (s *Spool) load(ctx context.Context) error {
	type seen struct {
		rec  *format.SpooledBatch
		on   map[*disk]uint64 // serial
		room map[*disk]int64
	}
	records := map[block.ID]*seen{}
	files := map[*disk]map[string]bool{}
	disks := s.b.aliveDisks()
	var damaged []error
	for _, d := range disks {
		if err := ctx.Err(); err != nil {
			return err
		}
		files[d] = map[string]bool{}
		entries, err := d.fs.ReadDir(s.dir(d))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return err
		}
		for _, e := range entries {
			files[d][e.Name] = true
			if !strings.HasSuffix(e.Name, recordSuffix) {
				continue
			}
			name := s.b.path(d, spoolFolder, s.group.String(), e.Name)
			raw, err := vfs.ReadFile(d.fs, name, format.MaxSpoolFileBytes)
			var rec *format.SpooledBatch
			if err == nil {
				rec, err = format.DecodeSpooledBatch(name, raw)
			}
			if err == nil && (rec.Repo != s.b.opt.Repo || rec.Group != s.group || rec.ID.String()+recordSuffix != e.Name) {
				err = format.Corrupt(name, "it belongs elsewhere")
			}
			if err != nil {
				// Another disk has it too, or it cannot be told what it was.
				s.b.log.Warn("the record of a spooled batch is damaged", "file", name, "err", err)
				damaged = append(damaged, err)
				if info, err := d.fs.Stat(name); err == nil {
					s.b.giveBack(d, recordRoom(info.SizeBytes)) // it is written again, or removed
				}
				continue
			}
			rec.Record = nil // there may be very many
			if records[rec.ID] == nil {
				records[rec.ID] = &seen{on: map[*disk]uint64{}, room: map[*disk]int64{}}
			}
			r := records[rec.ID]
			r.on[d], r.room[d] = rec.Serial, recordRoom(int64(len(raw)))
			if r.rec == nil || rec.Serial > r.rec.Serial {
				r.rec = rec
			}
		}
	}
	for _, err := range damaged {
		var c *format.CorruptError
		id := block.ID{}
		if errors.As(err, &c) {
			base := c.Object[strings.LastIndexByte(c.Object, '/')+1:]
			id, _ = block.ParseID(strings.TrimSuffix(base, recordSuffix))
		}
		if records[id] == nil {
			return err // no other disk has it: that is for a human to see
		}
	}
	byID := map[block.ID]*disk{}
	for _, d := range disks {
		byID[d.id] = d
	}
	keep := map[*disk]map[string]bool{}
	for _, d := range disks {
		keep[d] = map[string]bool{}
	}
	var stale []*Batch
	for id, r := range records {
		batch := &Batch{From: r.rec.From, To: r.rec.To, Logged: r.rec.Logged,
			s: &spooled{id: id, persisted: true, serial: r.rec.Serial, noted: map[*disk]bool{}, charged: r.room, gone: make([]bool, len(r.rec.Shards))}}
		for i, fs := range r.rec.Shards {
			batch.Shards = append(batch.Shards, Shard{Segment: fs.Segment, Index: fs.Index, Parity: fs.Parity,
				SizeBytes: fs.SizeBytes, Placed: fs.Placed, HeadBytes: len(fs.Head), TailBytes: len(fs.Tail)})
			batch.s.sums = append(batch.s.sums, fs.Checksum)
			batch.s.ends = append(batch.s.ends, ends{fs.Head, fs.Tail})
			var copies []*disk
			for _, c := range fs.Copies {
				d := byID[r.rec.Disks[c]]
				name := fmt.Sprintf("%s.%d%s", fs.Segment, fs.Index, shardSuffix)
				if d != nil && files[d][name] && !fs.Placed {
					copies = append(copies, d)
					keep[d][name] = true
					s.diskBytes += fs.SizeBytes
				}
			}
			batch.s.copies = append(batch.s.copies, copies)
			s.shards[shardKey{fs.Segment, fs.Index}] = shardRef{batch, i}
		}
		for _, d := range disks {
			keep[d][id.String()+recordSuffix] = true
			batch.s.noted[d] = r.on[d] == r.rec.Serial
		}
		if slices.ContainsFunc(disks, func(d *disk) bool { return !batch.s.noted[d] }) {
			stale = append(stale, batch)
		}
		s.batches = append(s.batches, batch)
	}
	sort.Slice(s.batches, func(a, b int) bool { // those without writes come before the next one with some
		x, y := s.batches[a], s.batches[b]
		return x.From < y.From || x.From == y.From && x.To < y.To
	})
	if s.b.readOnly {
		return nil
	}
	// A crash left the record on some disks, or an older one: complete it.
	for _, batch := range stale {
		if err := s.updateRecord(batch); err != nil {
			return err
		}
	}
	for _, d := range disks {
		removed := false
		for name := range files[d] {
			if keep[d][name] {
				continue
			}
			full := s.b.path(d, spoolFolder, s.group.String(), name)
			info, err := d.fs.Stat(full)
			if errors.Is(err, fs.ErrNotExist) {
				continue // the remains of a record that was written again just now
			}
			if err == nil {
				err = d.fs.Remove(full)
			}
			if err != nil {
				return err
			}
			removed = true
			if strings.HasSuffix(name, shardSuffix) {
				s.b.giveBack(d, info.SizeBytes)
			}
		}
		if removed {
			if err := d.fs.SyncDir(s.dir(d)); err != nil {
				return err
			}
		}
	}
	return nil
}
