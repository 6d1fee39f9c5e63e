package libxdp

import (
	"maps"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

func TestKeepOnly(t *testing.T) {
	for _, test := range []struct {
		object, program string
		programs, maps  []string
	}{
		{"several.o", "ldt_second", []string{"ldt_second"}, nil},
		{"filter.o", "ldt_filter", []string{"ldt_filter"}, []string{".bss", ".data", ".rodata", "ldt_dropped"}},
		{"tailcall.o", "ldt_entry", []string{"ldt_entry", "ldt_tail"}, []string{"ldt_jumps"}},
		{"tailcall.o", "ldt_tail", []string{"ldt_tail"}, nil},
		{"mapinmap.o", "ldt_nested", []string{"ldt_nested"}, []string{"ldt_inner", "ldt_outer"}},
	} {
		spec, err := ebpf.LoadCollectionSpec("../testdata/" + test.object)
		qt.Assert(t, qt.IsNil(err))
		keepOnly(spec, test.program)
		qt.Check(t, qt.DeepEquals(slices.Sorted(maps.Keys(spec.Programs)), test.programs), qt.Commentf("%s", test.program))
		qt.Check(t, qt.DeepEquals(slices.Sorted(maps.Keys(spec.Maps)), test.maps), qt.Commentf("%s", test.program))
	}
}

// What cannot be a component is refused before the kernel is asked.
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
		spec, err := ebpf.LoadCollectionSpec("../testdata/" + test.object)
		qt.Assert(t, qt.IsNil(err))
		_, err = loadComponent(spec, test.program, nil, "prog0", ebpf.CollectionOptions{})
		qt.Check(t, qt.ErrorIs(err, test.is))
		qt.Check(t, qt.ErrorMatches(err, test.err))
	}
}
