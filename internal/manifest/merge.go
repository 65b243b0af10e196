package manifest

import (
	"cmp"
	"errors"
	"fmt"
	"math"
	"slices"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
)

const (
	// DefaultPartBytes is how much of a merged manifest is held in memory
	// before its pages are put into a page store.
	DefaultPartBytes = 16 << 20
	// smallPageExtents: a page of fewer extents is copied rather than referred
	// to if its neighbour is written anyway. Otherwise every merge would leave
	// behind the small rests of the pages that it cut through.
	smallPageExtents = 128
	// DefaultPagesMax is how many pages the directories of the inputs may list
	// together: what they take in memory, and the size of the new one, follow
	// from it. Full pages of 4 KiB extents, they map a TiB.
	DefaultPagesMax = 1 << 18
)

// ErrTooManyPages says that the manifests are too large to be merged. They stay as they
// are; trying again does not help.
var ErrTooManyPages = errors.New("the manifests list too many pages to be merged")

// Input is one of the manifests that are merged.
type Input struct {
	Manifest *Manifest
	// Name is that of the manifest's object. It is empty if the manifest
	// travels in a log entry: its pages are no home, and are copied.
	Name string
	// Page opens one of its pages.
	Page func(row format.PageRow) ([]Extent, error)
}

// Merge lays manifests over each other, the newest winning, and writes what
// comes out as one manifest. It goes through all of them in order of address
// and holds one page of each at most, whatever their size, besides their
// directories. A page that no other manifest overlaps is not copied but
// referred to by its home, unless it is small.
type Merge struct {
	Inputs []Input // oldest first
	Ring   *crypt.Ring
	// PartBytes is the size at which pages are spilled; 0 is the default.
	PartBytes int
	// PagesMax bounds the pages of all inputs; 0 is the default.
	PagesMax int
	// Spill puts a page store where readers of the manifest will find it.
	Spill func(name string, raw []byte) error

	// What was done: pages referred to by their home, pages opened, and the
	// most that were open at a time.
	Referred, Opened, LiveMax int

	out     *Builder
	volume  block.VolumeIndex
	joined  Extent // the last extent, which the next one may continue
	live    int
	keySets map[block.ID][]byte
}

// Into merges into b and returns b's manifest, finished: its id and bytes.
func (m *Merge) Into(b *Builder) (id block.ID, raw []byte, err error) {
	m.out = b
	if m.PartBytes <= 0 {
		m.PartBytes = DefaultPartBytes
	}
	if m.PagesMax <= 0 {
		m.PagesMax = DefaultPagesMax
	}
	pages := 0
	for _, in := range m.Inputs {
		if pages += len(in.Manifest.Directory.Pages); pages > m.PagesMax {
			return block.ID{}, nil, ErrTooManyPages
		}
	}
	m.keySets = map[block.ID][]byte{}
	for _, in := range m.Inputs {
		if err := m.collectKeySets(in); err != nil {
			return block.ID{}, nil, err
		}
	}
	byVolume := map[block.VolumeIndex][]source{}
	for age, in := range m.Inputs {
		for i := range in.Manifest.Directory.Pages {
			row := &in.Manifest.Directory.Pages[i]
			byVolume[row.Volume] = append(byVolume[row.Volume], source{age, row})
		}
	}
	var volumes []block.VolumeIndex
	for v := range byVolume {
		volumes = append(volumes, v)
	}
	slices.Sort(volumes)
	for _, v := range volumes {
		m.volume = v
		if err := m.mergeVolume(byVolume[v]); err != nil {
			return block.ID{}, nil, err
		}
	}
	m.addKeySets()
	return m.out.ID(), m.out.Finish(), nil
}

// source is a page of an input.
type source struct {
	age int // index of the input: the higher, the newer
	row *format.PageRow
}

// cluster is a run of pages each of which overlaps another one of the run.
type cluster []source

// mergeVolume merges the pages of one volume.
func (m *Merge) mergeVolume(pages []source) error {
	slices.SortFunc(pages, func(a, b source) int { return cmp.Compare(a.row.First, b.row.First) })
	var clusters []cluster
	for from := 0; from < len(pages); {
		to, end := from+1, pages[from].row.End
		for to < len(pages) && pages[to].row.First < end {
			end = max(end, pages[to].row.End)
			to++
		}
		clusters = append(clusters, pages[from:to])
		from = to
	}
	copied := func(i int) bool {
		return i >= 0 && i < len(clusters) && (m.mustCopy(clusters[i]) || clusters[i].small())
	}
	for i, c := range clusters {
		if m.mustCopy(c) || (c.small() && (copied(i-1) || copied(i+1))) {
			if err := m.overlay(c); err != nil {
				return err
			}
			continue
		}
		if err := m.refer(c[0]); err != nil {
			return err
		}
	}
	return m.flush()
}

func (m *Merge) mustCopy(c cluster) bool {
	return len(c) > 1 || (c[0].row.Home.IsZero() && m.Inputs[c[0].age].Name == "")
}

func (c cluster) small() bool { return len(c) == 1 && c[0].row.Extents < smallPageExtents }

// refer adds a page by its home.
func (m *Merge) refer(s source) error {
	if err := m.flush(); err != nil {
		return err
	}
	in := m.Inputs[s.age]
	row := *s.row
	if row.Home.IsZero() {
		h := &in.Manifest.Header
		row.Home, row.HomeName, row.HomeKeySet = h.ID, in.Name, h.KeySet
	}
	m.out.AddPage(row)
	m.Referred++
	return nil
}

