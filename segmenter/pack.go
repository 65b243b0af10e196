package segmenter

import (
	"bytes"
	"runtime"
	"sync"

	"drc/internal/batch"
	"drc/internal/format"
	"drc/internal/segment"
)

const (
	// segmentBytes is how large a segment's payload gets before the next one
	// begins.
	segmentBytes = 8 << 20
	// inlineBytes is the largest payload that travels in its log entry.
	inlineBytes = 16 << 10
	// framesAhead bounds the frames between cutting and sealing.
	framesAhead = 16
)

// packed says where packing put a chunk.
type packed struct {
	segment int // which of the batch's new segments
	ordinal int
}

// frameJob is a frame on its way from cutting to sealing.
type frameJob struct {
	*segment.Frame
	compressed chan struct{} // gets a value when the frame is compressed
}

// frames are shared by all groups, like blocks.
var frames = sync.Pool{New: func() any { return new(segment.Frame) }}

// packer turns a batch's new chunks into segments, beside the goroutine that
// cuts and hashes: frames are compressed side by side, then sealed in order,
// and full segments are cut into shards.
type packer struct {
	profile format.Profile
	writer  *segment.Writer // only sealing uses it

	filling *frameJob
	free    chan *frameJob
	work    chan *frameJob // to be compressed
	order   chan *frameJob // to be sealed
	done    chan struct{}

	// What sealing made; read when it is done.
	places   []packed
	segments []batch.Segment
	err      error
}

func newPacker(w *segment.Writer, p format.Profile) *packer {
	return &packer{
		profile: p, writer: w,
		free: make(chan *frameJob, framesAhead), work: make(chan *frameJob, framesAhead),
		order: make(chan *frameJob, framesAhead), done: make(chan struct{}),
	}
}

// start starts the goroutines: not before there is something to pack, because
// many batches have nothing that is new.
func (k *packer) start() {
	for range framesAhead {
		k.free <- &frameJob{frames.Get().(*segment.Frame), make(chan struct{}, 1)}
	}
	for range max(2, runtime.GOMAXPROCS(0)) {
		go func() {
			for j := range k.work {
				j.Compress()
				j.compressed <- struct{}{}
			}
		}()
	}
	go k.sealAll()
	k.filling = <-k.free
}

// add packs a chunk. It copies it. Chunks are numbered in this order, from 0.
func (k *packer) add(chunk []byte) {
	if k.filling == nil {
		k.start()
	}
	if !k.filling.Fits(len(chunk)) {
		k.next()
		k.filling = <-k.free
	}
	k.filling.Add(chunk)
}

func (k *packer) next() {
	k.work <- k.filling
	k.order <- k.filling
}

// sealAll seals frames in the order in which they were filled.
func (k *packer) sealAll() {
	defer close(k.done)
	for j := range k.order {
		<-j.compressed
		if k.err == nil {
			first := k.writer.AddFrame(j.Frame)
			for i := range j.Chunks() {
				k.places = append(k.places, packed{len(k.segments), first + i})
			}
			if k.writer.Bytes() >= segmentBytes {
				k.err = k.finishSegment()
			}
		}
		j.Reset()
		k.free <- j
	}
	if k.err == nil && k.writer.Chunks() > 0 {
		k.err = k.finishSegment()
	}
}

func (k *packer) finishSegment() error {
	sealed := k.writer.Finish()
	defer k.writer.Recycle(sealed.Payload)
	if len(k.segments) == 0 && len(sealed.Payload) <= inlineBytes {
		k.segments = []batch.Segment{{Row: sealed.Row(k.profile, batch.InlineHere), Inline: bytes.Clone(sealed.Payload)}}
		return nil
	}
	shards, err := sealed.Shards(k.profile)
	if err != nil {
		return err
	}
	k.segments = append(k.segments, batch.Segment{Row: sealed.Row(k.profile, 0), Shards: shards})
	return nil
}

// finish waits until all is sealed and returns the segments, and for each chunk
// where it is.
func (k *packer) finish() ([]batch.Segment, []packed, error) {
	if k.filling == nil {
		return nil, nil, nil
	}
	k.next()
	close(k.work)
	close(k.order)
	<-k.done
	for range framesAhead {
		frames.Put((<-k.free).Frame)
	}
	return k.segments, k.places, k.err
}
