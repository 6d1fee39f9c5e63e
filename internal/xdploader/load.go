package xdploader

import (
	"context"
	"errors"
	"fmt"
	"syscall"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/libxdp"
)

func (t *tool) load(ctx context.Context, v *values) error {
	switch {
	case v.has("section") && v.has("prog-name"):
		t.warn("Only one of --section or --prog-name can be set")
		return errFailed
	case len(v.files) > 1 && v.mode == hook.ModeOffload:
		t.warn("Cannot attach multiple programs in HW mode")
		return errFailed
	}
	t.debug("Loading %d files on interface '%s'.", len(v.files), v.device)
	var objects []*object
	for i, path := range v.files {
		o, err := t.openObject(path, v)
		if err != nil {
			return err
		}
		t.debug("XDP program %d: Run prio: %d. Chain call actions: %s", i, o.settings.Priority, actions(o.settings.ContinueOn))
		objects = append(objects, o)
	}
	err := t.attach(ctx, v, objects)
	if err != nil && number(err) == int(unix.EPERM) && t.liftMemlock() {
		err = t.attach(ctx, v, objects)
	}
	if err == nil {
		return nil
	}
	switch code := number(err); {
	case code == int(unix.EOPNOTSUPP) && v.mode == hook.ModeNative:
		t.warn("Attaching XDP program in native mode not supported - try SKB mode.")
	case code == int(unix.EOPNOTSUPP) && v.mode == hook.ModeOffload:
		t.warn("Attaching XDP program in HW mode not supported - try native or SKB mode.")
	default:
		t.warn("Couldn't attach XDP program on iface '%s': %s(%d)", v.device, message(code), -code)
	}
	t.detail(err)
	return err
}

// attach attaches the programs to the device: in a libxdp chain or, if that
// does not work or is not wanted, one program alone.
func (t *tool) attach(ctx context.Context, v *values, objects []*object) error {
	o, err := t.readOccupant(ctx, v.index)
	if err != nil {
		// xdp-loader ignores a chain that it cannot read, and then gets the
		// kernel's refusal.
		code := t.occupied(v)
		t.attachRefused(v.index, int(code))
		return failed(code, err)
	}
	defer o.close()
	if v.mode == hook.ModeOffload && o.offload != nil {
		t.libWarn("XDP program already loaded in HW mode on ifindex %d; replacing HW mode programs not supported", v.index)
		return failed(unix.EEXIST, nil)
	}
	if v.mode == hook.ModeOffload || len(objects) == 1 && t.getenv("LIBXDP_SKIP_DISPATCHER") == "1" {
		return t.attachAlone(v, objects[0], o)
	}
	if err := t.joinable(o, len(objects)); err != nil {
		return err
	}
	err = t.chained(ctx, v, objects)
	if !errors.Is(err, errNoChains) {
		return err
	}
	if len(objects) > 1 {
		t.libWarn("Can't fall back to legacy load with %d programs\n%s\n", len(objects), noChains)
		return failed(unix.EOPNOTSUPP, err)
	}
	t.libInfo("Falling back to loading single prog without dispatcher")
	return t.attachAlone(v, objects[0], o)
}

// noChains is libxdp's message for a kernel without BPF_PROG_TYPE_EXT.
const noChains = `This means that the kernel does not support the features needed
by the multiprog dispatcher, either because it is too old entirely,
or because it is not yet supported on the current architecture.`

// errNoChains: this kernel cannot have a dispatcher of libxdp.
var errNoChains = errors.New("the kernel does not replace functions of programs")

// joinable returns an error unless the device's chain can take more programs.
func (t *tool) joinable(o *occupant, more int) error {
	there := 0
	if o.chain != nil {
		there = len(o.chain.Members)
	}
	if there+more > libxdp.MaxMembers {
		t.libWarn("Not enough free slots in the dispatcher.")
		return failed(unix.E2BIG, nil)
	}
	if !o.free() && (o.chain == nil || !kernel.IsBPFFS(t.bpffs())) {
		t.libWarn("Existing program is not using a dispatcher, can't replace; unload first")
		if o.owned != nil {
			t.noteOwner(o, fmt.Sprintf(`"%s" adds a program to it`, kernel.Command("", "", nil, "attach", "xdp", o.device.Name, "FILE")))
		}
		return failed(unix.EBUSY, nil)
	}
	return nil
}

