package chains

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// said returns the text and the hints of an error, as a user reads both.
func said(err error) string {
	if err == nil {
		return ""
	}
	return strings.TrimPrefix(hook.Wrap("", "", "", err).Error(), ": ")
}

// slot is a member with a slot of that id.
func slot(id uint32, name string, priority int) dispatch.Slot {
	return dispatch.Slot{MapID: id, Name: name, Settings: hook.Settings{Priority: priority}}
}

func chainOf(slots ...dispatch.Slot) *state.Chain {
	return &state.Chain{ID: 1, Plan: dispatch.Plan{Shape: dispatch.Plain, Slots: slots}}
}

func TestInsert(t *testing.T) {
	persistent := slot(3, "kept", 70)
	persistent.Persistent = true
	const taken = `there is a member "%s" already; choose another name, or replace its program`
	for _, test := range []struct {
		about  string
		member dispatch.Slot
		req    target.Request
		empty  []uint32
		names  string // in run order, each with its slot and its priority
		text   string
		is     []error
		isNot  error
	}{
		{about: "by priority", member: slot(9, "new", 50), names: "a/1/10 new/9/50 b/2/60 kept/3/70"},
		{about: "behind its equals", member: slot(9, "new", 60), names: "a/1/10 b/2/60 new/9/60 kept/3/70"},
		{about: "at a place, with a priority that fits", member: slot(9, "new", 50), req: target.Request{Position: hook.Position{After: "b"}}, names: "a/1/10 b/2/60 new/9/60 kept/3/70"},
		{about: "a closed door of its name is replaced", member: slot(9, "b", 5), empty: []uint32{2}, names: "b/9/5 a/1/10 kept/3/70"},
		{about: "a pinned one, too", member: slot(9, "kept", 5), empty: []uint32{2, 3}, names: "kept/9/5 a/1/10 b/2/60"},
		{about: "another's closed door stays", member: slot(9, "new", 50), empty: []uint32{2}, names: "a/1/10 new/9/50 b/2/60 kept/3/70"},

		{about: "a name that is taken", member: slot(9, "b", 5), empty: []uint32{1}, text: fmt.Sprintf(taken, "b"), is: []error{fs.ErrExist, target.ErrTaken}},
		{about: "the name of one that stays", member: slot(9, "kept", 5), text: fmt.Sprintf(taken, "kept"), is: []error{fs.ErrExist}, isNot: target.ErrTaken},
		{about: "beside one that is not there", member: slot(9, "new", 50), req: target.Request{Position: hook.Position{Before: "c"}},
			text: `there is no member "c" (the chain has: a, b, kept)`, is: []error{fs.ErrNotExist}},
		{about: "beside the closed door that it replaces", member: slot(9, "b", 50), empty: []uint32{2}, req: target.Request{Position: hook.Position{Before: "b"}},
			text: `there is no member "b" (the chain has: a, kept)`, is: []error{fs.ErrNotExist}},
		{about: "a priority that does not fit the place", member: slot(9, "new", 50), req: target.Request{Settings: hook.Settings{Priority: 50}, Position: hook.Position{First: true}},
			text: "priority 50 does not fit there: the members before and after it have 1 and 10; give a position or a priority, not both", is: []error{hook.ErrUsage}},
	} {
		t.Run(test.about, func(t *testing.T) {
			c := chainOf(slot(1, "a", 10), slot(2, "b", 60), persistent)
			empty := map[uint32]bool{}
			for _, id := range test.empty {
				empty[id] = true
			}
			err := insert(test.member, test.req, pinned)(c, empty)
			qt.Assert(t, qt.Equals(said(err), test.text))
			for _, is := range test.is {
				qt.Check(t, qt.ErrorIs(err, is))
			}
			if test.isNot != nil {
				qt.Check(t, qt.Not(qt.ErrorIs(err, test.isNot)))
			}
			if err == nil {
				qt.Check(t, qt.Equals(text(c), test.names))
			}
		})
	}
}

