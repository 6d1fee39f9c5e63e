package links

import (
	"crypto/rand"
	"encoding/binary"
	"errors"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Names maps links to members, by the records of the programs that the links run. Where a
// program has none, because the link's holder has put it in, or this process may not open
// it, the pins tell.
type Names struct {
	pins     *state.Pins
	pinned   map[string]string // folder to member; read when it is first needed
	programs map[uint32]*known // what was asked for last
}

// known is what is known of a program that is attached.
type known struct {
	standIn bool
	records state.Records
}

// mostPrograms is how many programs Names knows at once: their records are open.
const mostPrograms = 8

// OpenNames returns the names of members, with what is pinned in the target's bpffs. The
// caller closes the Names.
func OpenNames(o *target.Opened) *Names {
	return &Names{pins: o.Pins, programs: map[uint32]*known{}}
}

// Close releases the records.
func (n *Names) Close() {
	for id, c := range n.programs {
		c.records.Close()
		delete(n.programs, id)
	}
}

// ask returns what is known of an attached program. The error is kernel.ErrAgain when
// the program is gone.
func (n *Names) ask(id uint32) (*known, error) {
	if c := n.programs[id]; c != nil {
		return c, nil
	}
	if len(n.programs) == mostPrograms {
		n.Close()
	}
	c := &known{}
	prog, err := kernel.OpenProgram(id, "the program")
	if err == nil {
		defer prog.Close()
		err = c.read(prog)
	}
	// A process that may not open programs and maps by their ids knows the pins only.
	if err != nil && !errors.Is(err, hook.ErrPermission) {
		return nil, err
	}
	n.programs[id] = c
	return c, nil
}

func (c *known) read(prog *ebpf.Program) error {
	slot, err := standInFor(prog)
	if err != nil {
		return err
	}
	c.standIn = slot != 0
	c.records, err = state.RecordsOf(prog)
	return err
}

// resolve returns the program that a stand-in runs. It returns any other program
// unchanged; also a stand-in with an empty slot, and a program that this process is
// not permitted to open. The error is kernel.ErrAgain when the program is gone: it was
// a stand-in, and the move has ended.
func (n *Names) resolve(prog uint32) (uint32, error) {
	c, err := n.ask(prog)
	if err != nil || !c.standIn {
		return prog, err
	}
	p, err := OpenProgram(prog)
	if errors.Is(err, hook.ErrPermission) || errors.Is(err, hook.ErrIncompatible) {
		return prog, nil
	}
	if err != nil {
		return prog, err
	}
	defer p.Close()
	return kernel.ProgramID(p), nil
}

// entry returns the entry for a program on a hook with the attach type, and its link. The
// error is kernel.ErrAgain when the program is gone meanwhile.
func (n *Names) entry(h hook.Hook, attach ebpf.AttachType, prog, link uint32) (e entry, err error) {
	e = entry{Entry: target.Entry{Program: prog, Link: link}, carried: prog}
	if e.Program, err = n.resolve(prog); err != nil || link == 0 {
		return e, err
	}
	if e.rec, err = n.record(h, attach, prog, link); err != nil {
		return e, err
	}
	member, pinned, err := n.pin(h, link)
	if err != nil {
		return e, err
	}
	e.pinned, e.Stays = pinned, pinned
	switch {
	case e.rec != nil:
		e.Name, e.Priority = e.rec.Name, e.rec.Priority
	case pinned:
		e.Name = member
	default:
		e.unnamed = len(n.programs[prog].records) > 0
	}
	return e, nil
}

// record returns the record of a link with the attach type that runs the program; nil if
// there is none.
func (n *Names) record(h hook.Hook, attach ebpf.AttachType, prog, link uint32) (*state.Record, error) {
	c, err := n.ask(prog)
	if err != nil {
		return nil, err
	}
	rec, err := c.records.Get(link)
	if rec == nil && err == nil {
		rec, err = n.pinnedRecord(h, link)
	}
	if rec != nil && rec.Attach != attach {
		rec = nil
	}
	return rec, err
}

// pinnedRecord returns the record of a link by the pin of the records; nil if there is none.
func (n *Names) pinnedRecord(h hook.Hook, link uint32) (*state.Record, error) {
	member, pinned, err := n.pin(h, link)
	if err != nil || !pinned {
		return nil, err
	}
	records, err := n.pins.Records(state.LinkFolder(h, link), member, true)
	if err != nil {
		return nil, err
	}
	defer records.Close()
	return records.Get(link)
}

// Record returns the record of a link; nil if there is none.
func (n *Names) Record(info *kernel.LinkInfo) (*state.Record, error) {
	return n.record(info.Hook(), info.Attach, info.Program, info.ID)
}

// pin returns the member name under which a link is pinned; ok says whether it is.
func (n *Names) pin(h hook.Hook, link uint32) (member string, ok bool, err error) {
	pinned, err := n.allPinned()
	if err != nil {
		return "", false, err
	}
	member, ok = pinned[state.LinkFolder(h, link)]
	return member, ok && n.pins.Has(state.LinkFolder(h, link), member), nil
}

// allPinned returns the member that is pinned in each folder.
func (n *Names) allPinned() (_ map[string]string, err error) {
	if n.pins != nil && n.pinned == nil {
		n.pinned, err = pinnedLinks(n.pins)
	}
	return n.pinned, err
}

// IsMember reports whether a link is a member: it has a record, or is pinned as one.
func (n *Names) IsMember(info *kernel.LinkInfo) (bool, error) {
	rec, err := n.Record(info)
	if rec != nil || err != nil {
		return rec != nil, err
	}
	_, pinned, err := n.pin(info.Hook(), info.ID)
	return pinned, err
}

// keep opens the records of a program, and makes them where there are none. The caller
// closes them.
func (n *Names) keep(prog *ebpf.Program) (state.Records, error) {
	n.Close() // the program may be among the known ones, without records
	return state.KeepRecords(prog)
}

// put writes the record of a link to a program that the link runs, or is about to run. The
// caller closes the records.
func (n *Names) put(prog *ebpf.Program, link uint32, rec *state.Record) (state.Records, error) {
	records, err := n.keep(prog)
	if err == nil {
		err = records.Put(link, rec)
	}
	if err != nil {
		records.Close()
		return nil, err
	}
	return records, nil
}

// Forget removes the record of a link.
func (n *Names) Forget(info *kernel.LinkInfo) error {
	c, err := n.ask(info.Program)
	if err != nil {
		return err
	}
	return c.records.Delete(info.ID)
}

// newMember returns a number for a new member.
func newMember() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return max(1, binary.NativeEndian.Uint64(b[:]))
}

// pinnedLinks returns the member that is pinned in each folder.
func pinnedLinks(pins *state.Pins) (map[string]string, error) {
	folders, err := pins.Links()
	if err != nil {
		return nil, err
	}
	pinned := map[string]string{}
	for _, folder := range folders {
		members, err := pins.Members(folder)
		if err != nil {
			return nil, err
		}
		for _, member := range members {
			pinned[folder] = member
		}
	}
	return pinned, nil
}
