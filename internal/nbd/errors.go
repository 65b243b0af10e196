package nbd

import (
	"errors"
	"fmt"

	"drc/internal/block"
)

// ErrUnknownExport is what Exports.Open returns (wrapped or not) when there is
// no export of that name. The client is told so and may choose another.
var ErrUnknownExport = errors.New("there is no export of that name")

// ErrInUse means: another server answers on the address given to Listen. Stop it, or
// listen elsewhere.
var ErrInUse = errors.New("another server answers on this address")

// ErrClosed is returned by a Client's methods after Close or after its
// connection was lost. Requests in flight at that moment may or may not have
// been carried out. Dial again.
var ErrClosed = errors.New("the NBD connection is closed")

// violation is a breach of the protocol after which the stream cannot be
// trusted: the connection is closed without another word to the client.
type violation struct{ text string }

func (v *violation) Error() string { return v.text }

func violationf(format string, args ...any) error {
	return &violation{text: fmt.Sprintf(format, args...)}
}

// wireError translates a device's error for a command of the client.
func wireError(cmd uint16, err error) uint32 {
	switch {
	case err == nil:
		return 0
	case errors.Is(err, block.ErrNoSpace):
		return wireENOSPC
	case errors.Is(err, block.ErrReadOnly):
		return wireEPERM
	case errors.Is(err, block.ErrOutOfRange):
		if modifies(cmd) {
			return wireENOSPC
		}
		return wireEINVAL
	case errors.Is(err, block.ErrMisaligned), errors.Is(err, errInvalid):
		return wireEINVAL
	case errors.Is(err, block.ErrStopping):
		return wireESHUTDOWN
	case errors.Is(err, block.ErrUnsupported):
		return wireENOTSUP
	}
	return wireEIO
}

// errInvalid marks requests that break a rule of the protocol but leave the
// stream in step; they are answered with EINVAL.
var errInvalid = errors.New("invalid request")

// deviceError is the reverse of wireError, for the Client. message is the
// server's, and may be empty.
func deviceError(cmd uint16, code uint32, message string) error {
	var err error
	switch code {
	case wireEPERM:
		err = block.ErrReadOnly
	case wireENOSPC:
		err = block.ErrNoSpace
	case wireESHUTDOWN:
		err = block.ErrStopping
	case wireENOTSUP:
		err = block.ErrUnsupported
	case wireEINVAL:
		err = errInvalid
	default:
		err = fmt.Errorf("NBD error %d", code)
	}
	if message != "" {
		return fmt.Errorf("nbd %s: %w (the server says: %s)", commandName(cmd), err, message)
	}
	return fmt.Errorf("nbd %s: %w", commandName(cmd), err)
}
