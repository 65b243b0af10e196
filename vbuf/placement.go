package vbuf

import (
	"fmt"
	"slices"
	"strings"

	"drc/internal/block"
)

// placement decides which disks take which shards, and takes the room. Shards of
// one segment go round the disks that have room; those that would then be lost
// with one disk beyond the segment's parity are kept on two. With one disk there
// is one copy. Each disk must have room for a record of recordBytes as well. It fails
// with ErrFull if the quotas have no room.
func (b *Buffer) placement(shards []Shard, wanted []bool, recordBytes int64) ([][]*disk, error) {
	b.mu.Lock()
	plan, excess, err := b.place(shards, wanted, recordBytes)
	b.mu.Unlock()
	for _, s := range excess {
		b.dropSlot(s)
	}
	return plan, err
}

// place is placement under mu; it also returns the free journal files that have
// to make way.
func (b *Buffer) place(shards []Shard, wanted []bool, recordBytes int64) (plan [][]*disk, excess []*slot, err error) {
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
		if room[d] -= recordRoom(recordBytes); room[d] < 0 && recordBytes > 0 {
			return nil, nil, fmt.Errorf("the record of a batch, of %d bytes: %w", recordBytes, ErrFull)
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
	for i := range shards { // not copies of them: Placed may be changing what is not used here
		count[shards[i].Segment]++
	}
	at := map[block.SegmentID]int{}
	type part struct {
		segment block.SegmentID
		on      *disk
	}
	alone := map[part]int{} // shards of which the only copy is there
	plan = make([][]*disk, len(shards))
	for i := range shards {
		s := &shards[i]
		k := at[s.Segment]
		at[s.Segment]++
		if !wanted[i] {
			continue
		}
		// take finds that many disks, from the one whose turn it is on.
		take := func(copies int, may func(*disk) bool) bool {
			var on []*disk
			for c := range len(disks) {
				if d := disks[(k+c)%len(disks)]; room[d] >= s.SizeBytes && may(d) {
					if on = append(on, d); len(on) == copies {
						break
					}
				}
			}
			if len(on) < copies {
				return false
			}
			for _, d := range on {
				room[d] -= s.SizeBytes
			}
			plan[i] = on
			return true
		}
		any := func(*disk) bool { return true }
		perDisk := (count[s.Segment] + len(disks) - 1) / len(disks)
		switch {
		case len(disks) == 1 && take(1, any):
		case perDisk <= s.Parity && take(1, func(d *disk) bool { return alone[part{s.Segment, d}] < s.Parity }):
			alone[part{s.Segment, plan[i][0]}]++
		case len(disks) > 1 && take(2, any): // also where disks are full whose turn it was
		default:
			return nil, nil, fmt.Errorf("a shard of %d bytes: %w", s.SizeBytes, ErrFull)
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

// giveBack gives back the room of a shard or a record.
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

// writtenDisks are the disks of the set that are not only read from.
func (b *Buffer) writtenDisks() []*disk {
	b.mu.Lock()
	defer b.mu.Unlock()
	var list []*disk
	for _, d := range b.disks {
		if d.failed == nil && !d.suspect {
			list = append(list, d)
		}
	}
	return list
}

// countShards takes stock of the shards and records on a disk.
func (b *Buffer) countShards(d *disk) error {
	groups, err := b.readDir(d, spoolFolder)
	if err != nil {
		return err
	}
	for _, g := range groups {
		if !g.IsDir {
			continue
		}
		entries, err := d.fs.ReadDir(b.path(d, spoolFolder, g.Name))
		if err != nil {
			return err
		}
		for _, e := range entries {
			record := strings.HasSuffix(e.Name, recordSuffix)
			if !record && !strings.HasSuffix(e.Name, shardSuffix) {
				continue
			}
			info, err := d.fs.Stat(b.path(d, spoolFolder, g.Name, e.Name))
			if err != nil {
				return err
			}
			if record {
				info.SizeBytes = recordRoom(info.SizeBytes)
			}
			d.shardBytes += info.SizeBytes
		}
	}
	return nil
}
