package blocktest

import (
	"context"
	"errors"
	"testing"

	"drc/internal/block"
)

func TestMemory_KeepsTheContract(t *testing.T) {
	Run(t, func(*testing.T) block.Device { return NewMemory(5<<20, nil) })
}

func TestMemory_WithLargeSectors(t *testing.T) {
	Run(t, func(*testing.T) block.Device {
		return NewMemoryGeometry(block.Geometry{SizeBytes: 1 << 40, SectorSize: 4096}, nil)
	})
}

func TestMemory_HookFailsRequestWithoutEffect(t *testing.T) {
	broken := errors.New("broken")
	m := NewMemory(1<<20, func(_ context.Context, r Request) error {
		if r.Kind == Write {
			return broken
		}
		return nil
	})
	if err := m.WriteAt(t.Context(), make([]byte, 512), 0, block.WriteOptions{}); !errors.Is(err, broken) {
		t.Fatal(err)
	}
	if m.Pages() != 0 {
		t.Fatal("a failed write had an effect")
	}
}
