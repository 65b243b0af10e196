package restorer

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"sync"

	"golang.org/x/sync/errgroup"

	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/internal/repo"
	"drc/internal/segment"
)

const (
	// gapBytes: a hole between two wanted stretches of a segment up to this
	// size is read through rather than made two requests.
	gapBytes = 64 << 10
	// runBytes is about how much of a segment is fetched as one piece of work.
	runBytes = 8 << 20
	// wholeBytes: of a segment with no more payload than this, all is fetched
	// at once, without asking for its index first.
	wholeBytes = 256 << 10
	// deliverBytes is about how much of a run is handed on at a time: larger
	// writes cost less, and what waits for being written is memory.
	deliverBytes = 512 << 10
	// runsAtOnce is how many runs of one segment are under way at a time.
	runsAtOnce = 8
)

// frameUse is what becomes of what was fetched of segments.
type frameUse int

const (
	keepFrames frameUse = iota // it stays in memory, and in the cache, for later reads
	holdFrames                 // it stays in memory, for reads close by
	dropFrames                 // it is handed on at once
)

// segmentIndex is an opened index with what look-ups need.
type segmentIndex struct {
	frames     []format.Frame
	firstChunk []int   // ordinal of each frame's first chunk
	offset     []int64 // of each frame in the payload
	chunks     int
}

func newSegmentIndex(x *format.SegmentIndex) *segmentIndex {
	s := &segmentIndex{frames: x.Frames}
	at := int64(0)
	for _, f := range x.Frames {
		s.firstChunk = append(s.firstChunk, s.chunks)
		s.offset = append(s.offset, at)
		s.chunks += len(f.Chunks)
		at += int64(f.Stored)
	}
	return s
}

func (s *segmentIndex) cost() int64 { return int64(len(s.frames))*64 + int64(s.chunks)*8 + 256 }

// frameOf returns the frame that holds a chunk.
func (s *segmentIndex) frameOf(chunk int) int {
	return sort.SearchInts(s.firstChunk, chunk+1) - 1
}

// cut returns what extent x is in its frame's plain bytes.
func (s *segmentIndex) cut(frame int, plain []byte, x manifest.Extent) []byte {
	at := int64(0)
	for _, n := range s.frames[frame].Chunks[:x.Chunk-s.firstChunk[frame]] {
		at += int64(n)
	}
	return plain[at+x.Offset : at+x.Offset+x.Len]
}

// plainBytes is how large a frame is when it is opened.
func (s *segmentIndex) plainBytes(frame int) int64 { return int64(s.frames[frame].Plain()) }

// check refuses extents that do not fit the segment's index.
func (s *segmentIndex) check(row format.SegmentRow, x manifest.Extent) error {
	if x.Chunk < 0 || x.Chunk >= s.chunks {
		return format.Corrupt("segment "+row.ID.String(), "a manifest wants chunk %d of %d", x.Chunk, s.chunks)
	}
	f := s.frameOf(x.Chunk)
	if have := s.frames[f].Chunks[x.Chunk-s.firstChunk[f]]; have != x.ChunkLen || x.Offset < 0 || x.Offset+x.Len > int64(have) {
		return format.Corrupt("segment "+row.ID.String(), "a manifest wants bytes %d+%d of chunk %d, which has %d", x.Offset, x.Len, x.Chunk, have)
	}
	return nil
}

// frameWork is what is wanted of one frame.
type frameWork struct {
	ordinal int
	pieces  []manifest.Extent
}

// run is a stretch of a segment's payload that is fetched as one.
type run struct {
	from, to int64
	frames   []frameWork
}

// piece is an extent of a volume with its content.
type piece struct {
	manifest.Extent
	data []byte
}

