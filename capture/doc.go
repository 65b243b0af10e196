// Package capture is the first stage: writes enter here. It puts the writes of
// a group's volumes in one order, numbers them, hands them to the journal,
// and keeps each volume's backing behind it.
//
// What comes in: the requests of a protocol server, through block.Device. What
// goes out: numbered block.Write values, to the Journal.
//
// Promises. A write is acknowledged when its record is in the journal's files
// (ack=journal: it survives the death of this process, and its client lives on
// to send a flush), or when it is durable (ack=durable, for clients that
// survive this host's power cut). Flush and FUA return when the journal is
// durable up to them, for all volumes of the group. Reads see every
// acknowledged write at once, from the overlay until the backing has it.
//
// The backing is written only up to the journal's durable end. Otherwise a
// power cut could leave on it what the history never saw. Of each block only
// the newest version is applied; a version that was overwritten is skipped,
// and the record of what is applied (see Record) advances only when the
// version that took its place is durable too: after a crash the journal holds
// everything that the backing may lack.
//
// After a crash the journal is replayed onto the backing from the recorded
// position. That needs to know that nobody else wrote to the backing
// meanwhile: Inspect compares what the record says with what is there.
//
// Capture never drops a write, and never reports one as done that the journal
// does not have.
package capture
