package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// ofLink opens a link by its id, and a site for the hook that it is on.
func ofLink(id uint32, bpffs string) (*site, rawLink, *LinkInfo, error) {
	l, err := link.NewFromID(link.ID(id))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil, nil, hook.Because(fs.ErrNotExist, "there is no link with id %d", id)
	case err != nil:
		return nil, nil, nil, kernel.Again(kernel.Errno(fmt.Sprintf("link %d", id), err))
	}
	info, err := describeLink(l)
	if err != nil {
		l.Close()
		return nil, nil, nil, err
	}
	raw, err := asRaw(l)
	if err != nil {
		return nil, nil, nil, err
	}
	s, err := Place{Hook: hook.XDP, BPFFS: bpffs}.open()
	if err != nil {
		raw.Close()
		return nil, nil, nil, err
	}
	s.Hook = info.Hook()
	return s, raw, info, nil
}

// DetachLink detaches a link, whoever holds it: it stays in the hands of its
// holders and does nothing any more. One that is not ours only with force.
func DetachLink(ctx context.Context, id uint32, bpffs string, force bool) error {
	return kernel.Retry(ctx, func() error {
		s, l, info, err := ofLink(id, bpffs)
		if err != nil {
			return err
		}
		defer s.close()
		defer l.Close()
		return s.locked(ctx, func(locked *state.Locked) error { return s.detachLink(locked, l, info, force) })
	})
}

func (s *site) detachLink(locked *state.Locked, l rawLink, info *LinkInfo, force bool) error {
	names := s.names()
	defer names.close()
	folder, ours := "", false
	switch info.Type {
	case link.XDPType:
		folder = state.ChainFolder(info.ID, 0)
		chain, err := chainOf(info.Program)
		if err != nil && !force { // force takes one of a later version as well
			return err
		}
		ours = chain != nil
	case link.TCXType, link.CgroupType:
		folder = state.LinkFolder(s.Hook, info.ID)
		rec, err := names.record(info.Attach, info.ID)
		_, pinned, pinErr := names.pin(s.Hook, info.ID)
		if err = errors.Join(err, pinErr); err != nil && !force {
			return err
		}
		ours = pinned || rec != nil
	}
	if !ours && !force {
		return hook.Busy(&hook.Occupant{Kind: hook.KindForeign, Program: programOf(info.Program), LinkID: info.ID}).
			Hint("--force detaches it all the same; whoever holds it keeps a link that does nothing")
	}
	if locked != nil && folder != "" { // of a chain that was displaced, too
		if err := locked.RemoveChain(folder); err != nil {
			return err
		}
	}
	kernel.Step("detach: unpinned")
	err := l.Detach()
	if errors.Is(err, unix.EOPNOTSUPP) || unsupported(err) {
		// bpf_link_ops.detach is missing (kernel/bpf/syscall.c).
		return hook.Because(ebpf.ErrNotSupported, "the kernel cannot detach a link of type %v", typeName(info.Type)).
			Hint("whoever holds it has to close it: \"%s\" tells who that is", s.commandByLink("holders", info.ID))
	}
	if err != nil {
		return kernel.Errno("detach the link", err)
	}
	return names.reg.Delete(info.ID)
}

func typeName(t link.Type) string {
	names := map[link.Type]string{
		link.RawTracepointType: "raw tracepoint", link.TracingType: "tracing", link.IterType: "iterator",
		link.PerfEventType: "perf event", link.KprobeMultiType: "kprobe multi", link.UprobeMultiType: "uprobe multi",
	}
	if n := names[t]; n != "" {
		return n
	}
	return fmt.Sprint(t)
}

// chainOf returns the chain that a program runs, nil when it is not a dispatcher.
func chainOf(prog uint32) (*state.Chain, error) {
	p, err := ebpf.NewProgramFromID(ebpf.ProgramID(prog))
	if err != nil {
		return nil, kernel.Again(kernel.Errno("the program of the link", err))
	}
	defer p.Close()
	chain, err := state.Find(p)
	if errors.Is(err, state.ErrNotOurs) {
		return nil, nil
	}
	return chain, err
}

