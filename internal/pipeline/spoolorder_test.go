package pipeline

import (
	"slices"
	"testing"

	"drc/internal/batch"
	"drc/internal/block"
	"drc/internal/format"
)

// TestInOrder_BatchesWithoutWrites: names that were asked for while nothing was
// written, and what a resync has read meanwhile, stay in the order in which they
// were cut.
func TestInOrder_BatchesWithoutWrites(t *testing.T) {
	var batches []*batch.Batch
	var placed [][]uint64
	for _, x := range []struct {
		from, to block.Seq
		time     int64
	}{{1, 10, 5}, {11, 10, 9}, {11, 10, 7}, {11, 10, 8}, {11, 20, 6}} {
		batches = append(batches, &batch.Batch{From: x.from, To: x.to, Items: format.Items{Range: &format.Range{Time: x.time}}})
		placed = append(placed, []uint64{uint64(x.time)})
	}
	inOrder(batches, placed)
	var times, bits []int64
	for i, b := range batches {
		times, bits = append(times, b.Items.Range.Time), append(bits, int64(placed[i][0]))
	}
	if want := []int64{5, 7, 8, 9, 6}; !slices.Equal(times, want) || !slices.Equal(bits, want) {
		t.Errorf("times %v, placed %v", times, bits)
	}
}
