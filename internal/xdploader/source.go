package xdploader

import (
	"errors"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

func (o *object) Name() string            { return o.function }
func (o *object) Settings() hook.Settings { return o.settings }
func (o *object) Close()                  {}

func (o *object) Frags() bool {
	return o.spec != nil && o.spec.Programs[o.function].Flags&unix.BPF_F_XDP_HAS_FRAGS != 0
}

// typed tells whether the program has the type information that it needs to
// replace a function.
func (o *object) typed() bool {
	if o.spec == nil {
		return true
	}
	insns := o.spec.Programs[o.function].Instructions
	return len(insns) > 0 && btf.FuncMetadata(&insns[0]) != nil
}

func (o *object) Load(dispatcher *ebpf.Program, function string) (*ebpf.Program, error) {
	prog, err := o.load(func(p *ebpf.ProgramSpec) {
		p.Type, p.AttachType = ebpf.Extension, ebpf.AttachNone
		p.AttachTarget, p.AttachTo = dispatcher, function
		p.Flags &^= unix.BPF_F_XDP_HAS_FRAGS | unix.BPF_F_XDP_DEV_BOUND_ONLY // they belong to the dispatcher
	})
	o.refused = err
	return prog, err
}

// alone loads the program to be attached without a dispatcher. ifindex is the
// device to offload it to, or 0.
func (o *object) alone(ifindex int) (*ebpf.Program, error) {
	var frags uint32 = unix.BPF_F_XDP_HAS_FRAGS
	fit := func(p *ebpf.ProgramSpec) {
		p.Ifindex = uint32(ifindex)
		p.Flags &= frags | ^uint32(unix.BPF_F_XDP_HAS_FRAGS)
	}
	prog, err := o.load(fit)
	if errors.Is(err, unix.EINVAL) && o.spec != nil && o.spec.Programs[o.function].Flags&frags != 0 {
		// Before Linux 5.18 there is no such flag, and the program works
		// without it.
		frags = 0
		if again, e := o.load(fit); e == nil {
			return again, nil
		}
	}
	return prog, err
}
