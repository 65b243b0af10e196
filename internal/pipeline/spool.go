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
	return &spool{s: s, logger: logger, safe: safe, kept: map[*batch.Batch]*keptBatch{}, bySegment: map[block.SegmentID]*keptBatch{}}
}

// recovered returns what the buffer kept over a restart: the batches to log,
// oldest first, with their placed shards, and the shards of logged ones that
// still have to be brought to their stores.
func (p *spool) recovered() (batches []*batch.Batch, placed [][]uint64, heal []uploader.Shard, err error) {
	for _, vb := range p.s.Batches() {
		k := &keptBatch{vb: vb, logged: vb.Logged}
		p.add(k)
		if vb.Logged {
			for _, s := range vb.Shards {
				if !p.s.IsPlaced(s.Segment, s.Index) {
					heal = append(heal, uploader.Shard{Segment: s.Segment, Index: s.Index})
				}
			}
			if k.missing == 0 {
				p.over = append(p.over, k)
			}
			continue
		}
		b, err := decode(vb)
		if err != nil {
			return nil, nil, nil, err
		}
		bits := make([]uint64, len(b.Segments))
		for i, seg := range b.Segments {
			for shard := range seg.Row.Profile.Total() {
				if p.s.IsPlaced(seg.Row.ID, shard) {
					bits[i] |= 1 << shard
				}
			}
		}
		p.kept[b] = k
		batches = append(batches, b)
		placed = append(placed, bits)
	}
	p.drop(nil)
	return batches, placed, heal, nil
}

func decode(vb *vbuf.Batch) (*batch.Batch, error) {
	return batch.Decode(fmt.Sprintf("batch of seqs %s to %s in the buffer", vb.From, vb.To), vb.Record)
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
					vb.Shards = append(vb.Shards, vbuf.Shard{Segment: seg.Row.ID, Index: i, Parity: seg.Row.Profile.Parity, Data: data})
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
	return decode(k.vb)
}

// ReadShard implements uploader.Spool.
func (p *spool) ReadShard(seg block.SegmentID, index int) ([]byte, error) {
	return p.s.ReadShard(seg, index)
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
