// Package manifest makes and opens manifests: what a range of log entries
// changed, as extents of volumes that map to chunks. The bytes are those of
// the section "Manifests" in docs/FORMAT.md.
//
// A manifest is a run of pages sorted by volume and address, each sealed and
// compressed by itself, and a directory of them. A page may live in an older
// manifest: the directory then names its home, and the page's bytes are never
// copied. Each page carries the rows of the segments that it refers to, so one
// page is enough to read its address range.
package manifest
