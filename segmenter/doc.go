// Package segmenter is the third stage: it reads durable, numbered writes from
// the buffer's journal and cuts them into batches of deduplicated chunks in
// sealed, erasure-coded segments, which uploader makes part of the history.
//
// What comes in: writes up to the journal's durable end, and, while a volume
// is being resynced, regions read from its backing. What goes out:
// batch.Batch values, in order of Seq, without a hole between them.
//
// A batch stands for the state of all volumes after its last write, To. Within
// it overwritten data is dropped, and extents are coalesced in address order:
// long runs are cut by content, short ones are a chunk each, zeroes are
// extents without a chunk. A chunk whose keyed id is in the group's dedup
// index is referred to; the index knows only chunks of segments that are
// logged, because a segment that is not might never be.
//
// Resync. A region is read while clients write. Its content goes into a batch
// that begins before the read began and ends after it ended, under the writes
// of that batch: whatever a concurrent write did to the region during the
// read, the same batch holds that write and lays it over the read content. So
// the state at To is exact for the region from then on. Only the last batch
// of a resync is a checkpoint of its volume.
//
// Nothing here survives a crash and nothing needs to: until a batch is logged
// or durable in the buffer, the journal keeps its writes, and after a restart
// they are cut anew.
package segmenter
