package dispatch_test

import (
	"strings"
	"testing"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
)

// freplace takes global functions only, and none of a program without types. So
// none of the functions is global, but for members that are linked as functions.
func TestNothingToReplace(t *testing.T) {
	for name, slots := range plans {
		for _, insns := range []asm.Instructions{
			dispatch.Link(slots, nil, false), dispatch.Watched(dispatch.Link(slots, nil, false)), dispatch.Counting(slots),
		} {
			qt.Check(t, qt.HasLen(globals(insns), 0), qt.Commentf("%s", name))
			qt.Check(t, qt.Equals(btf.FuncMetadata(&insns[0]).Type.(*btf.FuncProto).Params[0].Name, "ctx"))
		}
	}
	member := func(name string) *dispatch.Code {
		return &dispatch.Code{Name: name, Insns: asm.Instructions{
			btf.WithFuncMetadata(asm.Mov.Imm(asm.R0, 2), code.Global(name)), asm.Return(),
		}}
	}
	slots, codes := []hook.Settings{plain, plain, plain}, []*dispatch.Code{member("ldt_a"), nil, member("ldt_b")}
	qt.Check(t, qt.HasLen(globals(dispatch.Link(slots, codes, true)), 0))
	qt.Check(t, qt.Equals(strings.Join(globals(dispatch.Link(slots, codes, false)), " "), "ldt_a ldt_b"))

	for _, name := range []string{dispatch.StandInFirst, dispatch.StandInSecond, dispatch.StandInAway} {
		for _, ins := range dispatch.StandIn(name) {
			qt.Check(t, qt.IsNil(btf.FuncMetadata(&ins)), qt.Commentf("%s", name))
		}
	}
}

// globals are the names of the global functions.
func globals(insns asm.Instructions) (names []string) {
	for i := range insns {
		if fn := btf.FuncMetadata(&insns[i]); fn != nil && fn.Linkage == btf.GlobalFunc {
			names = append(names, fn.Name)
		}
	}
	return names
}
