package observe

import (
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// What the actions of tc do with packets is shown beside the programs, and explain says what it cannot see: that a packet passes
// TCX does not mean that it passes.
func TestActionsOfTC(t *testing.T) {
	testenv.Need(t, testenv.FeatureTCX)
	s := scene.New(t)
	tcx := s.OnDevice(dispatcher.On(hook.TCXIngress, s.ServerDev).In(s.Server.Name))
	tc := s.OnDevice(dispatcher.On(hook.TCIngress, s.ServerDev).In(s.Server.Name))
	pin := filepath.Join(s.BPFFS, "shot")
	qt.Assert(t, qt.IsNil(testenv.Load(t, &ebpf.ProgramSpec{
		Name: "ldt_shot", Type: ebpf.SchedACT, License: "GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, testenv.TCDrop), asm.Return()},
	}).Pin(pin)))
	shot, err := ebpf.LoadPinnedProgram(pin, nil)
	qt.Assert(t, qt.IsNil(err))
	shotID := scene.ID(t, shot)
	qt.Assert(t, qt.IsNil(shot.Close()))
	tracer := tcx.Tracer(t, 1)
	tcx.Attach(t, tracer, dispatcher.Options{})
	tr := explain(t, explainer(t, s, tcx.Target), udpTo(s, scene.Port))
	qt.Check(t, qt.Equals(tr.Onward, ""))

	tried := map[string]int{}
	for _, by := range []struct{ filter, named string }{{"u32 match u32 0 0", "u32 filter pref 9 handle 0x80000800"}, {"matchall", "matchall filter pref 9 handle 0x1"}} {
		for action, want := range map[string]string{
			"drop": "gact (drop)",
			"mirred egress redirect dev " + s.ServerDev: fmt.Sprintf("mirred (egress redirect to ifindex %d)", s.ServerIfindex),
			"bpf object-pinned " + pin:                  "bpf (program ldt_shot, id ",
		} {
			add := "filter add dev " + s.ServerDev + " ingress pref 9 protocol all " + by.filter + " action " + action
			tc.NS().TC(t, "qdisc", "replace", "dev", s.ServerDev, "clsact")
			if out, err := exec.Command("tc", append([]string{"-n", s.Server.Name}, strings.Fields(add)...)...).CombinedOutput(); err != nil {
				t.Logf("this kernel has not %s with action %s: %s", by.filter, action, out)
				continue
			}
			tried[by.filter]++
			qt.Check(t, qt.Equals(s.Passed(t, scene.Port, 3), 0))
			c := tc.Read(t)
			qt.Check(t, qt.HasLen(c.Members, 0))
			qt.Assert(t, qt.HasLen(c.Others, 1))
			qt.Check(t, qt.StringContains(c.Others[0].String(), by.named+": action "+want))
			list, err := dispatcher.List(t.Context(), dispatcher.ListOptions{NetNS: s.Server.Name, Hooks: []hook.Hook{hook.TCIngress}, BPFFS: s.BPFFS})
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.HasLen(list, 1))
			qt.Check(t, qt.DeepEquals(list[0].Others, c.Others))

			if strings.HasPrefix(want, "bpf") && tried["matchall"] == 0 { // the first such action, so its index is 1
				heldByAction(t, tc, uint32(shotID))
			}

			e := explainer(t, s, tcx.Target)
			tr := explain(t, e, udpTo(s, scene.Port))
			qt.Check(t, qt.Equals(tr.Verdict, hook.Pass))
			qt.Check(t, qt.Equals(tr.Onward, hook.TCIngress))
			qt.Check(t, qt.StringContains(strings.Join(e.Limits(), "\n"), "go on to the filters of tc/ingress, which are not run and may drop them: "+by.named+": action "+want))
			e.Close()
			tc.NS().TC(t, "filter", "del", "dev", s.ServerDev, "ingress")
		}
	}
	if tried["u32 match u32 0 0"] == 0 {
		t.Fatal("no action was tried")
	}
	qt.Check(t, qt.Equals(s.Passed(t, scene.Port, 3), 3))
	tcx.Clear(t)
}

// heldByAction checks that the action of tc which holds a program is named, once, also where filters share it.
func heldByAction(t *testing.T, tc *scene.Scene, prog uint32) {
	t.Helper()
	tc.NS().TC(t, strings.Fields("filter add dev "+tc.ServerDev+" ingress pref 10 protocol all u32 match u32 0 0 action bpf index 1")...)
	defer tc.NS().TC(t, "filter", "del", "dev", tc.ServerDev, "ingress", "pref", "10")
	by := hook.HolderObject{How: "action bpf of tc, index 1, in network namespace " + tc.Server.Name, References: 1}
	h, err := dispatcher.HoldersOf(t.Context(), hook.HolderRef{Kind: hook.HolderProgram, ID: prog}, dispatcher.HoldersOptions{})
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(h.Objects, []hook.HolderObject{by}))
	qt.Check(t, qt.IsTrue(h.Verified), qt.Commentf("%s", h.Missing))
	held, err := dispatcher.HoldersOn(t.Context(), tc.Target, "", dispatcher.HoldersOnOptions{BPFFS: tc.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.HasLen(held, 1))
	qt.Check(t, qt.Equals(held[0].Member, "ldt_shot"))
	qt.Check(t, qt.DeepEquals(held[0].Objects, []hook.HolderObject{by}))
}

// A block that devices share is named: its filters are shown, and a member of one device is refused before anything is done.
func TestSharedBlock(t *testing.T) {
	s := scene.New(t)
	tc := s.OnDevice(dispatcher.On(hook.TCIngress, s.ServerDev).In(s.Server.Name))
	tc.NS().TC(t, "qdisc", "add", "dev", s.ServerDev, "ingress_block", "22", "clsact")
	tc.NS().TC(t, strings.Fields("filter add block 22 pref 9 protocol all u32 match u32 0 0")...)
	program := dispatcher.Program(tc.Tracer(t, 1))
	o := dispatcher.Options{Persistent: true, BPFFS: s.BPFFS}
	const why = `.*: the filters are in block 22, which its devices share \(ingress_block of tc\): a member cannot be of one device; use tcx/ingress, .*`
	_, err := dispatcher.Attach(t.Context(), tc.Target, program, o)
	qt.Check(t, qt.ErrorMatches(err, why))
	_, err = dispatcher.Plan(t.Context(), tc.Target, program, o)
	qt.Check(t, qt.ErrorMatches(err, why))
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	c := tc.Read(t)
	qt.Assert(t, qt.HasLen(c.Others, 1))
	qt.Check(t, qt.Equals(c.Others[0].String(), "u32 filter pref 9 handle 0x80000800 in shared block 22"))

	other := s.OnDevice(dispatcher.On(hook.TCEgress, s.ServerDev).In(s.Server.Name)) // has no block
	other.Attach(t, other.Tracer(t, 2), o)
	other.Clear(t)
}
