package pipeline

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/format"
	"drc/uploader"
	"drc/vbuf"
)

// fullPause is how often a full buffer is tried again with a batch.
const fullPause = 500 * time.Millisecond

// spool lets uploader keep batches in vbuf.
type spool struct {
	s      *vbuf.Spool
	logger *slog.Logger
	// safe is told of each batch that has become durable here, in order.
	safe func(to block.Seq)
	// fetch gets a shard from its store; nil: nowhere.
	fetch      func(ctx context.Context, seg block.SegmentID, index int) ([]byte, error)
	rebuilding chan struct{} // holds one while a shard is made again from the stores

	mu        sync.Mutex
	kept      map[*batch.Batch]*keptBatch // not logged
	bySegment map[block.SegmentID]*keptBatch
	over      []*keptBatch // could not be dropped
}

// keptBatch is a batch in the buffer.
type keptBatch struct {
	vb      *vbuf.Batch
	missing int // shards that are not on their stores
	logged  bool
}

func newSpool(s *vbuf.Spool, logger *slog.Logger, safe func(block.Seq)) *spool {
	return &spool{s: s, logger: logger, safe: safe, rebuilding: make(chan struct{}, 1), kept: map[*batch.Batch]*keptBatch{}, bySegment: map[block.SegmentID]*keptBatch{}}
}

// recovered returns what the buffer kept over a restart: the batches to log,
// oldest first, with their placed shards, and the shards of logged ones that
// still have to be brought to their stores.
func (p *spool) recovered() (batches []*batch.Batch, placed [][]uint64, heal []uploader.HeldShard, err error) {
	for _, vb := range p.s.Batches() {
		k := &keptBatch{vb: vb, logged: vb.Logged}
		p.add(k)
		if vb.Logged {
			for _, s := range vb.Shards {
				if !p.s.IsPlaced(s.Segment, s.Index) {
					heal = append(heal, uploader.HeldShard{Shard: uploader.Shard{Segment: s.Segment, Index: s.Index}, SizeBytes: s.SizeBytes})
				}
			}
			if k.missing == 0 {
				p.over = append(p.over, k)
			}
			continue
		}
		b, err := p.decode(vb)
		if err != nil {
			return nil, nil, nil, err
		}
		for i := range b.Segments {
			b.Segments[i].Inline = nil // there may be very many batches, and Load has it
		}
		// What Persist was given nothing of was placed before.
		kept := map[uploader.Shard]bool{}
		for _, s := range vb.Shards {
			kept[uploader.Shard{Segment: s.Segment, Index: s.Index}] = true
		}
		bits := make([]uint64, len(b.Segments))
		for i, seg := range b.Segments {
			for shard := range seg.Row.Profile.Total() {
				if !kept[uploader.Shard{Segment: seg.Row.ID, Index: shard}] || p.s.IsPlaced(seg.Row.ID, shard) {
					bits[i] |= 1 << shard
				}
			}
		}
		p.kept[b] = k
		batches = append(batches, b)
		placed = append(placed, bits)
	}
	p.drop(nil)
	inOrder(batches, placed)
	return batches, placed, heal, nil
}

// inOrder puts batches that stand at the same place of the history, as those do
// that have no writes, in the order in which they were cut.
func inOrder(batches []*batch.Batch, placed [][]uint64) {
	at := func(b *batch.Batch) int64 {
		if b.Items.Range == nil {
			return 0
		}
		return b.Items.Range.Time
	}
	for i := range batches {
		for k := i; k > 0 && batches[k].From == batches[k-1].From && batches[k].To == batches[k-1].To && at(batches[k]) < at(batches[k-1]); k-- {
			batches[k], batches[k-1] = batches[k-1], batches[k]
			placed[k], placed[k-1] = placed[k-1], placed[k]
		}
	}
}

func (p *spool) decode(vb *vbuf.Batch) (*batch.Batch, error) { return decode(p.s, vb) }

