package sim

import (
	"flag"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"drc/internal/format"
	"drc/internal/jitter"
	"drc/internal/segment"
)

var (
	firstSeed = flag.Uint64("sim.seed", 1, "the first seed to run")
	seeds     = flag.Int("sim.seeds", defaultSeeds, "how many seeds to run")
	verbose   = flag.Bool("sim.v", false, "say all that happens")
	slow      = flag.Duration("sim.slow", 0, "name seeds that take longer")
)

func TestMain(m *testing.M) {
	// One goroutine at a time: a seed has to run the same way again, and the clock
	// of a bubble moves when nobody runs.
	runtime.GOMAXPROCS(1)
	// What all seeds share must not belong to the bubble of the first one.
	plain := make([]byte, 1000)
	if packed, c := segment.Compress(nil, plain); c != format.CompressionNone {
		if _, err := segment.Decompress(nil, packed, c, len(plain)); err != nil {
			panic(err)
		}
	}
	os.Exit(m.Run())
}

// outcome is what became of a seed.
type outcome struct {
	err    error
	digest uint64
	count  counts
	lines  []string
	plan   plan
}

// runSeed runs one seed in a bubble of its own.
func runSeed(t *testing.T, seed uint64, p *plant, keep bool) (o outcome) {
	t.Helper()
	defer guard(seed, p.what())()
	defer jitter.Fix(seed)()
	cryptotest.SetGlobalRandom(t, seed)
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, seed, p, nil)
		w.full = keep
		if *verbose {
			w.log = os.Stderr
		}
		o.plan = w.plan
		o.err = w.run()
		o.digest, o.count, o.lines = w.digest, w.count, w.lines
	})
	return o
}

// TestSim runs seeds, each of which must keep all promises. To look at one of them:
// make sim SEED=… SEEDS=1
func TestSim(t *testing.T) {
	var total counts
	began := time.Now()
	for seed := *firstSeed; seed < *firstSeed+uint64(*seeds); seed++ {
		start := time.Now()
		o := runSeed(t, seed, &plant{}, false)
		total.add(o.count)
		if took := time.Since(start); *slow > 0 && took > *slow {
			fmt.Printf("seed %d: %s\n\t%s\n", seed, took.Round(time.Millisecond), o.plan)
		}
		if o.err != nil {
			t.Errorf("seed %d: %v\n\t%s\n\tagain: make sim SEED=%d SEEDS=1", seed, o.err, o.plan, seed)
		}
	}
	t.Logf("%s; %s", total, time.Since(began).Round(time.Second))
	fmt.Println(total)
}

// TestReplay runs seeds twice: what happens must be the same, at the same times, to
// the last put. While stores or disks fail this cannot be asked for: several goroutines
// then wait for the same moment to try again, and Go's scheduler says who comes first;
// the same holds for who makes the operation at which a machine goes down. Nor can it
// be asked for of every seed: the scheduler takes the processor from who has had it
// for ten milliseconds on the wall's clock, wherever he stands.
func TestReplay(t *testing.T) {
	calm := &plant{adjust: func(p *plan) {
		p.storeErrors, p.storms, p.flood, p.sudden, p.diskFaults, p.badBackings = 0, false, false, false, false, false
	}}
	var differ []string
	for seed := uint64(1); seed <= replays; seed++ {
		a, b := runSeed(t, seed, calm, true), runSeed(t, seed, calm, true)
		if a.err != nil || b.err != nil {
			t.Errorf("seed %d: %v, %v", seed, a.err, b.err)
		}
		if a.digest == b.digest || raceEnabled {
			continue // the race detector has the scheduler draw lots
		}
		slices.Sort(a.lines)
		slices.Sort(b.lines)
		for i := range min(len(a.lines), len(b.lines)) {
			if a.lines[i] != b.lines[i] {
				differ = append(differ, fmt.Sprintf("seed %d: %s, and then %s", seed, a.lines[i], b.lines[i]))
				break
			}
		}
	}
	if len(differ) > replays/5 {
		t.Errorf("%d of %d seeds are not the same again: %s", len(differ), replays, strings.Join(differ, "; "))
	}
}
