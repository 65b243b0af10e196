package uploader

import (
	"context"
	"errors"
	"fmt"
	"log/slog"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/internal/object"
	"drc/internal/repo"
)

// mergeRetryMax bounds how many entries go by before a merge that failed is
// tried again.
const mergeRetryMax = 64

// merger makes merged manifests of what is decided, one at a time, beside the
// commits. Nothing depends on it: whatever fails is tried again some entries
// later, and never while nothing is written.
type merger struct {
	u      *Uploader
	logger *slog.Logger
	recent recentObjects
	healer *healer

	// Of run's goroutine only.
	listed   bool
	runs     runs
	failures int

	mu      monitor
	began   uint64 // first entry that was decided since the start
	top     uint64 // newest decided entry
	done    uint64 // up to here everything was merged that was due
	nextTry uint64 // nothing is tried before this entry is decided
	stats   MergeStats
}

// MergeStats are counts of merging since the start.
type MergeStats struct {
	Merges   int64
	Bases    int64
	Bytes    int64 // of manifests and page stores, each counted once
	Failures int64
	Runs     int   // that cover the history
	Healed   int64 // manifests put on stores that lacked them
}

func newMerger(u *Uploader) *merger {
	m := &merger{u: u, logger: u.cfg.Logger}
	m.healer = newHealer(m)
	return m
}

// decided tells the merger that entry n is decided.
func (m *merger) decided(n uint64, hash format.Hash, named bool) {
	if err := m.u.cfg.Entries.Note(n, hash, named); err != nil {
		m.logger.Warn("note a decided entry; it will not be merged", "entry", n, "error", err)
	}
	m.mu.Lock()
	if m.began == 0 {
		m.began = n
	}
	m.top = n
	m.mu.notify()
	m.mu.Unlock()
}

// run merges after each decided entry what is due then, until ctx ends or the
// writer is fenced.
func (m *merger) run(ctx context.Context) {
	for {
		var top uint64
		err := m.mu.await(ctx, 0, func() bool {
			top = m.top
			return m.due()
		})
		if err != nil || m.u.cfg.Log.Fenced() {
			return
		}
		err = m.upTo(ctx, top)
		if ctx.Err() != nil {
			return
		}
		m.after(top, err)
	}
}

// due reports whether an entry has been decided with which merging is to be
// tried; m.mu is held.
func (m *merger) due() bool { return m.top != m.done && m.top >= m.nextTry }

// after takes note of how merging up to entry top went.
func (m *merger) after(top uint64, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.done, m.nextTry = top, 0
	m.stats.Runs = len(m.runs)
	if err == nil {
		m.failures = 0
	} else {
		m.failures = min(m.failures+1, 8)
		m.nextTry = top + min(uint64(1)<<m.failures, mergeRetryMax)
		m.stats.Failures++
		m.logger.Warn("merge manifests; trying again later, and the history is whole without it", "error", err)
	}
	m.mu.notify()
}

// upTo merges all that is due when entry top is the newest.
func (m *merger) upTo(ctx context.Context, top uint64) error {
	if !m.listed {
		// Merges are due at multiples of their width, if no border stands
		// between: until one has gone by there is no need to know.
		m.mu.Lock()
		began := m.began
		m.mu.Unlock()
		if top/mergeWidth == (began-1)/mergeWidth {
			return nil
		}
		if err := m.list(ctx, top); err != nil {
			return err
		}
	}
	for {
		m.extend(top)
		from, to, ok := m.runs.due()
		base := false
		if !ok {
			if to, base = m.runs.baseDue(); !base {
				return nil
			}
			from = 0
		}
		err := m.mergeRuns(ctx, from, to, base)
		var stuck *unverifiedError
		switch {
		case errors.As(err, &stuck):
			m.logger.Warn("an entry cannot be read back for certain; its manifest stays by itself", "entry", stuck.n, "error", err)
			m.runs[from+stuck.run].stuck = true
		case errors.Is(err, manifest.ErrTooManyPages):
			m.logger.Info("merged manifests have become as large as they get", "from_entry", m.runs[from].from, "to_entry", m.runs[to-1].to)
			for i := from; i < to; i++ {
				m.runs[i].stuck = true
			}
		case err != nil:
			return err
		}
	}
}

// extend adds the entries up to top as runs of their own.
func (m *merger) extend(top uint64) {
	next := m.u.cfg.Begin
	if n := len(m.runs); n > 0 {
		next = m.runs[n-1].to + 1
	}
	for ; next <= top; next++ {
		m.runs = append(m.runs, run{from: next, to: next, border: m.border(next)})
	}
}

// border reports whether a named checkpoint stands at entry n, or may.
func (m *merger) border(n uint64) bool {
	_, named, ok := m.u.cfg.Entries.Entry(n)
	return named || !ok
}

