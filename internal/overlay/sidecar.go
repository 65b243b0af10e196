package overlay

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"

	"drc/internal/format"
	"drc/internal/vfs"
)

// SidecarSuffix ends the name of the sidecar: FILE.drc-overlay.
const SidecarSuffix = ".drc-overlay"

// Peek tells which base an existing overlay is of, and whether it is complete and
// needs none, without taking it into use: another process may have it open. Where
// there is neither file nor sidecar the error is fs.ErrNotExist; see ErrNotOverlay
// and ErrNoFile for the others.
func Peek(fsys vfs.FS, file string) (_ Identity, complete bool, err error) {
	side, err := fsys.Open(file + SidecarSuffix)
	if errors.Is(err, fs.ErrNotExist) {
		return Identity{}, false, noSidecar(fsys, file)
	}
	if err != nil {
		return Identity{}, false, err
	}
	defer side.Close()
	h, s, err := readSidecar(file+SidecarSuffix, side)
	if err != nil {
		return Identity{}, false, err
	}
	if _, err := fsys.Stat(file); errors.Is(err, fs.ErrNotExist) && s.Phase != format.OverlayMaking {
		return Identity{}, false, noFile(file)
	} else if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return Identity{}, false, err
	}
	return identityOf(h), s.Phase == format.OverlayComplete, nil
}

// noSidecar says what it means that there is no sidecar.
func noSidecar(fsys vfs.FS, file string) error {
	_, err := fsys.Stat(file)
	if err == nil {
		return fmt.Errorf("%s exists, and %w, since there is no %s: choose another file, or move this one away; nothing of it was touched",
			file, ErrNotOverlay, file+SidecarSuffix)
	}
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("there is no overlay at %s yet: %w", file, fs.ErrNotExist)
	}
	return err
}

func noFile(file string) error {
	return fmt.Errorf("%s: %w, and %s beside it says that there was one: bring it back, or remove %s to begin anew without what was written",
		file, ErrNoFile, file+SidecarSuffix, file+SidecarSuffix)
}

// readSidecar reads and checks what a sidecar begins with, and its size.
func readSidecar(name string, f vfs.File) (*format.OverlayHeader, *format.OverlayState, error) {
	raw := make([]byte, format.OverlayHeaderBytes+format.OverlaySectorBytes)
	if n, err := f.ReadAt(raw, 0); errors.Is(err, io.EOF) {
		return nil, nil, format.Corrupt(name, "it ends after %d bytes", n)
	} else if err != nil {
		return nil, nil, local("read", name, err)
	}
	h, err := format.DecodeOverlayHeader(name, raw[:format.OverlayHeaderBytes])
	if err != nil {
		return nil, nil, err
	}
	s, err := format.DecodeOverlayState(name, raw[format.OverlayHeaderBytes:])
	if err != nil {
		return nil, nil, err
	}
	size, err := f.Size()
	if err != nil {
		return nil, nil, err
	}
	if want := format.LayOutOverlay(h.SizeBytes).SizeBytes(); size != want {
		return nil, nil, format.Corrupt(name, "it has %d bytes, not %d", size, want)
	}
	return h, s, nil
}

// tryLock locks a file of an overlay.
func tryLock(name string, f vfs.SparseFile) error {
	err := f.TryLock()
	if errors.Is(err, vfs.ErrLocked) {
		return fmt.Errorf("%s is %w: stop serving it there first, or choose another file", name, ErrInUse)
	}
	return err
}

// sparse is f as what an overlay needs.
func sparse(name string, f vfs.File, err error) (vfs.SparseFile, error) {
	if err != nil {
		return nil, err
	}
	s, ok := f.(vfs.SparseFile)
	if !ok {
		_ = f.Close()
		return nil, fmt.Errorf("%s: %w: choose a file on another one", name, vfs.ErrNoHoles)
	}
	return s, nil
}

