package restorer

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/digest"
	"drc/internal/format"
	"drc/internal/manifest"
	"drc/internal/object"
	"drc/internal/repo"
)

// Config is what the history of a repository is read with.
type Config struct {
	Repo *repo.Repository
	Ring *crypt.Ring // an agent's ring is enough for History and Image.Extents
	// CacheDir is where log values are kept between runs; empty: nowhere.
	CacheDir string
	// Cache, if not nil, keeps what images fetch, sealed as it is. It is closed by
	// who opened it, after the last use of the images.
	Cache Cache
	// Memory is what images share; nil: one of their own for those that are opened
	// with the same history or catalog.
	Memory *Memory
	Logger *slog.Logger
	// Requests is how many requests to one store are under way at a time;
	// 0 means 32.
	Requests int
	// Patience is how long a read goes on trying when too few stores answer;
	// 0 means half a minute, less than 0 not at all.
	Patience time.Duration
	// Salvage reads logs that are damaged up to the damage, if there is no
	// sound one. The history may then end earlier than it did.
	Salvage bool
	// UpTo, if not nil, is an entry that is known to be decided: the history is read
	// up to there, and what stands behind it on some store is left out. It is for a
	// writer in office, which knows that nothing else can be decided any more. If no
	// store that can be read holds it the error is ErrBehind.
	UpTo *Position

	decided bool // what is not known to be decided is left out; see Follower
}

// Position is an entry of the history: its number and the hash of its value. N is
// 0 before the first one.
type Position struct {
	N    uint64
	Hash format.Hash
}

func (c *Config) defaults() {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Requests <= 0 {
		c.Requests = requestsDefault
	}
	if c.Patience == 0 {
		c.Patience = patienceDefault
	}
	if c.Memory == nil {
		c.Memory = NewMemory()
	}
}

// Volume is a volume of a group.
type Volume struct {
	format.Volume
	JoinedN uint64         // the entry that made it part of the group
	Branch  block.BranchID // on which it goes by this name
}

// Gap is a stretch of a volume's history without checkpoints.
type Gap struct {
	After  block.Seq // the last seq that is known
	Until  block.Seq // the checkpoint that ended it
	Open   bool      // it has not ended yet
	Reason format.GapReason
	BeginN uint64    // the entry that says so
	EndN   uint64    // the entry that ended it
	Begin  time.Time // of the entry that says so: the gap itself is older
	End    time.Time
}

// History is what the logs of a group say, at the moment they were read. It is
// safe for concurrent use.
type History struct {
	GroupID  block.GroupID
	Group    format.Group
	Decided  uint64   // entries up to this one are known to be decided
	Warnings []string // what was wrong with stores and logs, and was worked around

	// Resyncs are the partials of the newest entry: what is still to be read
	// from backings, if a resync is under way.
	Resyncs []format.Partial

	volumes []Volume
	gaps    map[volumeOn][]Gap  // on the branches of which the entries are
	named   []Named             // in log order
	names   map[block.Seq][]int // where in named the names of a seq are
	lastSeq block.Seq           // at which the newest entry that extends the history ends

	branches []Branch // in the order in which they began; never empty, and the last one goes on
	lines    map[block.BranchID]line

	// Entries up to inDigest are in the digest, and read when they are asked for;
	// the others are in tail.
	digest   *digest.Digest
	inDigest uint64
	tail     []Entry
	newest   Entry
	logs     []*storeLog                 // as they were when they were read
	pages    *byteCache[uint64, []Entry] // of the digest

	inFull sync.Mutex // held while full is made
	full   *History   // read without a digest, once a page of that could not be had; nil: not needed

	cfg       Config
	stores    *stores
	values    *values
	manifests *byteCache[string, *manifest.Manifest] // opened, by name
}

// manifestsMemoryBytes bounds the opened manifests that stay in memory for
// further images of the same history.
const manifestsMemoryBytes = 16 << 20

func manifestCost(m *manifest.Manifest) int64 { return int64(len(m.Directory.Pages))*200 + 1024 }

// Volumes are the group's volumes in the order in which they joined, and began to be on
// a branch of their own.
func (h *History) Volumes() []Volume { return slices.Clone(h.volumes) }

// Volume finds a volume by name; of several, the one that joined last.
func (h *History) Volume(name string) (Volume, bool) {
	for _, v := range slices.Backward(h.volumes) {
		if v.Name == name {
			return v, true
		}
	}
	return Volume{}, false
}

// RepoID is the repository's id.
func (h *History) RepoID() block.ID { return h.cfg.Repo.ID }

// Damage lists the objects found missing or damaged so far.
func (h *History) Damage() []Damage { return h.stores.damage.all() }

// Unconfirmed reports whether the newest entry is not known to be decided.
func (h *History) Unconfirmed() bool { return h.N() > h.Decided }

// Close releases the local cache's files.
func (h *History) Close() error {
	h.inFull.Lock()
	defer h.inFull.Unlock()
	if h.full != nil {
		_ = h.full.Close() // it has none
	}
	return h.values.close()
}

