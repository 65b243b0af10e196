// Package repo opens and creates repositories: it reads the repository record
// in each store, checks that all of them belong together and to the key at
// hand, and says which store holds which shard.
package repo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/object"
)

// ErrNotFound means: a store holds no repository.
var ErrNotFound = errors.New("there is no repository")

// Member is one store of a repository.
type Member struct {
	ID    block.ID
	Store object.Store // nil if the store was not given or could not be read
	Err   error        // why it could not be read
}

// URL names the member in messages.
func (m Member) URL() string {
	if m.Store != nil {
		return m.Store.URL()
	}
	return "store " + m.ID.String()[:8]
}

// Repository is an opened repository. Members are in the record's order; some
// may be missing.
type Repository struct {
	ID      block.ID
	Record  format.RepoRecord
	Raw     []byte // the record as one store holds it
	Members []Member
}

// Profile is the repository's erasure profile.
func (r *Repository) Profile() format.Profile { return r.Record.Profile }

// Set is the store set with its votes.
func (r *Repository) Set() grouplog.StoreSet { return grouplog.StoreSet(r.Record.Stores) }

// Tolerates is how many stores the profile lets be lost whole.
func (r *Repository) Tolerates() int { return Tolerates(r.Profile(), len(r.Members)) }

// Tolerates is how many of n stores can be lost whole under profile p.
func Tolerates(p format.Profile, n int) int {
	lost := 0
	for lost < n-1 {
		most := 0 // shards on the lost+1 fullest stores
		for i := range lost + 1 {
			most += (p.Total() + n - 1 - i) / n
		}
		if most > p.Parity {
			break
		}
		lost++
	}
	return lost
}

// ShardMember is the index of the member that holds a shard: shards are
// rotated over the stores, beginning at a place that the segment's id gives.
func ShardMember(s block.SegmentID, shard, members int) int {
	return (int(s[0]) + shard) % members
}

// DefaultProfile is the profile that init chooses for n stores: parity enough
// that any one store can be lost whole; with one store, that one object of
// each segment can be.
func DefaultProfile(n int) format.Profile {
	switch n {
	case 1:
		return format.Profile{Data: 4, Parity: 1}
	case 2:
		return format.Profile{Data: 2, Parity: 2}
	}
	return format.Profile{Data: 4, Parity: 2}
}

// ErrLeftover means: a record of a repository that was not made may be left in
// a store. Create with the same root key goes on with it.
var ErrLeftover = errors.New("a part of the repository may be left")

// leftover is an ErrLeftover that says what is left where.
type leftover struct{ error }

func (e leftover) Is(target error) bool { return target == ErrLeftover }
func (e leftover) Unwrap() error        { return e.error }

// Create writes the repository record to every store, or to none: if a store
// fails, the records that were put are deleted again, or it is an ErrLeftover.
// No store may hold a record of another repository; records that an interrupted
// Create of the same root key has left are completed, if it was asked for the
// same. All stores must pass object.Probe first; the caller sees to that.
func Create(ctx context.Context, stores []object.Store, root crypt.Root, p format.Profile, recipients []string, now int64) (*Repository, error) {
	if len(stores) == 0 || len(stores) > format.MaxStores {
		return nil, fmt.Errorf("a repository has 1 to %d stores, and %d were given", format.MaxStores, len(stores))
	}
	have, err := recordsOf(ctx, stores, root)
	if err != nil {
		return nil, err
	}
	ids := make([]block.ID, len(stores))
	for i := range ids {
		ids[i] = block.NewID()
	}
	rec := format.RepoRecord{
		N: 1, Root: root.Public(), Created: now, Profile: p, Recipients: recipients, Stores: grouplog.NewStoreSet(ids),
	}
	if len(have) > 0 {
		if rec, err = resumed(have, stores, ids, p, recipients); err != nil {
			return nil, err
		}
	}
	r := &Repository{ID: root.Public().RepoID(), Record: rec}
	raws := make([][]byte, len(stores))
	var put []written
	for i, s := range stores {
		rec.This = ids[i]
		body := rec.EncodeBody()
		raw := append(body, root.Sign(crypt.ContextRepoRecord, body)...)
		raws[i] = raw
		r.Members = append(r.Members, Member{ID: ids[i], Store: s})
		if _, ok := have[i]; ok {
			continue
		}
		put = append(put, written{s, raw})
		if _, err := s.Put(ctx, format.RepoRecordName(1), raw); err != nil {
			if errors.Is(err, object.ErrExists) {
				if twin := holder(ctx, s, put[:len(put)-1]); twin != "" {
					err = fmt.Errorf("%s and %s are the same store: list each store once", twin, s.URL())
					return nil, errors.Join(err, takeBack(ctx, put))
				}
			}
			err = fmt.Errorf("write repository record to %s: %w", s.URL(), err)
			return nil, errors.Join(err, takeBack(ctx, put))
		}
	}
	r.Record.This, r.Raw = ids[0], raws[0]
	// In the record's order, as Open has them.
	place := func(id block.ID) int {
		return slices.IndexFunc(rec.Stores, func(e format.StoreEntry) bool { return e.ID == id })
	}
	slices.SortFunc(r.Members, func(x, y Member) int { return place(x.ID) - place(y.ID) })
	return r, nil
}

