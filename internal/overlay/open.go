package overlay

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// Config says what to open.
type Config struct {
	// FS is where FILE is; nil is the real file system.
	FS vfs.FS
	// File is FILE. If neither it nor its sidecar exists, both are made.
	File string
	// Identity is that of Base. Without a base it may be zero: then any will do.
	Identity Identity
	// Base is what the overlay lies over; the caller closes it, if need be, after
	// the device. Nil is enough for an overlay that is complete.
	Base block.Device
	// Boot names the present boot of the machine; nothing: the kernel is asked.
	Boot string
}

// Open opens an overlay, or makes it. It goes on with all that was written. Only
// one process can have it open.
//
// The errors: *OtherBaseError, ErrNotOverlay, ErrNoFile, ErrInUse, ErrNeedsBase,
// *format.CorruptError if the sidecar is damaged, *SyncError, block.ErrNoSpace.
func Open(ctx context.Context, c Config) (_ *Device, err error) {
	if c.FS == nil {
		c.FS = vfs.OS()
	}
	if c.Boot == "" {
		if c.Boot, err = bootID(); err != nil {
			return nil, err
		}
	}
	if c.Base != nil {
		if err := c.checkBase(); err != nil {
			return nil, err
		}
	}
	d := &Device{name: c.File, sideName: c.File + SidecarSuffix, base: c.Base, unsynced: map[int64]*words{}, turn: make(chan struct{}, 1)}
	defer func() {
		if err != nil {
			err = errors.Join(err, d.closeFiles())
		}
	}()
	if err := d.open(ctx, c); err != nil {
		return nil, err
	}
	return d, nil
}

func (c *Config) checkBase() error {
	if err := c.Identity.header(0).Validate(); err != nil {
		return fmt.Errorf("make an overlay at %s: %w", c.File, err)
	}
	g := c.Base.Geometry()
	if g.SizeBytes != c.Identity.SizeBytes || g.SectorSize != c.Identity.SectorSize {
		return fmt.Errorf("the base has %d bytes in sectors of %d, and is said to be %s", g.SizeBytes, g.SectorSize, c.Identity)
	}
	return nil
}

func (d *Device) closeFiles() error {
	var err error
	if d.file != nil {
		err = d.file.Close()
	}
	if d.side != nil {
		err = errors.Join(err, d.side.Close())
	}
	return err
}

func (d *Device) open(ctx context.Context, c Config) error {
	if err := d.openSidecar(c); err != nil {
		return err
	}
	h, s, err := readSidecar(d.sideName, d.side)
	if err != nil {
		return err
	}
	d.identity = identityOf(h)
	if (c.Base != nil || c.Identity != Identity{}) && !c.Identity.Same(d.identity) {
		return &OtherBaseError{File: d.name, Is: d.identity, Asked: c.Identity}
	}
	d.phase = s.Phase
	d.geometry = block.Geometry{SizeBytes: h.SizeBytes, SectorSize: int(h.SectorSize)}
	d.bits = newBitmap(d.side, d.sideName, format.LayOutOverlay(h.SizeBytes), h.Overlay, s.Activation)
	if d.phase == format.OverlayComplete {
		return d.openComplete(ctx, c.FS)
	}
	if c.Base == nil {
		return fmt.Errorf("%s: %w: give the stores, or bring all of it here first (--hydrate)", d.name, ErrNeedsBase)
	}
	if d.phase == format.OverlayMaking {
		err = d.makeFile(c)
	} else {
		err = d.openFile(c.FS)
	}
	if err != nil {
		return err
	}
	return d.recover(ctx, s, c.Boot)
}

// openSidecar opens and locks the sidecar; it makes it if there is no FILE either.
func (d *Device) openSidecar(c Config) error {
	f, err := c.FS.Open(d.sideName)
	if errors.Is(err, fs.ErrNotExist) {
		if err := noSidecar(c.FS, d.name); !errors.Is(err, fs.ErrNotExist) || c.Base == nil {
			return err
		}
		d.side, err = makeSidecar(c.FS, d.name, c.Identity)
		return err
	}
	if d.side, err = sparse(d.sideName, f, err); err != nil {
		return err
	}
	return tryLock(d.sideName, d.side)
}

