package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/object"
	"drc/internal/object/stores"
	"drc/internal/repo"
)

func initCommand(g *global) *cobra.Command {
	var ec string
	var recipients []string
	var safe bool
	c := &cobra.Command{
		Use:   "init --store URL [--store URL …] --identity FILE",
		Short: "Create a repository and its identity",
		Long: `Create a repository on the stores given, and write its new identity to FILE
(mode 0600). The identity is the one thing that nothing can bring back: with the
stores and the identity everything can be restored, without it nothing can. So
init wants a second recipient, or a word that the file is backed up.

An init that was interrupted can be repeated as it was: it goes on with what is
there. Until it is done the identity is in FILE.init.`,
		Example: `  drc init --store 's3://backup/drc?endpoint=http://127.0.0.1:9000' --identity drc.id --identity-is-safe
  drc init --store file:///mnt/a/drc --store file:///mnt/b/drc --store file:///mnt/c/drc \
      --ec 4+2 --identity drc.id --recipient age1…`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			return g.initRepo(cmd.Context(), ec, recipients, safe)
		},
	}
	c.Flags().StringVar(&ec, "ec", "", "erasure code `K+M`: K data and M parity shards (default: any one store of two or more can be lost whole, of a single one any one object of a segment)")
	c.Flags().StringArrayVar(&recipients, "recipient", nil, "`AGE` public key that may also read; repeat for more")
	c.Flags().BoolVar(&safe, "identity-is-safe", false, "the identity file is, or will at once be, backed up elsewhere")
	return c
}

func (g *global) initRepo(ctx context.Context, ec string, recipients []string, safe bool) (err error) {
	if g.identity == "" {
		return usage("say where to write the new identity: --identity FILE")
	}
	if !safe && len(recipients) == 0 {
		return usage("losing the identity file would lose all history for good: name a second --recipient, or confirm with --identity-is-safe that the file is backed up elsewhere")
	}
	for _, r := range recipients {
		if _, err := crypt.ParseRecipient(r); err != nil {
			return usageError{err}
		}
	}
	urls := g.storeURLs()
	profile := repo.DefaultProfile(len(urls))
	if ec != "" {
		if profile, err = parseProfile(ec); err != nil {
			return err
		}
	}
	if _, err := os.Lstat(g.identity); err == nil {
		return fmt.Errorf("%s exists: init never overwrites an identity; choose another name", g.identity)
	}
	if st, err := os.Stat(filepath.Dir(g.identity)); err != nil || !st.IsDir() {
		return fmt.Errorf("the folder %s does not exist: make that folder first, or choose another place for the identity", filepath.Dir(g.identity))
	}
	seen := map[string]bool{}
	for _, u := range urls {
		if seen[u] {
			return usage("the store %s is listed twice: list each store once", stores.Redact(u))
		}
		seen[u] = true
	}
	if err := checkStores(ctx, urls); err != nil {
		return err
	}
	// The identity before the stores: where it cannot be kept nothing is made.
	pending, err := openPending(g.identity)
	if err != nil {
		return err
	}
	defer pending.close()
	r, closeRepo, err := createRepo(ctx, urls, pending.identity, profile, recipients)
	if err != nil {
		return errors.Join(err, pending.giveUp(err))
	}
	defer closeRepo()
	if err := pending.finish(); err != nil {
		return err
	}
	fmt.Fprintf(g.out, "repository %s\n", r.ID)
	g.talk("identity written to %s: keep a copy of it off this host", g.identity)
	g.describeProfile(r)
	g.describePolicy(r)
	return nil
}

// createRepo makes a repository on the stores, and their directories if need be.
// The caller closes the stores with the returned function.
func createRepo(ctx context.Context, urls []string, id *crypt.Identity, profile format.Profile, recipients []string) (*repo.Repository, func(), error) {
	all, err := openStores(ctx, urls, true)
	if err != nil {
		return nil, nil, err
	}
	for _, s := range all {
		if err := object.Probe(ctx, s); err != nil {
			closeStores(all)
			return nil, nil, err
		}
	}
	r, err := repo.Create(ctx, all, id.Root, profile, append(id.Recipients(), recipients...), time.Now().UnixNano())
	if err != nil {
		closeStores(all)
		return nil, nil, err
	}
	return r, func() { closeStores(all) }, nil
}