// recordsOf returns the records of the root key's repository that the stores
// hold already, by the store's index.
func recordsOf(ctx context.Context, stores []object.Store, root crypt.Root) (map[int]format.RepoRecord, error) {
	have := map[int]format.RepoRecord{}
	for i, s := range stores {
		raw, _, err := s.Get(ctx, format.RepoRecordName(1), format.MaxRepoRecordBytes, nil)
		if errors.Is(err, object.ErrNotFound) {
			continue
		}
		if err != nil {
			return nil, err // it names the object and the store
		}
		rec, _, _, err := format.DecodeRepoRecord(s.URL(), raw)
		if err != nil {
			return nil, fmt.Errorf("%s already holds something that looks like a damaged repository: choose another prefix or bucket (%w)", s.URL(), err)
		}
		if rec.Root != root.Public() {
			return nil, fmt.Errorf("%s already holds repository %s: choose another prefix or bucket, or use that repository", s.URL(), crypt.RootPublic(rec.Root).RepoID())
		}
		if have[i], _, err = readRecord(ctx, s, root.Public()); err != nil {
			return nil, err
		}
	}
	return have, nil
}

// resumed returns the record that an interrupted Create was about to put, and
// fills in the ids of the stores.
func resumed(have map[int]format.RepoRecord, stores []object.Store, ids []block.ID, p format.Profile, recipients []string) (format.RepoRecord, error) {
	var rec format.RepoRecord
	given := map[block.ID]int{}
	for i, s := range stores {
		r, ok := have[i]
		if !ok {
			continue
		}
		if other, ok := given[r.This]; ok {
			return rec, fmt.Errorf("%s and %s are the same store: list each store once", stores[other].URL(), s.URL())
		}
		given[r.This] = i
		if len(given) > 1 && !slices.Equal(r.Stores, rec.Stores) || len(r.Stores) != len(stores) ||
			r.Profile != p || !slices.Equal(r.Recipients, recipients) {
			return rec, fmt.Errorf("%s holds a part of repository %s, whose making was interrupted, with other stores, erasure code or recipients: repeat the init as it was, or delete %s there",
				s.URL(), crypt.RootPublic(r.Root).RepoID(), format.RepoRecordName(1))
		}
		rec, ids[i] = r, r.This
	}
	next := 0
	for i := range stores {
		if _, ok := have[i]; ok {
			continue
		}
		for ; ; next++ {
			if _, taken := given[rec.Stores[next].ID]; !taken {
				break
			}
		}
		ids[i] = rec.Stores[next].ID
		next++
	}
	return rec, nil
}

// holder is the URL of the store in put whose record s holds, if there is one.
func holder(ctx context.Context, s object.Store, put []written) string {
	have, _, err := s.Get(ctx, format.RepoRecordName(1), format.MaxRepoRecordBytes, nil)
	for _, w := range put {
		if err == nil && bytes.Equal(have, w.raw) {
			return w.store.URL()
		}
	}
	return ""
}

// takeBackTimeout bounds the cleaning up after a Create that failed.
const takeBackTimeout = 30 * time.Second

// written is a record that was put to a store, maybe without success.
type written struct {
	store object.Store
	raw   []byte
}

