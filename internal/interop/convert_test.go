package interop

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// said returns the text and the hints of an error, as a user reads both.
func said(err error) string {
	if err == nil {
		return ""
	}
	return strings.TrimPrefix(hook.Wrap("", "", "", err).Error(), ": ")
}

// The members of libxdp may share a name, those of an owned chain may not.
func TestUniqueName(t *testing.T) {
	for _, test := range []struct {
		taken      []string
		name, want string
	}{
		{nil, "a", "a"},
		{[]string{"b"}, "a", "a"},
		{[]string{"a"}, "a", "a-2"},
		{[]string{"a", "a-2", "a-3"}, "a", "a-4"},
		{[]string{"a", "a-3"}, "a", "a-2"},
		{[]string{"a-2"}, "a-2", "a-2-2"},
	} {
		var slots []dispatch.Slot
		for _, name := range test.taken {
			slots = append(slots, dispatch.Slot{Name: name})
		}
		qt.Check(t, qt.Equals(uniqueName(slots, test.name), test.want))
	}
}

// A chain of libxdp has no closed doors, and its members are nobody's.
func TestConvertible(t *testing.T) {
	const (
		door = `member "a" asks for a closed door when its owner is gone (%s), which libxdp does not have; set it to --on-missing continue first, or detach it`
		held = `member "a" is owned by a process, which would lose it; pin it first, or end its owner`
	)
	for _, test := range []struct {
		state      hook.State
		onMissing  hook.OnMissing
		persistent bool
		text       string
		is         error
	}{
		{hook.StateRunning, hook.MissingContinue, true, "", nil},
		{hook.StateEmpty, hook.MissingContinue, true, "", nil},
		{hook.StateEmpty, hook.MissingContinue, false, "", nil},
		{hook.StateRunning, hook.MissingContinue, false, held, hook.ErrBusy},
		{hook.StateRunning, hook.MissingDrop, true, fmt.Sprintf(door, "drop"), hook.ErrIncompatible},
		{hook.StateRunning, hook.MissingAborted, false, fmt.Sprintf(door, "aborted"), hook.ErrIncompatible},
		{hook.StateEmpty, hook.MissingDrop, true, fmt.Sprintf(door, "drop"), hook.ErrIncompatible},
		{hook.StateEmpty, 0, true, fmt.Sprintf(door, "default"), hook.ErrIncompatible}, // not known to be continue
	} {
		m := &hook.Member{Name: "a", State: test.state, Persistent: test.persistent, Settings: hook.Settings{OnMissing: test.onMissing}}
		err := convertible(m)
		qt.Check(t, qt.Equals(said(err), test.text))
		if test.is != nil {
			qt.Check(t, qt.ErrorIs(err, test.is))
		}
	}
}

// The hint is a command's options: one for each member whose file is needed.
func TestNotCallable(t *testing.T) {
	refused := errors.New("refused")
	err := notCallable([]string{"a", "b"}, refused)
	qt.Check(t, qt.ErrorIs(err, hook.ErrIncompatible))
	qt.Check(t, qt.ErrorIs(err, refused))
	qt.Check(t, qt.Equals(said(err), "a, b: loaded for libxdp's dispatcher, and this kernel lets such programs run nowhere else: refused; "+
		"give their files: --program a=FILE[:NAME] --program b=FILE[:NAME]"))
}

func TestNoSlots(t *testing.T) {
	for onMissing, refused := range map[hook.OnMissing]bool{0: false, hook.MissingContinue: false, hook.MissingDrop: true, hook.MissingAborted: true} {
		err := noSlots(hook.Settings{Priority: 7, OnMissing: onMissing})
		if !refused {
			qt.Check(t, qt.IsNil(err))
			continue
		}
		qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
		qt.Check(t, qt.Equals(said(err), fmt.Sprintf("on-missing %v: a chain of libxdp has no slots that could be empty; it goes on where a member is gone", onMissing)))
	}
}

// chain has two members that run and one whose program is gone.
var chain = &hook.Chain{Members: []hook.Member{
	{Name: "a", Program: hook.Program{ID: 11}, State: hook.StateRunning},
	{Name: "b", Program: hook.Program{ID: 12}, State: hook.StateRunning},
	{Name: "gone", State: hook.StateEmpty},
}}

// A source is for a member, by its name or its program. One that is left over is for nobody, which is said.
func TestSources(t *testing.T) {
	const none = `there is no member %q to have another program (there are: a, b, gone)`
	byName, byProgram := load.ID(21), load.ID(22)
	for _, test := range []struct {
		about    string
		programs map[hook.Ref]load.Source
		bare     []string
		sources  []load.Source
		text     string
	}{
		{about: "none", bare: []string{"a", "b"}, sources: []load.Source{nil, nil, nil}},
		{about: "by name", programs: map[hook.Ref]load.Source{"a": byName}, bare: []string{"b"}, sources: []load.Source{byName, nil, nil}},
		{about: "by program", programs: map[hook.Ref]load.Source{"id:12": byProgram}, bare: []string{"a"}, sources: []load.Source{nil, byProgram, nil}},
		{about: "both ways", programs: map[hook.Ref]load.Source{"a": byName, "id:12": byProgram}, sources: []load.Source{byName, byProgram, nil}},
		{about: "twice for one", programs: map[hook.Ref]load.Source{"a": byName, "id:11": byProgram}, bare: []string{"b"}, sources: []load.Source{byProgram, nil, nil}, text: fmt.Sprintf(none, "a")},
		{about: "a name that nobody has", programs: map[hook.Ref]load.Source{"c": byName}, bare: []string{"a", "b"}, sources: []load.Source{nil, nil, nil}, text: fmt.Sprintf(none, "c")},
		{about: "a program that nobody has", programs: map[hook.Ref]load.Source{"id:9": byName}, bare: []string{"a", "b"}, sources: []load.Source{nil, nil, nil}, text: fmt.Sprintf(none, "id:9")},
	} {
		t.Run(test.about, func(t *testing.T) {
			req := &ConvertRequest{Programs: test.programs}
			qt.Check(t, qt.DeepEquals(req.bare(chain), test.bare))
			var sources []load.Source
			for i := range chain.Members {
				sources = append(sources, req.source(test.programs, &chain.Members[i]))
			}
			qt.Check(t, qt.DeepEquals(sources, test.sources))
			err := unknown(test.programs, chain)
			qt.Check(t, qt.Equals(said(err), test.text))
			qt.Check(t, qt.Equals(errors.Is(err, fs.ErrNotExist), test.text != ""))
		})
	}
}

