package digest

import (
	"context"
	"encoding/binary"
	"fmt"
	"sync"

	"golang.org/x/sync/errgroup"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/segment"
)

// pagesAtOnce is how many pages are fetched side by side where all are wanted.
const pagesAtOnce = 16

// firstRead is how much of a digest's end is read at first: most of the time it is
// all that is needed of it.
const firstRead = 256 << 10

// Digest is an opened digest: its root, and what is in no full page yet.
type Digest struct {
	Header format.DigestHeader
	Logs   []format.DigestLog

	ring    *crypt.Ring
	root    *format.DigestRoot
	entries []format.DigestRow
	marks   []format.DigestRow
	keySets [][]byte

	mu   sync.Mutex
	refs map[refPage][]format.DigestRef // pages of references that were read: one for 65,536 rows
}

// refPage names a page of references.
type refPage struct {
	home block.ID
	part uint32
}

// ReadFunc returns the n bytes from off of a digest object.
type ReadFunc func(off, n int64) ([]byte, error)

// Fetch returns the n bytes from off of a digest object, of which the name is
// given. check is called with them; what it refuses is not what was written, and
// another copy may be good.
type Fetch func(ctx context.Context, name string, off, n int64, check func([]byte) error) error

// Place is where a digest was found: it must say the same of itself.
type Place struct {
	Group block.GroupID
	N     uint64
	ID    block.ID
}

// Open reads and verifies the root of the digest found at a place, of size bytes.
// The key set that sealed it comes with it, and is added to ring. name is used in
// errors.
func Open(ring *crypt.Ring, name string, at Place, size int64, read ReadFunc) (*Digest, error) {
	if size < format.DigestTailSize || size > format.MaxDigestBytes {
		return nil, format.Corrupt(name, "it has %d bytes", size)
	}
	guess := min(size, firstRead)
	end, err := read(size-guess, guess)
	if err != nil {
		return nil, err
	}
	if int64(len(end)) != guess {
		return nil, format.Corrupt(name, "%d bytes were read where %d were wanted", len(end), guess)
	}
	tail, err := format.DecodeDigestTail(name, end[len(end)-format.DigestTailSize:], size)
	if err != nil {
		return nil, err
	}
	span := int64(tail.RootBytes) + format.DigestTailSize
	if span > int64(len(end)) {
		if end, err = read(size-span, span); err != nil {
			return nil, err
		}
	}
	sealed := end[int64(len(end))-span : len(end)-format.DigestTailSize]
	var head []byte
	if int64(len(end)) == size {
		head = end[:tail.HeaderBytes]
	} else if head, err = read(0, int64(tail.HeaderBytes)); err != nil {
		return nil, err
	}
	h, n, err := format.DecodeDigestHeader(name, head)
	if err != nil {
		return nil, err
	}
	if n != len(head) {
		return nil, format.Corrupt(name, "its header has %d bytes, not %d", n, len(head))
	}
	if h.Group != at.Group || h.N != at.N || h.ID != at.ID {
		return nil, format.Corrupt(name, "it says that it is digest %s of entry %d of group %s", h.ID, h.N, h.Group)
	}
	cert, err := crypt.VerifyCertificate(ring.Root(), h.Cert)
	if err != nil {
		return nil, err
	}
	signed := append(append([]byte(nil), head...), sealed...)
	if !crypt.VerifyAgent(cert, crypt.ContextDigest, signed, tail.Signature[:]) {
		return nil, format.Corrupt(name, "its signature is wrong")
	}
	keys, ok := ring.Set(h.KeySet)
	if !ok {
		if keys, err = ring.Add(h.Sealed); err != nil {
			return nil, err
		}
		if keys.ID != h.KeySet {
			return nil, format.Corrupt(name, "it brings key set %s, and is sealed under %s", keys.ID, h.KeySet)
		}
	}
	sealer := crypt.NewSealer(keys.Index.Derive(h.ID[:], crypt.LabelDigest))
	body, err := sealer.Open(nil, format.DigestRootPart, sealed, partAD(h.ID, format.DigestRootPart))
	if err != nil || len(body) < 5 {
		return nil, format.Corrupt(name, "its root fails authentication")
	}
	plainLen := binary.LittleEndian.Uint32(body[1:])
	if plainLen > format.MaxDigestRootBytes {
		return nil, format.Corrupt(name, "a root of %d bytes", plainLen)
	}
	plain, err := segment.Decompress(nil, body[5:], format.Compression(body[0]), int(plainLen))
	if err != nil {
		return nil, format.Corrupt(name, "its root %v", err)
	}
	d := &Digest{Header: h, ring: ring}
	if d.root, err = format.DecodeDigestRoot(name, plain); err != nil {
		return nil, err
	}
	d.Logs = d.root.Logs
	return d, d.tails(name)
}

