package pipeline

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"slices"

	"drc/capture"
	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/internal/object"
	"drc/internal/repo"
	"drc/internal/state"
	"drc/restorer"
	"drc/vbuf"
)

// A host whose volume is lost and whose buffer lives has more of the volume than
// the stores: sealed batches that are not logged, and the journal behind them. It
// is read without changing anything, so that whatever becomes of the restore, the
// buffer is as the agent has left it. The order is that of history: the log to its
// end, the batches that go beyond it, the journal from where these end. It is put
// together only if nothing is missing in between, and refused, with the reason, if
//
//   - the log has gone on without this host: its seqs and the buffer's are not of
//     one history
//   - writes went past the journal (bitmap mode), or a resync has not ended: only
//     the volume that is lost had them
//   - durable records are lost that neither the log nor a batch has
//
// The restored file is the volume after its last acknowledged write. Its record
// says so, and not that it came out of the history: the next agent with this
// buffer has nothing to replay, and brings what the stores lack there from the
// buffer, as if nothing had happened.

// UnloggedConfig says whose buffer is read.
type UnloggedConfig struct {
	State  *state.Dir // of the agent that used the buffer; locked by OpenUnlogged
	Dirs   []string   // of the buffer; members that these name are found by themselves
	Logger *slog.Logger
}

// Unlogged is what the buffer of this host holds and the history lacks. Buffer and
// state folder are locked until Close.
type Unlogged struct {
	cfg    UnloggedConfig
	buffer *vbuf.Reading
	shards map[string]heldShard // by the names of their objects
}

type heldShard struct {
	spool *vbuf.Spool
	vbuf.Shard
}

// OpenUnlogged opens a buffer with which no agent works.
func OpenUnlogged(ctx context.Context, cfg UnloggedConfig) (_ *Unlogged, err error) {
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if err := cfg.State.Lock(); err != nil {
		return nil, err
	}
	u := &Unlogged{cfg: cfg, shards: map[string]heldShard{}}
	defer func() {
		if err != nil {
			u.Close()
		}
	}()
	if u.buffer, err = vbuf.OpenToRead(ctx, vbuf.ReadOptions{Dirs: cfg.Dirs, FS: cfg.State.Files(), Logger: cfg.Logger}); err != nil {
		return nil, err
	}
	host, err := cfg.State.Host()
	if err != nil {
		return nil, err
	}
	if host != u.buffer.Host() {
		return nil, fmt.Errorf("buffer directory %s belongs to another agent (%s, the state folder %s is %s): pass the --state DIR of the agent that used it", cfg.Dirs[0], u.buffer.Host(), cfg.State.Path(), host)
	}
	if err := u.isNewest(); err != nil {
		return nil, err
	}
	groups, err := u.buffer.Groups()
	if err != nil {
		return nil, err
	}
	for _, g := range groups {
		s, err := u.buffer.Spool(ctx, g)
		if err != nil {
			return nil, err
		}
		for _, b := range s.Batches() {
			for _, sh := range b.Shards {
				if !sh.Placed {
					u.shards[format.SegmentName(g, sh.Segment, 0, sh.Index)] = heldShard{s, sh}
				}
			}
		}
	}
	return u, nil
}

// isNewest checks that no other buffer of this host was used last, as far as its
// directories can be read: with one that was used before that, what was acknowledged
// since would be missed without a word.
func (u *Unlogged) isNewest() error {
	n, err := loadBufferNotes(u.cfg.State)
	if err != nil {
		return err
	}
	ours := u.buffer.Disks()
	for _, d := range n.Dirs {
		l, err := vbuf.ReadLabel(u.cfg.State.Files(), d.Path)
		if err != nil || l.Host != u.buffer.Host() || slices.Contains(ours, l.Disk) {
			continue // away, of somebody else, or ours, perhaps copied elsewhere
		}
		return fmt.Errorf("buffer directory %s is not of the buffer that was used last, which is in %s: name that one", u.cfg.Dirs[0], d.Path)
	}
	return nil
}

// Close gives up the locks.
func (u *Unlogged) Close() {
	if u.buffer != nil {
		u.buffer.Close()
	}
	_ = u.cfg.State.Close()
}

// Repo returns r with stores that have the shards of the buffer, too: they are the
// bytes that go to the stores.
func (u *Unlogged) Repo(r *repo.Repository) (*repo.Repository, error) {
	if u.buffer.Repo() != r.ID {
		return nil, fmt.Errorf("buffer directory %s belongs to repository %s, and the stores are of %s: name the directory or the stores that belong together", u.cfg.Dirs[0], u.buffer.Repo(), r.ID)
	}
	c := *r
	c.Members = slices.Clone(r.Members)
	for i, m := range c.Members {
		if m.Store != nil {
			c.Members[i].Store = &withHeldShards{m.Store, u}
		}
	}
	return &c, nil
}

// withHeldShards is a store that also has the shards which the buffer holds.
type withHeldShards struct {
	object.Store
	u *Unlogged
}

