package nbd

import (
	"testing"

	"drc/internal/block"
	"drc/internal/block/blocktest"
)

func TestClient_KeepsTheDeviceContract(t *testing.T) {
	blocktest.Run(t, func(t *testing.T) block.Device {
		s := serve(t, newShelf("v", blocktest.NewMemory(64<<20, nil)), Limits{})
		return s.dial(t, "v")
	})
}