// OpenHistory reads the logs of a group from all stores that can be reached.
func OpenHistory(ctx context.Context, cfg Config, group block.GroupID) (*History, error) {
	cfg.defaults()
	return openHistory(ctx, cfg, newStores(&cfg), group)
}

func newHistory(cfg Config, s *stores, group block.GroupID) *History {
	h := &History{GroupID: group, cfg: cfg, stores: s}
	h.values = newValues(s, cfg, group)
	h.manifests = newByteCache[string](manifestsMemoryBytes, manifestCost)
	h.pages = newByteCache[uint64](pagesMemoryEntries, entriesCost)
	return h
}

func openHistory(ctx context.Context, cfg Config, s *stores, group block.GroupID) (*History, error) {
	h := newHistory(cfg, s, group)
	err := h.read(ctx)
	if err != nil {
		_ = h.values.close()
		return nil, fmt.Errorf("read the history of group %s: %w", group, err)
	}
	for _, w := range h.Warnings {
		cfg.Logger.Warn("reading the history", "group", group.String(), "warning", w)
	}
	return h, nil
}

// read reads the history, from a digest on if there is one that fits the logs.
func (h *History) read(ctx context.Context) error {
	h.digest = h.newestDigest(ctx)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	warnings := len(h.Warnings)
	err := h.readFrom(ctx, h.digest)
	if h.digest == nil || err == nil || ctx.Err() != nil {
		return err
	}
	h.cfg.Logger.Warn("the logs cannot be read on from their digest; reading them from their beginning", "group", h.GroupID.String(), "entry", h.digest.Header.N, "error", err)
	h.Warnings, h.digest = h.Warnings[:warnings], nil
	h.values.forget()
	return h.readFrom(ctx, nil)
}

// readFrom reads what the logs hold behind a digest, or all if there is none.
func (h *History) readFrom(ctx context.Context, d *digest.Digest) error {
	h.inDigest = 0
	if d != nil {
		h.inDigest = d.Header.N
	}
	tip, err := h.readTip(ctx)
	if err != nil {
		return err
	}
	if tip.n < h.inDigest {
		return format.Corrupt(format.LogPrefix(h.GroupID), "what can be read of the logs ends at entry %d, and a digest knows entry %d", tip.n, h.inDigest)
	}
	var base Position
	if d != nil {
		base = Position{h.inDigest, d.Header.Hash}
	}
	chain, err := walk(h, tip, base)
	if err != nil {
		return err
	}
	h.Decided = max(tip.decided, h.inDigest)
	if h.cfg.decided {
		if h.Decided == 0 {
			return ErrNoEntries
		}
		chain = chain[:h.Decided-h.inDigest]
	}
	return h.collect(ctx, chain)
}

// readTip reads the logs and finds the newest entry.
func (h *History) readTip(ctx context.Context) (tip, error) {
	upTo := h.cfg.UpTo
	if upTo != nil && upTo.N == 0 {
		return tip{}, ErrNoEntries
	}
	logs, err := readLogs(ctx, h)
	switch {
	case upTo == nil && err == nil:
		return chooseTip(h, logs)
	case upTo != nil && (errors.Is(err, ErrNoEntries) || (err == nil && !h.knows(upTo))):
		return tip{}, fmt.Errorf("%w: entry %d, which is decided, is on none of them", ErrBehind, upTo.N)
	case err != nil:
		return tip{}, err
	}
	return tip{n: upTo.N, hash: upTo.Hash, decided: upTo.N}, nil
}

// knows reports whether an entry is in a log that was read, or is the last one in
// the digest.
func (h *History) knows(p *Position) bool {
	return h.values.node(p.N, p.Hash) != nil || (h.digest != nil && p.N == h.inDigest && p.Hash == h.digest.Header.Hash)
}

func (h *History) warn(format string, args ...any) {
	h.Warnings = append(h.Warnings, fmt.Sprintf(format, args...))
}

// Groups lists the groups that the stores have.
func Groups(ctx context.Context, cfg Config) ([]block.GroupID, error) {
	cfg.defaults()
	return groups(ctx, newStores(&cfg))
}

func groups(ctx context.Context, s *stores) ([]block.GroupID, error) {
	answers := askAll(ctx, s, true, func(ctx context.Context, st object.Store) ([]block.GroupID, error) {
		var found []block.GroupID
		for name, err := range st.ListDirs(ctx, format.GroupsPrefix) {
			if err != nil {
				return nil, err
			}
			if id, err := block.ParseID(strings.TrimSuffix(name, "/")); err == nil {
				found = append(found, block.GroupID(id))
			}
		}
		return found, nil
	})
	if ctx.Err() != nil {
		return nil, ctx.Err()
	}
	found := map[block.GroupID]bool{}
	var failed []error
	for _, a := range answers {
		if a.err != nil {
			failed = append(failed, a.err)
		}
		for _, id := range a.out {
			found[id] = true
		}
	}
	if len(failed) == len(s.members) {
		return nil, fmt.Errorf("list the groups of the repository: %w", errors.Join(failed...))
	}
	out := slices.Collect(maps.Keys(found))
	slices.SortFunc(out, func(a, b block.GroupID) int { return block.ID(a).Compare(block.ID(b)) })
	return out, nil
}
