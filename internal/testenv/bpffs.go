package testenv

import (
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BPFFS mounts an empty bpffs and returns its path. The mount and all pins in it end with the test. A
// mount that is still in use then is an error.
func BPFFS(t testing.TB) string {
	t.Helper()
	Require(t)
	path, err := os.MkdirTemp("", uniqueName()+"-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := removeBPFFS(path); err != nil {
			t.Error(err)
		}
	})
	if err := unix.Mount("bpf", path, "bpf", 0, "mode=0700"); err != nil {
		t.Fatalf("mount bpffs on %s: %v", path, err)
	}
	return path
}

func removeBPFFS(path string) error {
	err := unix.Unmount(path, 0)
	// A process that was just killed may still hold it.
	for try := 0; err == unix.EBUSY && try < 20; try++ {
		time.Sleep(10 * time.Millisecond)
		err = unix.Unmount(path, 0)
	}
	switch err {
	case nil, unix.EINVAL, unix.ENOENT: // EINVAL: not mounted, because the test unmounted it
		return os.RemoveAll(path)
	}
	unix.Unmount(path, unix.MNT_DETACH)
	os.Remove(path)
	return fmt.Errorf("bpffs %s is still in use, detached it: %w", path, err)
}
