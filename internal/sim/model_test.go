package sim

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"sync"

	"drc/internal/block"
	"drc/internal/pipeline"
)

// write is one write as capture numbered it; data is nil for zeroes.
type write struct {
	seq    block.Seq
	volume block.VolumeIndex
	extent block.Extent
	data   []byte
	// image is what the volumes were when history began anew with this write, after
	// a gap; nil if it did not.
	image [][]byte
}

// model is what the volumes of a group must be: all writes, in their order.
//
// While writes go past the journal they have no seq. They are kept beside
// (direct), and the next write that nobody asked for, with which capture gives the
// state after them a seq, finds them on the backings: what is there then is the
// image from which the model goes on. If the machine dies before that, of each
// sector some contents are allowed (loose), until the next start's such write
// shows which it is.
type model struct {
	mu      sync.Mutex
	sizes   []int64
	writes  []write    // by seq, without holes between them
	base    block.Seq  // behind which the journal began anew
	waiting []*request // that are not answered
	alone   bool       // no two of them in one place

	diverted bool       // writes go past the journal, or are about to
	direct   []*request // that did, since the last image
	images   int        // that were taken
	loose    [][][]sectorBytes
	looser   [][][]sectorBytes // loose, should the power be cut before anything was synced
}

// sectorBytes is what a sector may hold.
type sectorBytes []byte

// request is one write of a client, from its beginning until it has a seq.
type request struct {
	volume block.VolumeIndex
	extent block.Extent
	data   []byte
	seq    block.Seq // 0: none yet
	images int       // of the model, when it was asked for

	answered bool // without an error
	flushed  bool // it must survive the power
}

// ask notes that a client is about to make a write. It is false if another one is
// under way in the same place, and must not be: which of them is the last is known
// only if both get a seq.
func (m *model) ask(r *request) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.waiting {
		if m.alone && o.volume == r.volume && o.extent.Overlaps(r.extent) {
			return false
		}
	}
	r.images = m.images
	m.waiting = append(m.waiting, r)
	return true
}

// answer notes that a request is over, and returns its seq, 0 if it has none.
// durable says that it was answered because it is.
func (m *model) answer(r *request, err error, durable bool) block.Seq {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := len(m.waiting)
	m.waiting = slices.DeleteFunc(m.waiting, func(o *request) bool { return o == r })
	if n == len(m.waiting) { // its process is dead
		return 0
	}
	// One that was written before the last image was taken is in it. Of two of one
	// kind in one place the other one may have got the seq.
	if r.seq == 0 && m.alone && (r.images == m.images || m.diverted) {
		r.answered, r.flushed = err == nil, err == nil && durable
		m.direct = append(m.direct, r)
	}
	return r.seq
}

// flushing returns what notes that all was flushed that is answered now.
func (m *model) flushing() (flushed func()) {
	m.mu.Lock()
	defer m.mu.Unlock()
	now := slices.Clone(m.direct)
	return func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		for _, r := range now {
			r.flushed = r.answered
		}
	}
}

// divert notes that writes go past the journal from now on, or do not any more.
func (m *model) divert(on bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.diverted = on
}

// number notes that capture has numbered a write. It fails if the number is not the
// next one, or if the volumes are not what they may be where history goes on from
// them; volumes are their backings. began reports the end of a gap.
func (m *model) number(w block.Write, volumes func() [][]byte) (began bool, err error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	x := write{seq: w.Seq, volume: w.Volume, extent: w.Extent}
	if w.Kind == block.KindData {
		x.data = bytes.Clone(w.Data)
	}
	var asked *request
	for _, r := range m.waiting {
		if r.seq == 0 && r.volume == w.Volume && r.extent == w.Extent && bytes.Equal(r.data, w.Data) {
			asked = r
			break
		}
	}
	defer func() { m.writes = append(m.writes, x) }()
	if n := m.endLocked(); n+1 != w.Seq && (m.loose == nil || w.Seq <= n) {
		return false, fmt.Errorf("seq %d was given after %d", w.Seq, n)
	}
	if asked == nil && (m.loose != nil || len(m.direct) > 0) {
		image := volumes()
		for v := range image {
			if at := m.mayBe(block.VolumeIndex(v), image[v]); at >= 0 {
				return false, fmt.Errorf("history goes on with seq %d after a gap, and byte %d of volume %d was never written so", w.Seq, at, v)
			}
		}
		m.restart(w.Seq, image)
		began = true
	}
	if asked != nil {
		asked.seq = w.Seq
	}
	return began, nil
}

