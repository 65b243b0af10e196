package diskcache

// Stats are what a cache has done since it was opened, and what it holds.
type Stats struct {
	Values     int   // that can be found
	Bytes      int64 // of the limit that are taken: what is on the disk, each value as 4 KiB at least
	LimitBytes int64
	Queued     int64 // bytes that wait to be written

	Hits     int64
	HitBytes int64
	Misses   int64

	Stored      int64 // values written
	StoredBytes int64
	Dropped     int64 // values that were put and not kept: too many at once, too large, or the disk was full or failed
	Moved       int64 // values that were written again because they are in use
	MovedBytes  int64
	Evicted     int64 // values that went with their slab
	Damaged     int64 // values that were no good when they were asked for
}

func (s *Stats) hit(n int) {
	s.Hits++
	s.HitBytes += int64(n)
}

// Stats returns the present ones.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	s := c.stats
	s.Values, s.LimitBytes, s.Queued = len(c.index), c.limitBytes, c.queueBytes
	for hash := range c.queued {
		if _, ok := c.index[hash]; !ok {
			s.Values++
		}
	}
	return s
}
