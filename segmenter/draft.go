package segmenter

import "drc/internal/block"

// content is what a piece of a volume holds in a batch: data, or zeroes if nil.
type content []byte

func (c content) advance(by int64) content {
	if c == nil {
		return nil
	}
	return c[by:]
}

// draft is a batch under construction: the newest content of each volume.
type draft struct {
	volumes map[block.VolumeIndex]*block.Map[content]
	bytes   int64
	oldest  int64
	memory  arena
}

func newDraft() *draft { return &draft{volumes: map[block.VolumeIndex]*block.Map[content]{}} }

func (d *draft) volume(v block.VolumeIndex) *block.Map[content] {
	m := d.volumes[v]
	if m == nil {
		m = block.NewMap(content.advance)
		d.volumes[v] = m
	}
	return m
}

// add lays a write over what is there. It copies the data.
func (d *draft) add(w block.Write) {
	if d.oldest == 0 || w.Time < d.oldest {
		d.oldest = w.Time
	}
	d.bytes += w.Extent.Len
	if w.Kind == block.KindZero {
		d.volume(w.Volume).Set(w.Extent, nil)
		return
	}
	d.volume(w.Volume).Set(w.Extent, d.memory.keep(w.Data))
}

// replace is add for writes that come again and again to the same places: it uses
// their memory anew.
func (d *draft) replace(w block.Write) {
	if w.Kind == block.KindData {
		var same content
		d.volume(w.Volume).VisitWhole(w.Extent, func(e block.Extent, c content) bool {
			if e == w.Extent {
				same = c
			}
			return false
		})
		if same != nil {
			copy(same, w.Data)
			d.bytes += w.Extent.Len
			return
		}
	}
	d.add(w)
}

// overlay lays later content over d and takes over its memory.
func (d *draft) overlay(later *draft) {
	for v, m := range later.volumes {
		base := d.volumes[v]
		if base == nil {
			d.volumes[v] = m
			continue
		}
		m.All(func(e block.Extent, c content) bool {
			base.Set(e, c)
			return true
		})
	}
	d.bytes += later.bytes
	if d.oldest == 0 || (later.oldest != 0 && later.oldest < d.oldest) {
		d.oldest = later.oldest
	}
	d.memory.adopt(&later.memory)
}

// clear empties d.
func (d *draft) clear() {
	d.release()
	*d = *newDraft()
}

// release gives back the memory of all content. Nothing of d may be used then.
func (d *draft) release() {
	d.volumes = nil
	d.memory.release()
}
