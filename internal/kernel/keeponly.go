package kernel

import (
	"maps"

	"github.com/cilium/ebpf"
)

// KeepOnly drops from a collection what the program does not use, so that the
// kernel loads nothing, and refuses nothing, that was not asked for. It keeps what
// the initial values of maps refer to: programs for tail calls, and inner maps.
func KeepOnly(spec *ebpf.CollectionSpec, name string) {
	programs, used := map[string]bool{}, map[string]bool{}
	var useMap func(name string)
	useProgram := func(name string) {
		if programs[name] || spec.Programs[name] == nil {
			return
		}
		programs[name] = true
		for _, ins := range spec.Programs[name].Instructions {
			useMap(ins.Reference())
		}
	}
	useMap = func(name string) {
		m := spec.Maps[name]
		if used[name] || m == nil {
			return
		}
		used[name] = true
		for _, kv := range m.Contents {
			switch value, _ := kv.Value.(string); m.Type {
			case ebpf.ProgramArray:
				useProgram(value)
			case ebpf.ArrayOfMaps, ebpf.HashOfMaps:
				useMap(value)
			}
		}
	}
	useProgram(name)
	maps.DeleteFunc(spec.Programs, func(n string, _ *ebpf.ProgramSpec) bool { return !programs[n] })
	maps.DeleteFunc(spec.Maps, func(n string, _ *ebpf.MapSpec) bool { return !used[n] })
	maps.DeleteFunc(spec.Variables, func(_ string, v *ebpf.VariableSpec) bool { return !used[v.SectionName] })
}
