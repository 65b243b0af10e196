package diskcache

import (
	"cmp"
	"slices"
)

// makeRoom removes slabs until a record of n bytes can be added without what the
// cache holds going beyond its limit. Before, it moves on what is in use in them, as
// much of it as makes up a quarter of a slab.
func (c *Cache) makeRoom(n int64) error {
	budget := c.slabBytes / 4
	n = costBytes(n)
	for len(c.slabs) > 0 && c.heldBytes()+n+budget > c.limitBytes {
		s := c.victim()
		if s != c.slabs[len(c.slabs)-1] {
			moved, err := c.moveOn(s, budget)
			budget -= moved
			if err != nil {
				return err
			}
		}
		if err := c.remove(s); err != nil {
			return err
		}
	}
	return nil
}

// victim is, of the older half of the slabs, the one of which the least is in use; of
// several the oldest. There must be one.
func (c *Cache) victim() (out *slab) {
	least := int64(0)
	for _, s := range c.slabs[:(len(c.slabs)+1)/2] {
		n := int64(0)
		c.mu.Lock()
		for _, e := range s.entries {
			if c.inUse(e) {
				n += int64(e.bytes)
			}
		}
		c.mu.Unlock()
		if out == nil || n < least {
			out, least = s, n
		}
	}
	return out
}

// inUse is whether a value was used while the cache was written about once over, or
// since then. It is called under the mutex.
func (c *Cache) inUse(e entry) bool {
	return e.used != 0 && int(c.clock-e.used) <= len(c.slabs)
}

// costBytes is by how much what the cache holds grows at most with a record of n
// bytes, which may begin a new slab.
func costBytes(n int64) int64 {
	return max(n, entryBytesMin) + rowBytes + slabHeadBytes + tailBytes
}

// moveOn writes the values of a slab that are in use again, the ones used last first,
// up to budget bytes in all. It returns by how much the cache may have grown.
func (c *Cache) moveOn(s *slab, budget int64) (moved int64, err error) {
	type used struct {
		place
		entry
	}
	var all []used
	c.mu.Lock()
	for n, e := range s.entries {
		if at := (place{s.id, uint32(n)}); c.inUse(e) && c.index[e.hash] == at {
			all = append(all, used{at, e})
		}
	}
	c.mu.Unlock()
	slices.SortFunc(all, func(a, b used) int { return cmp.Or(cmp.Compare(b.used, a.used), cmp.Compare(a.off, b.off)) })
	for _, u := range all {
		n := costBytes(int64(u.bytes))
		if moved+n > budget {
			break
		}
		raw, err := s.readRecord(u.entry)
		if err == nil {
			_, _, err = decodeRecord(raw)
		}
		if err != nil {
			continue // it goes with its slab
		}
		if err := c.append([][]byte{raw}, int64(len(raw)), u.hash, func() bool {
			if c.index[u.hash] != u.place {
				return false // dropped meanwhile
			}
			c.stats.Moved++
			c.stats.MovedBytes += int64(len(raw))
			return true
		}); err != nil {
			return moved, err
		}
		moved += n
	}
	return moved, nil
}

// remove removes a slab with all that is in it. If the file cannot be removed the
// slab stays, and can be used.
func (c *Cache) remove(s *slab) error {
	if err := c.removeFile(s); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for n, e := range s.entries {
		if c.index[e.hash] == (place{s.id, uint32(n)}) {
			delete(c.index, e.hash)
			c.stats.Evicted++
		}
	}
	c.slabs = slices.DeleteFunc(c.slabs, func(o *slab) bool { return o == s })
	c.forget(s)
	return nil
}

// forget takes a slab out of use, under the mutex. Its file is closed when the last
// reader has gone.
func (c *Cache) forget(s *slab) {
	delete(c.byID, s.id)
	s.gone = true
	if s.refs == 0 {
		_ = s.file.Close() // nothing in it needs to be durable
	}
}
