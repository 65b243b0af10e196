package uploader

import (
	"context"
	"time"

	"drc/internal/block"
	"drc/internal/format"
)

// StoreStatus is the state of one store's log for status and metrics.
type StoreStatus struct {
	Store     block.ID
	URL       string
	State     string    // "up", "down", "fenced", "damaged", "joining"
	Since     time.Time // when it went down
	LastError string
	Entry     uint64 // newest entry that it holds
}

// Status describes every store.
func (l *Log) Status() []StoreStatus {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := make([]StoreStatus, len(l.stores))
	for i, s := range l.stores {
		v := &l.views[i]
		st := StoreStatus{Store: s.member.ID, URL: s.member.URL(), State: "up", Since: v.downFrom, Entry: v.acc.Latest.N}
		switch {
		case v.broken != nil:
			st.State = "damaged"
		case v.fenced:
			st.State = "fenced"
		case !v.downFrom.IsZero():
			st.State = "down"
		case !v.loaded:
			st.State = "joining"
		}
		if v.lastErr != nil {
			st.LastError = v.lastErr.Error()
		}
		out[i] = st
	}
	return out
}

// Contested reports whether a minority of the stores follows another writer.
func (l *Log) Contested() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.votes(func(v *view) bool { return v.fenced }) > 0 && !l.lost()
}

// InOffice reports whether TakeOffice has succeeded.
func (l *Log) InOffice() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.inOffice
}

// AwaitOffice waits until TakeOffice has succeeded.
func (l *Log) AwaitOffice(ctx context.Context) error {
	return l.mu.await(ctx, 0, func() bool { return l.inOffice })
}

// OutOfReach reports whether so many stores have failed that no majority can
// be had until some of them are back.
func (l *Log) OutOfReach() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	down := l.votes(func(v *view) bool { return !v.downFrom.IsZero() || v.broken != nil })
	return !l.set.Majority(l.set.Votes() - down)
}

// Exposed reports whether the newest decided entry is on no more stores than
// lost, the number that may be lost, or a shard of a decided entry is not on its
// store.
func (l *Log) Exposed(lost int) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.unplaced > 0 || l.safe(lost) < l.decided.N
}

// Dates are the stores' clocks in their latest answers.
func (l *Log) Dates() []format.StoreDate {
	l.mu.Lock()
	defer l.mu.Unlock()
	var out []format.StoreDate
	for i := range l.views {
		if d := l.views[i].date; d != 0 {
			out = append(out, format.StoreDate{Store: l.stores[i].member.ID, Time: d})
		}
	}
	return out
}

// Fenced reports whether this writer can decide nothing any more.
func (l *Log) Fenced() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.lost()
}

// expose counts n more shards of decided entries that are not on their stores.
func (l *Log) expose(n int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.unplaced += n
}
