package load

import (
	"path/filepath"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
)

// A file is described without the kernel and read once. The file may be gone when the
// program is loaded.
func TestDescribeFile(t *testing.T) {
	path := filepath.Join(testdata, "runconfig.o")
	src, d, err := Describe(File{Path: path, Options: Options{Program: "ldt_drop_only"}})
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(d, Description{
		Name: "ldt_drop_only", Shape: dispatch.Shape{AttachType: ebpf.AttachXDP},
		Defaults: hook.Settings{Priority: 10, ContinueOn: hook.SetOf(hook.Drop)},
	}))
	_, ok := src.(Spec)
	qt.Check(t, qt.IsTrue(ok))

	_, again, err := Describe(src)
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(again, d))
}

func TestDescribeOfWrongFiles(t *testing.T) {
	_, _, err := Describe(File{Path: filepath.Join(testdata, "nosuch.o")})
	qt.Check(t, qt.ErrorMatches(err, `.*nosuch\.o.*`))
	_, _, err = Describe(File{Path: filepath.Join(testdata, "filter.c")})
	qt.Check(t, qt.ErrorMatches(err, `.*filter\.c: not an ELF file.*`))
	_, _, err = Describe(File{Path: filepath.Join(testdata, "runconfig.o"), Options: Options{Program: "ldt_too_late"}})
	qt.Check(t, qt.ErrorMatches(err, `.*runconfig\.o: program "ldt_too_late": .*priority 65536.*`))
	_, _, err = Describe(Spec{})
	qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
}
