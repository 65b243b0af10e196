package vbuf

import "drc/internal/block"

// queue is a ring of consecutive writes, oldest first.
type queue struct {
	ring []pendingWrite // its length is a power of two
	head int
	n    int
	from block.Seq // of the oldest
}

type pendingWrite struct {
	w             block.Write
	sum           uint32 // of its record, once written
	promisedBytes int64  // the room for it in the files, until it is written
}

// reset empties the queue; next is the first to come.
func (q *queue) reset(next block.Seq) {
	clear(q.ring)
	q.head, q.n, q.from = 0, 0, next
}

func (q *queue) push(w block.Write) {
	if q.n == 0 {
		q.from = w.Seq
	}
	if q.n == len(q.ring) {
		ring := make([]pendingWrite, max(64, 2*len(q.ring)))
		for i := range q.n {
			ring[i] = q.ring[(q.head+i)&(len(q.ring)-1)]
		}
		q.ring, q.head = ring, 0
	}
	q.ring[(q.head+q.n)&(len(q.ring)-1)] = pendingWrite{w: w}
	q.n++
}

// at returns the write seq, which must be there.
func (q *queue) at(seq block.Seq) *pendingWrite {
	i := int(seq - q.from)
	if seq < q.from || i >= q.n {
		panic("vbuf: the write asked for is not pending")
	}
	return &q.ring[(q.head+i)&(len(q.ring)-1)]
}

// pop forgets the oldest.
func (q *queue) pop() {
	q.ring[q.head] = pendingWrite{}
	q.head = (q.head + 1) & (len(q.ring) - 1)
	q.n--
	q.from++
}
