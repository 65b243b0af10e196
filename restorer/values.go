package restorer

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/grouplog"
)

// valuesMemoryBytes bounds the raw values, and bodiesMemoryBytes the opened
// ones, that stay in memory.
const (
	valuesMemoryBytes = 48 << 20
	bodiesMemoryBytes = 16 << 20
)

// node is what is known of one value of an entry. An entry may have several,
// of which one was chosen.
type node struct {
	hash    format.Hash
	parent  format.Hash
	keySets bool // key sets travel in it
	signed  bool // its signature was verified by this process
	places  []place
}

// place is where a store's log holds a value.
type place struct {
	m     *member
	index uint64
}

// body is an opened value.
type body struct {
	epoch format.Epoch
	items *format.Items
	size  int64
}

// values keeps the values of a group's log, by hash: what there is of each in
// memory, their bytes in a bounded cache, the local disk, or the stores.
type values struct {
	stores *stores
	cfg    Config
	group  block.GroupID
	disk   *valueCache // nil: none

	mu     sync.Mutex
	ends   map[block.ID]logEnd // of the logs; set when they have been read
	nodes  map[uint64][]*node
	known  map[format.Hash]bool
	memory *byteCache[format.Hash, []byte]
	bodies *byteCache[format.Hash, *body]
}

func newValues(s *stores, cfg Config, group block.GroupID) *values {
	return &values{
		stores: s, cfg: cfg, group: group, nodes: map[uint64][]*node{}, known: map[format.Hash]bool{},
		disk:   openValueCache(cfg, group),
		memory: newByteCache[format.Hash](valuesMemoryBytes, func(p []byte) int64 { return int64(len(p)) + 64 }),
		bodies: newByteCache[format.Hash](bodiesMemoryBytes, func(b *body) int64 { return b.size }),
	}
}

func (v *values) close() error {
	if v.disk != nil {
		return v.disk.close()
	}
	return nil
}

// endAt takes note of where the logs end.
func (v *values) endAt(ends map[block.ID]logEnd) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.ends = ends
}

// verified reports whether a value of that hash has been verified before.
func (v *values) verified(hash format.Hash) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.known[hash]
}

// learn takes note of the value in a verified log object.
func (v *values) learn(m *member, index uint64, o format.LogObject, _ []byte) {
	if o.Kind != format.LogCommit {
		return
	}
	val, _, _, _, err := format.DecodeValue("value", o.Value)
	if err != nil {
		return // a verified value always decodes
	}
	hash := format.HashOf(o.Value)
	v.mu.Lock()
	v.known[hash] = true
	var x *node
	for _, have := range v.nodes[val.N] {
		if have.hash == hash {
			x = have
		}
	}
	fresh := x == nil
	if fresh {
		x = &node{hash: hash, parent: val.Parent, keySets: len(val.KeySets) > 0}
		v.nodes[val.N] = append(v.nodes[val.N], x)
	}
	x.signed = true
	x.places = append(x.places, place{m, index})
	v.mu.Unlock()
	if fresh {
		v.memory.put(hash, o.Value)
		if v.disk != nil {
			v.disk.put(hash, o.Value)
		}
	}
}

// node returns what is known of a value, or nil.
func (v *values) node(n uint64, hash format.Hash) *node {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, x := range v.nodes[n] {
		if x.hash == hash {
			return x
		}
	}
	return nil
}

// signed reports whether this process has verified the signature of a value of
// that hash. What an earlier one has verified does not count: its cache may be
// anybody's.
func (v *values) signed(n uint64, hash format.Hash) bool {
	v.mu.Lock()
	defer v.mu.Unlock()
	for _, x := range v.nodes[n] {
		if x.hash == hash {
			return x.signed
		}
	}
	return false
}

// forget forgets what was found in the logs: they are read again.
func (v *values) forget() {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.nodes, v.known = map[uint64][]*node{}, map[format.Hash]bool{}
}

