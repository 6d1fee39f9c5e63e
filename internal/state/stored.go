package state

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"io"

	"github.com/cilium/ebpf/asm"
	"github.com/cilium/ebpf/btf"

	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// stored is what is kept of a code, as gzipped JSON. Code of another version is not read.
type stored struct {
	Version int
	Name    string
	Refused string   `json:",omitempty"`
	Maps    []uint32 `json:",omitempty"`
	Insns   []byte   `json:",omitempty"` // as BPF_PROG_LOAD takes them
	BTF     []byte   `json:",omitempty"`
	Funcs   []byte   `json:",omitempty"` // struct bpf_func_info, linux/bpf.h
	Lines   []byte   `json:",omitempty"` // struct bpf_line_info
}

const (
	codeVersion = 1
	// maxCode bounds the unpacked size, in bytes. A program has at most a million
	// instructions, which with their lines and types take about 50 bytes each.
	maxCode = 64 << 20
)

// marshalCode returns the code in the form that is kept.
func marshalCode(c *dispatch.Code) ([]byte, error) {
	s := stored{Version: codeVersion, Name: c.Name, Refused: c.Refused, Maps: c.Maps}
	if len(c.Insns) > 0 {
		insns := make(asm.Instructions, len(c.Insns))
		copy(insns, c.Insns)
		builder, err := btf.NewBuilder(nil, nil)
		if err != nil {
			return nil, err
		}
		if s.Funcs, s.Lines, err = btf.MarshalExtInfos(insns, builder); err != nil {
			return nil, fmt.Errorf("functions and lines: %w", err)
		}
		if s.BTF, err = builder.Marshal(nil, nil); err != nil {
			return nil, fmt.Errorf("types: %w", err)
		}
		var raw bytes.Buffer
		if err := insns.Marshal(&raw, kernel.ByteOrder); err != nil {
			return nil, err
		}
		s.Insns = raw.Bytes()
	}
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	if err := json.NewEncoder(z).Encode(s); err != nil {
		return nil, err
	}
	if err := z.Close(); err != nil {
		return nil, err
	}
	return b.Bytes(), nil
}

// unmarshalCode reads what marshalCode wrote.
func unmarshalCode(b []byte) (*dispatch.Code, error) {
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return nil, err
	}
	var s stored
	if err := json.NewDecoder(io.LimitReader(z, maxCode)).Decode(&s); err != nil {
		return nil, err
	}
	switch {
	case s.Version != codeVersion:
		return nil, fmt.Errorf("object code of version %d, this program knows %d", s.Version, codeVersion)
	case s.Refused == "" && (len(s.Insns) == 0 || len(s.Insns)%asm.InstructionSize != 0):
		return nil, fmt.Errorf("%d bytes are not instructions", len(s.Insns))
	}
	c := &dispatch.Code{Name: s.Name, Refused: s.Refused, Maps: s.Maps}
	if s.Refused != "" {
		return c, nil
	}
	if c.Insns, err = asm.AppendInstructions(nil, bytes.NewReader(s.Insns), kernel.ByteOrder, "linux"); err != nil {
		return nil, err
	}
	for i := range c.Insns {
		if ins := &c.Insns[i]; ins.IsLoadFromMap() && int(uint32(ins.Constant)) >= len(s.Maps) {
			return nil, fmt.Errorf("instruction %d: there is no map %d", i, uint32(ins.Constant))
		}
	}
	return c, annotate(c, s)
}

const (
	funcInfoSize = 8  // struct bpf_func_info
	lineInfoSize = 16 // struct bpf_line_info
)

// annotate adds functions and lines to the instructions.
func annotate(c *dispatch.Code, s stored) (err error) {
	// The library's readers of types are not made for hostile input.
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("damaged types: %v", r)
		}
	}()
	if len(s.Funcs)%funcInfoSize != 0 || len(s.Lines)%lineInfoSize != 0 {
		return errors.New("damaged functions or lines")
	}
	if len(s.Funcs) == 0 && len(s.Lines) == 0 {
		return nil
	}
	spec, err := btf.LoadSpecFromReader(bytes.NewReader(s.BTF))
	if err != nil {
		return fmt.Errorf("types: %w", err)
	}
	funcs, err := btf.LoadFuncInfos(bytes.NewReader(s.Funcs), kernel.ByteOrder, uint32(len(s.Funcs)/funcInfoSize), spec)
	if err != nil {
		return fmt.Errorf("functions: %w", err)
	}
	lines, err := btf.LoadLineInfos(bytes.NewReader(s.Lines), kernel.ByteOrder, uint32(len(s.Lines)/lineInfoSize), spec)
	if err != nil {
		return fmt.Errorf("lines: %w", err)
	}
	iter := c.Insns.Iterate()
	for iter.Next() {
		for len(funcs) > 0 && funcs[0].Offset == iter.Offset {
			*iter.Ins = btf.WithFuncMetadata(*iter.Ins, funcs[0].Func)
			funcs = funcs[1:]
		}
		for len(lines) > 0 && lines[0].Offset == iter.Offset {
			*iter.Ins = iter.Ins.WithSource(lines[0].Line)
			lines = lines[1:]
		}
	}
	if len(funcs) > 0 || len(lines) > 0 {
		return errors.New("functions or lines without an instruction")
	}
	return nil
}
