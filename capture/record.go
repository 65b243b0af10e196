package capture

import (
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"

	"drc/internal/block"
	"drc/internal/vfs"
)

// Record is the identity record of a backing: whose it is, and how far the
// history has been applied to it. It lives in the state directory under a name
// made from the backing's path; restore writes one too, so that an agent can
// go on from what was restored.
type Record struct {
	Version  int       `json:"version"`
	Path     string    `json:"path"`
	Repo     string    `json:"repository"`
	Group    string    `json:"group"`
	Volume   string    `json:"volume"`
	Branch   string    `json:"branch"`
	Applied  block.Seq `json:"applied"` // every write up to here is on the backing, durably
	Clean    bool      `json:"clean"`   // nothing but that is on it
	Stamp    stamp     `json:"stamp"`   // as it was when the record was written
	BootID   string    `json:"boot_id"` // of the boot in which the record was written
	SectorSz int       `json:"sector_size"`
	Foreign  bool      `json:"foreign,omitempty"`  // while an agent used it somebody else wrote to it or cut it short: what it holds must be compared
	Restored bool      `json:"restored,omitempty"` // it came out of the history, and no agent has used it since
	Rewound  bool      `json:"rewound,omitempty"`  // a rewind was begun, and no agent has used it since: parts of it are older than Applied
}

const recordVersion = 1

// recordMaxBytes is more than a record takes up.
const recordMaxBytes = 1 << 20

// recordFile is where the record of the backing at path lives.
func recordFile(dir, path string) string {
	sum := sha256.Sum256([]byte(path))
	return filepath.Join(dir, hex.EncodeToString(sum[:12])+".json")
}

// RecordFile is the file that holds the record of the backing at path.
func RecordFile(dir, path string) string { return recordFile(dir, path) }

// ReadRecord returns the record of the backing at path (absolute), or nil if
// there is none.
func ReadRecord(dir, path string) (*Record, error) { return readRecord(vfs.OS(), dir, path) }

func readRecord(files vfs.FS, dir, path string) (*Record, error) {
	name := recordFile(dir, path)
	raw, err := vfs.ReadFile(files, name, recordMaxBytes)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read the record of volume %s: %w", path, err)
	}
	r := &Record{}
	if err := json.Unmarshal(raw, r); err != nil || r.Version != recordVersion {
		return nil, fmt.Errorf("the record of volume %s in %s is damaged or of another version of drc, and nothing was changed: put it back as it was, from a backup, or restore the volume to another path with drc restore VOLUME TARGET --with-buffer DIR. Without that file an agent would take the volume as it is, and writes that only the buffer has would be missing on it", path, name)
	}
	return r, nil
}

// write makes the record durable.
func (r *Record) write(m Machine, dir string) error {
	r.Version = recordVersion
	r.BootID, _ = m.Boot()
	raw, err := json.MarshalIndent(r, "", "  ")
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	if err := m.Files().MkdirAll(dir); err != nil { // durable, as what is in it
		return fmt.Errorf("write the record of volume %s: %w", r.Path, err)
	}
	if err := vfs.WriteFileAtomic(m.Files(), recordFile(dir, r.Path), append(raw, 10)); err != nil {
		return fmt.Errorf("write the record of volume %s: %w", r.Path, err)
	}
	return nil
}

// Claim begins the signs of life of a backing that Inspect has found to be ours by
// r, and notes durably that it is so in this boot too. It comes before Replay: if
// the host was rebooted, a process that dies while it replays leaves a time of
// change that is later than the boot, and the next one would take that for
// somebody else's, and what was acknowledged off the volume.
func (b *Backing) Claim(dir string, r *Record) error {
	if err := b.SignLife(dir); err != nil {
		return err
	}
	if id, _ := b.machine.Boot(); r.BootID == id && !r.Clean {
		return nil
	}
	c := *r
	var err error
	if c.Stamp, err = b.stamp(); err != nil {
		return err
	}
	c.Clean = false
	return c.write(b.machine, dir)
}

// ClaimRewind begins the signs of life of a backing that is about to be brought back
// to an older state, and notes that, durably: until an agent uses it again it is no
// state of its history, and no journal makes it one. r is the record that the volume
// has, or what one would say.
func (b *Backing) ClaimRewind(dir string, r Record) error {
	if err := b.SignLife(dir); err != nil {
		return err
	}
	var err error
	if r.Stamp, err = b.stamp(); err != nil {
		return err
	}
	r.Path, r.Clean, r.Rewound = b.path, false, true
	return r.write(b.machine, dir)
}

// RecordRestored writes the record of a backing that was just restored from its
// history to the state after r.Applied, and syncs it.
func RecordRestored(dir string, r Record) error {
	r.Restored = true
	return recordMade(dir, r)
}

// RecordReplayed is RecordRestored of a backing that was brought beyond its
// history: what the history lacks of it is in the buffer, and nowhere else.
func RecordReplayed(dir string, r Record) error {
	r.Restored = false // else the next start would take all of it for history
	return recordMade(dir, r)
}

