package lifetime

import (
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A Link that is closed while it is updated keeps nothing open: neither the program that it had nor the new one.
func TestCloseWhileUpdating(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress, hook.TCIngress} {
		t.Run(string(h), func(t *testing.T) {
			testenv.NeedHook(t, h)
			s := scene.New(t).OnHook(t, h)
			counting := dispatcher.Spec(scene.CountingOn(h), dispatcher.LoadOptions{})
			testenv.CheckFiles(t, func() {
				link, err := dispatcher.Attach(t.Context(), s.Target, counting, dispatcher.Options{Persistent: s.Filters(), BPFFS: s.BPFFS})
				qt.Assert(t, qt.IsNil(err))
				kernel.OnStep = func(step string) {
					if step == "replace: to be kept" {
						qt.Check(t, qt.IsNil(link.Close()))
					}
				}
				defer func() { kernel.OnStep = nil }()
				qt.Check(t, qt.IsNil(link.Update(t.Context(), counting)))
				if s.Filters() {
					qt.Assert(t, qt.IsNil(dispatcher.DetachAll(t.Context(), s.Target, s.Leave())))
				}
			})
		})
	}
}
