package vbuf

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"sync"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

const (
	bitmapFolder = "bitmap"
	bitmapSuffix = ".map"
	// markAhead is how many regions are marked beyond a write that goes on where
	// regions are marked already, so that who writes in sequence does not wait for
	// a sync at each region.
	markAhead = 64
)

// BitmapVolume is a volume of a group, as its bitmap needs it.
type BitmapVolume = format.BitmapVolume

// Bitmap is a group's durable memory of the regions of its volumes whose
// history is not known, for the time in which the journal cannot take their
// writes. It is preallocated, outside the quota, and on every disk in use.
//
// A bit that is set stays set over any crash once Mark or Activate has returned;
// a page that was torn or has rotted counts as all set. Bits are never lost and
// may be too many.
//
// A bitmap is active or not. While it is not, Add gathers bits in memory only,
// and Activate makes them durable, then that the bitmap counts: a crash in
// between leaves the bitmap as it was. One that is found active when it is opened
// can be read and deactivated, and takes no marks: what a process that was killed
// has left in the page cache a power cut may still take.
type Bitmap struct {
	b     *Buffer
	group block.GroupID

	mu      sync.Mutex
	header  format.BitmapHeader // the newest that is durable
	pages   map[int64]*bitmapPage
	files   map[*disk]vfs.File // of the disks that have it, open while it is active
	tried   map[*disk]bool     // disks that could not take it since it became active
	writing bool               // somebody writes pages
	changed chan struct{}      // closed when writing ends
	err     error              // no disk takes it any more
	damaged error              // no copy could be read
	found   bool               // it was active when it was opened, and still is
}

// bitmapPage holds the bits of one page that are wanted and those that are
// durable.
type bitmapPage struct {
	bits, safe [format.BitmapPageRegions / 8]byte
	stale      bool // bits has more than safe
}

// Bitmap opens the bitmap of group g, or makes one for no volumes.
func (b *Buffer) Bitmap(ctx context.Context, g block.GroupID) (*Bitmap, error) {
	m := &Bitmap{b: b, group: g, pages: map[int64]*bitmapPage{}, files: map[*disk]vfs.File{}, tried: map[*disk]bool{}, changed: make(chan struct{})}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if err := m.load(); err != nil {
		return nil, fmt.Errorf("read the bitmap of group %s: %w", g, err)
	}
	b.mu.Lock()
	b.bitmaps = append(b.bitmaps, m)
	b.mu.Unlock()
	return m, nil
}

func (m *Bitmap) name(d *disk) string {
	return m.b.path(d, bitmapFolder, m.group.String()+bitmapSuffix)
}

// load finds the newest header of all disks, and the bits of the copies that
// have it.
func (m *Bitmap) load() error {
	type copyOf struct {
		d *disk
		h *format.BitmapHeader
	}
	var copies []copyOf
	var unreadable error
	for _, d := range m.b.aliveDisks() {
		h, err := m.readHeader(d)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			m.b.log.Error("a copy of a group's bitmap cannot be read", "file", m.name(d), "err", err)
			unreadable = err
			continue
		}
		if h != nil {
			copies = append(copies, copyOf{d, h})
			if h.Serial > m.header.Serial {
				m.header = *h
			}
		}
	}
	if len(copies) == 0 {
		m.damaged = unreadable
		return nil
	}
	if !m.header.Active {
		return nil
	}
	m.found = true
	for _, c := range copies {
		if c.h.Serial != m.header.Serial {
			continue
		}
		if err := m.readPages(c.d); err != nil {
			return err
		}
	}
	return nil
}

// readHeader returns the newest header of one disk's copy, nil if the file was
// never finished.
func (m *Bitmap) readHeader(d *disk) (newest *format.BitmapHeader, err error) {
	f, err := d.fs.Open(m.name(d))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	damaged := error(nil)
	for i := range int64(format.BitmapSlots) {
		p := make([]byte, format.BitmapPageBytes)
		n, err := f.ReadAt(p, i*format.BitmapPageBytes)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, err
		}
		if n < len(p) || !slices.ContainsFunc(p, func(c byte) bool { return c != 0 }) {
			continue
		}
		h, err := format.DecodeBitmapHeader(m.name(d), p)
		switch {
		case err != nil:
			damaged = err
		case h.Repo != m.b.opt.Repo || h.Group != m.group:
			damaged = format.Corrupt(m.name(d), "it belongs to another group or repository")
		case newest == nil || h.Serial > newest.Serial:
			newest = h
		}
	}
	if newest == nil {
		return nil, damaged
	}
	return newest, nil
}

