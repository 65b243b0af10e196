// Package blocktest holds what tests of block devices share: Memory, a device
// in memory with injectable faults, and Run, the conformance suite that every
// block.Device passes.
package blocktest
