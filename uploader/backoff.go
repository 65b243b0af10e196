package uploader

import (
	"context"
	"time"

	"drc/internal/jitter"
)

const (
	retryDelayMin = 100 * time.Millisecond
	retryDelayMax = 30 * time.Second
)

// backoff is the pause before the next try of something that failed: doubling
// up to a limit, with jitter so that many agents do not knock together.
type backoff struct{ next time.Duration }

func (b *backoff) reset() { b.next = 0 }

// wait sleeps for the next pause or until ctx ends.
func (b *backoff) wait(ctx context.Context) error {
	if b.next == 0 {
		b.next = retryDelayMin
	}
	pause := jitter.Of(b.next)
	b.next = min(2*b.next, retryDelayMax)
	return sleep(ctx, pause)
}
