package grouplog_test

import (
	"fmt"
	"os"
	"slices"
	"strconv"
	"testing"
)

// The protocol of docs/FORMAT.md, "The log", as a model of its own that is small
// enough to be explored whole: two or three writers, each with one epoch, one to
// three stores, logs of a few objects, two entries, and puts that land in any
// order, late, or never. It shares no code with the product. What a writer knows
// of a store is how much of its log it has read; that an answer is lost means that
// it has not read yet. That a log is read up to the own promise is no rule by
// itself: a promise is put behind all that was read, and nothing lands before it.

const (
	exStores  = 3
	exWriters = 3
	exObjects = 6 // of one log
	exFlying  = 2 // puts under way
)

type exKind uint8

const (
	exPromise exKind = iota + 1
	exCommit
)

// exObject is an object of a log; the value of an entry is named by who made it.
type exObject struct {
	kind  exKind
	epoch uint8
	n     uint8
	value uint8
}

type exPut struct {
	flies        bool
	store, index uint8
	o            exObject
}

// rank tells puts apart.
func (p exPut) rank() (r uint64) {
	if !p.flies {
		return 0
	}
	for _, b := range []uint8{1, p.store, p.index, uint8(p.o.kind), p.o.epoch, p.o.n, p.o.value} {
		r = r<<8 | uint64(b)
	}
	return r
}

type exWriter struct {
	read    [exStores]uint8 // objects read of each log
	settled bool
	n       uint8 // the entry that it wants decided
	value   uint8
}

// exState is all there is: a value, so that states can be compared.
type exState struct {
	logs [exStores][exObjects]exObject
	size [exStores]uint8
	w    [exWriters]exWriter
	fly  [exFlying]exPut
}

// exRules are what the protocol demands. Each left out must lead to two
// histories somewhere.
type exRules struct {
	adoptHighest    bool // a takeover adopts the value of the highest epoch
	officeFirst     bool // it commits only after a majority has promised
	createOnly      bool // a put never lands where another object is
	oneByOne        bool // entry n+1 is written only when n is decided
	fencedNoVote    bool // what is appended behind a higher promise does not count
	majority        bool // a decision needs more than half
	adoptsUndecided bool // a takeover writes again what may be decided
}

var exAll = exRules{true, true, true, true, true, true, true}

type exModel struct {
	stores, writers int
	start           exState
	dead            int // of the writers, the first so many do nothing more
	entries         uint8
	votes           [exStores]int
	rules           exRules
	seen            map[exState]bool
	limit           int
	bad             string
	decided         bool
	contested       bool
}

func (m *exModel) enough(votes int) bool {
	all := 0
	for _, v := range m.votes[:m.stores] {
		all += v
	}
	if !m.rules.majority {
		return votes > 0
	}
	return 2*votes > all
}

// counts reports whether object i of a log is a commit that no higher promise, as
// far as read, stands before.
func (m *exModel) counts(s *exState, store, i int) bool {
	o := s.logs[store][i]
	if o.kind != exCommit {
		return false
	}
	if !m.rules.fencedNoVote {
		return true
	}
	for _, p := range s.logs[store][:i] {
		if p.epoch > o.epoch {
			return false
		}
	}
	return true
}

// fenced and promised are what writer w knows of itself in a store.
func (m *exModel) fenced(s *exState, w, store int) bool {
	if !m.rules.fencedNoVote {
		return false
	}
	for _, o := range s.logs[store][:s.w[w].read[store]] {
		if o.epoch > uint8(w+1) {
			return true
		}
	}
	return false
}

func (m *exModel) promised(s *exState, w, store int) bool {
	for _, o := range s.logs[store][:s.w[w].read[store]] {
		if o.kind == exPromise && o.epoch == uint8(w+1) {
			return !m.fenced(s, w, store)
		}
	}
	return false
}

func (m *exModel) holds(s *exState, w, store int) bool {
	x := &s.w[w]
	for i, o := range s.logs[store][:x.read[store]] {
		if o.epoch == uint8(w+1) && o.n == x.n && o.value == x.value && m.counts(s, store, i) {
			return !m.fenced(s, w, store)
		}
	}
	return false
}

func (m *exModel) sum(in func(store int) bool) (votes int) {
	for i := range m.stores {
		if in(i) {
			votes += m.votes[i]
		}
	}
	return votes
}

