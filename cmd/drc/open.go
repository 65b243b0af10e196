package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"time"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/object"
	"drc/internal/object/stores"
	"drc/internal/repo"
	"drc/internal/state"
	"drc/restorer"
)

// keys is what a command holds: an identity, or an agent key, or both.
type keys struct {
	identity *crypt.Identity
	agent    *crypt.Agent
	root     crypt.RootPublic
	ring     *crypt.Ring
}

// loadKeys reads the identity or agent key that was given.
func (g *global) loadKeys() (*keys, error) {
	switch {
	case g.identity != "":
		id, err := readIdentity(g.identity)
		if err != nil {
			return nil, err
		}
		return &keys{identity: id, root: id.RootPublic, ring: crypt.NewRing(id)}, nil
	case g.agentKey != "":
		raw, err := readSecret(g.agentKey)
		if err != nil {
			return nil, err
		}
		agent, root, err := crypt.ParseAgent(g.agentKey, raw)
		if err != nil {
			return nil, err
		}
		return &keys{agent: agent, root: root, ring: crypt.NewAgentRing(agent, root)}, nil
	}
	return nil, usage("no key was given: pass --identity FILE (or set DRC_IDENTITY), the file that drc init wrote")
}

func readIdentity(path string) (*crypt.Identity, error) {
	raw, err := readSecret(path)
	if err != nil {
		return nil, err
	}
	return crypt.ParseIdentity(path, raw)
}

func readSecret(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("the key file %s does not exist: pass the file that drc init or drc key agent wrote", path)
	}
	if err != nil {
		return nil, fmt.Errorf("read the key %s: %w", path, cause(err))
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, 1<<20))
	if err != nil {
		return nil, fmt.Errorf("read the key %s: %w", path, cause(err))
	}
	return raw, nil
}

// openStores opens the stores given, without asking them anything.
func openStores(ctx context.Context, urls []string, create bool) ([]object.Store, error) {
	if len(urls) == 0 {
		return nil, usage("no store was given: pass --store URL (repeat it for each store) or set DRC_STORE")
	}
	var out []object.Store
	for _, u := range urls {
		s, err := stores.Open(ctx, u, stores.Options{Create: create})
		if err != nil {
			closeStores(out)
			if u != "" {
				err = fmt.Errorf("store %s: %w", stores.Redact(u), err)
			}
			return nil, usageError{err}
		}
		out = append(out, s)
	}
	return out, nil
}

// checkStores refuses URLs that are wrong, before anything is made.
func checkStores(ctx context.Context, urls []string) error {
	all, err := openStores(ctx, urls, false)
	closeStores(all)
	return err
}

func closeStores(all []object.Store) {
	for _, s := range all {
		_ = s.Close()
	}
}

// openRepo opens the repository on the stores given. The caller closes the
// stores with the returned function.
func (g *global) openRepo(ctx context.Context, k *keys) (*repo.Repository, func(), error) {
	all, err := openStores(ctx, g.storeURLs(), false)
	if err != nil {
		return nil, nil, err
	}
	r, err := repo.Open(ctx, all, k.root)
	if err != nil {
		closeStores(all)
		return nil, nil, err
	}
	return r, func() { closeStores(all) }, nil
}

// cachedRepo is what a state folder remembers of a repository, so that an
// agent can start while no store can be reached.
type cachedRepo struct {
	Record []byte              `json:"record"` // as one store holds it
	Stores map[string]block.ID `json:"stores"` // by URL
}

// openRepoCached is openRepo for an agent: where no store can be reached, what
// the state folder remembers must do.
func (g *global) openRepoCached(ctx context.Context, k *keys, dir *state.Dir) (*repo.Repository, func(), error) {
	all, err := openStores(ctx, g.storeURLs(), false)
	if err != nil {
		return nil, nil, err
	}
	closeAll := func() { closeStores(all) }
	name := []string{"repositories", k.root.RepoID().String() + ".json"}
	cached := cachedRepo{}
	found, err := dir.LoadJSON(&cached, name...)
	if damaged := (*state.DamagedError)(nil); errors.As(err, &damaged) {
		cached, found, err = cachedRepo{}, false, nil // the stores have it
	}
	if err != nil {
		closeAll()
		return nil, nil, err
	}
	ask, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	r, err := repo.Open(ask, all, k.root)
	if err != nil {
		if !found || !repo.Unreachable(err) || ctx.Err() != nil {
			closeAll()
			return nil, nil, err
		}
		r, cacheErr := repo.FromCache(cached.Record, cached.Stores, all, k.root)
		if cacheErr != nil {
			closeAll()
			return nil, nil, err // why none answers says more than that none was used before
		}
		return r, closeAll, nil
	}
	r.Adopt(cached.Stores, all)
	fresh := cachedRepo{Record: r.Raw, Stores: map[string]block.ID{}}
	for _, m := range r.Members {
		if m.Store != nil {
			fresh.Stores[m.Store.URL()] = m.ID
		}
	}
	if found && bytes.Equal(fresh.Record, cached.Record) && maps.Equal(fresh.Stores, cached.Stores) {
		return r, closeAll, nil
	}
	if err := dir.SaveJSON(fresh, name...); err != nil {
		g.talk("warning: the agent could not start while the stores are away, until this can be kept: %s", plain(err))
	}
	return r, closeAll, nil
}

// agentFor returns the agent key to write with: the one given, or one that the
// state folder keeps and the identity certifies.
func (k *keys) agentFor(dir *state.Dir) (*crypt.Agent, error) {
	if k.agent != nil {
		return k.agent, nil
	}
	name := "agent-" + k.root.RepoID().String() + ".key"
	raw, err := os.ReadFile(dir.Path(name))
	if err == nil {
		agent, root, err := crypt.ParseAgent(dir.Path(name), raw)
		if err != nil {
			return nil, err
		}
		if root != k.root {
			return nil, fmt.Errorf("%s is of another repository: remove it", dir.Path(name))
		}
		return agent, nil
	}
	if !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("read the agent key: %w", err)
	}
	if !k.identity.CanSign() {
		return nil, usage("this identity has no root secret, so it can read and cannot write: use the identity that drc init wrote, or an agent key made with it")
	}
	agent, err := crypt.NewAgent(k.identity.Root, time.Now().UnixNano())
	if err != nil {
		return nil, err
	}
	return agent, dir.Save(agent.EncodeFile(k.root), name)
}

// restorerConfig is how commands read history.
func (g *global) restorerConfig(r *repo.Repository, k *keys) restorer.Config {
	return restorer.Config{Repo: r, Ring: k.ring, CacheDir: state.CachePath(g.statePath())}
}

// printJSON writes v to standard output.
func (g *global) printJSON(v any) error {
	e := json.NewEncoder(g.out)
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false) // it is read by programs and people, not by browsers
	if err := e.Encode(v); err != nil {
		return fmt.Errorf("write the result: %w", err)
	}
	return nil
}

// talk writes a line for people to standard error.
func (g *global) talk(format string, args ...any) { fmt.Fprintf(g.err, format+"\n", args...) }
