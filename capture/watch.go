package capture

import (
	"context"
	"fmt"
	"time"

	"drc/internal/block"
)

// What others do to a backing that is in use.
//
// The lock keeps out who asks for it, and nobody else. So the file is looked at
// before anything is applied to it, before each sync, when a read fails, and every
// lookEvery while nobody writes:
//
//   - cut short: nothing more is applied, as a write behind the new end would make
//     the file look whole again. What clients wrote stays in the journal. That does
//     not pass: what was cut off is lost, also if the length is right again.
//   - its time of modification is not the one that it was left with (see rest): it
//     was written to. Writes are applied as ever, so that it lacks nothing.
//   - longer, moved, replaced or removed: writes go on to what was opened.
//
// The first two are noted in the record, durably, so that the next start compares
// the volume with its history whatever the times say by then. A change between two
// writes of a busy volume goes unnoticed; so does one by somebody who sets the time
// of modification back; and of a device nothing is known.

// lookEvery is how often the backing of an idle volume is looked at.
const lookEvery = 5 * time.Second

// ChangedError says what somebody else has done to a backing in use, and what to do
// about it.
type ChangedError struct {
	Path  string
	What  string
	Hint  string
	IsCut bool // nothing is applied to it any more
	lasts bool // it is noted in the record
}

func (e *ChangedError) Error() string { return fmt.Sprintf("%s %s: %s", e.Path, e.What, e.Hint) }

// Changed is what somebody else has done to the backing, nil if nothing is known.
func (v *Volume) Changed() *ChangedError {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.changed
}

// look looks at the backing. It fails if nothing may be applied to it.
func (v *Volume) look() error {
	b := v.o.Backing
	if b.device {
		return nil
	}
	found := b.foundChanged(v.o.Name)
	v.mu.Lock()
	was := v.changed
	if was != nil && was.lasts && (found == nil || !found.IsCut) {
		found = was // the worst that is known
	}
	v.changed = found
	v.mu.Unlock()
	if found != nil && (was == nil || was.What != found.What) {
		v.o.Logger.Error("somebody else has changed the volume's backing", "volume", v.o.Name, "path", b.path, "what", found.What, "hint", found.Hint)
	}
	if found != nil && found.IsCut {
		v.setFailed(found)
		return found
	}
	return nil
}

// noteChanged has the record say that the backing must be compared, if that is so.
func (v *Volume) noteChanged(ctx context.Context) {
	v.mu.Lock()
	due := v.changed != nil && v.changed.lasts && !v.noted
	v.mu.Unlock()
	if !due {
		return
	}
	if v.settling.take(ctx) != nil {
		return // it is tried again at the next look, or found at the next start
	}
	err := v.record(v.Applied(), false)
	v.settling.give()
	if err != nil {
		v.o.Logger.Warn("note that the backing was changed; trying again", "volume", v.o.Name, "error", err)
		return
	}
	v.mu.Lock()
	v.noted = true
	v.mu.Unlock()
}

// foundChanged tells what was done to the backing of a volume.
func (b *Backing) foundChanged(volume string) *ChangedError {
	st, err := b.disk.Stat()
	if err != nil {
		return nil // whatever that is, reads and writes will tell
	}
	size := fmt.Sprintf("it has %d bytes, and the volume %d", st.SizeBytes, b.size)
	switch {
	case st.Sized && st.SizeBytes < b.size:
		return &ChangedError{Path: b.path, What: "was cut short by another program while in use", IsCut: true, lasts: true,
			Hint: size + ". What clients wrote is in the history and in the buffer, and nothing is written to the file any more. Stop the agent, and restore the volume: drc restore " + volume + " TARGET --with-buffer DIR"}
	case b.isForeign(st):
		return &ChangedError{Path: b.path, What: "was written to by another program while in use", lasts: true,
			Hint: "checkpoints have what clients wrote, and not that. Stop the other program and restart the agent: a gap begins, and the volume is compared with its history"}
	case st.Gone:
		return &ChangedError{Path: b.path, What: "was removed while in use",
			Hint: "writes go on and are protected, and the file is lost when the agent ends. Stop whoever writes, wait until drc status shows that all is committed, stop the agent, and restore the volume: drc restore " + volume + " " + b.path}
	case st.Elsewhere:
		return &ChangedError{Path: b.path, What: "was moved or replaced while in use",
			Hint: "writes go on, to the file that was opened, and are protected. Move that one back, or name its new path at the next start"}
	case st.Sized && st.SizeBytes > b.size:
		return &ChangedError{Path: b.path, What: "was extended by another program while in use",
			Hint: size + fmt.Sprintf(". Writes go on and are protected, and the next start would refuse the file: cut it back: truncate -s %d %s", b.size, b.path)}
	}
	return nil
}

// rest notes how a backing is left whose content is synced, until touch. The caller
// sees to it that nobody changes it meanwhile.
func (b *Backing) rest() {
	st, err := b.disk.Stat()
	if err != nil || b.device {
		return
	}
	b.resting.Lock()
	defer b.resting.Unlock()
	if b.left == nil && !b.written {
		b.left = &st.MTime
	}
}

// touch comes before each change of the backing. Somebody else's before that is
// told from it.
func (b *Backing) touch() error {
	b.resting.Lock()
	if b.left != nil {
		if st, err := b.disk.Stat(); err == nil && st.MTime != *b.left {
			b.written = true
		}
		b.left = nil
	}
	b.resting.Unlock()
	return b.life.extend()
}

// isForeign reports whether somebody else has written to the backing.
func (b *Backing) isForeign(st DiskStat) bool {
	b.resting.Lock()
	defer b.resting.Unlock()
	if b.left != nil && st.MTime != *b.left {
		b.left, b.written = nil, true
	}
	return b.written
}

// restNow lets the backing rest if nothing waits for it and all is synced.
func (v *Volume) restNow() {
	v.applying.Lock()
	defer v.applying.Unlock()
	v.space.Lock()
	defer v.space.Unlock()
	v.mu.Lock()
	dirty := v.dirty
	v.mu.Unlock()
	if !dirty && v.overlay.pieces() == 0 && !v.group.Diverted() {
		v.o.Backing.rest()
	}
}

// waitIdle waits for a write behind seen, and looks at the backing now and then.
func (v *Volume) waitIdle(ctx context.Context, seen block.Seq) error {
	v.restNow()
	for {
		wait, cancel := context.WithTimeout(ctx, lookEvery)
		err := v.group.WaitCaptured(wait, seen)
		cancel()
		if err == nil || ctx.Err() != nil {
			return ctx.Err()
		}
		_ = v.look() // what it finds is told, and there is nothing to apply
		v.noteChanged(ctx)
	}
}
