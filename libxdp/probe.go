package libxdp

import (
	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Supported returns an error if this kernel cannot have a libxdp chain. It tries
// whether a program can replace a function of a dispatcher that is on no device.
// It leaves nothing behind.
func Supported() error {
	dispatcher, err := newDispatcher(Config{Version: 1, Programs: make([]ProgramConfig, 1)}, 0)
	if err != nil {
		return err
	}
	defer dispatcher.Close()
	const name = "ld_probe"
	stub := stubName(0, 1)
	prog, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: ebpf.Extension, AttachTarget: dispatcher, AttachTo: stub, License: "GPL",
		Instructions: asm.Instructions{
			btf.WithFuncMetadata(asm.Mov.Imm(asm.R0, int32(hook.Pass)), code.Global(name)).WithSymbol(name),
			asm.Return(),
		},
	})
	if err != nil {
		return kernel.Freplace("try it", err)
	}
	defer prog.Close()
	l, err := linkComponent(prog, dispatcher, stub)
	if err != nil {
		return err
	}
	return l.Close()
}
