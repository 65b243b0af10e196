package restorer

import (
	"context"
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

// raw returns the bytes of a value.
func (v *values) raw(ctx context.Context, n uint64, hash format.Hash) ([]byte, error) {
	if raw, ok := v.memory.get(hash); ok {
		return raw, nil
	}
	if v.disk != nil {
		if raw, ok := v.disk.get(hash); ok {
			v.memory.put(hash, raw)
			return raw, nil
		}
	}
	x := v.node(n, hash)
	if x == nil {
		return nil, format.Corrupt(fmt.Sprintf("log entry %d", n), "it is in no store")
	}
	v.mu.Lock()
	places := append([]place(nil), x.places...)
	v.mu.Unlock()
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

// body returns an opened value. The ring has its key set.
func (v *values) body(ctx context.Context, n uint64, hash format.Hash) (*body, error) {
	if b, ok := v.bodies.get(hash); ok {
		return b, nil
	}
	raw, err := v.raw(ctx, n, hash)
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
