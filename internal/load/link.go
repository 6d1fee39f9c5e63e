package load

import (
	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// fragsConstant is the constant that tells a program whether packets may be in several
// buffers. A program that has it can have frags.
const fragsConstant = "ld_frags"

// declareFrags gives the programs with the constant the flag that SEC("xdp.frags") gives.
func declareFrags(spec *ebpf.CollectionSpec) {
	if spec.Variables[fragsConstant] == nil {
		return
	}
	for _, p := range spec.Programs {
		if p.Type == ebpf.XDP {
			p.Flags |= unix.BPF_F_XDP_HAS_FRAGS
		}
	}
}

// linkHeader is the constant that tells a program how long the header is that packets on
// its device have in front of the IP header.
const linkHeader = "ld_link_header"

// setLinkHeader sets the constant of a program that has it, unless the caller has set it.
func (s Spec) setLinkHeader(spec *ebpf.CollectionSpec, want Want) error {
	if _, set := s.Options.Globals[linkHeader]; set || spec.Variables[linkHeader] == nil || want.Begins == nil {
		return nil
	}
	begins, err := want.Begins()
	switch {
	case err != nil:
		return err
	case begins == hook.BeginsOther:
		return hook.Because(hook.ErrIncompatible, "packets on the device begin with %v, and the program reads no other", begins)
	case begins == hook.BeginsIP:
		return setGlobals(spec, map[string]string{linkHeader: "0"})
	}
	return setGlobals(spec, map[string]string{linkHeader: "14"})
}
