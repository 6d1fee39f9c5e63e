package crash

import (
	"slices"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// Killed at any step of it, recover leaves each member where it was or where it is to be; the next one finishes it.
func TestRecoverCrash(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			for n, died := 1, true; died; n++ {
				s.Join(t, dispatcher.Program(s.Tracer(t, 1)), dispatcher.Options{Name: "1", Persistent: true}).Close()
				s.Join(t, dispatcher.Spec(scene.CountingOn(h), dispatcher.LoadOptions{}), dispatcher.Options{Name: "counting", Priority: 40, Persistent: true}).Close()
				s.DeleteDevice(t)
				s.NewDevice(t)

				victim := scene.NewApp(t)
				got := victim.Try(t, s.Command(scene.Command{Op: "recover", DieAt: n}))
				died = got.Died != ""
				at := qt.Commentf("died at step %d, %q", n, got.Died)
				qt.Assert(t, qt.Equals(got.Error, ""), at)
				victim.Kill()
				qt.Assert(t, qt.IsTrue(scene.OneOf(s.Ran(t), [][]int{nil, {1}})), at)

				s.WantReattached(t)
				s.WantRun(t, 1)
				qt.Assert(t, qt.Equals(scene.Summary(s.Read(t)), "counting* 1*"), at)
				held := slices.DeleteFunc(s.MemberPins(t, "counting"), func(pin string) bool { return pin == "map_ld_records" })
				qt.Assert(t, qt.HasLen(held, 2), at) // with its map
				qt.Assert(t, qt.Equals(s.Gone(t, h), ""), at)
				qt.Assert(t, qt.HasLen(s.Recover(t, dispatcher.RecoverOptions{Reattach: true}), 0), at)
				s.Clear(t)
				s.WantRunSoon(t)
			}
		})
	}
}
