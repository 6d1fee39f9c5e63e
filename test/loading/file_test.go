package loading

import (
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

//go:generate sh ../testdata/build.sh

// options makes a source of a test object.
func options(object string, o dispatcher.LoadOptions) dispatcher.Source {
	return dispatcher.File("../testdata/"+object, o)
}

// What is no object file must be named as what it is, and change nothing.
func TestBadFiles(t *testing.T) {
	s := scene.New(t)
	dir := t.TempDir()
	write := func(name string, b []byte) string {
		path := filepath.Join(dir, name)
		qt.Assert(t, qt.IsNil(os.WriteFile(path, b, 0o600)))
		return path
	}
	object, err := os.ReadFile("../testdata/filter.o")
	qt.Assert(t, qt.IsNil(err))
	huge := write("huge", object)
	qt.Assert(t, qt.IsNil(os.Truncate(huge, 100<<20)))

	link := s.Attach(t, testenv.DropUDPPort(t, "ldt_drop", scene.Port), dispatcher.Options{})
	for _, test := range []struct {
		path  string
		cause error
		text  string
	}{
		{filepath.Join(dir, "missing.o"), fs.ErrNotExist, `.*missing.o: no such file or directory`},
		{"", fs.ErrNotExist, `.*no such file or directory`},
		{dir, dispatcher.ErrUsage, `.*: not a regular file`},
		{huge, dispatcher.ErrUsage, `.*huge: 104857600 bytes; object files are at most 67108864`},
		{write("empty.o", nil), dispatcher.ErrUsage, `.*/empty.o: the file is empty`},
		{"../testdata/filter.c", dispatcher.ErrUsage, `../testdata/filter.c: not an ELF file; compile the program with clang .*`},
		{"/bin/true", dispatcher.ErrUsage, `/bin/true: an ELF file for EM_.*, not for BPF; compile .*`},
		{"../../programs/internal/object/count_bpfeb.o", dispatcher.ErrUsage, `.*/count_bpfeb.o: compiled for the other byte order \(BigEndian\)`},
		{write("header.o", object[:64]), dispatcher.ErrUsage, `.*/header.o: (damaged ELF file|not a usable BPF object): .*`},
		{write("half.o", object[:len(object)/2]), dispatcher.ErrUsage, `.*/half.o: damaged ELF file: .*`},
		{write("almost.o", object[:len(object)-1]), dispatcher.ErrUsage, `.*/almost.o: damaged ELF file: .*`},
		{"../testdata/noxdp.o", dispatcher.ErrIncompatible, `../testdata/noxdp.o: no program for xdp in the file; .*`},
	} {
		t.Run(filepath.Base(test.path), func(t *testing.T) {
			from := dispatcher.File(test.path, dispatcher.LoadOptions{})
			s.WantRefused(t, from, dispatcher.Options{}, test.cause, test.text)
			err := link.Update(t.Context(), from)
			qt.Check(t, qt.ErrorIs(err, test.cause))
			qt.Check(t, qt.ErrorMatches(err, `replace xdp veth1: `+test.text))
			qt.Assert(t, qt.IsTrue(s.Drops(t)))
		})
	}
}

// A file with several programs: the chosen one runs and is called by its name, and without a choice the names are listed.
func TestChooseProgram(t *testing.T) {
	s := scene.New(t)
	for _, test := range []struct {
		choice, name string
		dropped      int
	}{
		{"ldt_first", "ldt_first", scene.Port}, {"ldt_second", "ldt_second", scene.Port + 1}, {"xdp.frags", "ldt_frags", scene.Port + 2},
	} {
		link := s.Join(t, scene.File("several.o", test.choice), dispatcher.Options{})
		s.WantChain(t, test.name)
		s.WantDropped(t, test.dropped)
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
	}
	s.WantRefused(t, scene.File("several.o", ""), dispatcher.Options{}, dispatcher.ErrUsage, `../testdata/several.o: the file has several programs for xdp: choose one of .*ldt_first, ldt_frags, ldt_second`)
	s.WantRefused(t, scene.File("several.o", "xdp"), dispatcher.Options{}, dispatcher.ErrUsage, `../testdata/several.o: section "xdp" has several programs: choose one of ldt_first, ldt_second`)
	s.WantRefused(t, scene.File("several.o", "ldt_third"), dispatcher.Options{}, fs.ErrNotExist, `../testdata/several.o: .*ldt_third.*ldt_first, ldt_frags, ldt_second.*`)
	s.WantRefused(t, scene.File("runconfig.o", "ldt_nun"), dispatcher.Options{}, fs.ErrNotExist, `.*ldt_none.*`)
}

// When the verifier refuses, the cause is one line, the whole log can be had too, and no pin stays.
func TestVerifierRefusal(t *testing.T) {
	s := scene.New(t)
	from := options("refused.o", dispatcher.LoadOptions{BPFFS: s.BPFFS})
	_, err := s.TryJoin(t, from, dispatcher.Options{Persistent: true})
	qt.Check(t, qt.ErrorMatches(err, `attach xdp veth1: ../testdata/refused.o: the verifier refused program "ldt_refused": invalid access to packet, .* \(permission denied\)`))
	var refusal *hook.VerifierRefusal
	qt.Assert(t, qt.ErrorAs(err, &refusal))
	qt.Check(t, qt.Equals(refusal.Program, "ldt_refused"))
	qt.Check(t, qt.IsTrue(len(refusal.Log) > 5))
	var verifier *ebpf.VerifierError
	qt.Check(t, qt.ErrorAs(err, &verifier))
	qt.Check(t, qt.DeepEquals(pinsBelow(t, s.BPFFS), []string{}))
	s.WantFree(t)
}

// Constants and variables set before the load are what the program sees.
func TestGlobals(t *testing.T) {
	s := scene.New(t)
	set := func(globals map[string]string) dispatcher.Source {
		return options("filter.o", dispatcher.LoadOptions{Globals: globals})
	}
	link := s.Join(t, set(map[string]string{"port": "0x1b5b", "seen": "1000000"}), dispatcher.Options{Persistent: true}) // 7003
	s.WantDropped(t, scene.Port+3)
	qt.Check(t, qt.IsTrue(scene.PinnedCount(t, s.Read(t).Pins[0]) > 1000000))
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), set(map[string]string{"port": "7004"}))))
	s.WantDropped(t, scene.Port+4)
	for text, why := range map[string]string{
		"70000": `../testdata/filter.o: global "port": 70000 is out of range for 16 bits`,
		"http":  `../testdata/filter.o: global "port": "http" is not a number`,
	} {
		s.WantRefused(t, set(map[string]string{"port": text}), dispatcher.Options{}, dispatcher.ErrUsage, why)
	}
	s.WantRefused(t, set(map[string]string{"prot": "1"}), dispatcher.Options{}, dispatcher.ErrUsage, `../testdata/filter.o: there is no global "prot" in the file \(it has: left, port, seen\)`)
	s.Clear(t)
}

