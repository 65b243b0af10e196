// Package sim is the simulator: the real agent, all of its stages as
// internal/pipeline wires them, on simulated disks and stores, by a seed. It holds
// nothing but tests.
//
// A seed makes a world: buffer disks with small quotas, stores and an erasure
// profile, a group of small volumes, and what happens to them: writes, trims,
// flushes and named checkpoints of some clients; deaths of the process, power
// cuts, stops in order; disks that fail; stores that answer late, wrongly or not
// at all, that do what they say they did not do, and that do it much later.
//
// The world runs in a bubble of testing/synctest: its clock moves only when
// nobody has anything to do, so that a day of outage takes no time. All that is
// left to chance is drawn from the seed, not in the order in which things happen
// but by what they are (see dice): an answer of a store hangs on the store, the
// object and how often it was asked for. So one goroutine that comes a little
// earlier changes nothing else, and a seed can be run again.
//
// What is checked. The model is the list of writes in the order in which capture
// numbered them. After each start a volume must be the model after exactly its
// first s writes, for an s that no promise forbids: behind everything that was
// acknowledged if the process died, and behind everything that was flushed if the
// power went. Each checkpoint that the real restorer finds on the stores must be
// the model at its seq. Watermarks are ordered, and do not go back. When the faults
// stop, everything is committed within bounded time, also with as many stores lost
// as the profile allows; and after a stop in order the backing is the model.
//
// The planted bugs (planted_test.go) show that this finds something.
package sim