// readPages adds the bits of one disk's copy.
func (m *Bitmap) readPages(d *disk) error {
	f, err := d.fs.Open(m.name(d))
	if err != nil {
		return err
	}
	defer f.Close()
	p := make([]byte, format.BitmapPageBytes)
	for number := range pagesOf(m.header.Volumes) {
		n, err := f.ReadAt(p, pageOffset(number))
		if err != nil && !errors.Is(err, io.EOF) {
			return err
		}
		clear(p[n:])
		counts, err := format.CheckBitmapPage(m.name(d), p, m.header.Activation, uint64(number))
		if err != nil {
			m.b.log.Warn("a page of a bitmap is damaged: more is compared than was written", "file", m.name(d), "err", err)
		}
		if !counts && err == nil {
			continue
		}
		page := m.page(number)
		for i, c := range format.BitmapPageBits(p) {
			if err != nil {
				c = 0xff
			}
			page.bits[i] |= c
			page.safe[i] |= c
		}
	}
	return nil
}

func pagesOf(volumes []BitmapVolume) (n int64) {
	for _, v := range volumes {
		n += v.Pages()
	}
	return n
}

func pageOffset(number int64) int64 { return (format.BitmapSlots + number) * format.BitmapPageBytes }

func (m *Bitmap) page(number int64) *bitmapPage {
	p := m.pages[number]
	if p == nil {
		p = &bitmapPage{}
		m.pages[number] = p
	}
	return p
}

// Active reports whether the bitmap counts: the group is, or was, in bitmap
// mode.
func (m *Bitmap) Active() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.header.Active
}

// Since is when the oldest write was captured whose history is not known; zero
// while the bitmap is not active.
func (m *Bitmap) Since() time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.header.Active {
		return time.Time{}
	}
	return time.Unix(0, m.header.Since)
}

// Damaged is non-nil if there is a bitmap and no copy of it could be read:
// whether it counts is not known, nor what is marked.
func (m *Bitmap) Damaged() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.damaged
}

// Err is non-nil once no disk takes the bitmap any more.
func (m *Bitmap) Err() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.err
}

