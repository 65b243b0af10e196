package fault_test

import (
	"testing"

	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/internal/object/mem"
	"drc/internal/object/objecttest"
)

// TestConformance: without rules it is a store like any other.
func TestConformance(t *testing.T) {
	objecttest.Run(t, func(t *testing.T) object.Store { return fault.New(mem.New(mem.Options{})) })
}
