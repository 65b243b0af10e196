package restorer_test

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/internal/object/mem"
	"drc/restorer"
)

// everyKind makes a history with objects of every kind: promises, entries,
// inline and referenced manifests, inline and sharded segments, merged ones.
func everyKind(t *testing.T, stores int) *world {
	t.Helper()
	return forked(t, fmt.Sprint("every kind ", stores), func() *world {
		w := newWorld(t, options{stores: stores, volumes: []int64{4 << 20}})
		x := w.start()
		w.write(0, 0, fill(w.rng, make([]byte, 300<<10)))
		w.cut()
		for i := range int64(3400) { // too many extents for an inline manifest
			w.write(0, 512<<10+1024*i, fill(w.rng, make([]byte, 512)))
		}
		w.cut()
		for range 4 {
			w.random(4 << 10)
			w.cut()
		}
		x.stop()
		h := w.history()
		w.merge(h, 3, 5, nil)
		return w
	})
}

// read opens the repository anew and reads the newest image whole, into the
// world's buffer.
func (w *world) read(stores ...object.Store) ([]byte, *restorer.History, error) {
	h, err := restorer.OpenHistory(w.ctx, w.config(stores...), w.groupID)
	if err != nil {
		return nil, nil, err
	}
	im, err := restorer.OpenImage(w.ctx, h, "v0", "latest")
	if err != nil {
		return nil, h, err
	}
	got := w.buffer(im.Geometry().SizeBytes)
	return got, h, im.ReadAt(w.ctx, got, 0)
}

// Whatever is done to any one object, what is read is right, or an error that
// says what is damaged. With more than one store it is right.
func TestDamage_OfAnyOneObject(t *testing.T) {
	for stores := 1; stores <= 3; stores++ {
		t.Run(string(rune('0'+stores)), func(t *testing.T) {
			t.Parallel()
			w := everyKind(t, stores)
			want := w.model(0, block.Seq(len(w.journal.writes)))
			if len(names(t, w.stores[0], format.ManifestPrefix(w.groupID, w.group.Branch))) < 2 {
				t.Fatal("no manifest is an object")
			}
			changes := map[string]func(p []byte) []byte{
				"first byte": func(p []byte) []byte { p[0] ^= 1; return p },
				"last byte":  func(p []byte) []byte { p[len(p)-1] ^= 0x80; return p },
				"any bit":    func(p []byte) []byte { n := w.rng.IntN(len(p) * 8); p[n/8] ^= 1 << (n % 8); return p },
				"another":    func(p []byte) []byte { n := w.rng.IntN(len(p) * 8); p[n/8] ^= 1 << (n % 8); return p },
				"truncated":  func(p []byte) []byte { return p[:w.rng.IntN(len(p))] },
				"empty":      func([]byte) []byte { return nil },
				"longer":     func(p []byte) []byte { return append(p, 0) },
			}
			kinds := map[string]int{}
			seen := map[string]int{}
			for i, s := range w.stores {
				for _, name := range names(t, s, format.GroupsPrefix) {
					// The first of each kind in each store is damaged in
					// several ways, the others in one of them.
					kind := fmt.Sprint(i, strings.Split(name, "/")[2])
					several := seen[kind] < scaled(1, 1<<20)
					seen[kind]++
					whole, _, err := s.Get(w.ctx, name, 1<<30, nil)
					w.must(err)
					tried := 0
					for change, f := range changes { // in random order
						if tried++; tried > 5-stores || (!several && tried > 1) {
							break
						}
						if !several && w.rng.IntN(2) == 0 {
							break // this one goes missing
						}
						s.Tamper(name, func(p []byte) []byte { return f(slices.Clone(whole)) })
						w.damaged(i, name, change, want, kinds)
					}
					w.must(s.Delete(w.ctx, name))
					if several || tried == 1 {
						w.damaged(i, name, "missing", want, kinds)
					}
					_, err = s.Put(w.ctx, name, whole)
					w.must(err)
				}
			}
			t.Logf("found and worked around or reported: %v", kinds)
			for _, kind := range []string{"log", "manifests", "segments"} {
				if kinds[kind] == 0 {
					t.Errorf("no damage of %s was found", kind)
				}
			}
		})
	}
}

