package libxdp

import (
	"io/fs"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// A program that cannot be a component is refused before the kernel is asked.
func TestFromSpecOfOther(t *testing.T) {
	for _, test := range []struct {
		object, program string
		is              error
		err             string
	}{
		{"several.o", "ldt_third", fs.ErrNotExist, `there is no program "ldt_third" in the collection`},
		{"several.o", "ldt_tc", hook.ErrIncompatible, `program "ldt_tc" is of type SchedCLS, not XDP`},
		{"nobtf.o", "ldt_nobtf", hook.ErrIncompatible, `program "ldt_nobtf" has no type information, .* compile it with clang -g`},
	} {
		spec, err := ebpf.LoadCollectionSpec("../test/testdata/" + test.object)
		qt.Assert(t, qt.IsNil(err))
		_, err = FromSpec(spec, test.program, ebpf.CollectionOptions{})
		qt.Check(t, qt.ErrorIs(err, test.is))
		qt.Check(t, qt.ErrorMatches(err, test.err))
	}
}
