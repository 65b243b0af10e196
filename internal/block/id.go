package block

import (
	"bytes"
	"crypto/rand"
	"encoding/hex"
	"fmt"
)

// ID is a random 128-bit name. It says nothing about what it names.
type ID [16]byte

// VolumeID names a protected volume, for ever. This and the other kinds of ids
// are distinct types, so that one cannot be passed for another.
type VolumeID ID

// GroupID names a group, for ever.
type GroupID ID

// SegmentID names one segment.
type SegmentID ID

// BranchID names one line of a group's history.
type BranchID ID

// NewID returns a fresh random ID.
func NewID() ID {
	var id ID
	_, _ = rand.Read(id[:]) // never fails, by its documentation
	return id
}

// ParseID reads the 32 lower-case hexadecimal digits that String prints.
func ParseID(text string) (ID, error) {
	var id ID
	if len(text) != 2*len(id) {
		return ID{}, fmt.Errorf("%q is not an id: want %d hexadecimal digits", text, 2*len(id))
	}
	if _, err := hex.Decode(id[:], []byte(text)); err != nil || hex.EncodeToString(id[:]) != text {
		return ID{}, fmt.Errorf("%q is not an id: want %d lower-case hexadecimal digits", text, 2*len(id))
	}
	return id, nil
}

func (id ID) String() string        { return hex.EncodeToString(id[:]) }
func (id VolumeID) String() string  { return ID(id).String() }
func (id GroupID) String() string   { return ID(id).String() }
func (id SegmentID) String() string { return ID(id).String() }
func (id BranchID) String() string  { return ID(id).String() }

// IsZero reports whether id was never set.
func (id ID) IsZero() bool { return id == ID{} }

// Compare orders ids bytewise.
func (id ID) Compare(o ID) int { return bytes.Compare(id[:], o[:]) }

// MarshalText and UnmarshalText let ids stand in JSON and TOML.
func (id ID) MarshalText() ([]byte, error)        { return []byte(id.String()), nil }
func (id VolumeID) MarshalText() ([]byte, error)  { return []byte(id.String()), nil }
func (id GroupID) MarshalText() ([]byte, error)   { return []byte(id.String()), nil }
func (id SegmentID) MarshalText() ([]byte, error) { return []byte(id.String()), nil }
func (id BranchID) MarshalText() ([]byte, error)  { return []byte(id.String()), nil }

func (id *ID) UnmarshalText(text []byte) error {
	parsed, err := ParseID(string(text))
	if err == nil {
		*id = parsed
	}
	return err
}

func (id *VolumeID) UnmarshalText(text []byte) error  { return (*ID)(id).UnmarshalText(text) }
func (id *GroupID) UnmarshalText(text []byte) error   { return (*ID)(id).UnmarshalText(text) }
func (id *SegmentID) UnmarshalText(text []byte) error { return (*ID)(id).UnmarshalText(text) }
func (id *BranchID) UnmarshalText(text []byte) error  { return (*ID)(id).UnmarshalText(text) }