// damaged reads everything and checks that the damage to an object is found or
// does not matter.
func (w *world) damaged(store int, name, change string, want []byte, kinds map[string]int) {
	w.t.Helper()
	kind := strings.Split(name, "/")[2]
	got, h, err := w.read()
	var corrupt *format.CorruptError
	switch {
	case err != nil && (len(w.stores) > 1 || !errors.As(err, &corrupt)):
		w.t.Fatalf("%s (%s): %v", name, change, err)
	case err != nil:
		kinds[kind]++
		return
	case kind == "log" && h.Unconfirmed() && isLast(w, store, name) && (change == "missing"):
		// The last object of a log went without a trace in any other store: a
		// shorter history, which is a true one.
		w.same(name, got, w.model(0, h.Newest().Range.To))
		return
	}
	if end := h.Newest().Range.To; len(w.stores) == 1 && kind == "log" && change == "missing" {
		w.same(name, got, w.model(0, end))
		return
	}
	w.same(name+" ("+change+")", got, want)
	d := h.Damage()
	if kind == "log" && change != "missing" && len(d) == 0 {
		w.t.Fatalf("%s (%s): the damage was not noticed", name, change)
	}
	for _, x := range d {
		if x.Object != name || x.Store != w.stores[store].URL() {
			w.t.Fatalf("%s (%s) is damaged, and found was %s", name, change, x)
		}
		kinds[kind]++
	}
}

func isLast(w *world, store int, name string) bool {
	all := names(w.t, w.stores[store], format.LogPrefix(w.groupID))
	return len(all) == 0 || name >= all[len(all)-1]
}

// With any m shards of every segment gone, everything is read; with one more
// the error says which objects are missing, and nothing wrong is returned.
func TestDamage_AnyParityOfShards(t *testing.T) {
	t.Parallel()
	for stores := 1; stores <= 3; stores++ {
		w := newWorld(t, options{stores: stores, volumes: []int64{3 << 20}})
		x := w.start()
		for range 6 {
			w.write(0, 512*w.rng.Int64N(2000), fill(w.rng, make([]byte, 512*(1+w.rng.IntN(2000)))))
			w.cut()
		}
		x.stop()
		want := w.model(0, block.Seq(len(w.journal.writes)))
		for round := range 12 {
			copies := make([]*mem.Store, stores)
			shards := map[string][]string{}
			for i, s := range w.stores {
				copies[i] = s.Clone()
				for _, name := range names(t, s, format.GroupPrefix(w.groupID)+"segments/") {
					shards[name[:len(name)-3]] = append(shards[name[:len(name)-3]], name)
				}
			}
			m := w.repo.Profile().Parity
			if round >= 8 {
				m++
			}
			lost := 0
			for _, list := range shards {
				w.rng.Shuffle(len(list), func(i, j int) { list[i], list[j] = list[j], list[i] })
				for _, name := range list[:m] {
					lost++
					for _, s := range copies {
						w.must(s.Delete(w.ctx, name))
					}
				}
			}
			if lost == 0 {
				t.Fatal("nothing was lost")
			}
			var list []object.Store
			for _, s := range copies {
				list = append(list, s)
			}
			got, _, err := w.read(list...)
			if round < 8 {
				w.must(err)
				w.same("read without parity", got, want)
				continue
			}
			var corrupt *format.CorruptError
			if !errors.As(err, &corrupt) || !strings.Contains(err.Error(), "segments/") || !strings.Contains(err.Error(), "missing") {
				t.Fatalf("with one shard too few: %v", err)
			}
		}
	}
}

// Any one store can be gone, dead or hanging.
func TestDamage_AnyOneStore(t *testing.T) {
	t.Parallel()
	for stores := 2; stores <= 3; stores++ {
		w := everyKind(t, stores)
		want := w.model(0, block.Seq(len(w.journal.writes)))
		for lost := range stores {
			var given []object.Store
			for i, f := range w.faults {
				if i != lost {
					given = append(given, f)
				}
			}
			got, h, err := w.read(given...)
			w.must(err)
			w.same("a store not given", got, want)
			// With two stores the first one decides; whether the other one has
			// heard of it depends on which of them answered the writer first.
			if h.Unconfirmed() && (stores != 2 || lost != 0) {
				t.Fatalf("%d stores, store %d lost: unconfirmed is %v", stores, lost, h.Unconfirmed())
			}
			// It dies while reading, and is asked only a few times.
			f := w.faults[lost]
			h = w.history()
			im, err := restorer.OpenImage(w.ctx, h, "v0", "latest")
			w.must(err)
			f.Add(fault.Rule{Before: fault.ErrInjected})
			f.Forget()
			w.must(restorer.Compare(w.ctx, im, bytes.NewReader(want)))
			if n := f.Count("", "*"); n > 40 {
				t.Fatalf("a dead store was asked %d times", n)
			}
			f.Clear()
		}
	}
}

