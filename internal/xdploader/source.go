package xdploader

import (
	"errors"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// A component is an object on its way into a libxdp chain.
type component struct {
	*object
	refused error // the kernel's refusal to load it
}

var _ libxdp.Source = (*component)(nil)

func (c *component) Name() string            { return c.function }
func (c *component) Settings() hook.Settings { return c.settings }
func (c *component) Close()                  {}

func (c *component) Frags() bool {
	return c.spec != nil && c.spec.Programs[c.function].Flags&unix.BPF_F_XDP_HAS_FRAGS != 0
}

// typed tells whether the program has the type information that it needs to
// replace a function.
func (c *component) typed() bool {
	if c.spec == nil {
		return true
	}
	insns := c.spec.Programs[c.function].Instructions
	return len(insns) > 0 && btf.FuncMetadata(&insns[0]) != nil
}

func (c *component) Load(dispatcher *ebpf.Program, function string) (*ebpf.Program, error) {
	prog, err := c.load(func(p *ebpf.ProgramSpec) {
		p.Type, p.AttachType = ebpf.Extension, ebpf.AttachNone
		p.AttachTarget, p.AttachTo = dispatcher, function
		p.Flags &^= unix.BPF_F_XDP_HAS_FRAGS | unix.BPF_F_XDP_DEV_BOUND_ONLY // they belong to the dispatcher
	})
	c.refused = err
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
