package target_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

func TestRequestCheck(t *testing.T) {
	for _, test := range []struct {
		about string
		hook  hook.Hook
		req   target.Request
		text  string
	}{
		{about: "nothing is asked for", hook: hook.XDP},
		{about: "all that XDP has", hook: hook.XDP, req: target.Request{
			Name: "mine", Owner: "me", Mode: hook.ModeGeneric, Style: hook.StyleLibxdp, ConfigVersion: 3, Persistent: true,
			Settings: hook.Settings{Priority: 1, ContinueOn: hook.SetOf(hook.Pass), OnMissing: hook.MissingAborted},
		}},
		{about: "all that TCX has", hook: hook.TCXIngress, req: target.Request{Name: "mine", Owner: "me", Persistent: true, Position: hook.Position{Before: "link:1"}}},

		{about: "priority", hook: hook.TCXIngress, req: target.Request{Settings: hook.Settings{Priority: 65536}},
			text: "priority 65536: must be from 1 (runs first) to 65535"},
		{about: "no verdict", hook: hook.XDP, req: target.Request{Settings: hook.Settings{ContinueOn: hook.SetOf(hook.Pass, 31)}},
			text: "continue-on " + hook.SetOf(hook.Pass, 31).String() + ": not a set of XDP verdicts"},
		{about: "no policy", hook: hook.XDP, req: target.Request{Settings: hook.Settings{OnMissing: hook.MissingAborted + 1}},
			text: "OnMissing(4): no such policy for an empty slot"},
		{about: "continue-on elsewhere", hook: hook.TCXIngress, req: target.Request{Settings: hook.Settings{ContinueOn: hook.SetOf(hook.Pass)}},
			text: "continue-on pass: on tcx/ingress the program itself says with its return value whether the next one runs"},
		{about: "on-missing elsewhere", hook: hook.TCEgress, req: target.Request{Settings: hook.Settings{OnMissing: hook.MissingContinue}},
			text: "on-missing continue: on tc/egress there are no slots that could be empty; a member leaves with its owner"},
		{about: "two places", hook: hook.XDP, req: target.Request{Position: hook.Position{First: true, After: "a"}},
			text: "one place only can be asked for: first, last, before or after an entry"},
		{about: "beside what has no name", hook: hook.XDP, req: target.Request{Position: hook.Position{Before: "id:x"}},
			text: `"id:x": a number of 1 or more comes after "id:"`},
		{about: "mode elsewhere", hook: hook.CgroupConnect4, req: target.Request{Mode: hook.ModeNative}, text: "mode native: only XDP has modes"},
		{about: "name", hook: hook.XDP, req: target.Request{Name: "a b"}, text: `the name "a b" has the character ' '; use printable characters without spaces`},
		{about: "owner", hook: hook.XDP, req: target.Request{Owner: "-me"}, text: `owner: the name "-me" starts with a dash`},
		{about: "offload", hook: hook.XDP, req: target.Request{Mode: hook.ModeOffload}, text: "mode offload: a chain cannot be attached that way"},
		{about: "style elsewhere", hook: hook.TCIngress, req: target.Request{Style: hook.StyleOwned}, text: "style owned: only XDP has styles"},
		{about: "version of an owned chain", hook: hook.XDP, req: target.Request{Style: hook.StyleOwned, ConfigVersion: 2}, text: "config version 2: only a chain of libxdp has one"},
		{about: "version without a style", hook: hook.XDP, req: target.Request{ConfigVersion: 2}, text: "config version 2: only a chain of libxdp has one"},
		{about: "version to come", hook: hook.XDP, req: target.Request{Style: hook.StyleLibxdp, ConfigVersion: 4}, text: "config version 4: libxdp's are 1 to 3"},
	} {
		t.Run(test.about, func(t *testing.T) {
			o := &target.Opened{Target: target.Target{Hook: test.hook}, Pins: &state.Pins{}}
			err := test.req.Check(o)
			qt.Assert(t, qt.Equals(said(err), test.text))
			if err != nil {
				qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
			}
		})
	}
}

// A filter of tc is not pinned, so that it needs no bpffs.
func TestPersistentWithoutBPFFS(t *testing.T) {
	bpffs := t.TempDir()
	for h, refused := range map[hook.Hook]bool{hook.XDP: true, hook.TCXEgress: true, hook.CgroupDev: true, hook.TCIngress: false, hook.TCEgress: false} {
		req := target.Request{Persistent: true}
		err := req.Check(&target.Opened{Target: target.Target{Hook: h, BPFFS: bpffs}})
		if !refused {
			qt.Check(t, qt.IsNil(err), qt.Commentf("%s", h))
			continue
		}
		qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist), qt.Commentf("%s", h))
		qt.Check(t, qt.Equals(said(err), "a persistent member is pinned, and there is no bpffs at "+bpffs+
			"; mount one with \"mount -t bpf -o mode=0700 bpffs "+bpffs+"\""))
		req = target.Request{}
		qt.Check(t, qt.IsNil(req.Check(&target.Opened{Target: target.Target{Hook: h, BPFFS: bpffs}})))
	}
}

