package initramfs

import (
	"bytes"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
)

// An entry is what the kernel would create from one entry of an archive.
type entry struct {
	name    string
	mode    uint64
	links   uint64
	device  string
	content string
}

// unpack reads an archive as the kernel does (init/initramfs.c): fields have eight hexadecimal digits,
// and name and content each begin at a multiple of four.
func unpack(t *testing.T, archive []byte) []entry {
	t.Helper()
	var all []entry
	for at := 0; ; {
		qt.Assert(t, qt.Equals(string(archive[at:at+6]), "070701"))
		field := func(i int) uint64 {
			n, err := strconv.ParseUint(string(archive[at+6+8*i:at+14+8*i]), 16, 32)
			qt.Assert(t, qt.IsNil(err))
			return n
		}
		size, nameSize := int(field(6)), int(field(11))
		name := string(archive[at+110 : at+110+nameSize])
		qt.Assert(t, qt.IsTrue(strings.HasSuffix(name, "\x00")))
		body := at + (110+nameSize+3)&^3
		e := entry{
			name: name[:len(name)-1], mode: field(1), links: field(4),
			device: fmt.Sprint(field(9), ":", field(10)), content: string(archive[body : body+size]),
		}
		at = body + (size+3)&^3
		if e.name == "TRAILER!!!" {
			qt.Check(t, qt.Equals(at, len(archive)))
			return all
		}
		all = append(all, e)
	}
}

func TestArchive(t *testing.T) {
	var b bytes.Buffer
	w := NewWriter(&b)
	qt.Assert(t, qt.IsNil(w.File("/etc/deep/hosts", 0o640, 5, strings.NewReader("hello"))))
	qt.Assert(t, qt.IsNil(w.Folder("/etc", 0o700))) // exists already
	qt.Assert(t, qt.IsNil(w.Folder("/root", 0o700)))
	qt.Assert(t, qt.IsNil(w.Link("/etc/mtab", "/proc/mounts")))
	qt.Assert(t, qt.IsNil(w.CharDevice("/dev/console", 0o600, 5, 1)))
	qt.Assert(t, qt.IsNil(w.File("/empty", 0o755, 0, strings.NewReader(""))))
	qt.Assert(t, qt.IsNil(w.Close()))
	none := "0:0"
	qt.Check(t, qt.CmpEquals(unpack(t, b.Bytes()), []entry{
		{"etc", 0o040755, 2, none, ""},
		{"etc/deep", 0o040755, 2, none, ""},
		{"etc/deep/hosts", 0o100640, 1, none, "hello"},
		{"root", 0o040700, 2, none, ""},
		{"etc/mtab", 0o120777, 1, none, "/proc/mounts"},
		{"dev", 0o040755, 2, none, ""},
		{"dev/console", 0o020600, 1, "5:1", ""},
		{"empty", 0o100755, 1, none, ""},
	}, allFields))
}

func TestArchiveOfAFolder(t *testing.T) {
	dir := t.TempDir()
	qt.Assert(t, qt.IsNil(os.MkdirAll(filepath.Join(dir, "tree/sub"), 0o755)))
	qt.Assert(t, qt.IsNil(os.WriteFile(filepath.Join(dir, "outside"), []byte("far"), 0o644)))
	qt.Assert(t, qt.IsNil(os.WriteFile(filepath.Join(dir, "tree/sub/file"), []byte("near"), 0o755)))
	qt.Assert(t, qt.IsNil(os.Symlink("sub/file", filepath.Join(dir, "tree/link"))))
	qt.Assert(t, qt.IsNil(os.Symlink(filepath.Join(dir, "outside"), filepath.Join(dir, "tree/away"))))

	var b bytes.Buffer
	w := NewWriter(&b)
	qt.Assert(t, qt.IsNil(w.Copy("/opt/x", filepath.Join(dir, "tree"))))
	qt.Assert(t, qt.IsNil(w.Copy("/opt/alone", filepath.Join(dir, "outside"))))
	qt.Assert(t, qt.IsNil(w.Close()))
	none := "0:0"
	qt.Check(t, qt.CmpEquals(unpack(t, b.Bytes()), []entry{
		{"opt", 0o040755, 2, none, ""},
		{"opt/x", 0o040755, 2, none, ""},
		{"opt/x/away", 0o100644, 1, none, "far"},
		{"opt/x/link", 0o120777, 1, none, "sub/file"},
		{"opt/x/sub", 0o040755, 2, none, ""},
		{"opt/x/sub/file", 0o100755, 1, none, "near"},
		{"opt/alone", 0o100644, 1, none, "far"},
	}, allFields))

	qt.Check(t, qt.ErrorIs(NewWriter(&b).Copy("/x", filepath.Join(dir, "missing")), fs.ErrNotExist))
}

type full struct{}

func (full) Write([]byte) (int, error) { return 0, fs.ErrClosed }

func TestArchiveKeepsTheFirstError(t *testing.T) {
	w := NewWriter(full{})
	w.Link("/a", "b")
	qt.Check(t, qt.ErrorIs(w.Close(), fs.ErrClosed))
	// A file that is shorter than announced would shift everything behind it.
	w = NewWriter(new(bytes.Buffer))
	qt.Check(t, qt.IsNotNil(w.File("/short", 0o644, 10, strings.NewReader("five5"))))
}
