package repo_test

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/crypt/crypttest"
	"drc/internal/format"
	"drc/internal/format/formattest"
	"drc/internal/grouplog"
	"drc/internal/object"
	"drc/internal/object/fault"
	"drc/internal/object/mem"
	"drc/internal/repo"
)

func memory(n int) (stores []object.Store, faults []*fault.Store) {
	for range n {
		f := fault.New(mem.New(mem.Options{}))
		stores, faults = append(stores, f), append(faults, f)
	}
	return stores, faults
}

func create(t *testing.T, stores []object.Store, id *crypt.Identity) *repo.Repository {
	t.Helper()
	r, err := repo.Create(context.Background(), stores, id.Root, repo.DefaultProfile(len(stores)), id.Recipients(), crypttest.Created)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func identity(t *testing.T) *crypt.Identity {
	t.Helper()
	id, err := crypt.NewIdentity()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func TestRepoRecord_GoldenVector(t *testing.T) {
	id := crypttest.Identity(t)
	rec := format.RepoRecord{
		N: 1, Root: id.RootPublic, Created: crypttest.Created, Profile: format.Profile{Data: 2, Parity: 2}, Recipients: id.Recipients(),
		Stores: grouplog.NewStoreSet([]block.ID{{0: 0x57, 15: 1}, {0: 0x57, 15: 2}}), This: block.ID{0: 0x57, 15: 2},
	}
	body := rec.EncodeBody()
	raw := append(body, id.Root.Sign(crypt.ContextRepoRecord, body)...)
	formattest.Exact(t, "repo-record", raw, func(raw []byte) (any, error) {
		r, body, signature, err := format.DecodeRepoRecord("record", raw)
		if err == nil && !id.RootPublic.Verify(crypt.ContextRepoRecord, body, signature) {
			err = errors.New("the signature is wrong")
		}
		return r, err
	})
}

func TestOpen_WhatWasCreated(t *testing.T) {
	for n := 1; n <= 5; n++ {
		id := identity(t)
		stores, _ := memory(n)
		made := create(t, stores, id)
		// In any order of the stores the members are in the record's.
		order := append(append([]object.Store(nil), stores[n/2:]...), stores[:n/2]...)
		r, err := repo.Open(context.Background(), order, id.RootPublic)
		if err != nil {
			t.Fatal(err)
		}
		if r.ID != id.RootPublic.RepoID() || r.Profile() != repo.DefaultProfile(n) || len(r.Members) != n {
			t.Errorf("%+v", r)
		}
		for i, m := range r.Members {
			if m.Store != stores[i] || m.ID != made.Members[i].ID || m.Err != nil {
				t.Errorf("%d stores: member %d is %+v", n, i, m)
			}
		}
	}
}

func TestOpen_Refuses(t *testing.T) {
	ctx := context.Background()
	id, other := identity(t), identity(t)
	stores, faults := memory(3)
	create(t, stores, id)
	foreign, _ := memory(1)
	create(t, foreign, other)
	twin, _ := memory(2) // another store set of the same root
	create(t, twin, id)
	empty, _ := memory(1)
	for name, c := range map[string]struct {
		stores []object.Store
		root   crypt.RootPublic
		want   string
		is     error
	}{
		"no store":                  {nil, id.RootPublic, "--store", nil},
		"another identity":          {stores, other.RootPublic, "and the key given to", crypt.ErrWrongKey},
		"mixed repositories":        {append(stores[:2:2], foreign[0]), id.RootPublic, "belongs to repository " + other.RootPublic.RepoID().String(), crypt.ErrWrongKey},
		"a store twice":             {[]object.Store{stores[0], stores[1], stores[0]}, id.RootPublic, "are the same store", nil},
		"a store that is not in it": {[]object.Store{stores[0], stores[1], twin[0]}, id.RootPublic, "is not in the store set", nil},
		"an empty store":            {append(stores[:2:2], empty[0]), id.RootPublic, "drc init", repo.ErrNotFound},
	} {
		_, err := repo.Open(ctx, c.stores, c.root)
		if err == nil || !strings.Contains(err.Error(), c.want) || (c.is != nil && !errors.Is(err, c.is)) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// A record that is damaged in one store is had from the others.
	faults[1].Add(fault.Rule{Op: fault.Get, Alter: fault.FlipBit(8 * 150)})
	var corrupt *format.CorruptError
	r, err := repo.Open(ctx, stores, id.RootPublic)
	if err != nil || !errors.As(r.Members[1].Err, &corrupt) {
		t.Errorf("one damaged record: %+v, %v", r, err)
	}
	for _, f := range []int{0, 2} {
		faults[f].Add(fault.Rule{Op: fault.Get, Alter: fault.FlipBit(8 * 150)})
	}
	if _, err := repo.Open(ctx, stores, id.RootPublic); !errors.As(err, &corrupt) {
		t.Errorf("damaged records everywhere: %v", err)
	}
}

func TestOpen_StoresThatDoNotAnswer(t *testing.T) {
	ctx := context.Background()
	id := identity(t)
	stores, faults := memory(3)
	create(t, stores, id)
	faults[1].Add(fault.Rule{Before: fault.ErrInjected})
	r, err := repo.Open(ctx, stores, id.RootPublic)
	if err != nil {
		t.Fatal(err)
	}
	// Only one is left over, so it is known which one is silent.
	if m := r.Members[1]; m.Store != stores[1] || !errors.Is(m.Err, fault.ErrInjected) {
		t.Errorf("%+v", m)
	}
	faults[2].Add(fault.Rule{Before: fault.ErrInjected})
	if r, err = repo.Open(ctx, stores, id.RootPublic); err != nil {
		t.Fatal(err)
	}
	if r.Members[0].Err != nil || r.Members[1].Store != nil || r.Members[2].Store != nil || r.Members[1].Err == nil {
		t.Errorf("%+v", r.Members)
	}
	faults[0].Add(fault.Rule{Before: fault.ErrInjected})
	if _, err := repo.Open(ctx, stores, id.RootPublic); err == nil || !strings.Contains(err.Error(), "no store can be reached") {
		t.Errorf("%v", err)
	}
	// One store of three given: the others are missing, and said to be.
	for _, f := range faults {
		f.Clear()
	}
	r, err = repo.Open(ctx, stores[2:], id.RootPublic)
	if err != nil || r.Members[2].Store != stores[2] || r.Members[0].Store != nil || r.Members[0].Err == nil {
		t.Errorf("%+v, %v", r, err)
	}
}

// A store that never answers, and does not even heed that it is no longer
// asked, is done without; if it is the only one, that is an error.
func TestOpen_StoreThatHangs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		id := identity(t)
		for n := 1; n <= 3; n++ {
			stores, faults := memory(n)
			create(t, stores, id)
			release := make(chan struct{})
			faults[0].Add(fault.Rule{Hook: func(context.Context, fault.Call) error { <-release; return nil }})
			r, err := repo.Open(t.Context(), stores, id.RootPublic)
			switch {
			case n == 1 && (err == nil || !strings.Contains(err.Error(), stores[0].URL())):
				t.Errorf("the only store hangs: %v", err)
			case n > 1 && (err != nil || r.Members[0].Err == nil || r.Members[1].Err != nil):
				t.Errorf("one of %d stores hangs: %+v, %v", n, r, err)
			}
			close(release)
		}
	})
}

