// Package object is DRC's view of a store: one S3 bucket and prefix, or one
// directory. It holds immutable objects under names; nothing is ever rewritten.
//
// The package declares the Store interface and what DRC requires of every
// implementation; s3/, dir/, mem/ and fault/ implement it, objecttest/ holds
// the one conformance suite that all of them pass, and stores/ opens a Store
// from its URL.
package object

import (
	"context"
	"errors"
	"iter"
	"time"
)

// Errors by which callers decide. Every other error from a Store is temporary:
// the same call may succeed later.
var (
	// ErrNotFound: there is no object of that name.
	ErrNotFound = errors.New("object not found")
	// ErrExists: an object of that name with other bytes is there already.
	// Nothing was written.
	ErrExists = errors.New("an object of that name with other content exists")
	// ErrDenied: the store refused the credentials or the permission.
	ErrDenied = errors.New("access denied by the store")
	// ErrNoBucket: the bucket or directory itself does not exist.
	ErrNoBucket = errors.New("bucket or directory does not exist")
	// ErrUnsupported: the store lacks what DRC needs (conditional put).
	ErrUnsupported = errors.New("the store lacks a feature that DRC needs")
	// ErrTooLarge: the object is larger than the caller's limit.
	ErrTooLarge = errors.New("object is larger than expected")
)

// Info describes one object.
type Info struct {
	Name string // as given to Put, without the store's prefix
	Size int64  // bytes
}

// Answer is what a store said besides the content.
type Answer struct {
	// Date is the store's own clock when it answered (the HTTP Date header; for
	// a directory this host's clock), or zero if it sent none.
	Date time.Time
}

// Store keeps objects. Implementations are safe for concurrent use. Names are
// slash-separated, made of [a-z0-9._/-], without empty, "." or ".." elements.
//
// Required of every store: read after write, list after write, and an honest
// create-only Put: of any number of concurrent Puts of one name with different
// bytes exactly one succeeds, for ever.
type Store interface {
	// URL identifies the store in messages; it holds no secret.
	URL() string

	// Put creates the object with exactly these bytes, durably, or fails. It
	// never changes an existing object: if one is there with the same bytes,
	// Put succeeds (a retried Put meets its own earlier success); with other
	// bytes it returns ErrExists. After any other error the object may or may
	// not be there, now or later; calling again with the same bytes is safe.
	// Put does not keep body after it returned.
	Put(ctx context.Context, name string, body []byte) (Answer, error)

	// Get appends the whole object to dst and returns it. An object of more
	// than limit bytes is ErrTooLarge.
	Get(ctx context.Context, name string, limit int64, dst []byte) ([]byte, Answer, error)

	// GetRange appends exactly the n bytes from off to dst and returns it. A
	// range that reaches past the end of the object is an error: ErrNotFound
	// if the object is absent, otherwise one that wraps io.ErrUnexpectedEOF.
	GetRange(ctx context.Context, name string, off, n int64, dst []byte) ([]byte, error)

	// Stat returns the object's size, or ErrNotFound.
	Stat(ctx context.Context, name string) (Info, error)

	// List yields the objects whose names begin with prefix and sort after
	// after (bytewise), in ascending order of names. It stops at the first
	// error, which it yields.
	List(ctx context.Context, prefix, after string) iter.Seq2[Info, error]

	// ListDirs yields the distinct next elements below prefix, which ends in
	// "/" or is empty, in ascending order: for names "groups/a/x", "groups/b"
	// and prefix "groups/", it yields "a" only (elements that are folders).
	ListDirs(ctx context.Context, prefix string) iter.Seq2[string, error]

	// Delete removes the object; removing an absent one succeeds.
	Delete(ctx context.Context, name string) error

	// Close releases connections. It is idempotent.
	Close() error
}
