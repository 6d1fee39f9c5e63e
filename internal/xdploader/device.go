package xdploader

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// An occupant is everything that is attached to a device.
type occupant struct {
	device rtnl.Device
	// prog runs on the host: a dispatcher, or a program without one. It is nil
	// when there is none.
	prog    *ebpf.Program
	mode    hook.Mode
	program hook.Program
	chain   *libxdp.Chain // of libxdp's dispatcher; else nil
	owned   *hook.Chain   // of libdispatcher's dispatcher; else nil
	offload *ebpf.Program // runs on the card; nil when there is none
}

func (o *occupant) close() {
	for _, p := range []*ebpf.Program{o.prog, o.offload} {
		if p != nil {
			p.Close()
		}
	}
}

// free tells whether nothing is attached.
func (o *occupant) free() bool { return o.prog == nil && o.offload == nil }

// maxTries is how often xdp-loader retries when another process is faster.
const maxTries = 10

// readOccupant reads what is attached to a device of the thread's namespace.
// For a dispatcher that it cannot read it prints xdp-loader's message.
func (t *tool) readOccupant(ctx context.Context, index int) (o *occupant, err error) {
	for range maxTries + 1 {
		// A program may have gone before it was opened.
		if o, err = t.lookOnce(ctx, index); !errors.Is(err, fs.ErrNotExist) || ctx.Err() != nil {
			break
		}
	}
	return o, err
}

func (t *tool) lookOnce(ctx context.Context, index int) (_ *occupant, err error) {
	var d *rtnl.Device
	err = dial(func(conn *rtnl.Conn) (err error) { d, err = conn.DeviceByIndex(index); return err })
	if errors.Is(err, fs.ErrNotExist) {
		return nil, failed(unix.ENODEV, nil)
	}
	if err != nil {
		return nil, err
	}
	o := &occupant{device: *d}
	defer func() {
		if err != nil {
			o.close()
		}
	}()
	for _, x := range d.XDP {
		p, err := ebpf.NewProgramFromID(ebpf.ProgramID(x.Program))
		if err != nil {
			return nil, err
		}
		if x.Mode == hook.ModeOffload {
			o.offload = p
		} else {
			o.prog, o.mode, o.program = p, x.Mode, describe(p)
		}
	}
	if o.prog == nil {
		return o, nil
	}
	if _, err := state.Find(o.prog); !errors.Is(err, state.ErrNotOurs) {
		// An owned chain of a later version cannot be read, but it is still
		// owned.
		if o.owned, err = dispatcher.Read(ctx, dispatcher.XDP(d.Name), dispatcher.ReadOptions{}); err != nil {
			o.owned = &hook.Chain{}
		}
		return o, nil
	}
	o.chain, err = libxdp.ReadProgram(o.prog, index, t.bpffs())
	switch {
	case errors.Is(err, libxdp.ErrVersion):
		t.libWarn("XDP dispatcher version %d higher than supported %d", o.chain.Config.Version, libxdp.MaxVersion)
		t.libWarn("Dispatcher version check failed for ID %d", o.program.ID)
		return nil, failed(unix.EOPNOTSUPP, err)
	case errors.Is(err, libxdp.ErrNotDispatcher):
		return o, nil
	case err != nil:
		return nil, err
	}
	if o.chain.Folder == "" && len(o.chain.Config.Programs) > 0 {
		_ = t.haveBPFFS()
		t.libWarn("Unable to read pinned progs: %s", message(int(unix.ENOENT)))
	}
	return o, nil
}

// bpffs returns the folder of libxdp's pins.
func (t *tool) bpffs() string { return cmp.Or(t.getenv("LIBXDP_BPFFS"), kernel.DefaultBPFFS) }

// haveBPFFS tells whether there is a bpffs. It mounts one if the environment
// asks for that.
func (t *tool) haveBPFFS() bool {
	dir := t.bpffs()
	if kernel.IsBPFFS(dir) {
		return true
	}
	if t.getenv("LIBXDP_BPFFS_AUTOMOUNT") == "1" {
		_, err := kernel.MountBPFFS(dir)
		if err == nil {
			return true
		}
		t.libWarn("mount -t bpf bpf %s failed: %s", dir, words(err))
	}
	t.libWarn("No bpffs found at %s", dir)
	return false
}

// handle returns the device as package libxdp takes it.
func (t *tool) handle(name string) libxdp.Device {
	return libxdp.Device{Name: name, BPFFS: t.bpffs()}
}

// noteOwner keeps a note for the end of the output: which chain is in the way,
// and what to do.
func (t *tool) noteOwner(o *occupant, advice string) {
	by := "by netlink"
	if o.owned.LinkID != 0 {
		by = fmt.Sprintf("by link %d", o.owned.LinkID)
	}
	members := []string{}
	for _, m := range o.owned.Members {
		members = append(members, m.Name)
	}
	what := "a chain of libdispatcher"
	if len(members) > 0 {
		what += " (" + strings.Join(members, ", ") + ")"
	}
	t.advice = fmt.Sprintf("%s holds %s %s; %s", what, o.device.Name, by, advice)
}

// describe is [kernel.Describe] with the whole name, of which the kernel keeps 15 bytes:
// cilium/ebpf reads it from the BTF.
func describe(prog *ebpf.Program) hook.Program {
	p := kernel.Describe(prog)
	if info, err := prog.Info(); err == nil {
		p.Name = info.Name
	}
	return p
}
