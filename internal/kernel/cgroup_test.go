package kernel_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/procfs"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// newCgroup makes nested cgroups; the test removes them at its end. It returns the root cgroup and the
// names of the new cgroups: ldt-1-x/a/b, ldt-1-x/a, ldt-1-x for a/b.
func newCgroup(t *testing.T, below string) (root string, names []string) {
	t.Helper()
	root, err := kernel.CgroupRoot()
	qt.Assert(t, qt.IsNil(err))
	top := fmt.Sprintf("ldt-%d-x", os.Getpid())
	inner := filepath.Join(top, below)
	for name := inner; ; name = filepath.Dir(name) {
		names = append(names, name)
		if name == top {
			break
		}
	}
	qt.Assert(t, qt.IsNil(os.MkdirAll(filepath.Join(root, inner), 0o755)))
	t.Cleanup(func() {
		for _, name := range names {
			if err := os.Remove(filepath.Join(root, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
				t.Error(err)
			}
		}
	})
	return root, names
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	return stat(t, path).Ino
}

func TestOpenCgroup(t *testing.T) {
	testenv.CheckLeaks(t)
	root, names := newCgroup(t, "a b")
	name := names[0]
	path := filepath.Join(root, name)
	link := filepath.Join(t.TempDir(), "link")
	qt.Assert(t, qt.IsNil(os.Symlink(path, link)))
	qt.Assert(t, qt.IsNil(os.Mkdir(filepath.Join(path, "below"), 0o755)))
	defer os.Remove(filepath.Join(path, "below"))
	for _, form := range []string{
		name, "/" + name, path, path + "/", name + "/../a b", link, "/proc/self/root" + path,
		// In a folder, as for any command; see below.
		"@.", "@./", "@../" + filepath.Base(name), "@below/..", "@./below/..",
	} {
		if form[0] == '@' {
			t.Chdir(path)
			form = form[1:]
		}
		c, err := kernel.OpenCgroup(form)
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%q", form))
		qt.Check(t, qt.Equals(c.Path, path))
		qt.Check(t, qt.Equals(c.ID, inode(t, path)))
		qt.Check(t, qt.Equals(inode(t, fmt.Sprintf("/proc/self/fd/%d", c.FD())), c.ID))
		qt.Check(t, qt.IsNil(c.Close()))
	}
	for _, form := range []string{"/", root} {
		c, err := kernel.OpenCgroup(form)
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%q", form))
		qt.Check(t, qt.Equals(c.Path, root))
		c.Close()
	}
}

func TestOpenCgroupErrors(t *testing.T) {
	testenv.CheckLeaks(t)
	root, names := newCgroup(t, "")
	dir := t.TempDir()
	for form, want := range map[string]struct {
		cause error
		text  string
	}{
		"":                                      {hook.ErrUsage, `the cgroup's path is empty; .*`},
		"ldt-none":                              {fs.ErrNotExist, `there is no cgroup "ldt-none" \(cgroup v2 is mounted at .*\)`},
		"/ldt-none":                             {fs.ErrNotExist, `there is no cgroup "/ldt-none" .*`},
		root + "/ldt-none":                      {fs.ErrNotExist, `there is no cgroup ".*/ldt-none" .*`},
		".":                                     {hook.ErrUsage, `.* is not a cgroup; .*`},
		"./" + names[0]:                         {fs.ErrNotExist, `.*`},
		"../../" + names[0]:                     {fs.ErrNotExist, `.*`},
		dir:                                     {hook.ErrUsage, `.* is not a cgroup; name one by its path below the mount of cgroup v2`},
		names[0] + "/cgroup.procs":              {hook.ErrUsage, `.*/cgroup.procs is not a cgroup but a file; .*`},
		root + "/" + names[0] + "/cgroup.procs": {hook.ErrUsage, `.*/cgroup.procs is not a cgroup but a file; .*`},
	} {
		_, err := kernel.OpenCgroup(form)
		qt.Check(t, qt.ErrorIs(err, want.cause), qt.Commentf("%q", form))
		qt.Check(t, qt.ErrorMatches(err, want.text))
	}
	if v1 := mountOf(t, "cgroup"); v1 != "" {
		_, err := kernel.OpenCgroup(v1)
		qt.Check(t, qt.ErrorIs(err, hook.ErrUsage))
		qt.Check(t, qt.ErrorMatches(err, `.* is a cgroup of version 1, .*; name one of version 2`))
	}
}

// mountOf returns where a file system of that type is mounted; "" if nowhere.
func mountOf(t *testing.T, fsType string) string {
	mounts, err := procfs.Mounts("/proc/self/mountinfo")
	qt.Assert(t, qt.IsNil(err))
	for _, m := range mounts {
		if m.Type == fsType {
			return m.Point
		}
	}
	return ""
}

func TestCgroupAncestors(t *testing.T) {
	testenv.CheckLeaks(t)
	root, names := newCgroup(t, "a/b")
	c, err := kernel.OpenCgroup(names[0])
	qt.Assert(t, qt.IsNil(err))
	defer c.Close()
	chain, err := c.Ancestors()
	qt.Assert(t, qt.IsNil(err))
	var paths []string
	for _, a := range chain {
		paths = append(paths, a.Path)
		qt.Check(t, qt.Equals(a.ID, inode(t, a.Path)))
	}
	kernel.CloseCgroups(chain)
	want := []string{}
	for _, name := range append(names, "") {
		want = append(want, filepath.Join(root, name))
	}
	qt.Assert(t, qt.DeepEquals(paths, want))

	// A new cgroup of the same name is another cgroup.
	qt.Assert(t, qt.IsNil(os.Remove(c.Path)))
	_, err = c.Ancestors()
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
	qt.Assert(t, qt.IsNil(os.Mkdir(c.Path, 0o755)))
	_, err = c.Ancestors()
	qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
}

func TestCgroupPaths(t *testing.T) {
	testenv.CheckLeaks(t)
	root, names := newCgroup(t, "a/b")
	list, err := kernel.CgroupPaths()
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(list[0].Path, root))
	ids := map[string]uint64{}
	for _, c := range list {
		ids[c.Path] = c.ID
		if c.Path != root {
			qt.Check(t, qt.Not(qt.Equals(ids[filepath.Dir(c.Path)], 0))) // came before
		}
	}
	for _, name := range names {
		path := filepath.Join(root, name)
		qt.Check(t, qt.Equals(ids[path], inode(t, path)))
	}
}

// Cgroups come and go all the time.
func TestCgroupPathsVanish(t *testing.T) {
	testenv.CheckLeaks(t)
	root, names := newCgroup(t, "a")
	var stop atomic.Bool
	var churn sync.WaitGroup
	churn.Go(func() {
		for !stop.Load() {
			for _, name := range names {
				os.Remove(filepath.Join(root, name))
			}
			os.MkdirAll(filepath.Join(root, names[0]), 0o755)
		}
	})
	defer churn.Wait()
	defer stop.Store(true)
	for range 200 {
		_, err := kernel.CgroupPaths()
		qt.Assert(t, qt.IsNil(err))
		c, err := kernel.OpenCgroup(names[0])
		if err == nil {
			c.Close()
		} else {
			qt.Assert(t, qt.ErrorIs(err, fs.ErrNotExist))
		}
	}
}
