package replay

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/vfs"
	"drc/restorer"
)

// written writes a redo file with changes of two copies and returns it, and the changes
// as text.
func written(t testing.TB, rng *rand.Rand, step block.ID) (raw []byte, want []string) {
	t.Helper()
	m := vfs.NewMem()
	if err := m.MkdirAll("/d"); err != nil {
		t.Fatal(err)
	}
	h := redoHeader{group: block.GroupID{1}, step: step, moves: []move{
		{block.ID{2}, position{Entry: 3, Hash: format.Hash{4}}, position{5, format.Hash{6}, 7, time.Unix(8, 9)}},
		{block.ID{10}, position{}, position{5, format.Hash{6}, 7, time.Unix(8, 9)}},
	}}
	touched := 0
	w, err := beginRedo(m, "/d", "/d/redo", h, func(int, block.Extent) { touched++ })
	if err != nil {
		t.Fatal(err)
	}
	at := int64(0)
	for i := range 5 {
		var changes []restorer.Change
		for range rng.IntN(4) {
			c := restorer.Change{Extent: block.Extent{Off: at, Len: 1 + rng.Int64N(1500)}, Zero: rng.IntN(3) == 0}
			if !c.Zero {
				c.Data = make([]byte, c.Len)
				for j := range c.Data {
					c.Data[j] = byte(rng.Uint32())
				}
			}
			at = c.End() + rng.Int64N(1000)
			changes = append(changes, c)
			want = append(want, fmt.Sprint(i%2, c))
		}
		if err := w.add(i%2, changes); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.finish(); err != nil {
		t.Fatal(err)
	}
	if touched != len(want) {
		t.Fatalf("%d changes, of which %d were told", len(want), touched)
	}
	raw, err = vfs.ReadFile(m, "/d/redo", 1<<30)
	if err != nil {
		t.Fatal(err)
	}
	return raw, want
}

// read opens a redo file with these bytes and returns its changes as text.
func read(t testing.TB, raw []byte) (h redoHeader, got []string, err error) {
	t.Helper()
	m := vfs.NewMem()
	f, err := m.Create("/redo")
	if err == nil && len(raw) > 0 {
		_, err = f.WriteAt(raw, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	r, err := openRedo(m, "/redo")
	if err != nil {
		return h, nil, err
	}
	err = r.each(func(i int, c restorer.Change) error {
		c.Data = bytes.Clone(c.Data)
		got = append(got, fmt.Sprint(i, c))
		return nil
	})
	return r.redoHeader, got, errors.Join(err, r.close())
}

func TestRedo_ReadsWhatWasWritten(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 50 {
		step := block.NewID()
		raw, want := written(t, rng, step)
		h, got, err := read(t, raw)
		if err != nil || fmt.Sprint(got) != fmt.Sprint(want) {
			t.Fatalf("%v\n%v\n%v", err, got, want)
		}
		if h.step != step || len(h.moves) != 2 || h.moves[0].from.Entry != 3 || h.moves[1].to.Seq != 7 || !h.moves[0].to.Time.Equal(time.Unix(8, 9)) {
			t.Fatalf("%+v", h)
		}
	}
}

// A file that was cut short, of which a bit is another one, or that has parts of an
// earlier step in it, holds no step.
func TestRedo_NothingIsTakenForAWholeStep(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 4))
	var before []byte
	for round := range 40 {
		raw, want := written(t, rng, block.NewID())
		for range 40 {
			if _, _, err := read(t, raw[:rng.IntN(len(raw))]); !errors.Is(err, errNoRedo) {
				t.Fatalf("a part of it: %v", err)
			}
			bad := bytes.Clone(raw)
			bad[rng.IntN(len(bad))] ^= 1 << rng.IntN(8)
			if _, got, err := read(t, bad); !errors.Is(err, errNoRedo) {
				t.Fatalf("a bit is another one: %v\n%v\n%v", err, got, want)
			}
			if round > 0 { // a power cut: sectors of the step before are there still
				torn := bytes.Clone(raw)
				n := min(len(torn), len(before))
				from := rng.IntN(n)
				to := from + rng.IntN(n-from)
				copy(torn[from:to], before[from:to])
				if _, got, err := read(t, torn); !errors.Is(err, errNoRedo) && fmt.Sprint(got) != fmt.Sprint(want) {
					t.Fatalf("%v\n%v\n%v", err, got, want)
				}
			}
		}
		before = raw
	}
}

func FuzzRedo(f *testing.F) {
	rng := rand.New(rand.NewPCG(5, 6))
	for range 3 {
		raw, _ := written(f, rng, block.ID{byte(rng.Uint32())})
		f.Add(raw)
	}
	f.Add([]byte(redoMagic))
	f.Fuzz(func(t *testing.T, raw []byte) {
		if _, _, err := read(t, raw); err != nil && !errors.Is(err, errNoRedo) {
			t.Fatal(err)
		}
	})
}

func TestMarks(t *testing.T) {
	rng := rand.New(rand.NewPCG(7, 8))
	const size = 40*markBytes + 512
	m, want := newMarks(size), make([]bool, size/512)
	for range 12 {
		e := block.Extent{Off: 512 * rng.Int64N(size/512)}
		e.Len = 512 * (1 + rng.Int64N(min(300, (size-e.Off)/512)))
		m.add(e)
		for at := e.Off / markBytes * markBytes; at < min(size, (e.End()+markBytes-1)/markBytes*markBytes); at += 512 {
			want[at/512] = true
		}
		o := newMarks(size)
		o.addAll(m)
		for at := int64(0); at < size; {
			part, marked := o.run(block.Extent{Off: at, Len: size - at})
			if part.Off != at || part.Len <= 0 || part.End() > size {
				t.Fatalf("%+v at %d", part, at)
			}
			for ; at < part.End(); at += 512 {
				if want[at/512] != marked {
					t.Fatalf("%d: %v", at, marked)
				}
			}
		}
	}
}

// The names of copies are apart from each other, and from the standby's own files.
func TestFileOf(t *testing.T) {
	seen := map[string]string{}
	for _, v := range []string{"a", "a b", "a/b", "a%2Fb", "..", ".", "drc-standby.json", "drc-x", "%64rc-x", "ü", "a\x00b", "a\nb"} {
		f := fileOf(v)
		if other, ok := seen[f]; ok {
			t.Errorf("%q and %q are both %q", v, other, f)
		}
		seen[f] = v
		for _, c := range f {
			if c == '/' || c < ' ' {
				t.Errorf("%q is %q", v, f)
			}
		}
		if f[0] == '.' || len(f) > 4 && f[:4] == "drc-" {
			t.Errorf("%q is %q", v, f)
		}
	}
}
