// Package segment makes and opens segments: the immutable batches of sealed
// frames that hold the content of volumes. The bytes are those of the section
// "Segments" in docs/FORMAT.md.
//
// Writing: a Writer takes chunks, gathers them into frames, compresses and
// seals each frame, and ends with the sealed index. Shards cuts the result
// into the shard objects that go to the buffer and the stores, the same bytes
// for both.
//
// Reading: OpenIndex, then OpenFrame for what is wanted. Both authenticate;
// what they return is what was written, or they return an error. Which shard
// lies, when something does not fit, VerifyShard tells without any content
// key.
package segment