// settle takes over what may be decided: of the highest entry that the stores
// that promised know, the value of the highest epoch.
func (m *exModel) settle(s *exState, w int) {
	x := &s.w[w]
	x.settled = true
	best := uint8(0)
	for store := range m.stores {
		if !m.promised(s, w, store) {
			continue
		}
		for i, o := range s.logs[store][:x.read[store]] {
			if o.epoch == uint8(w+1) || !m.counts(s, store, i) || o.n < x.n {
				continue
			}
			higher := o.epoch > best
			if !m.rules.adoptHighest {
				higher = best == 0 || o.epoch < best
			}
			if o.n > x.n || higher {
				x.n, x.value, best = o.n, o.value, o.epoch
			}
		}
	}
	if !m.rules.adoptsUndecided && x.n > 0 {
		x.value = uint8(w + 1)
	}
}

// send is the put that writer w wants to make to a store, if any.
func (m *exModel) send(s *exState, w, store int) (exPut, bool) {
	x := &s.w[w]
	index := x.read[store]
	if m.fenced(s, w, store) || index >= exObjects {
		return exPut{}, false
	}
	put := func(o exObject) (exPut, bool) {
		p := exPut{true, uint8(store), index, o}
		return p, !slices.Contains(s.fly[:], p)
	}
	if !m.promised(s, w, store) {
		return put(exObject{exPromise, uint8(w + 1), 0, 0})
	}
	if !x.settled {
		if m.rules.officeFirst && !m.enough(m.sum(func(i int) bool { return m.promised(s, w, i) })) {
			return exPut{}, false
		}
		m.settle(s, w)
	}
	decided := x.n > 0 && m.enough(m.sum(func(i int) bool { return m.holds(s, w, i) }))
	if x.n == 0 || decided || (!m.rules.oneByOne && x.n < m.entries && m.holds(s, w, store)) {
		if x.n == m.entries {
			return exPut{}, false
		}
		x.n, x.value = x.n+1, uint8(w+1)
	}
	if m.holds(s, w, store) {
		return exPut{}, false
	}
	return put(exObject{exCommit, uint8(w + 1), x.n, x.value})
}

// check looks for two histories, by the definition of "decided" alone.
func (m *exModel) check(s *exState) {
	type ballot struct{ n, epoch, value uint8 }
	honest := exModel{stores: m.stores, votes: m.votes, rules: exAll}
	votes := map[ballot]int{}
	for store := range m.stores {
		mine := map[ballot]bool{}
		for i, o := range s.logs[store][:s.size[store]] {
			if honest.counts(s, store, i) {
				mine[ballot{o.n, o.epoch, o.value}] = true
			}
			m.contested = m.contested || o.epoch > 1
		}
		for b := range mine {
			votes[b] += m.votes[store]
		}
	}
	decided := map[uint8]uint8{}
	for b, v := range votes {
		if !honest.enough(v) {
			continue
		}
		m.decided = true
		if old, ok := decided[b.n]; ok && old != b.value {
			m.bad = fmt.Sprintf("entry %d is decided as of writer %d and of writer %d", b.n, old, b.value)
		}
		decided[b.n] = b.value
	}
	if _, ok := decided[1]; decided[2] != 0 && !ok {
		m.bad = "entry 2 is decided before entry 1"
	}
	// What a writer believes to be decided is.
	for w := range m.writers {
		x := &s.w[w]
		if x.settled && x.n > 0 && m.enough(m.sum(func(i int) bool { return m.holds(s, w, i) })) && decided[x.n] != x.value {
			m.bad = fmt.Sprintf("writer %d believes that its entry %d is decided", w+1, x.n)
		}
	}
}

// explore visits every state that can follow, breadth first.
func (m *exModel) explore() {
	m.seen = map[exState]bool{m.start: true}
	front := []exState{m.start}
	for len(front) > 0 && m.bad == "" && len(m.seen) < m.limit {
		var next []exState
		visit := func(s exState) {
			if s.fly[0].rank() > s.fly[1].rank() { // their order is no difference
				s.fly[0], s.fly[1] = s.fly[1], s.fly[0]
			}
			if !m.seen[s] && m.bad == "" {
				m.seen[s] = true
				m.check(&s)
				next = append(next, s)
			}
		}
		for _, s := range front {
			for w := m.dead; w < m.writers; w++ {
				for store := range m.stores {
					if s.w[w].read[store] < s.size[store] {
						n := s
						n.w[w].read[store] = n.size[store]
						visit(n)
					}
					free := slices.IndexFunc(s.fly[:], func(p exPut) bool { return !p.flies })
					if free < 0 {
						continue
					}
					n := s
					if p, ok := m.send(&n, w, store); ok {
						n.fly[free] = p
						visit(n)
					}
				}
			}
			for i, p := range s.fly {
				if !p.flies {
					continue
				}
				n := s
				n.fly[i] = exPut{} // lost
				visit(n)
				switch {
				case s.size[p.store] == p.index:
					n.logs[p.store][p.index] = p.o
					n.size[p.store]++
					visit(n)
				case !m.rules.createOnly && p.index < s.size[p.store]:
					n.logs[p.store][p.index] = p.o
					visit(n)
				}
			}
		}
		front = next
	}
}

