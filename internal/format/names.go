package format

import (
	"fmt"
	"strconv"
	"strings"

	"drc/internal/block"
)

// Names of objects on a store, below its prefix. See "Names" in
// docs/FORMAT.md. All numbers in them are hexadecimal of fixed width, so that
// the order of names is the order of numbers.

// RepoRecordPrefix is the folder of the repository records.
const RepoRecordPrefix = "repo/"

// GroupsPrefix is the folder of all groups.
const GroupsPrefix = "groups/"

// RepoRecordName is the name of repository record n, counted from 1.
func RepoRecordName(n uint64) string { return fmt.Sprintf("repo/%016x", n) }

// GroupPrefix is the folder of one group.
func GroupPrefix(g block.GroupID) string { return "groups/" + g.String() + "/" }

// LogPrefix is the folder of a group's log.
func LogPrefix(g block.GroupID) string { return GroupPrefix(g) + "log/" }

// LogName is the name of log object index, counted from 0.
func LogName(g block.GroupID, index uint64) string {
	return fmt.Sprintf("%s%016x", LogPrefix(g), index)
}

// ParseLogName returns the index in a log object's name.
func ParseLogName(g block.GroupID, name string) (uint64, bool) {
	hex, ok := strings.CutPrefix(name, LogPrefix(g))
	if !ok || len(hex) != 16 {
		return 0, false
	}
	index, err := strconv.ParseUint(hex, 16, 64)
	return index, err == nil && LogName(g, index) == name
}

// ExpiryNone is the expiry class of what is kept until it is pruned; the other
// classes are for object lock.
const ExpiryNone = 0

// SegmentName is the name of one shard of a segment.
func SegmentName(g block.GroupID, s block.SegmentID, expiry, shard int) string {
	id := s.String()
	return fmt.Sprintf("%ssegments/%s/%s-%x.%02x", GroupPrefix(g), id[:2], id, expiry, shard)
}

// ManifestPrefix is the folder of a group's manifests on one branch.
func ManifestPrefix(g block.GroupID, b block.BranchID) string {
	return GroupPrefix(g) + "manifests/" + b.String() + "/"
}

// ManifestName tells of a manifest object what its name tells.
type ManifestName struct {
	Branch   block.BranchID
	From, To uint64 // first and last log entry number that it covers
	Expiry   int
	ID       block.ID
}

// Name returns the object's name. Names of one branch sort by To first, so the
// newest stand last.
func (m ManifestName) Name(g block.GroupID) string {
	return fmt.Sprintf("%s%016x-%016x-%x-%s", ManifestPrefix(g, m.Branch), m.To, m.From, m.Expiry, m.ID)
}

// ParseManifestName reads a manifest's object name.
func ParseManifestName(g block.GroupID, name string) (ManifestName, bool) {
	var m ManifestName
	rest, ok := strings.CutPrefix(name, GroupPrefix(g)+"manifests/")
	if !ok || len(rest) != 32+1+16+1+16+1+1+1+32 {
		return m, false
	}
	branch, err1 := block.ParseID(rest[:32])
	to, err2 := strconv.ParseUint(rest[33:49], 16, 64)
	from, err3 := strconv.ParseUint(rest[50:66], 16, 64)
	expiry, err4 := strconv.ParseUint(rest[67:68], 16, 8)
	id, err5 := block.ParseID(rest[69:])
	if err1 != nil || err2 != nil || err3 != nil || err4 != nil || err5 != nil {
		return m, false
	}
	m = ManifestName{Branch: block.BranchID(branch), From: from, To: to, Expiry: int(expiry), ID: id}
	return m, from >= 1 && from <= to && m.Name(g) == name
}
