package capture

import "context"

// turn is held by one at a time. Unlike a mutex it is not waited for longer than
// the context allows: whoever has it may be waiting for a disk that hangs.
type turn chan struct{}

func newTurn() turn { return make(turn, 1) }

// take waits for the turn. It fails only with the context's error.
func (t turn) take(ctx context.Context) error {
	select {
	case t <- struct{}{}:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

func (t turn) give() { <-t }
