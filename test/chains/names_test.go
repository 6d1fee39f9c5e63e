package chains

import (
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// goodNames are those that have to survive a file name, a table and a map of 64 bytes.
var goodNames = []string{
	"plain", "with.dots.in.it", ".", "..", ".hidden", "a/b", "/", "../../../etc/passwd", "100%", "%2E", "x-", "a:b;c|d&e$f*g?h",
	`"quoted"`, `back\slash`, "root", "slot", "map_x", "tmp_1_2", "member_x", "libdispatcher", "日本語", "żółć", "e\u0301",
	strings.Repeat("x", hook.MaxName), strings.Repeat("é", 31), strings.Repeat("/", hook.MaxName),
}

// badNames are refused, with the reason.
var badNames = map[string]string{
	"64 bytes":            strings.Repeat("x", 64),
	"200 bytes":           strings.Repeat("x", 200),
	"64 bytes of UTF-8":   strings.Repeat("é", 32),
	"a space":             "a b",
	"a line":              "a\nb",
	"a tab":               "a\tb",
	"a zero":              "a\x00b",
	"an escape":           "\x1b[2J",
	"a no-break space":    "a\u00a0b",
	"not UTF-8":           "a\xffb",
	"an option":           "-rf",
	"only spaces":         "  ",
	"text turned around":  "a\u202eb",
	"a space of no width": "a\u200bb",
}

// Any name that is accepted can be pinned, listed, opened and detached, and two names never share a pin.
func TestNames(t *testing.T) {
	s := scene.New(t)
	prog := testenv.DropUDPPort(t, "ldt_drop", scene.Port)
	for _, name := range goodNames {
		link := s.Attach(t, prog, dispatcher.Options{Name: name, Owner: name, Persistent: true})
		m, err := link.Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(m.Name, name))
		qt.Check(t, qt.Equals(m.Owner, name))
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	c := s.Read(t)
	qt.Assert(t, qt.HasLen(c.Members, len(goodNames)))
	var slots []string
	for _, path := range c.Pins {
		_, err := os.Lstat(path)
		qt.Check(t, qt.IsNil(err))
		if filepath.Base(path) == "slot" {
			slots = append(slots, path)
		}
	}
	qt.Assert(t, qt.HasLen(slots, len(goodNames)))

	opened := map[string]bool{}
	for i, path := range slots {
		if i%2 == 0 {
			path = filepath.Dir(path) // the folder will do
		}
		link, err := dispatcher.OpenPinned(t.Context(), path)
		qt.Assert(t, qt.IsNil(err))
		m, err := link.Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		opened[m.Name] = true
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	qt.Check(t, qt.HasLen(opened, len(goodNames)))

	for _, name := range goodNames {
		qt.Assert(t, qt.IsTrue(s.Drops(t)))
		qt.Check(t, qt.IsNil(s.Open(t, name).Close()), qt.Commentf("%q", name))
		s.Detach(t, name)
		_, err := dispatcher.Open(t.Context(), s.Target, hook.Ref(name), s.Look())
		qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist), qt.Commentf("%q", name))
	}
	s.WantFree(t)
}

// What would break a table, a file name or a terminal is refused before anything is done.
func TestBadNames(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	from := dispatcher.Program(s.Tracer(t, 2, testenv.XDPPass))
	for what, name := range badNames {
		t.Run(what, func(t *testing.T) {
			s.WantRefused(t, from, dispatcher.Options{Name: name}, dispatcher.ErrUsage, `the name .*`)
			s.WantRefused(t, from, dispatcher.Options{Owner: name}, dispatcher.ErrUsage, `owner: the name .*`)
			for _, err := range []error{
				dispatcher.Detach(t.Context(), s.Target, hook.Ref(name), s.Leave()),
				func() error { _, err := dispatcher.Open(t.Context(), s.Target, hook.Ref(name), s.Look()); return err }(),
			} {
				qt.Check(t, qt.ErrorIs(err, fs.ErrNotExist))
				qt.Check(t, qt.IsFalse(strings.ContainsAny(err.Error(), "\x00\x1b\n\t")), qt.Commentf("%q", err.Error()))
			}
		})
	}
	s.WantRun(t, 1)
}

