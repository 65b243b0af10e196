package grouplog_test

import (
	"fmt"
	"slices"
	"testing"

	"pgregory.net/rapid"

	"drc/internal/format"
	"drc/internal/grouplog"
)

// The model: some writers, each with an epoch of its own, some stores, and puts
// that are under way for any length of time. A writer follows docs/FORMAT.md,
// "The log"; the checker knows nothing of acceptors and Choose, only the
// objects in the logs and the definition of "decided".

// inFlight is a put on its way to a store; it lands whenever the run says so,
// or never.
type inFlight struct {
	store int
	o     format.LogObject
}

type writer struct {
	e       format.Epoch
	logs    []*storeLog
	set     grouplog.StoreSet
	read    []grouplog.Acceptor // what it has read of each store
	at      []uint64            // index of the next object to read
	fenced  []bool
	settled bool
	n       uint64 // entry it wants decided, or has decided
	value   []byte
	done    bool // n is decided
}

func newWriter(number uint64, logs []*storeLog, set grouplog.StoreSet) *writer {
	w := &writer{e: epoch(number), logs: logs, set: set, read: make([]grouplog.Acceptor, len(logs)),
		at: make([]uint64, len(logs)), fenced: make([]bool, len(logs))}
	for i := range logs {
		w.read[i].Store = logs[i].Store
	}
	return w
}

// look reads a store's log to its end.
func (w *writer) look(store int) {
	for ; w.at[store] < uint64(len(w.logs[store].objects)); w.at[store]++ {
		o := w.logs[store].objects[w.at[store]]
		if err := w.read[store].Add("log", o, stored(o)); err != nil {
			panic(err)
		}
	}
	if w.e.Less(w.read[store].Promised) {
		w.fenced[store] = true
	}
}

func (w *writer) promised(store int) bool {
	return !w.fenced[store] && w.read[store].Promised == w.e
}

func (w *writer) holds(store int) bool {
	a, ok := w.read[store].Entry(w.n)
	return ok && !w.fenced[store] && a.Epoch == w.e && a.Hash == format.HashOf(w.value)
}

func (w *writer) majority(in func(store int) bool) bool {
	votes := 0
	for i := range w.logs {
		if in(i) {
			votes += w.set[i].Votes
		}
	}
	return w.set.Majority(votes)
}

// step decides what it can, and returns what it wants put to a store, if
// anything.
func (w *writer) step(store int) (inFlight, bool) {
	w.look(store)
	if w.fenced[store] {
		return inFlight{}, false
	}
	send := func(kind format.LogKind, value []byte) (inFlight, bool) {
		l := &w.read[store]
		return inFlight{store, format.LogObject{Kind: kind, Group: theGroup, Store: l.Store, Index: l.Next, Previous: l.Last, Epoch: w.e, Value: value}}, true
	}
	if w.read[store].Promised != w.e {
		return send(format.LogPromise, nil)
	}
	if !w.settled {
		if !w.majority(w.promised) {
			return inFlight{}, false
		}
		w.settle()
	}
	if w.n > 0 && !w.done && w.majority(w.holds) {
		w.done = true
	}
	if w.done || w.n == 0 {
		w.n++
		w.value = plainValue(w.n, fmt.Sprintf("by %d", w.e.Number))
		w.done = false
	}
	if w.holds(store) {
		return inFlight{}, false
	}
	return send(format.LogCommit, w.value)
}

// settle takes over what the stores that promised say, each as it was read.
func (w *writer) settle() {
	w.settled = true
	best := format.Epoch{}
	for i := range w.logs {
		if !w.promised(i) {
			continue
		}
		for n := w.n; n <= w.read[i].Latest.N; n++ {
			a, ok := w.read[i].Entry(n)
			if !ok || n == 0 || (n == w.n && a.Epoch.Less(best)) {
				continue
			}
			w.n, best = n, a.Epoch
			w.value = w.logs[i].objects[a.Index].Value
		}
	}
}

// decidedValues is the checker: by the definition, over the objects as they lie
// in the logs, for every n the values that were decided at any time.
func decidedValues(logs []*storeLog, set grouplog.StoreSet) map[uint64][]string {
	type ballot struct {
		n     uint64
		e     format.Epoch
		value string
	}
	votes := map[ballot]int{}
	for i, l := range logs {
		mine := map[ballot]bool{}
		for j, o := range l.objects {
			late := slices.ContainsFunc(l.objects[:j], func(before format.LogObject) bool { return before.Epoch.Compare(o.Epoch) > 0 })
			if o.Kind != format.LogCommit || late {
				continue
			}
			v, _, _, _, err := format.DecodeValue("value", o.Value)
			if err != nil {
				panic(err)
			}
			mine[ballot{v.N, o.Epoch, string(o.Value)}] = true
		}
		for b := range mine {
			votes[b] += set[i].Votes
		}
	}
	all := 0
	for _, s := range set {
		all += s.Votes
	}
	out := map[uint64][]string{}
	for b, v := range votes {
		if 2*v > all && !slices.Contains(out[b.n], b.value) {
			out[b.n] = append(out[b.n], b.value)
		}
	}
	return out
}

