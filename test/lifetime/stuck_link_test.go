package lifetime

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// A random app came first and keeps its link: it is told to let go, and lives.
func TestDetachLink(t *testing.T) {
	for _, h := range []hook.Hook{hook.XDP, hook.TCXIngress} {
		t.Run(string(h), func(t *testing.T) {
			s := scene.NewOn(t, h)
			prog := s.Tracer(t, 1)
			theirs, id := s.Foreign(t, prog)
			err := dispatcher.DetachLink(t.Context(), id, s.Leave())
			qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrBusy))
			s.WantRun(t, 1)
			qt.Assert(t, qt.IsNil(dispatcher.DetachLink(t.Context(), id, dispatcher.DetachOptions{BPFFS: s.BPFFS, Force: true})))
			s.WantRun(t)
			qt.Check(t, qt.ErrorIs(theirs.Update(prog), unix.ENOLINK))
			ours := s.Attach(t, s.Tracer(t, 2), dispatcher.Options{Name: "ours"})
			s.WantRun(t, 2)
			qt.Assert(t, qt.IsNil(ours.Detach(t.Context())))
		})
	}
	testenv.CheckLeaks(t)
	qt.Check(t, qt.ErrorIs(dispatcher.DetachLink(t.Context(), 1<<31, dispatcher.DetachOptions{}), fs.ErrNotExist))
}

// What cannot be forced is refused with the reason.
func TestDetachLinkThatCannotBe(t *testing.T) {
	testenv.CheckLeaks(t)
	prog := testenv.Load(t, &ebpf.ProgramSpec{Name: "ldt_rawtp", Type: ebpf.RawTracepoint, License: "GPL", Instructions: testenv.VerdictSpec("ldt_x", 0).Instructions})
	l, err := link.AttachRawTracepoint(link.RawTracepointOptions{Name: "sched_process_exec", Program: prog})
	qt.Assert(t, qt.IsNil(err))
	defer l.Close()
	info, err := l.Info()
	qt.Assert(t, qt.IsNil(err))
	err = dispatcher.DetachLink(t.Context(), uint32(info.ID), dispatcher.DetachOptions{BPFFS: t.TempDir(), Force: true})
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.ErrorMatches(err, `.*cannot detach a link of type raw tracepoint.*holders --link \d+.*`))
	_, err = dispatcher.AdoptLink(t.Context(), uint32(info.ID), dispatcher.AdoptOptions{BPFFS: t.TempDir()})
	qt.Check(t, qt.ErrorIs(err, ebpf.ErrNotSupported))
	qt.Check(t, qt.ErrorMatches(err, `.*link \d+ is of type raw tracepoint, on no hook that members can be on`))

	// Nor is it a member where the pin of one would be.
	pin := filepath.Join(testenv.BPFFS(t), "libdispatcher/cgroup_7/member_one/link")
	qt.Assert(t, qt.IsNil(os.MkdirAll(filepath.Dir(pin), 0o700)))
	qt.Assert(t, qt.IsNil(l.Pin(pin)))
	_, err = dispatcher.OpenPinned(t.Context(), pin)
	qt.Check(t, qt.ErrorMatches(err, `.*of type raw tracepoint, on no hook that members can be on`))
	qt.Assert(t, qt.IsNil(l.Unpin()))
}

// The chain takes the place of a random app's program in its link, without a packet that misses it; the app takes it back, and
// that is seen.
func TestAdoptLinkOnXDP(t *testing.T) {
	s := scene.New(t)
	drop := testenv.DropUDPPort(t, "ldt_theirs", scene.Port)
	theirs, id := s.Foreign(t, drop)
	flood := s.Flood(t, scene.Port, scene.MarkerPort)
	scene.Flow(t, flood)
	adopted, err := dispatcher.AdoptLink(t.Context(), id, dispatcher.AdoptOptions{Name: "theirs", Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { adopted.Close() })
	s.Attach(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "ours", Priority: 60, Persistent: true})
	scene.Flow(t, flood)
	_, received := flood.Stop()
	_, marker := flood.Marker()
	qt.Check(t, qt.Equals(received, 0))
	qt.Check(t, qt.IsTrue(marker > 0))
	s.WantChain(t, "theirs* ours*")
	qt.Check(t, qt.Equals(s.Read(t).LinkID, id))
	qt.Check(t, qt.IsTrue(s.Read(t).Protected()))

	qt.Assert(t, qt.IsNil(theirs.Update(drop)))
	s.WantChain(t, "ldt_theirs(foreign) ours*(displaced) theirs*(displaced)")
	qt.Check(t, qt.IsTrue(s.Drops(t)))
	_, err = adopted.Info(t.Context())
	qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))

	// Adopted again: no member is lost.
	again, err := dispatcher.AdoptLink(t.Context(), id, dispatcher.AdoptOptions{Name: "theirs", Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { again.Close() })
	s.WantChain(t, "theirs* ours*")
	qt.Check(t, qt.IsTrue(s.Drops(t)))
	s.Detach(t, "theirs")
	s.WantRun(t, 2)

	qt.Assert(t, qt.IsNil(theirs.Update(drop)))
	qt.Assert(t, qt.IsNil(dispatcher.DetachLink(t.Context(), id, dispatcher.DetachOptions{BPFFS: s.BPFFS, Force: true})))
	qt.Check(t, qt.IsFalse(s.Drops(t)))
	s.WantNoPins(t)
}

