package diskcache

import (
	"errors"
	"syscall"
	"time"
)

// write stores what is put until the cache is closed and nothing waits any more.
func (c *Cache) write() {
	defer close(c.written)
	for {
		w := c.next()
		if w == nil {
			break
		}
		tried, err := c.store(w)
		c.mu.Lock()
		if c.queued[w.key.hash()] == w {
			delete(c.queued, w.key.hash())
		}
		c.queueBytes -= int64(len(w.value))
		c.stats.Bytes = c.heldBytes()
		c.mu.Unlock()
		if tried {
			c.went(err)
		}
	}
	if n := len(c.slabs); n > 0 {
		_ = c.complete(c.slabs[n-1]) // without a table the next start takes a little longer
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, s := range c.slabs {
		c.forget(s)
	}
	c.slabs, c.index = nil, map[uint64]place{}
}

// next waits for the next value to be written. It returns nil when there will be
// none any more.
func (c *Cache) next() *waiting {
	c.mu.Lock()
	defer c.mu.Unlock()
	for len(c.queue) == 0 && !c.closed {
		c.work.Wait()
	}
	if len(c.queue) == 0 {
		return nil
	}
	w := c.queue[0]
	c.queue[0] = nil
	c.queue = c.queue[1:]
	return w
}

// store writes a value, and makes room for it first. It does not try if nobody wants
// the value any more, or nothing is stored for now.
func (c *Cache) store(w *waiting) (tried bool, err error) {
	c.mu.Lock()
	wanted := c.queued[w.key.hash()] == w
	paused := time.Now().Before(c.pausedTill)
	if wanted && paused {
		c.stats.Dropped++
	}
	c.mu.Unlock()
	if !wanted || paused {
		return false, nil
	}
	record := [][]byte{encodeRecordHead(&w.key, w.value), w.value}
	n := int64(recordHeadBytes + len(w.value))
	err = c.makeRoom(n)
	if err == nil {
		err = c.append(record, n, w.key.hash(), func() bool { return c.queued[w.key.hash()] == w })
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.stats.Dropped++
		return true, err
	}
	c.stats.Stored++
	c.stats.StoredBytes += int64(len(w.value))
	return true, nil
}

// append writes a record of n bytes to the youngest slab and, if it is wanted still,
// lists it. wanted is called under the mutex.
func (c *Cache) append(record [][]byte, n int64, hash uint64, wanted func() bool) error {
	s, err := c.youngest(n)
	if err != nil {
		return err
	}
	off, n, err := s.append(record)
	if err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	s.end = off + n
	s.entries = append(s.entries, entry{hash: hash, off: uint32(off), bytes: uint32(n)})
	if wanted() {
		c.index[hash] = place{s.id, uint32(len(s.entries) - 1)}
	}
	return nil
}

// youngest returns a slab with room for a record of n bytes, a new one if need be.
func (c *Cache) youngest(n int64) (*slab, error) {
	if i := len(c.slabs) - 1; i >= 0 {
		s := c.slabs[i]
		if len(s.entries) == 0 && s.end == slabHeadBytes ||
			s.end+n <= c.slabBytes && len(s.entries) < int(c.slabBytes/entryBytesMin) {
			return s, nil
		}
		if err := c.complete(s); err != nil {
			return nil, err
		}
	}
	s, err := createSlab(c.fs, c.dir, c.nextNumber)
	c.nextNumber++ // also if it failed: the name may be taken
	if err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.add(s)
	c.clock++
	return s, nil
}

// complete gives a slab its table, of what is listed in it.
func (c *Cache) complete(s *slab) error {
	c.mu.Lock()
	listed := make([]entry, 0, len(s.entries))
	for n, e := range s.entries {
		if c.index[e.hash] == (place{s.id, uint32(n)}) {
			listed = append(listed, e)
		}
	}
	c.mu.Unlock()
	return s.finish(listed)
}

// went notes how an attempt to store went: after a failure there is a pause.
func (c *Cache) went(err error) {
	if err == nil {
		if c.failing {
			c.failing = false
			c.logger.Info("the cache stores again", "folder", c.dir)
		}
		return
	}
	if errors.Is(err, syscall.ENOSPC) && len(c.slabs) > 1 {
		_ = c.remove(c.victim()) // the limit is more than the disk has
	}
	c.mu.Lock()
	c.pausedTill = time.Now().Add(storingPause)
	c.stats.Bytes = c.heldBytes()
	c.mu.Unlock()
	if !c.failing {
		c.failing = true
		c.logger.Warn("the cache cannot store: its disk is full or fails; going on with what it has, and trying again now and then", "folder", c.dir, "error", err)
	}
}
