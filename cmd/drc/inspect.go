package main

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"drc/internal/block"
	"drc/internal/crypt"
	"drc/internal/format"
	"drc/internal/grouplog"
	"drc/internal/manifest"
	"drc/internal/object"
	"drc/internal/segment"
)

// maxInspectBytes bounds what inspect reads into memory.
const maxInspectBytes = 256 << 20

func inspectCommand(g *global) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "inspect OBJECT",
		Short: "Show what a stored object says, or what a buffer keeps",
		Long: `Show any structure that DRC stores, as JSON: repository records, log objects,
manifests, shards, and the buffer's labels, journal and batch files. OBJECT is a
file, or the name of an object on the store given with --store. With the
identity (or an agent key) signatures are checked and sealed parts opened;
without it the clear parts are shown.

If OBJECT is a folder, the state folder of an agent or a directory of its buffer,
the writes are listed that are kept there and are not on the stores: seqs, times,
regions, sealed batches that wait, and what can be done with them. An agent that
runs, as one that was fenced, is asked itself. Nothing is changed.`,
		Example: `  drc inspect repo/0000000000000001 --store file:///backup/drc
  drc inspect /var/lib/drc/buffer/label
  drc inspect /var/lib/drc --json | jq '.groups[].volumes[].regions'`,
		Args: exactly("OBJECT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			if st, err := os.Stat(args[0]); err == nil && st.IsDir() {
				return g.inspectFolder(cmd.Context(), args[0], asJSON)
			}
			return g.inspect(cmd.Context(), args[0])
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "of a folder: machine-readable output, with all regions (objects are always shown as JSON)")
	return c
}

func (g *global) inspect(ctx context.Context, name string) error {
	var k *keys
	if g.identity != "" || g.agentKey != "" {
		var err error
		if k, err = g.loadKeys(); err != nil {
			return err
		}
	}
	raw, err := g.readObject(ctx, name, k)
	if err != nil {
		return err
	}
	out, err := describe(name, raw, k)
	if out != nil {
		err = errors.Join(err, g.printJSON(out))
	}
	return err
}

// readObject reads a file, or an object from the first store that has it. With
// keys it also learns the key sets of the object's group from its log.
func (g *global) readObject(ctx context.Context, name string, k *keys) ([]byte, error) {
	st, err := os.Stat(name)
	if err == nil {
		if !st.Mode().IsRegular() { // a pipe would be waited for, and a device has no end
			return nil, usage("%s is neither a file nor a folder: see drc inspect --help", name)
		}
		if st.Size() > maxInspectBytes {
			return nil, fmt.Errorf("%s has %d bytes: inspect reads at most %d", name, st.Size(), maxInspectBytes)
		}
		return os.ReadFile(name)
	}
	if !errors.Is(err, fs.ErrNotExist) || len(g.storeURLs()) == 0 {
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%w: %s does not exist; for an object on a store, pass --store URL", object.ErrNotFound, name)
		}
		return nil, fmt.Errorf("read %s: %w", name, cause(err))
	}
	all, err := openStores(ctx, g.storeURLs(), false)
	if err != nil {
		return nil, err
	}
	defer closeStores(all)
	for _, s := range all {
		if k != nil {
			learnKeySets(ctx, s, name, k.ring)
		}
		var raw []byte
		if raw, _, err = s.Get(ctx, name, maxInspectBytes, nil); err == nil {
			return raw, nil
		}
	}
	if errors.Is(err, object.ErrNotFound) {
		return nil, fmt.Errorf("%w: %s is neither a file nor an object on the stores given", object.ErrNotFound, name)
	}
	return nil, fmt.Errorf("read %s: %w", name, err)
}

// learnKeySets adds the key sets in the log of the group that name belongs to.
// What cannot be read is left out: the object is then shown without its sealed
// parts.
func learnKeySets(ctx context.Context, s object.Store, name string, ring *crypt.Ring) {
	rest, ok := bytes.CutPrefix([]byte(name), []byte(format.GroupsPrefix))
	if !ok || len(rest) < 32 {
		return
	}
	id, err := block.ParseID(string(rest[:32]))
	if err != nil {
		return
	}
	for info, err := range s.List(ctx, format.LogPrefix(block.GroupID(id)), "") {
		if err != nil {
			return
		}
		raw, _, err := s.Get(ctx, info.Name, format.MaxLogObjectBytes, nil)
		if err != nil {
			continue
		}
		o, _, _, err := format.DecodeLogObject(info.Name, raw)
		if err != nil || o.Kind != format.LogCommit {
			continue
		}
		v, _, _, _, err := format.DecodeValue(info.Name, o.Value)
		if err != nil {
			continue
		}
		for _, sealed := range v.KeySets {
			_, _ = ring.Add(sealed)
		}
	}
}

