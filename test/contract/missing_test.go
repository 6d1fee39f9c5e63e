package contract

import (
	"fmt"
	"regexp"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// What this kernel does not have is refused by name, with the kernel that has it, and nothing is left.
func checkMissing(t *testing.T, p *place) {
	why := fmt.Sprintf(`.*\b%s needs Linux %s: .*`, regexp.QuoteMeta(string(p.Target.Hook)), regexp.QuoteMeta(kernel.KindOf(p.Target.Hook).Needs))
	ctx, o := t.Context(), dispatcher.Options{Name: "one", BPFFS: p.BPFFS, Persistent: true}
	spec := dispatcher.Spec(scene.CountingOn(p.Target.Hook), dispatcher.LoadOptions{})
	for what, err := range map[string]error{
		"attach":     scene.Second(dispatcher.Attach(ctx, p.Target, spec, o)),
		"plan":       scene.Second(dispatcher.Plan(ctx, p.Target, spec, o)),
		"read":       scene.Second(dispatcher.Read(ctx, p.Target, p.Look())),
		"open":       scene.Second(dispatcher.Open(ctx, p.Target, "one", p.Look())),
		"adopt":      scene.Second(dispatcher.Adopt(ctx, p.Target, dispatcher.AdoptOptions{BPFFS: p.BPFFS})),
		"detach":     dispatcher.Detach(ctx, p.Target, "one", p.Leave()),
		"detach all": dispatcher.DetachAll(ctx, p.Target, p.Leave()),
	} {
		qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported), qt.Commentf("%s", what))
		qt.Check(t, qt.ErrorMatches(err, why), qt.Commentf("%s", what))
	}
	if p.Target.Hook.OnDevice() { // programs for TC are loaded for all its hooks alike
		_, err := p.tryJoin(t, 1, dispatcher.Options{})
		qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
		qt.Check(t, qt.ErrorMatches(err, why))
	}
	list, err := dispatcher.List(ctx, dispatcher.ListOptions{Hooks: []hook.Hook{p.Target.Hook}, BPFFS: p.BPFFS})
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(list, 0)) // where there are no members, none are found
	qt.Check(t, qt.HasLen(p.pinPaths(t), 0))
}

// Before Linux 6.17 a link on a cgroup comes behind all that is there. What needs no other place works; what does
// is refused, says which kernel it needs and what can be had, and has changed nothing.
func checkAppended(t *testing.T, p *place) {
	one := p.join(t, 1, dispatcher.Options{Priority: 10})
	two := p.join(t, 2, dispatcher.Options{Priority: 30})
	p.join(t, 3, dispatcher.Options{Position: hook.Position{Last: true}})
	p.join(t, 4, dispatcher.Options{}) // behind what is equal
	p.wantRunning(t, 1, 2, 3, 4)

	before := p.Read(t)
	for what, o := range map[string]dispatcher.Options{
		"a lower priority": {Priority: 20},
		"the first place":  {Position: hook.Position{First: true}},
		"a place before":   {Position: hook.Position{Before: "two"}},
		"a place behind":   {Position: hook.Position{After: "one"}},
	} {
		_, err := p.tryJoin(t, 5, o)
		p.wantNoPlace(t, what, err)
		_, err = dispatcher.Plan(t.Context(), p.Target, dispatcher.Program(p.tracer(t, 5)),
			dispatcher.Options{Name: "five", BPFFS: p.BPFFS, Priority: o.Priority, Position: o.Position})
		p.wantNoPlace(t, "plan "+what, err)
	}
	p.wantNoPlace(t, "set", two.Set(t.Context(), scene.Priority(5)))
	p.wantNoPlace(t, "move", two.Move(t.Context(), hook.Position{First: true}))
	qt.Check(t, qt.DeepEquals(p.Read(t), before))
	p.wantRunning(t, 1, 2, 3, 4)

	// Another priority at the same place, and the last place.
	qt.Assert(t, qt.IsNil(two.Set(t.Context(), scene.Priority(20))))
	p.wantRunning(t, 1, 2, 3, 4)
	qt.Assert(t, qt.IsNil(one.Set(t.Context(), scene.Priority(60))))
	p.wantRunning(t, 2, 3, 4, 1)
	qt.Assert(t, qt.IsNil(two.Move(t.Context(), hook.Position{Last: true})))
	p.wantRunning(t, 3, 4, 1, 2)
	qt.Check(t, qt.Equals(p.Read(t).Member("two").Priority, 60))
}

func (p *place) wantNoPlace(t testing.TB, what string, err error) {
	t.Helper()
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported), qt.Commentf("%s", what))
	qt.Check(t, qt.ErrorMatches(err, `.* a place among others on a cgroup needs Linux 6\.17: .*; this kernel attaches behind all others: .*`),
		qt.Commentf("%s", what))
}
