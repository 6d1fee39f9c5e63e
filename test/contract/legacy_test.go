package contract

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// The old ways to attach work as ever where nothing is owned, and next to members; they take none away.
func checkLegacy(t *testing.T, p *place) {
	map[string]func(*testing.T, *place){
		"xdp": legacyXDP, "tcx": legacyTCX, "tc": legacyTC, "cgroup": legacyCgroup,
	}[p.Target.Hook.Family()](t, p)
}

// See netlink_test.go for all that netlink can do to XDP.
func legacyXDP(t *testing.T, p *place) {
	other := p.Pinned(t, p.tracer(t, 8))
	use := func() {
		p.Server.IP(t, "link", "set", "dev", p.ServerDev, "xdp", "pinned", other)
		p.wantRun(t, 8)
		p.Server.IP(t, "link", "set", "dev", p.ServerDev, "xdp", "off")
		p.wantRun(t)
	}
	use()
	one := p.join(t, 1, dispatcher.Options{})
	for _, command := range []string{"pinned " + other, "off"} {
		_, err := p.Server.TryIP(strings.Fields("link set dev " + p.ServerDev + " xdp " + command)...)
		qt.Check(t, qt.IsNotNil(err), qt.Commentf("%s", command))
		p.wantRunning(t, 1)
	}
	qt.Assert(t, qt.IsNil(one.Detach(t.Context())))
	use()
}

// tc works a qdisc, behind all of TCX.
func (p *place) useTC(t testing.TB, pref string, numbers ...int) {
	t.Helper()
	filter := []string{"dev", p.ServerDev, p.Side(), "pref", pref, "handle", "7", "bpf", "da", "pinned"}
	p.Server.TC(t, append(append([]string{"filter", "add"}, filter...), p.Pinned(t, p.tracer(t, 6)))...)
	p.wantRun(t, append(slices.Clone(numbers), 6)...)
	p.Server.TC(t, append(append([]string{"filter", "replace"}, filter...), p.Pinned(t, p.tracer(t, 7)))...)
	p.wantRun(t, append(slices.Clone(numbers), 7)...)
	p.Server.TC(t, "filter", "del", "dev", p.ServerDev, p.Side(), "pref", pref)
	for _, number := range []string{"6", "7"} {
		qt.Assert(t, qt.IsNil(os.Remove(filepath.Join(p.BPFFS, "ldt_trace_"+number))))
	}
	p.wantRun(t, numbers...)
}

func legacyTCX(t *testing.T, p *place) {
	bare := p.tracer(t, 8)
	use := func(numbers ...int) {
		t.Helper()
		leave := p.attachBare(t, bare, 0)
		p.wantRun(t, append(slices.Clone(numbers), 8)...)
		p.Server.TC(t, "qdisc", "add", "dev", p.ServerDev, "clsact")
		p.useTC(t, "49152", append(slices.Clone(numbers), 8)...)
		p.Server.TC(t, "qdisc", "del", "dev", p.ServerDev, "clsact")
		p.wantRun(t, append(slices.Clone(numbers), 8)...)
		leave()
		p.wantRun(t, numbers...)
	}
	use()
	own := p.tracer(t, 1)
	one, err := p.tryAttach(t, own, dispatcher.Options{Name: "one"})
	qt.Assert(t, qt.IsNil(err))
	p.join(t, 2, dispatcher.Options{Persistent: true})
	use(1, 2)
	qt.Check(t, qt.ErrorIs(p.Unlink(t, own), unix.EBUSY))
	qt.Check(t, qt.ErrorIs(p.tryReplace(t, bare, own), unix.EBUSY))
	p.wantRunning(t, 1, 2)
	qt.Assert(t, qt.IsNil(one.Detach(t.Context())))
	p.Clear(t)
	use()
}

// No process owns a filter: tc leaves alone what it is not told to remove, and no more.
func legacyTC(t *testing.T, p *place) {
	p.Server.TC(t, "qdisc", "add", "dev", p.ServerDev, "clsact")
	p.useTC(t, "49152")
	one := p.join(t, 1, dispatcher.Options{})
	p.join(t, 2, dispatcher.Options{})
	p.useTC(t, "49152", 1, 2)
	p.Server.TC(t, "qdisc", "replace", "dev", p.ServerDev, "clsact")
	p.wantRunning(t, 1, 2)
	p.Server.TC(t, "filter", "del", "dev", p.ServerDev, p.Side(), "pref", fmt.Sprint(p.Read(t).Member("two").Filter.Pref))
	p.wantRunning(t, 1)
	p.Server.TC(t, "qdisc", "del", "dev", p.ServerDev, "clsact")
	p.wantRunning(t)
	qt.Check(t, qt.ErrorIs(one.Set(t.Context(), scene.Priority(7)), fs.ErrNotExist))
	p.join(t, 1, dispatcher.Options{})
	p.wantRunning(t, 1)
}

func legacyCgroup(t *testing.T, p *place) {
	const exclusive, override, multi = 0, unix.BPF_F_ALLOW_OVERRIDE, unix.BPF_F_ALLOW_MULTI
	bare := p.tracer(t, 8)
	use := func(flags uint32, numbers ...int) {
		t.Helper()
		leave := p.attachBare(t, bare, flags)
		p.wantRun(t, append(slices.Clone(numbers), 8)...)
		leave()
		p.wantRun(t, numbers...)
	}
	for _, flags := range []uint32{exclusive, override, multi} {
		use(flags)
	}
	own := p.tracer(t, 1)
	one, err := p.tryAttach(t, own, dispatcher.Options{Name: "one"})
	qt.Assert(t, qt.IsNil(err))
	p.join(t, 2, dispatcher.Options{Persistent: true})
	use(multi, 1, 2)
	for _, flags := range []uint32{exclusive, override} {
		qt.Check(t, qt.ErrorIs(p.TryLinkless(t, bare, flags), unix.EPERM))
	}
	qt.Check(t, qt.ErrorIs(p.Unlink(t, own), unix.ENOENT))
	qt.Check(t, qt.ErrorIs(p.tryReplace(t, bare, own), unix.ENOENT))
	p.wantRunning(t, 1, 2)

	// One that shares the cgroup leaves room for members.
	leave := p.attachBare(t, bare, multi)
	legacy := 3
	if testenv.Has(t, testenv.FeatureCgroupOrder) {
		p.join(t, 3, dispatcher.Options{})
		p.wantRun(t, 1, 2, 3, 8)
	} else { // without a place between the others, the place behind them is free
		_, err := p.tryJoin(t, 3, dispatcher.Options{})
		p.wantNoPlace(t, "attach", err)
		p.join(t, 3, dispatcher.Options{Position: hook.Position{Last: true}})
		p.wantRun(t, 1, 2, 8, 3)
		legacy = 2
	}
	m := p.Read(t).Members[legacy]
	qt.Check(t, qt.Equals(m.Kind, hook.KindLegacy))
	qt.Check(t, qt.Equals(m.Detail, "allow-multi"))
	qt.Check(t, qt.IsFalse(m.Protected()))
	qt.Check(t, qt.IsFalse(p.Read(t).Protected()))
	leave()
	qt.Assert(t, qt.IsNil(one.Detach(t.Context())))
	p.Clear(t)
	p.wantRunning(t)
	for _, flags := range []uint32{exclusive, override, multi} {
		use(flags)
	}
}
