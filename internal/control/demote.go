package control

import "drc/internal/block"

// DemoteRequest asks that the group of a volume be handed over.
type DemoteRequest struct {
	Volume string `json:"volume"`
}

// DemoteAnswer says what was handed over.
type DemoteAnswer struct {
	Group   string    `json:"group"`
	Volumes []string  `json:"volumes"` // of the group
	Seq     block.Seq `json:"seq"`     // at which the history ends
}
