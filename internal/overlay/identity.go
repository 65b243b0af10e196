package overlay

import (
	"fmt"

	"drc/internal/block"
	"drc/internal/format"
)

// Identity says which image an overlay lies over: a volume at one point of one
// history.
type Identity struct {
	Repo       block.ID
	Group      block.GroupID
	Volume     block.VolumeID
	Branch     block.BranchID
	Entry      uint64      // number of the log entry that the image ends with
	Hash       format.Hash // of that entry, or of all that the image is made of
	Seq        block.Seq
	SizeBytes  int64
	SectorSize int
	VolumeName string // for people: the volume may be renamed
}

// Same reports whether i and o are of the same content. Names do not matter.
func (i Identity) Same(o Identity) bool {
	i.VolumeName, o.VolumeName = "", ""
	return i == o
}

func (i Identity) String() string {
	return fmt.Sprintf("volume %q (%s) at seq %s, log entry %d (%x…) of branch %s, group %s, repository %s, %d bytes in sectors of %d",
		i.VolumeName, i.Volume, i.Seq, i.Entry, i.Hash[:4], i.Branch, i.Group, i.Repo, i.SizeBytes, i.SectorSize)
}

func (i Identity) header(overlay uint64) *format.OverlayHeader {
	return &format.OverlayHeader{
		Repo: i.Repo, Group: i.Group, Volume: i.Volume, Branch: i.Branch, Entry: i.Entry, Hash: i.Hash, Seq: i.Seq,
		SizeBytes: i.SizeBytes, SectorSize: uint32(i.SectorSize), Name: i.VolumeName, Overlay: overlay,
	}
}

func identityOf(h *format.OverlayHeader) Identity {
	return Identity{
		Repo: h.Repo, Group: h.Group, Volume: h.Volume, Branch: h.Branch, Entry: h.Entry, Hash: h.Hash, Seq: h.Seq,
		SizeBytes: h.SizeBytes, SectorSize: int(h.SectorSize), VolumeName: h.Name,
	}
}
