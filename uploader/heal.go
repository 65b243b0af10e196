package uploader

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"drc/internal/manifest"
)

const (
	// lateMax bounds the manifests that wait in memory, by their names, for a
	// store that fails. What is beyond it is found by listing.
	lateMax = 128
	// healMaxBytes bounds a manifest that is read whole to be put on a store that
	// lacks it.
	healMaxBytes = 64 << 20
	// Pauses between listings that do not tell what is to be known.
	lookPauseMin = 5 * time.Second
	lookPauseMax = time.Hour
)

// healer puts manifests on stores that lack them, because a start ended while
// it put them, or because the store was away for long: one object at a time,
// oldest first. What is on as many stores as an entry needs is healed; the rest
// was left behind by a start that died.
type healer struct {
	m *merger

	mu     sync.Mutex
	missed []bool            // stores that may lack some, and must be listed
	lacks  [][]foundManifest // what each store is known to lack, oldest first
	late   []int             // how many manifests of this start wait for each store
	healed int64
	given  int64 // not healed: no store has a copy that can be trusted
}

func newHealer(m *merger) *healer {
	n := len(m.u.putters)
	return &healer{m: m, missed: make([]bool, n), lacks: make([][]foundManifest, n), late: make([]int, n)}
}

// found takes what a listing of the stores says: listed tells of which, and on
// which of those each manifest is.
func (h *healer) found(listed []bool, all map[string]*foundManifest, on map[string][]bool, enough func(on []bool) bool) {
	lacks := make([][]foundManifest, len(listed))
	for name, f := range all {
		if !enough(on[name]) {
			continue
		}
		for i := range listed {
			if listed[i] && !on[name][i] {
				lacks[i] = append(lacks[i], *f)
			}
		}
	}
	h.mu.Lock()
	for i := range listed {
		if !listed[i] {
			h.missed[i] = true
			continue
		}
		slices.SortFunc(lacks[i], func(a, b foundManifest) int { return strings.Compare(a.name, b.name) })
		h.missed[i], h.lacks[i] = false, lacks[i]
	}
	h.mu.Unlock()
	h.m.u.cfg.Log.poke()
}

// isLate counts a manifest that store i does not take now; it returns false if
// too many wait for it already.
func (h *healer) isLate(i int) bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.late[i] >= lateMax {
		h.missed[i] = true
		return false
	}
	h.late[i]++
	return true
}

func (h *healer) notLate(i int) {
	h.mu.Lock()
	h.late[i]--
	h.mu.Unlock()
}

// run heals until ctx ends. It asks nothing of the stores unless something is
// known to be missing, or may be on a store that is back.
func (h *healer) run(ctx context.Context) {
	pause := lookPauseMin
	for {
		var lists bool
		var store int
		var next foundManifest
		log := h.m.u.cfg.Log
		err := log.mu.await(ctx, 0, func() bool {
			h.mu.Lock()
			defer h.mu.Unlock()
			lists = false
			for i := range h.missed {
				v := &log.views[i]
				if !v.loaded || v.broken != nil || !v.downFrom.IsZero() {
					continue
				}
				if len(h.lacks[i]) > 0 {
					store, next = i, h.lacks[i][0]
					return true
				}
				lists = lists || (h.missed[i] && h.late[i] == 0) // those that wait go first
			}
			return lists
		})
		if err != nil || log.Fenced() {
			return
		}
		if lists {
			_, _, err := h.m.survey(ctx)
			if err == nil && !h.misses() {
				pause = lookPauseMin
				continue
			}
			if err != nil {
				h.m.logger.Warn("look for manifests that a store lacks; trying again", "error", err)
			}
			if sleep(ctx, pause) != nil {
				return
			}
			pause = min(2*pause, lookPauseMax)
			continue
		}
		if err := h.heal(ctx, store, next); err != nil {
			if ctx.Err() != nil {
				return
			}
			h.m.logger.Warn("a store lacks a manifest, and no copy of it can be had", "store", h.m.u.putters[store].member.URL(), "object", next.name, "error", err)
		}
		h.mu.Lock()
		if len(h.lacks[store]) > 0 && h.lacks[store][0].name == next.name {
			h.lacks[store] = h.lacks[store][1:]
		}
		if err == nil {
			h.healed++
		} else {
			h.given++
		}
		h.mu.Unlock()
	}
}

// misses reports whether some store is still to be listed.
func (h *healer) misses() bool {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Contains(h.missed, true)
}

// heal puts one manifest on a store, and returns when it is there.
func (h *healer) heal(ctx context.Context, store int, f foundManifest) error {
	u := h.m.u
	if f.size > healMaxBytes {
		return fmt.Errorf("it has %d bytes, more than are read at a time", f.size)
	}
	var raw []byte
	var errs []error
	for i, p := range u.putters {
		if i == store || p.member.Store == nil {
			continue
		}
		got, _, err := p.member.Store.Get(ctx, f.name, healMaxBytes, nil)
		if err == nil {
			err = h.verify(p.member.URL()+" "+f.name, f, got)
		}
		if err == nil {
			raw = got
			break
		}
		errs = append(errs, err)
	}
	if raw == nil {
		return errors.Join(errs...)
	}
	over := make(chan error, 1)
	u.putters[store].add(put{
		name: f.name, heals: true, size: f.size, body: func() ([]byte, error) { return raw, nil },
		placed: func() { over <- nil }, refused: func(err error) { over <- err },
	})
	select {
	case err := <-over:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// verify checks all of a manifest: what is put under its name on another store
// stays there for ever.
func (h *healer) verify(name string, f foundManifest, raw []byte) error {
	cfg := &h.m.u.cfg
	var m *manifest.Manifest
	err := cfg.Log.withKeySets(func() (err error) {
		m, err = manifest.OpenBytes(cfg.Ring, name, raw)
		return err
	})
	if err != nil {
		return err
	}
	c := content{m: m, name: f.name}
	if err := h.m.check(&c, f.From, f.To); err != nil {
		return err
	}
	for _, row := range m.Directory.Pages {
		if !row.Home.IsZero() {
			continue
		}
		sealed, err := manifest.BytesReader(name, raw)(row.Offset, int64(row.StoredBytes))
		if err != nil {
			return err
		}
		if _, err := m.OpenPage(row, sealed); err != nil {
			return err
		}
	}
	return nil
}
