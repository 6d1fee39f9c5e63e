package libxdp

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// A program that cannot be a component is refused before the kernel is asked.
func TestLoadComponentOfOther(t *testing.T) {
	for _, test := range []struct {
		object, program string
		is              error
		err             string
	}{
		{"several.o", "ldt_third", hook.ErrUsage, `there is no program "ldt_third"`},
		{"several.o", "ldt_tc", hook.ErrIncompatible, `program "ldt_tc" is a SchedCLS program, not an XDP program`},
		{"nobtf.o", "ldt_nobtf", hook.ErrIncompatible, `program "ldt_nobtf" has no type information, .* compile it with clang -g`},
	} {
		spec, err := ebpf.LoadCollectionSpec("../test/testdata/" + test.object)
		qt.Assert(t, qt.IsNil(err))
		_, err = loadComponent(spec, test.program, nil, "prog0", ebpf.CollectionOptions{})
		qt.Check(t, qt.ErrorIs(err, test.is))
		qt.Check(t, qt.ErrorMatches(err, test.err))
	}
}
