package restorer

import (
	"cmp"
	"context"
	"errors"
	"slices"
	"time"

	"drc/internal/erasure"
	"drc/internal/format"
)

// stretches are parts of a segment's payload, in order and without gaps.
type stretches []stretch

type stretch struct {
	off  int64 // in the payload
	data []byte
}

// cut returns bytes a to b of the payload, which must be covered. They alias a
// stretch, or are a copy where they cross from one to the next.
func (s stretches) cut(a, b int64) []byte {
	var out []byte
	for _, x := range s {
		from, to := max(a, x.off)-x.off, min(b, x.off+int64(len(x.data)))-x.off
		if from >= to {
			continue
		}
		if from+x.off == a && to+x.off == b {
			return x.data[from:to:to]
		}
		out = append(out, x.data[from:to]...)
	}
	return out
}

// part is what a read wants of one data shard.
type part struct {
	shard  int
	in     int64 // offset in the shard
	n      int64
	off    int64 // in the payload
	data   []byte
	err    error
	asked  int // requests under way
	late   bool
	again  bool // asked a second time
	member *member
	began  time.Time
}

// readPayload returns bytes from to to of a segment's payload. They come from
// the data shards that hold them; where one of these is missing, or takes too
// long, its bytes are rebuilt from the same range of other shards. Nothing is
// verified: that is for the AEAD of what is in it. If it fails, or what it
// returns turns out to be no good, there is still reconstruct.
func (im *Image) readPayload(ctx context.Context, row format.SegmentRow, from, to int64) (stretches, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var parts []*part
	size := format.ShardBytes(row.Payload, row.Profile.Data)
	for off := from; off < to; {
		p := &part{shard: int(off / size), off: off, in: off % size}
		p.n = min(to-off, size-p.in)
		p.member = im.shardMember(row, p.shard)
		off += p.n
		parts = append(parts, p)
	}
	type result struct {
		p    *part
		data []byte
		err  error
	}
	come := make(chan result, 2*len(parts)) // room for all: nobody may be here to take it
	ask := func(p *part, anyway insist) {
		p.asked++
		p.began = time.Now()
		go func() {
			data, err := im.readShardRange(ctx, row, p.shard, p.in, p.n, anyway)
			come <- result{p, data, err}
		}()
	}
	for _, p := range parts {
		ask(p, false)
	}
	type rebuilt struct {
		data [][]byte // of the parts that were missing
		err  error
	}
	var rebuilding []*part
	built := make(chan rebuilt, 1)
	didBuild := false
	alone := len(im.history.stores.members) == 1 || row.Profile.Parity == 0
	look := time.NewTicker(lateLook)
	defer look.Stop()
	for {
		complete, waiting := true, false
		for _, p := range parts {
			complete = complete && p.data != nil
			waiting = waiting || (p.data == nil && p.asked > 0)
		}
		if complete {
			break
		}
		// With all answers in but those that are late, what is missing is
		// rebuilt; the late ones may still be quicker.
		if rebuilding == nil && !didBuild && !slices.ContainsFunc(parts, func(p *part) bool { return p.data == nil && p.asked > 0 && !p.late }) {
			rebuilding, didBuild = missing(parts), true
			go func(lost []*part, known []part) {
				data, err := im.rebuild(ctx, row, lost, known)
				built <- rebuilt{data, err}
			}(rebuilding, copies(parts))
		}
		if !waiting && rebuilding == nil {
			var errs []error
			for _, p := range missing(parts) {
				errs = append(errs, p.err)
			}
			return nil, errors.Join(errs...)
		}
		select {
		case r := <-come:
			r.p.asked--
			if r.err == nil && r.p.data == nil {
				r.p.data = r.data
			}
			r.p.err = r.err
		case b := <-built:
			for i, p := range rebuilding {
				if b.err == nil && p.data == nil {
					if p.asked > 0 {
						im.history.stores.wasOvertaken(p.member)
					}
					p.data = b.data[i]
				}
			}
			rebuilding = nil
		case <-look.C:
			for _, p := range parts {
				if p.data != nil || p.asked == 0 || p.late || p.again || !im.history.stores.mayHedge(p.member, p.n, p.began) {
					continue
				}
				if alone { // there is nowhere else to go: the same once more
					p.again = true
					ask(p, true)
				} else {
					p.late = true
				}
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	out := make(stretches, len(parts))
	for i, p := range parts {
		out[i] = stretch{p.off, p.data}
	}
	return out, nil
}

func missing(parts []*part) (out []*part) {
	for _, p := range parts {
		if p.data == nil {
			out = append(out, p)
		}
	}
	return out
}

// copies is what is known of the parts now: their reader goes on.
func copies(parts []*part) (out []part) {
	for _, p := range parts {
		out = append(out, *p)
	}
	return out
}

// readShardRange reads n bytes from in of a shard.
func (im *Image) readShardRange(ctx context.Context, row format.SegmentRow, shard int, in, n int64, anyway insist) ([]byte, error) {
	m, name := im.shardMember(row, shard), im.shardName(row, shard)
	p, err := im.history.stores.getRange(ctx, m, anyway, name, format.ShardHeaderSize+in, n)
	if aboutObject(err) {
		im.history.stores.found(m, name, err)
	}
	return p, err
}

// rebuild returns the bytes of the parts that are lost, from the same range of
// k other shards. What is known of these already is not read again.
func (im *Image) rebuild(ctx context.Context, row format.SegmentRow, lost []*part, known []part) ([][]byte, error) {
	k, total := row.Profile.Data, row.Profile.Total()
	from, to := lost[0].in, lost[0].in+lost[0].n
	for _, p := range lost {
		from, to = min(from, p.in), max(to, p.in+p.n)
	}
	shards := make([][]byte, total)
	tried := make([]bool, total)
	for _, p := range lost {
		tried[p.shard] = true
	}
	// Its room is not part of what runs have acquired: nobody who holds this
	// waits for that.
	room := min(int64(k)*(to-from), rebuildBytes)
	if err := im.memory.rebuilds.Acquire(ctx, room); err != nil {
		return nil, err
	}
	defer im.memory.rebuilds.Release(room)
	size := format.ShardBytes(row.Payload, k)
	have := 0
	var rest []int            // shards that may be read, the best ones first
	begun := map[int][]byte{} // what is known of their beginnings
	for _, p := range known {
		if p.data == nil {
			continue
		}
		// The last data shard may end before its payload does: zeroes follow.
		end := p.in + p.n
		if p.off+p.n == row.Payload {
			end = size
		}
		if p.in > from {
			continue
		}
		b := p.data[min(from-p.in, p.n):min(to-p.in, p.n)]
		switch {
		case end < to:
			begun[p.shard] = b // its rest is read
			continue
		case int64(len(b)) < to-from:
			b = append(make([]byte, 0, to-from), b...)[:to-from]
		}
		shards[p.shard], tried[p.shard] = b, true
		have++
	}
	for i := range total {
		if !tried[i] {
			rest = append(rest, i)
		}
	}
	slices.SortStableFunc(rest, func(a, b int) int {
		return cmp.Or(
			cmp.Compare(downLast(im.shardMember(row, a)), downLast(im.shardMember(row, b))),
			cmp.Compare(len(begun[b]), len(begun[a])))
	})
	type result struct {
		shard int
		data  []byte
		err   error
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	come := make(chan result, len(rest))
	began := map[int]time.Time{} // of the shards that are being read
	ask := func() {
		i := rest[0]
		rest = rest[1:]
		began[i] = time.Now()
		go func() {
			known := begun[i]
			at := from + int64(len(known))
			data, err := im.readShardRange(ctx, row, i, at, to-at, false)
			if err == nil && len(known) > 0 {
				data = slices.Concat(known, data)
			}
			come <- result{i, data, err}
		}()
	}
	late := map[int]bool{}
	look := time.NewTicker(lateLook)
	defer look.Stop()
	var errs []error
	for have < k {
		for len(began)-len(late) < k-have && len(rest) > 0 {
			ask()
		}
		if len(began) == 0 {
			return nil, errors.Join(append(errs, erasure.ErrTooFew)...)
		}
		select {
		case r := <-come:
			delete(began, r.shard)
			delete(late, r.shard)
			if r.err != nil {
				errs = append(errs, r.err)
				continue
			}
			shards[r.shard] = r.data
			have++
		case <-look.C:
			for i, at := range began {
				if m := im.shardMember(row, i); !late[i] && len(rest) > 0 && im.history.stores.mayHedge(m, to-from, at) {
					late[i] = true
				}
			}
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	if err := erasure.Reconstruct(row.Profile, shards, true); err != nil {
		return nil, err
	}
	out := make([][]byte, len(lost))
	for i, p := range lost {
		out[i] = shards[p.shard][p.in-from : p.in-from+p.n]
	}
	return out, nil
}

// downLast sorts the stores that are down behind the others.
func downLast(m *member) int {
	if m.down() != nil {
		return 1
	}
	return 0
}