// raw returns the bytes of a value. told are places that are known otherwise than
// from the logs that were read.
func (v *values) raw(ctx context.Context, n uint64, hash format.Hash, told []format.DigestPlace) ([]byte, error) {
	if raw, ok := v.memory.get(hash); ok {
		return raw, nil
	}
	if v.disk != nil {
		if raw, ok := v.disk.get(hash); ok {
			v.memory.put(hash, raw)
			return raw, nil
		}
	}
	var places []place
	if x := v.node(n, hash); x != nil {
		v.mu.Lock()
		places = append(places, x.places...)
		v.mu.Unlock()
	}
	for _, p := range told {
		for _, m := range v.stores.members {
			if m.ID == p.Store {
				places = append(places, place{m, p.Index})
			}
		}
	}
	name := fmt.Sprintf("log entry %d", n)
	raw, err := fromAny(ctx, v.stores, name, func(ctx context.Context, m *member, anyway insist) ([]byte, error) {
		err := error(errNoCopy)
		for _, p := range places {
			if p.m != m {
				continue
			}
			name := format.LogName(v.group, p.index)
			var object []byte
			if object, err = v.stores.get(ctx, m, anyway, name, format.MaxLogObjectBytes); err != nil {
				if aboutObject(err) {
					v.stores.found(m, name, err)
				}
				continue
			}
			o, _, _, derr := format.DecodeLogObject(m.URL()+" "+name, object)
			if derr != nil || format.HashOf(o.Value) != hash {
				err = format.Corrupt(m.URL()+" "+name, "it has changed since it was read")
				v.stores.found(m, name, err)
				continue
			}
			return o.Value, nil
		}
		if errors.Is(err, errNoCopy) {
			return v.search(ctx, m, anyway, n, hash)
		}
		return nil, err
	}, func(reasons string) error {
		return format.Corrupt(name, "it is in no store that can be read: %s", reasons)
	})
	if err != nil {
		return nil, err
	}
	v.memory.put(hash, raw)
	if v.disk != nil {
		v.disk.put(hash, raw)
	}
	return raw, nil
}

// searchTries bounds the objects that are looked at for one value.
const searchTries = 24

// search looks for a value in a log in which it is not known where it is: beginning
// with the place where it would be if each entry had one object, and from what is
// found there by the distance of the entries.
func (v *values) search(ctx context.Context, m *member, anyway insist, n uint64, hash format.Hash) ([]byte, error) {
	v.mu.Lock()
	end, ok := v.ends[m.ID]
	v.mu.Unlock()
	if !ok || end.next == 0 {
		return nil, errNoCopy
	}
	guess := int64(end.index) + int64(n) - int64(end.n)
	seen := map[int64]bool{}
	for range searchTries {
		at, ok := nearest(guess, int64(end.next), seen)
		if !ok {
			break
		}
		seen[at] = true
		guess = at
		name := format.LogName(v.group, uint64(at))
		object, err := v.stores.get(ctx, m, anyway, name, format.MaxLogObjectBytes)
		if aboutObject(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		o, _, _, err := format.DecodeLogObject(name, object)
		if err != nil || o.Kind != format.LogCommit {
			continue
		}
		if format.HashOf(o.Value) == hash {
			return o.Value, nil
		}
		if x, _, _, _, err := format.DecodeValue(name, o.Value); err == nil && x.N != n {
			guess = at + int64(n) - int64(x.N)
		}
	}
	return nil, errNoCopy
}

// nearest is the place in [0, next) closest to guess that was not seen.
func nearest(guess, next int64, seen map[int64]bool) (int64, bool) {
	guess = max(0, min(guess, next-1))
	for d := range int64(searchTries) {
		for _, at := range []int64{guess + d, guess - d} {
			if at >= 0 && at < next && !seen[at] {
				return at, true
			}
		}
	}
	return 0, false
}

// body returns an opened value. The ring has its key set.
func (v *values) body(ctx context.Context, n uint64, hash format.Hash, told []format.DigestPlace) (*body, error) {
	if b, ok := v.bodies.get(hash); ok {
		return b, nil
	}
	raw, err := v.raw(ctx, n, hash, told)
	if err != nil {
		return nil, err
	}
	open := grouplog.OpenValue
	if v.signed(n, hash) {
		open = grouplog.OpenVerifiedValue // the bytes have this hash, or raw had refused them
	}
	e, err := open(v.cfg.Ring, fmt.Sprintf("log entry %d", n), raw)
	if err != nil {
		return nil, err
	}
	if e.N != n || e.Group != v.group {
		return nil, format.Corrupt(fmt.Sprintf("log entry %d", n), "it says that it is entry %d of group %s", e.N, e.Group)
	}
	b := &body{epoch: e.Epoch, items: e.Items, size: int64(len(raw)) + 1024}
	v.bodies.put(hash, b)
	return b, nil
}
