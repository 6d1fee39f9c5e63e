package chains

import (
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
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

// The whole point: no "ip link set xdp", of any kind, takes a device away from a chain. What ip is told to do may be
// nothing (off in the other mode); then it may succeed.
func TestIPCannotTakeADevice(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		pass := s.Pinned(t, testenv.VerdictProgram(t, "ldt_intruder", testenv.XDPPass))
		s.Attach(t, testenv.DropUDPPort(t, "ldt_guard", scene.Port), dispatcher.Options{Mode: mode})
		before := s.Read(t)
		for _, how := range []string{"xdp", "xdpdrv", "xdpgeneric"} {
			for _, what := range []string{"pinned " + pass, "off"} {
				for _, force := range []string{"", "-force "} {
					command := fmt.Sprintf("%slink set dev %s %s %s", force, s.ServerDev, how, what)
					out, err := s.Server.TryIP(strings.Fields(command)...)
					otherMode := (how == "xdpgeneric") != (mode == hook.ModeGeneric)
					if what != "off" || !otherMode {
						qt.Check(t, qt.IsNotNil(err), qt.Commentf("%s: %s", command, out))
						qt.Check(t, qt.ErrorMatches(err, `(?s).*(active BPF XDP link|Native and generic XDP can't be active at the same time|busy|File exists).*`),
							qt.Commentf("%s", command))
					}
					qt.Assert(t, qt.IsTrue(s.Drops(t)), qt.Commentf("%s", command))
				}
			}
		}
		qt.Check(t, qt.DeepEquals(s.Read(t), before))
	})
}

// The same with all the flags that rtnetlink has, and with the dispatcher's own program as the expected one.
func TestNetlinkCannotTakeADevice(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		intruder := testenv.VerdictProgram(t, "ldt_intruder", testenv.XDPPass)
		s.Attach(t, testenv.DropUDPPort(t, "ldt_guard", scene.Port), dispatcher.Options{Mode: mode})
		before := s.Read(t)
		own, err := ebpf.NewProgramFromID(ebpf.ProgramID(before.DispatcherID))
		qt.Assert(t, qt.IsNil(err))
		defer own.Close()

		for how, flags := range scene.LegacyFlags {
			for _, test := range []struct {
				what     string
				fd       int
				flags    uint32
				expected int
			}{
				{"attach", intruder.FD(), 0, 0},
				{"attach if there is none", intruder.FD(), unix.XDP_FLAGS_UPDATE_IF_NOEXIST, 0},
				{"replace none", intruder.FD(), unix.XDP_FLAGS_REPLACE, -1},
				{"replace the dispatcher", intruder.FD(), unix.XDP_FLAGS_REPLACE, own.FD()},
				{"replace itself", intruder.FD(), unix.XDP_FLAGS_REPLACE, intruder.FD()},
				{"detach", -1, 0, 0},
				{"detach if there is none", -1, unix.XDP_FLAGS_UPDATE_IF_NOEXIST, 0},
				{"detach the dispatcher", -1, unix.XDP_FLAGS_REPLACE, own.FD()},
				{"attach the dispatcher itself", own.FD(), 0, 0},
			} {
				err := s.SetXDP(t, test.fd, flags|test.flags, test.expected)
				comment := qt.Commentf("%s, %v: %v", test.what, how, err)
				if sameMode := how == mode || how == hook.ModeAuto && mode == hook.ModeNative; sameMode {
					qt.Check(t, qt.ErrorIs(err, unix.EBUSY), comment)
				} else if test.fd >= 0 {
					qt.Check(t, qt.IsTrue(errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY)), comment)
				}
				qt.Assert(t, qt.IsTrue(s.Drops(t)), comment)
			}
		}
		qt.Check(t, qt.DeepEquals(s.Read(t), before))
	})
}

