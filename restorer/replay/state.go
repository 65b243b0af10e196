package replay

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/url"
	"os"
	"path"
	"strings"
	"syscall"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

const (
	folderName = "drc-standby.json"
	lockName   = "drc-standby.lock"
	// CopySuffix ends the names of copies.
	CopySuffix = ".raw"
	// FillingSuffix ends, after CopySuffix, the name of a copy that is not whole yet
	// and was made by the standby.
	FillingSuffix = ".drc-filling"

	stateVersion  = 1
	maxStateBytes = 64 << 20
)

// folderState says whose folder it is.
type folderState struct {
	Version    int      `json:"version"`
	Repository block.ID `json:"repository"`
}

// groupState is where the copies of a group are.
type groupState struct {
	Version int           `json:"version"`
	Group   block.GroupID `json:"group"`
	Copies  []*copyState  `json:"copies"`
}

// copyState is what is durably known of a copy.
type copyState struct {
	ID        block.ID          `json:"id"` // names it in redo files
	Volume    block.VolumeID    `json:"volume"`
	Branch    block.BranchID    `json:"branch"` // zero: the first one
	Index     block.VolumeIndex `json:"index"`
	Name      string            `json:"name"`
	File      string            `json:"file"` // in the folder, or a path
	SizeBytes int64             `json:"size_bytes"`
	// Whole: the copy has the content of the volume at the position. Otherwise it is
	// on the way there, and bytes below Filled are done.
	Whole    bool     `json:"whole"`
	Compare  bool     `json:"compare"` // what is in the file is compared while it is filled
	Filled   int64    `json:"filled_bytes"`
	Position position `json:"position"`
	Stamp    Stamp    `json:"stamp"` // of the file, when it was whole
}

// position is a log entry.
type position struct {
	Entry uint64      `json:"entry"`
	Hash  format.Hash `json:"hash"`
	Seq   block.Seq   `json:"seq"`
	Time  time.Time   `json:"time"`
}

// Stamp tells whether a file was changed by somebody else.
type Stamp struct {
	Inode  uint64 `json:"inode"`
	MTime  int64  `json:"mtime_ns"`
	Exists bool   `json:"-"`
}

// stampOf is the stamp of a file on the machine's file system.
func stampOf(name string) (Stamp, error) {
	info, err := os.Stat(name)
	if errors.Is(err, fs.ErrNotExist) {
		return Stamp{}, nil
	}
	if err != nil {
		return Stamp{}, err
	}
	s := Stamp{MTime: info.ModTime().UnixNano(), Exists: true}
	if st, ok := info.Sys().(*syscall.Stat_t); ok {
		s.Inode = st.Ino
	}
	return s, nil
}

// fileOf is the name of the file of a volume's copy.
func fileOf(volume string) string {
	name := strings.ReplaceAll(url.PathEscape(volume), "%20", " ")
	if strings.HasPrefix(name, ".") || strings.HasPrefix(name, "drc-") {
		name = "%" + fmt.Sprintf("%02X", name[0]) + name[1:]
	}
	return name + CopySuffix
}

func (s *Standby) path(name string) string {
	if path.IsAbs(name) {
		return name
	}
	return path.Join(s.o.Dir, name)
}

func groupFile(g block.GroupID, suffix string) string { return "drc-group-" + g.String() + suffix }

// load reads a state file; found is false if there is none.
func (s *Standby) load(name string, into any) (found bool, err error) {
	raw, err := vfs.ReadFile(s.fs, s.path(name), maxStateBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("read the standby's state: %w", err)
	}
	if err := json.Unmarshal(raw, into); err != nil {
		return false, format.Corrupt(s.path(name), "it is no state of a standby (%v): remove it, and the copies are compared with the history in full (drc replay --adopt)", err)
	}
	return true, nil
}

func (s *Standby) save(name string, v any) error {
	raw, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := vfs.WriteFileAtomic(s.fs, s.path(name), append(raw, '\n')); err != nil {
		return fmt.Errorf("keep the standby's state: %w", err)
	}
	return nil
}
