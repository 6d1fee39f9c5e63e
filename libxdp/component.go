package libxdp

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/code"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// linkComponent replaces a stub by a component for as long as the link lives.
// prog may replace another dispatcher's stub at the same time, so that a new
// chain is complete before it takes over from the old one.
func linkComponent(prog, dispatcher *ebpf.Program, stub string) (link.Link, error) {
	l, err := link.AttachFreplace(dispatcher, stub, prog)
	if errors.Is(err, btf.ErrNotFound) {
		return nil, hook.Because(ErrNotDispatcher, "the dispatcher has no function %s", stub)
	}
	if err != nil {
		return nil, kernel.Freplace("put program in the place of "+stub, err)
	}
	return l, nil
}

// wrapComponent loads a component that runs callee, a loaded XDP program: it
// tail-calls callee through a slot. When the slot's last descriptor or pin goes
// the kernel empties the slot, and the chain goes on as if the component were
// not there. So the slot must be pinned with the component.
//
// It needs Linux 6.1 or so, and a callee that was loaded without an expected
// attach type: an extension has none, and the two must agree. Most programs are
// loaded with BPF_XDP. For those, and before Linux 6.1, the error is
// hook.ErrIncompatible.
func wrapComponent(callee, dispatcher *ebpf.Program, stub string) (wrapper *ebpf.Program, slot *ebpf.Map, err error) {
	name, err := functionName(callee)
	if err != nil {
		return nil, nil, err
	}
	// The kernel does not tell whether a program was loaded with frags, but the
	// wrapper must agree with it. The dispatcher's frags do not matter.
	for _, flags := range []uint32{0, hasFrags} {
		wrapper, slot, err = wrap(name, callee, dispatcher, stub, flags)
		if err == nil || !errors.Is(err, unix.EINVAL) {
			return wrapper, slot, err
		}
	}
	return nil, nil, hook.Because(hook.ErrIncompatible,
		"program %q is loaded already, and the kernel lets a libxdp chain run only programs that were loaded for it, or without an expected attach type (since Linux 6.1); attach it from its object file: %w", name, err)
}

func wrap(name string, callee, dispatcher *ebpf.Program, stub string, flags uint32) (*ebpf.Program, *ebpf.Map, error) {
	slot, err := ebpf.NewMap(&ebpf.MapSpec{Name: "ld_slot", Type: ebpf.ProgramArray, KeySize: 4, ValueSize: 4, MaxEntries: 1})
	if err != nil {
		return nil, nil, kernel.Errno("create slot", err)
	}
	// As if it were not attached; a single component has no chain that could go
	// on.
	missing := int32(notAttached)
	if stub == mainFunction {
		missing = int32(hook.Pass)
	}
	wrapper, err := ebpf.NewProgram(&ebpf.ProgramSpec{
		Name: name, Type: ebpf.Extension, AttachTarget: dispatcher, AttachTo: stub, Flags: flags, License: "GPL",
		Instructions: asm.Instructions{
			btf.WithFuncMetadata(asm.LoadMapPtr(asm.R2, slot.FD()), code.Global(name)).WithSymbol(name),
			asm.Mov.Imm(asm.R3, 0),
			asm.FnTailCall.Call(),
			asm.Mov.Imm(asm.R0, missing),
			asm.Return(),
		},
	})
	if err != nil {
		slot.Close()
		return nil, nil, loadError(name, err)
	}
	if err := slot.Put(uint32(0), uint32(callee.FD())); err != nil {
		wrapper.Close()
		slot.Close()
		return nil, nil, kernel.Errno("fill slot", err)
	}
	return wrapper, slot, nil
}

func loadError(name string, err error) error {
	what := fmt.Sprintf("load program %q as a component of libxdp's dispatcher", name)
	var ve *ebpf.VerifierError
	if errors.As(err, &ve) && len(ve.Log) > 0 {
		return hook.Because(hook.ErrIncompatible, "%s: %w", what, err)
	}
	return kernel.Freplace(what, err)
}
