package libxdp

import (
	"fmt"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// They start a chain and we join: they list us, and remove their own members.
func TestInteropJoinTheirs(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		x.load(t, "count")
		x.wantSame(t, "count")
		x.join(t, 1, AttachOptions{Settings: hook.Settings{Priority: 10, ContinueOn: hook.SetOf(hook.Pass, hook.TX)}})
		x.wantSame(t, "ldt_trace_1", "count")
		x.join(t, 2, at(90))
		x.wantSame(t, "ldt_trace_1", "count", "ldt_trace_2")
		x.wantTrace(t, 1, 2)
		x.wantCounted(t)

		x.unload(t, "count")
		x.wantSame(t, "ldt_trace_1", "ldt_trace_2")
		x.wantTrace(t, 1, 2)
		x.unload(t, "ldt_trace_2")
		x.wantSame(t, "ldt_trace_1")
		x.wantTrace(t, 1)
		x.run(t, "unload", x.Name, "--all")
		x.wantSame(t)
		x.wantTrace(t)
	})
}

// We start a chain of their version, they join, we leave.
func TestInteropTheyJoin(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		o := at(10)
		o.Version = x.config
		x.join(t, 1, o)
		x.wantSame(t, "ldt_trace_1")
		x.load(t, "count", "-P", "20", "-A", "XDP_PASS,XDP_DROP")
		x.wantSame(t, "ldt_trace_1", "count")
		qt.Assert(t, qt.Equals(x.member(t, "count").ContinueOn, hook.SetOf(hook.Pass, hook.Drop)))
		x.load(t, "droplist", "-P", "5")
		x.wantSame(t, "droplist", "ldt_trace_1", "count")
		x.wantTrace(t, 1)
		x.wantCounted(t)
		x.dropClient(t, true)
		x.wantTrace(t)
		qt.Assert(t, qt.Equals(x.Passed(t, port, 10), 0))

		// We run before them, and see what they drop.
		qt.Assert(t, qt.IsNil(x.Set(t.Context(), "ldt_trace_1", hook.Settings{Priority: 1})))
		x.wantSame(t, "ldt_trace_1", "droplist", "count")
		x.wantTrace(t, 1)
		qt.Assert(t, qt.Equals(x.Passed(t, port, 10), 0))

		// We can change their settings too.
		qt.Assert(t, qt.IsNil(x.Set(t.Context(), "droplist", hook.Settings{Priority: 70, ContinueOn: hook.SetOf(hook.Pass, hook.Drop)})))
		x.wantSame(t, "ldt_trace_1", "count", "droplist")
		qt.Assert(t, qt.Equals(x.Passed(t, port, 10), 10))
		qt.Assert(t, qt.IsNil(x.Replace(t.Context(), "ldt_trace_1", x.source(t, 3))))
		x.wantSame(t, "ldt_trace_3", "count", "droplist")
		x.wantTrace(t, 3)

		qt.Assert(t, qt.IsNil(x.Detach(t.Context(), "droplist")))
		qt.Assert(t, qt.IsNil(x.Detach(t.Context(), "ldt_trace_3")))
		x.wantSame(t, "count")
		x.wantCounted(t)
		qt.Assert(t, qt.IsNil(x.Detach(t.Context(), "count")))
		x.wantSame(t)
	})
}

// They load several at once, we load several at once, and both order them
// alike.
func TestInteropSeveral(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		x.run(t, "load", x.Name, object(t, "sample"), object(t, "droplist"), object(t, "count"), "-s", "xdp")
		x.wantSame(t, "count", "droplist", "sample")
		_, _, err := x.AttachAll(t.Context(), []Source{x.source(t, 2), x.sourceOf(t, 1, pass, "a_name_that_the_kernel_cuts_off"), x.sourceOf(t, 3, pass, "e")}, AttachOptions{})
		qt.Assert(t, qt.IsNil(err))
		x.wantSame(t, "a_name_that_the_kernel_cuts_off", "count", "droplist", "e", "ldt_trace_2", "sample")
		x.wantTrace(t, 1, 3, 2)
		x.load(t, "ratelimit")
		x.wantSame(t, "a_name_that_the_kernel_cuts_off", "count", "droplist", "e", "ldt_trace_2", "ratelimit", "sample")
		x.wantTrace(t, 1, 3, 2)
		// Ten at most, for both.
		_, _, err = x.AttachAll(t.Context(), []Source{x.source(t, 4), x.source(t, 5), x.source(t, 6), x.source(t, 7)}, AttachOptions{})
		qt.Assert(t, qt.ErrorIs(err, hook.ErrChainFull))
		_, _, err = x.AttachAll(t.Context(), []Source{x.source(t, 4), x.source(t, 5), x.source(t, 6)}, AttachOptions{})
		qt.Assert(t, qt.IsNil(err))
		x.wantTrace(t, 1, 3, 2, 4, 5, 6)
		x.refused(t, "Argument list too long", x.loadArgs(t, "count")...)
		qt.Assert(t, qt.HasLen(x.status(t), MaxMembers))
		x.run(t, "unload", x.Name, "--all")
		x.wantSame(t)
	})
}

// The dispatcher accepts multi-buffer packets while all members do, whichever
// tool changes it.
func TestInteropFrags(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		p, err := ebpf.NewProgram(testenv.VerdictSpec("ldt_frags", pass, testenv.Frags()))
		if err != nil {
			t.Skip("needs frags, which this kernel has not (Linux 5.18)")
		}
		p.Close()
		o := at(10)
		o.Version = x.config
		qt.Assert(t, qt.IsTrue(x.join(t, 1, o, testenv.Frags()).Config.Frags))
		x.load(t, "count")
		qt.Assert(t, qt.IsFalse(x.read(t).Config.Frags))
		x.wantSame(t, "ldt_trace_1", "count")
		qt.Assert(t, qt.IsTrue(x.member(t, "ldt_trace_1").Frags))
		x.unload(t, "count")
		x.wantSame(t, "ldt_trace_1")
		qt.Assert(t, qt.IsTrue(x.read(t).Config.Frags))
		x.run(t, "unload", x.Name, "--all")
		x.wantSame(t)
	})
}

