package kernel

import (
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// A refusal of a file names the folder whose mode is why, on the way, behind a symbolic link, or at the end.
func TestDenied(t *testing.T) {
	top := t.TempDir()
	for path := top; path != os.TempDir(); path = filepath.Dir(path) {
		qt.Assert(t, qt.IsNil(os.Chmod(path, 0o755)))
	}
	qt.Assert(t, qt.IsNil(errors.Join(
		os.MkdirAll(top+"/closed/in/deep", 0o755), os.Chmod(top+"/closed", 0o700),
		os.Mkdir(top+"/open", 0o755), os.WriteFile(top+"/open/secret", nil, 0o600), os.WriteFile(top+"/open/public", nil, 0o644),
		os.Mkdir(top+"/hers", 0o755), os.Chown(top+"/hers", 65534, -1), os.Chmod(top+"/hers", 0),
		os.Mkdir(top+"/sticky", 0o755), os.Chmod(top+"/sticky", 0o777|os.ModeSticky), os.WriteFile(top+"/sticky/roots", nil, 0o666),
		os.Symlink("closed/in", top+"/link"))))
	who := `; this process is user 65534 without CAP_DAC_OVERRIDE; run it as root`
	for path, test := range map[string]struct {
		do   func(path string) error
		want string
	}{
		"closed/in/deep": {func(path string) error { return second(os.Open(path)) }, "may not look into the folder " + top + "/closed: its mode is 0700 and its owner user 0, group 0" + who},
		"link/deep":      {func(path string) error { return second(os.Stat(path)) }, "may not look into the folder " + top + "/closed: its mode is 0700 .*" + who},
		"open/secret":    {func(path string) error { return second(os.Open(path)) }, "may not read " + top + "/open/secret: its mode is 0600 .*" + who},
		"open/new":       {func(path string) error { return os.Mkdir(path, 0o700) }, "may not change what is in the folder " + top + "/open: its mode is 0755 .*" + who},
		"open/public":    {os.Remove, "may not change what is in the folder " + top + "/open: .*"},
		"hers":           {func(path string) error { return second(os.ReadDir(path)) }, "may not read " + top + "/hers: its mode is 0000 and its owner user 65534, .*"},
		"sticky/roots":   {os.Remove, "may not rename or remove " + top + "/sticky/roots in a folder with the sticky bit: its mode is 06[0-9]+ .*"},
	} {
		runtime.LockOSThread()
		qt.Assert(t, qt.IsNil(unix.Setfsuid(65534)))
		err := Explain(test.do(top + "/" + path))
		qt.Check(t, qt.IsNil(unix.Setfsuid(0)))
		runtime.UnlockOSThread()
		qt.Check(t, qt.ErrorMatches(err, ".*: "+test.want))
		qt.Check(t, qt.ErrorIs(err, hook.ErrPermission))
	}
	// What a mode allows it does not refuse.
	qt.Check(t, qt.Equals(denied(&os.PathError{Op: "open", Path: top + "/open/public", Err: unix.EACCES}), ""))
}

func second[T any](_ T, err error) error { return err }
