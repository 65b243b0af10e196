package vbuf

import (
	"fmt"
	"slices"
	"strings"

	"drc/internal/block"
)

// placement decides which disks take which shards, and takes the room. Shards of
// one segment go round the disks; if the loss of one disk could then take more
// of them than the segment's parity, each is kept on two. With one disk there is
// one copy. It fails with ErrFull if the quotas have no room.
func (b *Buffer) placement(shards []Shard, wanted []bool) ([][]*disk, error) {
	b.mu.Lock()
	plan, excess, err := b.place(shards, wanted)
	b.mu.Unlock()
	for _, s := range excess {
		b.dropSlot(s)
	}
	return plan, err
}

// place is placement under mu; it also returns the free journal files that have
// to make way.
func (b *Buffer) place(shards []Shard, wanted []bool) (plan [][]*disk, excess []*slot, err error) {
	var disks []*disk
	for _, d := range b.disks {
		if d.usable() {
			disks = append(disks, d)
		}
	}
	if len(disks) == 0 {
		return nil, nil, errLastDisk
	}
	room := make(map[*disk]int64, len(disks))
	for _, d := range disks {
		room[d] = d.quotaBytes - d.journalBytes - d.shardBytes
		for _, s := range d.free {
			room[d] += s.sizeBytes // free journal files make way
		}
	}
	// Those with most room first.
	slices.SortStableFunc(disks, func(x, y *disk) int {
		switch {
		case room[x] > room[y]:
			return -1
		case room[x] < room[y]:
			return 1
		}
		return 0
	})
	count := map[block.SegmentID]int{}
	for _, s := range shards {
		count[s.Segment]++
	}
	at := map[block.SegmentID]int{}
	plan = make([][]*disk, len(shards))
	for i, s := range shards {
		k := at[s.Segment]
		at[s.Segment]++
		if !wanted[i] {
			continue
		}
		copies := 1
		if perDisk := (count[s.Segment] + len(disks) - 1) / len(disks); len(disks) > 1 && perDisk > s.Parity {
			copies = 2
		}
		for c := range len(disks) {
			d := disks[(k+c)%len(disks)]
			if room[d] < s.SizeBytes {
				continue
			}
			room[d] -= s.SizeBytes
			plan[i] = append(plan[i], d)
			if len(plan[i]) == copies {
				break
			}
		}
		if len(plan[i]) < copies {
			return nil, nil, fmt.Errorf("a shard of %d bytes: %w", s.SizeBytes, ErrFull)
		}
		// A disk that is full sends its shards to the next, which may then have
		// too many of them.
		if copies == 1 && len(disks) > 1 && plan[i][0] != disks[k%len(disks)] {
			held := 0
			for o := range i + 1 {
				if shards[o].Segment == s.Segment && slices.Contains(plan[o], plan[i][0]) {
					held++
				}
			}
			if held > s.Parity {
				return nil, nil, fmt.Errorf("a shard of %d bytes apart from the others: %w", s.SizeBytes, ErrFull)
			}
		}
	}
	for i, ds := range plan {
		for _, d := range ds {
			d.shardBytes += shards[i].SizeBytes
		}
	}
	for _, d := range disks {
		over := d.journalBytes + d.shardBytes - d.quotaBytes
		for len(d.free) > 0 && over > 0 {
			s := d.free[len(d.free)-1]
			d.free = d.free[:len(d.free)-1]
			over -= s.sizeBytes
			excess = append(excess, s)
		}
	}
	return plan, excess, nil
}

// giveBack gives back the room of a shard.
func (b *Buffer) giveBack(d *disk, sizeBytes int64) {
	b.mu.Lock()
	d.shardBytes -= sizeBytes
	b.mu.Unlock()
}

// aliveDisks are the disks of the set.
func (b *Buffer) aliveDisks() []*disk {
	b.mu.Lock()
	defer b.mu.Unlock()
	var list []*disk
	for _, d := range b.disks {
		if d.failed == nil {
			list = append(list, d)
		}
	}
	return list
}

// countShards takes stock of the shards on a disk.
func (b *Buffer) countShards(d *disk) error {
	groups, err := b.fs.ReadDir(b.path(d, spoolFolder))
	if err != nil {
		return err
	}
	for _, g := range groups {
		if !g.IsDir {
			continue
		}
		entries, err := b.fs.ReadDir(b.path(d, spoolFolder, g.Name))
		if err != nil {
			return err
		}
		for _, e := range entries {
			if !strings.HasSuffix(e.Name, shardSuffix) {
				continue
			}
			info, err := b.fs.Stat(b.path(d, spoolFolder, g.Name, e.Name))
			if err != nil {
				return err
			}
			d.shardBytes += info.SizeBytes
		}
	}
	return nil
}