// fields is a JSON object in the making.
type fields map[string]any

func when(ns int64) string { return stamp(time.Unix(0, ns)) }

// describe returns what raw says. Next to an error it may return the part that
// could be read.
func describe(name string, raw []byte, k *keys) (fields, error) {
	magic := ""
	if len(raw) >= 5 {
		magic = string(raw[:4])
		if raw[0] == 4 { // a text with its length in front
			magic = string(raw[1:5])
		}
	}
	switch magic {
	case "DRCR":
		return describeRepo(name, raw, k)
	case "DRCL":
		return describeLog(name, raw, k)
	case "DRCV":
		return describeValue(name, raw, k)
	case "DRCK":
		ks, _, _, err := format.DecodeKeySet(raw)
		if err != nil {
			return nil, err
		}
		return fields{"kind": "key set", "id": ks.ID, "repository": ks.Repo, "created": when(ks.Created)}, nil
	case "DRCM":
		return describeManifest(name, raw, k)
	case "DRCS":
		return describeShard(name, raw, k)
	case "DRCB":
		if raw[0] == 4 {
			return nil, fmt.Errorf("%s is a batch's inner record: inspect the batch file that holds it", name)
		}
		l, err := format.DecodeLabel(name, raw)
		return fields{"kind": "buffer label", "content": l}, err
	case "DRCJ":
		return describeJournal(name, raw)
	case "DRCP":
		b, err := format.DecodeSpooledBatch(name, raw)
		if err != nil {
			return nil, err
		}
		return fields{"kind": "spooled batch", "content": b}, nil
	}
	switch { // which may begin with a slot that was never written, or was torn
	case magic == "DRCN" || strings.HasSuffix(name, ".mark"):
		return describeMarks(name, raw)
	case magic == "DRCG" || strings.HasSuffix(name, ".map"):
		return describeBitmap(name, raw)
	}
	if strings.HasSuffix(name, ".jrn") && len(raw) > 0 && allZero(raw[:min(len(raw), format.JournalFileHeaderBytes)]) {
		return fields{"kind": "journal file", "content": nil, "bytes": len(raw)}, nil // prepared, and not used yet
	}
	return nil, format.Corrupt(name, "it does not begin like anything that drc stores")
}

func describeRepo(name string, raw []byte, k *keys) (fields, error) {
	r, body, signature, err := format.DecodeRepoRecord(name, raw)
	if err != nil {
		return nil, err
	}
	root := crypt.RootPublic(r.Root)
	stores := []fields{}
	for _, s := range r.Stores {
		stores = append(stores, fields{"id": s.ID, "votes": s.Votes})
	}
	out := fields{
		"kind": "repository record", "n": r.N, "repository": root.RepoID(), "root": hex.EncodeToString(r.Root[:]), "created": when(r.Created),
		"data_shards": r.Profile.Data, "parity_shards": r.Profile.Parity, "recipients": r.Recipients, "stores": stores, "this_store": r.This,
	}
	if !root.Verify(crypt.ContextRepoRecord, body, signature) {
		return out, format.Corrupt(name, "its signature is wrong")
	}
	if k != nil && k.root != root {
		return out, fmt.Errorf("%s is of repository %s, and the key given of %s: %w", name, root.RepoID(), k.root.RepoID(), crypt.ErrWrongKey)
	}
	return out, nil
}

func describeLog(name string, raw []byte, k *keys) (fields, error) {
	o, _, _, err := format.DecodeLogObject(name, raw)
	if err != nil {
		return nil, err
	}
	kind := "promise"
	if o.Kind == format.LogCommit {
		kind = "commit"
	}
	tails := []fields{}
	for _, t := range o.Tails {
		tails = append(tails, fields{"store": t.Store, "next": t.Next, "last": t.Last})
	}
	out := fields{
		"kind": "log object", "log_kind": kind, "repository": o.Repo, "group": o.Group, "store": o.Store, "index": o.Index,
		"previous": o.Previous, "epoch": o.Epoch.String(), "decided": o.Decided, "tails": tails, "time": when(o.Time), "hash": format.HashOf(raw),
	}
	if k != nil {
		at := grouplog.Place{Repo: o.Repo, Group: o.Group, Store: o.Store, Index: o.Index}
		if _, err := grouplog.VerifyObject(k.root, name, at, raw); err != nil {
			return out, err
		}
		out["signature"] = "good"
	}
	if o.Kind == format.LogCommit {
		v, err := describeValue(name, o.Value, k)
		out["value"] = v
		return out, err
	}
	return out, nil
}

