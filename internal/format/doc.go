// Package format encodes and decodes every structure that DRC stores, on the
// stores, in the buffer and beside overlays. The reference for the bytes is docs/FORMAT*.md; the
// code here follows it, with a golden vector and a fuzz test for each
// structure. The package does no I/O and decides nothing.
//
// Each structure has a type, an Append or Encode function that returns bytes,
// and a Decode function that takes bytes from anywhere, hostile ones included:
// it checks magic, version and every length before use, allocates no more than
// a small multiple of its input, and answers with a *CorruptError that names
// the structure and the place.
package format