// Prepare makes room for the bits of these volumes, on every disk, so that none
// is needed later, and that it does not count, durably. The bitmap must not be
// active. It fails with ENOSPC if there is no room.
func (m *Bitmap) Prepare(volumes []BitmapVolume) error {
	if len(volumes) > format.MaxBitmapVolumes {
		return fmt.Errorf("a bitmap has at most %d volumes, and group %s has %d", format.MaxBitmapVolumes, m.group, len(volumes))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.header.Active {
		return fmt.Errorf("the bitmap of group %s is active", m.group)
	}
	h := m.header
	h.Repo, h.Group, h.Volumes = m.b.opt.Repo, m.group, slices.Clone(volumes)
	h.Serial++
	for _, d := range m.b.writableDisks() {
		err := m.prepare(d, pageOffset(pagesOf(volumes)))
		if err == nil {
			err = m.putHeader(d, h)
		}
		if err != nil {
			return fmt.Errorf("make the bitmap of group %s on %s: %w", m.group, d.path, err)
		}
	}
	m.pages = map[int64]*bitmapPage{}
	m.header = h
	m.damaged = nil
	return nil
}

// Begin is Prepare after Buffer.Renew: what the bitmap was is forgotten, with the
// disks that it was on.
func (m *Bitmap) Begin(volumes []BitmapVolume) error {
	m.mu.Lock()
	m.closeFiles()
	m.header, m.pages = format.BitmapHeader{}, map[int64]*bitmapPage{}
	m.err, m.damaged, m.found = nil, nil, false
	clear(m.tried)
	m.mu.Unlock()
	return m.Prepare(volumes)
}

func (m *Bitmap) prepare(d *disk, sizeBytes int64) error {
	// Not into what is left where a disk was: nobody would find it there again.
	if _, err := m.b.fs.Stat(m.b.path(d, labelName)); err != nil {
		return err
	}
	if err := d.fs.MkdirAll(m.b.path(d, bitmapFolder)); err != nil {
		return err
	}
	f, err := d.fs.Open(m.name(d))
	made := errors.Is(err, fs.ErrNotExist)
	if made {
		f, err = d.fs.Create(m.name(d))
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if size, err := f.Size(); err != nil || size >= sizeBytes && !made {
		return err
	}
	err = f.Preallocate(sizeBytes)
	if err == nil {
		err = f.Sync()
	}
	if err == nil && made {
		err = d.fs.SyncDir(path.Dir(m.name(d)))
	}
	if err != nil && made {
		_ = d.fs.Remove(m.name(d))
	}
	return err
}

// putHeader makes a header durable on one disk.
func (m *Bitmap) putHeader(d *disk, h format.BitmapHeader) error {
	f, err := m.b.fs.Open(m.name(d))
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.WriteAt(h.Encode(), int64(h.Serial%format.BitmapSlots)*format.BitmapPageBytes); err != nil {
		return err
	}
	return f.Sync()
}

// place is where the bits of an extent are: from bit from to bit to of the
// bitmap as a whole, both ends included.
func (m *Bitmap) place(v block.VolumeIndex, e block.Extent) (from, to, limit int64, ok bool) {
	first := int64(0)
	for _, x := range m.header.Volumes {
		if x.Index == v {
			first *= format.BitmapPageRegions
			end := min(e.End(), x.SizeBytes)
			if e.Off >= end {
				return 0, 0, 0, false
			}
			last := first + (x.SizeBytes-1)/format.BitmapRegionBytes
			return first + e.Off/format.BitmapRegionBytes, first + (end-1)/format.BitmapRegionBytes, last, true
		}
		first += x.Pages()
	}
	return 0, 0, 0, false
}

// set sets bits in memory.
func (m *Bitmap) set(from, to int64) {
	for bit := from; bit <= to; bit++ {
		p := m.page(bit / format.BitmapPageRegions)
		i := bit % format.BitmapPageRegions
		if p.bits[i/8]&(1<<(i%8)) == 0 {
			p.bits[i/8] |= 1 << (i % 8)
			p.stale = true
		}
	}
}

// isSafe reports whether all of the bits are durable.
func (m *Bitmap) isSafe(from, to int64) bool {
	for bit := from; bit <= to; bit++ {
		p, i := m.pages[bit/format.BitmapPageRegions], bit%format.BitmapPageRegions
		if p == nil || p.safe[i/8]&(1<<(i%8)) == 0 {
			return false
		}
	}
	return true
}

// Add sets the bits of an extent in memory; Activate makes them durable.
func (m *Bitmap) Add(v block.VolumeIndex, e block.Extent) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if from, to, _, ok := m.place(v, e); ok {
		m.set(from, to)
	}
}

// Forget drops what Add has gathered. The bitmap must not be active.
func (m *Bitmap) Forget() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.header.Active {
		m.pages = map[int64]*bitmapPage{}
	}
}

// Activate makes durable the bits that Add has gathered, then that the bitmap
// counts. After an error it does not count, and may be tried again.
func (m *Bitmap) Activate(since time.Time) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.header.Active {
		return fmt.Errorf("the bitmap of group %s is active already", m.group)
	}
	h := m.header
	h.Repo, h.Group, h.Active, h.Since = m.b.opt.Repo, m.group, true, since.UnixNano()
	for h.Activation = 0; h.Activation == 0 || h.Activation == m.header.Activation; {
		h.Activation = rand.Uint64()
	}
	for _, p := range m.pages {
		p.safe, p.stale = [len(p.safe)]byte{}, true
	}
	clear(m.tried)
	err := m.spread(h)
	if err == nil {
		err = m.writeHeader(h)
	}
	if err != nil {
		m.closeFiles()
		return fmt.Errorf("activate the bitmap of group %s: %w", m.group, err)
	}
	for _, p := range m.pages {
		p.safe, p.stale = p.bits, false
	}
	m.err = nil
	return nil
}

// spread gives the bitmap, with the pages of the activation of h, to every disk
// in use that does not have it. A disk without room goes without; one that fails
// is taken out of use. It is an error only if no disk has it then.
func (m *Bitmap) spread(h format.BitmapHeader) error {
	var failed error
	for _, d := range m.b.writableDisks() {
		if m.files[d] != nil || m.tried[d] {
			continue
		}
		err := m.give(d, h)
		if err == nil {
			continue
		}
		m.tried[d] = true
		failed = fmt.Errorf("%s: %w", d.path, err)
		m.b.log.Warn("a buffer disk does not take a group's bitmap", "path", d.path, "err", err)
		if !isNoSpace(err) {
			if ferr := m.b.failDisk(d, err); ferr != nil && !errors.Is(ferr, errLastDisk) {
				return failed
			}
		}
	}
	if len(m.files) == 0 {
		return errors.Join(errors.New("no disk of the buffer takes it"), failed)
	}
	return nil
}