func describeValue(name string, raw []byte, k *keys) (fields, error) {
	v, _, _, _, err := format.DecodeValue(name, raw)
	if err != nil {
		return nil, err
	}
	out := fields{
		"kind": "log value", "n": v.N, "parent": v.Parent, "hash": format.HashOf(raw), "author_epoch": v.Epoch.String(), "key_set": v.KeySet,
		"key_sets_brought": len(v.KeySets), "sealed_bytes": len(v.Body),
	}
	if k == nil {
		return out, nil
	}
	e, err := grouplog.OpenValue(k.ring, name, raw)
	if err != nil {
		return out, err
	}
	it := e.Items
	items := fields{
		"range": it.Range, "volumes": it.Volumes, "checkpoints": it.Checkpoints, "partial": it.Partials,
		"gap_begins": it.GapBegins, "gap_ends": it.GapEnds, "degraded": it.Degraded, "manifest_object": it.Reference,
		"inline_manifest_bytes": len(it.Manifest),
	}
	if it.Group != nil {
		items["group"] = fields{"name": it.Group.Name, "branch": it.Group.Branch, "min_chunk": it.Group.MinChunk, "max_chunk": it.Group.MaxChunk}
	}
	inline := []fields{}
	for _, s := range it.Segments {
		inline = append(inline, fields{"id": s.ID, "bytes": len(s.Payload)})
	}
	items["inline_segments"] = inline
	if it.Manifest != nil {
		if m, err := describeManifest(name, it.Manifest, k); err == nil {
			items["manifest"] = m
		}
	}
	out["items"] = items
	return out, nil
}

func describeManifest(name string, raw []byte, k *keys) (fields, error) {
	h, _, err := format.DecodeManifestHeader(name, raw)
	if err != nil {
		return nil, err
	}
	out := fields{
		"kind": "manifest", "id": h.ID, "group": h.Group, "branch": h.Branch, "from_n": h.FromN, "to_n": h.ToN,
		"from_seq": h.From, "to_seq": h.To, "key_set": h.KeySet, "bytes": len(raw),
	}
	if k == nil {
		return out, nil
	}
	m, err := manifest.OpenBytes(k.ring, name, raw)
	if err != nil {
		return out, err
	}
	pages := []fields{}
	for _, row := range m.Directory.Pages {
		p := fields{"volume": row.Volume, "first": row.First, "end": row.End, "extents": row.Extents, "stored_bytes": row.StoredBytes}
		if !row.Home.IsZero() {
			p["home"] = row.HomeName
		} else if extents, err := m.OpenPage(row, raw[row.Offset:row.Offset+int64(row.StoredBytes)]); err != nil {
			return out, err
		} else {
			p["content"] = describeExtents(extents)
		}
		pages = append(pages, p)
	}
	out["pages"] = pages
	return out, nil
}

func describeExtents(extents []manifest.Extent) []fields {
	out := []fields{}
	for _, x := range extents {
		f := fields{"off": x.Off, "len": x.Len}
		if x.Zero {
			f["zero"] = true
		} else {
			f["segment"], f["chunk"], f["chunk_offset"] = x.Segment.ID, x.Chunk, x.Offset
		}
		out = append(out, f)
	}
	return out
}

func describeShard(name string, raw []byte, k *keys) (fields, error) {
	if len(raw) < format.ShardHeaderSize {
		return nil, format.Corrupt(name, "it has only %d bytes", len(raw))
	}
	h, err := format.DecodeShardHeader(name, raw[:format.ShardHeaderSize])
	if err != nil {
		return nil, err
	}
	out := fields{
		"kind": "shard", "segment": h.Segment, "shard": h.Index, "data_shards": h.Profile.Data, "parity_shards": h.Profile.Parity,
		"payload_bytes": h.Payload, "shard_bytes": h.ShardBytes, "key_set": h.KeySet,
	}
	if n := format.ShardObjectBytes(h.ShardBytes); int64(len(raw)) != n {
		return out, format.Corrupt(name, "it has %d bytes, not %d", len(raw), n)
	}
	if k == nil {
		return out, nil
	}
	ks, ok := k.ring.Set(h.KeySet)
	if !ok {
		out["checksums"] = "not checked: the key set is not known (inspect the object by its name on the store)"
		return out, nil
	}
	if _, _, err := segment.VerifyShard(ks, name, h.Segment, h.Index, raw); err != nil {
		return out, err
	}
	out["checksums"] = "good"
	return out, nil
}
