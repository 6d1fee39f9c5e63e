package kernel

import (
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/go-quicktest/qt"
)

func TestMounts(t *testing.T) {
	path := filepath.Join(t.TempDir(), "mountinfo")
	qt.Assert(t, qt.IsNil(os.WriteFile(path, []byte(`22 27 0:21 / /proc rw,relatime - proc proc rw
36 35 98:0 /a\040b /mnt\134\011x rw shared:1 master:2 - ext4 /dev/vda rw
4 4 0:4 net:[4026532] /tmp/a\0 rw - nsfs nsfs
what is this
`), 0o600)))
	list, err := mounts(path)
	qt.Assert(t, qt.IsNil(err))
	want := []mount{
		{"/", "/proc", "proc"},
		{"/a b", "/mnt\\\tx", "ext4"},
		{"net:[4026532]", `/tmp/a\0`, "nsfs"},
	}
	qt.Assert(t, qt.IsTrue(slices.Equal(list, want)), qt.Commentf("%q", list))
}

// OpenNetNS takes a number for a process id.
func TestNetNSSpec(t *testing.T) {
	for name, want := range map[string]string{"blue": "blue", "42": "/run/netns/42", "4b": "4b"} {
		qt.Check(t, qt.Equals(netnsSpec(name), want))
	}
}

func TestNetInode(t *testing.T) {
	ino, ok := netInode("net:[4026531840]")
	qt.Assert(t, qt.IsTrue(ok))
	qt.Assert(t, qt.Equals(ino, uint64(4026531840)))
	for _, s := range []string{"mnt:[1]", "net:[x]", "/a", ""} {
		_, ok := netInode(s)
		qt.Check(t, qt.IsFalse(ok), qt.Commentf("%q", s))
	}
}