// held returns a shard of the buffer. One that cannot be read there may yet be on
// the store.
func (s *withHeldShards) held(name string) ([]byte, bool) {
	h, ok := s.u.shards[name]
	if !ok {
		return nil, false
	}
	data, err := h.spool.ReadShard(h.Segment, h.Index)
	if err != nil {
		s.u.cfg.Logger.Warn("a shard in the buffer cannot be read", "object", name, "error", err)
	}
	return data, err == nil
}

// Get implements object.Store.
func (s *withHeldShards) Get(ctx context.Context, name string, limit int64, dst []byte) ([]byte, object.Answer, error) {
	if p, ok := s.held(name); ok && int64(len(p)) <= limit {
		return append(dst, p...), object.Answer{}, nil
	}
	return s.Store.Get(ctx, name, limit, dst)
}

// GetRange implements object.Store.
func (s *withHeldShards) GetRange(ctx context.Context, name string, off, n int64, dst []byte) ([]byte, error) {
	if p, ok := s.held(name); ok && off >= 0 && n >= 0 && off+n <= int64(len(p)) {
		return append(dst, p[off:off+n]...), nil
	}
	return s.Store.GetRange(ctx, name, off, n, dst)
}

// BeyondLog is what of a volume goes on where its history on the stores ends.
type BeyondLog struct {
	restorer.Beyond
	Point   restorer.Point // the end of the log: open the image there
	Batches int            // that are not logged
	Journal vbuf.Range     // of the journal, behind the batches; empty if To is before From
}

// refusedBeyond ends every reason for which history and buffer are not put
// together.
const refusedBeyond = "nothing was changed; without --with-buffer the newest checkpoint on the stores is restored (drc history shows it), and drc inspect shows what the buffer holds"

// Of returns what the buffer has of volume v beyond the history h.
func (u *Unlogged) Of(ctx context.Context, h *restorer.History, v restorer.Volume, ring *crypt.Ring) (*BeyondLog, error) {
	b, err := u.of(ctx, h, v, ring)
	if err != nil {
		return nil, fmt.Errorf("what the buffer holds of volume %s: %w", v.Name, err)
	}
	return b, nil
}

func (u *Unlogged) of(ctx context.Context, h *restorer.History, v restorer.Volume, ring *crypt.Ring) (*BeyondLog, error) {
	f := groupFiles{u.cfg.State, h.GroupID}
	st := &groupState{}
	found, err := u.cfg.State.LoadJSON(st, f.path("group.json")...)
	if err != nil {
		return nil, err
	}
	if !found {
		return nil, fmt.Errorf("the state folder %s knows nothing of its group: pass the --state DIR of the agent that protected it", u.cfg.State.Path())
	}
	out := &BeyondLog{}
	if out.Point, err = h.EndOfLog(ctx, v); err != nil {
		return nil, err
	}
	end := out.Point.Seq
	prog, err := f.loadProgress()
	if err != nil {
		return nil, err
	}
	if err := u.oneHistory(f, h, prog, end); err != nil {
		return nil, err
	}
	journal, err := u.buffer.Journal(ctx, h.GroupID)
	if err != nil {
		return nil, err
	}
	spool, err := u.buffer.Spool(ctx, h.GroupID)
	if err != nil {
		return nil, err
	}
	var batches []*batch.Batch
	for _, vb := range spool.Batches() {
		if vb.Logged || vb.To < end {
			continue
		}
		b, err := decode(spool, vb)
		if err != nil {
			return nil, err
		}
		if b.Items.Range != nil && b.Items.Range.Branch != v.Branch {
			return nil, fmt.Errorf("the batch of seqs %s to %s is of another branch than the history: %s", b.From, b.To, refusedBeyond)
		}
		batches = append(batches, b)
	}
	if err := u.isWhole(ctx, f, h, v, batches); err != nil {
		return nil, err
	}
	next := end + 1
	first, last := journal.First(), max(journal.Next(), 1)-1
	// The journal alone will do if it goes on where the log ends: what it holds is
	// as it was written. But what a resync has read is in batches only.
	resync := slices.ContainsFunc(batches, func(b *batch.Batch) bool { return isOfResync(b, v.Index) })
	if resync || first == 0 || first > next {
		out.Inline = map[block.SegmentID][]byte{}
		for _, b := range batches {
			if b.From > next {
				return nil, fmt.Errorf("seqs %s to %s are neither on the stores nor in the buffer: %s", next, b.From-1, refusedBeyond)
			}
			if err := out.add(f, b, v.Index, ring); err != nil {
				return nil, err
			}
			next = max(next, b.To+1)
		}
	}
	out.Seq = max(next-1, last)
	applied, err := capture.NewestApplied(u.cfg.State.Files(), u.cfg.State.Backings(), h.GroupID.String())
	if err != nil {
		return nil, err
	}
	if known := max(prog.To, end, applied); out.Seq < known {
		return nil, fmt.Errorf("the buffer ends at seq %s, and what is known of the history at %s: it is not the one that was used last: name the right one, or restore without --with-buffer", out.Seq, known)
	}
	out.Journal = vbuf.Range{From: next, To: last}
	if last < next {
		return out, nil
	}
	if first > next {
		return nil, fmt.Errorf("seqs %s to %s are neither on the stores nor in the buffer: %s", next, first-1, refusedBeyond)
	}
	for _, r := range journal.Damaged() {
		if r.To >= next && r.From <= last {
			return nil, fmt.Errorf("the buffer has lost writes %s, which were durable and are not on the stores: %s", r, refusedBeyond)
		}
	}
	out.Writes = func(ctx context.Context, visit func(block.Write) error) error {
		for at := next; at <= last; {
			if err := ctx.Err(); err != nil {
				return err
			}
			before := at
			at, err = journal.Read(at, journalReadBytes, func(w block.Write) error {
				if w.Volume != v.Index {
					return nil
				}
				return visit(w)
			})
			if err == nil && at == before {
				err = fmt.Errorf("it ends before seq %s", last)
			}
			if err != nil {
				return fmt.Errorf("read the journal in the buffer: %w", err)
			}
		}
		return nil
	}
	return out, nil
}