// AdoptLink makes what a link of another tool attaches a member. On XDP a chain
// takes the place of its program by updating the link; on TCX and cgroups the
// link gets a name. Whoever holds the link can update it again.
func AdoptLink(ctx context.Context, id uint32, bpffs string, req Request) (h Handle, on hook.Hook, err error) {
	err = kernel.Retry(ctx, func() error {
		s, l, info, err := ofLink(id, bpffs)
		if err != nil {
			return err
		}
		if s.Hook == "" {
			err = info.noHook()
		} else {
			err = req.check(s)
		}
		if err == nil {
			on = s.Hook
			err = s.locked(ctx, func(locked *state.Locked) (err error) {
				h, err = s.adoptLink(locked, l, info, req)
				return err
			})
		}
		if err != nil {
			l.Close()
			s.close()
		}
		return err
	})
	return h, on, err
}

func (s *site) adoptLink(locked *state.Locked, l rawLink, info *LinkInfo, req Request) (Handle, error) {
	switch {
	case info.Gone():
		return nil, errGone
	case s.Hook == hook.XDP:
		return s.adoptRoot(locked, &linkRoot{l, info.ID}, req)
	case info.Type == link.TCXType || info.Type == link.CgroupType && s.Hook != hook.LSMCgroup:
		return s.adoptMember(locked, l, info, req)
	}
	return nil, hook.Because(ebpf.ErrNotSupported, "%s is only shown: there are no members on it", s.Hook)
}

// adoptRoot puts a chain into an XDP link, with its program as the first member.
func (s *site) adoptRoot(locked *state.Locked, r *linkRoot, req Request) (Handle, error) {
	old, err := r.program()
	if err != nil {
		return nil, err
	}
	defer old.Close()
	switch _, err := state.Find(old); {
	case err == nil:
		return nil, hook.Because(fs.ErrExist, "link %d carries a chain of libdispatcher already", r.id).
			Hint("attach adds members to it")
	case !errors.Is(err, state.ErrNotOurs):
		return nil, kernel.Again(err) // of a later version, it may be
	}
	prog, err := load.Program{Program: old}.Load(load.Want{Hook: hook.XDP})
	if err != nil {
		return nil, err
	}
	slot, err := newSlot(prog)
	if err != nil {
		return nil, err
	}
	member, err := req.member(slot, prog)
	if err != nil {
		slot.Close()
		return nil, err
	}
	h := &slotHandle{site: s, root: r, slot: slot, slotID: member.MapID, chainID: rand.Uint64()}
	chain := &state.Chain{
		ID: h.chainID, RootLink: r.id, LastSeen: s.homeOf(r, old),
		Plan: dispatch.Plan{Shape: prog.Shape, Slots: []dispatch.Slot{member}},
	}
	slots, err := s.takeBack(locked, chain, slot)
	for _, m := range slots[1:] {
		defer m.Close()
	}
	var dispatcher *ebpf.Program
	if err == nil {
		dispatcher, err = state.Build(chain, inOrder(chain, slots), nil)
	}
	if err == nil {
		defer dispatcher.Close()
		kernel.Step("swap: before")
		err = r.swap(dispatcher, old)
		kernel.Step("swap: after")
	}
	if err != nil {
		slot.Close() // the link is the caller's
		return nil, err
	}
	switch {
	case req.Persistent:
		err = s.pinAdopted(locked, h, member.Name)
	case locked != nil: // a pin of the name is of a member that was displaced
		err = locked.Remove(h.folder(), member.Name)
	}
	if err != nil {
		undo := r.swap(old, dispatcher)
		slot.Close()
		return nil, kernel.Undo(err, undo)
	}
	h.releaseNetNS()
	return h, nil
}

// takeBack adds the members that are pinned beside the link from before somebody
// put another program into it. Their settings went with their chain. It returns
// the slots of all members, the one that is given first, the others opened.
func (s *site) takeBack(locked *state.Locked, chain *state.Chain, slot *ebpf.Map) ([]*ebpf.Map, error) {
	slots := []*ebpf.Map{slot}
	if locked == nil {
		return slots, nil
	}
	folder := state.ChainFolder(chain.RootLink, 0)
	members, err := locked.Members(folder)
	if err != nil {
		return slots, err
	}
	for _, name := range members {
		if name == chain.Slots[0].Name || chain.Named(name) >= 0 {
			continue // it has come back
		}
		m, err := ebpf.LoadPinnedMap(locked.HeldPath(folder, name), nil)
		if err != nil {
			continue // not a member's
		}
		slots = append(slots, m)
		if m.Type() != ebpf.ProgramArray || m.MaxEntries() != 1 {
			continue
		}
		id, err := kernel.MapID(m)
		if err != nil {
			return slots, err
		}
		back := dispatch.Slot{MapID: id, Name: name, Persistent: true, Settings: hook.Settings{}.WithDefaults()}
		if err := chain.Insert(back, hook.Position{}, 0); err != nil {
			return slots, err
		}
	}
	return slots, nil
}

