// Package vbuf is the stage between capture and segmenter: the virtual local
// buffer. It pools directories, ideally on different disks, into one store for
// the journal of every group and for sealed batches that are not everywhere
// yet.
//
// In come writes in the order of their Seq (Journal.Enqueue) and sealed batches
// (Spool.Add, Spool.Persist). Out go durable writes in the same order
// (Journal.Read) and shards (Spool.ReadShard). What is no longer needed is given
// back by Journal.Release and Spool.Drop.
//
// After the death of the process all records are there for which WaitWritten
// returned; after a power cut all for which Flush returned; what is there is
// always a prefix without holes. With two disks or more each record is on two
// of them and the loss of any one changes nothing. A persisted batch is there
// whole or not at all.
//
// Disks come and go while it works: set.go has the order of the steps, mend.go and
// rebuild.go bring what a disk held to the others, patience.go gives up on one that
// hangs. What cannot be brought back is a Loss; a buffer of which all disks are gone
// is ErrLost, and Renew begins anew.
//
// It never overwrites or cuts off bytes that were durable, never syncs a file
// again whose sync has failed, never returns bytes whose checksum is wrong, and
// never takes the loss of something durable for the end of the journal: that is
// a *DamageError.
//
// The bytes on disk are in docs/FORMAT-BUFFER.md.
package vbuf
