package block

import (
	"context"
	"errors"
)

// Errors that a Device returns and that its servers translate for clients.
// Anything else is an I/O error.
var (
	// ErrNoSpace: there is no room for this write. Nothing of it was taken.
	ErrNoSpace = errors.New("no space left for this write")
	// ErrReadOnly: the device takes no writes (a read-only export or a fenced writer).
	ErrReadOnly = errors.New("the volume is read-only")
	// ErrOutOfRange: the request reaches past the end of the device.
	ErrOutOfRange = errors.New("the request reaches past the end of the volume")
	// ErrMisaligned: offset or length is not a multiple of the sector size.
	ErrMisaligned = errors.New("offset or length is not a multiple of the sector size")
	// ErrStopping: the device is shutting down; the request was not carried out.
	ErrStopping = errors.New("the volume is being shut down")
	// ErrUnsupported: this device cannot do that cheaply (FAST_ZERO).
	ErrUnsupported = errors.New("not supported by this volume")
)

// Geometry is what a client learns about a device before it uses it.
type Geometry struct {
	SizeBytes  int64 // a multiple of SectorSize
	SectorSize int   // logical sector size: 512 or 4096; the least unit of I/O
	ReadOnly   bool
}

// WriteOptions qualify one write.
type WriteOptions struct {
	FUA bool // answer only when this write is durable
}

// ZeroOptions qualify one Zero.
type ZeroOptions struct {
	FUA    bool // answer only when durable
	NoHole bool // keep the space allocated; otherwise the range may become a hole
	Fast   bool // fail with ErrUnsupported rather than be as slow as a write
}

// Device is a volume of bytes that a protocol server (NBD, FUSE) exports.
//
// All methods may be called from many goroutines at once. Offsets and lengths
// are in bytes; a request that is not aligned to the sector size or that
// reaches past the end fails as a whole.
//
// Ordering: a request that begins after another one has returned sees and
// follows that other one. Requests in flight at the same time are ordered by
// the device; overlapping ones take effect one after the other, whole.
//
// Durability: a write that returned survives the death of the serving process;
// what returned before Flush was called, on whatever connection, survives power
// loss once Flush has returned nil.
type Device interface {
	// Geometry returns size and limits. The size does not change while served.
	Geometry() Geometry
	// ReadAt fills p from off, or fails; there are no short reads. It does not
	// keep p.
	ReadAt(ctx context.Context, p []byte, off int64) error
	// WriteAt writes all of p at off. It does not keep p after it returned.
	WriteAt(ctx context.Context, p []byte, off int64, o WriteOptions) error
	// Zero makes e read as zeroes. It serves TRIM as well as WRITE_ZEROES: DRC
	// gives trimmed ranges the meaning "zeroes". It must not allocate in
	// proportion to e.Len.
	Zero(ctx context.Context, e Extent, o ZeroOptions) error
	// Flush makes durable all that was answered before it was called.
	Flush(ctx context.Context) error
	// Allocation calls visit for consecutive pieces of e, in order and without
	// gaps, until e is covered or visit returns false. A hole reads as zeroes
	// and has no space allocated. Saying "not a hole" of a hole is allowed.
	Allocation(ctx context.Context, e Extent, visit func(piece Extent, hole bool) bool) error
}

// CheckRange returns ErrMisaligned or ErrOutOfRange if e is no valid request
// for a device of geometry g, else nil.
func (g Geometry) CheckRange(e Extent) error {
	if e.Off < 0 || e.Len < 0 || e.Len > g.SizeBytes || e.Off > g.SizeBytes-e.Len {
		return ErrOutOfRange
	}
	if s := int64(g.SectorSize); s > 0 && (e.Off%s != 0 || e.Len%s != 0) {
		return ErrMisaligned
	}
	return nil
}
