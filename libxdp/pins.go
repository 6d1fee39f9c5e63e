package libxdp

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// folder is libxdp's folder in a bpffs.
type folder struct{ path string }

// folderIn returns the folder in a bpffs; it need not exist. tc, where it loads programs
// without libbpf, makes it a symbolic link to its own folder (bpf_gen_slave,
// lib/bpf_legacy.c in iproute2), and libxdp follows that. Of another user's link nothing
// good can come: it stays, and is refused.
func folderIn(bpffs string) folder {
	path := filepath.Join(bpffs, "xdp")
	var st unix.Stat_t
	if unix.Lstat(path, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFLNK && (st.Uid == 0 || int(st.Uid) == os.Geteuid()) {
		if to, err := filepath.EvalSymlinks(path); err == nil {
			path = to
		}
	}
	return folder{path}
}

// folderToChange is folderIn for changes, which need the bpffs.
func folderToChange(bpffs string) (folder, error) {
	if err := kernel.FindBPFFS(bpffs); err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			return folder{}, err
		}
		return folder{}, hook.Because(fs.ErrNotExist, "the programs of a chain are pinned, and there is no bpffs at %s", bpffs).
			Hint("%s", kernel.MountHint(bpffs))
	}
	return folderIn(bpffs), nil
}

// of returns the folder of one dispatcher.
func (f folder) of(ifindex int, prog uint32) string {
	return filepath.Join(f.path, folderName(ifindex, prog))
}

// pin fills the folder of a dispatcher, or leaves nothing of it.
func (l *locked) pin(dir string, links []link.Link, progs []*ebpf.Program) (err error) {
	// Existing pins can only belong to an earlier dispatcher with the same id.
	if err := l.unpin(dir); err != nil {
		return err
	}
	kernel.Step("pin: make the folder")
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return kernel.Errno("pin", err)
	}
	defer func() {
		if err != nil {
			err = kernel.Undo(err, l.unpin(dir))
		}
	}()
	for n := range links {
		kernel.Step("pin: link")
		path := filepath.Join(dir, linkPin(n))
		if err := links[n].Pin(path); err != nil {
			return kernel.PathErrno("pin", path, err)
		}
		kernel.Step("pin: program")
		if err := pinProgram(progs[n], filepath.Join(dir, progPin(n))); err != nil {
			return err
		}
	}
	return nil
}

// pinProgram pins a second descriptor of the program: for a program that was
// opened by a pin, cilium/ebpf would move that pin.
func pinProgram(prog *ebpf.Program, path string) error {
	c, err := prog.Clone()
	if err != nil {
		return fmt.Errorf("pin: %w", err)
	}
	defer c.Close()
	return kernel.PathErrno("pin", path, c.Pin(path))
}

// unpin removes the pins of a dispatcher, in libxdp's order, and the folder
// unless it contains other files. Missing pins are not an error.
func (l *locked) unpin(dir string) error {
	for _, path := range pinsIn(dir) {
		kernel.Step("unpin")
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return kernel.Errno("unpin", err)
		}
	}
	kernel.Step("unpin: remove the folder")
	_ = os.Remove(dir)
	return nil
}

// pinsIn returns the pins of a dispatcher that are in its folder.
func pinsIn(dir string) []string {
	paths := []string{}
	for n := range MaxMembers {
		for _, name := range []string{linkPin(n), progPin(n)} {
			path := filepath.Join(dir, name)
			if _, err := os.Lstat(path); err == nil {
				paths = append(paths, path)
			}
		}
	}
	return paths
}

// dispatchers returns the dispatchers that have a folder, by program id and by
// the index of the device that they were made for.
func (f folder) dispatchers() (list []pinned, err error) {
	entries, err := os.ReadDir(f.path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, kernel.Errno("read the folder of libxdp", err)
	}
	for _, e := range entries {
		if index, prog, ok := parseFolder(e.Name()); ok && e.IsDir() {
			list = append(list, pinned{index, prog, filepath.Join(f.path, e.Name())})
		}
	}
	return list, nil
}

// pinned is the folder of a dispatcher.
type pinned struct {
	ifindex int
	prog    uint32
	dir     string
}
