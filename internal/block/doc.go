// Package block is the vocabulary of DRC: positions in a history, byte
// extents, volumes as devices, and the newest-wins extent map. It does no I/O
// and knows no stage; every other package may import it.
package block