// TestModel_NeverTwoValuesForOneEntry runs writers against each other, with
// puts that arrive in any order, late, or not at all.
func TestModel_NeverTwoValuesForOneEntry(t *testing.T) {
	decidedSomething, contested := 0, 0
	rapid.Check(t, func(rt *rapid.T) {
		logs, set, accs := stores(rapid.SampledFrom([]int{1, 2, 3, 5}).Draw(rt, "stores"))
		writers := []*writer{newWriter(1, logs, set)}
		limit := rapid.IntRange(2, 3).Draw(rt, "writers")
		var flying []inFlight
		known := map[uint64]string{}
		for range rapid.IntRange(10, 120).Draw(rt, "steps") {
			switch action := rapid.IntRange(0, 9).Draw(rt, "action"); {
			case action < 5:
				w := writers[rapid.IntRange(0, len(writers)-1).Draw(rt, "writer")]
				if p, ok := w.step(rapid.IntRange(0, len(logs)-1).Draw(rt, "store")); ok {
					flying = append(flying, p)
				}
			case action < 9 && len(flying) > 0:
				// A put lands, and stays in flight: it may be repeated.
				i := rapid.IntRange(0, len(flying)-1).Draw(rt, "put")
				logs[flying[i].store].put(flying[i].o)
				if rapid.Bool().Draw(rt, "answered") {
					flying = slices.Delete(flying, i, i+1)
				}
			case action == 9 && len(writers) < limit:
				writers = append(writers, newWriter(uint64(len(writers)+1), logs, set))
			}
			for n, values := range decidedValues(logs, set) {
				if len(values) > 1 {
					rt.Fatalf("entry %d: %d values are decided", n, len(values))
				}
				if old, ok := known[n]; ok && old != values[0] {
					rt.Fatalf("entry %d was decided as another value before", n)
				}
				known[n] = values[0]
				// What the code finds agrees with the definition.
				if c := grouplog.Choose(set, accs, n); !c.Known || c.Hash != format.HashOf([]byte(values[0])) {
					rt.Fatalf("entry %d: %+v is chosen over the decided value", n, c)
				}
				if _, ok := known[n-1]; n > 1 && !ok {
					rt.Fatalf("entry %d is decided before entry %d", n, n-1)
				}
			}
			for n := range grouplog.Highest(accs) {
				if c := grouplog.Choose(set, accs, n+1); c.Decided && known[n+1] == "" {
					rt.Fatalf("entry %d is called decided and is not", n+1)
				}
			}
			// What a writer believes is true.
			for _, w := range writers {
				if w.done && known[w.n] != string(w.value) {
					rt.Fatalf("writer %d believes that its entry %d is decided", w.e.Number, w.n)
				}
			}
		}
		if len(known) > 0 {
			decidedSomething++
		}
		if slices.ContainsFunc(writers, func(w *writer) bool { return slices.Contains(w.fenced, true) }) {
			contested++
		}
	})
	if decidedSomething < 10 || contested < 5 {
		t.Errorf("the model is too weak: %d runs decided something, %d fenced somebody", decidedSomething, contested)
	}
}

// TestModel_ARuleLeftOutIsFound proves that the checker can see two histories:
// each case breaks one rule, as docs/FORMAT.md tells.
func TestModel_ARuleLeftOutIsFound(t *testing.T) {
	for name, run := range map[string]func(s []*storeLog){
		"the value of a lower epoch is adopted": func(s []*storeLog) {
			s[0].commit(1, 1, "v")
			s[1].promise(2)
			s[2].promise(2)
			s[1].commit(2, 1, "w")
			s[2].commit(2, 1, "w")
			s[0].promise(3)
			s[1].promise(3)
			s[0].commit(3, 1, "v")
			s[1].commit(3, 1, "v")
		},
		"read before the promise, not up to it": func(s []*storeLog) {
			s[0].commit(1, 1, "v") // lands after writer 2 has read, before its promise
			s[1].commit(1, 1, "v")
			s[0].promise(2)
			s[1].promise(2)
			s[0].commit(2, 1, "w")
			s[1].commit(2, 1, "w")
		},
	} {
		logs, set, _ := stores(3)
		run(logs)
		if len(decidedValues(logs, set)[1]) != 2 {
			t.Errorf("%s: two histories are not seen", name)
		}
	}
}
