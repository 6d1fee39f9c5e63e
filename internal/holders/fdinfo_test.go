package holders

import (
	"strconv"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

func FuzzFdinfo(f *testing.F) {
	link := "pos:\t0\nflags:\t02000002\nlink_type:\txdp\nlink_id:\t12\nprog_tag:\tff\nprog_id:\t34\n"
	ref, ok := fdinfo(link)
	qt.Assert(f, qt.IsTrue(ok))
	qt.Assert(f, qt.Equals(ref, refTo(hook.HolderLink, 12)))
	for _, text := range []string{link, "map_id: 4294967296\n", "prog_id:", "map_id:\t-1", "pos:\t0\n", ""} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		ref, ok := fdinfo(text)
		if ok && !strings.Contains(text, strconv.FormatUint(uint64(ref.ID), 10)) {
			t.Errorf("%v out of %q", ref, text)
		}
	})
}
