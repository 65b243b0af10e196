package restorer

import (
	"context"
	"fmt"
	"math"
	"slices"
	"sort"
	"time"

	"drc/internal/block"
	"drc/internal/format"
)

// Checkpoints visits what can be restored of a volume, in log order, until visit
// returns false.
func (h *History) Checkpoints(ctx context.Context, v Volume, visit func(Checkpoint) bool) error {
	var held *Checkpoint // of several entries that end at one seq, the last one counts
	more := true
	err := h.eachOf(ctx, v, v.JoinedN, func(e *Entry) bool {
		if !h.isPoint(v, e) {
			return true
		}
		if held != nil && held.Seq != e.Range.To {
			more = visit(*held)
		}
		c := h.checkpoint(v, e)
		held = &c
		return more
	})
	if err == nil && more && held != nil {
		visit(*held)
	}
	return err
}

// AllCheckpoints lists what can be restored of a volume, in log order. The list may
// be long: a busy volume has a checkpoint a second.
func (h *History) AllCheckpoints(ctx context.Context, v Volume) (all []Checkpoint, err error) {
	err = h.Checkpoints(ctx, v, func(c Checkpoint) bool {
		all = append(all, c)
		return true
	})
	return all, err
}

func (h *History) checkpoint(v Volume, e *Entry) Checkpoint {
	return Checkpoint{N: e.N, Seq: e.Range.To, Time: e.Time(), Names: h.namesAt(v, e.Range.To), Unconfirmed: e.Unconfirmed}
}

// namesAt are the names that the history of a volume gives to a seq.
func (h *History) namesAt(v Volume, seq block.Seq) (names []string) {
	for _, i := range h.names[seq] {
		if h.holds(v, h.named[i].n) {
			names = append(names, h.named[i].Name)
		}
	}
	return names
}

// before is the newest checkpoint of a volume in the entries up to n; with notAfter
// the newest in log order that is not later than that. It is nil if there is none.
func (h *History) before(ctx context.Context, v Volume, n uint64, notAfter *time.Time) (*Checkpoint, error) {
	return h.beforeIn(ctx, v, n, h.N(), notAfter)
}

// beforeIn is before for what ends with entry end.
func (h *History) beforeIn(ctx context.Context, v Volume, n, end uint64, notAfter *time.Time) (*Checkpoint, error) {
	for n = h.floor(v, n); n >= max(v.JoinedN, 1); n = h.floor(v, n) {
		if g := h.gapAt(v, n); g != nil {
			n = g.BeginN - 1
			continue
		}
		if skip, err := h.isLater(ctx, n, notAfter); err != nil {
			return nil, err
		} else if skip {
			n = (n - 1) / format.DigestRows * format.DigestRows
			continue
		}
		e, err := h.Entry(ctx, n)
		if err != nil {
			return nil, err
		}
		if h.isPoint(v, e) && (notAfter == nil || !e.Time().After(*notAfter)) {
			return h.lastOf(ctx, v, e, end)
		}
		n--
	}
	return nil, nil
}

// Last is the newest checkpoint of a volume in the entries up to n; with notAfter the
// newest in log order that is not later than that. Where there is none ok is false.
func (h *History) Last(ctx context.Context, v Volume, n uint64, notAfter *time.Time) (p Point, ok bool, err error) {
	return h.pointOf(ctx, v)(h.before(ctx, v, n, notAfter))
}

// Next is the oldest checkpoint of a volume in the entries behind n. Where there is
// none ok is false.
func (h *History) Next(ctx context.Context, v Volume, n uint64) (p Point, ok bool, err error) {
	return h.pointOf(ctx, v)(h.after(ctx, v, n))
}

func (h *History) pointOf(ctx context.Context, v Volume) func(*Checkpoint, error) (Point, bool, error) {
	return func(c *Checkpoint, err error) (Point, bool, error) {
		if err != nil || c == nil {
			return Point{}, false, err
		}
		p, err := h.point(ctx, v, *c)
		return p, err == nil, err
	}
}

// isLater reports whether all entries of the digest's page that entry n is in are
// later than a time.
func (h *History) isLater(ctx context.Context, n uint64, t *time.Time) (bool, error) {
	if t == nil || n > h.inDigest {
		return false, nil
	}
	ref, ok, err := h.ref(ctx, (n-1)/format.DigestRows)
	return ok && err == nil && ref.MinTime > t.UnixNano(), err
}

// ref says what is in a full page of the entries that the digest has; ok is false for
// the page that is not full.
func (h *History) ref(ctx context.Context, page uint64) (ref format.DigestRef, ok bool, err error) {
	ref, ok, err = h.digest.Ref(ctx, h.fetchDigest, page)
	if err == nil {
		return ref, ok, nil
	}
	entries, err := h.page(ctx, page)
	if err != nil {
		return ref, false, err
	}
	ref = format.DigestRef{MinTime: math.MaxInt64, MaxTime: math.MinInt64}
	for _, e := range entries {
		if e.Range != nil {
			ref.MinTime, ref.MaxTime, ref.Last = min(ref.MinTime, e.Range.Time), max(ref.MaxTime, e.Range.Time), e.Range.To
		}
	}
	return ref, true, nil
}

