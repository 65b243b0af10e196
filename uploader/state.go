package uploader

import (
	"drc/internal/format"
	"drc/internal/grouplog"
)

// State is what a writer keeps durably on its host.
type State interface {
	// Epochs are the epochs that were taken with this state.
	Epochs() []format.Epoch
	// AddEpoch makes e durable before it returns.
	AddEpoch(e format.Epoch) error
	// Tails are the ends of the logs as last saved; nil if nothing was saved.
	Tails() *Tails
	// SaveTails keeps t, not necessarily durably.
	SaveTails(t *Tails) error
}

// Tails are a place from which the logs can be read on.
type Tails struct {
	N    uint64 // the newest entry that is known to be decided
	Hash format.Hash
	Logs []StoreTail
}

// StoreTail is how far one store's log was read, and what it is known to hold.
type StoreTail struct {
	grouplog.Acceptor
	Whole uint64 // up to this entry the log holds what was chosen
}