// pinned says that the persistent members are.
func pinned(s dispatch.Slot) bool { return s.Persistent }

func text(c *state.Chain) string {
	var words []string
	for _, s := range c.Slots {
		words = append(words, fmt.Sprintf("%s/%d/%d", s.Name, s.MapID, s.Priority))
	}
	return strings.Join(words, " ")
}

// A full chain has no room, but a closed door makes some.
func TestInsertIntoAFullChain(t *testing.T) {
	c := chainOf()
	for i := range uint32(hook.MaxMembers) {
		c.Slots = append(c.Slots, slot(i+1, fmt.Sprintf("m%d", i+1), 50))
	}
	err := insert(slot(99, "new", 50), target.Request{}, pinned)(c, map[uint32]bool{1: true})
	qt.Check(t, qt.ErrorIs(err, hook.ErrChainFull))
	qt.Check(t, qt.ErrorIs(err, target.ErrTaken)) // one of them may be leaving
	qt.Check(t, qt.Equals(said(err), "the chain has 32 members, and the kernel allows a packet no more tail calls"))
	err = insert(slot(99, "new", 50), target.Request{}, func(dispatch.Slot) bool { return true })(c, nil)
	qt.Check(t, qt.ErrorIs(err, hook.ErrChainFull))
	qt.Check(t, qt.Not(qt.ErrorIs(err, target.ErrTaken)))
	qt.Check(t, qt.IsNil(insert(slot(99, "m1", 50), target.Request{}, pinned)(c, map[uint32]bool{1: true})))
	qt.Check(t, qt.HasLen(c.Slots, hook.MaxMembers))
}

// A fakeRoot carries nothing, and notes what is done to it.
type fakeRoot struct {
	released int
	err      error
}

func (*fakeRoot) LinkID() uint32                         { return 7 }
func (*fakeRoot) Program() (*ebpf.Program, error)        { return nil, errors.ErrUnsupported }
func (*fakeRoot) Swap(_, _ *ebpf.Program) error          { return errors.ErrUnsupported }
func (*fakeRoot) Pinner() interface{ Pin(string) error } { return nil }
func (*fakeRoot) Close()                                 {}
func (r *fakeRoot) Release(*ebpf.Program) error          { r.released++; return r.err }

// What is on the device, the style and the mode decide whether a request can join.
func TestAdmit(t *testing.T) {
	var prog ebpf.Program // nothing asks the kernel about it
	owned := Snapshot{Prog: &prog, Chain: chainOf(slot(1, "a", 10)), Mode: hook.ModeGeneric}
	free, libxdp := Snapshot{}, Snapshot{Prog: &prog, Libxdp: true}
	const (
		otherStyle = `the chain on eth0 is an owned one, and a device has one chain; join it (leave the style out), or move it over with "dispatcher -n blue convert xdp eth0 --style libxdp"`
		otherMode  = "the chain is in generic mode, and all its members are; ask for generic or auto"
	)
	for _, test := range []struct {
		about string
		snap  Snapshot
		req   target.Request
		text  string
		is    error
	}{
		{about: "a free device", snap: free},
		{about: "a free device, in a mode", snap: free, req: target.Request{Style: hook.StyleOwned, Mode: hook.ModeNative}},
		{about: "a free device, for libxdp", snap: free, req: target.Request{Style: hook.StyleLibxdp}, text: ErrStyle.Error(), is: ErrStyle},
		{about: "an owned chain", snap: owned},
		{about: "an owned chain, by its style and mode", snap: owned, req: target.Request{Style: hook.StyleOwned, Mode: hook.ModeGeneric}},
		{about: "an owned chain, for libxdp", snap: owned, req: target.Request{Style: hook.StyleLibxdp}, text: otherStyle, is: hook.ErrIncompatible},
		{about: "an owned chain, in another mode", snap: owned, req: target.Request{Mode: hook.ModeNative}, text: otherMode, is: hook.ErrIncompatible},
		{about: "a chain of libxdp", snap: libxdp, text: ErrStyle.Error(), is: ErrStyle},
		{about: "a chain of libxdp, by its style", snap: libxdp, req: target.Request{Style: hook.StyleLibxdp}, text: ErrStyle.Error(), is: ErrStyle},
	} {
		t.Run(test.about, func(t *testing.T) {
			test.snap.Device = rtnl.Device{Name: "eth0"}
			d := Device{&target.Opened{Target: target.Target{Hook: hook.XDP, Name: "eth0", NetNS: "blue"}}}
			err := d.admit(&test.snap, test.req)
			qt.Check(t, qt.Equals(said(err), test.text))
			if test.is != nil {
				qt.Check(t, qt.ErrorIs(err, test.is))
			}
		})
	}
}