// fetch gets the frames that hold the pieces of one segment, each once, and
// hands all pieces with their content to sink, some at a time. sink must be
// safe for concurrent use and must not keep data.
func (im *Image) fetch(ctx context.Context, w *segmentWork, use frameUse, sink func([]piece) error) error {
	keys, ok := im.history.cfg.Ring.Set(w.row.KeySet)
	if !ok {
		return format.Corrupt("segment "+w.row.ID.String(), "no log entry brings its key set %s", w.row.KeySet)
	}
	index, payload, err := im.index(ctx, keys, w.row, use)
	if err != nil {
		return err
	}
	wanted := map[int]*frameWork{}
	var frames []*frameWork
	for _, x := range w.pieces {
		if err := index.check(w.row, x); err != nil {
			return err
		}
		f := index.frameOf(x.Chunk)
		fw := wanted[f]
		if fw == nil {
			fw = &frameWork{ordinal: f}
			wanted[f] = fw
			frames = append(frames, fw)
		}
		fw.pieces = append(fw.pieces, x)
	}
	slices.SortFunc(frames, func(a, b *frameWork) int { return a.ordinal - b.ordinal })
	parts := func(f frameWork, plain []byte) []piece {
		out := make([]piece, len(f.pieces))
		for i, x := range f.pieces {
			out[i] = piece{x, index.cut(f.ordinal, plain, x)}
		}
		return out
	}
	open := func(f frameWork, stored, into []byte) ([]piece, error) {
		plain, err := segment.OpenFrame(keys, w.row.ID, f.ordinal, index.frames[f.ordinal], stored, into)
		if err != nil {
			return nil, err
		}
		if use != dropFrames {
			im.memory.frames.put(im.frameKey(w.row, f.ordinal), slices.Clip(plain))
		}
		return parts(f, plain), nil
	}
	if use != dropFrames {
		var rest []*frameWork
		for _, f := range frames {
			plain, ok := im.memory.frames.get(im.frameKey(w.row, f.ordinal))
			if !ok {
				rest = append(rest, f)
			} else if err := sink(parts(*f, plain)); err != nil {
				return err
			}
		}
		frames = rest
	}
	if payload == nil {
		if frames, err = im.openKept(ctx, w.row, index, frames, use, open, sink); err != nil {
			return err
		}
	}
	var runs []run
	for _, f := range frames {
		from := index.offset[f.ordinal]
		to := from + int64(index.frames[f.ordinal].Stored)
		if n := len(runs); n > 0 && from-runs[n-1].to <= gapBytes && to-runs[n-1].from <= runBytes {
			runs[n-1].to = to
			runs[n-1].frames = append(runs[n-1].frames, *f)
			continue
		}
		runs = append(runs, run{from: from, to: to, frames: []frameWork{*f}})
	}
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runsAtOnce)
	for _, r := range runs {
		g.Go(func() error { return im.fetchRun(gctx, keys, w.row, index, payload, r, use, open, sink) })
	}
	return g.Wait()
}

