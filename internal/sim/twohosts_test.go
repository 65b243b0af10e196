package sim

import (
	"flag"
	"fmt"
	"os"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"drc/internal/jitter"
)

var pairs = flag.Int("sim.pairs", defaultPairs, "how many seeds to run with two hosts of one group")

// runPair runs one seed with two hosts.
func runPair(t *testing.T, seed uint64, p *plant) (count rivalCounts, about string, err error) {
	t.Helper()
	defer guard(seed, ", with two hosts"+p.what())()
	defer jitter.Fix(seed)()
	cryptotest.SetGlobalRandom(t, seed)
	synctest.Test(t, func(t *testing.T) {
		r := newRivals(t, seed, p)
		if *verbose {
			r.a.log = os.Stderr
		}
		err = r.run()
		count, about = r.count, fmt.Sprintf("new host %v, %s", r.isNew, r.plan)
	})
	return count, about, err
}

// TestTwoHosts runs seeds in which two hosts write one group: there must be one
// history, and who has lost must be fenced. To look at one of them:
// make sim PAIRS=1 SEED=… SEEDS=1
func TestTwoHosts(t *testing.T) {
	var total rivalCounts
	began := time.Now()
	for seed := *firstSeed; seed < *firstSeed+uint64(*pairs); seed++ {
		start := time.Now()
		count, about, err := runPair(t, seed, &plant{})
		total.add(count)
		if took := time.Since(start); *slow > 0 && took > *slow {
			fmt.Printf("seed %d: %s\n\t%s\n", seed, took.Round(time.Millisecond), about)
		}
		if err != nil {
			t.Errorf("seed %d: %v\n\t%s\n\tagain: make sim PAIRS=1 SEED=%d SEEDS=1", seed, err, about, seed)
		}
	}
	t.Logf("%s; %s", total, time.Since(began).Round(time.Second))
	fmt.Println(total)
}