// tails decodes what is in no full page, and checks that the lists are whole.
func (d *Digest) tails(name string) (err error) {
	rows := func(l *format.DigestList) ([]format.DigestRow, error) {
		if len(l.Tail) == 0 {
			return nil, nil
		}
		return format.DecodeDigestRows(name, l.Tail)
	}
	if d.entries, err = rows(&d.root.Entries); err != nil {
		return err
	}
	if d.marks, err = rows(&d.root.Marks); err != nil {
		return err
	}
	if len(d.root.KeySets.Tail) > 0 {
		if d.keySets, err = format.DecodeDigestKeySets(name, d.root.KeySets.Tail); err != nil {
			return err
		}
	}
	full := d.root.Entries.Full()
	if full+uint64(len(d.entries)) != d.Header.N || len(d.entries) >= format.DigestRows {
		return format.Corrupt(name, "it has %d entries in full pages and %d others, and should have %d", full, len(d.entries), d.Header.N)
	}
	for i, r := range d.entries {
		if r.N != full+uint64(i)+1 {
			return format.Corrupt(name, "entry %d stands at the place of entry %d", r.N, full+uint64(i)+1)
		}
	}
	if n := len(d.entries); n > 0 && d.entries[n-1].Hash != d.Header.Hash {
		return format.Corrupt(name, "its newest entry is another one than it says")
	}
	return nil
}

// Pages is how many pages of entries there are: entry n is in page (n-1)/256. The
// last one may not be full.
func (d *Digest) Pages() uint64 {
	return (d.Header.N + format.DigestRows - 1) / format.DigestRows
}

// Ref says of a full page of entries where it lies and what is in it; ok is false
// for the page that is not full.
func (d *Digest) Ref(ctx context.Context, fetch Fetch, page uint64) (ref format.DigestRef, ok bool, err error) {
	if page >= d.root.Entries.Full()/format.DigestRows {
		return ref, false, nil
	}
	ref, err = d.find(ctx, fetch, &d.root.Entries, page, true)
	return ref, true, err
}

// Entries returns the rows of a page of entries.
func (d *Digest) Entries(ctx context.Context, fetch Fetch, page uint64) ([]format.DigestRow, error) {
	ref, full, err := d.Ref(ctx, fetch, page)
	if err != nil {
		return nil, err
	}
	if !full {
		return d.entries, nil
	}
	rows, err := d.rows(ctx, fetch, ref)
	if err != nil {
		return nil, err
	}
	for i, r := range rows {
		if len(rows) != format.DigestRows || r.N != page*format.DigestRows+uint64(i)+1 {
			return nil, format.Corrupt(d.home(ref), "page %d of entries has another entry, %d, at %d", page, r.N, i)
		}
	}
	return rows, nil
}

