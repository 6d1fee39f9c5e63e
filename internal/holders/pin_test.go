package holders_test

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// onePin returns the only holder, which must be a pin.
func onePin(t *testing.T, h *hook.Holders) hook.HolderPin {
	t.Helper()
	qt.Check(t, qt.HasLen(h.Processes, 0))
	qt.Assert(t, qt.HasLen(h.Pins, 1))
	return h.Pins[0]
}

// reachable checks that the path leads to the pin.
func reachable(t *testing.T, pin hook.HolderPin) {
	t.Helper()
	ino, err := inode(pin.Path)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(ino, pin.Inode))
}

// Several names and mounts of one inode are one pin.
func TestPin(t *testing.T) {
	testenv.CheckLeaks(t)
	p := newHolder(t)
	bpffs, other := testenv.BPFFS(t), t.TempDir()
	ref := newLink(t, func(ref hook.HolderRef) {
		p.do("mkdir %s/sub", bpffs)
		p.do("pin link %d %s/sub/one", ref.ID, bpffs)
		p.do("link %s/sub/one %s/two", bpffs, bpffs)
		p.do("pin link %d %s/three", ref.ID, bpffs)
		p.do("bind %s/sub %s", bpffs, other)
	})
	defer p.do("umount %s", other)
	h := complete(t, ref)
	qt.Check(t, qt.Equals(h.Counted, 2))
	qt.Assert(t, qt.HasLen(h.Pins, 2))
	pin := h.Pins[0]
	qt.Check(t, qt.DeepEquals(pin.Names, []string{"/sub/one", "/two"}))
	qt.Check(t, qt.Equals(pin.Path, bpffs+"/sub/one"))
	qt.Assert(t, qt.HasLen(pin.Mounts, 2))
	qt.Check(t, qt.Equals(pin.Mounts[0].Point, bpffs))
	qt.Check(t, qt.Equals(pin.Mounts[1].Path, other))
	qt.Check(t, qt.DeepEquals(h.Pins[1].Names, []string{"/three"}))
	qt.Check(t, qt.HasLen(h.Pins[1].Mounts, 1))
	reachable(t, pin)
}

// Only a part of the bpffs is mounted.
func TestPinInPart(t *testing.T) {
	testenv.CheckLeaks(t)
	p := isolated(t)
	dir := t.TempDir()
	part, single := dir+"/part", dir+"/single"
	ref := newLink(t, func(ref hook.HolderRef) {
		p.do("mkdir %s/all", dir)
		p.do("mkdir %s", part)
		p.do("touch %s", single)
		p.do("bpffs %s/all", dir)
		p.do("mkdir %s/all/a/b", dir)
		p.do("pin link %d %s/all/a/b/one", ref.ID, dir)
		p.do("pin link %d %s/all/two", ref.ID, dir)
		p.do("bind %s/all/a %s", dir, part)
		p.do("bind %s/all/two %s", dir, single)
		p.do("umount %s/all", dir)
	})
	h := complete(t, ref)
	qt.Assert(t, qt.HasLen(h.Pins, 2))
	root := fmt.Sprintf("/proc/%d/root", p.Pid)
	qt.Check(t, qt.DeepEquals(h.Pins[0].Names, []string{"/a/b/one"}))
	qt.Check(t, qt.Equals(h.Pins[0].Path, root+part+"/b/one"))
	qt.Check(t, qt.DeepEquals(h.Pins[1].Names, []string{"/two"}))
	qt.Check(t, qt.Equals(h.Pins[1].Path, root+single))
	reachable(t, h.Pins[0])
	reachable(t, h.Pins[1])
}

// The path has white space that mountinfo does not escape.
func TestPinElsewhere(t *testing.T) {
	testenv.CheckLeaks(t)
	p := isolated(t)
	dir := t.TempDir() + "/a\r\f\v\u0085\u00a0\u2003b"
	ref := newLink(t, func(ref hook.HolderRef) {
		p.do("mkdir %s", dir)
		p.do("bpffs %s", dir)
		p.do("pin link %d %s/one", ref.ID, dir)
	})
	pin := onePin(t, complete(t, ref))
	qt.Check(t, qt.Equals(pin.Path, fmt.Sprintf("/proc/%d/root%s/one", p.Pid, dir)))
	qt.Assert(t, qt.HasLen(pin.Mounts, 1))
	qt.Check(t, qt.Equals(pin.Mounts[0].NS, mountNS(t, p.Pid)))
	qt.Check(t, qt.Equals(pin.Mounts[0].Point, dir))
	reachable(t, pin)
}

