package uploader

import (
	"context"
	"errors"
	"fmt"
	"time"

	"drc/internal/format"
	"drc/internal/object/gate"
)

// run keeps one store's log up with what is wanted.
func (s *storeLog) run(ctx context.Context) {
	var pause, noSource backoff
	for ctx.Err() == nil {
		err := s.work(ctx, func() { pause.reset(); noSource.reset() })
		if ctx.Err() != nil {
			return
		}
		var corrupt *format.CorruptError
		switch {
		case errors.Is(err, errNoSource): // not this store's fault, whatever the reason
			s.change(func(v *view) { v.lastErr = err })
			s.log.cfg.Logger.Warn("a store lacks an entry that cannot be read from another one now; trying again", "store", s.member.URL(), "error", err)
			if noSource.wait(ctx) != nil {
				return
			}
		case errors.Is(err, errFencedHere):
			s.change(func(v *view) { v.fenced, v.lastErr = true, err })
			s.log.cfg.Logger.Warn("another writer's promise stands in this store's log: it has no vote for us any more",
				"store", s.member.URL(), "epoch", s.acc.Promised.String())
			return
		case errors.As(err, &corrupt):
			s.change(func(v *view) { v.broken, v.lastErr = err, err })
			s.log.cfg.Logger.Error("this store's log is damaged: it has no vote and is not written", "store", s.member.URL(), "error", err)
			return
		case err != nil:
			s.isDown(err)
			kind := gate.Reads
			if s.unput {
				kind = gate.Writes
			}
			if later(ctx, s.member, kind, &pause) != nil {
				return
			}
		}
	}
}

// isDown notes that the store fails.
func (s *storeLog) isDown(err error) {
	since, why := failure(err, s.log.cfg.Now())
	s.change(func(v *view) {
		if v.downFrom.IsZero() {
			v.downFrom = since
			s.log.cfg.Logger.Warn("a store's log cannot be reached; trying again", "store", s.member.URL(), "error", why)
		}
		v.lastErr = why
	})
}

// work does what is to be done on the store's log, and returns the first
// failure. It calls well after each thing that the store has done.
func (s *storeLog) work(ctx context.Context, well func()) error {
	if err := s.catchUp(ctx); err != nil {
		return err
	}
	if err := s.whollyRead(ctx); err != nil {
		return err
	}
	up := func() {
		s.change(func(v *view) {
			v.loaded = true
			if s.unput {
				return
			}
			well()
			if !v.downFrom.IsZero() {
				s.log.cfg.Logger.Info("a store's log is reached again", "store", s.member.URL(), "down_for", s.log.cfg.Now().Sub(v.downFrom).Round(time.Second).String())
			}
			v.downFrom, v.lastErr = time.Time{}, nil
		})
	}
	up()
	for {
		var epoch format.Epoch
		var next position
		var known uint64
		err := s.log.mu.await(ctx, 0, func() bool {
			if known = s.log.tails[s.member.ID]; known > s.acc.Next {
				return true
			}
			epoch = s.log.epoch
			next = s.next()
			return !epoch.IsZero() && (s.acc.Promised != epoch || next.N > 0)
		})
		if err != nil {
			return err
		}
		if known > s.acc.Next {
			// Another store's object says that this log was longer when it was
			// written. Either it has grown since it was read, or it was cut back.
			if err := s.catchUp(ctx); err != nil {
				return err
			}
			if s.acc.Next < known {
				return format.Corrupt(s.member.URL()+" "+format.LogPrefix(s.log.cfg.Group),
					"its log has %d objects, and another store says that it had %d: it was rolled back or damaged", s.acc.Next, known)
			}
			continue
		}
		if s.acc.Promised != epoch {
			if err := s.append(ctx, format.LogPromise, epoch, 0, nil); err != nil {
				return err
			}
			up()
			continue
		}
		old := next.Hash == format.Hash{}
		raw, err := s.wanted(ctx, &next)
		if err != nil {
			if ctx.Err() != nil {
				return ctx.Err()
			}
			return fmt.Errorf("%w: %w", errNoSource, err)
		}
		if a, ok := s.acc.Entry(next.N); !old || !ok || a.Hash != next.Hash {
			if err := s.append(ctx, format.LogCommit, epoch, next.N, raw); err != nil {
				return err
			}
			up()
		}
		if old {
			s.log.holdsOld(s, next.N)
		}
	}
}

// wanted returns the bytes of an entry that the log lacks, and its hash if p
// has none.
func (s *storeLog) wanted(ctx context.Context, p *position) (raw []byte, err error) {
	if p.Hash != (format.Hash{}) {
		if raw, err = s.log.value(ctx, *p); err == nil || !s.log.isDecided(p.N) {
			return raw, err
		}
	}
	if s.past == nil {
		s.past = &past{log: s.log, of: s}
	}
	*p, raw, err = s.past.entry(ctx, p.N)
	return raw, err
}

// next is the first entry up to the wanted one that this log does not hold as
// it was chosen, or the zero position. The wanted entry itself must be held
// under the own epoch unless it is known to be decided. The hash is zero if it
// must be found out first. Before a majority has promised there is none. l.mu is
// held.
func (s *storeLog) next() position {
	before := s.whole
	s.log.advance(s.i)
	if s.whole != before {
		s.log.mu.notify() // Safe may have grown
	}
	if s.whole >= s.log.want.N || !s.log.promised {
		return position{}
	}
	return position{s.whole + 1, s.log.chosen(s.whole + 1).Hash}
}
