package gate_test

import (
	"testing"

	"drc/internal/object"
	"drc/internal/object/gate"
	"drc/internal/object/mem"
	"drc/internal/object/objecttest"
)

// TestConformance: the gate of a store that is there is like that store.
func TestConformance(t *testing.T) {
	objecttest.Run(t, func(t *testing.T) object.Store { return gate.Of(mem.New(mem.Options{})) })
}
