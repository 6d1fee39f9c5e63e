package load

import (
	"fmt"
	"maps"
	"slices"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/typed"
)

// setGlobals sets variables to values that are given as text.
func setGlobals(spec *ebpf.CollectionSpec, values map[string]string) error {
	for name, text := range values {
		v := spec.Variables[name]
		if v == nil {
			return hook.Because(hook.ErrUsage, "there is no global %q in the file (it has: %s)", name, list(slices.Sorted(maps.Keys(spec.Variables))))
		}
		if v.Type == nil {
			return hook.Because(hook.ErrUsage, "global %q has no type: compile the file with -g", name)
		}
		b, err := typed.Encode(v.Type.Type, text)
		if err == nil && len(b) != int(v.Size()) {
			err = fmt.Errorf("it has %d bytes, the value %d", v.Size(), len(b))
		}
		if err != nil {
			return hook.Because(hook.ErrUsage, "global %q: %w", name, err)
		}
		if err := v.Set(b); err != nil {
			return hook.Because(hook.ErrUsage, "global %q: %w", name, err)
		}
	}
	return nil
}