// mergeRuns merges runs [from, to), puts the manifest on the stores and
// replaces them by it.
func (m *merger) mergeRuns(ctx context.Context, from, to int, base bool) error {
	first, last := m.runs[from], m.runs[to-1]
	var all contents
	for i, r := range m.runs[from:to] {
		c, err := m.content(ctx, r)
		if err != nil {
			var stuck *unverifiedError
			if errors.As(err, &stuck) {
				stuck.run = i
			}
			return err
		}
		all = append(all, c)
	}
	keys, ok := m.u.cfg.Ring.Set(all[len(all)-1].keySet)
	if !ok {
		return fmt.Errorf("key set %s of entry %d is not at hand", all[len(all)-1].keySet, last.to)
	}
	seqFrom, seqTo := all.seqs()
	bytes := int64(0)
	put := func(name string, raw []byte) error {
		bytes += int64(len(raw))
		m.recent.keep(name, raw)
		return m.u.putEverywhere(ctx, name, raw)
	}
	merge := &manifest.Merge{Inputs: all.inputs(ctx, m), Ring: m.u.cfg.Ring, Spill: put}
	build := manifest.NewBuilder(format.ManifestHeader{
		Group: m.u.cfg.Group, Branch: m.u.cfg.Branch, FromN: first.from, ToN: last.to, From: seqFrom, To: seqTo,
	}, m.u.cfg.Agent, keys)
	id, raw, err := merge.Into(build)
	if err != nil {
		return fmt.Errorf("merge the manifests of entries %d to %d: %w", first.from, last.to, err)
	}
	name := format.ManifestName{Branch: m.u.cfg.Branch, From: first.from, To: last.to, ID: id}.Name(m.u.cfg.Group)
	if err := put(name, raw); err != nil {
		return fmt.Errorf("put %s: %w", name, err)
	}
	merged := run{from: first.from, to: last.to, level: first.level + 1, name: name, size: int64(len(raw)), border: last.border}
	if base {
		merged.level = levelBase
	}
	m.runs = m.runs.replace(from, to, merged)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stats.Bytes += bytes
	if base {
		m.stats.Bases++
	} else {
		m.stats.Merges++
	}
	return nil
}

// list finds the merged manifests of earlier starts. Those count that are on
// as many stores as an entry needs: others may have been left behind by a start
// that ended while it put them, and can be lost with one store.
func (m *merger) list(ctx context.Context, top uint64) error {
	all, on, err := m.survey(ctx)
	if err != nil {
		return err
	}
	var found []foundManifest
	for name, f := range all {
		if f.From < f.To && f.To <= top && m.u.enough(on[name]) {
			found = append(found, *f)
		}
	}
	m.runs = planRuns(found, m.u.cfg.Begin, top)
	for i := range m.runs {
		m.runs[i].border = m.border(m.runs[i].to)
	}
	m.listed = true
	return nil
}

// survey lists the manifests of all stores, by name, and on which stores each
// is. It tells the healer, too, and fails if too few stores can be listed.
func (m *merger) survey(ctx context.Context) (all map[string]*foundManifest, on map[string][]bool, err error) {
	members := m.u.cfg.Repo.Members
	all, on = map[string]*foundManifest{}, map[string][]bool{}
	listed := make([]bool, len(members))
	// What is on its way while the stores are listed is not missing.
	decided, _, _ := m.u.cfg.Log.Next()
	var errs []error
	for i, member := range members {
		infos, err := listManifests(ctx, member, format.ManifestPrefix(m.u.cfg.Group, m.u.cfg.Branch))
		if err != nil {
			errs = append(errs, err)
			continue
		}
		listed[i] = true
		for _, info := range infos {
			name, ok := format.ParseManifestName(m.u.cfg.Group, info.Name)
			if !ok || name.To >= decided {
				continue
			}
			if all[info.Name] == nil {
				all[info.Name], on[info.Name] = &foundManifest{name, info.Name, info.Size}, make([]bool, len(members))
			}
			// Of copies of different sizes one is damaged: opening it tells.
			all[info.Name].size = max(all[info.Name].size, info.Size)
			on[info.Name][i] = true
		}
	}
	if !m.u.enough(listed) {
		return nil, nil, errors.Join(errs...)
	}
	m.healer.found(listed, all, on, m.u.enough)
	return all, on, nil
}

func listManifests(ctx context.Context, member repo.Member, prefix string) (out []object.Info, err error) {
	if member.Store == nil {
		return nil, fmt.Errorf("%s: %w", member.URL(), member.Err)
	}
	for info, err := range member.Store.List(ctx, prefix, "") {
		if err != nil {
			return nil, fmt.Errorf("list manifests in %s: %w", member.URL(), err)
		}
		out = append(out, info)
	}
	return out, nil
}

// seqs is the stretch of seqs that the contents cover together.
func (all contents) seqs() (from, to block.Seq) {
	for _, c := range all {
		if c.from != 0 && (from == 0 || c.from < from) { // 0: an entry that extends nothing
			from = c.from
		}
		to = max(to, c.to)
	}
	return from, to
}

// MergeStats returns a copy of the counts.
func (u *Uploader) MergeStats() MergeStats {
	if u.merger == nil {
		return MergeStats{}
	}
	u.merger.mu.Lock()
	defer u.merger.mu.Unlock()
	st := u.merger.stats
	u.merger.healer.mu.Lock()
	defer u.merger.healer.mu.Unlock()
	st.Healed = u.merger.healer.healed
	return st
}