// Programs made for libxdp bring their settings along; the caller's come first, one by one.
func TestRunConfig(t *testing.T) {
	s := scene.New(t)
	pass, drop := hook.SetOf(hook.Pass), hook.SetOf(hook.Drop)
	for _, test := range []struct {
		program  string
		settings hook.Settings // the caller's
		want     hook.Settings
	}{
		{"ldt_none", hook.Settings{}, hook.Settings{Priority: 50, ContinueOn: pass}},
		{"ldt_drop_only", hook.Settings{}, hook.Settings{Priority: 10, ContinueOn: drop}},
		{"ldt_drop_only", scene.Priority(70), hook.Settings{Priority: 70, ContinueOn: drop}},
		{"ldt_drop_only", hook.Settings{ContinueOn: pass}, hook.Settings{Priority: 10, ContinueOn: pass}},
		{"ldt_drop_only", hook.Settings{OnMissing: hook.MissingDrop}, hook.Settings{Priority: 10, ContinueOn: drop, OnMissing: hook.MissingDrop}},
		{"ldt_prio_only", hook.Settings{}, hook.Settings{Priority: 5, ContinueOn: pass}},
		{"ldt_never", hook.Settings{}, hook.Settings{Priority: 50, ContinueOn: hook.Never}},
		{"ldt_zero", hook.Settings{}, hook.Settings{Priority: 1, ContinueOn: pass}},
	} {
		link := s.Join(t, scene.File("runconfig.o", test.program), dispatcher.Options{Priority: test.settings.Priority, ContinueOn: test.settings.ContinueOn, OnMissing: test.settings.OnMissing})
		m, err := link.Info(t.Context())
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(m.Settings, test.want.WithDefaults()), qt.Commentf("%s with %+v", test.program, test.settings))
		qt.Assert(t, qt.IsNil(link.Detach(t.Context())))
		qt.Assert(t, qt.IsNil(link.Close()))
	}
	for _, program := range []string{"ldt_too_late", "ldt_two", "ldt_unknown", "ldt_plain_int", "ldt_no_struct"} {
		s.WantRefused(t, scene.File("runconfig.o", program), dispatcher.Options{}, dispatcher.ErrUsage, `../testdata/runconfig.o: program "`+program+`": \.xdp_run_config: .*`)
	}
	// They are for joining: a new version of the program does not move the member.
	link := s.Join(t, scene.File("runconfig.o", "ldt_none"), dispatcher.Options{Priority: 33})
	qt.Assert(t, qt.IsNil(link.Update(t.Context(), scene.File("runconfig.o", "ldt_drop_only"))))
	m, err := link.Info(t.Context())
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(m.Settings, scene.Priority(33).WithDefaults()))
}
