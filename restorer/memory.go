package restorer

import (
	"sync/atomic"

	"golang.org/x/sync/semaphore"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/manifest"
)

// Bounds of what images keep in memory.
const (
	pagesMemoryBytes   = 48 << 20 // opened manifest pages
	windowsMemoryBytes = 16 << 20 // worked-out windows of the map
	framesMemoryBytes  = 32 << 20 // plain frames, for ReadAt
	indexMemoryBytes   = 16 << 20 // segment indexes
	rebuiltMemoryBytes = 48 << 20 // payloads of segments that had to be reconstructed
	transferBytes      = 48 << 20 // stored bytes being fetched
	rebuildBytes       = 24 << 20 // shards read to rebuild others
)

// Memory is what images keep in memory: at most 232 MiB in all for all images that
// share it, however many these are. What is the same for several images (frames,
// indexes and pages are the same at all points of a group) is there once. It is safe
// for concurrent use, and may be shared by histories of any repositories and keys of
// which the process may see the content.
//
// Everything in it was verified when it was put there. Its keys hold all that it was
// verified against, so that nothing that one group's writer made stands in for what
// another's manifests refer to.
type Memory struct {
	pages    *byteCache[pageKey, []manifest.Extent]
	windows  *byteCache[windowKey, []manifest.Extent]
	frames   *byteCache[frameKey, []byte]
	indexes  *byteCache[segmentKey, *segmentIndex]
	payloads *byteCache[segmentKey, []byte]
	transfer *semaphore.Weighted
	rebuilds *semaphore.Weighted
	repairs  flights
	images   atomic.Uint64 // opened so far: the last one's number
}

// NewMemory returns a Memory with nothing in it.
func NewMemory() *Memory {
	return &Memory{
		pages:    newByteCache[pageKey](pagesMemoryBytes, extentsCost),
		windows:  newByteCache[windowKey](windowsMemoryBytes, extentsCost),
		frames:   newByteCache[frameKey](framesMemoryBytes, bytesCost),
		indexes:  newByteCache[segmentKey](indexMemoryBytes, (*segmentIndex).cost),
		payloads: newByteCache[segmentKey](rebuiltMemoryBytes, bytesCost),
		transfer: semaphore.NewWeighted(transferBytes),
		rebuilds: semaphore.NewWeighted(rebuildBytes),
	}
}

// segmentKey names a segment as a page describes it: what two pages say differently
// of one id are two segments.
type segmentKey struct {
	repo block.ID
	row  format.SegmentRow
}

// frameKey names a frame.
type frameKey struct {
	segment segmentKey
	ordinal int
}

// pageKey names a page by its row, in which its home is filled in.
type pageKey struct {
	repo block.ID
	row  format.PageRow
}

// windowKey names a window of an image by the image's number and the window's.
type windowKey struct {
	image  uint64
	window int64
}

func bytesCost(p []byte) int64 { return int64(cap(p)) + 256 }

func extentsCost(x []manifest.Extent) int64 { return int64(cap(x))*160 + 256 }

func (im *Image) segmentKey(row format.SegmentRow) segmentKey {
	return segmentKey{im.history.cfg.Repo.ID, row}
}

func (im *Image) frameKey(row format.SegmentRow, ordinal int) frameKey {
	return frameKey{im.segmentKey(row), ordinal}
}

// pageKey is the key of a page of a layer: the same in each manifest that refers to
// the page.
func (im *Image) pageKey(r pageRef) pageKey {
	row := r.row
	if row.Home.IsZero() {
		row.Home, row.HomeName, row.HomeKeySet = r.layer.m.Header.ID, r.layer.name, r.layer.m.Header.KeySet
	}
	return pageKey{im.history.cfg.Repo.ID, row}
}