// makeFile makes FILE: only an empty one that an interrupted start has left is
// taken for it. Then the state says, durably, that it is there.
func (d *Device) makeFile(c Config) (err error) {
	made, err := c.FS.Create(d.name)
	fresh := err == nil
	if errors.Is(err, fs.ErrExist) {
		made, err = c.FS.Open(d.name)
	}
	if d.file, err = sparse(d.name, made, err); err != nil {
		return local("make", d.name, err)
	}
	defer func() {
		if err != nil && fresh {
			// Nothing was written yet: leave nothing behind, FILE first, so that it never
			// is without its sidecar.
			if c.FS.Remove(d.name) == nil {
				_ = c.FS.Remove(d.sideName)
			}
		}
	}()
	if err := tryLock(d.name, d.file); err != nil {
		return err
	}
	if !fresh {
		size, err := d.file.Size()
		if err != nil {
			return err
		}
		dataAt, err := d.file.NextData(0)
		if err != nil {
			return err
		}
		if (size != 0 && size != d.geometry.SizeBytes) || dataAt < size {
			return fmt.Errorf("%s exists, and %w: it appeared while the overlay was being made. Move it away, or remove %s and choose another file; nothing of it was touched",
				d.name, ErrNotOverlay, d.sideName)
		}
	}
	if err := d.file.Truncate(d.geometry.SizeBytes); err != nil {
		return local("make", d.name, err)
	}
	if err := d.file.Sync(); err != nil {
		return local("sync", d.name, err)
	}
	if err := c.FS.SyncDir(path.Dir(d.name)); err != nil {
		return fmt.Errorf("sync the folder of %s: %w", d.name, err)
	}
	return nil
}

// openFile opens and locks FILE.
func (d *Device) openFile(fsys vfs.FS) error {
	f, err := fsys.Open(d.name)
	if errors.Is(err, fs.ErrNotExist) {
		return noFile(d.name)
	}
	if d.file, err = sparse(d.name, f, err); err != nil {
		return err
	}
	if err := tryLock(d.name, d.file); err != nil {
		return err
	}
	size, err := d.file.Size()
	if err != nil {
		return err
	}
	if size != d.geometry.SizeBytes {
		return fmt.Errorf("%s has %d bytes, and the volume has %d: something else has changed it. Bring back the file as it was, or remove it and %s to begin anew",
			d.name, size, d.geometry.SizeBytes, d.sideName)
	}
	return nil
}

// openComplete opens FILE, which is all there is. What an earlier process wrote
// may be in the page cache only, and so may be that it is complete.
func (d *Device) openComplete(ctx context.Context, fsys vfs.FS) error {
	d.bits.complete.Store(true)
	d.written, d.touched = d.bits.layout.Blocks, true
	if err := d.openFile(fsys); err != nil {
		return err
	}
	if err := d.sync(ctx); err != nil {
		return err
	}
	if err := d.side.Sync(); err != nil {
		return d.fail(d.sideName, err)
	}
	return nil
}

// recover brings the sidecar up to this boot, as the package comment says under
// "Order".
func (d *Device) recover(ctx context.Context, s *format.OverlayState, boot string) error {
	// What an earlier process has set may be in the page cache only.
	if err := d.file.Sync(); err != nil {
		return d.fail(d.name, err)
	}
	d.phase = format.OverlayPartial
	if s.Phase != d.phase || s.Boot != boot {
		if s.Boot != boot {
			// It is random, so nothing goes wrong if a power cut takes it back: no boot to come
			// is the one that the older state names.
			d.bits.activation = newActivation()
		}
		if err := d.writeState(format.OverlayState{Phase: d.phase, Boot: boot, Activation: d.bits.activation}); err != nil {
			return err
		}
	}
	if err := d.scan(ctx); err != nil {
		return err
	}
	if err := d.readDirectory(); err != nil {
		return err
	}
	// From here on the phase is durable, before anything is written to FILE, and so are
	// the pages that the directory is told of.
	if err := d.side.Sync(); err != nil {
		return d.fail(d.sideName, err)
	}
	for n := range d.bits.layout.Pages {
		if d.bits.isMade(n) {
			d.toList(n)
		}
	}
	if err := d.listAll(); err != nil {
		return err
	}
	return d.sync(ctx) // all may be there, and the state not say so
}
