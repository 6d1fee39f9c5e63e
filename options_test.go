package dispatcher

import (
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// No option is passed over in silence: where one has no meaning, it is refused.
func TestOptionsRefused(t *testing.T) {
	ctx, device := t.Context(), XDP("nowhere")
	refused := map[string]error{
		"force on XDP":         Detach(ctx, device, "a", DetachOptions{Force: true}),
		"force for all":        DetachAll(ctx, On(hook.TCXIngress, "nowhere"), DetachOptions{Force: true}),
		"an adopted filter":    linkErr(Adopt(ctx, On(hook.TCIngress, "nowhere"), AdoptOptions{OnMissing: hook.MissingDrop})),
		"an entry of a link":   linkErr(AdoptLink(ctx, 1<<32-1, AdoptOptions{Entry: "id:1"})),
		"a version of nothing": linkErr(Attach(ctx, device, Source{}, Options{ConfigVersion: 2})),
	}
	for _, o := range []MeasureOptions{{Target: &device, NetNS: "ns"}, {Target: &device, Hooks: hook.Hooks()}} {
		for _, err := range Measure(ctx, o) {
			refused["beside a target"] = err
		}
	}
	for name, err := range refused {
		qt.Check(t, qt.ErrorIs(err, ErrUsage), qt.Commentf("%s", name))
	}
	qt.Check(t, qt.HasLen(refused, 6))
}

func linkErr(_ *Link, err error) error { return err }