// Nor does another link, of an app that uses links but not this library.
func TestLinkCannotTakeADevice(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		intruder := testenv.VerdictProgram(t, "ldt_intruder", testenv.XDPPass)
		s.Attach(t, testenv.DropUDPPort(t, "ldt_guard", scene.Port), dispatcher.Options{Mode: mode})
		for how, flags := range scene.LegacyFlags {
			err := s.Server.Run(func() error {
				l, err := link.AttachXDP(link.XDPOptions{Program: intruder, Interface: s.ServerIfindex, Flags: link.XDPAttachFlags(flags)})
				if err == nil {
					l.Close()
				}
				return err
			})
			qt.Check(t, qt.IsTrue(errors.Is(err, unix.EEXIST) || errors.Is(err, unix.EBUSY)), qt.Commentf("%v: %v", how, err))
			qt.Assert(t, qt.IsTrue(s.Drops(t)))
		}
	})
}

// A good neighbour: where there is no chain, the old ways work as ever, before one was there and afterwards.
func TestLegacyWorksWhereNothingIsOwned(t *testing.T) {
	scene.EachMode(t, func(t *testing.T, s *scene.Scene, mode hook.Mode) {
		drop := s.Pinned(t, testenv.DropUDPPort(t, "ldt_legacy", scene.Port))
		how := map[hook.Mode]string{hook.ModeNative: "xdpdrv", hook.ModeGeneric: "xdpgeneric"}[mode]
		for range 2 {
			s.Server.IP(t, "link", "set", "dev", s.ServerDev, how, "pinned", drop)
			qt.Assert(t, qt.IsTrue(s.Drops(t)))
			s.Server.IP(t, "link", "set", "dev", s.ServerDev, how, "off")
			qt.Assert(t, qt.IsFalse(s.Drops(t)))

			l := s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Mode: mode})
			_, err := s.Server.TryIP("link", "set", "dev", s.ServerDev, how, "pinned", drop)
			qt.Assert(t, qt.IsNotNil(err))
			qt.Assert(t, qt.IsNil(l.Close()))
		}
	})
}

// What to do about an occupant. The second command of the first is one to be typed.
const (
	legacyHint  = `make it a member with "dispatcher .*adopt xdp veth1", or remove it with "(ip .*)"`
	foreignHint = `"dispatcher .*holders xdp veth1" tells more; .*`
)

// occupations are the ways in which others hold a device.
var occupations = []struct {
	kind hook.Kind
	mode hook.Mode
	hint string
}{
	{hook.KindLegacy, hook.ModeNative, legacyHint},
	{hook.KindLegacy, hook.ModeGeneric, legacyHint},
	{hook.KindForeign, hook.ModeNative, foreignHint},
	{hook.KindForeign, hook.ModeGeneric, foreignHint},
}

