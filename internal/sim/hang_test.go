package sim

import (
	"fmt"
	"os"
	"runtime"
	"time"
)

// hangAfter is how long a seed may take by the clock on the wall: a hundred times
// what the slowest one needs. (The race detector and busy machines are in it.)
const hangAfter = 3 * time.Minute

// guard ends the program, with the seed's number and what everybody waits for, if
// the seed is not done within hangAfter. A bubble in which somebody waits for a lock,
// or in which the clock runs on and nobody comes nearer to an end, would say nothing
// before go test's own time limit, and then not which seed it was. What it returns
// ends the watch. It is called outside of the bubble, whose clock is not the one on
// the wall.
func guard(seed uint64, what string) (done func()) {
	t := time.AfterFunc(hangAfter, func() {
		fmt.Fprintf(os.Stderr, "seed %d hangs: not done after %s%s\n\tagain: make sim SEED=%d SEEDS=1\n", seed, hangAfter, what, seed)
		buf := make([]byte, 16<<20)
		_, _ = os.Stderr.Write(buf[:runtime.Stack(buf, true)])
		os.Exit(1)
	})
	return func() { t.Stop() }
}
