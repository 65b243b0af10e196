package replay

import "drc/internal/block"

// markBytes is the unit of marks.
const markBytes = 64 << 10

// marks is a set of regions of a volume: 2 MiB of memory for each TiB.
type marks []uint64

func newMarks(sizeBytes int64) marks {
	return make(marks, (sizeBytes+64*markBytes-1)/(64*markBytes))
}

// add adds all regions that e touches.
func (m marks) add(e block.Extent) {
	for i := e.Off / markBytes; i*markBytes < e.End(); i++ {
		m[i/64] |= 1 << (i % 64)
	}
}

// addAll adds all regions of o.
func (m marks) addAll(o marks) {
	for i, x := range o {
		m[i] |= x
	}
}

func (m marks) has(off int64) bool {
	i := off / markBytes
	return m[i/64]&(1<<(i%64)) != 0
}

// run is the longest extent from e.Off on, within e, of which all or nothing is
// marked.
func (m marks) run(e block.Extent) (part block.Extent, marked bool) {
	marked = m.has(e.Off)
	end := e.Off
	for end < e.End() && m.has(end) == marked {
		end = min((end/markBytes+1)*markBytes, e.End())
	}
	return block.Extent{Off: e.Off, Len: end - e.Off}, marked
}
