package vbuf

import (
	"context"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
)

// TestReserve_LargeWritesOneAfterTheOther has writes follow each other of which
// the buffer holds one at a time: the file that was made for the last one is
// given back although nothing else is written that would end it. In a second
// journal as well: the room is everybody's.
func TestReserve_LargeWritesOneAfterTheOther(t *testing.T) {
	o := testOptions(vfs.NewMem(), 1)
	o.Dirs[0].SizeBytes, o.FileBytes = 16<<20, 256<<10
	b := mustOpen(t, o)
	defer b.Close()
	var journals []*Journal
	for i := range 2 {
		j, err := b.Journal(t.Context(), block.GroupID{byte(i + 1)})
		if err != nil {
			t.Fatal(err)
		}
		if err := j.SetNext(1); err != nil {
			t.Fatal(err)
		}
		journals = append(journals, j)
	}
	data := make([]byte, 7<<20) // of 12 MiB
	for seq := block.Seq(1); seq <= 3; seq++ {
		for _, j := range journals {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			released := make(chan struct{})
			go func() { // while the next one waits
				defer close(released)
				time.Sleep(time.Millisecond)
				for _, o := range journals {
					o.Release(o.Durable())
				}
			}()
			if err := j.Reserve(ctx, int64(len(data))); err != nil {
				t.Fatalf("write %d: %v", seq, err)
			}
			<-released
			j.Enqueue(block.Write{Seq: seq, Kind: block.KindData, Extent: block.Extent{Len: int64(len(data))}, Data: data})
			if err := j.Flush(ctx); err != nil {
				t.Fatal(err)
			}
			cancel()
			if st := b.Stats(); st.UsedBytes > 12<<20 || format.JournalRecordBytes(int64(len(data))) > st.UsedBytes {
				t.Errorf("write %d: %d bytes in use", seq, st.UsedBytes)
			}
		}
	}
}
