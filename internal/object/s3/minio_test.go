package s3

import (
	"testing"

	"drc/internal/object"
	"drc/internal/object/objecttest"
)

func TestConformance_MinIO(t *testing.T) {
	objecttest.Run(t, func(t *testing.T) object.Store { return newStore(t) })
}