// decode reads a batch that the buffer has kept.
func decode(s *vbuf.Spool, vb *vbuf.Batch) (*batch.Batch, error) {
	raw, err := s.ReadRecord(vb)
	if err != nil {
		return nil, err
	}
	return batch.Decode(fmt.Sprintf("batch of seqs %s to %s in the buffer", vb.From, vb.To), raw)
}

// add counts what of a batch is missing on the stores; p.mu is held, or nobody
// else knows p yet.
func (p *spool) add(k *keptBatch) {
	for _, s := range k.vb.Shards {
		p.bySegment[s.Segment] = k
		if !p.s.IsPlaced(s.Segment, s.Index) {
			k.missing++
		}
	}
}

// Persist implements uploader.Spool.
func (p *spool) Persist(ctx context.Context, b, whole *batch.Batch) error {
	p.mu.Lock()
	k := p.kept[b]
	if k == nil { // else an earlier try has failed
		vb := &vbuf.Batch{From: b.From, To: b.To, Record: whole.Encode()}
		for _, seg := range whole.Segments {
			for i, data := range seg.Shards {
				if data != nil {
					vb.Shards = append(vb.Shards, vbuf.Shard{Segment: seg.Row.ID, Index: i, Parity: seg.Row.Profile.Parity,
						HeadBytes: format.ShardHeaderSize, TailBytes: len(data) - format.ShardHeaderSize - int(format.ShardBytes(seg.Row.Payload, seg.Row.Profile.Data)), Data: data})
				}
			}
		}
		p.s.Add(vb)
		k = &keptBatch{vb: vb}
		p.kept[b] = k
		p.add(k)
	}
	p.mu.Unlock()
	for {
		err := p.s.Persist(ctx, k.vb)
		if err == nil {
			break
		}
		if !errors.Is(err, vbuf.ErrFull) {
			return err
		}
		t := time.NewTimer(fullPause)
		select {
		case <-ctx.Done():
			t.Stop()
			return ctx.Err()
		case <-t.C:
		}
	}
	p.safe(b.To)
	return nil
}

// Load implements uploader.Spool.
func (p *spool) Load(b *batch.Batch) (*batch.Batch, error) {
	p.mu.Lock()
	k := p.kept[b]
	p.mu.Unlock()
	if k == nil {
		return nil, fmt.Errorf("the batch of seqs %s to %s is not in the buffer", b.From, b.To)
	}
	return p.decode(k.vb)
}

// ReadShard implements uploader.Spool.
// A shard that was lost with a disk is made again from those of its segment that
// are on the stores already: they have left the buffer.
func (p *spool) ReadShard(seg block.SegmentID, index int) ([]byte, error) {
	data, err := p.s.ReadShard(seg, index)
	if !errors.Is(err, vbuf.ErrShardLost) || p.fetch == nil {
		return data, err
	}
	others, ferr := p.elsewhere(context.Background(), seg, index)
	if ferr != nil {
		return nil, errors.Join(err, ferr)
	}
	data, rerr := p.s.Rebuild(seg, index, others)
	if rerr != nil {
		return nil, errors.Join(err, rerr)
	}
	p.logger.Info("a shard that was lost with a disk of the buffer was made again from the stores", "segment", seg, "index", index)
	return data, nil
}