// Chains of other versions than theirs: xdp-loader lists and detaches older
// ones, no more; it does not know later ones.
func TestInteropVersions(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		for version := uint8(1); version <= MaxVersion; version++ {
			if version == x.config {
				continue
			}
			o := at(10)
			o.Version = version
			x.join(t, 1, o)
			x.join(t, 2, o)
			id := fmt.Sprint(x.member(t, "ldt_trace_1").Program.ID)
			if version < x.config {
				words := fmt.Sprintf("Existing dispatcher version %d is older than our version %d", version, x.config)
				x.refused(t, words, x.loadArgs(t, "count")...)
				x.refused(t, words, "unload", x.Name, "-i", id)
				var listed []string
				for _, r := range x.status(t) {
					listed = append(listed, r.Name)
				}
				qt.Assert(t, qt.DeepEquals(listed, tracerNames([]int{1, 2})))
			} else {
				words := fmt.Sprintf("dispatcher version %d higher than supported %d", version, x.config)
				x.refused(t, words, x.loadArgs(t, "count")...)
				x.refused(t, words, "unload", x.Name, "-i", id)
				x.refused(t, words, "unload", x.Name, "--all")
				x.refused(t, words, "status", x.Name)
			}
			// We continue to change it, in its version.
			x.join(t, 3, o)
			x.wantRun(t, 1, 2, 3)
			qt.Assert(t, qt.Equals(x.read(t).Config.Version, version))
			if version < x.config {
				x.run(t, "unload", x.Name, "--all")
			} else {
				qt.Assert(t, qt.IsNil(x.DetachAll(t.Context())))
			}
			x.wantRun(t)
		}
	})
}

// Each cleans up after the other.
func TestInteropClean(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		// Theirs: another program replaced their dispatcher.
		x.load(t, "count")
		left := x.read(t).Folder
		removed, err := x.Clean(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.HasLen(removed, 0))
		x.Server.IP(t, "link", "set", "dev", x.Name, "xdp", "off")
		qt.Assert(t, qt.HasLen(x.pinned(t), 3))
		removed, err = x.Clean(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.DeepEquals(removed, []string{left}))
		x.wantSame(t)

		// Ours.
		o := at(10)
		o.Version = x.config
		x.join(t, 1, o)
		x.Server.IP(t, "link", "set", "dev", x.Name, "xdp", "off")
		qt.Assert(t, qt.HasLen(x.pinned(t), 3))
		x.run(t, "clean", x.Name)
		x.wantSame(t)

		// A live chain stays.
		x.join(t, 1, o)
		x.load(t, "count")
		x.run(t, "clean")
		x.wantSame(t, "ldt_trace_1", "count")
		x.run(t, "unload", x.Name, "--all")
		x.wantSame(t)
	})
}

// Two devices with the same index in two namespaces share a bpffs. Changes on
// one do not touch the other's pins. "xdp-loader clean" removes them, and our
// Clean does not.
func TestInteropNamespaces(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		const index = 4711
		o := at(10)
		o.Version = x.config
		var both []*theirs
		for n := range 2 {
			p := testenv.NewPairOpts(t, testenv.PairOptions{ServerIfindex: index})
			y := &theirs{&scene{p, Device{p.ServerDev, p.Server.Name, x.BPFFS}, testenv.NewTrace(t, port)}, x.tools}
			y.join(t, 1+n, o)
			y.load(t, "count", "-P", "20")
			both = append(both, y)
		}
		a, b := both[0], both[1]
		qt.Assert(t, qt.HasLen(x.pinned(t), 2*5))
		a.wantTrace(t, 1)
		b.wantTrace(t, 2)
		a.unload(t, "count")
		a.wantTrace(t, 1)
		b.wantTrace(t, 2)
		b.wantCounted(t)
		for _, y := range both {
			removed, err := y.Clean(t.Context())
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.HasLen(removed, 0))
		}
		b.wantTrace(t, 2)

		a.run(t, "clean")
		a.wantTrace(t, 1)
		qt.Assert(t, qt.IsNil(a.DetachAll(t.Context())))
		c := b.read(t)
		qt.Assert(t, qt.Equals(c.Folder, ""))
		for _, m := range c.Members {
			qt.Assert(t, qt.IsTrue(m.Missing))
		}
		qt.Assert(t, qt.IsNil(b.DetachAll(t.Context())))
		x.wantPins(t)
	})
}

// A chain keeps its mode, whichever tool started it.
func TestInteropModes(t *testing.T) {
	withTools(t, func(t *testing.T, x *theirs) {
		x.load(t, "count", "-m", "skb")
		qt.Assert(t, qt.Equals(x.join(t, 1, at(1)).Mode, hook.ModeGeneric))
		x.wantSame(t, "ldt_trace_1", "count")
		x.run(t, "unload", x.Name, "--all")

		o := at(1)
		o.Version, o.Mode = x.config, hook.ModeGeneric
		x.join(t, 1, o)
		x.load(t, "count", "-m", "skb")
		x.wantSame(t, "ldt_trace_1", "count")
		qt.Assert(t, qt.Equals(x.read(t).Mode, hook.ModeGeneric))
		x.unload(t, "count")
		x.wantSame(t, "ldt_trace_1")
		qt.Assert(t, qt.IsNil(x.DetachAll(t.Context())))
		x.wantSame(t)
	})
}