func TestCreate_RefusesWhatIsThere(t *testing.T) {
	id := identity(t)
	stores, _ := memory(2)
	create(t, stores[1:], id)
	_, err := repo.Create(context.Background(), stores, identity(t).Root, repo.DefaultProfile(2), nil, 0)
	if err == nil || !strings.Contains(err.Error(), "already holds repository "+id.RootPublic.RepoID().String()) {
		t.Errorf("%v", err)
	}
	if _, err := stores[0].Stat(context.Background(), format.RepoRecordName(1)); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("the first store has a record: %v", err)
	}
	if _, err := repo.Create(context.Background(), nil, id.Root, repo.DefaultProfile(1), nil, 0); err == nil {
		t.Error("a repository without stores was made")
	}
}

// TestCreate_LeavesNothingHalfDone fails the put to each store, before and
// after the store took it.
func TestCreate_LeavesNothingHalfDone(t *testing.T) {
	for n := 1; n <= 4; n++ {
		for bad := range n {
			for name, rule := range map[string]fault.Rule{
				"refused":            {Op: fault.Put, Before: fault.ErrInjected},
				"taken, answer lost": {Op: fault.Put, After: fault.ErrInjected},
			} {
				stores, faults := memory(n)
				faults[bad].Add(rule)
				id := identity(t)
				if _, err := repo.Create(context.Background(), stores, id.Root, repo.DefaultProfile(n), id.Recipients(), 0); !errors.Is(err, fault.ErrInjected) {
					t.Fatalf("%v", err)
				}
				for i, s := range stores {
					for info, err := range s.List(context.Background(), "", "") {
						t.Errorf("%s by store %d of %d: store %d keeps %s (%v)", name, bad, n, i, info.Name, err)
					}
				}
				faults[bad].Clear()
				create(t, stores, id) // so the next try succeeds
			}
		}
	}
}

