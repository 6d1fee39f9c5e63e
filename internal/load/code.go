package load

import (
	"errors"
	"fmt"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/code"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// codeOf returns the code of a program that was loaded with these maps, in a form that
// a dispatcher can include. If a dispatcher cannot, the returned code says why.
func codeOf(p *ebpf.ProgramSpec, maps map[string]*ebpf.Map) *dispatch.Code {
	c, err := linkable(p, maps)
	if err != nil {
		return &dispatch.Code{Name: p.Name, Refused: err.Error()}
	}
	return c
}

func linkable(p *ebpf.ProgramSpec, maps map[string]*ebpf.Map) (*dispatch.Code, error) {
	if !gplCompatible[p.License] {
		return nil, fmt.Errorf("its license %q is not one that the kernel takes for compatible with the GPL, under which a dispatcher is loaded", p.License)
	}
	c := &dispatch.Code{Name: p.Name, Insns: make(asm.Instructions, len(p.Instructions))}
	copy(c.Insns, p.Instructions)
	err := relocate(c.Insns)
	if err != nil {
		return nil, err
	}
	index := map[uint32]int{}
	functions := map[string]bool{}
	for i := range c.Insns {
		ins := &c.Insns[i]
		ref := ins.Reference()
		switch {
		case ins.IsFunctionReference():
			functions[ref] = true
		case ins.IsBuiltinCall() && ins.Constant == int64(asm.FnTailCall):
			return nil, errors.New("it makes tail calls")
		case ins.IsKfuncCall() && ref == "bpf_throw":
			// An exception ends the program whose code throws it, which is the whole
			// dispatcher then (bpf_throw, kernel/bpf/helpers.c; Linux 6.7).
			return nil, errors.New("it can end by an exception (bpf_throw), which would end the whole chain")
		case ins.IsKfuncCall():
			// The kernel wants the number of the function in its own types.
			if ins.Constant, err = kfunc(ref); err != nil {
				return nil, err
			}
			ins.Offset = 0
		case ins.IsLoadFromMap():
			id, err := mapOf(ins, maps)
			if err != nil {
				return nil, err
			}
			if _, known := index[id]; !known {
				index[id] = len(c.Maps)
				c.Maps = append(c.Maps, id)
			}
			// The upper half is the offset of a variable in its map.
			ins.Constant = ins.Constant>>32<<32 | int64(index[id])
		case ins.OpCode.IsDWordLoad() && (ins.Src != asm.R0 || ref != ""):
			return nil, fmt.Errorf("it refers to a symbol of the kernel (%s)", ref)
		}
	}
	functionInfo(c, functions)
	return c, nil
}

// mapOf returns the id of the map that an instruction loads. The map was made for the
// program, or the caller of Spec put the map's descriptor into the instruction.
func mapOf(ins *asm.Instruction, maps map[string]*ebpf.Map) (uint32, error) {
	ref := ins.Reference()
	m := maps[ref]
	fd := int32(ins.Constant)
	if own := ins.Map(); own != nil {
		fd = int32(own.FD())
	}
	if fd > 0 {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
		if err != nil {
			return 0, kernel.Errno(fmt.Sprintf("map with descriptor %d", fd), err)
		}
		if m, err = ebpf.NewMapFromFD(dup); err != nil {
			return 0, kernel.Errno(fmt.Sprintf("map with descriptor %d", fd), err)
		}
		defer m.Close()
	}
	switch {
	case m == nil && ref == "":
		return 0, errors.New("it reads the kernel's configuration (.kconfig)")
	case m == nil:
		return 0, fmt.Errorf("it uses the map %q, which cannot be had again", ref)
	}
	info, err := m.Info()
	if err != nil {
		return 0, kernel.Errno("map "+ref, err)
	}
	id, _ := info.ID()
	return uint32(id), nil
}

// relocate adapts the instructions to the types of this kernel (CO-RE).
func relocate(insns asm.Instructions) error {
	var relos []*btf.CORERelocation
	var at []*asm.Instruction
	for i := range insns {
		if r := btf.CORERelocationMetadata(&insns[i]); r != nil {
			relos, at = append(relos, r), append(at, &insns[i])
		}
	}
	if len(relos) == 0 {
		return nil
	}
	types, err := btf.LoadKernelSpec()
	if err != nil {
		return fmt.Errorf("the kernel's types: %w", err)
	}
	fixups, err := btf.CORERelocate(relos, []*btf.Spec{types}, kernel.ByteOrder, func(btf.Type) (btf.TypeID, error) {
		return 0, errors.New("it refers to its own types by their numbers (bpf_core_type_id_local)")
	})
	if err != nil {
		return err
	}
	for i, f := range fixups {
		if err := f.Apply(at[i]); err != nil {
			return fmt.Errorf("%v: %w", relos[i], err)
		}
	}
	return nil
}

// kfunc returns the number of a kernel function that programs may call.
func kfunc(name string) (int64, error) {
	types, err := btf.LoadKernelSpec()
	if err != nil {
		return 0, fmt.Errorf("the kernel's types: %w", err)
	}
	var fn *btf.Func
	if err := types.TypeByName(name, &fn); err != nil {
		return 0, fmt.Errorf("it calls the kernel function %s, which is in a module or not there: %w", name, err)
	}
	id, err := types.TypeID(fn)
	return int64(id), err
}

// functionInfo gives each function type information if any function has it: the kernel
// wants it for all functions or for none.
func functionInfo(c *dispatch.Code, functions map[string]bool) {
	for i := range c.Insns {
		ins := &c.Insns[i]
		if (i == 0 || functions[ins.Symbol()]) && btf.FuncMetadata(ins) == nil {
			name := ins.Symbol()
			if i == 0 || name == "" {
				name = c.Name
			}
			*ins = btf.WithFuncMetadata(*ins, &btf.Func{Name: name, Type: untyped, Linkage: btf.StaticFunc})
		}
	}
}

var untyped = &btf.FuncProto{Return: code.Int}

// gplCompatible is the kernel's list (license_is_gpl_compatible, include/linux/license.h).
var gplCompatible = map[string]bool{
	"GPL": true, "GPL v2": true, "GPL and additional rights": true,
	"Dual BSD/GPL": true, "Dual MIT/GPL": true, "Dual MPL/GPL": true,
}