// restart has the model go on from an image that stands at seq.
func (m *model) restart(seq block.Seq, image [][]byte) {
	m.writes = append(m.writes, write{seq: seq, image: image})
	m.images++
	m.direct, m.loose, m.looser = nil, nil, nil
}

// end is the newest seq.
func (m *model) end() block.Seq {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.endLocked()
}

func (m *model) endLocked() block.Seq {
	if len(m.writes) == 0 {
		return m.base
	}
	return max(m.base, m.writes[len(m.writes)-1].seq)
}

// inGap reports whether there are, or may be, writes without a seq, or were when
// the machine died.
func (m *model) inGap() bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.gap()
}

func (m *model) gap() bool { return m.diverted || len(m.direct) > 0 || m.loose != nil }

// recover forgets all behind seq: it is lost, and allowed to be, or is on the
// backings and has no seq any more. Nobody asks for anything any more. What is at
// or before least must be on the volumes, and what is at or before flushed would be
// had the power been cut, which power says that it was.
func (m *model) recover(seq, least, flushed block.Seq, power bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	gap := m.gap()
	for _, w := range m.writes {
		gap = gap || w.image != nil && w.seq > seq
	}
	if gap {
		loose, looser := make([][][]sectorBytes, len(m.sizes)), make([][][]sectorBytes, len(m.sizes))
		for v := range m.sizes {
			loose[v] = m.contents(block.VolumeIndex(v), m.loose, func(s block.Seq) bool { return s <= least }, func(r *request) bool { return r.answered })
			looser[v] = m.contents(block.VolumeIndex(v), m.looser, func(s block.Seq) bool { return s <= flushed }, func(r *request) bool { return r.flushed })
		}
		if power {
			loose = looser
		}
		m.loose, m.looser = loose, looser
	}
	for n := len(m.writes); n > 0 && m.writes[n-1].seq > seq; n-- {
		m.writes = m.writes[:n-1]
	}
	m.waiting, m.direct, m.diverted = nil, nil, false
}

// contents is what each sector of a volume may hold, if it was loose before, if at
// all, and what the functions say is surely there and the rest perhaps.
func (m *model) contents(v block.VolumeIndex, loose [][][]sectorBytes, numbered func(block.Seq) bool, direct func(*request) bool) [][]sectorBytes {
	all := make([][]sectorBytes, m.sizes[v]/diskSector)
	zero := make(sectorBytes, diskSector)
	put := func(e block.Extent, data []byte, surely bool) {
		for s := e.Off / diskSector; s*diskSector < e.End(); s++ {
			x := zero
			if data != nil {
				x = data[s*diskSector-e.Off:][:diskSector]
			}
			if surely {
				all[s] = []sectorBytes{x}
			} else {
				all[s] = append(slices.Clip(all[s]), x)
			}
		}
	}
	put(block.Extent{Len: m.sizes[v]}, nil, true)
	if loose != nil {
		copy(all, loose[v])
	}
	from := 0 // what is before an image is in it
	for i, w := range m.writes {
		if w.image != nil {
			from = i
		}
	}
	for i, w := range m.writes {
		switch {
		case loose != nil || i < from:
		case w.image != nil:
			put(block.Extent{Len: m.sizes[v]}, w.image[v], true)
		case w.volume == v:
			put(w.extent, w.data, numbered(w.seq))
		}
	}
	for _, r := range m.direct {
		if r.volume == v {
			put(r.extent, r.data, direct(r))
		}
	}
	for _, r := range m.waiting {
		if r.volume == v && r.seq == 0 {
			put(r.extent, r.data, false)
		}
	}
	return all
}

// mayBe returns at which byte p is not what volume v may be now, or -1.
func (m *model) mayBe(v block.VolumeIndex, p []byte) int {
	if !m.gap() {
		return differs(p, m.image(v, m.endLocked()))
	}
	all := m.contents(v, m.loose, func(block.Seq) bool { return true }, func(r *request) bool { return r.answered })
	for s, may := range all {
		have := p[s*diskSector:][:diskSector]
		if !slices.ContainsFunc(may, func(x sectorBytes) bool { return bytes.Equal(x, have) }) {
			return s * diskSector
		}
	}
	return -1
}