// What cannot be converted to is refused before the device is read.
func TestConvertRefused(t *testing.T) {
	o := &target.Opened{Target: target.Target{Hook: hook.XDP, Name: "eth0"}, Pins: &state.Pins{}}
	for _, test := range []struct {
		req  ConvertRequest
		text string
	}{
		{ConvertRequest{To: hook.StyleLibxdp, NoGap: true}, "without a gap: netlink cannot take the place of a link; there is always a gap on the way to a chain of libxdp"},
		{ConvertRequest{To: hook.StyleLibxdp, Owner: "me"}, `owner "me": members of a chain of libxdp have none`},
		{ConvertRequest{To: hook.StyleOwned, ConfigVersion: 2}, "config version 2: only a chain of libxdp has one"},
		{ConvertRequest{To: "other"}, `style "other": must be owned or libxdp`},
		{ConvertRequest{}, `style "": must be owned or libxdp`},
	} {
		err := Convert(t.Context(), o, test.req)
		qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
		qt.Check(t, qt.Equals(said(err), test.text))
	}
	err := Convert(t.Context(), &target.Opened{Target: o.Target}, ConvertRequest{To: hook.StyleOwned})
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
}

// A chain of libxdp as users see it. What is not pinned does not outlive its links, and what is missing runs nothing.
func TestViewLibxdp(t *testing.T) {
	for _, folder := range []string{"", "/sys/fs/bpf/xdp/dispatch-7-9"} {
		c := &hook.Chain{Pins: []string{}}
		viewLibxdp(c, &libxdp.Chain{
			Mode: hook.ModeNative, Dispatcher: hook.Program{ID: 9}, Config: libxdp.Config{Version: 2, Frags: true}, Folder: folder, Pins: []string{"p"},
			Members: []libxdp.Member{
				{Name: "a", Program: hook.Program{ID: 11}, Priority: 0, ContinueOn: hook.SetOf(hook.Pass), LinkID: 5},
				{Name: "b", Program: hook.Program{ID: 12}, Priority: 70000, Missing: true},
			},
		})
		qt.Check(t, qt.DeepEquals(c, &hook.Chain{
			Style: hook.StyleLibxdp, ConfigVersion: 2, DispatcherID: 9, Frags: true, Mode: hook.ModeNative, Pins: []string{"p"},
			Members: []hook.Member{
				{Kind: hook.KindLibxdp, Name: "a", Program: hook.Program{ID: 11}, LinkID: 5, State: hook.StateRunning, Persistent: folder != "",
					Settings: hook.Settings{ContinueOn: hook.SetOf(hook.Pass)}},
				{Kind: hook.KindLibxdp, Name: "b", Program: hook.Program{ID: 12}, State: hook.StateEmpty, Persistent: folder != "", Settings: hook.Settings{Priority: 70000}},
			},
		}))
	}
}

// The frame that package libxdp gives its errors is taken off. An error of a chain that is gone says that it is another style's turn.
func TestOtherStyle(t *testing.T) {
	gone := &hook.Error{Op: "libxdp attach", Err: fmt.Errorf("eth0: %w", libxdp.ErrNotDispatcher)}
	qt.Check(t, qt.Equals(Cause(gone), gone.Err))
	qt.Check(t, qt.Equals(Cause(fs.ErrExist), fs.ErrExist))
	qt.Check(t, qt.IsNil(Cause(nil)))

	qt.Check(t, qt.ErrorIs(otherStyle(gone), chains.ErrStyle))
	qt.Check(t, qt.ErrorIs(otherStyle(gone), libxdp.ErrNotDispatcher))
	qt.Check(t, qt.Equals(otherStyle(&hook.Error{Err: fs.ErrExist}), fs.ErrExist))
	qt.Check(t, qt.IsNil(otherStyle(nil)))
}

// Members of libxdp have no places but by priority; a move to no place is none.
func TestMoveRefused(t *testing.T) {
	h := &handle{}
	qt.Check(t, qt.IsNil(h.Move(t.Context(), hook.Position{})))
	err := h.Move(t.Context(), hook.Position{First: true})
	qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
	qt.Check(t, qt.Equals(said(err), "a chain of libxdp is ordered by priority, and of equals by name: there is no other place to ask for; choose a priority"))
	qt.Check(t, qt.ErrorIs(h.Unpin(t.Context()), hook.ErrUsage))
}
