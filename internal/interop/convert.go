package interop

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// A ConvertRequest says how an XDP chain changes to the other style.
type ConvertRequest struct {
	To hook.Style
	// Programs are the sources of the members' programs, by name or as "id:PROG".
	// A member without a source keeps its loaded program.
	Programs map[hook.Ref]load.Source
	// NoGap leaves the owned chain without a link.
	NoGap bool
	// ConfigVersion is the config version of libxdp's chain; 0 chooses it.
	ConfigVersion uint8
	Owner         string
}

// Convert moves all members of the chain on a device to a chain of the other style.
// It returns fs.ErrExist when the chain has that style already.
func Convert(ctx context.Context, o *target.Opened, req ConvertRequest) error {
	if o.Pins == nil {
		return o.NoBPFFS()
	}
	d := deviceOf(o)
	switch {
	case req.To == hook.StyleLibxdp && req.Owner != "":
		return hook.Because(hook.ErrUsage, "owner %q: members of a chain of libxdp have none", req.Owner)
	case req.To == hook.StyleOwned && req.ConfigVersion != 0:
		return hook.Because(hook.ErrUsage, "config version %d: only a chain of libxdp has one", req.ConfigVersion)
	case req.To == hook.StyleLibxdp && req.NoGap:
		return hook.Because(hook.ErrUsage, "without a gap: netlink cannot take the place of a link; there is always a gap on the way to a chain of libxdp")
	case req.To == hook.StyleLibxdp:
		return kernel.Retry(ctx, func() error { return d.toLibxdp(ctx, req) })
	case req.To != hook.StyleOwned:
		return hook.Because(hook.ErrUsage, "style %q: must be %s or %s", req.To, hook.StyleOwned, hook.StyleLibxdp)
	}
	if req.Owner == "" {
		req.Owner = target.Executable()
	}
	var old libxdp.Chain
	err := kernel.Retry(ctx, func() (err error) {
		old, err = d.toOwned(ctx, req)
		return err
	})
	if err != nil {
		return err
	}
	kernel.Step("convert: attached")
	if err := libxdp.Remove(ctx, d.BPFFS, old.Ifindex, ebpf.ProgramID(old.Dispatcher.ID)); err != nil {
		return hook.WithHint(fmt.Errorf("the device has the owned chain now, but the pins of libxdp's dispatcher are still there: %w", Cause(err)),
			"\"%s\" removes them", kernel.Command("", d.BPFFS, nil, "recover"))
	}
	return nil
}

// source returns the source of a member's program, and removes it from given.
func (req *ConvertRequest) source(given map[hook.Ref]load.Source, m *hook.Member) load.Source {
	for _, ref := range []hook.Ref{hook.ProgramRef(m.Program.ID), hook.Ref(m.Name)} {
		if src := given[ref]; src != nil {
			delete(given, ref)
			return src
		}
	}
	return nil
}

// unknown returns an error when given has sources for members that do not exist.
func unknown(given map[hook.Ref]load.Source, c *hook.Chain) error {
	for ref := range given {
		var names []string
		for _, m := range c.Members {
			names = append(names, m.Name)
		}
		return hook.Because(fs.ErrNotExist, "there is no member %q to have another program (there are: %s)", ref, strings.Join(names, ", "))
	}
	return nil
}

// anOwned is an owned chain that is not on a device yet.
type anOwned struct {
	chain  state.Chain
	slots  []*ebpf.Map
	loaded []*load.Loaded
	prog   *state.Dispatcher
}

// close closes what the chain holds. If the chain was not used, close discards its
// programs too.
func (o *anOwned) close(used bool) {
	for _, l := range o.loaded {
		if used {
			l.Close()
		} else {
			l.Discard()
		}
	}
	for _, slot := range o.slots {
		slot.Close()
	}
	o.prog.Close()
}

// toOwned takes a dispatcher of libxdp off the device and puts an owned chain
// there. It returns libxdp's old chain, which still has its pins.
func (d device) toOwned(ctx context.Context, req ConvertRequest) (old libxdp.Chain, err error) {
	snap, err := d.Read()
	if err != nil {
		return old, err
	}
	defer snap.Close()
	switch {
	case snap.Free():
		return old, hook.Because(fs.ErrNotExist, "nothing is attached")
	case snap.Chain != nil:
		return old, hook.Because(fs.ErrExist, "the chain is an owned one already").
			Hint("attach adds members to it")
	case !snap.Libxdp:
		return old, d.Occupied(snap)
	}
	from, err := d.libxdpOf(snap)
	if err != nil {
		return old, err
	}
	owned, err := d.ownedOf(snap, from, req)
	if err != nil {
		return old, err
	}
	used := false
	defer func() { owned.close(used) }()
	err = d.Locked(ctx, func(l *state.Locked) error {
		// The pins come first, so that no step leaves members without an owner.
		folder := state.ChainFolder(0, owned.chain.ID)
		for i, slot := range owned.chain.Slots {
			if err := l.Add(folder, nil, state.MemberPins{Name: slot.Name, Slot: owned.slots[i], Maps: owned.loaded[i].Maps}); err != nil {
				return kernel.Undo(err, l.RemoveChain(folder))
			}
		}
		kernel.Step("convert: pinned")
		if err := d.exchangeChain(l, snap, owned, req.NoGap); err != nil {
			return kernel.Undo(err, l.RemoveChain(folder))
		}
		used = true
		return nil
	})
	from.Ifindex = snap.Device.Index
	return *from, err
}

