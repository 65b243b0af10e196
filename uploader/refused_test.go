package uploader_test

import (
	"context"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"drc/internal/format"
	"drc/internal/object/fault"
	"drc/internal/repo"
	"drc/uploader"
)

// torn has n objects that match pattern lie on store i with other bytes before
// they are put there, as if an earlier try had been cut short.
func (w *world) torn(i int, pattern string, n int64) {
	var done atomic.Int64
	w.faults[i].Add(fault.Rule{Op: fault.Put, Name: pattern, Hook: func(ctx context.Context, call fault.Call) error {
		if done.Add(1) <= n {
			_, err := w.stores[i].Put(ctx, call.Name, []byte("torn"))
			return err
		}
		return nil
	}})
}

// A shard in whose place other bytes lie can never be put there: its entry goes
// out without it, all that is behind it is put, and the state says so.
func TestRefused_AShardHoldsUpNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}})
		x := w.begin()
		w.torn(2, "*/segments/*", 1)
		w.noise(0, 0, 1<<20)
		w.cut()
		w.noise(0, 1<<20, 1<<20)
		w.cut()
		time.Sleep(time.Minute)
		if n := x.up.Logged(); n != 3 {
			t.Errorf("logged up to %s", n)
		}
		_, tries := x.spool.held()
		if st := x.up.Stats(); st.WaitingPuts != 0 || st.Degraded != 1 || tries != 1 {
			t.Errorf("%+v, %d batches in the buffer", st, tries)
		}
		if err := x.up.StoreDamage(2); err == nil || !strings.Contains(err.Error(), "/segments/") {
			t.Errorf("the store's damage is %v", err)
		}
		if since, err := x.up.StoreTrouble(2); !since.IsZero() {
			t.Errorf("the store is called down: %v", err)
		}
		if !x.log.Exposed(w.repo.Tolerates()) || x.up.Trouble() != nil {
			t.Errorf("exposed: %v, trouble: %v", x.log.Exposed(w.repo.Tolerates()), x.up.Trouble())
		}
		x.stop()
		w.check(w.history())
	})
}

// Where a segment cannot be placed at all, the agent says so, and what comes
// behind waits in the buffer, not in memory.
func TestRefused_TooManyShards(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{volumes: []int64{4 << 20}})
		w.memory = 1 << 20
		x := w.begin()
		w.torn(0, "*/segments/*", 2) // of 4+1
		for i := range int64(3) {
			w.noise(0, i<<20, 1<<20)
			w.cut()
			time.Sleep(time.Minute)
		}
		if err := x.up.Trouble(); err == nil || !strings.Contains(err.Error(), "4 are needed") {
			t.Errorf("trouble is %v", err)
		}
		if n := x.up.Logged(); n != 1 {
			t.Errorf("logged up to %s", n)
		}
		x.kill()
	})
}

// A manifest in whose place other bytes lie goes out under another name if it is
// on too few stores otherwise.
func TestRefused_AManifest(t *testing.T) {
	for _, stores := range []int{1, 2, 3} {
		synctest.Test(t, func(t *testing.T) {
			w := newWorld(t, options{stores: stores, volumes: []int64{4 << 20}})
			x := w.begin()
			w.torn(0, "*/manifests/*", 1)
			w.large()
			w.must(x.up.AwaitLogged(w.ctx, w.journal.Captured()))
			w.fill(20)
			x.stop()
			w.checkPoint(w.history(), "v0", "latest", w.model(0, w.journal.Captured()))
			if x.up.StoreDamage(0) == nil {
				t.Error("the store's damage is not told")
			}
		})
	}
}

// What is logged without all its shards is exposed until they are placed, also
// by a later start, and committed all the same: it survives the host.
func TestExposed_UntilHealed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}})
		x := w.begin()
		if x.log.Exposed(w.repo.Tolerates()) {
			t.Error("exposed from the beginning")
		}
		w.faults[2].Add(fault.Rule{Op: fault.Put, Name: "*/segments/*", Before: fault.ErrInjected})
		w.noise(0, 0, 1<<20)
		w.cut()
		w.must(x.up.AwaitCommitted(w.ctx, 0, 2))
		if !x.log.Exposed(w.repo.Tolerates()) {
			t.Error("two shards are on no store, and nothing is called exposed")
		}
		w.faults[2].Clear()
		w.must(x.up.AwaitIdle(w.ctx))
		if x.log.Exposed(w.repo.Tolerates()) {
			t.Error("still exposed with every shard in its place")
		}
		x.stop()

		shards, _ := x.spool.held()
		shard := shards[0]
		name := format.SegmentName(w.groupID, shard.Segment, format.ExpiryNone, shard.Index)
		w.must(w.stores[repo.ShardMember(shard.Segment, shard.Index, 3)].Delete(w.ctx, name))
		before := x
		x = w.start()
		back := w.down(0)
		x.inherit(before)
		if !x.log.Exposed(w.repo.Tolerates()) {
			t.Error("a shard that is to be healed is not called exposed")
		}
		back()
		w.must(x.up.AwaitIdle(w.ctx))
		if x.log.Exposed(w.repo.Tolerates()) {
			t.Error("still exposed after healing")
		}
		x.stop()
	})
}

// Shards of a batch that is not logged yet, and are lost in the buffer, are what
// the agent says to wait for.
func TestBuffer_LostAShard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, options{stores: 3, volumes: []int64{4 << 20}})
		w.memory = 1 << 20
		x := w.begin()
		back := w.down(0)
		for i := range int64(3) {
			w.noise(0, i<<20, 1<<20)
			w.cut()
			time.Sleep(time.Minute)
		}
		// The oldest batch is in the buffer, and the stores have none of it. Each
		// has the bytes of one shard at hand, of six.
		lost := map[uploader.Shard][]byte{}
		shards, _ := x.spool.held()
		for _, shard := range shards[:6] {
			lost[shard] = x.spool.take(shard)
		}
		back()
		time.Sleep(time.Hour)
		if err := x.up.Trouble(); err == nil || !strings.Contains(err.Error(), "from the buffer: no such shard") {
			t.Errorf("trouble is %v", err)
		}
		if n := x.up.Logged(); n != 1 {
			t.Errorf("logged up to %s without the shards", n)
		}
		for shard, data := range lost {
			x.spool.give(shard, data)
		}
		time.Sleep(time.Minute)
		if err := x.up.Trouble(); err != nil || x.up.Logged() != 4 {
			t.Errorf("trouble is %v, logged up to %s", err, x.up.Logged())
		}
		x.stop()
		w.check(w.history())
	})
}