// takeBack deletes the records of a Create that failed. It goes on when ctx has
// ended, because that may be why Create failed. A record is deleted only if its
// bytes are ours: the name may be taken by somebody who was faster. The store
// that failed is looked at, too: it may have taken the record and lost the
// answer.
func takeBack(ctx context.Context, put []written) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), takeBackTimeout)
	defer cancel()
	name := format.RepoRecordName(1)
	var left []error
	for i, w := range put {
		have, _, err := w.store.Get(ctx, name, format.MaxRepoRecordBytes, nil)
		if errors.Is(err, object.ErrNotFound) || (err == nil && !bytes.Equal(have, w.raw)) {
			continue
		}
		if err == nil {
			err = w.store.Delete(ctx, name)
		}
		if err != nil && i < len(put)-1 {
			left = append(left, fmt.Errorf("%s keeps %s of the repository that was not made: delete it by hand before the next try (%w)", w.store.URL(), name, err))
		} else if err != nil {
			left = append(left, fmt.Errorf("%s may keep %s: look before the next try (%w)", w.store.URL(), name, err))
		}
	}
	if len(left) == 0 {
		return nil
	}
	return leftover{errors.Join(left...)}
}

// Open reads the repository record of every store given. Stores that cannot be
// reached, and those that do not answer in time, are tolerated as long as one
// answers; their members carry the error.
// A store of another repository, one given twice, and one that the record does
// not list are refused.
func Open(ctx context.Context, stores []object.Store, root crypt.RootPublic) (*Repository, error) {
	if len(stores) == 0 {
		return nil, errors.New("no store was given: pass --store URL or set DRC_STORE")
	}
	answers := readRecords(ctx, stores, root)
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("open the repository: %w", err)
	}
	var r *Repository
	var down []string
	var damaged error // a record that is damaged in one store is had from another
	for i, a := range answers {
		s := stores[i]
		if a.err != nil {
			var corrupt *format.CorruptError
			if !Unreachable(a.err) && !errors.As(a.err, &corrupt) {
				return nil, a.err
			}
			if damaged == nil && corrupt != nil {
				damaged = a.err
			}
			down = append(down, a.err.Error())
			continue
		}
		if r == nil {
			r = newRepository(root, a.rec, a.raw)
		}
		found := false
		for j := range r.Members {
			if m := &r.Members[j]; m.ID == a.rec.This {
				if m.Store != nil {
					return nil, fmt.Errorf("%s and %s are the same store: list each store once", m.Store.URL(), s.URL())
				}
				m.Store, m.Err, found = s, nil, true
			}
		}
		if !found {
			return nil, fmt.Errorf("%s is not in the store set of repository %s: check --store", s.URL(), r.ID)
		}
	}
	if r == nil && damaged != nil {
		return nil, damaged
	}
	if r == nil {
		return nil, fmt.Errorf("no store can be reached: %s", strings.Join(down, "; "))
	}
	if len(stores) > len(r.Members) {
		return nil, fmt.Errorf("%d stores were given, and repository %s has %d: check --store", len(stores), r.ID, len(r.Members))
	}
	r.adoptSilent(stores, func(i int) error { return answers[i].err })
	return r, nil
}

// adoptSilent gives a store that did not answer to the member that is left
// over, when there is no doubt which is which: it is used once it answers.
func (r *Repository) adoptSilent(stores []object.Store, failed func(i int) error) {
	var silent []int
	for i := range stores {
		if failed(i) != nil {
			silent = append(silent, i)
		}
	}
	var open []int
	for j := range r.Members {
		if r.Members[j].Store == nil {
			open = append(open, j)
		}
	}
	if len(silent) == 1 && len(open) == 1 {
		r.Members[open[0]].Store = stores[silent[0]]
		r.Members[open[0]].Err = failed(silent[0])
		return
	}
	for _, j := range open {
		if len(silent) > 0 {
			r.Members[j].Err = errors.New("it was not given, or is one of those that do not answer")
		}
	}
}

// Unreachable reports whether err is a fault of the way to a store, rather
// than of what was asked. A bucket or folder that is not there is such a fault:
// it may be lost whole or not be mounted, and so is a store that refuses the
// credentials.
func Unreachable(err error) bool {
	var corrupt *format.CorruptError
	return !errors.Is(err, ErrNotFound) && !errors.Is(err, crypt.ErrWrongKey) && !errors.As(err, &corrupt)
}

// wrongKeyError is a crypt.ErrWrongKey: the store and the key given belong to
// different repositories.
type wrongKeyError struct {
	store      string
	have, want block.ID
}

func (e *wrongKeyError) Error() string {
	return fmt.Sprintf("%s belongs to repository %s, and the key given to %s: pass the identity of that repository, or correct --store", e.store, e.have, e.want)
}
func (e *wrongKeyError) Unwrap() error { return crypt.ErrWrongKey }