// On TCX a link becomes a member as it is.
func TestAdoptLinkOnTCX(t *testing.T) {
	s := scene.NewOn(t, hook.TCXIngress)
	ours := s.Attach(t, s.Tracer(t, 1), dispatcher.Options{Name: "ours", Priority: 30})
	_, id := s.Foreign(t, s.Tracer(t, 2))
	adopted, err := dispatcher.AdoptLink(t.Context(), id, dispatcher.AdoptOptions{Name: "theirs", Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	t.Cleanup(func() { adopted.Close() })
	s.WantRun(t, 1, 2)
	s.WantChain(t, "ours theirs*")
	qt.Check(t, qt.Equals(s.Read(t).Members[1].Priority, 50))
	_, err = dispatcher.AdoptLink(t.Context(), id, dispatcher.AdoptOptions{BPFFS: s.BPFFS})
	qt.Check(t, qt.ErrorIs(err, fs.ErrExist))
	qt.Assert(t, qt.IsNil(adopted.Detach(t.Context())))
	s.WantRun(t, 1)
	qt.Assert(t, qt.IsNil(ours.Detach(t.Context())))
}

func init() {
	testenv.RegisterHelper("holds a link", func(args []string) {
		id, _ := strconv.Atoi(args[0])
		l, err := link.NewFromID(link.ID(id))
		if err != nil {
			panic(err)
		}
		fmt.Println("holding")
		_, _ = io.Copy(io.Discard, os.Stdin)
		l.Close()
	})
}

// An app whose link was adopted takes it back, and ends: then only our pin keeps its program on the device. As long as it lives
// it is its link.
func TestLinkTakenBackAndLeft(t *testing.T) {
	s := scene.NewOn(t, hook.XDP)
	prog := s.Tracer(t, 1)
	theirs, id := s.Foreign(t, prog)
	ours, err := dispatcher.AdoptLink(t.Context(), id, dispatcher.AdoptOptions{Name: "adopted", Persistent: true, BPFFS: s.BPFFS})
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.IsNil(ours.Close()))
	qt.Assert(t, qt.IsNil(theirs.Update(prog)))
	found := func(o dispatcher.RecoverOptions) int {
		t.Helper()
		left := s.Recover(t, o)
		for _, l := range left {
			qt.Check(t, qt.Equals(l.LinkID, id))
		}
		return len(left)
	}
	displaced := func() hook.Finding {
		t.Helper()
		all, err := dispatcher.Doctor(t.Context(), s.Look())
		qt.Assert(t, qt.IsNil(err))
		i := slices.IndexFunc(all, func(f hook.Finding) bool { return f.Check == "displaced" && f.Member == "adopted" })
		qt.Assert(t, qt.IsTrue(i >= 0))
		return all[i]
	}

	holder := testenv.StartHelper(t, "holds a link", fmt.Sprint(id))
	holder.Expect(t, "holding")
	qt.Assert(t, qt.IsNil(theirs.Close()))
	qt.Check(t, qt.Equals(found(dispatcher.RecoverOptions{}), 0))
	qt.Check(t, qt.Equals(displaced().Mend, ""))
	holder.Kill()

	s.WantRun(t, 1)
	qt.Check(t, qt.StringContains(displaced().Mend, "recover"))
	qt.Check(t, qt.Equals(found(dispatcher.RecoverOptions{DryRun: true}), 1))
	s.WantRun(t, 1)
	qt.Check(t, qt.Equals(found(dispatcher.RecoverOptions{}), 1))
	s.WantFree(t)
}
