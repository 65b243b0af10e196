// Package pipeline puts the stages together: it opens an agent's groups and
// volumes, decides what a start has to do (replay, resync, take over), wires
// capture to vbuf to segmenter to uploader, and owns their lifetimes.
//
// The order of a start: lock the state folder; open the repository; for each
// group make and keep a new key set, recover the journal, look at each backing
// and its record, replay or plan a resync; then serve. Office is taken on the
// stores before the exports open where the stores can be reached, so that a
// second agent is refused before it has taken a write.
//
// The order of a stop: the exports finish what is in flight and close; the
// journal is flushed; the backings are settled and marked clean; only then the
// rest ends. What is not on the stores yet is in the journal and goes out
// after the next start.
//
// A stretch of the journal is released when every volume's backing has it,
// durably, and it is either logged or persisted as a sealed batch.
package pipeline
