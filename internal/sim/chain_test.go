package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/object"
	"drc/internal/object/mem"
)

// chain is what the logs on the stores say, read by the rules of docs/FORMAT.md
// and by nothing of the agent but the decoding: which entries are decided, and
// whether they are one history. It reads each object once and forgets nothing: what
// was decided at some time must be so for ever.
type chain struct {
	repo    block.ID
	root    crypt.RootPublic
	ring    *crypt.Ring
	stores  grouplog.StoreSet
	mems    []*mem.Store
	group   block.GroupID // zero until something was put
	read    []uint64      // by store: the index of the next object
	promise []format.Epoch
	newest  []uint64 // by store: the newest entry that counts there
	values  map[format.Hash][]byte
	votes   map[vote]map[int]bool
	decided []decidedEntry // entry n is at n-1; only without holes before it
	early   map[uint64]format.Hash

	mu      sync.Mutex
	authors map[format.Epoch]*world // who has promised an epoch first
}

type vote struct {
	n     uint64
	hash  format.Hash
	epoch format.Epoch // of who appended it
}

type decidedEntry struct {
	hash   format.Hash
	author format.Epoch
	to     block.Seq // the end of the history with it
}

// put notes who puts what into a log.
func (c *chain) put(w *world, name string, body []byte) {
	if !isLog(name) {
		return
	}
	o, _, _, err := format.DecodeLogObject(name, body)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err == nil && c.authors[o.Epoch] == nil {
		c.authors[o.Epoch] = w
	}
	if c.group == (block.GroupID{}) {
		c.group = o.Group
	}
}

// isOf reports whether a host was the last one in office, and nobody has tried to
// follow it: it has promised last on each store, and the newest entry is its own.
func (c *chain) isOf(w *world) bool {
	if len(c.decided) == 0 || c.author(c.decided[len(c.decided)-1].author) != w {
		return false
	}
	for i, newest := range c.newest {
		if c.author(c.promise[i]) != w || newest > uint64(len(c.decided)) {
			return false
		}
	}
	return true
}

// known reports whether anything was put.
func (c *chain) known() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.group != block.GroupID{}
}

func (c *chain) author(e format.Epoch) *world {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.authors[e]
}

// look reads what is new, and says what is wrong with it.
func (c *chain) look() error {
	c.mu.Lock()
	group := c.group
	c.mu.Unlock()
	if group == (block.GroupID{}) {
		return nil
	}
	for i, m := range c.mems {
		for {
			name := format.LogName(group, c.read[i])
			raw, _, err := m.Get(context.Background(), name, 64<<20, nil)
			if errors.Is(err, object.ErrNotFound) {
				break
			}
			if err != nil {
				return err
			}
			o, err := grouplog.VerifyObject(c.root, name, grouplog.Place{Repo: c.repo, Group: group, Store: c.stores[i].ID, Index: c.read[i]}, raw)
			if err != nil {
				return fmt.Errorf("store %d: %w", i, err)
			}
			c.read[i]++
			if err := c.count(i, o); err != nil {
				return err
			}
		}
	}
	return c.follow()
}

// count counts one object of a store's log.
func (c *chain) count(i int, o format.LogObject) error {
	if o.Epoch.Less(c.promise[i]) {
		return nil
	}
	c.promise[i] = o.Epoch
	if o.Kind != format.LogCommit {
		return nil
	}
	v, err := grouplog.VerifyValue(c.root, fmt.Sprintf("object %d of store %d's log", o.Index, i), o.Value)
	if err != nil {
		return err
	}
	hash := format.HashOf(o.Value)
	c.values[hash] = bytes.Clone(o.Value)
	c.newest[i] = max(c.newest[i], v.N)
	x := vote{v.N, hash, o.Epoch}
	if c.votes[x] == nil {
		c.votes[x] = map[int]bool{}
	}
	c.votes[x][i] = true
	if !c.stores.MajorityOf(func(id block.ID) bool {
		for s := range c.votes[x] {
			if c.stores[s].ID == id {
				return true
			}
		}
		return false
	}) {
		return nil
	}
	was, ok := c.early[v.N]
	if v.N <= uint64(len(c.decided)) {
		was, ok = c.decided[v.N-1].hash, true
	}
	if ok && was != hash {
		return fmt.Errorf("there are two histories: entry %d was decided twice, and is not the same", v.N)
	}
	c.early[v.N] = hash
	return nil
}

// follow adds the entries that are decided to the chain.
func (c *chain) follow() error {
	for {
		n := uint64(len(c.decided)) + 1
		hash, ok := c.early[n]
		if !ok {
			return nil
		}
		delete(c.early, n)
		e, err := grouplog.OpenValue(c.ring, fmt.Sprintf("log entry %d", n), c.values[hash])
		if err != nil {
			return fmt.Errorf("a decided entry cannot be opened: %w", err)
		}
		d := decidedEntry{hash: hash, author: e.Epoch}
		if n > 1 {
			d.to = c.decided[n-2].to
			if e.Parent != c.decided[n-2].hash {
				return fmt.Errorf("entry %d was decided, and does not follow the decided entry before it", n)
			}
		}
		if e.Items.Range != nil {
			d.to = max(d.to, e.Items.Range.To)
		}
		c.decided = append(c.decided, d)
	}
}

// ends returns the numbers of the entries with which the history ends at seq.
func (c *chain) ends(seq block.Seq) (ns []uint64) {
	for i := len(c.decided) - 1; i >= 0 && c.decided[i].to >= seq; i-- {
		if c.decided[i].to == seq {
			ns = append(ns, uint64(i+1))
		}
	}
	return ns
}

// on is how many stores hold entry n, or a later one.
func (c *chain) on(n uint64) (stores int) {
	for _, newest := range c.newest {
		if newest >= n {
			stores++
		}
	}
	return stores
}
