package diskcache

// StoringPause is for tests of what happens after it.
const StoringPause = storingPause

// SlabHead is how each slab begins.
var SlabHead = encodeSlabHead()

// Table is the table of a slab with so many records of n bytes, of names that only
// this one has.
func Table(slab uint64, records, n int) []byte {
	entries := make([]entry, records)
	for i := range entries {
		entries[i] = entry{hash: (slab<<32 + uint64(i)) * 0x9e3779b97f4a7c15, off: uint32(slabHeadBytes + i*n), bytes: uint32(n)}
	}
	return encodeTable(entries)
}
