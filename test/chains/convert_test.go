package chains

import (
	"encoding/binary"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

func convert(t testing.TB, s *scene.Scene, to hook.Style, numbers ...int) *hook.Chain {
	t.Helper()
	o := dispatcher.ConvertOptions{BPFFS: s.BPFFS, Programs: map[hook.Ref]dispatcher.Source{}}
	for _, n := range numbers {
		o.Programs[hook.Ref(scene.TracerRef(n))] = s.TracerSource(n, scene.Pass)
	}
	c, err := dispatcher.Convert(t.Context(), s.Target, to, o)
	qt.Assert(t, qt.IsNil(err))
	return c
}

// A member of a chain of libxdp has the same verbs as one of ours, but belongs to
// nobody.
func TestLibxdpMember(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.New(t)
	one := s.JoinLibxdp(t, 1, scene.Pass, 10)
	s.WantRun(t, 1)
	// Without a style: the chain that is there is joined.
	two, err := dispatcher.Attach(t.Context(), s.Target, s.TracerSource(2, scene.Pass), dispatcher.Options{Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	defer two.Close()
	s.WantRun(t, 1, 2)

	c := s.Read(t)
	qt.Check(t, qt.Equals(c.Style, hook.StyleLibxdp))
	qt.Check(t, qt.IsFalse(c.Ours()))
	qt.Check(t, qt.IsFalse(c.Protected()))
	info, err := two.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.DeepEquals(*info, c.Members[1]))
	qt.Check(t, qt.Equals(info.Kind, hook.KindLibxdp))
	qt.Check(t, qt.IsTrue(info.Persistent))

	qt.Assert(t, qt.IsNil(one.Set(t.Context(), scene.Priority(60))))
	s.WantRun(t, 2, 1)
	qt.Assert(t, qt.IsNil(two.Set(t.Context(), hook.Settings{ContinueOn: hook.SetOf(hook.TX)})))
	s.WantRun(t, 2)
	qt.Assert(t, qt.IsNil(two.Set(t.Context(), hook.Settings{ContinueOn: hook.SetOf(hook.Pass, hook.TX)})))
	qt.Assert(t, qt.IsNil(two.Update(t.Context(), s.TracerSource(3, scene.Drop))))
	s.WantRun(t, 3)
	qt.Check(t, qt.IsTrue(s.Drops(t)))
	info, err = two.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(info.Name, scene.TracerRef(3)))
	prog, err := two.Program(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(uint32(scene.ID(t, prog)), info.Program.ID))
	prog.Close()

	qt.Check(t, qt.IsNil(scene.Second(two.Pin(t.Context()))))
	qt.Check(t, qt.ErrorIs(two.Unpin(t.Context()), dispatcher.ErrUsage))
	qt.Check(t, qt.ErrorIs(two.Move(t.Context(), hook.Position{First: true}), dispatcher.ErrUsage))
	qt.Check(t, qt.ErrorIs(two.Set(t.Context(), hook.Settings{OnMissing: hook.MissingDrop}), dispatcher.ErrUsage))

	// It stays when its link is closed, and can be opened by anybody.
	qt.Assert(t, qt.IsNil(two.Close()))
	s.WantRun(t, 3)
	again := s.Open(t, scene.TracerRef(3))
	qt.Assert(t, qt.IsNil(again.Detach(t.Context())))
	s.WantRun(t, 1)
	_, err = again.Info(t.Context())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.IsNil(again.Close()))

	// Netlink takes off what no process owns.
	s.Server.IP(t, "link", "set", "dev", s.ServerDev, "xdp", "off")
	_, err = one.Chain(t.Context())
	qt.Assert(t, qt.IsNil(err))
	_, err = one.Info(t.Context())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Check(t, qt.ErrorIs(one.Set(t.Context(), scene.Priority(1)), fs.ErrNotExist))
	s.WantFree(t)

	// The next change takes its pins away.
	s.JoinLibxdp(t, 4, scene.Pass, 10)
	s.Detach(t, scene.TracerRef(4))
	s.WantFree(t)
	s.WantNoDispatchers(t)
}

// tc makes "xdp" in a bpffs a symbolic link to its own folder. libxdp goes on to work then, and so does recover.
func TestLibxdpFolderOfTC(t *testing.T) {
	s := scene.New(t)
	s.ClearAtEnd(t)
	tc := filepath.Join(s.BPFFS, "tc")
	qt.Assert(t, qt.IsNil(os.Mkdir(tc, 0o700)))
	qt.Assert(t, qt.IsNil(os.Symlink("tc/", filepath.Join(s.BPFFS, "xdp"))))
	qt.Check(t, qt.HasLen(s.Recover(t, dispatcher.RecoverOptions{}), 0))

	testenv.NeedFreplace(t)
	s.JoinLibxdp(t, 1, scene.Pass, 10)
	s.WantRun(t, 1)
	pins, err := os.ReadDir(tc)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(pins, 1))
	s.Clear(t)
	s.WantRun(t)
}

