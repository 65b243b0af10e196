// Package state is the folder in which a host keeps what it must remember of
// the groups it protects: keys, epochs, key sets, the ends of the logs. Losing
// it loses no history; the stores and the identity are enough to begin anew.
// What it promises to be durable is durable when the call returns.
package state

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"drc/internal/block"
	"drc/internal/vfs"
)

// ErrInUse means: another agent works on this state folder.
var ErrInUse = errors.New("another agent uses this state folder")

// Dir is an opened state folder.
type Dir struct {
	path string
	lock *os.File
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
	if err := vfs.OS().MkdirAll(abs); err != nil {
		return nil, fmt.Errorf("make the state folder: %w: pass --state DIR to use another one", err)
	}
	return &Dir{path: abs}, nil
}

// Lock claims the folder for one agent, until Close.
func (d *Dir) Lock() error {
	f, err := os.OpenFile(filepath.Join(d.path, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return fmt.Errorf("lock the state folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		f.Close()
		return fmt.Errorf("%s: %w: stop it first, or pass --state DIR for a second agent", d.path, ErrInUse)
	}
	d.lock = f
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

// CachePath is the folder for what can be fetched again, in the state folder
// at path.
func CachePath(path string) string { return filepath.Join(path, "cache") }

// Save makes a small file durable; it replaces an older one as a whole.
func (d *Dir) Save(raw []byte, elements ...string) error {
	name := d.Path(elements...)
	if err := vfs.OS().MkdirAll(filepath.Dir(name)); err != nil { // durable, as what is in it
		return fmt.Errorf("write state: %w", err)
	}
	if err := vfs.WriteFileAtomic(vfs.OS(), name, raw); err != nil {
		return fmt.Errorf("write state: %w", err)
	}
	return nil
}

// SaveJSON is Save of v as JSON.
func (d *Dir) SaveJSON(v any, elements ...string) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return fmt.Errorf("encode state: %w", err)
	}
	return d.Save(append(raw, '\n'), elements...)
}

// LoadJSON reads a file into v; found is false if there is none.
func (d *Dir) LoadJSON(v any, elements ...string) (found bool, err error) {
	name := d.Path(elements...)
	raw, err := os.ReadFile(name)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read state: %w", err)
	}
	if err := json.Unmarshal(raw, v); err != nil {
		return false, fmt.Errorf("the state file %s is damaged: %w: move the state folder away; the stores hold everything else", name, err)
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
			return id, fmt.Errorf("the state file %s is damaged: %w: put back the id that the label of the buffer names, or move state folder and buffer away", d.Path("host.json"), err)
		}
		return id, nil
	}
	id := block.NewID()
	h.ID = id.String()
	return id, d.SaveJSON(h, "host.json")
}
