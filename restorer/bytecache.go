package restorer

import (
	"math"
	"sync"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

// byteCache keeps the values used last, up to limit bytes in all. It is safe
// for concurrent use; values are shared and not to be changed.
type byteCache[K comparable, V any] struct {
	limit int64
	cost  func(V) int64

	mu    sync.Mutex
	lru   *simplelru.LRU[K, V]
	bytes int64
}

func newByteCache[K comparable, V any](limit int64, cost func(V) int64) *byteCache[K, V] {
	c := &byteCache[K, V]{limit: limit, cost: cost}
	lru, err := simplelru.NewLRU(math.MaxInt, func(_ K, v V) { c.bytes -= cost(v) })
	if err != nil {
		panic("restorer: the LRU refuses its size: " + err.Error())
	}
	c.lru = lru
	return c
}

func (c *byteCache[K, V]) get(k K) (V, bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.lru.Get(k)
}

func (c *byteCache[K, V]) put(k K, v V) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lru.Remove(k)
	c.bytes += c.cost(v)
	c.lru.Add(k, v)
	for c.bytes > c.limit && c.lru.Len() > 1 {
		c.lru.RemoveOldest()
	}
}
