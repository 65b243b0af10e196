package grouplog_test

import (
	"errors"
	"testing"

	"drc/internal/block"
	"drc/internal/format"
	"drc/internal/grouplog"
)

func epoch(n uint64) format.Epoch { return format.Epoch{Number: n, Random: block.ID{byte(n)}} }

// plainValue is a value that decodes; nothing in an acceptor looks at its
// signature or body.
func plainValue(n uint64, what string) []byte {
	v := format.Value{Group: theGroup, N: n, Body: []byte(what)}
	if n > 1 {
		v.Parent = format.HashOf([]byte{byte(n)})
	}
	return append(v.EncodeBody(), make([]byte, 64)...)
}

// storeLog is a store's log and the acceptor that reads it.
type storeLog struct {
	grouplog.Acceptor
	objects []format.LogObject
}

// put is a create-only put at an index: it fails where an object is.
func (s *storeLog) put(o format.LogObject) bool {
	if o.Index != uint64(len(s.objects)) {
		return false
	}
	o.Group, o.Store = theGroup, s.Store
	if err := s.Add("log", o, stored(o)); err != nil {
		panic(err)
	}
	s.objects = append(s.objects, o)
	return true
}

func stored(o format.LogObject) []byte { return append(o.EncodeBody(), make([]byte, 64)...) }

func (s *storeLog) next(kind format.LogKind, e format.Epoch, value []byte) format.LogObject {
	return format.LogObject{Kind: kind, Group: theGroup, Store: s.Store, Index: s.Next, Previous: s.Last, Epoch: e, Value: value}
}

func (s *storeLog) promise(e uint64) { s.put(s.next(format.LogPromise, epoch(e), nil)) }
func (s *storeLog) commit(e, n uint64, what string) {
	s.put(s.next(format.LogCommit, epoch(e), plainValue(n, what)))
}

func stores(n int) ([]*storeLog, grouplog.StoreSet, []*grouplog.Acceptor) {
	var logs []*storeLog
	var ids []block.ID
	var accs []*grouplog.Acceptor
	for i := range n {
		l := &storeLog{Acceptor: grouplog.Acceptor{Store: block.ID{byte(i + 1)}}}
		logs, ids, accs = append(logs, l), append(ids, l.Store), append(accs, &l.Acceptor)
	}
	return logs, grouplog.NewStoreSet(ids), accs
}

func TestChoose_Table(t *testing.T) {
	type do func(s []*storeLog)
	p := func(store int, e uint64) do { return func(s []*storeLog) { s[store].promise(e) } }
	c := func(store int, e, n uint64, what string) do {
		return func(s []*storeLog) { s[store].commit(e, n, what) }
	}
	for name, x := range map[string]struct {
		stores  int
		steps   []do
		n       uint64
		want    string // value chosen, "" if none
		decided bool
	}{
		"empty":                               {3, nil, 1, "", false},
		"one store":                           {1, []do{p(0, 1), c(0, 1, 1, "v")}, 1, "v", true},
		"one of three":                        {3, []do{c(0, 1, 1, "v")}, 1, "v", false},
		"two of three":                        {3, []do{c(0, 1, 1, "v"), c(1, 1, 1, "v")}, 1, "v", true},
		"tie-breaker of two":                  {2, []do{c(0, 1, 1, "v")}, 1, "v", true},
		"the other of two":                    {2, []do{c(1, 1, 1, "v")}, 1, "v", false},
		"one value under two epochs":          {3, []do{c(0, 1, 1, "v"), c(1, 2, 1, "v")}, 1, "v", false},
		"higher epoch wins":                   {3, []do{c(0, 1, 1, "v"), c(1, 2, 1, "w")}, 1, "w", false},
		"higher epoch wins over a majority":   {3, []do{c(0, 1, 1, "v"), c(1, 1, 1, "v"), c(2, 2, 1, "v")}, 1, "v", false},
		"late commit behind a promise":        {3, []do{p(0, 2), c(0, 1, 1, "v"), p(1, 2), c(1, 1, 1, "v")}, 1, "", false},
		"late commit before one promise only": {3, []do{p(0, 2), c(0, 1, 1, "v"), c(1, 1, 1, "v"), p(1, 2)}, 1, "v", false},
		"adopted":                             {3, []do{c(0, 1, 1, "v"), p(0, 2), p(1, 2), c(0, 2, 1, "v"), c(1, 2, 1, "v")}, 1, "v", true},
		"replaced on a store":                 {3, []do{c(0, 1, 1, "v"), p(1, 2), p(2, 2), c(1, 2, 1, "w"), c(2, 2, 1, "w"), c(0, 2, 1, "w")}, 1, "w", true},
		"two of four without the tie-breaker": {4, []do{c(1, 1, 1, "v"), c(2, 1, 1, "v")}, 1, "v", false},
		"two of four with the tie-breaker":    {4, []do{c(0, 1, 1, "v"), c(2, 1, 1, "v")}, 1, "v", true},
		"another entry":                       {1, []do{c(0, 1, 1, "v"), c(0, 1, 2, "w")}, 2, "w", true},
	} {
		logs, set, accs := stores(x.stores)
		for _, step := range x.steps {
			step(logs)
		}
		got := grouplog.Choose(set, accs, x.n)
		if got.Known != (x.want != "") || got.Decided != x.decided || (got.Known && got.Hash != format.HashOf(plainValue(x.n, x.want))) {
			t.Errorf("%s: %+v", name, got)
		}
	}
}

