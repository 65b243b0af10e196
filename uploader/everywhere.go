package uploader

import (
	"context"
	"fmt"
	"time"

	"drc/internal/format"
)

// everywhere is an object on its way to every store. Its bytes are in memory
// until enough stores have it; a store that is late gets them from one of
// those, so that an outage does not fill the memory.
type everywhere struct {
	u      *Uploader
	name   string
	hash   format.Hash
	size   int64
	raw    []byte // guarded by u.mu, as is placed
	placed []bool
	never  []bool // the store can never have it
	late   []bool // counted as late by the healer
}

// putEverywhere puts an object on every store. It returns when all have it, or
// when as many as an entry needs have it and the others have been failing for
// long; these get it when they are back. It fails with errTaken if so many
// stores refuse the object that under this name it can never be on enough.
func (u *Uploader) putEverywhere(ctx context.Context, name string, raw []byte) error {
	o := &everywhere{u: u, name: name, hash: format.HashOf(raw), size: int64(len(raw)), raw: raw, placed: make([]bool, len(u.putters)), never: make([]bool, len(u.putters)), late: make([]bool, len(u.putters))}
	for i, p := range u.putters {
		p.add(o.put(ctx, i))
	}
	hopeless := false
	err := u.mu.await(ctx, time.Second, func() bool {
		possible := make([]bool, len(o.never))
		for i := range possible {
			possible[i] = !o.never[i]
		}
		if hopeless = !u.enough(possible); hopeless {
			return true
		}
		for i, ok := range o.placed {
			if ok || o.never[i] {
				continue
			}
			if since, _ := u.putters[i].down(); since.IsZero() || u.cfg.Now().Sub(since) < u.cfg.DegradeAfter {
				return false // it is worth waiting for
			}
		}
		return u.enough(o.placed)
	})
	if err != nil {
		return err
	}
	if hopeless {
		for _, p := range u.putters {
			p.drop(o)
		}
		return fmt.Errorf("put %s: %w", name, errTaken)
	}
	u.mu.Lock()
	o.raw = nil
	u.mu.Unlock()
	for _, p := range u.putters {
		p.deferring(o)
	}
	if u.merger == nil {
		return nil
	}
	// A long outage must not fill the memory with what waits for its end.
	for i, p := range u.putters {
		u.mu.Lock()
		waits := !o.placed[i] && !o.never[i]
		drop := waits && !u.merger.healer.isLate(i)
		o.late[i] = waits && !drop
		u.mu.Unlock()
		if drop {
			p.drop(o)
		}
	}
	return nil
}

// enough reports whether an object that is on these stores is on as many as an
// entry needs.
func (u *Uploader) enough(on []bool) bool {
	set := u.cfg.Repo.Set()
	votes := 0
	for i, there := range on {
		if there {
			votes += set[i].Votes
		}
	}
	return set.Majority(votes)
}

// put is the object's put to store i.
func (o *everywhere) put(ctx context.Context, i int) put {
	return put{
		name:    o.name,
		owner:   o,
		size:    o.size,
		body:    func() ([]byte, error) { return o.body(ctx) },
		placed:  func() { o.over(i, o.placed) },
		refused: func(error) { o.over(i, o.never) },
	}
}

// over notes in how that the put to store i is over.
func (o *everywhere) over(i int, how []bool) {
	o.u.mu.Lock()
	how[i] = true
	late := o.late[i]
	o.u.mu.notify()
	o.u.mu.Unlock()
	if late {
		o.u.merger.healer.notLate(i)
		o.u.cfg.Log.poke()
	}
}

// body returns the object's bytes, from memory or from a store that has it.
func (o *everywhere) body(ctx context.Context) ([]byte, error) {
	o.u.mu.Lock()
	raw, placed := o.raw, append([]bool(nil), o.placed...)
	o.u.mu.Unlock()
	if raw != nil {
		return raw, nil
	}
	err := fmt.Errorf("%s is on no store that can be reached", o.name)
	for i, ok := range placed {
		m := o.u.putters[i].member
		if !ok || m.Store == nil {
			continue
		}
		var gerr error
		if raw, _, gerr = m.Store.Get(ctx, o.name, o.size, nil); gerr != nil {
			err = fmt.Errorf("read %s of %s for another store: %w", o.name, m.URL(), gerr)
			continue
		}
		if format.HashOf(raw) == o.hash {
			return raw, nil
		}
		err = format.Corrupt(m.URL()+" "+o.name, "it has changed since it was put")
	}
	return nil, fmt.Errorf("%w: %w", errNoSource, err)
}
