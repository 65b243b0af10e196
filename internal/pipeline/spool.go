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

	mu   sync.Mutex
	kept map[*batch.Batch]*vbuf.Batch
	open []*vbuf.Batch // logged, with shards that are not placed
}

func newSpool(s *vbuf.Spool, logger *slog.Logger, safe func(block.Seq)) *spool {
	return &spool{s: s, logger: logger, safe: safe, kept: map[*batch.Batch]*vbuf.Batch{}}
}

// recovered returns what the buffer kept over a restart: the batches to log,
// oldest first, with their placed shards, and the shards of logged ones that
// still have to be brought to their stores.
func (p *spool) recovered() (batches []*batch.Batch, placed [][]uint64, heal []uploader.Shard, err error) {
	for _, vb := range p.s.Batches() {
		if vb.Logged {
			p.open = append(p.open, vb)
			for _, s := range vb.Shards {
				if !p.s.IsPlaced(s.Segment, s.Index) {
					heal = append(heal, uploader.Shard{Segment: s.Segment, Index: s.Index})
				}
			}
			continue
		}
		b, err := batch.Decode(fmt.Sprintf("batch of seqs %s to %s in the buffer", vb.From, vb.To), vb.Record)
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
		p.kept[b] = vb
		batches = append(batches, b)
		placed = append(placed, bits)
	}
	p.dropPlaced()
	return batches, placed, heal, nil
}

// Persist implements uploader.Spool.
func (p *spool) Persist(ctx context.Context, b, whole *batch.Batch) error {
	vb := &vbuf.Batch{From: b.From, To: b.To, Record: whole.Encode()}
	for _, seg := range whole.Segments {
		for i, data := range seg.Shards {
			if data != nil {
				vb.Shards = append(vb.Shards, vbuf.Shard{Segment: seg.Row.ID, Index: i, Parity: seg.Row.Profile.Parity, Data: data})
			}
		}
	}
	p.s.Add(vb)
	for {
		err := p.s.Persist(ctx, vb)
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
	p.mu.Lock()
	p.kept[b] = vb
	p.mu.Unlock()
	p.safe(b.To)
	return nil
}

// ReadShard implements uploader.Spool.
func (p *spool) ReadShard(seg block.SegmentID, index int) ([]byte, error) {
	return p.s.ReadShard(seg, index)
}

// Placed implements uploader.Spool.
func (p *spool) Placed(seg block.SegmentID, index int) {
	p.s.Placed(seg, index)
	p.dropPlaced()
}

// Logged implements uploader.Spool.
func (p *spool) Logged(b *batch.Batch) {
	p.mu.Lock()
	vb := p.kept[b]
	delete(p.kept, b)
	if vb != nil {
		p.open = append(p.open, vb)
	}
	p.mu.Unlock()
	if vb == nil {
		return
	}
	if err := p.s.Logged(vb); err != nil {
		p.logger.Warn("note in the buffer that a batch is logged; it will be logged once more after a restart, which changes nothing", "to", vb.To, "error", err)
	}
	p.dropPlaced()
}

// dropPlaced gives up the logged batches all of whose shards are placed.
func (p *spool) dropPlaced() {
	p.mu.Lock()
	defer p.mu.Unlock()
	left := p.open[:0]
	for _, vb := range p.open {
		all := true
		for _, s := range vb.Shards {
			all = all && p.s.IsPlaced(s.Segment, s.Index)
		}
		if !all {
			left = append(left, vb)
			continue
		}
		if err := p.s.Drop(vb); err != nil {
			p.logger.Warn("drop a batch from the buffer", "to", vb.To, "error", err)
			left = append(left, vb)
		}
	}
	p.open = left
}
