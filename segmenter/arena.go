package segmenter

import "sync"

// blockBytes is the unit in which content is kept. A region of a resync fills
// one.
const blockBytes = regionBytes

// blocks are shared by all groups. What is not in use goes back to the system
// by and by.
var blocks = sync.Pool{New: func() any { return new([blockBytes]byte) }}

// arena keeps the content of a draft. Content that is kept in a row lies in a
// row, so that runs need not be joined again. The zero arena is empty.
type arena struct {
	blocks []*[blockBytes]byte
	used   int   // of the last block
	bytes  int64 // that were kept
}

// keep returns a copy of p, good until release.
func (a *arena) keep(p []byte) []byte {
	a.bytes += int64(len(p))
	if len(p) > blockBytes {
		return append([]byte(nil), p...)
	}
	if len(a.blocks) == 0 || len(p) > blockBytes-a.used {
		a.blocks = append(a.blocks, blocks.Get().(*[blockBytes]byte))
		a.used = 0
	}
	to := a.blocks[len(a.blocks)-1][a.used:]
	a.used += copy(to, p)
	return to[:len(p)]
}

// keepBlock takes over a block as it is.
func (a *arena) keepBlock(b *[blockBytes]byte) {
	a.blocks = append(a.blocks, b)
	a.used = blockBytes
}

// adopt takes over all that another arena keeps.
func (a *arena) adopt(from *arena) {
	// In front: the last block is the one that is being filled.
	a.bytes += from.bytes
	a.blocks = append(from.blocks, a.blocks...)
	if len(a.blocks) == len(from.blocks) {
		a.used = from.used
	}
	*from = arena{}
}

// release gives all memory back.
func (a *arena) release() {
	for _, b := range a.blocks {
		blocks.Put(b)
	}
	*a = arena{}
}