func TestCreate_CleansUpWhenItsContextEnds(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	stores, faults := memory(2)
	faults[1].Add(fault.Rule{Op: fault.Put, Hook: func(ctx context.Context, _ fault.Call) error {
		cancel()
		return ctx.Err()
	}})
	id := identity(t)
	if _, err := repo.Create(ctx, stores, id.Root, repo.DefaultProfile(2), id.Recipients(), 0); !errors.Is(err, context.Canceled) {
		t.Fatalf("%v", err)
	}
	if _, err := stores[0].Stat(context.Background(), format.RepoRecordName(1)); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("the first store keeps its record: %v", err)
	}
}

// TestCreate_DeletesOnlyItsOwn: somebody else makes a repository in the second
// store at the same moment.
func TestCreate_DeletesOnlyItsOwn(t *testing.T) {
	ctx := context.Background()
	stores, faults := memory(2)
	other := identity(t)
	faults[0].Add(fault.Rule{Op: fault.Put, Hook: func(context.Context, fault.Call) error {
		create(t, stores[1:], other)
		return nil
	}})
	id := identity(t)
	if _, err := repo.Create(ctx, stores, id.Root, repo.DefaultProfile(2), id.Recipients(), 0); !errors.Is(err, object.ErrExists) {
		t.Fatalf("%v", err)
	}
	if _, err := stores[0].Stat(ctx, format.RepoRecordName(1)); !errors.Is(err, object.ErrNotFound) {
		t.Errorf("the first store keeps its record: %v", err)
	}
	if _, err := repo.Open(ctx, stores[1:], other.RootPublic); err != nil {
		t.Errorf("the other's repository is gone: %v", err)
	}
}

// TestCreate_SaysWhatItCouldNotDelete: nothing is left behind in silence.
func TestCreate_SaysWhatItCouldNotDelete(t *testing.T) {
	stores, faults := memory(2)
	faults[0].Add(fault.Rule{Op: fault.Delete, Before: errors.New("denied")})
	faults[1].Add(fault.Rule{Op: fault.Put, Before: fault.ErrInjected})
	id := identity(t)
	_, err := repo.Create(context.Background(), stores, id.Root, repo.DefaultProfile(2), id.Recipients(), 0)
	if err == nil || !strings.Contains(err.Error(), "delete it by hand") || !strings.Contains(err.Error(), stores[0].URL()) {
		t.Errorf("%v", err)
	}
}

// lossesSurvived counts, by placing shards, how many stores can be lost.
func lossesSurvived(p format.Profile, n int) int {
	for lost := 1; lost < n; lost++ {
		for set := range 1 << n {
			for first := range n {
				have, gone := 0, 0
				for i := range n {
					gone += set >> i & 1
				}
				for shard := range p.Total() {
					if set>>repo.ShardMember(block.SegmentID{byte(first)}, shard, n)&1 == 0 {
						have++
					}
				}
				if gone == lost && have < p.Data {
					return lost - 1
				}
			}
		}
	}
	return n - 1
}

