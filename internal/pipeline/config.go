package pipeline

import (
	"log/slog"
	"time"

	"drc/capture"
	"drc/internal/crypt"
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
	DrainStores  bool          // a stop waits until everything is committed
	OfficeWait   time.Duration // how long a start waits for the stores before it serves without them
	DegradeAfter time.Duration // see uploader.Config
	Logger       *slog.Logger
	Now          func() time.Time
}

// VolumeConfig describes one volume to protect.
type VolumeConfig struct {
	Name      string
	Path      string
	SizeBytes int64  // to create the file with, sparse, if there is none
	Listen    string // listen URI; "" is the agent's own socket
	Group     string // "" is a group of its own, named like the volume
	Ack       capture.Ack
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
