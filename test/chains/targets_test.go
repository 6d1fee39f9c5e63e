package chains

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/test/internal/scene"
)

// Names under which a device may be known.
func TestDeviceNames(t *testing.T) {
	s := scene.New(t)
	long := "a-name-that-is-longer-than-fifteen-bytes." + strings.Repeat("x", 80)
	const short = "alt0"
	for _, name := range []string{short, long} {
		s.Server.IP(t, "link", "property", "add", "dev", s.ServerDev, "altname", name)
	}
	for i, name := range []string{s.ServerDev, short, long} {
		by := s.OnDevice(dispatcher.XDP(name).In(s.Server.Name))
		by.Attach(t, s.Tracer(t, i, testenv.XDPPass), dispatcher.Options{})
		c := by.Read(t)
		qt.Check(t, qt.Equals(c.Target, s.ServerDev)) // one device, one name
		qt.Check(t, qt.Equals(c.Ifindex, s.ServerIfindex))
	}
	s.WantRun(t, 0, 1, 2)
}

// Names that are none. A name that is cut short somewhere on the way would be another device's.
func TestBadDeviceNames(t *testing.T) {
	s := scene.New(t)
	prog := dispatcher.Program(s.Tracer(t, 1, testenv.XDPPass))
	for what, test := range map[string]struct {
		name  string
		cause error
	}{
		"empty":            {"", dispatcher.ErrUsage},
		"missing":          {"nosuch0", fs.ErrNotExist},
		"other case":       {"VETH1", fs.ErrNotExist},
		"15 bytes":         {strings.Repeat("v", 15), fs.ErrNotExist},
		"16 bytes":         {strings.Repeat("v", 16), fs.ErrNotExist},
		"200 bytes":        {strings.Repeat("v", 200), fs.ErrNotExist},
		"100000 bytes":     {strings.Repeat("v", 100000), fs.ErrNotExist},
		"a zero":           {"veth1\x00", fs.ErrNotExist},
		"a zero inside":    {"veth1\x00veth1", fs.ErrNotExist},
		"a zero in a long": {"veth1\x00" + strings.Repeat("v", 20), fs.ErrNotExist},
		"a slash":          {"../veth1", fs.ErrNotExist},
		"a space":          {"veth1 ", fs.ErrNotExist},
		"a number":         {fmt.Sprint(s.ServerIfindex), fs.ErrNotExist},
		"a pattern":        {"veth%d", fs.ErrNotExist},
	} {
		t.Run(what, func(t *testing.T) {
			target := dispatcher.XDP(test.name).In(s.Server.Name)
			_, err := dispatcher.Attach(t.Context(), target, prog, dispatcher.Options{BPFFS: s.BPFFS})
			qt.Check(t, qt.ErrorIs(err, test.cause))
			_, err = dispatcher.Read(t.Context(), target, s.Look())
			qt.Check(t, qt.ErrorIs(err, test.cause))
			if err != nil {
				qt.Check(t, qt.IsFalse(strings.Contains(err.Error(), "\x00")), qt.Commentf("%q", err.Error()))
			}
		})
	}
	_, err := dispatcher.Attach(t.Context(), dispatcher.Target{Device: s.ServerDev, NetNS: s.Server.Name}, prog, dispatcher.Options{})
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage)) // no hook
	_, err = dispatcher.Read(t.Context(), dispatcher.Target{Hook: "nosuch", Device: s.ServerDev, NetNS: s.Server.Name}, s.Look())
	qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	s.WantFree(t)
}

// A namespace is named as "ip netns" does, by a path, or by a process in it.
func TestNetNSNames(t *testing.T) {
	s := scene.New(t)
	var inside *testenv.Proc
	s.Server.Do(t, func() { inside = testenv.StartHelper(t, "app") })
	for i, spec := range []string{s.Server.Name, s.Server.Path(), fmt.Sprint(inside.Pid), fmt.Sprintf("/proc/%d/ns/net", inside.Pid)} {
		by := s.OnDevice(dispatcher.XDP(s.ServerDev).In(spec))
		by.Attach(t, s.Tracer(t, i, testenv.XDPPass), dispatcher.Options{})
		qt.Check(t, qt.DeepEquals(by.Read(t), s.Read(t)))
	}
	s.Server.Do(t, func() { // the caller's own
		own := s.OnDevice(dispatcher.XDP(s.ServerDev))
		own.Attach(t, s.Tracer(t, 4, testenv.XDPPass), dispatcher.Options{})
		qt.Check(t, qt.DeepEquals(own.Read(t), s.Read(t)))
	})
	s.WantRun(t, 0, 1, 2, 3, 4)
}

func TestBadNetNS(t *testing.T) {
	s := scene.New(t)
	dir := t.TempDir()
	file, pipe := filepath.Join(dir, "file"), filepath.Join(dir, "pipe")
	qt.Assert(t, qt.IsNil(os.WriteFile(file, nil, 0o600)))
	qt.Assert(t, qt.IsNil(unix.Mkfifo(pipe, 0o600)))
	for spec, cause := range map[string]error{
		"nosuch":                 fs.ErrNotExist,
		"4194999":                fs.ErrNotExist, // beyond the greatest process id
		"-1":                     fs.ErrNotExist,
		"/nosuch/path":           fs.ErrNotExist,
		strings.Repeat("n", 300): nil,
		"a\x00b":                 nil,
		file:                     dispatcher.ErrUsage,
		dir:                      dispatcher.ErrUsage,
		pipe:                     dispatcher.ErrUsage, // and no waiting for a writer
		"/dev/null":              dispatcher.ErrUsage,
		"/proc/self/ns/mnt":      dispatcher.ErrUsage,
		".":                      dispatcher.ErrUsage,
	} {
		_, err := dispatcher.Read(t.Context(), s.Target.In(spec), s.Look())
		qt.Check(t, qt.IsNotNil(err), qt.Commentf("%q", spec))
		if cause != nil {
			qt.Check(t, qt.ErrorIs(err, cause), qt.Commentf("%q", spec))
		}
		_, err = dispatcher.List(t.Context(), dispatcher.ListOptions{NetNS: spec, BPFFS: s.BPFFS})
		qt.Check(t, qt.IsNotNil(err), qt.Commentf("%q", spec))
	}
}