// inOrder returns the slots in the order of the chain's members.
func inOrder(chain *state.Chain, slots []*ebpf.Map) []*ebpf.Map {
	ordered := make([]*ebpf.Map, len(chain.Slots))
	for _, m := range slots {
		if id, err := kernel.MapID(m); err == nil && chain.Index(id) >= 0 {
			ordered[chain.Index(id)] = m
		}
	}
	return ordered
}

// pinAdopted pins a chain whose link its maker may have pinned elsewhere.
func (s *site) pinAdopted(locked *state.Locked, h *slotHandle, name string) error {
	twin, err := openLink(h.root.linkID())
	if err != nil {
		return err
	}
	defer twin.Close()
	return locked.Add(h.folder(), twin, state.MemberPins{Name: name, Slot: h.slot})
}

// homeOf finds where an XDP link is, as far as that can be told.
func (s *site) homeOf(r *linkRoot, prog *ebpf.Program) state.LastSeen {
	var home state.LastSeen
	_, index, err := r.state()
	if err != nil {
		return home
	}
	ns, err := findXDP(int(index), kernel.ProgramID(prog), func(name string, mode hook.Mode) { home.Target, home.Mode = name, mode })
	if err != nil {
		return state.LastSeen{}
	}
	home.NetNS = ns.ID()
	ns.Close()
	return home
}

// adoptMember gives a link of TCX or of a cgroup a name.
func (s *site) adoptMember(locked *state.Locked, l rawLink, info *LinkInfo, req Request) (Handle, error) {
	names, err := s.namesToWrite(locked)
	if err != nil {
		return nil, err
	}
	defer names.close()
	switch rec, err := names.record(info.Attach, info.ID); {
	case err != nil:
		return nil, err
	case rec != nil:
		return nil, hook.Because(fs.ErrExist, "link %d is a member already", info.ID)
	}
	if names.reg == nil && !req.Persistent {
		return nil, hook.Because(ebpf.ErrNotSupported, "there is no registry in %s that could take its name", s.BPFFS).
			Hint("pinned (Persistent) it has one without that")
	}
	called, pinned, err := names.pin(s.Hook, info.ID)
	if err != nil {
		return nil, err
	}
	if req.Name == "" {
		req.Name = called
	}
	h := &linkHandle{site: s, link: l, id: info.ID}
	sp, err := h.spot(info)
	if err != nil {
		return nil, err
	}
	defer sp.close()
	list, err := sp.list(names, nil)
	if err != nil {
		return nil, err
	}
	i := list.withLink(info.ID)
	if i < 0 {
		return nil, kernel.ErrAgain
	}
	others := list.without(i)
	_, rec, err := others.place(s, &load.Loaded{Name: programOf(info.Program).Name}, req)
	if err != nil {
		return nil, err
	}
	if rec.Priority, err = dispatch.Fit(others.ranks(), i, req.Priority); err != nil {
		return nil, err
	}
	rec.LastSeen = sp.home()
	h.rec = *rec
	if err := names.reg.Put(h.id, rec); err != nil {
		return nil, err
	}
	if req.Persistent {
		if err := s.pinNamed(locked, h, called, pinned); err != nil {
			return nil, kernel.Undo(err, names.reg.Delete(h.id))
		}
	}
	s.ns.Release()
	return h, nil
}

// pinNamed pins a member, which may be pinned under another name.
func (s *site) pinNamed(locked *state.Locked, h *linkHandle, called string, pinned bool) error {
	if pinned && called == h.rec.Name {
		return nil
	}
	if err := h.pin(locked, nil); err != nil || !pinned {
		return err
	}
	return kernel.Join(locked.MoveMaps(h.folder(), called, h.folder(), h.rec.Name), locked.Remove(h.folder(), called))
}
