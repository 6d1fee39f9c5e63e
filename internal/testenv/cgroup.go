package testenv

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// Cgroup is a cgroup (v2) of a test. It begins empty; see [Cgroup.Enter] and [Cgroup.StartHelper].
type Cgroup struct {
	Path string
	ID   uint64 // the folder's inode, by which the kernel identifies the cgroup

	parent *Cgroup
	procs  []*Proc // in the cgroup and below it
}

// NewCgroup creates a cgroup below the root. The cgroup and all below it end with the test.
func NewCgroup(t testing.TB) *Cgroup {
	t.Helper()
	Require(t)
	root, err := cgroupRoot()
	if err != nil {
		t.Fatalf("this test needs cgroups v2: %v", err)
	}
	return newCgroup(t, filepath.Join(root, uniqueName()), nil)
}

// Child creates a cgroup inside c.
func (c *Cgroup) Child(t testing.TB, name string) *Cgroup {
	t.Helper()
	return newCgroup(t, filepath.Join(c.Path, name), c)
}

// NewLimitedCgroup is [NewCgroup] for a cgroup whose memory can be limited. It skips the test where cgroups v2 do not have
// that controller, as where version 1 has it.
func NewLimitedCgroup(t testing.TB) *Cgroup {
	t.Helper()
	Require(t)
	root, err := cgroupRoot()
	if err != nil {
		t.Fatalf("this test needs cgroups v2: %v", err)
	}
	has := func(file string) bool {
		list, err := os.ReadFile(filepath.Join(root, file))
		if err != nil {
			t.Fatal(err)
		}
		return slices.Contains(strings.Fields(string(list)), "memory")
	}
	if !has("cgroup.controllers") {
		t.Skip("cgroups v2 do not limit memory here")
	}
	if control := filepath.Join(root, "cgroup.subtree_control"); !has("cgroup.subtree_control") {
		if err := os.WriteFile(control, []byte("+memory"), 0); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = os.WriteFile(control, []byte("-memory"), 0) })
	}
	return NewCgroup(t)
}

// LimitMemory lets the cgroup use so many bytes more than it uses now; with a negative number there is no limit.
func (c *Cgroup) LimitMemory(t testing.TB, more int) {
	t.Helper()
	write := func(file, limit string) {
		if err := os.WriteFile(filepath.Join(c.Path, file), []byte(limit), 0); err != nil {
			t.Fatal(err)
		}
	}
	limit := "max"
	if more >= 0 {
		// Each CPU has memory in stock that counts as used (memcg_stock, mm/memcontrol.c); this gives it back.
		write("memory.high", "0")
		write("memory.high", "max")
		text, err := os.ReadFile(filepath.Join(c.Path, "memory.current"))
		if err != nil {
			t.Fatal(err)
		}
		now, err := strconv.Atoi(strings.TrimSpace(string(text)))
		if err != nil {
			t.Fatal(err)
		}
		limit = strconv.Itoa(now + more)
	}
	write("memory.max", limit)
}

func newCgroup(t testing.TB, path string, parent *Cgroup) *Cgroup {
	t.Helper()
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	c := &Cgroup{Path: path, parent: parent}
	t.Cleanup(func() { c.Remove(t) })
	var stat unix.Stat_t
	if err := unix.Stat(path, &stat); err != nil {
		t.Fatalf("stat %s: %v", path, err)
	}
	c.ID = stat.Ino
	return c
}

// Remove removes the cgroup and all below it, and kills the helpers in it. Removing it again does nothing.
func (c *Cgroup) Remove(t testing.TB) {
	t.Helper()
	for _, p := range c.procs {
		p.Kill()
	}
	c.procs = nil
	if err := removeCgroup(c.Path); err != nil {
		t.Errorf("remove cgroup: %v", err)
	}
}

// removeCgroup removes the folders from the leaves up. The files in them need no
// removal.
func removeCgroup(path string) error {
	var folders []string
	err := filepath.WalkDir(path, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			folders = append(folders, path)
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for _, folder := range slices.Backward(folders) {
		err := unix.Rmdir(folder)
		// A process that was just killed may still be in it.
		for start := time.Now(); err == unix.EBUSY && time.Since(start) < time.Second; {
			time.Sleep(time.Millisecond)
			err = unix.Rmdir(folder)
		}
		if err != nil && err != unix.ENOENT {
			procs, _ := os.ReadFile(folder + "/cgroup.procs")
			return fmt.Errorf("rmdir %s: %w (processes in it: %v)", folder, err, strings.Fields(string(procs)))
		}
	}
	return nil
}

// StartHelper is [StartHelper] for a process that is in the cgroup from its beginning (Linux 5.7).
func (c *Cgroup) StartHelper(t testing.TB, name string, args ...string) *Proc {
	t.Helper()
	folder, err := os.Open(c.Path)
	if err != nil {
		t.Fatal(err)
	}
	defer folder.Close()
	p := startHelper(t, &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(folder.Fd())}, name, args)
	for in := c; in != nil; in = in.parent {
		in.procs = append(in.procs, p)
	}
	return p
}

// cgroupRoot finds the mount of cgroups v2: systems mount it in different folders.
var cgroupRoot = sync.OnceValues(func() (string, error) {
	mounts, err := procfs.Mounts("/proc/self/mountinfo")
	if err != nil {
		return "", err
	}
	for _, m := range mounts {
		if m.Type == "cgroup2" && m.Root == "/" {
			return m.Point, nil
		}
	}
	return "", errors.New("cgroup2 is not mounted")
})
