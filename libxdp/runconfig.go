package libxdp

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/cilium/ebpf/btf"

	"github.com/libdispatcher/dispatcher/hook"
)

// RunConfig reads the settings that a program made for libxdp asks for. They
// are in the section .xdp_run_config, in a variable _<function> with the type
// of a struct of pointers to arrays: the name of a struct member is a setting,
// and the length of its array is the value (XDP_RUN_CONFIG, xdp/xdp_helpers.h
// of libxdp). Settings that the program does not ask for are zero.
//
// The error is hook.ErrUsage when the program asks for an unknown setting or
// value. libxdp's priorities begin at 0; here 0 becomes [hook.MinPriority].
func RunConfig(types *btf.Spec, function string) (hook.Settings, error) {
	var s hook.Settings
	if types == nil {
		return s, nil
	}
	const section = ".xdp_run_config"
	t, err := typeOf(types, section, "_"+function)
	if errors.Is(err, btf.ErrNotFound) {
		return s, nil
	}
	if err != nil {
		return s, hook.Because(hook.ErrUsage, "%s: %w", section, err)
	}
	config, ok := btf.UnderlyingType(t).(*btf.Struct)
	if !ok {
		return s, hook.Because(hook.ErrUsage, "%s: _%s is not a struct", section, function)
	}
	return parseRunConfig(config)
}

// typeOf returns the type of a variable in a section. The error is btf.ErrNotFound when
// there is none.
func typeOf(types *btf.Spec, section, name string) (btf.Type, error) {
	var all *btf.Datasec
	if err := types.TypeByName(section, &all); err != nil {
		return nil, err
	}
	for _, v := range all.Vars {
		if variable, ok := v.Type.(*btf.Var); ok && variable.Name == name {
			return variable.Type, nil
		}
	}
	return nil, btf.ErrNotFound
}

func parseRunConfig(config *btf.Struct) (hook.Settings, error) {
	s := hook.Settings{}
	continueOn := hook.SetOf(hook.Pass)
	for _, m := range config.Members {
		value, err := arrayLength(m.Type)
		if err != nil {
			return s, hook.Because(hook.ErrUsage, ".xdp_run_config: %s: %w", m.Name, err)
		}
		if m.Name == "priority" {
			// Priority 0 becomes 1, the lowest here; no member can run before
			// either.
			s.Priority = max(int(value), hook.MinPriority)
			if err := s.Check(); err != nil {
				return s, hook.Because(hook.ErrUsage, ".xdp_run_config: %w", err)
			}
			continue
		}
		v, err := hook.ParseVerdict(m.Name)
		if err != nil {
			return s, hook.Because(hook.ErrUsage, ".xdp_run_config: %w", err)
		}
		switch value {
		case 0:
			continueOn &^= hook.SetOf(v)
		case 1:
			continueOn |= hook.SetOf(v)
		default:
			return s, hook.Because(hook.ErrUsage, ".xdp_run_config: %s is %d, must be 0 or 1", m.Name, value)
		}
	}
	s.ContinueOn = cmp.Or(continueOn, hook.Never)
	return s, nil
}

// arrayLength returns the length of the array that t points to. BTF encodes
// numbers in this way (__uint, bpf/bpf_helpers.h of libbpf).
func arrayLength(t btf.Type) (uint32, error) {
	if p, ok := btf.UnderlyingType(t).(*btf.Pointer); ok {
		if a, ok := btf.UnderlyingType(p.Target).(*btf.Array); ok {
			return a.Nelems, nil
		}
	}
	return 0, fmt.Errorf("%v is not a pointer to an array", t)
}
