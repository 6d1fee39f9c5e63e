package libxdp

import (
	"fmt"
	"io/fs"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// A Device is a network device whose chain is libxdp's, or is to be.
//
// The errors of its methods are [hook.Error]: with hook.ErrBusy as the cause
// when something other than a dispatcher of libxdp's is on the device, or when
// a bpf_link holds it; hook.ErrChanged when others changed the chain more often
// than it was tried; hook.ErrIncompatible for a mode that the chain is not in;
// hook.ErrUsage for a request that is wrong in itself; fs.ErrNotExist when there
// is no such device, bpffs, chain or member; [ErrVersion] for a dispatcher that
// is later than what is understood here; and ebpf.ErrNotSupported where the
// kernel refuses to replace functions (BPF_PROG_TYPE_EXT).
//
// After a method has returned, its caller holds nothing: what it made is pinned.
type Device struct {
	Name string
	// NetNS is the network namespace: a name as in "ip netns", a path, or a
	// process id. Empty is the caller's own.
	NetNS string
	// BPFFS is where libxdp pins, what LIBXDP_BPFFS is to it. Empty is
	// /sys/fs/bpf. Programs that share a chain must share it.
	BPFFS string
}

// A Chain is a dispatcher on a device and the programs that it runs.
type Chain struct {
	Device  string
	Ifindex int
	Mode    hook.Mode
	// Dispatcher is the program on the device.
	Dispatcher hook.Program
	Config     Config
	Members    []Member // in run order
	// Folder has the pins; empty when there is none in the bpffs that was
	// looked at.
	Folder string
	Pins   []string // paths of the pins in it
}

// A Member is a program in a chain.
type Member struct {
	// Name is the whole name of its function; the kernel cuts it at 15 bytes.
	Name    string
	Program hook.Program
	// Priority orders the members: lower runs first. libxdp counts from 0.
	Priority   int
	ContinueOn hook.VerdictSet
	Frags      bool // takes multi-buffer packets
	DevBound   bool // is bound to the device
	// LinkID is the link that puts it in the place of its stub.
	LinkID uint32
	Slot   int
	// Missing: the stub runs nothing, because its link is gone. The chain goes
	// on to the next member there. Program is what the pins say, if anything.
	Missing bool
}

// Find returns the member that ref means: the name of its function, if no other
// has the same, "id:PROGRAM" or "link:ID". fs.ErrNotExist when there is none.
func (c *Chain) Find(ref hook.Ref) (*Member, error) {
	if err := ref.Check(); err != nil {
		return nil, hook.Because(hook.ErrUsage, "%w", err)
	}
	var found []*Member
	var there, ids []string
	for i := range c.Members {
		m := &c.Members[i]
		if ref == hook.Ref(m.Name) || m.Program.ID != 0 && ref.Program() == m.Program.ID || m.LinkID != 0 && ref.Link() == m.LinkID {
			found = append(found, m)
			ids = append(ids, fmt.Sprintf("id:%d", m.Program.ID))
		}
		if m.Program.ID != 0 {
			there = append(there, fmt.Sprintf("%s (id:%d)", m.Name, m.Program.ID))
		}
	}
	switch len(found) {
	case 0:
		if len(there) == 0 {
			there = []string{"none"}
		}
		return nil, hook.Because(fs.ErrNotExist, "there is no member %q; there is %s", string(ref), strings.Join(there, ", "))
	case 1:
		return found[0], nil
	}
	return nil, hook.Because(hook.ErrUsage, "%d members have the name %q: say which with %s", len(found), string(ref), strings.Join(ids, " or "))
}

// site is an opened Device.
type site struct {
	Device
	ns *kernel.NetNS
}

// at runs fn with the device opened, and completes its error.
func (d Device) at(op string, fn func(*site) error) error {
	if d.BPFFS == "" {
		d.BPFFS = kernel.DefaultBPFFS
	}
	ns, err := kernel.OpenNetNS(d.NetNS)
	if err == nil {
		defer ns.Close()
		err = fn(&site{d, ns})
	}
	return d.failed(op, err)
}

// failed says what was tried and where.
func (d Device) failed(op string, err error) error {
	return hook.Wrap(op, hook.XDP, d.Name, err)
}