// Without a name the member has its program's, whole where the kernel cut it; without a label, the executable's.
func TestDefaultNames(t *testing.T) {
	s := scene.New(t)
	spec, err := ebpf.LoadCollectionSpec("../testdata/several.o")
	qt.Assert(t, qt.IsNil(err))
	long := "ldt_" + strings.Repeat("long", 10)
	spec.Programs[long] = spec.Programs["ldt_first"]
	delete(spec.Programs, "ldt_first")
	spec.Programs[long].Name = long

	for _, test := range []struct {
		from dispatcher.Source
		want string
	}{
		{dispatcher.Program(s.Tracer(t, 1, testenv.XDPPass)), "ldt_trace_1"},
		{dispatcher.ProgramID(uint32(scene.ID(t, s.Tracer(t, 2, testenv.XDPPass)))), "ldt_trace_2"},
		{scene.File("several.o", "ldt_second"), "ldt_second"},
		{dispatcher.Spec(spec, dispatcher.LoadOptions{Program: long}), long},
	} {
		m, err := s.Join(t, test.from, dispatcher.Options{}).Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(m.Name, test.want))
		qt.Check(t, qt.Equals(m.Owner, filepath.Base(os.Args[0])))
	}

	// A program may have no name at all. Then there is nothing to guess.
	nameless, err := ebpf.NewProgram(&ebpf.ProgramSpec{Type: ebpf.XDP, AttachType: ebpf.AttachXDP, License: "GPL", Instructions: testenv.VerdictSpec("ldt_", 2).Instructions})
	qt.Assert(t, qt.IsNil(err))
	defer nameless.Close()
	s.WantRefused(t, dispatcher.Program(nameless), dispatcher.Options{}, dispatcher.ErrUsage, `the program's name will not do for the member: the name is empty; choose one`)
	s.Attach(t, nameless, dispatcher.Options{Name: "named"})
}

// Two members of one name could not be told apart; the second is refused, from any process, until the first is gone.
func TestDuplicateNames(t *testing.T) {
	s := scene.New(t)
	prog := s.Tracer(t, 1, testenv.XDPPass)
	link := s.Attach(t, prog, dispatcher.Options{Name: "one"})
	s.WantRefused(t, dispatcher.Program(prog), dispatcher.Options{Name: "one"}, fs.ErrExist, `.*"one".*; choose another name, or replace its program`)
	s.WantRefused(t, dispatcher.Program(prog), dispatcher.Options{Name: "one", Persistent: true}, fs.ErrExist, `.*`)
	s.WantNoPins(t)
	// One program may be two members, and names differ by case.
	s.Attach(t, prog, dispatcher.Options{Name: "One"})
	s.WantRun(t, 1, 1)

	qt.Assert(t, qt.IsNil(link.Close()))
	s.Attach(t, s.Tracer(t, 2, testenv.XDPPass), dispatcher.Options{Name: "one"})
	s.WantChain(t, "One one")
	s.WantRun(t, 1, 2)
}

// Settings out of range would end up in the dispatcher's code.
func TestBadSettings(t *testing.T) {
	s := scene.New(t)
	link := s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{})
	from := dispatcher.Program(s.Tracer(t, 2, testenv.XDPPass))
	for _, bad := range []hook.Settings{
		{Priority: -1}, {Priority: hook.MaxPriority + 1}, {Priority: 1 << 40},
		{ContinueOn: 1 << hook.Verdicts}, {ContinueOn: hook.Never | hook.SetOf(hook.Pass)}, {ContinueOn: ^hook.VerdictSet(0)}, {ContinueOn: hook.SetOf(9)},
		{OnMissing: 4}, {OnMissing: 255},
	} {
		s.WantRefused(t, from, dispatcher.Options{Priority: bad.Priority, ContinueOn: bad.ContinueOn, OnMissing: bad.OnMissing}, dispatcher.ErrUsage, `.*`)
		qt.Check(t, qt.ErrorIs(link.Set(t.Context(), bad), dispatcher.ErrUsage), qt.Commentf("%+v", bad))
	}
	for _, mode := range []hook.Mode{hook.ModeOffload, 17} {
		s.WantRefused(t, from, dispatcher.Options{Mode: mode}, dispatcher.ErrUsage, `mode .*: a chain cannot be attached that way`)
	}
	m, err := link.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(m.Settings, hook.Settings{}.WithDefaults()))
	s.WantRun(t, 1)
}

// Paths that are no member's pin are told from members that are gone.
func TestOpenPinnedPaths(t *testing.T) {
	s := scene.New(t)
	s.Attach(t, s.Tracer(t, 1, testenv.XDPPass), dispatcher.Options{Name: "one", Persistent: true})
	folder := filepath.Dir(filepath.Dir(s.Read(t).Pins[0]))
	for path, cause := range map[string]error{
		"":                                 dispatcher.ErrUsage,
		"/":                                dispatcher.ErrUsage,
		s.BPFFS:                            dispatcher.ErrUsage,
		folder:                             dispatcher.ErrUsage,
		folder + "/root":                   dispatcher.ErrUsage,
		folder + "/member_%zz/slot":        dispatcher.ErrUsage,
		folder + "/member_%2":              dispatcher.ErrUsage,
		folder + "/member_two/slot":        fs.ErrNotExist,
		folder + "0/member_one/slot":       fs.ErrNotExist,
		"/libdispatcher/xdp_1/member_x":    fs.ErrNotExist,
		s.BPFFS + "/xdp_1/member_one/slot": dispatcher.ErrUsage,
	} {
		link, err := dispatcher.OpenPinned(t.Context(), path)
		qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("%q", path))
		qt.Check(t, qt.IsNil(link))
	}
	s.Clear(t)
}
