package holders

import (
	"os"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/procfs"
)

// A search opens what a look needs. What cannot be opened is left out, unless this
// process can open no more: then anything may hold the objects, and the look fails.
type search struct{ err error }

// ok tells whether an attempt to open something succeeded.
func (s *search) ok(err error) bool {
	if s.err == nil && procfs.Exhausted(err) {
		s.err = kernel.Errno("look for holders", err)
	}
	return err == nil
}

func (s *search) open(dir int, path string, flags int) (fd int, ok bool) {
	fd, err := unix.Openat(dir, path, flags|unix.O_CLOEXEC, 0)
	return fd, s.ok(err)
}

// read returns a file's text; empty if it cannot be read.
func (s *search) read(path string) string {
	text, err := os.ReadFile(path)
	s.ok(err)
	return string(text)
}

// info reads the beginning of an object's bpf_*_info.
func info[T any](s *search, ref hook.HolderRef) (info T, ok bool) {
	fd, err := openID(ref)
	if !s.ok(err) {
		return info, false
	}
	defer unix.Close(fd)
	return info, kernel.ObjectInfo(fd, &info) == nil
}
