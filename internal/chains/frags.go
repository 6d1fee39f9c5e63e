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

// tryFrags tells whether programs for packets in fragments can be loaded.
func FragsSupported() error {
	return kernel.Explain(state.Loads(dispatch.Shape{AttachType: ebpf.AttachXDP, Frags: true}, nil, nil, nil))
}

// withoutFrags explains why a program could not be loaded, if that is because
// this kernel knows no packets in fragments.
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