// exSizes are the store sets: one store, two of which one is the tie-breaker, and
// three; these also from the moment on at which a first writer has died, whose
// first entry has reached one store, and a second one, whose first entry has
// reached another one and may yet reach the third.
func exSizes() map[string]exModel {
	var died exState
	for store := range exStores {
		died.logs[store][0] = exObject{exPromise, 1, 0, 0}
		died.size[store] = 1
	}
	died.logs[0][1] = exObject{exCommit, 1, 1, 1}
	died.size[0] = 2
	both := died
	for store := 1; store < exStores; store++ {
		both.logs[store][1] = exObject{exPromise, 2, 0, 0}
		both.size[store] = 2
	}
	both.logs[1][2] = exObject{exCommit, 2, 1, 2}
	both.size[1] = 3
	both.fly[1] = exPut{true, 2, 2, exObject{exCommit, 2, 1, 2}}
	// A first writer has died whose second entry has reached one store, and whose
	// first one two.
	left := died
	left.logs[0][2] = exObject{exCommit, 1, 2, 1}
	left.logs[1][1] = exObject{exCommit, 1, 1, 1}
	left.size[0], left.size[1] = 3, 2
	return map[string]exModel{
		"one":                             {stores: 1, writers: 3, votes: [3]int{1}, entries: 2},
		"two":                             {stores: 2, writers: 2, votes: [3]int{2, 1}, entries: 2},
		"three":                           {stores: 3, writers: 2, votes: [3]int{1, 1, 1}, entries: 2},
		"three, a writer has died":        {stores: 3, writers: 3, votes: [3]int{1, 1, 1}, entries: 1, start: died, dead: 1},
		"three, two writers have died":    {stores: 3, writers: 3, votes: [3]int{1, 1, 1}, entries: 1, start: both, dead: 2},
		"three, an entry was left behind": {stores: 3, writers: 3, votes: [3]int{1, 1, 1}, entries: 2, start: left, dead: 1},
	}
}

// exStates bounds how many states are explored, nearest first; DRC_MODEL_STATES
// asks for more.
func exStates(t *testing.T, n int) int {
	text := os.Getenv("DRC_MODEL_STATES")
	if text == "" {
		return n
	}
	n, err := strconv.Atoi(text)
	if err != nil {
		t.Fatalf("DRC_MODEL_STATES: %v", err)
	}
	return n
}

// TestExhaustive_OneHistory explores all that can happen within some number of
// states, and finds none with two histories.
func TestExhaustive_OneHistory(t *testing.T) {
	for name, m := range exSizes() {
		t.Run(name, func(t *testing.T) {
			m.rules, m.limit = exAll, exStates(t, 200_000)
			m.explore()
			t.Logf("%d states, all: %v", len(m.seen), len(m.seen) < m.limit)
			if m.bad != "" {
				t.Fatal(m.bad)
			}
			if !m.decided || !m.contested {
				t.Errorf("the model is too weak: decided %v, contested %v", m.decided, m.contested)
			}
		})
	}
}

// TestExhaustive_EachRuleIsNeeded leaves out one rule after the other: two
// histories are found.
func TestExhaustive_EachRuleIsNeeded(t *testing.T) {
	for name, leaveOut := range map[string]func(*exRules){
		"adopt the highest epoch's value":        func(r *exRules) { r.adoptHighest = false },
		"be in office before committing":         func(r *exRules) { r.officeFirst = false },
		"create only":                            func(r *exRules) { r.createOnly = false },
		"one entry after the other":              func(r *exRules) { r.oneByOne = false },
		"no vote behind a higher promise":        func(r *exRules) { r.fencedNoVote = false },
		"a majority":                             func(r *exRules) { r.majority = false },
		"write again what may have been decided": func(r *exRules) { r.adoptsUndecided = false },
	} {
		t.Run(name, func(t *testing.T) {
			found := ""
			for size, m := range exSizes() {
				m.rules, m.limit = exAll, 60_000
				leaveOut(&m.rules)
				m.explore()
				if m.bad != "" {
					found = fmt.Sprintf("%s stores, %d states: %s", size, len(m.seen), m.bad)
					break
				}
			}
			if found == "" {
				t.Error("without this rule nothing goes wrong: the model cannot see it")
			}
			t.Log(found)
		})
	}
}
