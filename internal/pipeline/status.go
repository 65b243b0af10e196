package pipeline

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"
	"time"

	"drc/internal/block"
	"drc/internal/control"
	"drc/uploader"
)

// The states of a group, from the best to the worst.
var stateOrder = []string{"continuous", "backlog", "initial-sync", "resync", "bitmap", "handed-over", "stalled", "contested", "needs-decision", "fenced", "error"}

// Status implements control.Agent: one snapshot of everything.
func (a *Agent) Status() control.Status {
	s := control.Status{PID: os.Getpid(), Repo: a.cfg.Repo.ID.String(), State: "continuous", Groups: []control.Group{}, Stores: []control.Store{}, Copies: []control.Copy{}}
	b := a.buffer.Stats()
	s.Buffer = control.Buffer{CapacityBytes: b.CapacityBytes, UsedBytes: b.UsedBytes, Rotten: b.Scrub.Rotten, Mended: b.Scrub.Mended, LostShards: b.Scrub.Lost, Disks: []control.Disk{}}
	now := a.cfg.Now()
	a.fill.note(now, b.UsedBytes)
	if seconds, ok := a.fill.lasts(now, b.UsedBytes, b.CapacityBytes-b.UsedBytes); ok {
		s.Buffer.LastsSeconds = &seconds
	}
	for _, d := range b.Disks {
		s.Buffer.Disks = append(s.Buffer.Disks, diskStatus(d))
	}
	groups := a.all()
	a.mu.Lock()
	waiting := a.undecided
	opening := len(groups)+len(waiting) < len(a.names)
	a.mu.Unlock()
	starting := ""
	if !a.IsServing() {
		starting = "the agent is starting: the volumes are not served yet"
		a.mu.Lock()
		noRoom := a.noRoom
		a.mu.Unlock()
		switch {
		case noRoom != nil:
			starting = "the agent is starting, and a file system is full: " + noRoom.Error() + ": it goes on by itself when there is room; make room there"
		case b.Waiting > 0:
			starting = "the agent is starting, and the buffer is full: it goes on by itself when there is room; make room on the buffer's file system, or bring the stores back"
			if opening { // nothing goes to the stores yet
				starting = "the agent is starting, and the buffer is full, as its file system has no room: it goes on by itself when there is room; make room there. If that cannot be, stop the agent, copy the buffer's directory with all that is in it onto another disk, and start with --buffer naming the copy in place of the original"
			}
		}
	}
	for _, name := range a.names {
		opened := slices.ContainsFunc(groups, func(g *group) bool { return g.name == name })
		if !opened && !slices.ContainsFunc(waiting, func(u undecided) bool { return u.name == name }) {
			s.State = "stalled"
			s.Groups = append(s.Groups, control.Group{Name: name, State: s.State, Message: starting, Volumes: []control.Volume{}})
		}
	}
	for _, u := range waiting {
		s.Groups = append(s.Groups, u.status())
		s.State = worse(s.State, "needs-decision")
	}
	for _, g := range groups {
		gs := a.groupStatus(g, b.Waiting > 0)
		if starting != "" && gs.State != "fenced" && gs.State != "error" {
			gs.State, gs.Message = "stalled", starting
		}
		s.State = worse(s.State, gs.State)
		s.Groups = append(s.Groups, gs)
		s.Stores = mergeStores(s.Stores, g)
	}
	return s
}

// worse is the worse of two states.
func worse(x, y string) string {
	if slices.Index(stateOrder, y) > slices.Index(stateOrder, x) {
		return y
	}
	return x
}

