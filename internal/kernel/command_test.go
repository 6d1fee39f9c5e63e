package kernel

import (
	"path/filepath"
	"testing"

	"github.com/go-quicktest/qt"
)

// What is printed can be pasted.
func TestCommand(t *testing.T) {
	qt.Check(t, qt.Equals(Command("", "", "recover"), "dispatcher recover"))
	qt.Check(t, qt.Equals(Command("", DefaultBPFFS, "recover"), "dispatcher recover"))
	qt.Check(t, qt.Equals(Command("/proc/7/ns/net", "/run/a b", "detach", "xdp", "eth0", "it's"),
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
