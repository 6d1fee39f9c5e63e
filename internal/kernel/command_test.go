package kernel

import (
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
)

// What is printed can be pasted.
func TestCommand(t *testing.T) {
	qt.Check(t, qt.Equals(Command("", "", nil, "recover"), "dispatcher recover"))
	qt.Check(t, qt.Equals(Command("", DefaultBPFFS, nil, "recover"), "dispatcher recover"))
	qt.Check(t, qt.Equals(Command("/proc/7/ns/net", "/run/a b", nil, "detach", "xdp", "eth0", "it's"),
		`dispatcher -n /proc/7/ns/net --bpffs '/run/a b' detach xdp eth0 'it'\''s'`))
	qt.Check(t, qt.Equals(Shell("rm", ""), "rm ''"))
	qt.Check(t, qt.Equals(IPCommand("", "link"), "ip link"))
	qt.Check(t, qt.Equals(IPCommand("a", "link"), "ip -n a link"))
	qt.Check(t, qt.Equals(IPCommand("7", "link"), "nsenter --net=/proc/7/ns/net ip link"))
	there := t.TempDir()
	qt.Check(t, qt.Equals(MountCommand(there), "mount -t bpf -o mode=0700 bpffs "+there))
	missing := filepath.Join(there, "bpf")
	qt.Check(t, qt.Equals(MountCommand(missing), "mkdir "+missing+" && mount -t bpf -o mode=0700 bpffs "+missing))
}

// A shell gives the command the very words, whatever they are, and runs nothing of them; and
// what looks like a flag comes after "--".
func TestCommandPasted(t *testing.T) {
	for _, name := range []string{
		"eth0", "$(touch${IFS}x)", "`touch${IFS}x`", ";touch x;", "*", `q'"q`, "#x", "-rf", "--all", "~", "!!", "a\\b", "é", "",
		"\x1b]0;P\a", "a%s\u202eb", "\xff\xfe", "a\nb", "-\t'", "%d\x01",
	} {
		line := Command("", "-b", Flags{"--name", name}, "adopt", "xdp", name)
		out, err := exec.Command("sh", "-fc", `dispatcher() { for word; do printf '%s\0' "$word"; done; }; `+line).Output()
		qt.Assert(t, qt.IsNil(err), qt.Commentf("%s", line))
		want := []string{"--bpffs", "-b", "adopt", "xdp", name, "--name", name, ""}
		if strings.HasPrefix(name, "-") {
			want = []string{"--bpffs", "-b", "adopt", "--name", name, "--", "xdp", name, ""}
		}
		qt.Check(t, qt.DeepEquals(strings.Split(string(out), "\x00"), want), qt.Commentf("%s", line))
		qt.Check(t, qt.IsFalse(strings.ContainsAny(line, "\n\x1b")), qt.Commentf("%q", line))
	}
	qt.Check(t, qt.Equals(MountCommand("-x"), "mkdir ./-x && mount -t bpf -o mode=0700 bpffs ./-x"))
}
