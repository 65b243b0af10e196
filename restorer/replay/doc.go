// Package replay is the standby: it keeps raw copies of volumes in a folder up to
// date by following the history on the stores.
//
// What comes in: histories (restorer.Follower) and what changed between two points
// (restorer.Changes). What goes out: for each volume a raw file with exactly the
// content that the volume had at one checkpoint, and read-only devices over it.
//
// # Promises
//
//   - A copy that is whole is at a checkpoint, and after a crash at any moment the
//     next start brings it to one before it does anything else. Volumes of one group
//     move together: where the same entry is a checkpoint of several, their copies are
//     never seen at different ones.
//   - Only entries that are decided are applied, so a copy never has to go back.
//   - Of several writes to one place between two steps only the newest is fetched, and
//     each changed byte once.
//   - Nothing is overwritten that the standby has not made, unless it was said that it
//     may be (Options.Adopt). A copy that another program has changed is noticed by its
//     times, compared with the history in full, and mended.
//   - Who reads a copy sees one point for as long as the device is open.
//
// # A step
//
// A step takes the copies of a group from where they are, P, to a later point Q. What
// is on the disk changes in this order:
//
//  1. All that changed is fetched, verified and written to the group's redo file,
//     which ends with a trailer, and is synced. Until the trailer is durable nothing
//     else has changed: the copies are at P.
//  2. It is written to the copies, and these are synced. A crash in between leaves
//     copies that are neither; the redo file is whole, and the next start writes all
//     of it again.
//  3. The group's state file, which says where the copies are, is replaced: they are
//     at Q. A redo file that leads to where the copies are already is of no use.
//
// A step that would be larger than Options.StepBytes ends at an earlier checkpoint; it
// is never less than one entry, so the disk needs room for the changes of one.
//
// # How a copy begins
//
// From nothing: the file has the ending FillingSuffix until it is whole. It is filled
// in order of address, and how far it is, is saved now and then, so that a restart
// goes on there. From a raw file of whatever content: the same in place, but what the
// file holds is compared first (with the keyed ids of chunks, so equal content is not
// fetched), and holes are punched where the volume has zeroes.
//
// # Files
//
// drc-standby.json says whose folder it is, drc-standby.lock is locked while a process
// has it. drc-group-<id>.json is the state of a group's copies, drc-group-<id>.redo its
// redo file. VOLUME.raw is a copy. All in the folder; the copies are sparse.
//
// # Views
//
// A view is what a client gets that opens the export VOLUME: the copy as it was at the
// point at which it was then. Before a step changes the copy it marks, in each view,
// what it will change; a view reads what is marked from the stores, at its own point,
// and the rest from the file. A read holds a lock against marking, so it never sees
// half of both.
package replay
