package sim

import (
	"maps"
	"math/rand/v2"
	"slices"

	"drc/internal/block"
)

// clone is a copy of a machine that stands as it stands now: of its disks, with rng
// as the power would leave them. The machine itself goes on.
func (m *machine) clone(rng *rand.Rand, boot string) *machine {
	n := &machine{mem: m.mem.Clone(), disks: map[string]*rawDisk{}, bootID: m.bootID, bootAt: m.bootAt, plant: m.plant}
	for _, path := range slices.Sorted(maps.Keys(m.disks)) {
		d := m.disks[path]
		n.disks[path] = d.reborn(nil)
		d.mu.Lock()
		d.dead = false
		d.mu.Unlock()
	}
	n.files = n.plant.fs(n.mem)
	if rng != nil {
		return n.crash(rng, boot)
	}
	return n
}

// clone is a copy of what is known of the writes of a host.
func (m *model) clone() *model {
	m.mu.Lock()
	defer m.mu.Unlock()
	return &model{sizes: m.sizes, writes: slices.Clone(m.writes), alone: m.alone, images: m.images, loose: slices.Clone(m.loose), looser: slices.Clone(m.looser)}
}

// from returns which regions of each volume the writes from seq on change, and with
// which seq the volumes were last looked at without knowing what they are.
func (m *model) from(seq block.Seq) (anew block.Seq, regions []*block.Map[struct{}]) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for range m.sizes {
		regions = append(regions, block.NewMap(func(v struct{}, _ int64) struct{} { return v }))
	}
	for _, w := range m.writes {
		switch {
		case w.image != nil:
			anew = w.seq
		case w.seq >= seq:
			regions[w.volume].Set(w.extent, struct{}{})
		}
	}
	return anew, regions
}

// clone is a copy of a dedup index, of which the newest is lost as with a death.
func (x *index) clone(rng *rand.Rand) *index { return x.lose(rng) }
