// Package state is the folder in which a host keeps what it must remember of
// the groups it protects: keys, epochs, key sets, the ends of the logs. Losing
// it loses no history; the stores and the identity are enough to begin anew.
// What it promises to be durable is durable when the call returns.
package state

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"drc/internal/block"
	"drc/internal/vfs"
)

// ErrInUse means: another agent works on this state folder.
var ErrInUse = errors.New("another agent uses this state folder")

// Dir is an opened state folder.
type Dir struct {
	files vfs.FS
	path  string
	lock  io.Closer
}

// DefaultPath is where the state is kept if nothing else is said: /var/lib/drc
// for root, the XDG state folder otherwise.
func DefaultPath() string {
	if os.Geteuid() == 0 {
		return "/var/lib/drc"
	}
	if x := os.Getenv("XDG_STATE_HOME"); x != "" {
		return filepath.Join(x, "drc")
	}
	home, err := os.UserHomeDir()
	if err != nil {
		return filepath.Join(os.TempDir(), fmt.Sprintf("drc-%d", os.Geteuid()))
	}
	return filepath.Join(home, ".local", "state", "drc")
}

// Open makes the folder if need be. It takes no lock.
func Open(path string) (*Dir, error) {
	abs, err := filepath.Abs(path)
	if err != nil {
		return nil, fmt.Errorf("state folder %s: %w", path, err)
	}
	return OpenOn(vfs.OS(), abs)
}

// OpenOn is Open of an absolute path on any file system.
func OpenOn(files vfs.FS, path string) (*Dir, error) {
	if err := files.MkdirAll(path); err != nil {
		return nil, fmt.Errorf("make the state folder: %w: pass --state DIR to use another one", err)
	}
	return &Dir{files: files, path: path}, nil
}

// Files is the file system that the folder is on.
func (d *Dir) Files() vfs.FS { return d.files }

// Lock claims the folder for one agent, until Close.
func (d *Dir) Lock() error {
	lock, err := d.files.Lock(filepath.Join(d.path, "lock"))
	if errors.Is(err, vfs.ErrLocked) {
		return fmt.Errorf("%s: %w: stop it first, or pass --state DIR for a second agent", d.path, ErrInUse)
	}
	if err != nil {
		return fmt.Errorf("lock the state folder: %w", err)
	}
	// What an agent that was killed has left becomes durable before anything rests
	// on it. Caches need not.
	caches := func(name string) bool { return name == "cache" || name == "dedup" }
	if err := vfs.SyncTree(d.files, d.path, caches); err != nil {
		return errors.Join(fmt.Errorf("make durable what is in the state folder: %w", err), lock.Close())
	}
	d.lock = lock
	return nil
}

// Close gives up the lock.
func (d *Dir) Close() error {
	if d.lock == nil {
		return nil
	}
	err := d.lock.Close()
	d.lock = nil
	return err
}

// Path is a path within the folder.
func (d *Dir) Path(elements ...string) string {
	return filepath.Join(append([]string{d.path}, elements...)...)
}

// Backings is the folder of the backings' identity records.
func (d *Dir) Backings() string { return d.Path("backings") }

// Socket is the path of the agent's control socket.
func (d *Dir) Socket() string { return SocketPath(d.path) }

// SocketPath is the path of the control socket in the state folder at path.
func SocketPath(path string) string { return filepath.Join(path, "control.sock") }

// StandbySocketPath is the path of a standby's control socket in the state folder at
// path; there may be an agent's beside it.
func StandbySocketPath(path string) string { return filepath.Join(path, "standby.sock") }

// CachePath is the folder for what can be fetched again, in the state folder
// at path.
func CachePath(path string) string { return filepath.Join(path, "cache") }

// Save makes a small file durable; it replaces an older one as a whole.
func (d *Dir) Save(raw []byte, elements ...string) error {
	name := d.Path(elements...)
	if err := d.files.MkdirAll(filepath.Dir(name)); err != nil { // durable, as what is in it
		return fmt.Errorf("write state: %w", err)
	}
	if err := vfs.WriteFileAtomic(d.files, name, raw); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// SaveLoose replaces a small file without a sync: whole or not at all for this
// process's death, and perhaps lost or damaged by a power cut.
func (d *Dir) SaveLoose(raw []byte, elements ...string) error {
	if err := vfs.WriteFileLoose(d.files, d.Path(elements...), raw); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// fileMaxBytes is more than a file of the state folder has.
const fileMaxBytes = 1 << 30

// Load reads a file. Its error wraps fs.ErrNotExist if there is none.
func (d *Dir) Load(elements ...string) ([]byte, error) {
	raw, err := vfs.ReadFile(d.files, d.Path(elements...), fileMaxBytes)
	if err != nil {
		return nil, fmt.Errorf("read state: %w", err)
	}
	return raw, nil
}

// SaveJSON is Save of v as JSON.
func (d *Dir) SaveJSON(v any, elements ...string) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode state: %w", err)
	}
	return d.Save(append(raw, '\n'), elements...)
}

// DamagedError is what LoadJSON returns for a file that is not what was saved.
// What it said is not guessed: the buffer may hold acknowledged writes that only
// it tells the place of.
type DamagedError struct {
	Path string
	Err  error // what the decoder says
}

func (e *DamagedError) Error() string {
	return fmt.Sprintf("the state file %s is damaged, and nothing was changed: put this file back as it was, from a backup of the state folder or of the disk; keep the folder as it is, since what its buffer holds may not be on the stores yet", e.Path)
}

func (e *DamagedError) Unwrap() error { return e.Err }

// LoadJSON reads a file into v; found is false if there is none. One that cannot
// be decoded is a DamagedError.
func (d *Dir) LoadJSON(v any, elements ...string) (found bool, err error) {
	name := d.Path(elements...)
	raw, err := d.Load(elements...)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return false, &DamagedError{Path: name, Err: err}
	}
	if string(bytes.TrimSpace(raw)) == "null" { // which would be as if there were none
		return false, &DamagedError{Path: name, Err: errors.New("it holds nothing")}
	}
	return true, nil
}

// Host is the random id of this state folder: it owns buffers.
func (d *Dir) Host() (block.ID, error) {
	var h struct {
		ID string `json:"host_id"`
	}
	found, err := d.LoadJSON(&h, "host.json")
	if err != nil {
		return block.ID{}, err
	}
	if found {
		id, err := block.ParseID(h.ID)
		if err != nil {
			return id, &DamagedError{Path: d.Path("host.json"), Err: err}
		}
		return id, nil
	}
	id := block.NewID()
	h.ID = id.String()
	return id, d.SaveJSON(h, "host.json")
}