// after is the oldest checkpoint of a volume in the entries behind n, or nil.
func (h *History) after(ctx context.Context, v Volume, n uint64) (*Checkpoint, error) {
	for n = h.ceil(v, max(n+1, v.JoinedN)); n <= h.N(); n = h.ceil(v, n) {
		if g := h.gapAt(v, n); g != nil {
			if g.Open {
				return nil, nil
			}
			n = g.EndN
			continue
		}
		e, err := h.Entry(ctx, n)
		if err != nil {
			return nil, err
		}
		if h.isPoint(v, e) {
			return h.lastOf(ctx, v, e, h.N())
		}
		n++
	}
	return nil, nil
}

// lastOf is the checkpoint at the end of e: of several entries that end at one seq
// the last one counts, of those up to entry end.
func (h *History) lastOf(ctx context.Context, v Volume, e *Entry, end uint64) (*Checkpoint, error) {
	last := e
	err := h.eachOf(ctx, v, e.N+1, func(x *Entry) bool {
		if x.N > end {
			return false
		}
		if x.Range != nil && x.Range.To != e.Range.To {
			return false
		}
		if h.isPoint(v, x) {
			last = x
		}
		return true
	})
	if err != nil {
		return nil, err
	}
	c := h.checkpoint(v, last)
	return &c, nil
}

// laterBefore is a checkpoint of a volume in the entries before n that is later than
// t by its author's clock, which was set back since then; nil if there is none.
func (h *History) laterBefore(ctx context.Context, v Volume, n uint64, t time.Time) (*Checkpoint, error) {
	for n = h.floor(v, n-1); n >= max(v.JoinedN, 1); n = h.floor(v, n) {
		if n <= h.inDigest {
			ref, ok, err := h.ref(ctx, (n-1)/format.DigestRows)
			if err != nil {
				return nil, err
			}
			if ok && ref.MaxTime <= t.UnixNano() {
				n = (n - 1) / format.DigestRows * format.DigestRows
				continue
			}
		}
		e, err := h.Entry(ctx, n)
		if err != nil {
			return nil, err
		}
		if h.isPoint(v, e) && e.Time().After(t) {
			c := h.checkpoint(v, e)
			return &c, nil
		}
		n--
	}
	return nil, nil
}

// upTo is the last entry of a volume's history at which that had not gone beyond seq;
// 0 if there is none. With on it is the last such entry of that branch.
func (h *History) upTo(ctx context.Context, v Volume, seq block.Seq, on *lineSpan) (uint64, error) {
	if on != nil {
		return h.upToIn(ctx, *on, seq)
	}
	for _, s := range slices.Backward(h.spans(v)) {
		if seq >= s.after {
			return h.upToIn(ctx, s, seq)
		}
	}
	return 0, nil
}

// upToIn is the last entry of a stretch of the log at which the history had not gone
// beyond seq; if there is none, the entry before the stretch. Along it seqs rise.
func (h *History) upToIn(ctx context.Context, s lineSpan, seq block.Seq) (uint64, error) {
	last := min(s.to, h.N())
	beyond := func(entries []Entry) bool { return endOf(entries) > seq }
	// In the tail, the entries are in memory.
	if from := max(s.from, h.inDigest+1); from <= last {
		tail := h.tail[from-h.inDigest-1 : last-h.inDigest]
		if i := sort.Search(len(tail), func(i int) bool { return beyond(tail[:i+1]) }); i > 0 || from == s.from {
			return from + uint64(i) - 1, nil
		}
	}
	// Of pages that are full and lie whole in the stretch it is known where they end.
	last = min(last, h.inDigest)
	first, end := (s.from-1+format.DigestRows-1)/format.DigestRows, min(last, h.inDigest/format.DigestRows*format.DigestRows)/format.DigestRows
	var failed error
	page := s.from - 1
	if first < end {
		i := sort.Search(int(end-first), func(i int) bool {
			ref, _, err := h.ref(ctx, first+uint64(i))
			if err != nil && failed == nil {
				failed = err
			}
			return ref.Last > seq
		})
		page = (first + uint64(i)) * format.DigestRows // all before it is not beyond seq, unless i is 0
		if i == 0 {
			page = s.from - 1
		}
	}
	if failed != nil {
		return 0, failed
	}
	for at := page; at < last; {
		entries, err := h.page(ctx, at/format.DigestRows)
		if err != nil {
			return 0, err
		}
		begin := at / format.DigestRows * format.DigestRows
		some := entries[at-begin : min(uint64(len(entries)), last-begin)]
		if i := sort.Search(len(some), func(i int) bool { return beyond(some[:i+1]) }); i < len(some) {
			return at + uint64(i), nil
		}
		at += uint64(len(some))
	}
	return last, nil
}

// endOf is where the last of some entries that extends the history ends; 0 if none
// does.
func endOf(entries []Entry) block.Seq {
	for i := len(entries) - 1; i >= 0; i-- {
		if rg := entries[i].Range; rg != nil {
			return rg.To
		}
	}
	return 0
}

// extent says what range of a volume's history exists.
func (h *History) extent(ctx context.Context, v Volume) string {
	a, err1 := h.after(ctx, v, 0)
	b, err2 := h.before(ctx, v, h.N(), nil)
	if err1 != nil || err2 != nil || a == nil || b == nil {
		return fmt.Sprintf("drc history %s shows what there is", v.Name)
	}
	return fmt.Sprintf("volume %q has checkpoints from seq %s (%s) to seq %s (%s)", v.Name, a.Seq, stamp(a.Time), b.Seq, stamp(b.Time))
}