// Objects of a log that is damaged in one store have no say, and the others
// go on deciding: the warning names the object.
func TestDamage_OneLogHasNoSay(t *testing.T) {
	w := everyKind(t, 3)
	name := format.LogName(w.groupID, 3)
	w.stores[1].Tamper(name, func(p []byte) []byte { p[100] ^= 4; return p })
	_, h, err := w.read()
	w.must(err)
	if h.Unconfirmed() || len(h.Warnings) != 1 || !strings.Contains(h.Warnings[0], name) {
		t.Fatalf("unconfirmed %v, warnings %v", h.Unconfirmed(), h.Warnings)
	}
	// A hole, and with it a store that was rolled back to before its end.
	w.must(w.stores[2].Delete(w.ctx, name))
	_, h, err = w.read()
	w.must(err)
	if len(h.Warnings) < 2 || !strings.Contains(strings.Join(h.Warnings, "\n"), "mem:c "+name) {
		t.Fatalf("unconfirmed %v, warnings %v", h.Unconfirmed(), h.Warnings)
	}
}

// A store that was rolled back is found out by what other stores know of it.
func TestDamage_StoreRolledBack(t *testing.T) {
	w := newWorld(t, options{stores: 3})
	x := w.start()
	for range 10 {
		w.random(4 << 10)
		w.cut()
		w.must(x.everywhere(w.ctx)) // so that each store's log knows the others
	}
	x.stop()
	log := names(t, w.stores[0], format.LogPrefix(w.groupID))
	for _, name := range log[len(log)-3:] {
		w.must(w.stores[0].Delete(w.ctx, name))
	}
	h := w.history()
	if h.Unconfirmed() || len(h.Warnings) != 1 || !strings.Contains(h.Warnings[0], "rolled back") {
		t.Fatalf("unconfirmed %v, warnings %v", h.Unconfirmed(), h.Warnings)
	}
	w.check(h)
}

// Where every log is damaged the history cannot be trusted; asked to salvage,
// what there is before the damage is used, and is right.
func TestDamage_Salvage(t *testing.T) {
	w := newWorld(t, options{stores: 1})
	x := w.start()
	for range 10 {
		w.random(4 << 10)
		w.cut()
	}
	x.stop()
	w.stores[0].Tamper(format.LogName(w.groupID, 7), func(p []byte) []byte { return p[:50] })
	cfg := w.config()
	_, err := restorer.OpenHistory(w.ctx, cfg, w.groupID)
	var corrupt *format.CorruptError
	if !errors.As(err, &corrupt) || !strings.Contains(err.Error(), format.LogName(w.groupID, 7)) {
		t.Fatalf("a damaged log: %v", err)
	}
	cfg.Salvage = true
	h, err := restorer.OpenHistory(w.ctx, cfg, w.groupID)
	w.must(err)
	if int(h.N()) < 5 {
		t.Fatalf("%d entries", int(h.N()))
	}
	w.check(h)
}

// Bytes that change on the way, once, do no harm.
func TestDamage_OnTheWay(t *testing.T) {
	t.Parallel()
	w := everyKind(t, 3)
	want := w.model(0, block.Seq(len(w.journal.writes)))
	h := w.history()
	for range 30 {
		im, err := restorer.OpenImage(w.ctx, h, "v0", "latest")
		w.must(err)
		f := w.faults[w.rng.IntN(3)]
		f.Add(fault.Rule{Op: fault.GetRange, Skip: w.rng.IntN(10), Times: 2, Alter: fault.FlipBit(w.rng.IntN(1 << 20))})
		f.Add(fault.Rule{Op: fault.GetRange, Skip: w.rng.IntN(10), Times: 2, Before: io.ErrUnexpectedEOF})
		w.must(restorer.Compare(w.ctx, im, bytes.NewReader(want)))
		f.Clear()
	}
}

// A store outage shorter than the patience is waited for.
func TestDamage_OutageIsWaitedFor(t *testing.T) {
	w := newWorld(t, options{stores: 1})
	x := w.start()
	w.write(0, 0, fill(w.rng, make([]byte, 300<<10)))
	w.cut()
	x.stop()
	cfg := w.config()
	cfg.Patience = time.Minute
	h, err := restorer.OpenHistory(w.ctx, cfg, w.groupID)
	w.must(err)
	w.faults[0].Add(fault.Rule{Times: 12, Before: fault.ErrInjected})
	im, err := restorer.OpenImage(w.ctx, h, "v0", "latest")
	w.must(err)
	w.must(restorer.Compare(w.ctx, im, bytes.NewReader(w.model(0, 1))))
}
