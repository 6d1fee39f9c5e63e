package hook_test

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// The text of an error is all that an administrator at three in the morning has.
func TestErrorText(t *testing.T) {
	program := hook.Program{ID: 42, Name: "cil_xdp_entry", Tag: "0123456789abcdef"}
	for _, test := range []struct {
		err  hook.Error
		text string
	}{
		{hook.Error{Op: "attach"}, "attach"},
		{hook.Error{Op: "attach", Hook: hook.XDP, Target: "eth0", Err: fs.ErrNotExist}, "attach xdp eth0: file does not exist"},
		{hook.Error{Op: "attach", Hook: hook.XDP, Target: "eth0", Err: fs.ErrExist, Hint: "choose another"},
			"attach xdp eth0: file already exists; choose another"},
		{
			hook.Error{
				Op: "attach", Hook: hook.XDP, Target: "eth0", Err: hook.ErrBusy, Hint: "wait",
				Occupant: &hook.Occupant{Kind: hook.KindForeign, Program: program, LinkID: 12, Mode: hook.ModeNative},
			},
			"attach xdp eth0: held by link 12 (program cil_xdp_entry, id 42, tag 0123456789abcdef, native mode); wait",
		},
		{
			hook.Error{
				Op: "attach", Hook: hook.XDP, Target: "eth0", Err: hook.ErrBusy,
				Occupant: &hook.Occupant{Kind: hook.KindLegacy, Program: program, Mode: hook.ModeGeneric},
			},
			"attach xdp eth0: held by a program without a link (program cil_xdp_entry, id 42, tag 0123456789abcdef, generic mode)",
		},
		{
			hook.Error{
				Op:       "list",
				Occupant: &hook.Occupant{Kind: hook.KindForeign, Program: hook.Program{ID: 1, Tag: "00"}, Mode: hook.ModeOffload},
			},
			"list: held by a link (program without a name, id 1, tag 00, offload mode)",
		},
		{hook.Error{Err: fs.ErrNotExist, Hint: "look"}, "file does not exist; look"}, // of the command itself
		// Whatever was given as a device, and whatever went wrong, the text is one line.
		{hook.Error{Op: "list", Err: errors.Join(fs.ErrExist, fs.ErrNotExist)}, "list: file already exists file does not exist"},
		{hook.Error{Op: "attach", Target: "eth0\x00\x1b[2J\n"}, `attach "eth0\x00\x1b[2J\n"`},
		{hook.Error{Op: "attach", Target: strings.Repeat("e", 500)}, `attach "` + strings.Repeat("e", 200) + `"`},
		{hook.Error{Op: "open", Target: "/sys/fs/bpf/libdispatcher/xdp_1/member_a%2Eb/slot"}, "open /sys/fs/bpf/libdispatcher/xdp_1/member_a%2Eb/slot"},
	} {
		qt.Check(t, qt.Equals(test.err.Error(), test.text))
	}
}

// What functions wrap around a cause is in the Error, in front of it, and the hint is at the end.
func TestWrap(t *testing.T) {
	occupant := &hook.Occupant{Kind: hook.KindForeign, LinkID: 12, Program: hook.Program{ID: 42, Name: "other", Tag: "00"}}
	held := hook.Busy(occupant).Hint("wait for link %d", 12)
	refused := hook.Because(hook.ErrIncompatible, "%s: refused", "x.o").Hint("use another")
	for name, test := range map[string]struct {
		err  error
		text string
		want hook.Error // without Err
	}{
		"plain": {fs.ErrNotExist, "attach xdp eth0: file does not exist", hook.Error{}},
		"held":  {held, "attach xdp eth0: held by link 12 (program other, id 42, tag 00); wait for link 12", hook.Error{Occupant: occupant, Hint: "wait for link 12"}},
		"held, and more": {
			fmt.Errorf("gave up after 200 tries: %w", held),
			"attach xdp eth0: held by link 12 (program other, id 42, tag 00): gave up after 200 tries: hook is busy; wait for link 12",
			hook.Error{Occupant: occupant, Hint: "wait for link 12"},
		},
		"a cause of a cause": {
			hook.Because(hook.ErrChanged, "gave up: %w", fmt.Errorf("load: %w", refused)),
			"attach xdp eth0: gave up: load: x.o: refused; use another", hook.Error{Hint: "use another"},
		},
		"two hints": {
			hook.WithHint(fmt.Errorf("link 7: %w", refused), "ask %s", "them"),
			"attach xdp eth0: link 7: x.o: refused; ask them; use another", hook.Error{Hint: "ask them; use another"},
		},
		"one hint twice": {
			fmt.Errorf("%w, and %w", refused, refused),
			"attach xdp eth0: x.o: refused, and x.o: refused; use another", hook.Error{Hint: "use another"},
		},
		"the occupant with a reason": {
			hook.Because(hook.ErrBusy, "it does not share").HeldBy(occupant),
			"attach xdp eth0: held by link 12 (program other, id 42, tag 00): it does not share", hook.Error{Occupant: occupant},
		},
		"joined": {
			errors.Join(fs.ErrExist, held),
			"attach xdp eth0: held by link 12 (program other, id 42, tag 00): file already exists hook is busy; wait for link 12",
			hook.Error{Occupant: occupant, Hint: "wait for link 12"},
		},
	} {
		t.Run(name, func(t *testing.T) {
			err := hook.Wrap("attach", hook.XDP, "eth0", test.err)
			qt.Check(t, qt.Equals(err.Error(), test.text))
			test.want.Op, test.want.Hook, test.want.Target, test.want.Err = "attach", hook.XDP, "eth0", test.err
			qt.Check(t, qt.Equals(*err.(*hook.Error), test.want))
		})
	}
	qt.Check(t, qt.IsNil(hook.Wrap("attach", hook.XDP, "eth0", nil)))
}

// Callers decide by errors.Is and errors.As, through every wrapping.
func TestErrorCauses(t *testing.T) {
	cause := errors.New("the cause")
	err := error(&hook.Error{Op: "attach", Err: hook.Because(hook.ErrIncompatible, "program %q: %w", "p", cause)})
	err = fmt.Errorf("outer: %w", err)
	qt.Check(t, qt.ErrorMatches(err, `outer: attach: program "p": the cause`))
	qt.Check(t, qt.ErrorIs(err, hook.ErrIncompatible))
	qt.Check(t, qt.ErrorIs(err, cause))
	qt.Check(t, qt.IsFalse(errors.Is(err, hook.ErrUsage)))
	var e *hook.Error
	qt.Assert(t, qt.ErrorAs(err, &e))
	qt.Check(t, qt.Equals(e.Op, "attach"))
	qt.Check(t, qt.IsNil((&hook.Error{}).Unwrap()))
}

func TestSentinelsAreDistinct(t *testing.T) {
	all := []error{
		hook.ErrBusy, hook.ErrChanged, hook.ErrChainFull, hook.ErrDefunct,
		hook.ErrIncompatible, hook.ErrPermission, hook.ErrUsage,
	}
	for i, a := range all {
		for j, b := range all {
			qt.Check(t, qt.Equals(errors.Is(a, b), i == j))
		}
	}
}
