package observe

import (
	"errors"
	"fmt"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// uses are what the features are for: each does the thing itself, with the library or without.
var uses = map[string]func(t *testing.T, s *scene.Scene) error{
	"xdp":             use(hook.XDP, dispatcher.Options{}),
	"slots":           use(hook.XDP, dispatcher.Options{}),
	"xdp-link":        use(hook.XDP, dispatcher.Options{}),
	"xdp-link-update": useTwice(hook.XDP, hook.Position{}),
	"tcx-link":        use(hook.TCXIngress, dispatcher.Options{}),
	"tcx-move":        useMove(hook.TCXIngress),
	"clsact":          use(hook.TCIngress, dispatcher.Options{Persistent: true}),
	"cgroup-link":     use(hook.CgroupConnect4, dispatcher.Options{}),
	"cgroup-order":    useTwice(hook.CgroupConnect4, hook.Position{First: true}),
	"bpffs":           use(hook.XDP, dispatcher.Options{Persistent: true}),
	"dev-native":      use(hook.XDP, dispatcher.Options{Mode: hook.ModeNative}),
	"dev-generic":     use(hook.XDP, dispatcher.Options{Mode: hook.ModeGeneric}),
	"description": func(t *testing.T, s *scene.Scene) error {
		err := use(hook.XDP, dispatcher.Options{Owner: "somebody"})(t, s)
		if err == nil && s.Read(t).Members[0].Owner != "somebody" {
			return errors.New("the owner is not told")
		}
		return err
	},
	"frags":            useFrags,
	"freplace":         useLibxdp,
	"dev-native-frags": useFrags,
	"netns-cookie": func(t *testing.T, s *scene.Scene) error {
		if s.Read(t).NetNS.Cookie == 0 {
			return fmt.Errorf("the namespace has none: %w", ebpf.ErrNotSupported)
		}
		return nil
	},
}

// untried are features that no test can use: it would take a device that can do it.
var untried = map[string]bool{"dev-native-redirect": true, "dev-offload": true}

// What "dispatcher features" says is what then works, on this kernel: what is there can be used, and what is not is
// refused, with the kernel that has it.
func TestFeaturesAgree(t *testing.T) {
	s := scene.New(t)
	target := dispatcher.XDP(s.ServerDev).In(s.Server.Name)
	list, err := dispatcher.Features(t.Context(), target, s.Look())
	qt.Assert(t, qt.IsNil(err))
	told := map[string]bool{}
	for _, f := range list {
		told[f.Name] = true
		use := uses[f.Name]
		if untried[f.Name] {
			continue
		}
		if use == nil {
			t.Errorf("feature %q: nobody knows how to use it", f.Name)
			continue
		}
		if strings.HasPrefix(f.Detail, "cannot be told: ") { // of devices, before Linux 6.3
			qt.Check(t, qt.IsFalse(kernel.Since(6, 3)), qt.Commentf("%s", f.Name))
			qt.Check(t, qt.StringContains(f.Detail, "Linux 6.3"))
			continue
		}
		t.Run(f.Name, func(t *testing.T) {
			err := use(t, scene.New(t))
			if f.Supported {
				qt.Check(t, qt.IsNil(err))
				qt.Check(t, qt.Equals(f.Detail, ""))
				return
			}
			t.Logf("not here: %v", err)
			qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
			qt.Check(t, qt.Not(qt.Equals(f.Detail, "")))
			// A feature of a later kernel is refused with that kernel's name.
			since := regexp.MustCompile(`^Linux (\d+)\.(\d+)`).FindStringSubmatch(f.Needs)
			var major, minor int
			if since != nil {
				fmt.Sscan(since[1], &major)
				fmt.Sscan(since[2], &minor)
			}
			if since != nil && !kernel.Since(major, minor) && f.Name != "netns-cookie" {
				qt.Check(t, qt.ErrorMatches(err, `.* needs `+regexp.QuoteMeta(since[0])+`\b.*`))
			} else if f.Name != "freplace" && f.Name != "netns-cookie" { // which a policy may refuse
				t.Errorf("%s is not here, though this kernel should have it: %s", f.Name, f.Detail)
			}
		})
	}
	for name := range uses {
		qt.Check(t, qt.IsTrue(told[name]), qt.Commentf("%s is not told", name))
	}
	// The tests go by the same.
	for _, feature := range []testenv.Feature{testenv.FeatureNetNSCookie, testenv.FeatureFrags, testenv.FeatureTCX, testenv.FeatureCgroupOrder} {
		for _, f := range list {
			if f.Name == string(feature) {
				qt.Check(t, qt.Equals(f.Supported, testenv.Has(t, feature)), qt.Commentf("%s", feature))
			}
		}
	}
}

// onHook is a place on the scene's device, or on a new cgroup.
func onHook(t *testing.T, s *scene.Scene, h hook.Hook) *scene.Scene {
	t.Helper()
	if h.OnCgroup() {
		return s.OnDevice(dispatcher.On(h, testenv.NewCgroup(t).Path))
	}
	return s.OnDevice(dispatcher.On(h, s.ServerDev).In(s.Server.Name))
}

// use attaches a program.
func use(h hook.Hook, o dispatcher.Options) func(*testing.T, *scene.Scene) error {
	return func(t *testing.T, s *scene.Scene) error {
		at := onHook(t, s, h)
		if o.Persistent {
			at.ClearAtEnd(t)
		}
		_, err := at.TryJoin(t, dispatcher.Program(at.Tracer(t, 1)), o)
		return err
	}
}

// useTwice attaches another program at a place beside the first.
func useTwice(h hook.Hook, to hook.Position) func(*testing.T, *scene.Scene) error {
	return func(t *testing.T, s *scene.Scene) error {
		at := onHook(t, s, h)
		at.Attach(t, at.Tracer(t, 1), dispatcher.Options{Name: "one"})
		_, err := at.TryJoin(t, dispatcher.Program(at.Tracer(t, 2)), dispatcher.Options{Name: "two", Position: to})
		return err
	}
}

// useMove moves one of two members.
func useMove(h hook.Hook) func(*testing.T, *scene.Scene) error {
	return func(t *testing.T, s *scene.Scene) error {
		at := onHook(t, s, h)
		for n := 1; ; n++ {
			l, err := at.TryJoin(t, dispatcher.Program(at.Tracer(t, n)), dispatcher.Options{Name: scene.Numbers[n]})
			if err != nil {
				return err
			}
			if n == 2 {
				return l.Move(t.Context(), hook.Position{First: true})
			}
		}
	}
}

// useFrags attaches a program for packets in fragments where such packets come.
func useFrags(t *testing.T, s *scene.Scene) error {
	s.Jumbo(t)
	_, err := s.TryJoin(t, scene.File("several.o", "ldt_frags"), dispatcher.Options{Mode: hook.ModeNative})
	if err == nil && !s.Read(t).Frags {
		return errors.New("the chain has no frags")
	}
	if err != nil {
		s.WantFree(t)
	}
	return err
}

// useLibxdp starts a chain of libxdp.
func useLibxdp(t *testing.T, s *scene.Scene) error {
	s.ClearAtEnd(t)
	_, err := s.TryJoin(t, scene.File("filter.o", ""), dispatcher.Options{Style: hook.StyleLibxdp, Persistent: true})
	if err != nil {
		left, _ := filepath.Glob(s.BPFFS + "/xdp/*")
		qt.Check(t, qt.HasLen(left, 0))
	}
	return err
}
