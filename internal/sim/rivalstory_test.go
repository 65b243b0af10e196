package sim

import (
	"fmt"
	"math/rand/v2"
	"os"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/pipeline"
)

// tellOfTwo runs a story of two hosts, in a world without chance. When it begins,
// host a is at work, and all is on the stores.
func tellOfTwo(t *testing.T, stores int, story func(r *rivals)) {
	t.Helper()
	defer guard(1, ", in "+t.Name())()
	synctest.Test(t, func(t *testing.T) {
		r := newRivals(t, 1, &plant{adjust: func(p *plan) {
			*p = plan{disks: 1, quota: 1 << 20, stores: stores, volumes: []int64{256 << 10}, device: []bool{false}, whenFull: pipeline.WhenFullHold,
				rpo: time.Second, clients: 1, maxWrite: 64 << 10, steps: 1}
		}})
		r.isNew = true
		if *verbose {
			r.a.log = os.Stderr
		}
		defer func() {
			if x := recover(); x != nil {
				for _, h := range r.hosts() {
					h.vanish()
				}
				f, ok := x.(failure)
				if !ok {
					panic(x)
				}
				t.Fatal(f.text)
			}
		}()
		r.start(r.a, false)
		r.awaitStart(r.a)
		r.write(r.a, 1)
		r.settle(r.a)
		story(r)
	})
}

// The host in office gets an entry onto one store only, which is no majority, and is
// then replaced by one that fences it on the others. That entry is no history, nor
// will it ever be: the new host must not take it for some, though it can be read.
func TestStory_AnEntryThatAMinorityHasIsNotTakenOver(t *testing.T) {
	tellOfTwo(t, 2, func(r *rivals) {
		r.a.faulty.Store(true)
		r.second()
		r.a.stores[0].is("full") // it has two votes of three
		r.write(r.a, 2)
		for _, s := range r.a.stores {
			s.is("down")
		}
		r.b.faulty.Store(true)
		r.b.stores[1].is("full")
		r.look()
		end := uint64(len(r.chain.decided))
		if r.chain.newest[1] != end+1 {
			r.a.failf("the story is another one: %d entries are decided, and store 1 has entry %d", end, r.chain.newest[1])
		}
		r.start(r.b, true)
		r.awaitStart(r.b)
		r.look()
		if !r.b.up {
			r.b.failf("b does not start")
		}
		for _, h := range r.hosts() {
			h.faulty.Store(false)
			for _, s := range h.stores {
				s.clear()
			}
		}
		r.write(r.b, 3)
		r.settle(r.b)
		r.lookAtHistory("in the end", 0)
		r.b.lookAtVolumes(r.b.l)
		if r.chain.author(r.chain.decided[end].author) != r.b.world {
			r.b.failf("entry %d, which was not decided when b took over, is a's", end+1)
		}
		for range 300 {
			time.Sleep(time.Second)
			r.look()
		}
		if !r.a.fenced {
			r.a.failf("a is not fenced")
		}
		r.stop(r.a)
		r.stop(r.b)
	})
}

// The power of a host that has taken over is cut, and may take what it has saved of
// its progress without a sync. It still knows what it has taken over: it comes back
// unasked, and goes on behind that.
func TestStory_APowerCutAfterATakeover(t *testing.T) {
	tellOfTwo(t, 1, func(r *rivals) {
		r.stop(r.a)
		r.second()
		r.start(r.b, true)
		r.awaitStart(r.b)
		for k := range 8 {
			if !r.b.up {
				r.b.failf("it does not come back after power cut %d", k)
			}
			if k%2 == 1 {
				r.write(r.b, 10+k)
				r.settle(r.b)
			}
			r.b.l.die()
			r.b.host, r.b.cut = r.b.host.crash(rand.New(rand.NewPCG(1, uint64(k))), fmt.Sprint("boot ", k, " of b")), true
			r.b.l.bury()
			r.b.l = nil
			r.start(r.b, false)
			r.awaitStart(r.b)
		}
		r.write(r.b, 20)
		r.settle(r.b)
		r.lookAtHistory("in the end", 0)
		r.b.lookAtVolumes(r.b.l)
		r.stop(r.b)
	})
}

// A host logs while a store is down, and is lost before it has brought what that store
// lacks: its buffer was the only place that had it. The one that takes over makes it
// again, and then any store may be lost.
func TestStory_WhatTheLostHostStillHadToBring(t *testing.T) {
	tellOfTwo(t, 3, func(r *rivals) {
		r.second()
		r.a.faulty.Store(true)
		r.a.stores[2].is("down")
		data := make([]byte, 200<<10) // too much for the log
		_, _ = rand.NewChaCha8([32]byte{1}).Read(data)
		r.writeData(r.a, 0, data)
		for k := 0; r.lookAt(r.a).Logged < r.a.acked.load(); k++ {
			if k == 600 {
				r.a.failf("ten minutes later it is not logged: %+v", r.lookAt(r.a))
			}
			time.Sleep(time.Second)
		}
		if !r.lookAt(r.a).Exposed {
			r.a.failf("the story is another one: no shard is missing")
		}
		r.a.l.die()
		r.a.l.bury()
		r.a.l, r.a.up = nil, false

		r.start(r.b, true)
		r.awaitStart(r.b)
		if !r.b.up {
			r.b.failf("b does not start")
		}
		for k := 0; r.lookAt(r.b).Exposed; k++ {
			if k == 600 {
				r.b.failf("ten minutes after the takeover shards are missing still: %+v", r.lookAt(r.b))
			}
			time.Sleep(time.Second)
		}
		for lost := range 3 {
			r.lookAtHistory("after the takeover", lost, lost)
		}
		r.write(r.b, 3)
		r.settle(r.b)
		r.b.lookAtVolumes(r.b.l)
		r.stop(r.b)
	})
}
