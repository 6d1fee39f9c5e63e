package xdploader

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/libxdp"
)

func (t *tool) unload(ctx context.Context, v *values) error {
	switch {
	case !v.has("all") && v.id == 0:
		t.warn("Need prog ID or --all")
		return errFailed
	case v.index == 0:
		t.warn("Must specify ifname")
		return errFailed
	}
	o, err := t.readOccupant(ctx, v.index)
	if err != nil || o.free() {
		t.warn("No XDP program loaded on %s", v.device)
		t.detail(err)
		return errFailed
	}
	defer o.close()
	if v.has("all") {
		err = t.detachAll(ctx, o)
	} else {
		err = t.detachID(ctx, o, v.id)
	}
	switch {
	case errors.Is(err, errNotThere):
		t.warn("Program with ID %d not loaded on %s", v.id, v.device)
		return errFailed
	case err != nil:
		t.warn("Unable to detach XDP program: %s", words(err))
		t.detail(err)
		return errFailed
	}
	return nil
}

var errNotThere = errors.New("no such program on the device")

func (t *tool) detachAll(ctx context.Context, o *occupant) error {
	if o.offload != nil {
		if err := replaceProgram(o.device.Index, nil, o.offload, hook.ModeOffload); err != nil {
			return err
		}
	}
	if o.prog == nil {
		return nil
	}
	return t.detachMain(ctx, o)
}

func (t *tool) detachID(ctx context.Context, o *occupant, id uint32) error {
	switch {
	case o.chain != nil: // the dispatcher's own id does not count
		if slices.ContainsFunc(o.chain.Members, func(m libxdp.Member) bool { return m.Program.ID == id }) {
			t.detaching(o, id)
			return t.detachMember(ctx, o, id)
		}
	case o.prog != nil && o.program.ID == id:
		t.detaching(o, id)
		return t.detachMain(ctx, o)
	case o.owned != nil:
		for _, m := range o.owned.Members {
			if m.Program.ID == id {
				t.noteOwner(o, fmt.Sprintf(`"%s" detaches the program`, kernel.Command("", "", nil, "detach", "xdp", o.device.Name, m.Name)))
				return failed(unix.EBUSY, nil)
			}
		}
	}
	if o.offload != nil && kernel.ProgramID(o.offload) == id {
		t.detaching(o, id)
		return replaceProgram(o.device.Index, nil, o.offload, hook.ModeOffload)
	}
	return errNotThere
}

func (t *tool) detaching(o *occupant, id uint32) {
	t.debug("Detaching XDP program with ID %d from %s", id, o.device.Name)
}

// detachMain detaches what runs on the host.
func (t *tool) detachMain(ctx context.Context, o *occupant) error {
	if o.owned != nil {
		t.noteOwner(o, fmt.Sprintf(`"%s" detaches it`, kernel.Command("", "", kernel.Flags{"--all"}, "detach", "xdp", o.device.Name)))
		return failed(unix.EBUSY, nil)
	}
	if o.chain != nil && kernel.IsBPFFS(t.bpffs()) {
		return t.handle(o.device.Name).DetachAll(ctx)
	}
	err := replaceProgram(o.device.Index, nil, o.prog, o.mode)
	if errors.Is(err, unix.EBUSY) {
		// Like xdp-loader, it detaches the link that holds the program.
		t.attachRefused(o.device.Index, int(unix.EBUSY))
		return t.detachLink(ctx, o)
	}
	if err != nil {
		t.attachRefused(o.device.Index, number(err))
	}
	return err
}

func (t *tool) detachLink(ctx context.Context, o *occupant) error {
	c, err := dispatcher.Read(ctx, dispatcher.XDP(o.device.Name), dispatcher.ReadOptions{})
	if err != nil {
		return err
	}
	if c.LinkID == 0 || len(c.Members) == 0 || c.Members[0].Program.ID != o.program.ID {
		return failed(unix.ENOENT, nil)
	}
	return dispatcher.DetachLink(ctx, c.LinkID, dispatcher.DetachOptions{Force: true})
}

// detachMember removes one program from libxdp's chain.
func (t *tool) detachMember(ctx context.Context, o *occupant, id uint32) error {
	err := t.handle(o.device.Name).Detach(ctx, hook.ProgramRef(id))
	if errors.Is(err, ebpf.ErrNotSupported) || errors.Is(err, unix.EPERM) {
		t.libWarn("Asked to detach 1 progs, but %d loaded on ifindex %d, and partial detach is not supported by the kernel.",
			len(o.chain.Members), o.device.Index)
		return failed(unix.EOPNOTSUPP, err)
	}
	if errors.Is(err, hook.ErrChanged) {
		t.libWarn("Retried more than %d times, giving up", maxTries+1)
		return failed(unix.EBUSY, err)
	}
	return err
}
