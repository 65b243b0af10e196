package control

import "drc/internal/block"

// Kept is what a host's buffer holds of writes that are not on the stores: GET
// /v1/kept, and drc inspect of a state or buffer folder.
type Kept struct {
	Kind    string      `json:"kind"`
	State   string      `json:"state"` // the state folder; "" if it is not known
	Running bool        `json:"running"`
	Dirs    []string    `json:"dirs"` // of the buffer
	Groups  []KeptGroup `json:"groups"`
}

// KeptWrites is the Kind of Kept.
const KeptWrites = "kept writes"

// KeptGroup is what is kept of one group. Seqs and writes are those behind Logged.
type KeptGroup struct {
	ID         string       `json:"id"`
	Name       string       `json:"name"` // "" if it is not known
	Branch     string       `json:"branch"`
	Fenced     bool         `json:"fenced"` // another agent has taken over, as the running one knows
	Logged     block.Seq    `json:"logged"` // the end of the history on the stores, as this host knows it
	From       block.Seq    `json:"from"`   // the first and last write kept; both 0 if there is none
	To         block.Seq    `json:"to"`
	Writes     int64        `json:"writes"` // numbers kept, in the journal or in batches
	Bytes      int64        `json:"bytes"`  // of those in the journal
	Oldest     string       `json:"oldest,omitempty"`
	Newest     string       `json:"newest,omitempty"`
	Volumes    []KeptVolume `json:"volumes"`
	Batches    []KeptBatch  `json:"batches"`
	Damaged    []KeptRange  `json:"damaged"` // seqs that were durable and are lost
	MarkedFrom string       `json:"marked_since,omitempty"`
	Advice     string       `json:"advice"`
}

// KeptVolume is what is kept of one volume: From to Newest of what is in the
// journal, the regions of that and of what is only in batches.
type KeptVolume struct {
	Name        string       `json:"name"`
	Index       int          `json:"index"`
	Writes      int64        `json:"writes"`
	Bytes       int64        `json:"bytes"`
	From        block.Seq    `json:"from"`
	To          block.Seq    `json:"to"`
	Oldest      string       `json:"oldest,omitempty"`
	Newest      string       `json:"newest,omitempty"`
	Regions     []KeptRegion `json:"regions"`      // changed, in order, merged
	MarkedBytes int64        `json:"marked_bytes"` // written past the full buffer: on the volume only
}

// KeptRegion is a range of a volume, in bytes.
type KeptRegion struct {
	Off int64 `json:"off"`
	Len int64 `json:"len"`
}

// KeptRange is a range of seqs, both included.
type KeptRange struct {
	From block.Seq `json:"from"`
	To   block.Seq `json:"to"`
}

// KeptBatch is a sealed batch that waits: for the log, or, if it is in that, for
// stores that lack some of its shards.
type KeptBatch struct {
	From         block.Seq `json:"from"`
	To           block.Seq `json:"to"`
	Bytes        int64     `json:"bytes"` // of the writes that it stands for
	Oldest       string    `json:"oldest,omitempty"`
	Logged       bool      `json:"logged"`
	InJournal    bool      `json:"in_journal"` // its writes are in the journal, too
	Shards       int       `json:"shards"`     // that its stores lack
	ShardBytes   int64     `json:"shard_bytes"`
	LastError    string    `json:"last_error,omitempty"` // why it cannot be read
	SafeInBuffer bool      `json:"durable"`
}
