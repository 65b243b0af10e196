package uploader

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/manifest"
	"drc/internal/repo"
)

// walkMax is how far the hash of an entry is looked for along the parents of
// newer ones.
const walkMax = 512

// unverifiedError says that an entry cannot be read back as it was decided.
type unverifiedError struct {
	n   uint64
	run int // of the runs that were to be merged
	err error
}

func (e *unverifiedError) Error() string {
	return fmt.Sprintf("log entry %d is not known for certain: %v", e.n, e.err)
}
func (e *unverifiedError) Unwrap() error { return e.err }

// content is what a run changed.
type content struct {
	m        *manifest.Manifest // nil if nothing
	name     string             // of the manifest's object, if it is one
	raw      []byte             // the manifest, if it travels in its entry
	keySet   block.ID           // that seals the manifest, or the entry
	from, to block.Seq
}

type contents []content

// inputs are the manifests of the contents.
func (all contents) inputs(ctx context.Context, m *merger) []manifest.Input {
	var out []manifest.Input
	for _, c := range all {
		if c.m == nil {
			continue
		}
		out = append(out, manifest.Input{Manifest: c.m, Name: c.name, Page: func(row format.PageRow) ([]manifest.Extent, error) {
			return m.page(ctx, c, row)
		}})
	}
	return out
}

// content opens the manifest of a run.
func (m *merger) content(ctx context.Context, r run) (content, error) {
	if r.name == "" {
		return m.entryContent(ctx, r.from)
	}
	c := content{name: r.name}
	if err := m.open(ctx, &c, r.size, r.from, r.to); err != nil {
		return c, err
	}
	return c, nil
}

// entryContent is what one entry changed, as it was decided.
func (m *merger) entryContent(ctx context.Context, n uint64) (content, error) {
	e, err := m.entry(ctx, n)
	if err != nil {
		return content{}, err
	}
	c := content{keySet: e.KeySet}
	if rg := e.Items.Range; rg != nil {
		c.from, c.to = rg.From, rg.To
		if rg.Branch != m.u.cfg.Branch {
			return c, &unverifiedError{n: n, err: fmt.Errorf("it is of branch %s", rg.Branch)}
		}
	}
	switch {
	case e.Items.Reference != nil:
		ref := e.Items.Reference
		c.name = format.ManifestName{Branch: m.u.cfg.Branch, From: n, To: n, ID: ref.ID}.Name(m.u.cfg.Group)
		err = m.open(ctx, &c, ref.Bytes, n, n)
	case e.Items.Manifest != nil:
		c.raw = e.Items.Manifest
		err = m.u.cfg.Log.withKeySets(func() (err error) {
			c.m, err = manifest.OpenBytes(m.u.cfg.Ring, fmt.Sprintf("manifest in log entry %d", n), c.raw)
			return err
		})
		if err == nil {
			err = m.check(&c, n, n)
		}
	}
	return c, err
}

// open opens a manifest object, from any store.
func (m *merger) open(ctx context.Context, c *content, size int64, from, to uint64) error {
	err := m.anyStore(c.name, func(s repo.Member) error {
		return m.u.cfg.Log.withKeySets(func() (err error) {
			c.m, err = manifest.Open(m.u.cfg.Ring, s.URL()+" "+c.name, size, func(off, n int64) ([]byte, error) {
				return m.read(ctx, s, c.name, off, n)
			})
			return err
		})
	})
	if err != nil {
		return err
	}
	return m.check(c, from, to)
}

// check compares what a manifest says of itself with what it is taken for.
func (m *merger) check(c *content, from, to uint64) error {
	h := &c.m.Header
	if h.FromN != from || h.ToN != to || h.Group != m.u.cfg.Group || h.Branch != m.u.cfg.Branch {
		return format.Corrupt(fmt.Sprintf("manifest of entries %d to %d", from, to), "it says that it is of entries %d to %d", h.FromN, h.ToN)
	}
	if name, ok := format.ParseManifestName(m.u.cfg.Group, c.name); ok && name.ID != h.ID {
		return format.Corrupt(c.name, "it says that its id is %s", h.ID)
	}
	c.keySet, c.from, c.to = h.KeySet, h.From, h.To
	return nil
}

