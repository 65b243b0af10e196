package dedup

import (
	"encoding/binary"
	"sync"

	"drc/internal/crypt"
)

const (
	// filterFirst is how many chunks the first layer of a filter is for; each
	// further one is for twice as many.
	filterFirst = 64 << 10
	// filterLayers bounds the memory of a filter: together the layers are for 16
	// million chunks and take 24 MiB. With more chunks the filter says "maybe"
	// more often, and nothing worse.
	filterLayers = 8
	// filterBits is how many bits a layer has for each chunk, and filterProbes
	// how many of them a chunk sets: 1 in 300 new chunks is taken for a known
	// one.
	filterBits   = 12
	filterProbes = 6
)

// filter tells in memory that a chunk is new, which most are. It is a Bloom
// filter in layers. A chunk's id is a keyed hash, so its bits need no further
// hashing. It is safe for concurrent use.
type filter struct {
	mu     sync.RWMutex
	layers [][]uint64
	room   int  // of the last layer
	whole  bool // it knows all chunks of the index
}

// add notes a chunk.
func (f *filter) add(id crypt.ChunkID) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.room == 0 && len(f.layers) < filterLayers {
		n := filterFirst << len(f.layers)
		f.layers = append(f.layers, make([]uint64, n*filterBits/64))
		f.room = n
	}
	f.room = max(0, f.room-1)
	bits := f.layers[len(f.layers)-1]
	at, step := probes(id)
	for range filterProbes {
		n := at % uint64(len(bits)*64)
		bits[n/64] |= 1 << (n % 64)
		at += step
	}
}

// isNew reports whether a chunk is certainly not in the index.
func (f *filter) isNew(id crypt.ChunkID) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if !f.whole {
		return false
	}
	for _, bits := range f.layers {
		at, step := probes(id)
		all := true
		for range filterProbes {
			n := at % uint64(len(bits)*64)
			if all = bits[n/64]&(1<<(n%64)) != 0; !all {
				break
			}
			at += step
		}
		if all {
			return false
		}
	}
	return true
}

// complete says that all chunks that the index held when it was opened, and
// all since, were added.
func (f *filter) complete() {
	f.mu.Lock()
	f.whole = true
	f.mu.Unlock()
}

func probes(id crypt.ChunkID) (at, step uint64) {
	return binary.LittleEndian.Uint64(id[:]), binary.LittleEndian.Uint64(id[8:]) | 1
}
