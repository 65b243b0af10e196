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
