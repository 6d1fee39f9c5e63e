package watch

import (
	"fmt"

	"github.com/cilium/ebpf/btf"
)

// offsets are the offsets in the kernel's structures that lead from a task to the id of
// an object that the task has open.
type offsets struct{ files, fdt, fd, private, linkID, mapID, mapType int32 }

// kernelOffsets reads the offsets from the kernel's BTF.
func kernelOffsets() (o offsets, err error) {
	spec, err := btf.LoadKernelSpec()
	if err != nil {
		return o, err
	}
	for _, f := range []struct {
		at            *int32
		structure, of string
	}{
		{&o.files, "task_struct", "files"},
		{&o.fdt, "files_struct", "fdt"},
		{&o.fd, "fdtable", "fd"},
		{&o.private, "file", "private_data"},
		{&o.linkID, "bpf_link", "id"},
		{&o.mapID, "bpf_map", "id"},
		{&o.mapType, "bpf_map", "map_type"},
	} {
		var s *btf.Struct
		if err := spec.TypeByName(f.structure, &s); err != nil {
			return o, err
		}
		bits, ok := offsetOf(s.Members, f.of)
		if !ok {
			return o, fmt.Errorf("struct %s has no %s", f.structure, f.of)
		}
		*f.at = int32(bits.Bytes())
	}
	return o, nil
}

// offsetOf returns the offset of a member. It looks into members without a name too.
func offsetOf(members []btf.Member, name string) (btf.Bits, bool) {
	for _, m := range members {
		if m.Name == name {
			return m.Offset, true
		}
		if m.Name != "" {
			continue
		}
		var inner []btf.Member
		switch t := btf.UnderlyingType(m.Type).(type) {
		case *btf.Struct:
			inner = t.Members
		case *btf.Union:
			inner = t.Members
		}
		if at, ok := offsetOf(inner, name); ok {
			return m.Offset + at, true
		}
	}
	return 0, false
}
