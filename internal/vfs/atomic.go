package vfs

import (
	"errors"
	"fmt"
	"io/fs"
	"path"
)

// TempSuffix ends the names of files that WriteFileAtomic has not finished. A
// file so named found after a crash is rubbish and may be removed.
const TempSuffix = ".tmp"

// WriteFileAtomic replaces the file name by one that holds data: write, sync,
// rename, sync the directory. When it returns nil the new content is durable;
// after an error or a crash at any point the file is the old one or the new
// one, whole. There must be one writer a name.
func WriteFileAtomic(fsys FS, name string, data []byte) error {
	temp := name + TempSuffix
	if err := fsys.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove the remains of an earlier write: %w", err)
	}
	f, err := fsys.Create(temp)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(data, 0)
	if err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err == nil {
		err = fsys.Rename(temp, name)
	}
	if err != nil {
		_ = fsys.Remove(temp) // best effort: the next write removes it too
		return fmt.Errorf("write %s: %w", name, err)
	}
	return fsys.SyncDir(path.Dir(name))
}

// LooseSuffix ends the names of files that WriteFileLoose has not finished.
const LooseSuffix = ".new"

// WriteFileLoose replaces the file name by one that holds data, without a sync:
// after the death of the process it is the old file or the new one, whole; after
// a power cut it may be anything. There must be one writer a name.
func WriteFileLoose(fsys FS, name string, data []byte) error {
	temp := name + LooseSuffix
	f, err := fsys.Open(temp)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = fsys.Create(temp)
	}
	if err != nil {
		return err
	}
	if err = f.Truncate(int64(len(data))); err == nil {
		_, err = f.WriteAt(data, 0)
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", name, err)
	}
	return fsys.Rename(temp, name)
}

// SyncTree makes the present names durable in dir and in all directories below it,
// but for those of which skip, if not nil, is true of the name. Who begins to work
// with what another process left calls it first: that process may have died between
// a rename and the SyncDir that belongs to it. What is found then is there, and a
// power cut would take it away again, when other things rest on it.
func SyncTree(fsys FS, dir string, skip func(name string) bool) error {
	entries, err := fsys.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if !e.IsDir || skip != nil && skip(e.Name) {
			continue
		}
		if err := SyncTree(fsys, path.Join(dir, e.Name), skip); err != nil {
			return err
		}
	}
	return fsys.SyncDir(dir)
}

// RemoveAll removes name and what is below it; it is no error if there is none.
// Durable after SyncDir of its directory.
func RemoveAll(fsys FS, name string) error {
	info, err := fsys.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if info.IsDir {
		entries, err := fsys.ReadDir(name)
		if err != nil {
			return err
		}
		for _, e := range entries {
			if err := RemoveAll(fsys, path.Join(name, e.Name)); err != nil {
				return err
			}
		}
	}
	return fsys.Remove(name)
}

// ReadFile returns the content of the file name, of at most limitBytes.
func ReadFile(fsys FS, name string, limitBytes int64) ([]byte, error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limitBytes {
		return nil, fmt.Errorf("read %s: its %d bytes are more than the %d that such a file has", name, size, limitBytes)
	}
	data := make([]byte, size)
	if _, err := f.ReadAt(data, 0); err != nil && size > 0 {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return data, nil
}