func newRepository(root crypt.RootPublic, rec format.RepoRecord, raw []byte) *Repository {
	r := &Repository{ID: root.RepoID(), Record: rec, Raw: raw}
	for _, e := range rec.Stores {
		r.Members = append(r.Members, Member{ID: e.ID, Err: errors.New("this store was not given")})
	}
	return r
}

// FromCache makes a repository from a record that was read earlier, when no
// store can be reached; ids says which URL is which store.
func FromCache(raw []byte, ids map[string]block.ID, stores []object.Store, root crypt.RootPublic) (*Repository, error) {
	rec, err := verifyRecord("the remembered repository record", raw, root)
	if err != nil {
		return nil, err
	}
	r := newRepository(root, rec, raw)
	r.Adopt(ids, stores)
	for _, m := range r.Members {
		if m.Store != nil {
			return r, nil
		}
	}
	return nil, fmt.Errorf("no store can be reached, and none of those given was used here before: check --store")
}

// Adopt gives members that have no store the ones that are known to be theirs.
func (r *Repository) Adopt(ids map[string]block.ID, stores []object.Store) {
	for _, s := range stores {
		for i := range r.Members {
			if m := &r.Members[i]; m.Store == nil && m.ID == ids[s.URL()] {
				m.Store, m.Err = s, nil
			}
		}
	}
}

const (
	// recordTimeout is how long a store may take to return its record, and
	// stragglerTimeout how long it may when another one has returned it.
	recordTimeout    = time.Minute
	stragglerTimeout = 10 * time.Second
)

// errSilent is of a store that does not answer.
var errSilent = errors.New("it does not answer")

// answer is what one store says when it is asked for its record.
type answer struct {
	rec format.RepoRecord
	raw []byte
	err error
}

// readRecords asks all stores at once. It waits for none for ever, also if a
// store takes no notice of its context: a folder on a server that is gone does
// not. What is left of such a request ends when the store lets it.
func readRecords(ctx context.Context, stores []object.Store, root crypt.RootPublic) []answer {
	ctx, cancel := context.WithTimeout(ctx, recordTimeout)
	defer cancel()
	type numbered struct {
		i int
		answer
	}
	out := make([]answer, len(stores))
	come := make(chan numbered, len(stores)) // room for all: nobody may be here to take it
	for i, s := range stores {
		out[i].err = fmt.Errorf("read %s in %s: %w", format.RepoRecordName(1), s.URL(), errSilent)
		go func() {
			a := numbered{i: i}
			a.rec, a.raw, a.err = readRecord(ctx, s, root)
			come <- a
		}()
	}
	var late <-chan time.Time
	for range stores {
		select {
		case a := <-come:
			out[a.i] = a.answer
			if a.err == nil && late == nil {
				timer := time.NewTimer(stragglerTimeout)
				defer timer.Stop()
				late = timer.C
			}
		case <-late:
			return out
		case <-ctx.Done():
			return out
		}
	}
	return out
}

func readRecord(ctx context.Context, s object.Store, root crypt.RootPublic) (format.RepoRecord, []byte, error) {
	name := format.RepoRecordName(1)
	raw, _, err := s.Get(ctx, name, format.MaxRepoRecordBytes, nil)
	if errors.Is(err, object.ErrNotFound) {
		return format.RepoRecord{}, nil, fmt.Errorf("%w in %s: create one with drc init, or check --store", ErrNotFound, s.URL())
	}
	if err != nil {
		return format.RepoRecord{}, nil, err // it names the object and the store
	}
	rec, err := verifyRecord(s.URL()+" "+name, raw, root)
	return rec, raw, err
}

func verifyRecord(name string, raw []byte, root crypt.RootPublic) (format.RepoRecord, error) {
	rec, body, signature, err := format.DecodeRepoRecord(name, raw)
	if err != nil {
		return rec, err
	}
	if crypt.RootPublic(rec.Root) != root {
		return rec, &wrongKeyError{strings.TrimSuffix(name, " "+format.RepoRecordName(1)), crypt.RootPublic(rec.Root).RepoID(), root.RepoID()}
	}
	if !root.Verify(crypt.ContextRepoRecord, body, signature) {
		return rec, format.Corrupt(name, "its signature is wrong")
	}
	return rec, nil
}
