package kernel

import (
	"errors"
	"io/fs"
	"testing"

	"github.com/go-quicktest/qt"
	"golang.org/x/sys/unix"
)

// That a process does not find its own files does not mean that what it asked for is gone.
func TestExplainOwnFiles(t *testing.T) {
	for path, gone := range map[string]bool{"/proc/self/fdinfo/9": false, "/proc/thread-self/ns/net": false, "/proc/7/ns/net": true} {
		err := Explain(&fs.PathError{Op: "open", Path: path, Err: unix.ENOENT})
		qt.Check(t, qt.Equals(errors.Is(err, fs.ErrNotExist), gone), qt.Commentf("%s", path))
		qt.Check(t, qt.ErrorMatches(err, "open "+path+": no such file or directory"))
	}
}

// The limit that was reached is named, with its cgroup, and no other.
func TestMemoryLimit(t *testing.T) {
	const reached = "low 0\nhigh 0\nmax 7\noom 0\n"
	for _, test := range []struct {
		about, cgroup string
		files         map[string]string
		want          string
	}{
		{"none", "/a", nil, ""},
		{"no limit", "/a", map[string]string{"/a/memory.max": "max", "/a/memory.events": reached}, ""},
		{"a limit that was not reached", "/a", map[string]string{"/a/memory.max": "4096", "/a/memory.events": "max 0\noom 0\n"}, ""},
		{"its own", "/a/b", map[string]string{
			"/a/b/memory.max": "8192", "/a/b/memory.events": reached, "/a/b/memory.current": "8000", "/a/memory.max": "9999", "/a/memory.events": reached,
		}, "out of memory: cgroup /a/b, in which this process is, uses 8000 of 8192 bytes and has come to that limit 7 times; raise its memory.max"},
		{"that of one around it", "/a/b", map[string]string{
			"/a/b/memory.max": "8192", "/a/b/memory.events": "max 0\n", "/a/memory.max": "9999", "/a/memory.current": "9000", "/a/memory.events": reached,
		}, "out of memory: cgroup /a, in which this process is, uses 9000 of 9999 bytes and has come to that limit 7 times; raise its memory.max"},
		{"the root, which has none", "/", map[string]string{"//memory.max": "1"}, ""},
		{"no cgroup of version 2", "", nil, ""},
	} {
		got := memoryLimit(test.cgroup, func(cgroup, file string) string { return test.files[cgroup+"/"+file] })
		qt.Check(t, qt.Equals(got, test.want), qt.Commentf("%s", test.about))
	}
}
