package restorer_test

import (
	"context"
	"errors"
	"slices"
	"testing"

	"drc/restorer"
)

// FuzzResolve: whatever somebody types as a point is a checkpoint of the volume,
// or an error that says there is no such point.
func FuzzResolve(f *testing.F) {
	for _, s := range []string{"", "latest", "seq:3", "seq:", "seq:-1", "seq:18446744073709551616", "seq:3@", "seq:3@abcd", "-1m", "-", "--1m", "-1m2", "-9223372036854775807ns",
		"-1e9h", "2026-01-02", "2026-01-02 15:04", "2026-13-02", "0000-01-01", "9999-12-31T23:59:59.999999999Z", "name", "\x00", "seq:\xff"} {
		f.Add(s)
	}
	w, _ := timeline(f, 10, 20, 30, 15, 25, 100)
	h := w.history()
	v, _ := h.Volume("v0")
	points := checkpoints(f, h, v)
	f.Fuzz(func(t *testing.T, text string) {
		p, err := h.Resolve(context.Background(), "v0", text)
		if err != nil {
			if !errors.Is(err, restorer.ErrNoSuchPoint) {
				t.Errorf("%q: %v", text, err)
			}
			return
		}
		if !slices.ContainsFunc(points, func(c restorer.Checkpoint) bool { return c.Seq == p.Seq && c.N == p.N }) {
			t.Errorf("%q is seq %s, which is no checkpoint", text, p.Seq)
		}
	})
}
