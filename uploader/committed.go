package uploader

import (
	"context"
	"maps"

	"drc/internal/block"
	"drc/internal/format"
)

// loggedMax bounds the decided entries that are remembered until they are safe:
// beyond it neighbours are taken together, and become safe together.
const loggedMax = 1024

// loggedEntry is a decided entry that is not safe yet, or some neighbours.
type loggedEntry struct {
	n      uint64                          // the newest
	ends   map[block.VolumeIndex]block.Seq // the newest checkpoint of each volume
	oldest int64
	bytes  int64
}

// halved takes neighbours together.
func halved(all []loggedEntry) []loggedEntry {
	var out []loggedEntry
	for i, e := range all {
		if i%2 == 0 {
			out = append(out, e)
			continue
		}
		x := &out[len(out)-1]
		x.n = e.n
		maps.Copy(x.ends, e.ends)
		if x.oldest == 0 || (e.oldest != 0 && e.oldest < x.oldest) {
			x.oldest = e.oldest
		}
		x.bytes += e.bytes
	}
	return out
}

// Learn says what decided entries up to n hold that this Uploader has not
// logged: the end of what they cover, the newest checkpoint of each volume, and
// volumes that they describe. They may not be on enough stores yet to count as
// committed.
func (u *Uploader) Learn(n uint64, to block.Seq, checkpoints map[block.VolumeIndex]block.Seq, volumes []format.Volume) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.lastTo = max(u.lastTo, to)
	for _, v := range volumes {
		u.described[v.Index] = true
	}
	if last := len(u.logged) - 1; last < 0 || u.logged[last].n < n {
		u.remember(loggedEntry{n: n, ends: checkpoints})
	}
}

// remember has an entry become committed once it is safe; u.mu is held.
func (u *Uploader) remember(e loggedEntry) {
	u.logged = append(u.logged, e)
	if len(u.logged) > loggedMax {
		u.logged = halved(u.logged)
	}
	u.mu.notify()
}

// watchCommitted notes which decided entries are safe: on more stores than may
// be lost.
func (u *Uploader) watchCommitted(ctx context.Context) {
	lost := u.cfg.Repo.Tolerates()
	for {
		var safe uint64
		err := u.mu.await(ctx, 0, func() bool {
			safe = u.cfg.Log.Safe(lost)
			return len(u.logged) > 0 && u.logged[0].n <= safe
		})
		if err != nil {
			return
		}
		u.mu.Lock()
		for len(u.logged) > 0 && u.logged[0].n <= safe {
			e := u.logged[0]
			u.logged = u.logged[1:]
			for v, end := range e.ends {
				u.committed[v] = max(u.committed[v], end)
			}
		}
		u.mu.notify()
		u.mu.Unlock()
	}
}

// passSafe wakes those who wait here whenever more of the log has become safe.
func (u *Uploader) passSafe(ctx context.Context) {
	lost, safe := u.cfg.Repo.Tolerates(), uint64(0)
	for u.cfg.Log.AwaitSafe(ctx, lost, safe) == nil {
		safe = u.cfg.Log.Safe(lost)
		u.mu.Lock()
		u.mu.notify()
		u.mu.Unlock()
	}
}

// Logged is the end of the newest decided entry.
func (u *Uploader) Logged() block.Seq {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.lastTo
}

// Committed is the newest checkpoint of a volume that is on more stores than
// may be lost.
func (u *Uploader) Committed(v block.VolumeIndex) block.Seq {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.committed[v]
}

// AwaitLogged waits until what is decided reaches seq.
func (u *Uploader) AwaitLogged(ctx context.Context, seq block.Seq) error {
	return u.mu.await(ctx, 0, func() bool { return u.lastTo >= seq })
}

// AwaitCommitted waits until a volume's newest checkpoint is at or behind seq.
func (u *Uploader) AwaitCommitted(ctx context.Context, v block.VolumeIndex, seq block.Seq) error {
	return u.mu.await(ctx, 0, func() bool { return u.committed[v] >= seq })
}
