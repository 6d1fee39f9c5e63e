package kernel

import (
	"maps"
	"slices"
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"
)

// Only what the chosen program needs is loaded from a file with many programs: the others may not even load here.
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
		spec, err := ebpf.LoadCollectionSpec("../../test/testdata/" + test.object)
		qt.Assert(t, qt.IsNil(err))
		KeepOnly(spec, test.program)
		qt.Check(t, qt.DeepEquals(slices.Sorted(maps.Keys(spec.Programs)), test.programs), qt.Commentf("%s", test.program))
		qt.Check(t, qt.DeepEquals(slices.Sorted(maps.Keys(spec.Maps)), test.maps), qt.Commentf("%s", test.program))
	}
}
