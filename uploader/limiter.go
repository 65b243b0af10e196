package uploader

import (
	"context"

	"golang.org/x/time/rate"
)

// limiter is the bandwidth limit over all stores of an agent; the zero limiter
// limits nothing.
type limiter struct{ l *rate.Limiter }

// limitBurst is how many bytes may go out at once under a limit.
const limitBurst = 256 << 10

func newLimiter(bytesPerSecond int64) limiter {
	if bytesPerSecond <= 0 {
		return limiter{}
	}
	return limiter{rate.NewLimiter(rate.Limit(bytesPerSecond), limitBurst)}
}

func (l limiter) wait(ctx context.Context, n int) error {
	for l.l != nil && n > 0 {
		part := min(n, limitBurst)
		if err := l.l.WaitN(ctx, part); err != nil {
			return err
		}
		n -= part
	}
	return nil
}