func (a *Agent) groupStatus(g *group, waiting bool) control.Group {
	// Read from the newest stage to the oldest, so that the order of the
	// watermarks holds although they move meanwhile.
	committed := ^block.Seq(0)
	for _, v := range g.st.Volumes {
		committed = min(committed, g.up.Committed(v.Index))
	}
	logged := g.up.Logged()
	g.mu.Lock()
	sealed := max(g.seg.Sealed(), logged, g.wasSealed)
	g.mu.Unlock()
	durable := max(g.journal.Durable(), sealed)
	captured := max(g.capture.Captured(), durable)
	_, _, epoch := g.log.Next()
	gs := control.Group{
		Name: g.name, Epoch: epoch.String(), Branch: g.st.branch().String(),
		Captured: captured, Durable: durable, Sealed: sealed, Logged: logged, Committed: min(committed, logged),
		WritersWaiting: waiting, Exposed: g.log.Exposed(a.cfg.Repo.Tolerates()) || g.lacking.noted(), Volumes: []control.Volume{},
	}
	for i := range a.cfg.Repo.Members {
		w := g.up.StoreWaiting(i)
		gs.Waiting.Bytes += w.Bytes
		gs.Waiting.Objects += w.Objects
	}
	oldest, backlog := g.up.Waiting()
	if t := g.capture.OldestAfter(sealed); !t.IsZero() && (oldest == 0 || t.UnixNano() < oldest) {
		oldest = t.UnixNano()
	}
	backlog += g.seg.UncutBytes()
	if oldest != 0 {
		gs.LagSeconds = max(0, a.cfg.Now().Sub(time.Unix(0, oldest)).Seconds())
	}
	gs.BacklogBytes = backlog
	if since := g.inGap(); !since.IsZero() {
		gs.GapSince = since.UTC().Format(time.RFC3339)
		gs.LagSeconds = max(gs.LagSeconds, a.cfg.Now().Sub(since).Seconds())
	}
	for _, v := range g.volumes {
		vs := control.Volume{
			Name: v.cfg.Name, ID: v.desc.ID.String(), Path: v.plan.path, SizeBytes: v.desc.SizeBytes,
			Exports: []string{ExportURI(v.listen, v.cfg.Name)}, Committed: g.up.Committed(v.desc.Index),
			ResyncRemainingBytes: g.seg.ResyncRemaining(v.desc.Index), OverlayBytes: v.dev.OverlayBytes(),
			MarkedBytes: g.bitmap.MarkedBytes(v.desc.Index),
		}
		failed := v.dev.Failed()
		if changed := v.dev.Changed(); changed != nil {
			failed = changed
		}
		if err := errors.Join(failed, v.dev.Full()); err != nil {
			vs.Error = err.Error()
		}
		vs.Connections = a.connections(v)
		gs.Volumes = append(gs.Volumes, vs)
	}
	gs.State, gs.Message = a.judge(g, gs)
	return gs
}

