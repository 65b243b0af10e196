// Package control is the agent's control API: its types, its server on a unix
// socket, and the client that the command line uses. Status is one snapshot,
// so that every view of it shows the same numbers. The JSON fields are a
// promise; see docs/CLI_JSON.md.
package control

import "drc/internal/block"

// Status is the agent's state.
type Status struct {
	State  string  `json:"state"` // the worst of its groups'
	PID    int     `json:"pid"`
	Repo   string  `json:"repository"`
	Groups []Group `json:"groups"`
	Buffer Buffer  `json:"buffer"`
	Stores []Store `json:"stores"`
	Copies []Copy  `json:"copies"` // of a standby
}

// Copy is the state of a standby's copy of a volume.
type Copy struct {
	Volume      string    `json:"volume"`
	Group       string    `json:"group"`
	File        string    `json:"file"`
	State       string    `json:"state"` // waiting, filling, comparing, following, error
	Message     string    `json:"message,omitempty"`
	SizeBytes   int64     `json:"size_bytes"`
	DoneBytes   int64     `json:"done_bytes"` // of the size, while it is filled
	Entry       uint64    `json:"entry"`      // where it is: log entry, seq and time of the checkpoint
	Seq         block.Seq `json:"seq"`
	Time        string    `json:"time,omitempty"`
	LagSeconds  float64   `json:"lag_seconds"`  // age of the oldest checkpoint that it should be at and is not
	BehindBytes int64     `json:"behind_bytes"` // to be fetched, as last counted
	Views       int       `json:"views"`        // clients that have it open
	Heard       string    `json:"heard"`        // when the stores last answered
}

// Group is the state of one group. Seqs are numbers on its history.
type Group struct {
	Name           string    `json:"name"`
	State          string    `json:"state"`
	Message        string    `json:"message,omitempty"` // what is wrong and what to do, if anything
	Epoch          string    `json:"epoch"`
	Branch         string    `json:"branch"`
	Captured       block.Seq `json:"captured"`
	Durable        block.Seq `json:"durable"`
	Sealed         block.Seq `json:"sealed"`
	Logged         block.Seq `json:"logged"`
	Committed      block.Seq `json:"committed"`
	LagSeconds     float64   `json:"lag_seconds"`
	BacklogBytes   int64     `json:"backlog_bytes"`
	Exposed        bool      `json:"exposed"` // the newest entry is on no more stores than may be lost, or a shard is not on its store
	WritersWaiting bool      `json:"writers_waiting"`
	GapSince       string    `json:"gap_since,omitempty"` // when the oldest write was captured that the history lacks, RFC 3339
	Waiting        Waiting   `json:"waiting"`             // for stores
	Volumes        []Volume  `json:"volumes"`
}

// Volume is the state of one volume.
type Volume struct {
	Name                 string    `json:"name"`
	ID                   string    `json:"id"`
	Path                 string    `json:"path"`
	SizeBytes            int64     `json:"size_bytes"`
	Exports              []string  `json:"exports"`
	Connections          int       `json:"connections"`
	Committed            block.Seq `json:"committed"`
	ResyncRemainingBytes int64     `json:"resync_remaining_bytes"`
	MarkedBytes          int64     `json:"marked_bytes"` // regions written past the journal, in bitmap mode
	OverlayBytes         int64     `json:"overlay_bytes"`
	Error                string    `json:"error,omitempty"`
}

// Buffer is the state of the virtual local buffer.
type Buffer struct {
	CapacityBytes int64 `json:"capacity_bytes"`
	UsedBytes     int64 `json:"used_bytes"`
	// LastsSeconds is how long there is room at the rate at which it has filled
	// in the last minute or so; nil if it does not fill.
	LastsSeconds *float64 `json:"lasts_seconds,omitempty"`
	// Rotten counts copies of shards and records that were found not to be what
	// was written, since the start; Mended those of them that were made again;
	// LostShards what could not be made again from anywhere.
	Rotten     int64  `json:"rotten"`
	Mended     int64  `json:"mended"`
	LostShards int64  `json:"lost_shards"`
	Disks      []Disk `json:"disks"`
}

// Disk is one directory of the buffer.
type Disk struct {
	Path          string `json:"path"`
	ID            string `json:"id"`
	Device        string `json:"device"` // directories with different ones do not fail together
	State         string `json:"state"`
	CapacityBytes int64  `json:"capacity_bytes"`
	UsedBytes     int64  `json:"used_bytes"`
	JournalBytes  int64  `json:"journal_bytes"`
	SegmentBytes  int64  `json:"segment_bytes"`
	LastError     string `json:"last_error,omitempty"`
}

// Waiting is what is sealed and not on its stores.
type Waiting struct {
	Bytes   int64 `json:"bytes"`   // of objects
	Objects int   `json:"objects"` // shards, manifests; log entries are not counted
}

// Store is the state of one store, as the worst-off group sees it.
type Store struct {
	URL       string `json:"url"`
	ID        string `json:"id"`
	State     string `json:"state"`           // up, down, joining, fenced, damaged
	Since     string `json:"since,omitempty"` // when it went down, RFC 3339
	LastError string `json:"last_error"`

	Waiting Waiting `json:"waiting"` // of all groups
}

// CheckpointRequest asks for a named checkpoint.
type CheckpointRequest struct {
	Name  string `json:"name"`
	Group string `json:"group,omitempty"` // may be left out where there is one group
	Wait  bool   `json:"wait"`            // answer when it is committed
}

// CheckpointAnswer says what was named.
type CheckpointAnswer struct {
	Name      string    `json:"name"`
	Group     string    `json:"group"`
	Seq       block.Seq `json:"seq"`
	Time      string    `json:"time"` // RFC 3339 with nanoseconds
	Committed bool      `json:"committed"`
}

// VolumeRequest asks the agent to protect one more volume.
type VolumeRequest struct {
	Name      string `json:"name"`
	Path      string `json:"path"` // absolute
	SizeBytes int64  `json:"size_bytes,omitempty"`
	Listen    string `json:"listen,omitempty"`
}

// BufferRequest asks for a change of the buffer's directories.
type BufferRequest struct {
	Action    string `json:"action"` // add, drain or remove
	Path      string `json:"path"`   // absolute
	SizeBytes int64  `json:"size_bytes,omitempty"`
	Force     bool   `json:"force,omitempty"` // of remove: lose what only it holds
}

// Failure is the body of every answer that is not 2xx.
type Failure struct {
	Error string `json:"error"`
	Code  int    `json:"exit_code"` // what the command line ends with
}