func parseProfile(text string) (format.Profile, error) {
	k, m, ok := strings.Cut(text, "+")
	data, err1 := strconv.Atoi(k)
	parity, err2 := strconv.Atoi(m)
	if !ok || err1 != nil || err2 != nil || data < 1 || parity < 0 || data+parity > 32 {
		return format.Profile{}, usage("--ec %q is not K+M with K from 1 on and K+M up to 32, like 4+2", text)
	}
	return format.Profile{Data: data, Parity: parity}, nil
}

// writeSecret creates a file that only its owner may read, durably.
func writeSecret(path string, raw []byte) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("%s exists: choose another name", path)
	}
	if err != nil {
		return fmt.Errorf("write the key %s: %w", path, cause(err))
	}
	_, werr := f.Write(raw)
	serr := f.Sync()
	if err := errors.Join(werr, serr, f.Close()); err != nil {
		return errors.Join(fmt.Errorf("write the key %s: %w", path, err), os.Remove(path))
	}
	d, err := os.Open(filepath.Dir(path))
	if err != nil {
		return fmt.Errorf("sync the folder of %s: %w", path, err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync the folder of %s: %w", path, err)
	}
	return nil
}

// describeProfile says what the choice survives and what it costs.
func (g *global) describeProfile(r *repo.Repository) {
	p, n := r.Profile(), len(r.Members)
	g.talk("erasure code %d+%d on %d %s: any %d of the %d shards of a segment are enough", p.Data, p.Parity, n, plural(n, "store", "stores"), p.Data, p.Total())
	switch t := r.Tolerates(); {
	case n == 1:
		g.talk("  survives: the loss or rot of any %d %s of each segment; not the loss of the store", p.Parity, plural(p.Parity, "object", "objects"))
	case t == 0:
		g.talk("  survives: the loss of no store; of any %d %s of each segment", p.Parity, plural(p.Parity, "object", "objects"))
	default:
		g.talk("  survives: the loss of any %d of the %d stores", t, n)
	}
	const secondsPerMonth = 30 * 24 * 3600
	g.talk("  costs: %.2f bytes stored for each byte of new data; requests: %d a commit under light load (at most %.1f million puts a month at an RPO of 1 s, none while nobody writes), %d more for each segment",
		float64(p.Total())/float64(p.Data), n, float64(n)*secondsPerMonth/1e6, p.Total())
	if n == 2 {
		g.talk("  of two stores the first one, %s, breaks ties: history can be committed with it alone, and not without it", r.Members[0].URL())
	}
}

// describePolicy prints the least rights that each role needs on S3 stores.
func (g *global) describePolicy(r *repo.Repository) {
	for _, m := range r.Members {
		url := m.URL()
		if !strings.HasPrefix(url, "s3://") {
			g.talk("%s: whoever can write this folder can also erase history; a directory keeps no old versions", url)
			continue
		}
		bucket, prefix, _ := strings.Cut(strings.TrimPrefix(url, "s3://"), "/")
		prefix, _, _ = strings.Cut(prefix, "?")
		prefix = strings.Trim(prefix, "/")
		if prefix != "" {
			prefix += "/"
		}
		g.talk("%s: least policy", url)
		g.talk("  to read (restore, history): s3:GetObject on arn:aws:s3:::%s/%s*, s3:ListBucket on arn:aws:s3:::%s", bucket, prefix, bucket)
		g.talk("  to write (agent): the same and s3:PutObject on arn:aws:s3:::%s/%s*; deny puts without If-None-Match where the store can, or keep versions: otherwise a writer could overwrite history", bucket, prefix)
	}
}

// cause is an error of a file operation without the operation and the path,
// for messages that name them in their own words.
func cause(err error) error {
	var p *fs.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	return err
}

func plural(n int, one, many string) string {
	if n == 1 {
		return one
	}
	return many
}
