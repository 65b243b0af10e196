package uploader

import (
	"context"
	"fmt"

	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/grouplog"
)

// BeginBranch appends the entry with which branch b begins, sealed under keys, which
// travels in it. It returns when the entry is decided: from then on what the log holds
// goes on from the fork. The error is ErrFenced if somebody else has taken office.
func (l *Log) BeginBranch(ctx context.Context, b format.Branch, keys *crypt.KeySet) (n uint64, err error) {
	n, parent, epoch := l.Next()
	if n <= b.ForkN {
		return 0, fmt.Errorf("begin a branch that forks from log entry %d: the log has %d", b.ForkN, n-1)
	}
	items := format.Items{
		Range:  &format.Range{Branch: b.ID, From: b.ForkSeq + 1, To: b.ForkSeq, Time: l.cfg.Now().UnixNano(), Dates: l.Dates()},
		Branch: &b,
	}
	value := grouplog.Draft{
		Group: l.cfg.Group, N: n, Parent: parent, Epoch: epoch, Keys: keys, KeySets: [][]byte{keys.Raw}, Items: &items,
	}.Make(l.cfg.Agent)
	if len(value) > format.MaxValueBytes {
		return 0, fmt.Errorf("begin a branch: the entry would have %d bytes, for the names of %d volumes", len(value), len(b.Volumes))
	}
	return n, l.Append(ctx, value)
}