func TestTolerates_IsWhatPlacementGives(t *testing.T) {
	for n := 1; n <= 6; n++ {
		for data := 1; data <= 6; data++ {
			for parity := range 5 {
				p := format.Profile{Data: data, Parity: parity}
				if got, want := repo.Tolerates(p, n), lossesSurvived(p, n); got != want {
					t.Errorf("%d+%d on %d stores: tolerates %d, and placement survives %d", data, parity, n, got, want)
				}
			}
		}
	}
	for n, want := range map[int]int{1: 0, 2: 1, 3: 1, 4: 1, 5: 1, 6: 2} {
		if got := repo.Tolerates(repo.DefaultProfile(n), n); got != want {
			t.Errorf("the default for %d stores tolerates %d, not %d", n, got, want)
		}
	}
}

// TestFromCache_OnlyWhatWasVerified: with no store in reach, the record
// remembered and the ids of the URLs say which is which.
func TestFromCache_OnlyWhatWasVerified(t *testing.T) {
	id := identity(t)
	stores, _ := memory(2)
	made := create(t, stores, id)
	ids := map[string]block.ID{stores[0].URL(): made.Members[0].ID}
	r, err := repo.FromCache(made.Raw, ids, stores[:1], id.RootPublic)
	if err != nil || r.Members[0].Store != stores[0] || r.Members[1].Store != nil || r.Profile() != made.Profile() {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err := repo.FromCache(made.Raw, nil, stores, id.RootPublic); err == nil {
		t.Error("stores that are not known are taken")
	}
	if _, err := repo.FromCache(made.Raw, ids, stores, identity(t).RootPublic); !errors.Is(err, crypt.ErrWrongKey) {
		t.Errorf("another identity: %v", err)
	}
	formattest.Spots(made.Raw, func(at int, changed []byte) {
		if _, err := repo.FromCache(changed, ids, stores[:1], id.RootPublic); err == nil {
			t.Fatalf("byte %d changed and not found", at)
		}
	})
}

// TestCreate_GoesOnWhereItWasInterrupted kills Create behind each of its puts:
// the records of the first stores are there, the others are not.
func TestCreate_GoesOnWhereItWasInterrupted(t *testing.T) {
	ctx := context.Background()
	for n := 1; n <= 4; n++ {
		for done := 0; done <= n; done++ {
			id := identity(t)
			whole, _ := memory(n)
			create(t, whole, id)
			stores, _ := memory(n)
			for i := range done { // from the last on, for the order must not matter
				k := n - 1 - i
				raw, _, err := whole[k].Get(ctx, format.RepoRecordName(1), format.MaxRepoRecordBytes, nil)
				if err != nil {
					t.Fatal(err)
				}
				if _, err := stores[k].Put(ctx, format.RepoRecordName(1), raw); err != nil {
					t.Fatal(err)
				}
			}
			if done > 0 {
				if _, err := repo.Create(ctx, stores, id.Root, format.Profile{Data: 9, Parity: 1}, id.Recipients(), 0); err == nil || !strings.Contains(err.Error(), "repeat the init as it was") {
					t.Errorf("%d of %d, another profile: %v", done, n, err)
				}
				if _, err := repo.Create(ctx, stores, identity(t).Root, repo.DefaultProfile(n), id.Recipients(), 0); err == nil {
					t.Errorf("%d of %d: another identity went on with it", done, n)
				}
			}
			made := create(t, stores, id)
			r, err := repo.Open(ctx, stores, id.RootPublic)
			if err != nil || r.ID != made.ID {
				t.Fatalf("%d of %d: %v", done, n, err)
			}
			for i, m := range r.Members {
				if m.Store == nil || m.ID != made.Members[i].ID || m.Store != made.Members[i].Store {
					t.Errorf("%d of %d: member %d is %+v, was made as %+v", done, n, i, m, made.Members[i])
				}
			}
		}
	}
}
