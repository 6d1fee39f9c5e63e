// Package initramfs makes the archives that a kernel boots into: files, programs with the libraries
// that they need, and kernel modules in load order.
package initramfs

import (
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
)

// A Writer writes a cpio archive in the format "newc", which the kernel unpacks. Archives may follow
// one another; a later file replaces an earlier one.
type Writer struct {
	w       io.Writer
	inode   int
	folders map[string]bool
	err     error
}

// NewWriter begins an archive.
func NewWriter(w io.Writer) *Writer {
	return &Writer{w: w, folders: map[string]bool{"/": true}}
}

const (
	typeFolder = 0o040000
	typeFile   = 0o100000
	typeLink   = 0o120000
	typeChar   = 0o020000
)

// Folder creates a folder and the folders above it.
func (w *Writer) Folder(name string, perm fs.FileMode) error {
	name = path.Clean("/" + name)
	if w.folders[name] {
		return w.err
	}
	w.parents(name)
	w.folders[name] = true
	w.header(name, typeFolder|uint32(perm.Perm()), 0, 0, 0)
	return w.err
}

// File writes a file of the given size.
func (w *Writer) File(name string, perm fs.FileMode, size int64, content io.Reader) error {
	name = path.Clean("/" + name)
	w.parents(name)
	if size >= 1<<32 {
		return fmt.Errorf("%s: %d bytes are too many for a cpio archive", name, size)
	}
	w.header(name, typeFile|uint32(perm.Perm()), size, 0, 0)
	if w.err == nil {
		_, w.err = io.CopyN(w.w, content, size)
	}
	w.pad(size)
	return w.err
}

// Link creates a symbolic link.
func (w *Writer) Link(name, target string) error {
	name = path.Clean("/" + name)
	w.parents(name)
	w.header(name, typeLink|0o777, int64(len(target)), 0, 0)
	w.write([]byte(target))
	w.pad(int64(len(target)))
	return w.err
}

// CharDevice creates a character device.
func (w *Writer) CharDevice(name string, perm fs.FileMode, major, minor int) error {
	name = path.Clean("/" + name)
	w.parents(name)
	w.header(name, typeChar|uint32(perm.Perm()), 0, major, minor)
	return w.err
}

// Copy copies a file, a link or a whole folder of this machine into the archive. It follows links to
// files outside the folder.
func (w *Writer) Copy(name, from string) error {
	info, err := os.Stat(from)
	if err != nil {
		return err
	}
	if !info.IsDir() {
		return w.copyFile(name, from, info)
	}
	return filepath.WalkDir(from, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(from, p)
		if err != nil {
			return err
		}
		to := path.Join(name, filepath.ToSlash(rel))
		if d.Type()&fs.ModeSymlink != 0 {
			target, err := os.Readlink(p)
			if err != nil {
				return err
			}
			if !filepath.IsAbs(target) {
				return w.Link(to, target)
			}
		}
		info, err := os.Stat(p)
		if err != nil {
			return err
		}
		if info.IsDir() {
			return w.Folder(to, info.Mode())
		}
		return w.copyFile(to, p, info)
	})
}

func (w *Writer) copyFile(name, from string, info fs.FileInfo) error {
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is neither a file nor a folder", from)
	}
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	return w.File(name, info.Mode(), info.Size(), f)
}

// Close writes the end of the archive.
func (w *Writer) Close() error {
	w.inode = 0
	w.entry("TRAILER!!!", 0, 0, 0, 0)
	return w.err
}

func (w *Writer) parents(name string) {
	for dir := path.Dir(name); !w.folders[dir]; dir = path.Dir(name) {
		top := dir
		for !w.folders[path.Dir(top)] {
			top = path.Dir(top)
		}
		w.folders[top] = true
		w.header(top, typeFolder|0o755, 0, 0, 0)
	}
}

func (w *Writer) header(name string, mode uint32, size int64, major, minor int) {
	w.inode++
	w.entry(name[1:], mode, size, major, minor)
}

func (w *Writer) entry(name string, mode uint32, size int64, major, minor int) {
	links := 1
	if mode&0o170000 == typeFolder {
		links = 2
	}
	// magic, inode, mode, uid, gid, links, mtime, size, device of the file (2), device (2), length of the name, checksum
	header := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		w.inode, mode, 0, 0, links, 0, size, 0, 0, major, minor, len(name)+1, 0, name)
	w.write([]byte(header))
	w.pad(int64(len(header)))
}

func (w *Writer) pad(n int64) {
	w.write(make([]byte, -n&3))
}

func (w *Writer) write(b []byte) {
	if w.err == nil {
		_, w.err = w.w.Write(b)
	}
}
