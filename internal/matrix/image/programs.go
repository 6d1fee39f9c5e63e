package image

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"

	"github.com/libdispatcher/dispatcher/internal/matrix/debian"
	"github.com/libdispatcher/dispatcher/internal/matrix/initramfs"
)

// programsSuite is the release from which all machines get their programs.
const programsSuite = "trixie"

// programs are the machines' programs, by package.
var programs = map[string][]string{
	"busybox-static": {"busybox"},
	"dash":           {"dash"}, // busybox's shell would run its own ip, mount, ... instead of the other packages' programs
	"iproute2":       {"ip", "tc", "ss"},
	"bpftool":        {"bpftool"},
	"mount":          {"mount", "umount"},
	"util-linux":     {"nsenter", "unshare", "setpriv"},
}

var packageOrder = []string{"busybox-static", "dash", "iproute2", "bpftool", "mount", "util-linux"}

// programFolders are the folders in which packages have programs.
var programFolders = []string{"usr/bin", "usr/sbin", "bin", "sbin"}

// Programs makes an archive with the programs and their libraries.
func (m *Maker) Programs(ctx context.Context) (archive string, err error) {
	recipe := fmt.Sprint("1 ", programsSuite, programs)
	dir, err := m.Cache.Get(ctx, "programs", recipe, func(dir string) error {
		return m.suite(ctx, programsSuite, func(s *debian.Suite) error { return m.makePrograms(ctx, s, dir) })
	})
	if err != nil {
		return "", fmt.Errorf("programs for the machine: %w", err)
	}
	return filepath.Join(dir, "programs.cpio"), nil
}

func (m *Maker) makePrograms(ctx context.Context, s *debian.Suite, dir string) error {
	root := filepath.Join(dir, "root")
	defer os.RemoveAll(root)
	if err := m.unpack(ctx, s, root, packageOrder...); err != nil {
		return err
	}
	return writeArchive(filepath.Join(dir, "programs.cpio"), func(w *initramfs.Writer) error {
		for _, folder := range []string{"/bin", "/sbin", "/usr/bin", "/usr/sbin", "/root", "/etc", "/var", "/mnt", "/proc", "/sys", "/dev"} {
			if err := w.Folder(folder, 0o755); err != nil {
				return err
			}
		}
		if err := w.CharDevice("/dev/console", 0o600, 5, 1); err != nil {
			return err
		}
		files := map[string]string{
			"/etc/passwd": "root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/bin/false\n",
			"/etc/group":  "root:x:0:\nnogroup:x:65534:\n",
			"/etc/hosts":  "127.0.0.1 localhost matrix\n::1 localhost\n",
		}
		for name, content := range files {
			if err := w.File(name, 0o644, int64(len(content)), strings.NewReader(content)); err != nil {
				return err
			}
		}
		for link, target := range map[string]string{"/var/run": "/run", "/bin/sh": "/usr/bin/dash"} {
			if err := w.Link(link, target); err != nil {
				return err
			}
		}
		written := map[string]bool{}
		for _, pkg := range packageOrder {
			for _, name := range programs[pkg] {
				if err := putProgram(w, root, name, written); err != nil {
					return err
				}
			}
		}
		return nil
	})
}

// putProgram writes a program and its libraries to their usual paths.
func putProgram(w *initramfs.Writer, root, name string, written map[string]bool) error {
	program, err := findProgram(root, name)
	if err != nil {
		return err
	}
	if err := w.Copy("/usr/bin/"+name, program); err != nil {
		return err
	}
	libraries, interpreter, err := initramfs.Libraries(root, program)
	if err != nil {
		return err
	}
	for _, library := range libraries {
		if !written[library] {
			written[library] = true
			if err := w.Copy("/usr/lib/x86_64-linux-gnu/"+path.Base(library), library); err != nil {
				return err
			}
		}
	}
	if interpreter == "" || written[interpreter] {
		return nil
	}
	written[interpreter] = true
	file, err := findInterpreter(root, interpreter)
	if err != nil {
		return err
	}
	return w.Copy(interpreter, file)
}

// unpack unpacks programs and libraries of the packages below root, with the libraries that they
// need.
func (m *Maker) unpack(ctx context.Context, s *debian.Suite, root string, packages ...string) error {
	all, err := s.WithLibraries(ctx, packages...)
	if err != nil {
		return err
	}
	debs, err := s.Fetch(ctx, all...)
	if err != nil {
		return err
	}
	for _, deb := range debs {
		err := debian.ReadPackage(ctx, deb, func(h *tar.Header, r io.Reader) error {
			if !within(h.Name, []string{"usr/bin/", "usr/sbin/", "bin/", "sbin/", "usr/lib", "lib"}) {
				return nil
			}
			to := filepath.Join(root, h.Name)
			switch h.Typeflag {
			case tar.TypeReg:
				return save(to, r, 0o755)
			case tar.TypeSymlink:
				if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
					return err
				}
				os.Remove(to)
				return os.Symlink(h.Linkname, to)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// findProgram finds the file of a program. It does not follow links that lead out of root: the program
// that they mean is in another folder.
func findProgram(root, name string) (string, error) {
	for _, folder := range programFolders {
		file := filepath.Join(root, folder, name)
		info, err := os.Lstat(file)
		if err == nil && info.Mode().IsRegular() {
			return file, nil
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return "", err
		}
	}
	return "", fmt.Errorf("program %s: %w", name, fs.ErrNotExist)
}

// findInterpreter finds the file of ld.so. The name that programs use for it may be a link.
func findInterpreter(root, interpreter string) (string, error) {
	name := path.Base(interpreter)
	for _, folder := range []string{"usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib64", "lib64"} {
		file := filepath.Join(root, folder, name)
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s: %w", interpreter, fs.ErrNotExist)
}