// give writes the pages of the activation of h to a disk, durably.
func (m *Bitmap) give(d *disk, h format.BitmapHeader) error {
	if err := m.prepare(d, pageOffset(pagesOf(h.Volumes))); err != nil {
		return err
	}
	f, err := d.fs.Open(m.name(d))
	if err != nil {
		return err
	}
	for number, p := range m.pages {
		if err == nil {
			err = writePage(f, h.Activation, number, &p.bits)
		}
	}
	if err == nil {
		err = f.Sync()
	}
	if err == nil && m.header.Active { // it counts at once
		if _, err = f.WriteAt(m.header.Encode(), int64(m.header.Serial%format.BitmapSlots)*format.BitmapPageBytes); err == nil {
			err = f.Sync()
		}
	}
	if err != nil {
		_ = f.Close()
		return err
	}
	m.files[d] = f
	return nil
}

func writePage(f vfs.File, activation uint64, number int64, bits *[format.BitmapPageRegions / 8]byte) error {
	raw := make([]byte, format.BitmapPageBytes)
	copy(format.BitmapPageBits(raw), bits[:])
	format.PutBitmapPage(raw, activation, uint64(number))
	_, err := f.WriteAt(raw, pageOffset(number))
	return err
}

// writeHeader makes h, with the next serial, durable on every disk: in the slot
// that the newest header is not in.
func (m *Bitmap) writeHeader(h format.BitmapHeader) error {
	h.Serial = m.header.Serial + 1
	raw := h.Encode()
	err := m.onEachDisk(func(f vfs.File) error {
		if _, err := f.WriteAt(raw, int64(h.Serial%format.BitmapSlots)*format.BitmapPageBytes); err != nil {
			return err
		}
		return f.Sync()
	})
	if err == nil {
		m.header = h
	}
	return err
}

// onEachDisk does something durable in every copy on a disk in use. A disk on
// which it fails is taken out of use; it is an error only if none is left.
func (m *Bitmap) onEachDisk(do func(f vfs.File) error) error {
	var failed error
	done := 0
	for d, f := range m.files {
		m.b.mu.Lock()
		usable := d.usable()
		m.b.mu.Unlock()
		err := errors.New("the disk is out of use")
		if usable {
			err = do(f)
		}
		if err == nil {
			done++
			continue
		}
		failed = fmt.Errorf("%s: %w", d.path, err)
		_ = f.Close()
		delete(m.files, d)
		m.tried[d] = true // a file of which a sync has failed is not synced again
		if !usable {
			continue
		}
		// The survivors say that its copy does not count, before anybody relies on
		// theirs. With no other disk there is nobody to say so, nor to rely on.
		if ferr := m.b.failDisk(d, err); ferr != nil && !errors.Is(ferr, errLastDisk) {
			return failed
		}
	}
	if done == 0 {
		return errors.Join(errors.New("no disk of the buffer takes it"), failed)
	}
	return nil
}

// Mark sets the bits of an extent; they are durable when it returns nil. Callers
// that come at the same time share one sync. After an error of its own the
// bitmap takes no more marks: nothing that is not marked may be written.
func (m *Bitmap) Mark(ctx context.Context, v block.VolumeIndex, e block.Extent) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	from, to, limit, ok := m.place(v, e)
	if !ok {
		return fmt.Errorf("the bitmap of group %s has no volume %d at %s", m.group, v, e)
	}
	if m.isSafe(from, to) && !m.found {
		return nil
	}
	if !m.header.Active || m.found {
		return fmt.Errorf("the bitmap of group %s was not activated", m.group)
	}
	m.set(from, to)
	if from > 0 && m.isSafe(from-1, from-1) {
		m.set(to, min(to+markAhead, limit))
	}
	for !m.isSafe(from, to) {
		if m.err != nil {
			return m.err
		}
		if m.writing {
			changed := m.changed
			m.mu.Unlock()
			select {
			case <-changed:
				m.mu.Lock()
				continue
			case <-ctx.Done():
				m.mu.Lock()
				return context.Cause(ctx)
			}
		}
		m.writeStale()
	}
	return nil
}

