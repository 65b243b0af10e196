package main

import (
	"errors"

	"drc/internal/control"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/state"
	"drc/restorer"
	"drc/uploader"
	"drc/vbuf"
)

// The exit codes; scripts rely on them.
const (
	exitFailed   = 1
	exitUsage    = 2
	exitNotFound = 3
	exitDamaged  = 4
	exitLocked   = 5
)

// exitCode is the only map from errors to exit codes.
func exitCode(err error) int {
	var coded *control.CodedError
	var corrupt *format.CorruptError
	var locked *uploader.LockedError
	var damage *vbuf.DamageError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &coded):
		return coded.Code
	case isUsage(err):
		return exitUsage
	case errors.Is(err, restorer.ErrNoSuchVolume), errors.Is(err, restorer.ErrNoSuchPoint):
		return exitNotFound
	case errors.As(err, &locked), errors.Is(err, uploader.ErrFenced), errors.Is(err, state.ErrInUse):
		return exitLocked
	case errors.As(err, &corrupt), errors.As(err, &damage), errors.Is(err, crypt.ErrForged):
		return exitDamaged
	}
	return exitFailed
}
