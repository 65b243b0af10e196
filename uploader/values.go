package uploader

import (
	"bytes"
	"sync"

	"drc/internal/format"
)

// keptValues is how many of the newest values stay in memory for stores that
// lag; older ones are read again from a store that has them.
const keptValues = 64

// keptEntries is how many of the newest decided entries the views remember.
const keptEntries = keptValues

// values keeps encoded log values by entry number. An entry may have several
// until one is decided.
type values struct {
	mu   sync.Mutex
	byN  map[uint64]map[format.Hash][]byte
	high uint64
}

func (v *values) keep(n uint64, h format.Hash, raw []byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if n+keptValues <= v.high {
		return
	}
	if v.byN == nil {
		v.byN = map[uint64]map[format.Hash][]byte{}
	}
	if v.byN[n] == nil {
		v.byN[n] = map[format.Hash][]byte{}
	}
	if v.byN[n][h] == nil {
		v.byN[n][h] = bytes.Clone(raw)
	}
	if n > v.high {
		v.high = n
		for old := range v.byN {
			if old+keptValues <= v.high {
				delete(v.byN, old)
			}
		}
	}
}

func (v *values) get(n uint64, h format.Hash) []byte {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.byN[n][h]
}