// page opens a page of a manifest, from wherever it lies.
func (m *merger) page(ctx context.Context, c content, row format.PageRow) (page []manifest.Extent, err error) {
	name := c.name
	if !row.Home.IsZero() {
		name = row.HomeName
	} else if c.raw != nil {
		sealed, err := manifest.BytesReader("a manifest in a log entry", c.raw)(row.Offset, int64(row.StoredBytes))
		if err != nil {
			return nil, err
		}
		err = m.u.cfg.Log.withKeySets(func() (err error) {
			page, err = c.m.OpenPage(row, sealed)
			return err
		})
		return page, err
	}
	err = m.anyStore(name, func(s repo.Member) error {
		sealed, err := m.read(ctx, s, name, row.Offset, int64(row.StoredBytes))
		if err != nil {
			return err
		}
		return m.u.cfg.Log.withKeySets(func() (err error) {
			page, err = c.m.OpenPage(row, sealed)
			return err
		})
	})
	return page, err
}

// anyStore calls f for one store after the other until it succeeds.
func (m *merger) anyStore(name string, f func(s repo.Member) error) error {
	var errs []error
	for _, s := range m.u.cfg.Repo.Members {
		if s.Store == nil {
			continue
		}
		err := f(s)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("read %s: %w", name, errors.Join(errs...))
}

// read returns n bytes from off of an object in a store.
func (m *merger) read(ctx context.Context, s repo.Member, name string, off, n int64) ([]byte, error) {
	if raw := m.recent.get(name); raw != nil {
		return manifest.BytesReader(name, raw)(off, n)
	}
	return s.Store.GetRange(ctx, name, off, n, nil)
}

// entry reads entry n back, as it was decided.
func (m *merger) entry(ctx context.Context, n uint64) (*grouplog.Entry, error) {
	entries := m.u.cfg.Entries
	hash, _, ok := entries.Entry(n)
	for known := n + 1; !ok; known++ {
		decided, parent, _ := m.u.cfg.Log.Next()
		switch {
		case known == decided:
			hash, ok = parent, true // n is the newest entry
			known--
		case known-n > walkMax:
			return nil, &unverifiedError{n: n, err: errors.New("its hash is not known, nor that of an entry close behind it")}
		default:
			hash, _, ok = entries.Entry(known)
		}
		if !ok {
			continue
		}
		// Each entry names the hash of the one before it.
		for ; known > n; known-- {
			e, err := m.fetch(ctx, known, hash)
			if err != nil {
				return nil, err
			}
			if err := entries.Note(known, hash, len(e.Items.Checkpoints) > 0); err != nil {
				return nil, err
			}
			hash = e.Parent
		}
	}
	return m.fetch(ctx, n, hash)
}

// fetch reads and opens the value of entry n that has this hash.
func (m *merger) fetch(ctx context.Context, n uint64, hash format.Hash) (*grouplog.Entry, error) {
	raw, err := m.u.cfg.Log.Fetch(ctx, n, hash)
	if errors.Is(err, errNoSuchValue) {
		return nil, &unverifiedError{n: n, err: err}
	}
	if err != nil {
		return nil, err
	}
	e, err := m.u.cfg.Log.open(n, raw)
	if err != nil {
		return nil, err
	}
	if e.N != n || e.Group != m.u.cfg.Group {
		return nil, &unverifiedError{n: n, err: fmt.Errorf("its value is that of entry %d", e.N)}
	}
	return e, nil
}

const (
	recentBytes     = 16 << 20 // bound of the objects that are kept
	recentPartBytes = 4 << 20  // larger ones are read back by their pages
)

// recentObjects are manifests that were put not long ago: the next merge wants
// them again.
type recentObjects struct {
	mu    sync.Mutex
	raw   map[string][]byte
	order []string // oldest first
	bytes int
}

func (r *recentObjects) keep(name string, raw []byte) {
	if len(raw) > recentPartBytes {
		return
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.raw == nil {
		r.raw = map[string][]byte{}
	}
	if _, ok := r.raw[name]; ok {
		return
	}
	r.raw[name] = raw
	r.order = append(r.order, name)
	r.bytes += len(raw)
	for r.bytes > recentBytes {
		r.bytes -= len(r.raw[r.order[0]])
		delete(r.raw, r.order[0])
		r.order = r.order[1:]
	}
}

func (r *recentObjects) get(name string) []byte {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.raw[name]
}
