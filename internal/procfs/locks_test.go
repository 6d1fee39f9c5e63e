package procfs

import (
	"slices"
	"testing"

	"github.com/go-quicktest/qt"
)

func TestParseLocks(t *testing.T) {
	const text = `1: FLOCK  ADVISORY  WRITE 812 00:2a:77 0 EOF
1: -> FLOCK  ADVISORY  WRITE 813 00:2a:77 0 EOF
1:  -> FLOCK  ADVISORY  WRITE 814 00:2a:77 0 EOF
2: POSIX  ADVISORY  WRITE 900 00:2a:77 0 EOF
3: FLOCK  ADVISORY  WRITE 815 00:2a:770 0 EOF
4: LEASE  ACTIVE    READ
5: FLOCK  ADVISORY  WRITE -1 00:2a:78 0 EOF
`
	qt.Check(t, qt.DeepEquals(parseLocks(text, "00:2a:77"), Lock{812, []int{813, 814}}))
	qt.Check(t, qt.DeepEquals(parseLocks(text, "00:2a:770"), Lock{Holder: 815}))
	qt.Check(t, qt.DeepEquals(parseLocks(text, "00:2a:78"), Lock{}))
	qt.Check(t, qt.DeepEquals(parseLocks("", "00:2a:77"), Lock{}))
}

func FuzzParseLocks(f *testing.F) {
	f.Add("1: FLOCK  ADVISORY  WRITE 812 00:2a:77 0 EOF\n1: -> FLOCK  ADVISORY  WRITE 813 00:2a:77 0 EOF\n")
	f.Add("1: POSIX  ADVISORY  READ -1 00:2a:77 0 EOF\n")
	f.Fuzz(func(t *testing.T, text string) {
		l := parseLocks(text, "00:2a:77")
		if l.Holder < 0 || slices.ContainsFunc(l.Waiting, func(pid int) bool { return pid <= 0 }) {
			t.Errorf("no process has such a number: %+v out of %q", l, text)
		}
	})
}
