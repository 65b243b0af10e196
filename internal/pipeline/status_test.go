package pipeline

import (
	"errors"
	"testing"
	"time"

	"drc/internal/control"
	"drc/uploader"
)

// What two groups know of one store: the worst word is shown with its reason,
// and an object that the store refused where nothing is worse.
func TestStatus_OfAStore(t *testing.T) {
	refused := errors.New("file:///x segments/1: it holds other bytes")
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	s := control.Store{State: "up"}
	mergeStore(&s, uploader.StoreStatus{State: "up"}, nil)
	if s != (control.Store{State: "up"}) {
		t.Errorf("all is well, and it is %+v", s)
	}
	mergeStore(&s, uploader.StoreStatus{State: "up"}, refused)
	if s != (control.Store{State: "up", LastError: refused.Error()}) {
		t.Errorf("an object was refused, and it is %+v", s)
	}
	down := control.Store{State: "down", LastError: "no route", Since: "2026-01-02T03:04:05Z"}
	mergeStore(&s, uploader.StoreStatus{State: "down", Since: at, LastError: "no route"}, nil)
	if s != down {
		t.Errorf("it is down, and it is %+v", s)
	}
	mergeStore(&s, uploader.StoreStatus{State: "joining", LastError: "later"}, refused)
	if s != down {
		t.Errorf("it is down still, and it is %+v", s)
	}
}