// journalReadBytes is about how much of the journal is read at a time.
const journalReadBytes = 16 << 20

// oneHistory checks that whatever the log holds is this host's, as far as that can
// be told: what another has logged has the seqs of what the buffer holds.
func (u *Unlogged) oneHistory(f groupFiles, h *restorer.History, prog *progress, end block.Seq) error {
	own, err := f.loadEpochs()
	if err != nil {
		return err
	}
	newest := h.Newest().Epoch
	taken := !slices.ContainsFunc(own, func(e format.Epoch) bool { return !e.Less(newest) })
	var l life
	if _, err := u.cfg.State.LoadJSON(&l, f.path(lifeFile)...); err != nil {
		return err
	}
	// See ARCHITECTURE.md, "Starts": a copy of this state knows the epoch, too.
	if taken || l.Unconfirmed && end > max(l.From, prog.To) {
		return fmt.Errorf("another agent has gone on with the group (epoch %s): what this buffer holds is of a history that has ended: %s", newest, refusedBeyond)
	}
	return nil
}

// isWhole checks that all that was acknowledged of v is in the history, in a batch
// or in the journal, or was.
func (u *Unlogged) isWhole(ctx context.Context, f groupFiles, h *restorer.History, v restorer.Volume, batches []*batch.Batch) error {
	bits, err := u.buffer.Bitmap(ctx, h.GroupID)
	if err != nil {
		return err
	}
	if err := bits.Damaged(); err != nil {
		return fmt.Errorf("it cannot be told which writes went past the full buffer: %w: %s", err, refusedBeyond)
	}
	if bits.Active() {
		return fmt.Errorf("the buffer was full: since %s writes went past it, straight to the volume, and are lost with it: %s", bits.Since().Local().Format("2006-01-02 15:04:05"), refusedBeyond)
	}
	notes, err := f.loadResyncs()
	if err != nil {
		return err
	}
	log := newProgress()
	log.N = h.N()
	for _, p := range h.Resyncs {
		log.Resync[p.Volume] = p.Remaining
	}
	if r, open := openResync(v.Index, notes, log, batches); open {
		bytes := int64(0)
		for _, e := range r.Remaining {
			bytes += e.Len
		}
		return fmt.Errorf("a resync had not ended: %d bytes of the volume were still to be read from it, and are lost with it: %s", bytes, refusedBeyond)
	}
	return nil
}

// isOfResync reports whether a batch is part of a resync of volume v.
func isOfResync(b *batch.Batch, v block.VolumeIndex) bool {
	it := &b.Items
	return slices.Contains(it.GapEnds, v) ||
		slices.ContainsFunc(it.GapBegins, func(x format.GapBegin) bool { return x.Volume == v }) ||
		slices.ContainsFunc(it.Partials, func(x format.Partial) bool { return x.Volume == v })
}

// add lays a batch over those before.
func (o *BeyondLog) add(f groupFiles, b *batch.Batch, v block.VolumeIndex, ring *crypt.Ring) error {
	o.Batches++
	for _, s := range b.Segments {
		if s.Row.Inline == batch.InlineHere {
			o.Inline[s.Row.ID] = s.Inline
		}
	}
	var all []manifest.Extent
	for _, ve := range b.Volumes {
		if ve.Volume == v {
			all = append(all, ve.Extents...)
		}
	}
	for _, x := range all {
		if x.Zero {
			continue
		}
		if _, ok := ring.Set(x.Segment.KeySet); ok {
			continue
		}
		raw, err := f.dir.Load(f.path("keysets", x.Segment.KeySet.String())...)
		if errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the state folder %s lacks key set %s, which the batch of seqs %s to %s needs: pass the --state DIR of the agent that used the buffer", f.dir.Path(), x.Segment.KeySet, b.From, b.To)
		}
		if err == nil {
			_, err = ring.Add(raw)
		}
		if err != nil {
			return fmt.Errorf("read key set %s: %w", x.Segment.KeySet, err)
		}
	}
	o.Beyond.Batches = append(o.Beyond.Batches, all)
	return nil
}
