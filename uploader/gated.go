package uploader

import (
	"context"
	"errors"
	"time"

	"drc/internal/object/gate"
	"drc/internal/repo"
)

// Gated returns r with a gate in front of each store, so that a store that fails
// is asked by one probe at a time, over all that is done with what is returned:
// the groups of an agent share one. Stores that have a gate keep it.
func Gated(r *repo.Repository) *repo.Repository {
	out := *r
	out.Members = append([]repo.Member(nil), r.Members...)
	for i := range out.Members {
		if m := &out.Members[i]; m.Store != nil {
			m.Store = gate.Of(m.Store)
		}
	}
	return &out
}

// later waits, after err, until a store is worth another try with a call of that
// kind: while its gate is shut, as long as that says. What else goes wrong has its
// own pause.
func later(ctx context.Context, m repo.Member, k gate.Kind, pause *backoff) error {
	g := gate.Of(m.Store)
	if since, _ := g.Down(); since.IsZero() {
		return pause.wait(ctx)
	}
	return g.Wait(ctx, k)
}

// failure is since when a store fails, now that err has come of it, and how.
func failure(err error, now time.Time) (time.Time, error) {
	var down *gate.DownError
	if errors.As(err, &down) {
		return now.Add(-time.Since(down.Since)), down.Err
	}
	return now, err
}