// A closed chain is taken off the device, and then it is tried again, whatever is asked for.
func TestAdmitClosed(t *testing.T) {
	var prog ebpf.Program
	refused := errors.New("refused")
	for _, test := range []struct{ fails, is error }{{nil, kernel.ErrAgain}, {refused, refused}} {
		r := &fakeRoot{err: test.fails}
		snap := &Snapshot{Prog: &prog, Root: r, Chain: &state.Chain{Closed: true}, Mode: hook.ModeGeneric}
		err := Device{&target.Opened{}}.admit(snap, target.Request{Mode: hook.ModeNative, Style: hook.StyleLibxdp})
		qt.Check(t, qt.ErrorIs(err, test.is))
		qt.Check(t, qt.Equals(r.released, 1))
	}
}

// A program fits every device without a chain, and a chain of its own shape.
func TestTakes(t *testing.T) {
	frags := dispatch.Plain
	frags.Frags = true
	for _, test := range []struct {
		chain *state.Chain
		shape dispatch.Shape
		takes bool
	}{
		{nil, frags, true},
		{chainOf(), dispatch.Plain, true},
		{chainOf(), frags, false},
		{chainOf(), dispatch.Shape{}, false},
	} {
		snap := &Snapshot{Chain: test.chain}
		qt.Check(t, qt.Equals(snap.takes(&load.Loaded{Shape: test.shape}), test.takes))
	}
}

// Only a link can be asked whether it still carries what was read.
func TestCurrentWithoutALink(t *testing.T) {
	qt.Check(t, qt.IsTrue((&Snapshot{}).Current()))
	qt.Check(t, qt.IsTrue((&Snapshot{Root: &NetlinkRoot{}}).Current()))
}

// The device carries something else by now: that is worth another try. All else is not.
func TestRaced(t *testing.T) {
	for err, again := range map[error]bool{
		nil: false, unix.EEXIST: true, unix.EBUSY: true, unix.EINVAL: false, unix.ENODEV: false, unix.EPERM: false,
		fmt.Errorf("rtnetlink: %w", unix.EBUSY): true,
	} {
		got := raced(err)
		qt.Check(t, qt.Equals(errors.Is(got, kernel.ErrAgain), again), qt.Commentf("%v", err))
		if !again {
			qt.Check(t, qt.Equals(got, err))
		}
	}
}

// A chain that vanished meanwhile is worth another try, and what it said stays in the error.
func TestJoinError(t *testing.T) {
	for err, again := range map[error]bool{
		nil: false, target.ErrGone: true, target.ErrDetached: true, fs.ErrNotExist: false, hook.ErrChainFull: false, target.ErrTaken: false,
		fmt.Errorf("swap: %w", target.ErrDetached): true,
	} {
		got := joinError(err)
		qt.Check(t, qt.Equals(errors.Is(got, kernel.ErrAgain), again), qt.Commentf("%v", err))
		qt.Check(t, qt.ErrorIs(got, err))
		if !again {
			qt.Check(t, qt.Equals(got, err))
		}
	}
}

// What is taken out of a chain without a chain there is told by style.
func TestTakenByLibxdp(t *testing.T) {
	qt.Check(t, qt.ErrorIs(Device{&target.Opened{}}.taken(&Snapshot{Libxdp: true}), ErrStyle))
}
