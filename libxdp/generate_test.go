package libxdp

import (
	"fmt"
	"strings"
	"testing"

	"github.com/cilium/ebpf/asm"
	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// Golden files show a reviewer each change of the generated code.
func TestGenerate(t *testing.T) {
	pass := ProgramConfig{Actions: 1 << hook.Pass}
	some := ProgramConfig{Actions: 1<<hook.Pass | 1<<hook.Aborted | 1<<hook.TX | 1<<notAttached}
	for name, test := range map[string]struct {
		programs []ProgramConfig
		want     string
	}{
		"one": {[]ProgramConfig{pass}, `
			xdp_dispatcher:
			Call -1 <prog0>
			JNE32Imm dst: r0 off: -1 imm: 31 <exit>
			pass:
			MovImm dst: r0 imm: 2
			exit:
			Exit
			prog0: stub`},
		"two": {[]ProgramConfig{pass, pass}, `
			xdp_dispatcher:
			MovReg dst: r6 src: r1
			Call -1 <prog0>
			JEq32Imm dst: r0 off: -1 imm: 2 <next_0>
			JNE32Imm dst: r0 off: -1 imm: 31 <exit>
			next_0:
			MovReg dst: r1 src: r6
			Call -1 <prog1>
			JNE32Imm dst: r0 off: -1 imm: 31 <exit>
			pass:
			MovImm dst: r0 imm: 2
			exit:
			Exit
			prog0: stub prog1: stub`},
		"never, and several": {[]ProgramConfig{{}, some, some}, `
			xdp_dispatcher:
			MovReg dst: r6 src: r1
			Call -1 <prog0>
			JNE32Imm dst: r0 off: -1 imm: 31 <exit>
			next_0:
			MovReg dst: r1 src: r6
			Call -1 <prog1>
			JEq32Imm dst: r0 off: -1 imm: 2 <next_1>
			JEq32Imm dst: r0 off: -1 imm: 0 <next_1>
			JEq32Imm dst: r0 off: -1 imm: 3 <next_1>
			JNE32Imm dst: r0 off: -1 imm: 31 <exit>
			next_1:
			MovReg dst: r1 src: r6
			Call -1 <prog2>
			JEq32Imm dst: r0 off: -1 imm: 0 <pass>
			JEq32Imm dst: r0 off: -1 imm: 3 <pass>
			JNE32Imm dst: r0 off: -1 imm: 31 <exit>
			pass:
			MovImm dst: r0 imm: 2
			exit:
			Exit
			prog0: stub prog1: stub prog2: stub`},
	} {
		got := listing(generate(test.programs, stubBody))
		stub := "MovImm dst: r2 imm: 0 Call FnXdpAdjustTail MovImm dst: r0 imm: 31 Exit"
		want := strings.ReplaceAll(strings.Join(strings.Fields(test.want), " "), "stub", stub)
		qt.Check(t, qt.Equals(got, want), qt.Commentf("%s", name))
	}
}

func listing(insns asm.Instructions) string {
	var words []string
	for _, ins := range insns {
		if label := ins.Symbol(); label != "" {
			words = append(words, label+":")
		}
		words = append(words, fmt.Sprintf("%v", ins))
	}
	return strings.Join(words, " ")
}