func recordMade(dir string, r Record) error {
	b, _, err := OpenBacking(r.Path, BackingOptions{ReadOnly: true})
	if err != nil {
		return err
	}
	defer b.Close()
	// With the time of the last change, which the record is about to name.
	if err := b.Sync(); err != nil {
		return err
	}
	if r.Stamp, err = b.stamp(); err != nil {
		return err
	}
	r.Path, r.Clean = b.path, true
	return r.write(b.machine, dir)
}

// ForgetRecord removes the record of a backing that is not a volume after all.
func ForgetRecord(files vfs.FS, dir, path string) error {
	for _, name := range []string{recordFile(dir, path), lifeFile(dir, path)} {
		if err := files.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("remove the record of volume %s: %w", path, err)
		}
	}
	return nil
}

// Finding is what Inspect found out about a backing.
type Finding int

const (
	// FindingNew means: DRC does not know this backing.
	FindingNew Finding = iota
	// FindingClean means: it holds exactly the history up to Applied.
	FindingClean
	// FindingReplay means: it is ours; the journal from Applied on must be replayed.
	FindingReplay
	// FindingForeign means: somebody else wrote to it or replaced it.
	FindingForeign
)

// Inspect compares a backing with its record. If there is none for its path, it
// is looked for among those of the volume: a backing that was moved is known by
// its inode. Then the record's Path is the former one, and it is to be forgotten
// (see ForgetMoved) once there is one for the new path.
func Inspect(dir, volume string, b *Backing) (Finding, *Record, error) {
	files := b.machine.Files()
	r, err := readRecord(files, dir, b.path)
	if err != nil {
		return FindingNew, nil, err
	}
	now, err := b.stamp()
	if err != nil {
		return FindingNew, nil, err
	}
	if r == nil {
		if r, err = movedRecord(files, dir, volume, now); err != nil || r == nil {
			return FindingNew, nil, err
		}
	}
	moved := r.Path != b.path
	if now.Inode != r.Stamp.Inode || now.Size != r.Stamp.Size {
		return FindingForeign, r, nil
	}
	if r.Clean {
		// A device has no time of last change that means anything. A change of
		// owner or mode is none of the content.
		if b.device || now.MTime == r.Stamp.MTime {
			return FindingClean, r, nil
		}
		return FindingForeign, r, nil
	}
	if b.device {
		return FindingReplay, r, nil
	}
	// Of a moved one, both: a start may have died before it wrote the new record.
	limit := max(readLife(files, dir, b.path), readLife(files, dir, r.Path))
	if id, at := b.machine.Boot(); r.BootID != id {
		limit = 0
		if !at.IsZero() {
			limit = at.UnixNano()
		}
	}
	// Not the time of modification alone: who copies a file over this one may
	// set that back. But to rename a file is a change of it too.
	last := now.last()
	if moved {
		last = now.MTime
	}
	if last <= max(limit, r.Stamp.last()) {
		return FindingReplay, r, nil
	}
	return FindingForeign, r, nil
}

// movedRecord returns the record of a volume whose backing was elsewhere and is
// the one with this stamp, or nil. Records that cannot be read are not it.
func movedRecord(files vfs.FS, dir, volume string, now stamp) (*Record, error) {
	if volume == "" {
		return nil, nil
	}
	entries, err := files.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("look for the record of a moved volume: %w", err)
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name)
		if !strings.HasSuffix(name, ".json") {
			continue
		}
		raw, err := vfs.ReadFile(files, name, recordMaxBytes)
		if err != nil {
			continue
		}
		r := &Record{}
		if json.Unmarshal(raw, r) != nil || r.Version != recordVersion || name != recordFile(dir, r.Path) {
			continue
		}
		if r.Volume == volume && r.Stamp.Inode == now.Inode && r.Stamp.Size == now.Size {
			return r, nil
		}
	}
	return nil, nil
}

// NewestApplied is the newest Seq of a group that is on a backing, by the records in
// dir. Those that cannot be read say nothing.
func NewestApplied(files vfs.FS, dir, group string) (newest block.Seq, err error) {
	entries, err := files.ReadDir(dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("look how far the volumes are: %w", err)
	}
	for _, e := range entries {
		name := filepath.Join(dir, e.Name)
		if !strings.HasSuffix(name, ".json") {
			continue
		}
		raw, err := vfs.ReadFile(files, name, recordMaxBytes)
		r := &Record{}
		if err == nil && json.Unmarshal(raw, r) == nil && r.Version == recordVersion && r.Group == group {
			newest = max(newest, r.Applied)
		}
	}
	return newest, nil
}

// ForgetMoved removes the record of a volume at the path where its backing was,
// if there is still one of that volume.
func ForgetMoved(files vfs.FS, dir, volume, path string) error {
	r, err := readRecord(files, dir, path)
	if err != nil || r == nil || r.Volume != volume {
		return err
	}
	return ForgetRecord(files, dir, path)
}