// judge says in one word how a group is, and what to do about it.
func (a *Agent) judge(g *group, s control.Group) (state, message string) {
	g.mu.Lock()
	failed := g.failed
	g.mu.Unlock()
	var locked *uploader.LockedError
	var backing, changed volume // whose backing has failed, or was changed by somebody else
	for _, v := range g.volumes {
		if v.dev.Changed() != nil {
			changed = *v
		}
		if v.dev.Failed() != nil {
			backing = *v
		}
	}
	switch {
	case errors.Is(failed, uploader.ErrFenced), errors.As(failed, &locked):
		return "fenced", "another agent has taken over this group: the exports take no more writes; what was not committed is kept in this host's buffer"
	case failed != nil:
		return "error", failed.Error() + ": writes are kept in the buffer; see the log, mend the cause, and restart the agent"
	case g.renewed.Load() && g.capture.Diverted() && len(g.spool.s.Lost()) > 0:
		return "error", "the buffer has begun anew, and sealed writes that the stores lack were lost with the old one: writes go straight to the volumes, and nothing acknowledged is lost. As soon as this agent is in office on the stores a gap begins, the volumes are compared with their history, and they are protected again by themselves; bring the stores back"
	case g.renewed.Load() && g.capture.Diverted():
		return "error", "the buffer has begun anew: writes go straight to the volumes until what was sealed before is on the stores; then they are compared with their history, and protected again by themselves"
	case g.handed.Load() != 0:
		return "handed-over", "all that was acknowledged is on the stores, and the exports take no more writes: drc promote on the host that goes on with it, or here to take it back"
	case g.journal.Err() != nil && g.capture.Diverted():
		return "error", "all disks of the buffer have failed (" + g.journal.Err().Error() + "): what was in memory is on the volumes, and writes go straight to them; nothing acknowledged is lost, and nothing new is protected. Everything before stays restorable. Give the agent an empty directory on a disk that works: drc buffer add DIR. It then compares the volumes with their history"
	case g.journal.Err() != nil:
		return "error", g.journal.Err().Error() + ": the buffer's disks have failed; writes are refused"
	case g.lacksBatches():
		return "error", "sealed writes that the stores lack were lost with disks of the buffer, or have rotted there: nothing from them on can become history. No acknowledged write is lost: the volumes and the journal have them all. Once everything before them is on the stores their history is given up, a gap begins, and it ends by itself when the volumes have been compared. Bring the stores back if they are away, and replace the disk that the log names"
	case changed.dev != nil:
		return "error", "volume " + changed.cfg.Name + ": " + changed.dev.Changed().Error()
	case backing.dev != nil:
		return "error", troubled(backing)
	case g.log.Contested():
		return "contested", "a minority of the stores follows another agent, and takes nothing from this one: history goes on with the other stores. Find that agent and stop it, then restart this one, which takes those stores back"
	case g.seg.Trouble() != nil:
		return "error", "cutting batches: " + g.seg.Trouble().Error() + ": it is tried again; writes are kept in the buffer"
	case g.up.Trouble() != nil:
		return "error", "bringing history to the stores: " + g.up.Trouble().Error() + ": it is tried again; writes are kept in the buffer"
	case g.capture.Diverted():
		return "bitmap", "the buffer is full: writes go on, and only which regions they change is remembered. A gap has begun in the history; everything before it stays restorable. When the stores have caught up the regions are compared and the gap ends by itself; bring the stores back, or give the buffer more space"
	case s.WritersWaiting:
		return "stalled", "the buffer is full: writers wait until there is room; bring the stores back, or give the buffer more space"
	}
	for _, v := range g.volumes {
		if v.dev.Full() != nil {
			return "stalled", "the file system of volume " + v.cfg.Name + ", " + v.plan.path + ", is full: what was written is safe in the buffer, and the volume goes on by itself when there is room; make room there"
		}
	}
	for _, v := range g.volumes {
		if g.seg.ResyncRemaining(v.desc.Index) > 0 {
			g.mu.Lock()
			_, had := g.prog.Checkpoint[v.desc.Index]
			g.mu.Unlock()
			trouble := ""
			if err := g.seg.ResyncTrouble(v.desc.Index); err != nil {
				trouble = "; at present it cannot go on, and is tried again: " + err.Error()
			}
			if !had || g.up.Committed(v.desc.Index) == 0 {
				return "initial-sync", "the volume's data is on its way to the stores; it can be restored once this is done" + trouble
			}
			return "resync", "the volume is being compared with its history" + trouble
		}
	}
	if s.LagSeconds > 3*a.cfg.RPO.Seconds()+2 {
		return "backlog", "the stores are behind; everything is safe in the buffer and catches up by itself"
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.unsaved != nil {
		return "continuous", "the state folder cannot be written (" + g.unsaved.Error() + "): the volumes are protected, and the next start will do some work again; make room"
	}
	return "continuous", ""
}

// troubled says what to do about a backing that fails.
func troubled(v volume) string {
	return fmt.Sprintf("the backing of volume %s, %s, fails (%v): nothing that was acknowledged is lost: the buffer holds it, reads of it come from memory, and history goes on to the stores. It is tried again all the time and goes on by itself when it works. Mend the disk or its path; if it is lost, stop the agent and restore onto another: drc restore %s TARGET --with-buffer DIR",
		v.cfg.Name, v.plan.path, v.dev.Failed(), v.cfg.Name)
}

// mergeStores adds what a group knows of the stores.
func mergeStores(all []control.Store, g *group) []control.Store {
	for i, st := range g.log.Status() {
		if since, err := g.up.StoreTrouble(i); !since.IsZero() && st.State == "up" {
			st.State, st.Since, st.LastError = "down", since, err.Error()
		}
		if len(all) <= i {
			all = append(all, control.Store{URL: st.URL, ID: st.Store.String(), State: "up"})
		}
		mergeStore(&all[i], st, g.up.StoreDamage(i))
		w := g.up.StoreWaiting(i)
		all[i].Waiting.Bytes += w.Bytes
		all[i].Waiting.Objects += w.Objects
	}
	return all
}

// mergeStore adds what a group knows of a store; the worst word wins. An object
// that the store refused for good is told of while there is nothing worse.
func mergeStore(s *control.Store, st uploader.StoreStatus, damage error) {
	order := []string{"up", "joining", "down", "fenced", "damaged"}
	if slices.Index(order, st.State) > slices.Index(order, s.State) {
		s.State, s.LastError = st.State, st.LastError
		if !st.Since.IsZero() {
			s.Since = st.Since.UTC().Format(time.RFC3339)
		}
	}
	if damage != nil && s.LastError == "" {
		s.LastError = damage.Error()
	}
}

// ExportURI is how NBD clients name an export of a listen URI: a URI as of the
// NBD project's document on URIs, with what is not plain in it escaped.
func ExportURI(listen, export string) string {
	name := url.PathEscape(export)
	if path, ok := strings.CutPrefix(listen, "unix:"); ok {
		// A slash needs no escape in a query, and a plus would be one.
		socket := strings.NewReplacer("%2F", "/", "+", "%20").Replace(url.QueryEscape(path))
		return fmt.Sprintf("nbd+unix:///%s?socket=%s", name, socket)
	}
	return fmt.Sprintf("nbd://%s/%s", strings.TrimPrefix(listen, "tcp:"), name)
}

// Checkpoint implements control.Agent.
func (a *Agent) Checkpoint(ctx context.Context, r control.CheckpointRequest) (control.CheckpointAnswer, error) {
	var none control.CheckpointAnswer
	usage := func(format string, args ...any) (control.CheckpointAnswer, error) {
		return none, &control.CodedError{Code: 2, Err: fmt.Errorf(format, args...)}
	}
	if err := CheckName(r.Name); err != nil {
		return none, &control.CodedError{Code: 2, Err: err}
	}
	if !a.IsServing() {
		return none, errNotServing
	}
	var g *group
	var names []string
	groups := a.all()
	for _, x := range groups {
		names = append(names, x.name)
		if x.name == r.Group || (r.Group == "" && len(groups) == 1) {
			g = x
		}
	}
	if g == nil {
		for _, u := range a.undecided {
			if u.name == r.Group || r.Group == "" {
				return none, fmt.Errorf("group %s waits for a decision and takes no writes: %w", u.name, u.err)
			}
		}
		if r.Group == "" {
			return usage("there are several groups (%s): say which with --group", strings.Join(names, ", "))
		}
		return none, &control.CodedError{Code: 3, Err: fmt.Errorf("there is no group %s here; there are: %s", r.Group, strings.Join(names, ", "))}
	}
	g.mu.Lock()
	failed := g.failed
	g.mu.Unlock()
	if failed != nil {
		return none, fmt.Errorf("group %s has stopped: %w", g.name, failed)
	}
	if g.capture.Diverted() {
		return none, fmt.Errorf("group %s is in bitmap mode because the buffer is full, so nothing can be named now: try again when drc status says continuous", g.name)
	}
	for _, v := range g.volumes {
		if left := g.seg.ResyncRemaining(v.desc.Index); left > 0 {
			return none, fmt.Errorf("volume %s is still being read (%d bytes to go), so nothing can be named yet: try again when drc status says continuous", v.cfg.Name, left)
		}
	}
	now := a.cfg.Now()
	seq := g.seg.Checkpoint(r.Name, now)
	answer := control.CheckpointAnswer{Name: r.Name, Group: g.name, Seq: seq, Time: now.UTC().Format(time.RFC3339Nano)}
	if !r.Wait {
		return answer, nil
	}
	if err := g.awaitNamed(ctx, namedKey{r.Name, now.UnixNano()}); err != nil {
		return none, fmt.Errorf("checkpoint %s was asked for, and is not committed yet: %w", r.Name, err)
	}
	answer.Committed = true
	return answer, nil
}

// CheckName refuses names of checkpoints that could be mistaken for other
// points.
func CheckName(name string) error {
	switch {
	case name == "":
		return errors.New("a checkpoint needs a name")
	case len(name) > 200:
		return fmt.Errorf("the name %.20s… is longer than 200 bytes", name)
	case name == "latest", strings.HasPrefix(name, "seq:"), strings.HasPrefix(name, "-"), name[0] >= '0' && name[0] <= '9' && strings.ContainsAny(name, "-:"):
		return fmt.Errorf("%q could be mistaken for another point (latest, seq:N, a time): choose another name", name)
	case !printable(name):
		return fmt.Errorf("the name %q is not text without control characters: choose another name", name)
	}
	return nil
}

// connections is how many clients a volume has.
func (a *Agent) connections(v *volume) (n int) {
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, s := range a.sockets {
		if s.uri != v.listen {
			continue
		}
		for _, c := range s.server.Connections() {
			if c.Export == v.cfg.Name {
				n++
			}
		}
	}
	return n
}