// makeSidecar makes the sidecar of an overlay that does not exist, and returns it
// locked. It gets its name when it is whole and durable. The lock is taken before
// that, so that of two processes one makes it.
func makeSidecar(fsys vfs.FS, file string, id Identity) (_ vfs.SparseFile, err error) {
	name := file + SidecarSuffix
	temp := name + vfs.TempSuffix
	made, err := fsys.Create(temp)
	if errors.Is(err, fs.ErrExist) {
		made, err = fsys.Open(temp) // of a process that died here, or of one at work
	}
	f, err := sparse(temp, made, err)
	if err != nil {
		return nil, local("make", temp, err)
	}
	if err := tryLock(name, f); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	// Who had the lock before may have been quicker, to the end.
	if linked, lerr := f.Linked(); lerr != nil || !linked {
		return nil, errors.Join(fmt.Errorf("%s was made or removed by another process just now: try again", name), lerr, f.Close())
	}
	if _, serr := fsys.Stat(name); !errors.Is(serr, fs.ErrNotExist) {
		return nil, errors.Join(fmt.Errorf("%s was made by another process just now: try again", name), serr, f.Close())
	}
	defer func() {
		if err != nil {
			_ = fsys.Remove(temp) // best effort: the next one takes it over
			err = errors.Join(err, f.Close())
		}
	}()
	overlay := newActivation()
	header := id.header(overlay)
	layout := format.LayOutOverlay(id.SizeBytes)
	state := format.OverlayState{Phase: format.OverlayMaking, Activation: newActivation()}
	if err := f.Truncate(0); err != nil { // of what an earlier one left
		return nil, local("make", temp, err)
	}
	if err := f.Truncate(layout.SizeBytes()); err != nil {
		return nil, local("make", temp, err)
	}
	head := append(header.Encode(), state.Encode()...)
	if _, err := f.WriteAt(head, 0); err != nil {
		return nil, local("write", temp, err)
	}
	var empty format.OverlayDirectory
	raw := make([]byte, format.OverlaySectorBytes)
	for n := range layout.DirectoryPages {
		empty.Put(raw, overlay, uint64(n))
		if _, err := f.WriteAt(raw, layout.DirectoryOffset(n)); err != nil {
			return nil, local("write", temp, err)
		}
	}
	if err := f.Sync(); err != nil {
		return nil, local("sync", temp, err)
	}
	if err := fsys.Rename(temp, name); err != nil {
		return nil, err
	}
	if err := fsys.SyncDir(path.Dir(name)); err != nil {
		return nil, errors.Join(fmt.Errorf("sync the folder of %s: %w", name, err), fsys.Remove(name))
	}
	return f, nil
}

// scan reads all pages: it checks them, counts what is written, and makes durable
// what is written, since FILE was synced before. It learns which pages there are.
func (d *Device) scan(ctx context.Context) error {
	l := d.bits.layout
	const chunkBytes = 128 * format.OverlaySectorBytes
	buf := make([]byte, chunkBytes)
	for n := int64(0); n < l.Pages; {
		if err := ctx.Err(); err != nil {
			return err
		}
		dataAt, err := d.side.NextData(l.PageOffset(n))
		if err != nil {
			return local("find data in", d.sideName, err)
		}
		if n = max(n, (dataAt-l.PageOffset(0))/format.OverlaySectorBytes); n >= l.Pages {
			break
		}
		part := buf[:min(chunkBytes, (l.Pages-n)*format.OverlaySectorBytes)]
		if _, err := d.side.ReadAt(part, l.PageOffset(n)); err != nil {
			return local("read", d.sideName, err)
		}
		for ; len(part) > 0; part = part[format.OverlaySectorBytes:] {
			if err := d.scanPage(n, part[:format.OverlaySectorBytes]); err != nil {
				return err
			}
			n++
		}
	}
	return nil
}

func (d *Device) scanPage(n int64, raw []byte) error {
	p, made, err := d.bits.parse(n, raw)
	if err != nil || !made {
		return err
	}
	d.bits.setMade(n)
	d.written += p.written.count()
	if p.written == p.durable {
		return nil
	}
	return d.bits.promote(n, &p.written)
}

// readDirectory reads the directory and checks that all pages are there that it
// has.
func (d *Device) readDirectory() error {
	l := d.bits.layout
	raw := make([]byte, format.OverlaySectorBytes)
	d.listed = make([]uint64, l.DirectoryPages*format.OverlayDirectoryWords)
	for n := range l.DirectoryPages {
		if _, err := d.side.ReadAt(raw, l.DirectoryOffset(n)); err != nil {
			return local("read", d.sideName, err)
		}
		p, err := format.ParseOverlayDirectory(d.sideName, raw, d.bits.overlay, uint64(n))
		if err != nil {
			return err
		}
		for i, w := range p.Made {
			at := n*format.OverlayDirectoryWords + int64(i)
			made := uint64(0)
			if at < int64(len(d.bits.made)) {
				made = d.bits.made[at].Load()
			}
			if w&^made != 0 {
				return format.Corrupt(d.sideName, "pages %d to %d: one that was written is gone", 64*at, 64*at+63)
			}
			d.listed[at] = w
		}
	}
	return nil
}