// chained adds the programs to the chain on the device, or starts a chain.
func (t *tool) chained(ctx context.Context, v *values, objects []*object) error {
	if !t.haveBPFFS() {
		t.libWarn("Can't use dispatcher without a working bpffs")
		return errNoChains
	}
	if err := libxdp.Supported(); err != nil {
		t.libInfo("Compatibility check for dispatcher program failed: %s", words(err))
		return fmt.Errorf("%w: %w", errNoChains, err)
	}
	var sources []libxdp.Source
	for _, o := range objects {
		if !o.typed() {
			t.libWarn("Program %s has no BTF information, so we can't load it as multiprog", o.function)
			return errNoChains
		}
		o.refused = nil
		sources = append(sources, o)
	}
	_, _, err := t.handle(v.device).AttachAll(ctx, sources, libxdp.AttachOptions{Mode: v.mode, Start: true})
	if err == nil {
		return nil
	}
	for _, o := range objects {
		if o.refused != nil {
			if number(o.refused) == int(unix.E2BIG) {
				return fmt.Errorf("%w: %w", errNoChains, o.refused)
			}
			return o.refused
		}
	}
	switch {
	case errors.Is(err, hook.ErrChanged), errors.Is(err, hook.ErrIncompatible):
		// The chain may also be in another mode, which xdp-loader treats as a
		// race.
		t.libWarn("Retried more than %d times, giving up", maxTries+1)
		return failed(unix.EBUSY, err)
	case errors.Is(err, hook.ErrBusy):
		t.libWarn("Existing program is not using a dispatcher, can't replace; unload first")
		return failed(unix.EBUSY, err)
	case errors.Is(err, hook.ErrChainFull):
		t.libWarn("Not enough free slots in the dispatcher.")
		return failed(unix.E2BIG, err)
	}
	t.attachRefused(v.index, number(err))
	return err
}

// attachRefused prints libxdp's message with -v when a device refuses a
// program.
func (t *tool) attachRefused(index, code int) {
	t.libInfo("Error attaching XDP program to ifindex %d: %s", index, message(code))
	switch syscall.Errno(code) {
	case unix.EBUSY, unix.EEXIST:
		t.libInfo("XDP already loaded on device")
	case unix.EOPNOTSUPP:
		t.libInfo("XDP mode not supported; try using SKB mode")
	}
}

// attachAlone attaches one program without a dispatcher, if the device is free.
func (t *tool) attachAlone(v *values, obj *object, o *occupant) error {
	ifindex := 0
	if v.mode == hook.ModeOffload {
		ifindex = v.index
	}
	prog, err := obj.alone(ifindex)
	if err != nil {
		return err
	}
	defer prog.Close()
	err = replaceProgram(v.index, prog, nil, v.mode)
	if err == nil {
		return nil
	}
	code := number(err)
	if code == int(unix.EEXIST) {
		code = int(t.occupied(v))
	}
	t.attachRefused(v.index, code)
	if o.owned != nil {
		t.noteOwner(o, fmt.Sprintf(`"%s" adds the program to it`, kernel.Command("", "", nil, append([]string{"attach", "xdp", v.device}, v.files...)...)))
	}
	return failed(syscall.Errno(code), err)
}

// occupied returns the kernel's refusal for an attempt to attach to a device
// that has a program: EBUSY, or EEXIST when that program is in another mode
// (dev_xdp_attach, net/core/dev.c).
func (t *tool) occupied(v *values) syscall.Errno {
	kind := unix.EBUSY
	_ = dial(func(conn *rtnl.Conn) error {
		d, err := conn.DeviceByIndex(v.index)
		if err != nil {
			return err
		}
		if on, ok := d.Software(); ok && v.mode != hook.ModeAuto && on.Mode != v.mode {
			kind = unix.EEXIST
		}
		return nil
	})
	return kind
}

// replaceProgram replaces the program old on a device by next. Either may be
// nil for no program.
func replaceProgram(index int, next, old *ebpf.Program, mode hook.Mode) error {
	fd := func(p *ebpf.Program) int {
		if p == nil {
			return -1
		}
		return p.FD()
	}
	return dial(func(conn *rtnl.Conn) error { return conn.ReplaceXDP(index, fd(next), fd(old), mode) })
}

// dial runs fn with a connection to the thread's namespace.
func dial(fn func(*rtnl.Conn) error) error {
	conn, err := rtnl.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	return fn(conn)
}