// Marks returns the entries that say more than what they extend, in order.
func (d *Digest) Marks(ctx context.Context, fetch Fetch) ([]format.DigestRow, error) {
	pages := make([][]format.DigestRow, d.root.Marks.Full()/format.DigestRows)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(pagesAtOnce)
	for i := range pages {
		g.Go(func() error {
			ref, err := d.find(gctx, fetch, &d.root.Marks, uint64(i), true)
			if err == nil {
				pages[i], err = d.rows(gctx, fetch, ref)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var out []format.DigestRow
	last := uint64(0)
	for _, rows := range append(pages, d.marks) {
		for _, r := range rows {
			if r.N <= last || r.N > d.Header.N {
				return nil, format.Corrupt(format.DigestName(d.Header.Group, d.Header.N, d.Header.ID), "its marks are not in order")
			}
			last = r.N
		}
		out = append(out, rows...)
	}
	return out, nil
}

// KeySets returns the sealed key sets that travel in the entries, in order.
func (d *Digest) KeySets(ctx context.Context, fetch Fetch) ([][]byte, error) {
	pages := make([][][]byte, d.root.KeySets.Full()/format.DigestRows)
	g, gctx := errgroup.WithContext(ctx)
	g.SetLimit(pagesAtOnce)
	for i := range pages {
		g.Go(func() error {
			ref, err := d.find(gctx, fetch, &d.root.KeySets, uint64(i), false)
			if err != nil {
				return err
			}
			return d.page(gctx, fetch, ref, false, func(name string, plain []byte) (err error) {
				pages[i], err = format.DecodeDigestKeySets(name, plain)
				return err
			})
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var out [][]byte
	for _, sets := range append(pages, d.keySets) {
		out = append(out, sets...)
	}
	return out, nil
}

// find finds the reference to a full page of rows of a list.
func (d *Digest) find(ctx context.Context, fetch Fetch, l *format.DigestList, page uint64, sealed bool) (format.DigestRef, error) {
	// The highest level has the oldest pages.
	for level := len(l.Levels) - 1; level >= 0; level-- {
		each := uint64(1) // pages of rows below a reference of this level
		for range level {
			each *= format.DigestRows
		}
		refs := l.Levels[level]
		if page >= uint64(len(refs))*each {
			page -= uint64(len(refs)) * each
			continue
		}
		ref := d.settled(refs[page/each])
		page %= each
		for each > 1 {
			each /= format.DigestRows
			below, err := d.refPage(ctx, fetch, ref, sealed)
			if err != nil {
				return format.DigestRef{}, err
			}
			home := ref
			if ref = below[page/each]; ref.Home.IsZero() {
				ref.Home, ref.HomeN, ref.HomeKeySet = home.Home, home.HomeN, home.HomeKeySet
			}
			page %= each
		}
		return ref, nil
	}
	return format.DigestRef{}, fmt.Errorf("a digest of %d entries has no page %d: this is a bug in drc", d.Header.N, page)
}

// refPage returns a page of references.
func (d *Digest) refPage(ctx context.Context, fetch Fetch, ref format.DigestRef, sealed bool) (refs []format.DigestRef, err error) {
	key := refPage{ref.Home, ref.Part}
	d.mu.Lock()
	refs = d.refs[key]
	d.mu.Unlock()
	if refs != nil {
		return refs, nil
	}
	err = d.page(ctx, fetch, ref, sealed, func(name string, plain []byte) (err error) {
		refs, err = format.DecodeDigestRefs(name, plain)
		if err == nil && len(refs) != format.DigestRows {
			err = format.Corrupt(name, "a page of references has %d", len(refs))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.refs == nil {
		d.refs = map[refPage][]format.DigestRef{}
	}
	d.refs[key] = refs
	return refs, nil
}

// settled is a reference of this digest with its home.
func (d *Digest) settled(ref format.DigestRef) format.DigestRef {
	one := []format.DigestRef{ref}
	settle(one, &d.Header)
	return one[0]
}

// home is the name of the object that a page lies in.
func (d *Digest) home(ref format.DigestRef) string {
	return format.DigestName(d.Header.Group, ref.HomeN, ref.Home)
}

func (d *Digest) rows(ctx context.Context, fetch Fetch, ref format.DigestRef) (rows []format.DigestRow, err error) {
	err = d.page(ctx, fetch, ref, true, func(name string, plain []byte) (err error) {
		rows, err = format.DecodeDigestRows(name, plain)
		return err
	})
	return rows, err
}

// page fetches a page and hands its plain form to decode, which may be called more
// than once, with different copies.
func (d *Digest) page(ctx context.Context, fetch Fetch, ref format.DigestRef, sealed bool, decode func(name string, plain []byte) error) error {
	name := d.home(ref)
	var sealer *crypt.Sealer
	if sealed {
		keys, ok := d.ring.Set(ref.HomeKeySet)
		if !ok {
			return &crypt.NoKeySetError{KeySet: ref.HomeKeySet}
		}
		sealer = crypt.NewSealer(keys.Index.Derive(ref.Home[:], crypt.LabelDigest))
	}
	return fetch(ctx, name, ref.Offset, int64(ref.Stored), func(body []byte) (err error) {
		if sealed {
			if body, err = sealer.Open(nil, uint64(ref.Part), body, partAD(ref.Home, ref.Part)); err != nil {
				return &format.CorruptError{Object: name, Offset: ref.Offset, Reason: "a page fails authentication"}
			}
		}
		if len(body) == 0 {
			return format.Corrupt(name, "a page is empty")
		}
		plain, err := segment.Decompress(nil, body[1:], format.Compression(body[0]), ref.Plain)
		if err != nil {
			return format.Corrupt(name, "a page %v", err)
		}
		return decode(name, plain)
	})
}