// What is in a chain of libxdp is found among all that there is, in all namespaces.
func TestLibxdpListed(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.New(t)
	s.JoinLibxdp(t, 1, scene.Pass, 10)
	chains, err := dispatcher.List(t.Context(), dispatcher.ListOptions{BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	i := slices.IndexFunc(chains, func(c hook.Chain) bool {
		return c.Style == hook.StyleLibxdp && c.Target == s.ServerDev && c.Ifindex == s.ServerIfindex
	})
	qt.Assert(t, qt.IsTrue(i >= 0))
	qt.Check(t, qt.Equals(scene.Summary(&chains[i]), scene.TracerRef(1)+"*(libxdp)"))

	held, err := dispatcher.HoldersIn(t.Context(), chains[i:i+1], dispatcher.HoldersOptions{})
	qt.Assert(t, qt.IsNil(err))
	var pins []string
	for _, h := range held[0] {
		for _, holder := range h.Holders.Pins {
			pins = append(pins, holder.Path)
		}
	}
	qt.Check(t, qt.IsTrue(slices.ContainsFunc(pins, func(p string) bool { return strings.HasSuffix(p, "/prog0-link") })), qt.Commentf("%q", pins))
	s.Clear(t)
	s.WantNoDispatchers(t)
}

// A chain goes over to the other style and back, and packets meet the same members
// in the same order.
func TestConvert(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.New(t)
	s.JoinLibxdp(t, 2, scene.Pass, 70)
	s.JoinLibxdp(t, 1, scene.Pass, 10)
	s.JoinLibxdp(t, 3, scene.Pass, 90)
	s.WantRun(t, 1, 2, 3)
	before := s.Read(t)

	c := convert(t, s, hook.StyleOwned, 1, 2, 3)
	qt.Check(t, qt.IsTrue(c.Protected()))
	s.WantRun(t, 1, 2, 3)
	s.WantChain(t, "ldt_trace_1* ldt_trace_2* ldt_trace_3*")
	for i, m := range s.Read(t).Members {
		qt.Check(t, qt.Equals(m.Priority, before.Members[i].Priority))
		qt.Check(t, qt.Equals(m.ContinueOn, before.Members[i].ContinueOn))
	}
	s.WantNoDispatchers(t)
	_, err := s.Server.TryIP("link", "set", "dev", s.ServerDev, "xdp", "off")
	qt.Check(t, qt.IsNotNil(err))

	// More join, of the same priority, which here is in the order of their coming.
	for _, n := range []int{5, 4} {
		link, err := dispatcher.Attach(t.Context(), s.Target, s.TracerSource(n, scene.Pass), dispatcher.Options{Priority: 95, Persistent: true, BPFFS: s.BPFFS})
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	s.WantRun(t, 1, 2, 3, 5, 4)
	c = convert(t, s, hook.StyleLibxdp, 1, 2, 3, 4, 5)
	qt.Check(t, qt.Equals(c.Style, hook.StyleLibxdp))
	s.WantRun(t, 1, 2, 3, 5, 4)
	s.WantNoPins(t)

	// Without a gap, and protected later.
	o := dispatcher.ConvertOptions{NoGap: true, BPFFS: s.BPFFS, Programs: map[hook.Ref]dispatcher.Source{}}
	for _, m := range s.Read(t).Members {
		var n int
		fmt.Sscanf(m.Name, "ldt_trace_%d", &n)
		o.Programs[hook.ProgramRef(m.Program.ID)] = s.TracerSource(n, scene.Pass)
	}
	c, err = dispatcher.Convert(t.Context(), s.Target, hook.StyleOwned, o)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.IsFalse(c.Protected()))
	s.WantRun(t, 1, 2, 3, 5, 4)
	link, err := dispatcher.Adopt(t.Context(), s.Target, dispatcher.AdoptOptions{Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(link.Close()))
	s.WantRun(t, 1, 2, 3, 5, 4)
	qt.Check(t, qt.IsTrue(s.Read(t).Protected()))
	s.WantNoDispatchers(t)
	s.Clear(t)
	s.WantFree(t)
}

// When only the old dispatcher's pins are left, the error says that the chain was converted.
func TestConvertLeavesPins(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.New(t)
	s.JoinLibxdp(t, 1, scene.Pass, 10)
	o := dispatcher.ConvertOptions{BPFFS: s.BPFFS, Programs: map[hook.Ref]dispatcher.Source{hook.Ref(scene.TracerRef(1)): s.TracerSource(1, scene.Pass)}}
	err := scene.AtEachStep(func() error {
		_, err := dispatcher.Convert(t.Context(), s.Target, hook.StyleOwned, o)
		return err
	}, func(step string) {
		if step == "convert: attached" {
			qt.Assert(t, qt.IsNil(unix.Mount("", s.BPFFS, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")))
		}
	})
	qt.Assert(t, qt.IsNil(unix.Mount("", s.BPFFS, "", unix.MS_REMOUNT, "")))
	qt.Check(t, qt.ErrorMatches(err, `convert xdp veth1: the device has the owned chain now, but the pins of libxdp's dispatcher are still there: .*; "dispatcher .*recover" removes them`))
	qt.Check(t, qt.IsTrue(s.Read(t).Protected()))
	s.WantRun(t, 1)
	s.Recover(t, dispatcher.RecoverOptions{})
	s.WantNoDispatchers(t)
	s.Clear(t)
	s.WantFree(t)
}

// While a chain changes its style nothing is attached for a moment, and the length
// of that is told here; without a gap no packet gets through.
func TestConvertGap(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.New(t)
	drop := func() dispatcher.Source {
		return dispatcher.Spec(scene.Typed(testenv.DropUDPPortSpec("ldt_drop", scene.Port)), dispatcher.LoadOptions{})
	}
	link, err := dispatcher.Attach(t.Context(), s.Target, drop(), dispatcher.Options{Style: hook.StyleLibxdp, Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(link.Close()))
	convert := func(to hook.Style, noGap bool) (through uint64) {
		t.Helper()
		flood := s.Flood(t, scene.Port, scene.Port+1)
		scene.Soon(t, func() bool { _, marker := flood.Marker(); return marker > 0 })
		before, start := flood.Sent(), time.Now()
		_, err := dispatcher.Convert(t.Context(), s.Target, to, dispatcher.ConvertOptions{
			NoGap: noGap, BPFFS: s.BPFFS, Programs: map[hook.Ref]dispatcher.Source{"ldt_drop": drop()},
		})
		took, sent := time.Since(start), flood.Sent()-before
		qt.Assert(t, qt.IsNil(err))
		all, through := flood.Stop()
		gap := time.Duration(float64(took) * float64(through) / float64(max(sent, 1)))
		t.Logf("to %s, no gap %v: took %v; of %d datagrams %d got through, so that the gap was about %v", to, noGap, took, all, through, gap)
		return through
	}
	for range 3 {
		convert(hook.StyleOwned, false)
		convert(hook.StyleLibxdp, false)
	}
	qt.Check(t, qt.Equals(convert(hook.StyleOwned, true), 0))
	s.Clear(t)
	flood := s.Flood(t, scene.Port)
	scene.Soon(t, func() bool { return flood.Received() > 0 })
	flood.Stop()
	s.WantFree(t)
	s.WantNoDispatchers(t)
}

// The maps of a member are those that it had.
func TestConvertKeepsMaps(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.New(t)
	counting := func() dispatcher.Source {
		spec := scene.CountingOn(hook.XDP)
		spec.Programs = scene.Typed(spec.Programs["ldt_counting"]).Programs
		return dispatcher.Spec(spec, dispatcher.LoadOptions{})
	}
	link, err := dispatcher.Attach(t.Context(), s.Target, counting(), dispatcher.Options{Style: hook.StyleLibxdp, Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	counted := func() uint64 {
		t.Helper()
		prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(s.Read(t).Members[0].Program.ID))
		qt.Assert(t, qt.IsNil(err))
		defer prog.Close()
		maps := testenv.Maps(t, prog)
		qt.Assert(t, qt.HasLen(maps, 1))
		defer maps[0].Close()
		b, err := maps[0].LookupBytes(uint32(0))
		qt.Assert(t, qt.IsNil(err))
		return binary.NativeEndian.Uint64(b)
	}
	s.Send(t, scene.Port, 10)
	qt.Assert(t, qt.Equals(counted(), uint64(10)))
	qt.Assert(t, qt.IsNil(link.Close()))
	for _, to := range []hook.Style{hook.StyleOwned, hook.StyleLibxdp, hook.StyleOwned} {
		before := counted()
		_, err := dispatcher.Convert(t.Context(), s.Target, to, dispatcher.ConvertOptions{
			BPFFS: s.BPFFS, Programs: map[hook.Ref]dispatcher.Source{"ldt_counting": counting()},
		})
		qt.Assert(t, qt.IsNil(err))
		s.Send(t, scene.Port, 10)
		qt.Assert(t, qt.Equals(counted(), before+10), qt.Commentf("%s", to))
	}
	s.Clear(t)
	s.WantFree(t)
	s.WantNoDispatchers(t)
}

// What cannot go over stays as it is.
func TestConvertRefused(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.New(t)
	convert := func(to hook.Style, programs map[hook.Ref]dispatcher.Source) error {
		_, err := dispatcher.Convert(t.Context(), s.Target, to, dispatcher.ConvertOptions{BPFFS: s.BPFFS, Programs: programs})
		return err
	}
	qt.Check(t, qt.ErrorIs(convert(hook.StyleOwned, nil), fs.ErrNotExist))
	qt.Check(t, qt.ErrorIs(convert("mine", nil), dispatcher.ErrUsage))

	s.JoinLibxdp(t, 1, scene.Pass, 10)
	qt.Check(t, qt.ErrorIs(convert(hook.StyleLibxdp, nil), fs.ErrExist))
	qt.Check(t, qt.ErrorIs(convert(hook.StyleOwned, map[hook.Ref]dispatcher.Source{"nosuch": s.TracerSource(2, scene.Pass), "ldt_trace_1": s.TracerSource(1, scene.Pass)}), fs.ErrNotExist))
	frags := scene.Typed(s.Trace.Spec(2, scene.Pass))
	frags.Programs["ldt_trace_2"].Instructions = asm.Instructions{asm.Return()} // R0 has no value
	refused := dispatcher.Spec(frags, dispatcher.LoadOptions{})
	var verifier *hook.VerifierRefusal
	qt.Check(t, qt.ErrorAs(convert(hook.StyleOwned, map[hook.Ref]dispatcher.Source{"ldt_trace_1": refused}), &verifier))
	s.WantRun(t, 1)
	s.Clear(t)

	for n := range 11 {
		s.Attach(t, s.Tracer(t, n, scene.Pass), dispatcher.Options{Name: fmt.Sprint(n), Persistent: true})
	}
	qt.Check(t, qt.ErrorIs(convert(hook.StyleLibxdp, nil), dispatcher.ErrChainFull))
	s.Detach(t, "10")
	// Loaded with an expected attach type, it cannot be called from there.
	err := convert(hook.StyleLibxdp, nil)
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
	s.WantRun(t, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9)
	s.Clear(t)
	s.Attach(t, s.Tracer(t, 1, scene.Pass), dispatcher.Options{Name: "1"})
	qt.Check(t, qt.ErrorIs(convert(hook.StyleLibxdp, nil), dispatcher.ErrBusy))
	s.WantRun(t, 1)
	s.Clear(t)
	s.WantFree(t)
	s.WantNoDispatchers(t)
}

// Members of an owned chain with programs that were loaded without an expected attach
// type can be called from libxdp's dispatcher as they are (Linux 6.1).
func TestConvertLoadedPrograms(t *testing.T) {
	testenv.NeedFreplace(t)
	s := scene.New(t)
	none := testenv.ExpectedAttachType(ebpf.AttachNone)
	s.AttachLegacy(t, testenv.Load(t, s.Trace.Spec(0, scene.Pass, none)))
	first := dispatcher.AdoptOptions{}
	first.Name, first.Persistent = "0", true
	s.Adopt(t, first).Close()
	for n := 1; n < 3; n++ {
		s.Attach(t, testenv.Load(t, s.Trace.Spec(n, scene.Pass, none)), dispatcher.Options{Name: fmt.Sprint(n), Persistent: true}).Close()
	}
	s.WantRun(t, 0, 1, 2)
	_, err := dispatcher.Convert(t.Context(), s.Target, hook.StyleLibxdp, dispatcher.ConvertOptions{BPFFS: s.BPFFS})
	if err != nil { // Linux 5.10
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrIncompatible))
		s.WantRun(t, 0, 1, 2)
		s.Clear(t)
		s.WantFree(t)
		return
	}
	s.WantRun(t, 0, 1, 2)
	qt.Check(t, qt.Equals(s.Read(t).Style, hook.StyleLibxdp))
	// Another change links what is there again.
	s.Detach(t, scene.TracerRef(1))
	s.WantRun(t, 0, 2)
	s.Clear(t)
	s.WantFree(t)
	s.WantNoDispatchers(t)
}
