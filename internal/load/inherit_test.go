package load

import (
	"path/filepath"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// sources returns one program as each kind of source that is not loaded yet.
func sources(t testing.TB, object string, o Options) map[string]Source {
	t.Helper()
	return map[string]Source{"file": File{Path: filepath.Join(testdata, object), Options: o}, "spec": Spec{Collection: parse(t, object), Options: o}}
}

// A program that is loaded and closed leaves nothing open: neither the programs that it tail-calls nor the maps
// that it inherited.
func TestNothingStaysOpen(t *testing.T) {
	testenv.CheckLeaks(t)
	bpffs := testenv.BPFFS(t)
	for object, program := range map[string]string{"tailcall.o": "ldt_entry", "mapinmap.o": "", "globals.o": "", "shared.o": ""} {
		for kind, src := range sources(t, object, Options{Program: program, BPFFS: bpffs}) {
			t.Run(object+" "+kind, func(t *testing.T) {
				testenv.CheckFiles(t, func() {
					l, err := src.Load(Want{Hook: hook.XDP})
					qt.Assert(t, qt.IsNil(err))
					next, release, err := Inherit(src, l)
					qt.Assert(t, qt.IsNil(err))
					again, err := next.Load(Want{Hook: hook.XDP})
					qt.Assert(t, qt.IsNil(err))
					release()
					again.Discard()
					l.Close()
				})
			})
		}
	}
}

// Inherited maps are closed when not all of them can be read.
func TestNothingStaysOpenOnFailure(t *testing.T) {
	testenv.CheckLeaks(t)
	src := sources(t, "shared.o", Options{BPFFS: testenv.BPFFS(t)})["file"]
	l, err := src.Load(Want{Hook: hook.XDP})
	qt.Assert(t, qt.IsNil(err))
	defer l.Close()
	info, err := l.Program.Info()
	qt.Assert(t, qt.IsNil(err))
	ids, _ := info.MapIDs()
	qt.Assert(t, qt.IsTrue(len(ids) > 1), qt.Commentf("the program needs several maps: %v", ids))
	for n := range ids {
		testenv.CheckFiles(t, func() {
			testenv.WithFiles(t, n, func() {
				_, _, err := Inherit(src, l)
				qt.Check(t, qt.ErrorIs(err, unix.EMFILE))
			})
		})
	}
}

// A source keeps its kind when it inherits, so that it can still be given a bpffs and be described.
func TestInheritKeepsTheKind(t *testing.T) {
	testenv.CheckLeaks(t)
	old := testenv.VerdictProgram(t, "ldt_old", testenv.XDPPass)
	for kind, src := range sources(t, "shared.o", Options{}) {
		next, release, err := Inherit(src, Own(old))
		qt.Assert(t, qt.IsNil(err))
		defer release()
		var options Options
		switch s := PinningIn(next, "/ldt/bpffs").(type) {
		case File:
			options = s.Options
		case Spec:
			options = s.Options
		}
		qt.Check(t, qt.Equals(options.BPFFS, "/ldt/bpffs"), qt.Commentf("%s", kind))
		_, about, err := Describe(next)
		qt.Assert(t, qt.IsNil(err))
		qt.Check(t, qt.IsFalse(about.Loaded), qt.Commentf("%s: it was loaded to be described", kind))
	}
	// A loaded program stays as it is.
	next, _, err := Inherit(Program{old}, Own(old))
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(next, Source(Program{old})))
}
