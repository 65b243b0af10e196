// Package uploader is the fourth stage: it takes sealed batches and makes them
// part of the group's history on the stores, in the only safe order.
//
// For each batch: shards (and the manifest, if it is too large to travel
// inline) go to their stores, in parallel over batches; then, one batch after
// the other, the log entry goes to every store's log; when a majority has it,
// the entry is decided and the batch is logged. What an entry refers to is
// therefore always there before the entry is. Every put is create-only and is
// repeated for ever with identical bytes, so an answer that got lost, and a
// put that arrives late, change nothing.
//
// One writer. A Log takes office with an epoch: it appends a promise on a
// majority of the stores' logs and reads these up to it. Whatever an older
// writer appends behind the promise does not count, so once the majority has
// promised, the older writer can decide nothing any more. The value of the one
// entry that may be undecided is appended again as it is. The rules and why
// they are safe: docs/FORMAT.md, "The log", and package grouplog.
//
// After a crash: epochs are durable here before they are used. Shards without
// an entry are garbage on the stores and hurt nobody. An entry that had
// reached some stores is adopted or overwritten by the next start's epoch; the
// batch that follows may cover the same writes again, which changes nothing.
//
// Beside the commits, manifests of decided entries are merged, so that a reader
// opens few of them however long the history is; runs.go says which. Only what
// is known to be decided is merged: the host notes the hashes of decided
// values (Entries), because a log may also hold what a fenced writer left.
// Nothing depends on it, and when nothing is written nothing is merged.
//
// A store that fails is tried by one probe at a time, with growing pauses, over
// all that an agent does with it (package gate). What waits for stores that fail
// is made durable in the buffer, oldest first, so that the journal behind it can
// go; when they are back it goes out in that order. What heals logged entries
// holds up none of the new ones. While a store fails, entries are decided by the others if they are a majority, as
// degraded entries: at least k shards of each segment placed, the rest durable
// in the buffer until the store is back.
//
// Nothing is overwritten. Where other bytes lie under a shard's name, it can
// never be placed: its entry is degraded for good, and exposed. A manifest gets
// another name instead.
package uploader