// writeStale makes durable what is marked and not durable. The lock is held, and
// released during I/O.
func (m *Bitmap) writeStale() {
	wanted := map[int64]*[format.BitmapPageRegions / 8]byte{}
	for number, p := range m.pages {
		if p.stale {
			bits := p.bits
			wanted[number] = &bits
			p.stale = false
		}
	}
	h := m.header
	m.writing = true
	// A disk that has joined, or that takes the place of one that has failed.
	err := m.spread(h)
	m.mu.Unlock()
	if err == nil {
		err = m.onEachDisk(func(f vfs.File) error {
			for number, bits := range wanted {
				if err := writePage(f, h.Activation, number, bits); err != nil {
					return err
				}
			}
			return f.Sync()
		})
	}
	m.mu.Lock()
	m.writing = false
	close(m.changed)
	m.changed = make(chan struct{})
	if err != nil {
		m.err = fmt.Errorf("the bitmap of group %s: %w", m.group, err)
		return
	}
	for number, bits := range wanted {
		m.pages[number].safe = *bits
	}
}

// Regions are the regions of a volume whose bits are set, in order.
func (m *Bitmap) Regions(v block.VolumeIndex) (out []block.Extent) {
	m.mu.Lock()
	defer m.mu.Unlock()
	first := int64(0)
	for _, x := range m.header.Volumes {
		if x.Index != v {
			first += x.Pages()
			continue
		}
		for number := first; number < first+x.Pages(); number++ {
			p := m.pages[number]
			if p == nil {
				continue
			}
			for i := range int64(format.BitmapPageRegions) {
				if p.bits[i/8]&(1<<(i%8)) == 0 {
					continue
				}
				off := ((number-first)*format.BitmapPageRegions + i) * format.BitmapRegionBytes
				if off >= x.SizeBytes {
					break
				}
				e := block.Extent{Off: off, Len: min(format.BitmapRegionBytes, x.SizeBytes-off)}
				if n := len(out); n > 0 && out[n-1].End() == off {
					out[n-1].Len += e.Len
				} else {
					out = append(out, e)
				}
			}
		}
	}
	return out
}

// MarkedBytes is how much of a volume is marked.
func (m *Bitmap) MarkedBytes(v block.VolumeIndex) (n int64) {
	for _, e := range m.Regions(v) {
		n += e.Len
	}
	return n
}

// Deactivate says, durably, that the bitmap does not count any more, and clears
// it. After an error it still counts for this process, and may or may not for the
// next one: so it takes no more marks.
func (m *Bitmap) Deactivate() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if !m.header.Active {
		return nil
	}
	if m.writing {
		return errors.New("the bitmap is being written")
	}
	if len(m.files) == 0 { // it was active when it was opened
		for _, d := range m.b.writableDisks() {
			f, err := d.fs.Open(m.name(d))
			if err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("deactivate the bitmap of group %s: %w", m.group, err)
			}
			if err == nil {
				m.files[d] = f
			}
		}
	}
	h := m.header
	h.Active, h.Since = false, 0
	h.Serial++
	raw := h.Encode()
	// Not onEachDisk: a copy that cannot be written must not go on counting, and
	// one that is not there need not be.
	done := 0
	for d, f := range m.files {
		_, err := f.WriteAt(raw, int64(h.Serial%format.BitmapSlots)*format.BitmapPageBytes)
		if err == nil {
			err = f.Sync()
		}
		if err != nil {
			if ferr := m.b.failDisk(d, err); ferr != nil {
				m.err = fmt.Errorf("deactivate the bitmap of group %s on %s: %w", m.group, d.path, err)
				return m.err
			}
			continue
		}
		done++
	}
	if done == 0 {
		m.err = fmt.Errorf("deactivate the bitmap of group %s: no disk of the buffer takes it", m.group)
		return m.err
	}
	m.header, m.found, m.err = h, false, nil
	m.pages = map[int64]*bitmapPage{}
	m.closeFiles()
	return nil
}

func (m *Bitmap) closeFiles() {
	for d, f := range m.files {
		_ = f.Close()
		delete(m.files, d)
	}
}

// Close lets go of the files. The bitmap on the disks stays as it is.
func (m *Bitmap) Close() {
	m.b.mu.Lock()
	m.b.bitmaps = slices.DeleteFunc(m.b.bitmaps, func(o *Bitmap) bool { return o == m })
	m.b.mu.Unlock()
	m.mu.Lock()
	defer m.mu.Unlock()
	m.closeFiles()
}

// writableDisks are the disks that may be written.
func (b *Buffer) writableDisks() (out []*disk) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, d := range b.disks {
		if d.usable() {
			out = append(out, d)
		}
	}
	return out
}