// The bpffs is mounted nowhere, but a process is in it.
func TestPinUnmounted(t *testing.T) {
	for name, hold := range map[string]string{"working directory": "chdir", "descriptor": "path"} {
		t.Run(name, func(t *testing.T) {
			testenv.CheckLeaks(t)
			p := isolated(t)
			dir := t.TempDir()
			ref := newLink(t, func(ref hook.HolderRef) {
				p.do("bpffs %s", dir)
				p.do("mkdir %s/a/b", dir)
				p.do("pin link %d %s/one", ref.ID, dir)
				p.Send(fmt.Sprintf("%s %s/a/b", hold, dir))
				p.Expect(t, "done")
				p.do("umount %s", dir)
			})
			pin := onePin(t, complete(t, ref))
			qt.Check(t, qt.DeepEquals(pin.Names, []string{"/one"}))
			qt.Assert(t, qt.HasLen(pin.Mounts, 1))
			qt.Check(t, qt.Equals(pin.Mounts[0].NS, 0))
			reachable(t, pin)
		})
	}
}

// A pin was removed while a process has a descriptor of its file.
func TestPinRemoved(t *testing.T) {
	testenv.CheckLeaks(t)
	p := newHolder(t)
	bpffs := testenv.BPFFS(t)
	ref := newLink(t, func(ref hook.HolderRef) {
		p.do("pin link %d %s/one", ref.ID, bpffs)
		p.ask("path %s/one", bpffs)
		p.do("remove %s/one", bpffs)
	})
	pin := onePin(t, complete(t, ref))
	qt.Check(t, qt.HasLen(pin.Names, 0))
	reachable(t, pin)
	p.Kill()
}

// No process is in the mount namespace. A descriptor keeps it, or a mount in another
// namespace.
func TestPinInEmptyNamespace(t *testing.T) {
	for _, kept := range []string{"descriptor", "mount"} {
		t.Run(kept, func(t *testing.T) {
			testenv.CheckLeaks(t)
			p := isolated(t)
			dir := t.TempDir()
			ref := newLink(t, func(ref hook.HolderRef) {
				p.do("bpffs %s", dir)
				p.do("pin link %d %s/one", ref.ID, dir)
			})
			ns := mountNS(t, p.Pid)
			file := fmt.Sprintf("/proc/%d/ns/mnt", p.Pid)
			var enter string
			if kept == "mount" {
				enter = filepath.Join(t.TempDir(), "ns")
				qt.Assert(t, qt.IsNil(os.WriteFile(enter, nil, 0o600)))
				qt.Assert(t, qt.IsNil(unix.Mount(file, enter, "", unix.MS_BIND, "")))
				defer unix.Unmount(enter, unix.MNT_DETACH)
			} else {
				keeper := newHolder(t)
				enter = fmt.Sprintf("/proc/%d/fd/%d", keeper.Pid, keeper.ask("namespace %s", file))
			}
			p.Kill()

			pin := onePin(t, complete(t, ref))
			qt.Check(t, qt.Equals(pin.Path, ""))
			qt.Check(t, qt.DeepEquals(pin.Names, []string{"/one"}))
			qt.Assert(t, qt.HasLen(pin.Mounts, 1))
			qt.Check(t, qt.Equals(pin.Mounts[0].NS, ns))
			qt.Check(t, qt.Equals(pin.Mounts[0].Point, dir))
			qt.Check(t, qt.Equals(pin.Mounts[0].Enter, enter))
		})
	}
}

// A bpffs that another mount covers cannot be read.
func TestPinHidden(t *testing.T) {
	testenv.CheckLeaks(t)
	p := isolated(t)
	dir := t.TempDir()
	ref := newLink(t, func(ref hook.HolderRef) {
		p.do("bpffs %s", dir)
		p.do("pin link %d %s/one", ref.ID, dir)
		p.do("tmpfs %s", dir)
	})
	h := look(t, ref)
	qt.Check(t, qt.Equals(h.Found, 0))
	qt.Check(t, qt.StringContains(h.Missing, fmt.Sprintf("a pin in the bpffs at %s in mount namespace %d", dir, mountNS(t, p.Pid))))
}

func mountNS(t testing.TB, pid int) (inode uint64) {
	t.Helper()
	target, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	qt.Assert(t, qt.IsNil(err))
	_, err = fmt.Sscanf(target, "mnt:[%d]", &inode)
	qt.Assert(t, qt.IsNil(err))
	return inode
}