// check returns at which byte what clients read of volume v is not what was
// written, or -1.
func (m *model) check(v block.VolumeIndex, p []byte) int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.mayBe(v, p)
}

// settle notes what the volumes are after a start, if that was not certain.
func (m *model) settle(image [][]byte) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.loose != nil {
		m.restart(m.endLocked(), image)
	}
}

// at is a volume after all writes up to seq.
func (m *model) at(v block.VolumeIndex, seq block.Seq) []byte {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.image(v, seq)
}

// origins says, for people, where the first sector that differs may come from.
func (m *model) origins(v block.VolumeIndex, have, want []byte) string {
	at := differs(have, want)
	if at < 0 {
		return ""
	}
	at -= at % diskSector
	m.mu.Lock()
	defer m.mu.Unlock()
	of := func(p []byte) (all []string) {
		is := func(e block.Extent, data []byte) bool {
			if int64(at) < e.Off || int64(at) >= e.End() {
				return false
			}
			x := make([]byte, diskSector)
			if data != nil {
				x = data[int64(at)-e.Off:][:diskSector]
			}
			return bytes.Equal(x, p[at:][:diskSector])
		}
		for _, w := range m.writes {
			switch {
			case w.image != nil:
				if is(block.Extent{Len: m.sizes[v]}, w.image[v]) {
					all = append(all, fmt.Sprintf("the volume when history began anew at %d", w.seq))
				}
			case w.volume == v && is(w.extent, w.data):
				all = append(all, fmt.Sprintf("write %d", w.seq))
			}
		}
		for _, r := range m.direct {
			if r.volume == v && is(r.extent, r.data) {
				all = append(all, fmt.Sprintf("a write to %s past the journal", r.extent))
			}
		}
		return all
	}
	return fmt.Sprintf(" (sector %d is as in %q and should be as in %q)", at, of(have), of(want))
}

// differs returns the first byte at which a and b are not the same, or -1.
func differs(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	at := 0
	for at < len(a) && at < len(b) && a[at] == b[at] {
		at++
	}
	return at
}

func (m *model) image(v block.VolumeIndex, seq block.Seq) []byte {
	p := make([]byte, m.sizes[v])
	for _, w := range m.writes {
		switch {
		case w.seq > seq:
			return p
		case w.image != nil:
			copy(p, w.image[v])
		case w.volume != v:
		case w.data == nil:
			clear(p[w.extent.Off:w.extent.End()])
		default:
			copy(p[w.extent.Off:], w.data)
		}
	}
	return p
}

// watch is a journal that tells the model what is numbered.
type watch struct {
	pipeline.Journal
	w *world
	l *life
}

func (j *watch) Enqueue(w block.Write) {
	defer j.Journal.Enqueue(w)
	if j.l.isDead() {
		return // nothing that it does reaches a disk any more
	}
	began, err := j.w.model.number(w, j.w.backings)
	if err != nil {
		j.w.problem("%v", err)
	}
	if began {
		j.w.count.gaps++
	}
	j.w.trace("write %d: volume %d %s", w.Seq, w.Volume, w.Extent)
}

func (j *watch) Divert(err error) {
	if !j.l.isDead() {
		j.w.trace("past the journal: %v", err != nil)
		j.w.model.divert(err != nil)
	}
	j.Journal.Divert(err)
}

// backings is what is in the files and on the devices of the volumes.
func (w *world) backings() (all [][]byte) {
	for i := range w.plan.volumes {
		all = append(all, w.host.disks[volumePath(i)].content())
	}
	return all
}

// flush makes all that was answered durable, and notes up to where.
func (w *world) flush(ctx context.Context, d block.Device) error {
	upTo := w.acked.load()
	flushed := w.model.flushing()
	err := d.Flush(ctx)
	if err == nil {
		w.flushed.raise(upTo)
		flushed()
	}
	return err
}

// mark is a position that only grows.
type mark struct {
	mu sync.Mutex
	at block.Seq
}

func (m *mark) raise(to block.Seq) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at = max(m.at, to)
}

func (m *mark) load() block.Seq {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.at
}

func (m *mark) set(to block.Seq) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.at = to
}
