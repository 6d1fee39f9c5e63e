package demo

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// cgroupRoot finds the mount of cgroup v2. A test makes it fail.
var cgroupRoot = kernel.CgroupRoot

// addCgroup makes a cgroup, and another one inside.
func (s *stage) addCgroup() error {
	root, err := cgroupRoot()
	if errors.Is(err, fs.ErrNotExist) {
		return notHere("cgroup v2 is not mounted, and only its cgroups have hooks")
	}
	if err != nil {
		return err
	}
	path := filepath.Join(root, s.name)
	s.show("CGROUP=" + path)
	s.show("mkdir $CGROUP $CGROUP/child")
	err = os.Mkdir(path, 0o755)
	if errors.Is(err, unix.EROFS) || errors.Is(err, fs.ErrPermission) {
		return notHere(fmt.Sprintf("the demo cannot make a cgroup: %v", err))
	}
	if err != nil {
		return err
	}
	s.cgroup, s.vars["CGROUP"] = path, path
	s.later(func() error { return removeCgroup(path) })
	return os.Mkdir(filepath.Join(path, "child"), 0o755)
}

// removeCgroup removes a cgroup and the cgroups in it. It waits for processes
// that were killed just now.
func removeCgroup(path string) error {
	var folders []string
	_ = filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			folders = append(folders, path)
		}
		return nil
	})
	for _, folder := range slices.Backward(folders) {
		err := unix.Rmdir(folder)
		for start := time.Now(); err == unix.EBUSY && time.Since(start) < time.Second; {
			time.Sleep(10 * time.Millisecond)
			err = unix.Rmdir(folder)
		}
		if err != nil && err != unix.ENOENT {
			return fmt.Errorf("remove cgroup %s: %w", folder, err)
		}
	}
	return nil
}
