package state_test

import (
	"testing"

	"github.com/cilium/ebpf"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// A program for an entry of a map is recognized, and fits no slot.
func TestEntryType(t *testing.T) {
	testenv.CheckLeaks(t)
	for attach, want := range map[ebpf.AttachType]ebpf.AttachType{
		ebpf.AttachNone:      ebpf.AttachNone,
		ebpf.AttachXDP:       ebpf.AttachNone,
		ebpf.AttachXDPDevMap: ebpf.AttachXDPDevMap,
		ebpf.AttachXDPCPUMap: ebpf.AttachXDPCPUMap,
	} {
		prog := testenv.VerdictProgram(t, "ldt_typed", testenv.XDPPass, testenv.ExpectedAttachType(attach))
		qt.Check(t, qt.Equals(state.EntryType(prog), want), qt.Commentf("%v", attach))
		_, err := state.ShapeOf(prog)
		if want == ebpf.AttachNone {
			qt.Check(t, qt.IsNil(err))
		} else {
			qt.Check(t, qt.ErrorMatches(err, `it was loaded for a map entry \(`+attach.String()+`\).*`))
		}
	}
}
