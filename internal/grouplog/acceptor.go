package grouplog

import (
	"drc/internal/block"
	"drc/internal/format"
)

// Accepted says that a store's log holds a value under an epoch that counts
// there.
type Accepted struct {
	N     uint64
	Epoch format.Epoch // of the wrapper: who appended it here
	Hash  format.Hash  // of the value
	Index uint64       // where in this store's log
}

// Acceptor is what one store's log says, read from its beginning or from a
// known place on. Objects are given in order of their index, verified.
//
// Invariants: Promised is the highest epoch of any object read. An entry
// counts only if no object before it has a higher epoch.
type Acceptor struct {
	Store    block.ID
	Next     uint64      // index of the next object to read, the first free place at the end
	Last     format.Hash // hash of the object at Next-1
	Promised format.Epoch
	Decided  uint64 // the highest n that any author here called decided
	Latest   Accepted

	entries map[uint64]Accepted
}

// Add takes the next object of the log. raw is its stored form. It returns a
// *format.CorruptError if o does not continue the chain.
func (a *Acceptor) Add(name string, o format.LogObject, raw []byte) error {
	if o.Index != a.Next {
		return format.Corrupt(name, "it has index %d where %d is next", o.Index, a.Next)
	}
	if o.Previous != a.Last {
		return format.Corrupt(name, "the chain is broken: it follows another object than the one before it")
	}
	a.Next++
	a.Last = format.HashOf(raw)
	if o.Epoch.Less(a.Promised) {
		return nil // a fenced writer's put that arrived late: it does not count
	}
	a.Promised = o.Epoch
	a.Decided = max(a.Decided, o.Decided)
	if o.Kind != format.LogCommit {
		return nil
	}
	v, _, _, _, err := format.DecodeValue(name, o.Value)
	if err != nil {
		return err
	}
	if v.Group != o.Group {
		return format.Corrupt(name, "its value belongs to group %s", v.Group)
	}
	acc := Accepted{N: v.N, Epoch: o.Epoch, Hash: format.HashOf(o.Value), Index: o.Index}
	if a.entries == nil {
		a.entries = map[uint64]Accepted{}
	}
	a.entries[v.N] = acc
	if v.N >= a.Latest.N {
		a.Latest = acc
	}
	return nil
}

// Entry returns what the store has accepted for n under the highest epoch.
func (a *Acceptor) Entry(n uint64) (Accepted, bool) {
	e, ok := a.entries[n]
	return e, ok
}

// Forget drops entries below n, which the caller knows to be decided.
func (a *Acceptor) Forget(n uint64) {
	for k := range a.entries {
		if k < n {
			delete(a.entries, k)
		}
	}
}

// Tail returns the end of the log for wrappers.
func (a *Acceptor) Tail() format.Tail { return format.Tail{Store: a.Store, Next: a.Next, Last: a.Last} }

// StoreSet is the stores of a repository with their votes.
type StoreSet []format.StoreEntry

// NewStoreSet gives each store one vote, and the first one two if the number
// of stores is even: it is the tie-breaker.
func NewStoreSet(ids []block.ID) StoreSet {
	set := make(StoreSet, len(ids))
	for i, id := range ids {
		set[i] = format.StoreEntry{ID: id, Votes: 1}
		if i == 0 && len(ids)%2 == 0 {
			set[i].Votes = 2
		}
	}
	return set
}

// Votes is the sum of all votes.
func (s StoreSet) Votes() int {
	n := 0
	for _, e := range s {
		n += e.Votes
	}
	return n
}

// Majority reports whether votes are more than half of all.
func (s StoreSet) Majority(votes int) bool { return 2*votes > s.Votes() }

// MajorityOf reports whether the stores for which in is true are a majority.
func (s StoreSet) MajorityOf(in func(id block.ID) bool) bool {
	votes := 0
	for _, e := range s {
		if in(e.ID) {
			votes += e.Votes
		}
	}
	return s.Majority(votes)
}

// Choice is what is known of one entry.
type Choice struct {
	Accepted
	Decided bool // a majority has it under one epoch
	Known   bool // some store has it
}

// Choose returns the value of entry n: of all that the given stores have
// accepted, the one of the highest epoch. After a majority has promised an
// epoch, no other value can have been decided, so it is what the new epoch
// must append again.
func Choose(set StoreSet, acceptors []*Acceptor, n uint64) Choice {
	var c Choice
	for _, a := range acceptors {
		e, ok := a.Entry(n)
		if !ok {
			continue
		}
		if !c.Known || c.Epoch.Less(e.Epoch) {
			c.Accepted, c.Known = e, true
		}
	}
	if !c.Known {
		return c
	}
	c.Decided = set.MajorityOf(func(id block.ID) bool {
		for _, a := range acceptors {
			if e, ok := a.Entry(n); ok && a.Store == id {
				return e.Epoch == c.Epoch && e.Hash == c.Hash
			}
		}
		return false
	})
	return c
}

// Highest returns the highest n that any of the stores has accepted.
func Highest(acceptors []*Acceptor) uint64 {
	n := uint64(0)
	for _, a := range acceptors {
		n = max(n, a.Latest.N)
	}
	return n
}
