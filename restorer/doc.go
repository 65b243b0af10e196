// Package restorer is the fifth stage: from what lies on the stores, and the
// key, it makes a group's history, an image of a volume at any checkpoint, and
// a file or device with that image's content.
//
// What comes in: the logs, manifests and shards of a repository, on stores of
// which any may be missing, slow, damaged or hostile. What goes out: a History
// (what can be restored), an Image (a read-only random-access device at one
// point), and Restore, which writes an image to a target.
//
// What it promises:
//
//   - Every byte returned is authenticated and belongs to exactly the point
//     asked for. What cannot be had is an error, a *format.CorruptError if the
//     stores hold damaged bytes or none; it never is other data.
//   - Any k shards of each segment are enough, and one good copy of each log
//     and manifest object. Damage that was worked around is listed with the
//     object's name and its store.
//   - Memory is bounded, and not by the size of volume or history, but for some
//     hundred bytes a manifest page, a named checkpoint, a gap and an entry that is
//     in no digest: a restore has less than 96 MiB of buffers. All images that share
//     a Memory hold what one may hold, and what one has fetched is there for all.
//   - A store that hangs, or a request that does, holds a read up for seconds:
//     what is late is had from elsewhere, as far as parity and copies go. The
//     bytes of a lost shard are rebuilt from the same range of others.
//   - A target that is not finished never has the target's name, and a device
//     not its beginning; an interrupted restore goes on where it was, as far as
//     the target still holds what it was left with.
//
// How the history is read: each store's log is verified, for signatures, places
// and the chain of hashes, from its first object or from the place up to which
// the newest digest tells what it says; a log that fails has no say. The newest
// entry is the one that a takeover would adopt. From it the parents' hashes lead
// to all others, so a stale value that a fenced writer left in some store is never
// taken for the chosen one. A writer appends an entry only when the one before it
// is decided: therefore all but the newest entry are decided, and the newest is if
// a majority holds it; otherwise it is marked unconfirmed.
//
// It never writes to a store and knows no other stage.
//
// What it keeps on the local disk is believed as little as a store. There is the
// folder with log values (Config.CacheDir) and, for images that are read again, a
// Cache of what they are made of, sealed as in the stores: what comes out of it is
// opened like what a store returns, under the name, place and keys that were asked
// for, and what does not open is dropped and fetched. Damaged, full or missing it
// costs requests. Who reads everything once, Restore and Image.OnePass, puts no
// content there.
package restorer
