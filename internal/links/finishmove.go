package links

import (
	"errors"
	"io/fs"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// A halfMove is an unfinished move on TCX.
type halfMove struct {
	hook    hook.Hook
	slotID  uint32
	prog    *ebpf.Program // the member's program; nil when the slot is empty
	oldID   uint32
	old     kernel.RawLink // nil when the program had no link, or the link is gone
	there   *ebpf.Program  // the stand-in at the old place
	next    kernel.RawLink // the new link; nil when there is none
	nextID  uint32
	info    kernel.LinkInfo // of next
	kept    bool            // next is pinned
	up      bool
	standIn standIn // loaded again, to finish the move
}

// openMove finds out how far a move has come, of which the slot is pinned. It takes over the
// slot; the caller closes the result.
func openMove(l *state.Locked, name string, slot *ebpf.Map) (*halfMove, error) {
	m := &halfMove{oldID: state.ParseMove(name), standIn: standIn{slot: slot}}
	if err := m.readState(l); err != nil {
		m.close()
		return nil, err
	}
	return m, nil
}

func (m *halfMove) readState(l *state.Locked) (err error) {
	if m.slotID, err = kernel.MapID(m.standIn.slot); err != nil {
		return err
	}
	id, err := state.Occupant(m.standIn.slot)
	if err != nil || id == 0 {
		return err
	}
	if m.prog, err = ebpf.NewProgramFromID(ebpf.ProgramID(id)); err != nil {
		return err
	}
	if m.standIn.records, err = state.KeepRecords(m.prog); err != nil {
		return err
	}
	links, err := kernel.AllLinks()
	if err != nil {
		return err
	}
	for _, li := range links {
		p, name, err := m.standInOf(li.Program)
		if err != nil {
			return err
		}
		if p != nil {
			if err := m.found(l, li, p, name); err != nil {
				return err
			}
		}
	}
	if m.old != nil && m.next == nil {
		if err := m.successor(l, links); err != nil {
			return err
		}
	}
	if m.next != nil && m.kept && m.standIn.mark != nil {
		return m.standIn.loadAll()
	}
	return nil
}

// successor looks for a new link that runs the program without a stand-in already.
func (m *halfMove) successor(l *state.Locked, links []kernel.LinkInfo) error {
	for _, li := range links {
		rec, err := m.standIn.records.Get(li.ID)
		if err != nil {
			return err
		}
		if rec == nil || rec.MovedFrom != m.oldID {
			continue
		}
		if pinned, err := pinnedLink(l, li.Hook(), li.ID); err != nil {
			return err
		} else if !pinned {
			continue
		}
		if m.next, err = kernel.OpenLink(li.ID); err != nil {
			return err
		}
		m.nextID, m.info, m.kept = li.ID, li, true
		return nil
	}
	return nil
}

// found notes a link that runs the stand-in there. It takes over the stand-in.
func (m *halfMove) found(l *state.Locked, li kernel.LinkInfo, there *ebpf.Program, name string) error {
	link, err := kernel.OpenLink(li.ID)
	if err == nil && li.ID == m.oldID {
		m.hook = li.Hook()
		m.old, m.there, m.up = link, there, name == dispatch.StandInSecond
		return nil
	}
	there.Close()
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	m.hook = li.Hook()
	if m.next != nil {
		link.Close()
		return errors.New("more links than a move has")
	}
	m.next, m.nextID, m.info = link, li.ID, li
	m.kept, err = pinnedLink(l, m.hook, li.ID)
	return err
}

// standInOf opens a program, and its mark, if it is a stand-in for the program in the
// slot; nil for another program. The name says which stand-in it is. The caller closes
// the program.
func (m *halfMove) standInOf(progID uint32) (*ebpf.Program, string, error) {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(progID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", nil
	}
	if err != nil {
		return nil, "", err
	}
	name, err := m.standInNamed(prog)
	if err != nil || name == "" {
		prog.Close()
		return nil, "", err
	}
	return prog, name, nil
}

// standInNamed returns the name of a stand-in and opens its mark. It returns "" for
// another program.
func (m *halfMove) standInNamed(prog *ebpf.Program) (string, error) {
	slot, err := standInFor(prog)
	if err != nil || slot != m.slotID {
		return "", err
	}
	info, err := prog.Info()
	if err != nil {
		return "", err
	}
	ids, _ := info.MapIDs()
	for _, id := range ids {
		if m.standIn.mark == nil && uint32(id) != m.slotID {
			if m.standIn.mark, err = ebpf.NewMapFromID(id); err != nil {
				return "", err
			}
		}
	}
	return info.Name, nil
}

func (m *halfMove) close() {
	m.standIn.close(nil)
	m.prog.Close()
	m.there.Close()
	for _, l := range []kernel.RawLink{m.old, m.next} {
		if l != nil {
			l.Close()
		}
	}
}

// finishAdoption takes out the program without a link, or the filter, that the new link
// replaces on the same device. It returns false when the adoption could not be finished.
func (m *halfMove) finishAdoption() bool {
	if m.info.Gone() {
		return true
	}
	done := false
	ns, err := kernel.FindNetNS(func(ns *kernel.NetNS) error {
		return rtnl.In(ns, func(conn *rtnl.Conn) error {
			q, err := queryAround(&m.info)
			if err == nil {
				done = m.adoptionOn(ns, conn, q)
			}
			return err
		})
	})
	if err != nil {
		return false
	}
	ns.Close()
	return done
}

// adoptionOn finishes an adoption in the thread's namespace.
func (m *halfMove) adoptionOn(ns *kernel.NetNS, conn *rtnl.Conn, q *kernel.Query) bool {
	op := &opened{Opened: &target.Opened{Target: target.Target{Hook: m.hook}, NS: ns}, kind: kernel.KindOf(m.hook), index: m.info.Ifindex, here: true}
	filters, err := conn.Filters(m.info.Ifindex)
	if err != nil {
		return false
	}
	var without []uint32 // programs without a link
	var olds []incumbent // what has them
	for i, id := range q.Programs {
		if q.Links[i] == 0 {
			without, olds = append(without, id), append(olds, bare{op})
		}
	}
	for _, f := range filters {
		if f.Kind != "bpf" {
			continue
		}
		without, olds = append(without, f.Program), append(olds, filterIncumbent{conn, m.info.Ifindex, f})
	}
	for i, id := range without {
		there, _, err := m.standInOf(id)
		if err != nil {
			return false
		}
		if there != nil {
			defer there.Close()
			return m.standIn.finish(olds[i], there, m.next, m.prog, true) == nil
		}
	}
	return m.next.Update(m.prog) == nil
}