func TestAcceptor_RefusesWhatDoesNotContinueTheChain(t *testing.T) {
	logs, _, _ := stores(1)
	l := logs[0]
	l.promise(1)
	l.commit(1, 1, "v")
	for name, spoil := range map[string]func(*format.LogObject){
		"a hole":          func(o *format.LogObject) { o.Index++ },
		"an old place":    func(o *format.LogObject) { o.Index-- },
		"another past":    func(o *format.LogObject) { o.Previous[0] ^= 1 },
		"no past":         func(o *format.LogObject) { o.Previous = format.Hash{} },
		"no value":        func(o *format.LogObject) { o.Value = nil },
		"broken value":    func(o *format.LogObject) { o.Value = o.Value[1:] },
		"another group's": func(o *format.LogObject) { o.Group[0] ^= 1 },
	} {
		a := l.Acceptor
		o := l.next(format.LogCommit, epoch(1), plainValue(2, "w"))
		spoil(&o)
		var corrupt *format.CorruptError
		if err := a.Add("log", o, stored(o)); !errors.As(err, &corrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestAcceptor_WhatAFencedWriterSaysDoesNotCount(t *testing.T) {
	logs, _, _ := stores(1)
	l := logs[0]
	l.promise(5)
	o := l.next(format.LogCommit, epoch(4), plainValue(1, "late"))
	o.Decided = 99
	l.put(o)
	if l.Decided != 0 || l.Latest.N != 0 || l.Promised != epoch(5) || l.Next != 2 {
		t.Errorf("%+v", l.Acceptor)
	}
	if _, ok := l.Entry(1); ok {
		t.Error("the late commit counts")
	}
	l.commit(5, 1, "v")
	l.commit(5, 2, "w")
	l.Forget(2)
	if _, ok := l.Entry(1); ok || l.Latest.N != 2 || grouplog.Highest([]*grouplog.Acceptor{&l.Acceptor}) != 2 {
		t.Errorf("%+v", l.Acceptor)
	}
	if tail := l.Tail(); tail.Next != 4 || tail.Last != format.HashOf(stored(l.objects[3])) {
		t.Errorf("%+v", tail)
	}
}

func TestStoreSet_TwoMajoritiesAlwaysMeet(t *testing.T) {
	for n := 1; n <= 7; n++ {
		_, set, _ := stores(n)
		majority := func(members int) bool {
			return set.MajorityOf(func(id block.ID) bool { return members>>(id[0]-1)&1 != 0 })
		}
		for a := range 1 << n {
			if b := 1<<n - 1 - a; majority(a) && majority(b) {
				t.Errorf("%d stores: %b and the rest are majorities", n, a)
			} else if !majority(a) && !majority(b) {
				t.Errorf("%d stores: neither %b nor the rest is a majority", n, a)
			}
		}
	}
}

func TestEpoch_Order(t *testing.T) {
	order := []format.Epoch{{}, {Number: 1}, {Number: 1, Random: block.ID{1}}, {Number: 1, Random: block.ID{2}}, {Number: 2}, {Number: 1 << 63}}
	for i, a := range order {
		for j, b := range order {
			if a.Less(b) != (i < j) || (a.Compare(b) == 0) != (i == j) {
				t.Errorf("%s and %s", a, b)
			}
		}
	}
	if !order[0].IsZero() || order[1].IsZero() {
		t.Error("IsZero")
	}
}