// The owner of a request without one is the executable.
func TestRequestOwner(t *testing.T) {
	path, err := os.Executable()
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(target.Executable(), filepath.Base(path)))
	var req target.Request
	qt.Assert(t, qt.IsNil(req.Check(&target.Opened{Target: target.Target{Hook: hook.XDP}})))
	qt.Check(t, qt.Equals(req.Owner, target.Executable()))
	req.Owner = "me"
	qt.Assert(t, qt.IsNil(req.Check(&target.Opened{Target: target.Target{Hook: hook.XDP}})))
	qt.Check(t, qt.Equals(req.Owner, "me"))
}

func TestNameFor(t *testing.T) {
	for _, test := range []struct{ asked, program, name, text string }{
		{"mine", "prog", "mine", ""},
		{"mine", "", "mine", ""},
		{"", "prog", "prog", ""},
		{"", "", "", "the program's name will not do for the member: the name is empty; choose one"},
		{"", "a b", "", `the program's name will not do for the member: the name "a b" has the character ' '; use printable characters without spaces; choose one`},
	} {
		req := target.Request{Name: test.asked}
		name, err := req.NameFor(&load.Loaded{Name: test.program})
		qt.Check(t, qt.Equals(name, test.name))
		qt.Check(t, qt.Equals(said(err), test.text))
		qt.Check(t, qt.Equals(errors.Is(err, hook.ErrUsage), test.text != ""))
	}
}

// What a hint says can be pasted: it has the namespace and the bpffs of the target. Links are not in a namespace.
func TestTargetCommand(t *testing.T) {
	here := target.Target{Hook: hook.XDP, Name: "eth0"}
	there := target.Target{Hook: hook.XDP, Name: "eth0", NetNS: "blue", BPFFS: "/run/my bpf"}
	for _, test := range []struct{ got, want string }{
		{here.Command(nil, "adopt", "xdp", "eth0"), "dispatcher adopt xdp eth0"},
		{there.Command(nil, "adopt", "xdp", "eth0"), "dispatcher -n blue --bpffs '/run/my bpf' adopt xdp eth0"},
		{here.CommandByLink("adopt", 7), "dispatcher adopt --link 7"},
		{there.CommandByLink("detach", 4294967295, "--force"), "dispatcher --bpffs '/run/my bpf' detach --link 4294967295 --force"},
	} {
		qt.Check(t, qt.Equals(test.got, test.want))
	}
}

// Settings and places that are wrong never reach the function that moves; nor does what changes nothing.
func TestMover(t *testing.T) {
	type call struct {
		To       hook.Position
		Priority int
	}
	for _, test := range []struct {
		about    string
		to       hook.Position
		settings hook.Settings
		calls    []call
		text     string
	}{
		{about: "nothing"},
		{about: "a priority", settings: hook.Settings{Priority: 7}, calls: []call{{Priority: 7}}},
		{about: "a place", to: hook.Position{First: true}, calls: []call{{To: hook.Position{First: true}}}},
		{about: "no priority", settings: hook.Settings{Priority: -1}, text: "priority -1: must be from 1 (runs first) to 65535"},
		{about: "two places", to: hook.Position{First: true, Last: true}, text: "one place only can be asked for: first, last, before or after an entry"},
	} {
		t.Run(test.about, func(t *testing.T) {
			var calls []call
			move := target.Mover(func(_ context.Context, to hook.Position, priority int) error {
				calls = append(calls, call{to, priority})
				return nil
			})
			err := kernel.Join(move.Set(t.Context(), hook.TCXIngress, test.settings), move.Move(t.Context(), test.to))
			qt.Check(t, qt.Equals(said(err), test.text))
			qt.Check(t, qt.Equals(errors.Is(err, hook.ErrUsage), test.text != ""))
			qt.Check(t, qt.DeepEquals(calls, test.calls))
		})
	}
}

// A name that is taken is worth another try: its member may be leaving. After a while it is the error.
func TestUntilLeft(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		patience := target.UntilLeft()
		taken := fmt.Errorf("busy: %w", target.NameTaken("early", true))
		other := errors.New("another")

		qt.Check(t, qt.IsNil(patience(nil)))
		qt.Check(t, qt.Equals(patience(other), other))
		qt.Check(t, qt.Not(qt.ErrorIs(patience(target.NameTaken("late", false)), kernel.ErrAgain)))

		again := patience(taken)
		qt.Check(t, qt.ErrorIs(again, kernel.ErrAgain))
		qt.Check(t, qt.ErrorIs(again, fs.ErrExist))
		qt.Check(t, qt.IsTrue(strings.Contains(said(again), `there is a member "early" already; choose another name`)))

		time.Sleep(3 * time.Second) // of the test's own clock
		qt.Check(t, qt.Equals(patience(taken), taken))
	})
}
