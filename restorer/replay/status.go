package replay

import (
	"time"

	"drc/internal/block"
)

// State says what a copy is doing.
type State string

// The states of a copy.
const (
	Waiting   State = "waiting"   // the volume has no checkpoint yet that the copy may be at
	Filling   State = "filling"   // it is brought to its first checkpoint
	Comparing State = "comparing" // the same, and what was in the file is compared
	Following State = "following" // it is at a checkpoint, and follows
	Failing   State = "error"     // it cannot go on; the message says why
)

// Status is how a copy is.
type Status struct {
	Volume    string
	Group     string
	File      string // as it is named now
	State     State
	Whole     bool // the file has its name, and what the volume had at the point below
	SizeBytes int64
	DoneBytes int64 // of the size, while it is filled
	// Where the copy is; while it is filled, where it will be.
	Entry uint64
	Seq   block.Seq
	Time  time.Time
	// Lag is how old the oldest checkpoint is that the copy should be at and is not.
	Lag time.Duration
	// BehindBytes are to be fetched, as far as they are counted: all is counted now and
	// then only.
	BehindBytes  int64
	FetchedBytes int64 // while it was filled, by this process
	Views        int
	Heard        time.Time // when the stores last answered
	Message      string
}

// Status tells how the copies are.
func (s *Standby) Status() []Status {
	var out []Status
	now := s.o.Now()
	for _, g := range s.all() {
		g.mu.Lock()
		err, heard, name := g.err, g.heard, g.hist.Group.Name
		g.mu.Unlock()
		for _, c := range g.list() {
			if c.followed() {
				x := c.status(now, s.o.Delay)
				x.Group, x.Heard = name, heard
				if err != nil {
					x.State, x.Message = Failing, err.Error()
				}
				out = append(out, x)
			}
		}
	}
	return out
}

func (c *replica) status(now time.Time, delay time.Duration) Status {
	c.mu.RLock()
	defer c.mu.RUnlock()
	at := c.st.Position
	x := Status{
		Volume: c.vol.Name, File: c.path, Whole: c.st.Whole, SizeBytes: c.st.SizeBytes, DoneBytes: c.st.Filled, Entry: at.Entry, Seq: at.Seq, Time: at.Time,
		BehindBytes: c.behind, FetchedBytes: c.fetched, Views: len(c.views),
	}
	if !c.oldest.IsZero() {
		x.Lag = max(0, now.Add(-delay).Sub(c.oldest))
	}
	switch {
	case c.st.Whole:
		x.State = Following
	case at.Entry == 0:
		x.State = Waiting
	case c.st.Compare:
		x.State = Comparing
	default:
		x.State = Filling
	}
	return x
}

// FetchedFromStores is how many bytes were read from the stores.
func (s *Standby) FetchedFromStores() (n int64) {
	for _, g := range s.all() {
		n += g.follower.FetchedBytes()
	}
	return n
}

// RepoID is the id of the repository that is followed.
func (s *Standby) RepoID() block.ID { return s.o.Restorer.Repo.ID }
