package main

import (
	"errors"
	"slices"
	"strings"
	"syscall"

	"drc/internal/control"
	"drc/internal/crypt"
	"drc/internal/diskcache"
	"drc/internal/format"
	"drc/internal/object"
	"drc/internal/overlay"
	"drc/internal/pipeline"
	"drc/internal/state"
	"drc/restorer"
	"drc/restorer/replay"
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

// goisms are words of the language and the libraries, and what people say.
var goisms = strings.NewReplacer(
	"context deadline exceeded", "no answer in time",
	"context canceled", "interrupted",
	": dial tcp ", ": ",
	"dial tcp ", "",
	": connect: connection refused", ": connection refused",
	": i/o timeout", ": no answer in time",
	": unexpected EOF", ": it ends too early",
)

// plain is an error as one line for people.
func plain(err error) string {
	var parts []string
	for line := range strings.SplitSeq(err.Error(), "\n") {
		line = strings.TrimPrefix(strings.TrimSpace(line), "drc: ")
		if line != "" && !slices.Contains(parts, line) {
			parts = append(parts, line)
		}
	}
	return goisms.Replace(strings.Join(parts, "; ")) + hint(err)
}

// hint is the next step for what the system refused, where the error comes from
// so far below that it cannot say one.
func hint(err error) string {
	text := err.Error()
	said := func(words ...string) bool {
		return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(text, w) })
	}
	switch {
	case errors.Is(err, syscall.EROFS):
		return ": the file system there is mounted read-only: choose another place, or mount it writable"
	case (errors.Is(err, syscall.EACCES) || errors.Is(err, syscall.EPERM)) && !said("pass --state"):
		return ": run drc as a user who may do that, or change owner and mode"
	case (errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)) && !said("again", "pass --state"):
		return ": make room there, or choose another place"
	case errors.Is(err, syscall.ENAMETOOLONG):
		return ": choose a shorter name"
	case errors.Is(err, syscall.ENOTDIR) && !said("pass --state"):
		return ": a part of that path is a file: correct it"
	}
	return ""
}

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
	case errors.Is(err, restorer.ErrNoSuchVolume), errors.Is(err, restorer.ErrNoSuchPoint), errors.Is(err, object.ErrNotFound):
		return exitNotFound
	case errors.As(err, &locked), errors.Is(err, uploader.ErrFenced), errors.Is(err, state.ErrInUse), errors.Is(err, overlay.ErrInUse), errors.As(err, new(*replay.InUseError)),
		errors.As(err, new(*diskcache.InUseError)), errors.As(err, new(*pipeline.LeftBehindError)),
		errors.As(err, new(*pipeline.HandedOverError)), errors.As(err, new(*pipeline.PromotedElsewhereError)):
		return exitLocked
	case errors.As(err, &corrupt), errors.As(err, &damage), errors.Is(err, crypt.ErrForged):
		return exitDamaged
	}
	return exitFailed
}
