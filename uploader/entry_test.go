package uploader_test

import (
	"testing"

	"drc/internal/batch"
	"drc/internal/format"
	"drc/uploader"
)

// The range of an entry is not that of its batch: the entry gets the stores'
// dates while the buffer may be writing the batch down.
func TestEntry_LeavesTheBatchAlone(t *testing.T) {
	w := newWorld(t, options{})
	x := w.begin()
	b := &batch.Batch{From: 2, To: 2}
	b.Items.Range = &format.Range{From: 2, To: 2}
	e := uploader.Unlogged(x.up, b)
	if r := e.Items.Range; r == b.Items.Range || r.From != 2 || r.To != 2 {
		t.Errorf("%+v of %+v", e.Items.Range, b.Items.Range)
	}
	x.stop()
}