// openKept opens the frames that are in the cache, and returns those that are not, or
// are no good there.
func (im *Image) openKept(ctx context.Context, row format.SegmentRow, index *segmentIndex, frames []*frameWork, use frameUse, open openFrame, sink func([]piece) error) ([]*frameWork, error) {
	if im.history.cfg.Cache == nil || row.Inline != 0 || len(frames) == 0 {
		return frames, nil
	}
	opened := make([]bool, len(frames))
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(runsAtOnce)
	for i, f := range frames {
		g.Go(func() error {
			room := min(int64(index.frames[f.ordinal].Stored), transferBytes)
			if err := im.memory.transfer.Acquire(gctx, room); err != nil {
				return err
			}
			defer im.memory.transfer.Release(room)
			kept := im.history.cfg.keptFrame(row, f.ordinal)
			stored, ok := kept.get()
			if !ok {
				return nil
			}
			var into []byte
			if use == dropFrames {
				m := plainFrames.take(index.frames[f.ordinal].Plain() + segment.SpareBytes)
				defer plainFrames.give([]*[]byte{m})
				into = *m
			}
			parts, err := open(*f, stored, into)
			if isDamage(err) {
				kept.drop()
			}
			if err != nil {
				return nil // the stores may have it
			}
			opened[i] = true
			return sink(parts)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var rest []*frameWork
	for i, f := range frames {
		if !opened[i] {
			rest = append(rest, f)
		}
	}
	return rest, nil
}

// fetchRun fetches a run and opens its frames. If anything of it is no good,
// the segment is reconstructed from what is.
func (im *Image) fetchRun(ctx context.Context, keys *crypt.KeySet, row format.SegmentRow, index *segmentIndex, payload []byte, r run, use frameUse, open openFrame, sink func([]piece) error) error {
	if payload == nil {
		if whole, ok := im.memory.payloads.get(im.segmentKey(row)); ok {
			payload = whole
		}
	}
	have := stretches{{0, payload}}
	if payload == nil {
		room := min(r.to-r.from, transferBytes)
		if err := im.memory.transfer.Acquire(ctx, room); err != nil {
			return err
		}
		defer im.memory.transfer.Release(room)
		var err error
		have, err = im.readPayload(ctx, row, r.from, r.to)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			have = nil
		}
	}
	var parts []piece
	held := int64(0)
	var memory []*[]byte
	defer func() { plainFrames.give(memory) }()
	for _, f := range r.frames {
		a := index.offset[f.ordinal]
		b := a + int64(index.frames[f.ordinal].Stored)
		var into []byte
		if use == dropFrames {
			m := plainFrames.take(index.frames[f.ordinal].Plain() + segment.SpareBytes)
			memory = append(memory, m)
			into = *m
		}
		var opened []piece
		err := errNotRead
		if have != nil {
			opened, err = open(f, have.cut(a, b), into)
			if err != nil && (!isDamage(err) || row.Inline != 0) {
				return err
			}
		}
		if err != nil {
			whole, err := im.reconstruct(ctx, keys, row)
			if err != nil {
				return err
			}
			have = stretches{{0, whole}}
			if opened, err = open(f, have.cut(a, b), into); err != nil {
				return err
			}
		}
		if use == keepFrames {
			im.history.cfg.keptFrame(row, f.ordinal).put(have.cut(a, b))
		}
		parts = append(parts, opened...)
		held += index.plainBytes(f.ordinal)
		if held >= deliverBytes {
			if err := sink(parts); err != nil {
				return err
			}
			plainFrames.give(memory)
			parts, memory, held = parts[:0], memory[:0], 0
		}
	}
	if len(parts) == 0 {
		return nil
	}
	return sink(parts)
}

// openFrame opens a wanted frame from its stored bytes, in the memory given if
// that is large enough, and returns what is wanted of it.
type openFrame func(f frameWork, stored, into []byte) ([]piece, error)

// framePool is memory for opened frames that are handed on at once.
type framePool struct{ pool sync.Pool }

var plainFrames framePool

// take returns memory for n bytes.
func (p *framePool) take(n int) *[]byte {
	m, ok := p.pool.Get().(*[]byte)
	if !ok {
		m = new([]byte)
	}
	if cap(*m) < n {
		*m = make([]byte, 0, n)
	}
	return m
}

func (p *framePool) give(all []*[]byte) {
	for _, m := range all {
		p.pool.Put(m)
	}
}

// errNotRead stands for content that could not be read.
var errNotRead = errors.New("not read")

// index returns a segment's index. If its payload had to be fetched whole for
// that, it is returned as well.
func (im *Image) index(ctx context.Context, keys *crypt.KeySet, row format.SegmentRow, use frameUse) (*segmentIndex, []byte, error) {
	if row.Inline != 0 {
		payload, err := im.inline(ctx, row)
		if err != nil {
			return nil, nil, err
		}
		if x, ok := im.memory.indexes.get(im.segmentKey(row)); ok {
			return x, payload, nil
		}
		x, err := segment.OpenIndex(keys, row, payload[row.Payload-int64(row.IndexBytes):])
		if err != nil {
			return nil, nil, fmt.Errorf("log entry %d: %w", row.Inline, err)
		}
		s := newSegmentIndex(x)
		im.memory.indexes.put(im.segmentKey(row), s)
		return s, payload, nil
	}
	if x, ok := im.memory.indexes.get(im.segmentKey(row)); ok {
		return x, nil, nil
	}
	kept := im.history.cfg.keptIndex(row)
	if sealed, ok := kept.get(); ok {
		if x, err := segment.OpenIndex(keys, row, sealed); err == nil {
			s := newSegmentIndex(x)
			im.memory.indexes.put(im.segmentKey(row), s)
			return s, nil, nil
		}
		kept.drop()
	}
	from := row.Payload - int64(row.IndexBytes)
	if row.Payload <= wholeBytes {
		from = 0
	}
	payload, ok := im.memory.payloads.get(im.segmentKey(row))
	var x *format.SegmentIndex
	var sealed []byte
	if !ok {
		have, err := im.readPayload(ctx, row, from, row.Payload)
		if ctx.Err() != nil {
			return nil, nil, ctx.Err()
		}
		if err == nil {
			sealed = have.cut(row.Payload-int64(row.IndexBytes), row.Payload)
			x, err = segment.OpenIndex(keys, row, sealed)
			if err == nil && from == 0 {
				payload = have.cut(0, row.Payload)
			}
		}
		if err != nil {
			if payload, err = im.reconstruct(ctx, keys, row); err != nil {
				return nil, nil, err
			}
		}
	}
	if x == nil {
		var err error
		sealed = payload[row.Payload-int64(row.IndexBytes):]
		if x, err = segment.OpenIndex(keys, row, sealed); err != nil {
			return nil, nil, err
		}
	}
	if use == keepFrames {
		kept.put(sealed)
	}
	s := newSegmentIndex(x)
	im.memory.indexes.put(im.segmentKey(row), s)
	return s, payload, nil
}

// inline returns the payload of a segment that travels in a log entry.
func (im *Image) inline(ctx context.Context, row format.SegmentRow) ([]byte, error) {
	h := im.history
	if im.beyond != nil {
		if payload, ok := im.beyond.Inline[row.ID]; ok {
			if int64(len(payload)) != row.Payload {
				return nil, format.Corrupt("segment "+row.ID.String(), "it has %d bytes in its batch, and %d are expected", len(payload), row.Payload)
			}
			return payload, nil
		}
	}
	if row.Inline > h.N() {
		return nil, format.Corrupt("segment "+row.ID.String(), "a manifest says that it is in log entry %d of %d", row.Inline, h.N())
	}
	b, err := h.body(ctx, row.Inline)
	if err != nil {
		return nil, err
	}
	for _, s := range b.items.Segments {
		if s.ID == row.ID {
			if int64(len(s.Payload)) != row.Payload {
				break
			}
			return s.Payload, nil
		}
	}
	return nil, format.Corrupt(fmt.Sprintf("log entry %d", row.Inline), "it lacks segment %s, to which a manifest refers", row.ID)
}

// shardName is the name of a shard object.
func (im *Image) shardName(row format.SegmentRow, shard int) string {
	return format.SegmentName(im.history.GroupID, row.ID, row.Expiry, shard)
}

// shardMember is the store on which a shard belongs.
func (im *Image) shardMember(row format.SegmentRow, shard int) *member {
	members := im.history.stores.members
	return members[repo.ShardMember(row.ID, shard, len(members))]
}
