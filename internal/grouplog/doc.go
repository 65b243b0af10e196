// Package grouplog is the commit log of a group: what its objects mean, how
// they are signed and opened, and when an entry is decided. It does no I/O and
// has no clock; uploader writes logs with it, restorer reads them.
//
// There is one log in each store. Its objects are promises (an epoch takes
// office) and commits (an epoch appends value n). The rules are those of the
// section "The log" of docs/FORMAT.md; in the terms of the Paxos literature a
// store's log is an acceptor whose state can be read by everybody, an epoch is
// a ballot, and the entries n are its instances, filled one after the other.
package grouplog