// exchangeChain replaces what is on the device by the owned chain. The members of
// the owned chain must be pinned already.
func (d device) exchangeChain(l *state.Locked, snap *chains.Snapshot, owned *anOwned, noGap bool) error {
	if noGap {
		return snap.OnNetlink(d.Opened).Swap(owned.prog.Program, snap.Prog)
	}
	r, err := d.Exchange(snap, owned.prog.Program)
	if err != nil {
		return err
	}
	defer r.Close()
	kernel.Step("convert: after the gap")
	if err := l.Move(state.ChainFolder(0, owned.chain.ID), state.ChainFolder(r.LinkID(), 0), r.Pinner()); err != nil {
		return kernel.Undo(err, d.Restore(r, owned.prog.Program, snap))
	}
	chains.PinDispatcher(r)
	return nil
}

// ownedOf makes an owned chain of the members of libxdp's chain.
func (d device) ownedOf(snap *chains.Snapshot, from *libxdp.Chain, req ConvertRequest) (owned *anOwned, err error) {
	var view hook.Chain
	viewLibxdp(&view, from)
	shape := dispatch.Shape{AttachType: ebpf.AttachXDP, Frags: from.Config.Frags}
	given := maps.Clone(req.Programs)
	bare := req.bare(&view)
	if len(bare) > 0 {
		// The kernel keeps no attach type for a freplace program. So only a chain
		// without an attach type can take the program, if any chain can.
		shape.AttachType = ebpf.AttachNone
	}
	o := &anOwned{chain: state.Chain{ID: rand.Uint64(), LastSeen: d.Seen(snap.Device, snap.Mode), Plan: dispatch.Plan{Shape: shape}}}
	defer func() {
		if err != nil {
			o.close(false)
		}
	}()
	last := hook.MinPriority
	for i := range view.Members {
		m := &view.Members[i]
		if m.State == hook.StateEmpty {
			continue // the program is gone, and packets skip the member
		}
		loaded, err := d.memberProgram(m, req.source(given, m), load.Want{Hook: hook.XDP, Shape: &shape, Begins: snap.Begins})
		if err != nil {
			return nil, err
		}
		o.loaded = append(o.loaded, loaded)
		slot, err := chains.NewSlot(loaded)
		if err != nil {
			if len(bare) > 0 && errors.Is(err, hook.ErrIncompatible) {
				err = notCallable(bare, err)
			}
			return nil, err
		}
		o.slots = append(o.slots, slot)
		id, err := kernel.MapID(slot)
		if err != nil {
			return nil, err
		}
		// libxdp's priorities can be any number. Only the order is kept.
		last = max(last, min(m.Priority, hook.MaxPriority))
		settings := hook.Settings{Priority: last, ContinueOn: m.ContinueOn, OnMissing: hook.MissingContinue}
		o.chain.Slots = append(o.chain.Slots, dispatch.Slot{
			MapID: id, Name: uniqueName(o.chain.Slots, m.Name), Owner: req.Owner, Persistent: true, Settings: settings,
		})
	}
	if err := unknown(given, &view); err != nil {
		return nil, err
	}
	if len(o.slots) == 0 {
		return nil, hook.Because(fs.ErrNotExist, "the dispatcher has no members any more: their pins are gone").
			Hint("detach it with --all")
	}
	if o.prog, err = state.Build(&o.chain, o.slots, nil); err != nil && len(bare) > 0 {
		err = notCallable(bare, err)
	}
	return o, err
}

// memberProgram loads the program of a member from src. Without src it returns the
// loaded program. A program from a file takes over the old program's maps.
func (d device) memberProgram(m *hook.Member, src load.Source, want load.Want) (*load.Loaded, error) {
	old, err := ebpf.NewProgramFromID(ebpf.ProgramID(m.Program.ID))
	if err != nil {
		return nil, kernel.Again(fmt.Errorf("member %q: %w", m.Name, err))
	}
	defer old.Close()
	if src == nil {
		return load.Reuse(old, *want.Shape)
	}
	return load.Successor(load.PinningIn(src, d.BPFFS), load.Own(old), want)
}

// bare returns the names of the members for which no source was given.
func (req *ConvertRequest) bare(c *hook.Chain) (names []string) {
	for i := range c.Members {
		m := &c.Members[i]
		if m.State != hook.StateEmpty && req.Programs[hook.Ref(m.Name)] == nil && req.Programs[hook.ProgramRef(m.Program.ID)] == nil {
			names = append(names, m.Name)
		}
	}
	return names
}

// notCallable returns the error for programs of libxdp that the kernel cannot call
// from a slot. Linux 6.1 can; Linux 5.10, 6.12 and 7.2 cannot.
func notCallable(members []string, err error) error {
	hint := "give their files:"
	for _, name := range members {
		hint += fmt.Sprintf(" --program %s=FILE[:NAME]", name)
	}
	return hook.Because(hook.ErrIncompatible, "%s: loaded for libxdp's dispatcher, and this kernel lets such programs run nowhere else: %w", strings.Join(members, ", "), err).
		Hint("%s", hint)
}

// uniqueName returns the name, with a number behind it if a slot has that name.
func uniqueName(slots []dispatch.Slot, name string) string {
	for n, unique := 2, name; ; n++ {
		if !slices.ContainsFunc(slots, func(s dispatch.Slot) bool { return s.Name == unique }) {
			return unique
		}
		unique = fmt.Sprintf("%s-%d", name, n)
	}
}
