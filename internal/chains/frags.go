package chains

import (
	"errors"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// FragsSupported loads a program for packets in fragments (xdp.frags). It returns nil
// if the kernel takes it, else the reason.
func FragsSupported() error {
	return kernel.Explain(state.Loads(dispatch.Shape{AttachType: ebpf.AttachXDP, Frags: true}, nil, nil, nil))
}

// withoutFrags replaces the error of a failed load by ErrNotSupported if the reason is
// that this kernel knows no packets in fragments.
func withoutFrags(src load.Source, err error) error {
	if !errors.Is(err, unix.EINVAL) {
		return err
	}
	_, what, failed := load.Describe(src)
	if failed != nil || what.Loaded || !what.Shape.Frags || FragsSupported() == nil {
		return err
	}
	return hook.Because(ebpf.ErrNotSupported, "program %q is for packets in fragments, which needs Linux 5.18: %w", what.Name, unix.EINVAL).
		Hint("load it from SEC(\"xdp\")")
}