// Another program was first: the error must say which, so that the administrator can ask its owner, and nothing
// may have changed.
func TestOccupiedDevice(t *testing.T) {
	for _, test := range occupations {
		t.Run(fmt.Sprintf("%s %v", test.kind, test.mode), func(t *testing.T) {
			s := scene.New(t)
			drop := testenv.DropUDPPort(t, "ldt_other", scene.Port)
			linkID := s.Occupy(t, drop, test.kind, test.mode)
			before := s.Read(t)
			want := hook.Occupant{Kind: test.kind, Program: scene.ProgramOf(t, drop), LinkID: linkID, Mode: test.mode}

			mapPins := filepath.Join(s.BPFFS, "maps")
			for what, attach := range map[string]func() error{
				"attach": func() error {
					_, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 1, testenv.XDPPass)), dispatcher.Options{BPFFS: s.BPFFS, Persistent: true})
					return err
				},
				"attach in the other mode": func() error {
					_, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 1, testenv.XDPPass)),
						dispatcher.Options{BPFFS: s.BPFFS, Mode: hook.ModeNative + hook.ModeGeneric - test.mode})
					return err
				},
				"attach a file": func() error {
					_, err := dispatcher.Attach(t.Context(), s.Target, dispatcher.File("../testdata/filter.o", dispatcher.LoadOptions{MapPins: mapPins}), dispatcher.Options{BPFFS: s.BPFFS})
					return err
				},
				"plan": func() error {
					_, err := dispatcher.Plan(t.Context(), s.Target, dispatcher.Program(s.Tracer(t, 1, testenv.XDPPass)), dispatcher.Options{BPFFS: s.BPFFS})
					return err
				},
				"open":       func() error { _, err := dispatcher.Open(t.Context(), s.Target, "ldt_other", s.Look()); return err },
				"detach":     func() error { return dispatcher.Detach(t.Context(), s.Target, "ldt_other", s.Leave()) },
				"detach all": func() error { return dispatcher.DetachAll(t.Context(), s.Target, s.Leave()) },
			} {
				err := attach()
				qt.Assert(t, qt.ErrorIs(err, dispatcher.ErrBusy), qt.Commentf("%s", what))
				var e *dispatcher.Error
				qt.Assert(t, qt.ErrorAs(err, &e))
				qt.Assert(t, qt.IsNotNil(e.Occupant))
				got := *e.Occupant
				qt.Check(t, qt.IsFalse(got.Program.LoadedAt.IsZero()))
				got.Program.LoadedAt = want.Program.LoadedAt
				got.HeldBy = nil // a process that looks at all links holds this one for a moment
				qt.Check(t, qt.DeepEquals(got, want))

				by := fmt.Sprintf("link %d", linkID)
				if linkID == 0 {
					by = "a program without a link"
				}
				qt.Check(t, qt.ErrorMatches(err, fmt.Sprintf(`(attach|open|detach) xdp veth1: held by %s \(program ldt_other, id %d, tag %s, %v mode[^)]*\).*; %s`,
					by, want.Program.ID, want.Program.Tag, test.mode, test.hint)))
				qt.Assert(t, qt.IsTrue(s.Drops(t)), qt.Commentf("%s", what))
			}
			qt.Check(t, qt.DeepEquals(s.Read(t), before))
			s.WantNoPins(t)
			entries, err := filepath.Glob(mapPins + "/*")
			qt.Check(t, qt.IsNil(err))
			qt.Check(t, qt.HasLen(entries, 0))

			if test.kind == hook.KindLegacy {
				_, err := s.TryJoin(t, dispatcher.Program(drop), dispatcher.Options{})
				command := strings.Fields(regexp.MustCompile(legacyHint).FindStringSubmatch(err.Error())[1])
				out, err := exec.Command(command[0], command[1:]...).CombinedOutput()
				qt.Assert(t, qt.IsNil(err), qt.Commentf("%s: %s", command, out))
				s.WantFree(t)
			}
		})
	}
}

// What others attached is shown like everything else, told apart by its kind.
func TestOthersAreListed(t *testing.T) {
	for _, test := range occupations {
		t.Run(fmt.Sprintf("%s %v", test.kind, test.mode), func(t *testing.T) {
			s := scene.New(t)
			prog := testenv.VerdictProgram(t, "ldt_other", testenv.XDPPass)
			linkID := s.Occupy(t, prog, test.kind, test.mode)
			defer s.Free(t)

			read := s.Read(t)
			list, err := dispatcher.List(t.Context(), dispatcher.ListOptions{NetNS: s.Target.NetNS, BPFFS: s.BPFFS})
			qt.Assert(t, qt.IsNil(err))
			qt.Assert(t, qt.HasLen(list, 1))
			qt.Check(t, qt.DeepEquals(&list[0], read))

			qt.Check(t, qt.Equals(read.Target, s.ServerDev))
			qt.Check(t, qt.Equals(read.Ifindex, s.ServerIfindex))
			qt.Check(t, qt.Equals(read.Mode, test.mode))
			qt.Check(t, qt.Equals(read.LinkID, linkID))
			qt.Check(t, qt.Equals(read.Protected(), test.kind == hook.KindForeign))
			qt.Check(t, qt.IsFalse(read.Ours()))
			qt.Assert(t, qt.HasLen(read.Members, 1))
			m := read.Members[0]
			m.Program.LoadedAt = scene.ProgramOf(t, prog).LoadedAt
			qt.Check(t, qt.DeepEquals(m, hook.Member{Name: "ldt_other", Kind: test.kind, State: hook.StateRunning, Program: scene.ProgramOf(t, prog)}))
		})
	}
}
