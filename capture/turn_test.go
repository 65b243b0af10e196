package capture

import (
	"context"
	"errors"
	"testing"
)

// Who waits for room, or stops, gives Settle a limit: another one that hangs in a
// sync must not keep it longer.
func TestSettle_WaitsForAnotherNoLongerThanItMay(t *testing.T) {
	v, _ := newVolume(t, 1<<20)
	if err := v.settling.take(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := v.Settle(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("Settle: %v", err)
	}
	v.settling.give()
	if err := v.Settle(t.Context()); err != nil {
		t.Error(err)
	}
}
