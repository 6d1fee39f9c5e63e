package kernel

import (
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"
)

// How long a bpffs lasts is told by who has it mounted.
func TestLifeOf(t *testing.T) {
	dev := unix.Mkdev(16, 0)
	file := func(name, text string) string {
		path := filepath.Join(t.TempDir(), name)
		qt.Assert(t, qt.IsNil(os.WriteFile(path, []byte(text), 0o600)))
		return path
	}
	const other = "1 2 16:1 / /sys/fs/bpf rw - bpf bpf rw\n"
	mounted := func(tags string) string { return file("own", "1 2 16:0 / /sys/fs/bpf rw "+tags+"- bpf bpf rw\n") }
	for _, test := range []struct {
		own, machine string
		want         Life
	}{
		{mounted(""), mounted(""), Lasting},
		{mounted(""), file("machine", other), Private},
		{mounted("master:7 "), file("machine", other), Private},
		{mounted(""), filepath.Join(t.TempDir(), "missing"), Unknown},
		{mounted(""), "", Unknown},
		{mounted("shared:7 "), "", Unknown},
		{mounted("master:7 "), "", Lasting},
		{file("both", "1 2 16:0 / /a rw shared:7 - bpf bpf rw\n1 2 16:0 / /b rw master:7 - bpf bpf rw\n"), "", Unknown},
	} {
		qt.Check(t, qt.Equals(lifeOf(dev, test.own, test.machine), test.want), qt.Commentf("%+v", test))
	}
}

// A bpffs that is mounted in a mount namespace of its own does not last, and one that the
// first process has does.
func TestLifeOfMount(t *testing.T) {
	dir := t.TempDir()
	done := make(chan Life)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with its namespace
		defer close(done)
		if unix.Unshare(unix.CLONE_NEWNS) != nil || unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") != nil ||
			unix.Mount("bpf", dir, "bpf", 0, "mode=0700") != nil {
			return
		}
		done <- LifeOf(dir)
	}()
	life, ok := <-done
	qt.Assert(t, qt.IsTrue(ok))
	qt.Check(t, qt.Not(qt.Equals(life, Lasting)))
}
