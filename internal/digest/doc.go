// Package digest makes and reads digests: objects that say what a group's log
// says, so that a reader need not read the log from its beginning. It knows no
// stores: what it writes is handed on, what it reads is asked for.
//
// A digest of entry n says what entries 1 to n say, all of which are decided: for
// each its hash, its author's epoch, where the logs hold it and its items (without
// what only matters to who reads the entry itself). And for each store's log it
// says how far it went at that time and what a reader who had read so far would
// know. A reader who finds the log as the digest says goes on from there. With
// digests a history is opened with a number of requests that does not depend on its
// length.
//
// Three lists make a digest: all entries; those of them with marks, which is what
// an image or a choice of points needs to know at once (volumes, names, gaps); and
// key sets. A list only grows. Each 256 rows are a page, which is written once, into
// the digest that is made next; later digests refer to it. Each 256 references to
// pages are a page of references, and so on. So a digest of any number of entries is
// some ten kilobytes, and what it says of any one of them is a few requests away.
//
// Trust: a digest is signed by an agent key, as values and manifests are, and
// everything in it is a fact that does not change any more. Who forges or withholds
// digests, without an agent's key, makes readers slower and nothing else: nobody
// needs them. What an agent's key can do wrong by them it can do with the log as
// well; but a digest that does not fit the logs is not used.
package digest
