package demo

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// cgroupRoot finds the mount of cgroup v2. A test makes it fail.
var cgroupRoot = kernel.CgroupRoot

// addCgroup makes a cgroup, and another one inside.
func (s *stage) addCgroup() {
	root, err := cgroupRoot()
	if errors.Is(err, fs.ErrNotExist) {
		err = notHere("cgroup v2 is not mounted, and only its cgroups have hooks")
	}
	must(err)
	path := filepath.Join(root, s.name)
	s.show("CGROUP=" + path)
	s.show("mkdir $CGROUP $CGROUP/child")
	err = os.Mkdir(path, 0o755)
	if errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) {
		err = notHere(fmt.Sprintf("the demo cannot make a cgroup: %v", err))
	}
	must(err)
	s.cgroup, s.vars["CGROUP"] = path, path
	s.later(func() error { return removeCgroup(path) })
	must(os.Mkdir(filepath.Join(path, "child"), 0o755))
}

// removeCgroup removes a cgroup and the cgroups in it.
func removeCgroup(path string) error {
	var folders []string
	_ = filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			folders = append(folders, path)
		}
		return nil
	})
	for _, folder := range slices.Backward(folders) {
		if err := whileBusy(func() error { return unix.Rmdir(folder) }); err != nil && err != unix.ENOENT {
			return fmt.Errorf("remove cgroup %s: %w", folder, err)
		}
	}
	return nil
}
