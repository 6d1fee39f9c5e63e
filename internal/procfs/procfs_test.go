package procfs

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
)

func TestParseMounts(t *testing.T) {
	text := `22 27 0:20 / /sys/fs/bpf rw,relatime shared:8 - bpf bpf rw,mode=700
36 35 8:1 /a\040b /mnt\134\011x rw master:1 propagate_from:2 - ext4 /dev/sda1 rw
50 35 0:4 mnt:[4026532177] /run/ns\0 rw - nsfs nsfs rw
60 35 0:5 / /a` + "\r\f\v\u0085\u00a0\u2003" + `b rw - bpf bpf rw
61 35 0:6 / /only/type rw - tmpfs
nonsense
1 2 x:y / / rw - tmpfs t rw
1 2 0:7 / / rw
1 2 0:7 / / rw -
1 2 0:7 / - tmpfs t rw
`
	want := []Mount{
		{20, "/", "/sys/fs/bpf", "bpf", "8", ""},
		{0x801, "/a b", "/mnt\\\tx", "ext4", "", "1"},
		{4, "mnt:[4026532177]", `/run/ns\0`, "nsfs", "", ""},
		{5, "/", "/a\r\f\v\u0085\u00a0\u2003b", "bpf", "", ""},
		{6, "/", "/only/type", "tmpfs", "", ""},
	}
	got := ParseMounts(text)
	qt.Assert(t, qt.IsTrue(slices.Equal(got, want)), qt.Commentf("%q", got))
}

// escape does what the kernel does to a path (mangle_path, fs/seq_file.c).
var escape = strings.NewReplacer(" ", `\040`, "\t", `\011`, "\n", `\012`, `\`, `\134`)

// Whatever paths are mounted, and whatever stands in the lines before, a mount is
// read as it is.
func FuzzParseMounts(f *testing.F) {
	f.Add("/", "/sys/fs/bpf", "22 27 0:21 / /proc rw,relatime shared:1 - proc proc rw")
	f.Add("/a - b", "/x\f\u00a0y\\040\n", " - \\1")
	f.Fuzz(func(t *testing.T, root, point, before string) {
		all := ParseMounts(before + "\n1 2 8:1 " + escape.Replace(root) + " " + escape.Replace(point) + " rw shared:1 - bpf bpf rw\n")
		qt.Assert(t, qt.IsTrue(len(all) > 0 && len(all) <= strings.Count(before, "\n")+2))
		qt.Check(t, qt.Equals(all[len(all)-1], Mount{0x801, root, point, "bpf", "1", ""}))
	})
}

func TestTasks(t *testing.T) {
	qt.Check(t, qt.DeepEquals(tasksOf(7, []int{5, 7, 9}), []Task{{7, 7}, {7, 5}, {7, 9}}))
	qt.Check(t, qt.Equals(Task{7, 7}.Dir(), "/proc/7"))
	qt.Check(t, qt.Equals(Task{7, 5}.Dir(), "/proc/7/task/5"))

	all, err := Tasks()
	qt.Assert(t, qt.IsNil(err))
	own := Task{os.Getpid(), os.Getpid()}
	qt.Check(t, qt.SliceContains(all, own))
	living := Living(all)
	qt.Check(t, qt.SliceContains(living, own))
	qt.Check(t, qt.Equals(len(slices.CompactFunc(living, func(a, b Task) bool { return a.PID == b.PID })), len(living)))
}

func TestNamespaceInode(t *testing.T) {
	qt.Check(t, qt.Equals(NamespaceInode("net:[4026531840]", "net"), 4026531840))
	for _, s := range []string{"mnt:[1]", "net:[x]", "/a", ""} {
		qt.Check(t, qt.Equals(NamespaceInode(s, "net"), 0), qt.Commentf("%q", s))
	}
	qt.Check(t, qt.Not(qt.Equals(Namespace("/proc/self", "mnt"), 0)))
	qt.Check(t, qt.Equals(Namespace("/proc/self", "no such kind"), 0))
}