// elsewhere is othersOf, one at a time: it takes the memory of a segment.
func (p *spool) elsewhere(ctx context.Context, seg block.SegmentID, index int) (map[int][]byte, error) {
	if p.fetch == nil {
		return nil, vbuf.ErrShardLost
	}
	select {
	case p.rebuilding <- struct{}{}:
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	defer func() { <-p.rebuilding }()
	return p.othersOf(ctx, seg, index)
}

// othersOf gets as many other shards of a segment as it takes to make one again,
// from the buffer and the stores.
func (p *spool) othersOf(ctx context.Context, seg block.SegmentID, index int) (map[int][]byte, error) {
	h, err := format.DecodeShardHeader("a shard in the buffer", p.s.Head(seg, index))
	if err != nil {
		return nil, err // kept by an older program
	}
	ctx, cancel := context.WithTimeout(ctx, fetchTimeout)
	defer cancel()
	others := map[int][]byte{}
	var errs []error
	for i := 0; i < h.Profile.Total() && len(others) < h.Profile.Data; i++ {
		if i == index {
			continue
		}
		data, err := p.s.ReadShard(seg, i)
		if err != nil {
			data, err = p.fetch(ctx, seg, i)
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		others[i] = data
	}
	if len(others) < h.Profile.Data {
		return nil, errors.Join(errs...)
	}
	return others, nil
}

// fetchTimeout bounds how long a shard waits for the others of its segment.
const fetchTimeout = 2 * time.Minute

// fetchShard gets a shard from its store.
func (g *group) fetchShard(ctx context.Context, seg block.SegmentID, index int) ([]byte, error) {
	m, name := g.shardAt(seg, index)
	if m.Store == nil {
		return nil, fmt.Errorf("get %s from %s: %w", name, m.URL(), errNotAtHand)
	}
	data, _, err := m.Store.Get(ctx, name, format.ShardObjectBytes(format.MaxSegmentBytes), nil)
	if err != nil {
		return nil, fmt.Errorf("get %s from %s: %w", name, m.URL(), err)
	}
	return data, nil
}

// Placed implements uploader.Spool.
func (p *spool) Placed(seg block.SegmentID, index int) {
	p.mu.Lock()
	k := p.bySegment[seg]
	if k == nil || p.s.IsPlaced(seg, index) {
		p.mu.Unlock()
		return
	}
	p.s.Placed(seg, index)
	if !p.s.IsPlaced(seg, index) {
		p.mu.Unlock()
		return // not a shard that the buffer has
	}
	k.missing--
	done := k.logged && k.missing == 0
	p.mu.Unlock()
	if done {
		p.drop(k)
	}
}

// Logged implements uploader.Spool.
func (p *spool) Logged(b *batch.Batch) {
	p.mu.Lock()
	k := p.kept[b]
	delete(p.kept, b)
	p.mu.Unlock()
	if k == nil {
		return
	}
	if err := p.s.Logged(k.vb); err != nil {
		p.logger.Warn("note in the buffer that a batch is logged; it will be logged once more after a restart, which changes nothing", "to", k.vb.To, "error", err)
	}
	p.mu.Lock()
	k.logged = true
	done := k.missing == 0
	p.mu.Unlock()
	if done {
		p.drop(k)
	}
}

// giveUp drops a batch that is not logged, nor will be.
func (p *spool) giveUp(b *batch.Batch) error {
	p.mu.Lock()
	k := p.kept[b]
	p.mu.Unlock()
	if k == nil {
		return nil
	}
	if err := p.s.Drop(k.vb); err != nil {
		return err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.kept, b)
	for _, s := range k.vb.Shards {
		delete(p.bySegment, s.Segment)
	}
	return nil
}

// drop gives up a batch that is logged and all of whose shards are placed, and
// those that could not be given up before.
func (p *spool) drop(k *keptBatch) {
	p.mu.Lock()
	all := p.over
	p.over = nil
	p.mu.Unlock()
	if k != nil {
		all = append(all, k)
	}
	var over []*keptBatch
	for _, k := range all {
		if err := p.s.Drop(k.vb); err != nil {
			p.logger.Warn("drop a batch from the buffer", "to", k.vb.To, "error", err)
			over = append(over, k)
			continue
		}
		p.mu.Lock()
		for _, s := range k.vb.Shards {
			delete(p.bySegment, s.Segment)
		}
		p.mu.Unlock()
	}
	p.mu.Lock()
	p.over = append(p.over, over...)
	p.mu.Unlock()
}
