package pipeline

import (
	"log/slog"
	"time"

	"drc/capture"
	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/dedup"
	"drc/internal/repo"
	"drc/internal/state"
	"drc/vbuf"
)

// Config is what an agent works by.
type Config struct {
	Repo    *repo.Repository
	Ring    *crypt.Ring
	Agent   *crypt.Agent
	State   *state.Dir // locked
	Volumes []VolumeConfig
	Buffer  []vbuf.DirOptions
	// RPO is the wanted lag between a write and its checkpoint on the stores.
	RPO          time.Duration
	BytesPerSec  int64 // bandwidth limit towards the stores; 0: none
	Takeover     bool
	Orders       map[string]Order // what was decided about volumes that need it, by name
	DrainStores  bool             // a stop waits until everything is committed
	OfficeWait   time.Duration    // how long a start waits for the stores before it serves without them
	DegradeAfter time.Duration    // see uploader.Config
	Logger       *slog.Logger
	Now          func() time.Time

	// Embedded has no sockets opened: the volumes are used through Device, and the
	// agent is asked through its methods.
	Embedded bool
	// Machine is where the volumes are; nil is the real one. State must be on its
	// file system, and the buffer is.
	Machine capture.Machine
	// OpenIndex opens a group's dedup index; nil means one on disk, as package dedup
	// has it.
	OpenIndex OpenIndex
	// Journal, if not nil, is given each group's journal and returns what capture and
	// segmenter use of it: who simulates sees there what is numbered, and in which
	// order.
	Journal func(Journal) Journal
}

// Journal is what the stages use of a group's journal.
type Journal interface {
	capture.Journal
	// Release gives back what is before and at upTo: nobody needs it any more.
	Release(upTo block.Seq)
}

// Index is a group's dedup index: see package dedup, which says what it may and
// what it must never do.
type Index interface {
	Add(b *batch.Batch, g block.GroupID, branch block.BranchID, n uint64) error
	Lookup(id crypt.ChunkID) (dedup.Location, bool)
	Close() error
}

// OpenIndex opens or makes the index in the folder dir for a group's branch whose
// log ends at or behind entry n. It must not answer from entries behind n.
type OpenIndex func(dir string, g block.GroupID, b block.BranchID, n uint64, logger *slog.Logger) (Index, error)

func openIndex(dir string, g block.GroupID, b block.BranchID, n uint64, logger *slog.Logger) (Index, error) {
	x, err := dedup.Open(dir, g, b, n, logger)
	if err != nil {
		return nil, err
	}
	return x, nil
}

// VolumeConfig describes one volume to protect.
type VolumeConfig struct {
	Name      string
	Path      string
	SizeBytes int64  // to create the file with, sparse, if there is none
	Listen    string // listen URI; "" is the agent's own socket
	Group     string // "" is a group of its own, named like the volume
	Ack       capture.Ack
	WhenFull  WhenFull // one for a group: its volumes must not disagree
}

// GroupName is the name of the volume's group.
func (v VolumeConfig) GroupName() string {
	if v.Group != "" {
		return v.Group
	}
	return v.Name
}

// defaultOfficeWait is long enough for stores that are there.
const defaultOfficeWait = 10 * time.Second