// overlay writes what the pages of a cluster say together.
func (m *Merge) overlay(c cluster) error {
	byAge := map[int]*cursor{}
	for _, s := range c {
		cur := byAge[s.age]
		if cur == nil {
			cur = &cursor{m: m, in: &m.Inputs[s.age], age: s.age}
			byAge[s.age] = cur
		}
		cur.rows = append(cur.rows, s.row)
	}
	var newest []*cursor // first
	for _, cur := range byAge {
		newest = append(newest, cur)
	}
	slices.SortFunc(newest, func(a, b *cursor) int { return cmp.Compare(b.age, a.age) })
	for at := c[0].row.First; ; {
		var wins *cursor
		until := int64(math.MaxInt64)
		// Older pages are not even opened where newer ones cover them.
		for _, cur := range newest {
			if err := cur.seek(at); err != nil {
				return err
			}
			off, ok := cur.next()
			if !ok {
				continue
			}
			if off <= at {
				wins = cur
				break
			}
			until = min(until, off)
		}
		if wins == nil {
			if until == math.MaxInt64 {
				return nil
			}
			at = until
			continue
		}
		x := wins.page[0]
		x = x.Advance(at - x.Off)
		x.Len = min(x.End(), until) - at
		if err := m.add(x); err != nil {
			return err
		}
		at = x.End()
	}
}

// cursor goes through the pages of one input, one of them open at a time.
type cursor struct {
	m    *Merge
	in   *Input
	age  int
	rows []*format.PageRow // not opened yet
	page []Extent          // what is left of the open one
	open bool
}

// seek drops all that ends at or before at. A page that begins behind at stays
// closed.
func (c *cursor) seek(at int64) error {
	for {
		for len(c.page) > 0 && c.page[0].End() <= at {
			c.page = c.page[1:]
		}
		if len(c.page) > 0 {
			return nil
		}
		if c.open {
			c.page, c.open = nil, false
			c.m.live--
		}
		for len(c.rows) > 0 && c.rows[0].End <= at {
			c.rows = c.rows[1:]
		}
		if len(c.rows) == 0 || c.rows[0].First > at {
			return nil
		}
		page, err := c.in.Page(*c.rows[0])
		if err != nil {
			return err
		}
		c.rows, c.page, c.open = c.rows[1:], page, true
		c.m.opened(page)
		c.m.live++
		c.m.LiveMax = max(c.m.LiveMax, c.m.live)
	}
}

// next is where the input goes on, at the earliest.
func (c *cursor) next() (off int64, ok bool) {
	switch {
	case len(c.page) > 0:
		return c.page[0].Off, true
	case len(c.rows) > 0:
		return c.rows[0].First, true
	}
	return 0, false
}

// add appends an extent to the output, joined with the one before it where the
// two are one piece.
func (m *Merge) add(x Extent) error {
	if continues(m.joined, x) {
		m.joined.Len += x.Len
		return nil
	}
	if err := m.flush(); err != nil {
		return err
	}
	m.joined = x
	return nil
}

func continues(a, b Extent) bool {
	if a.Empty() || a.End() != b.Off || a.Zero != b.Zero {
		return false
	}
	return a.Zero || (a.Segment.ID == b.Segment.ID && a.Chunk == b.Chunk && a.Offset+a.Len == b.Offset)
}

// flush hands the last extent on, and spills when much has gathered.
func (m *Merge) flush() error {
	if m.joined.Empty() {
		return nil
	}
	m.out.Add(m.volume, m.joined)
	m.joined = Extent{}
	if m.out.Size() < m.PartBytes {
		return nil
	}
	name, raw, next := m.out.Spill()
	if err := m.Spill(name, raw); err != nil {
		return fmt.Errorf("put the page store %s: %w", name, err)
	}
	m.out = next
	return nil
}

// opened takes note of the key sets of a page's segments.
func (m *Merge) opened(page []Extent) {
	m.Opened++
	for i := range page {
		if x := &page[i]; !x.Zero {
			m.needKeySet(x.Segment.KeySet)
		}
	}
}

func (m *Merge) needKeySet(id block.ID) {
	if _, ok := m.keySets[id]; ok {
		return
	}
	m.keySets[id] = nil
	if ks, ok := m.Ring.Set(id); ok {
		m.keySets[id] = ks.Raw
	}
}

// collectKeySets finds the key sets that an input needs. A merged manifest
// lists them; for one of a single entry its pages are looked into, unless they
// will be opened anyway.
func (m *Merge) collectKeySets(in Input) error {
	m.needKeySet(in.Manifest.Header.KeySet)
	for _, raw := range in.Manifest.Directory.KeySets {
		rec, _, _, err := format.DecodeKeySet(raw)
		if err != nil {
			return err
		}
		m.needKeySet(rec.ID)
	}
	for _, row := range in.Manifest.Directory.Pages {
		if !row.Home.IsZero() {
			m.needKeySet(row.HomeKeySet)
		}
	}
	if in.Manifest.Header.FromN != in.Manifest.Header.ToN || in.Name == "" {
		return nil
	}
	for _, row := range in.Manifest.Directory.Pages {
		page, err := in.Page(row)
		if err != nil {
			return err
		}
		m.opened(page)
	}
	return nil
}

// addKeySets lists the key sets that the ring has, in order of their ids.
func (m *Merge) addKeySets() {
	var ids []block.ID
	for id, raw := range m.keySets {
		if len(raw) > 0 {
			ids = append(ids, id)
		}
	}
	slices.SortFunc(ids, block.ID.Compare)
	for _, id := range ids {
		m.out.AddKeySet(m.keySets[id])
	}
}
