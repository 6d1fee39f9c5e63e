package libxdp

import (
	"fmt"
	"testing"

	"github.com/go-quicktest/qt"
)

func TestNames(t *testing.T) {
	qt.Check(t, qt.Equals(stubName(0, 1), "xdp_dispatcher"))
	qt.Check(t, qt.Equals(stubName(0, 2), "prog0"))
	qt.Check(t, qt.Equals(stubName(9, 10), "prog9"))
	qt.Check(t, qt.Equals(linkPin(0), "prog0-link"))
	qt.Check(t, qt.Equals(progPin(9), "prog9-prog"))
	qt.Check(t, qt.Equals(folderName(7, 4294967295), "dispatch-7-4294967295"))
}

// A folder belongs to a dispatcher only when its name is exactly libxdp's.
// Other folders must not be removed.
func TestParseFolder(t *testing.T) {
	ifindex, prog, ok := parseFolder("dispatch-7-4294967295")
	qt.Check(t, qt.IsTrue(ok))
	qt.Check(t, qt.Equals(ifindex, 7))
	qt.Check(t, qt.Equals(prog, 4294967295))
	for _, name := range []string{
		"", "dispatch", "dispatch-", "dispatch-1", "dispatch-1-", "dispatch--1", "dispatch-0-1", "dispatch-1-0", "dispatch-01-1",
		"dispatch-1-01", "dispatch-+1-1", "dispatch- 1-1", "dispatch-1-1 ", "dispatch-1-1x", "dispatch-1-1-1", "xdispatch-1-1",
		"dispatch-1-4294967296", "dispatch-2147483648-1", "dispatch-1--1", "dispatch-1-1\n", "Dispatch-1-1", "dispatch-0x1-1",
	} {
		ifindex, prog, ok := parseFolder(name)
		qt.Check(t, qt.IsFalse(ok), qt.Commentf("%q", name))
		qt.Check(t, qt.Equals(fmt.Sprint(ifindex, prog), "0 0"), qt.Commentf("%q", name))
	}
}

func FuzzParseFolder(f *testing.F) {
	for _, name := range []string{"dispatch-1-1", "dispatch-2147483647-4294967295", "dispatch-1-01", "dispatch-1", "prog0-link"} {
		f.Add(name)
	}
	f.Fuzz(func(t *testing.T, name string) {
		ifindex, prog, ok := parseFolder(name)
		if ok && folderName(ifindex, prog) != name {
			t.Errorf("%q is taken for %q", name, folderName(ifindex, prog))
		}
		if ok && (ifindex <= 0 || prog == 0) {
			t.Errorf("%q: %d, %d", name, ifindex, prog)
		}
	})
}
