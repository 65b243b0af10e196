package uploader

import "drc/internal/format"

// Entries is what a host remembers of decided entries, so that what is read
// back from a log can be told from what a fenced writer left there. Nothing
// need be durable: what is not known is not merged.
type Entries interface {
	// Note keeps that entry n is decided with the value of that hash, and
	// whether it carries a named checkpoint.
	Note(n uint64, hash format.Hash, named bool) error
	// Entry returns what Note was told of entry n; ok is false if that is not
	// known any more.
	Entry(n uint64) (hash format.Hash, named, ok bool)
}
