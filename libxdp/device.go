package libxdp

import (
	"cmp"
	"fmt"
	"io/fs"
	"strings"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// A Device is a network device with a libxdp chain, or for one.
//
// The errors of its methods are [hook.Error]. The cause is hook.ErrBusy when
// something other than a libxdp dispatcher is on the device, or when a bpf_link
// holds it; hook.ErrChanged when others changed the chain during every try;
// hook.ErrIncompatible for a mode that the chain does not have; hook.ErrUsage
// for a wrong request; fs.ErrNotExist when there is no such device, bpffs, chain
// or member; [ErrVersion] for a dispatcher of a later version; and
// ebpf.ErrNotSupported where the kernel refuses to replace functions
// (BPF_PROG_TYPE_EXT).
//
// After a method has returned, the caller holds nothing: everything that the
// method made is pinned.
type Device struct {
	Name string
	// NetNS is the network namespace: a name as in "ip netns", a path, or a
	// process id. Empty means the caller's own.
	NetNS string
	// BPFFS is the bpffs in which libxdp pins, like LIBXDP_BPFFS for libxdp.
	// Empty means /sys/fs/bpf. Programs that share a chain must use the same
	// one.
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
	// Folder is the folder of the pins; empty when the bpffs has none.
	Folder string
	Pins   []string // paths of the pins in Folder
}

// A Member is a program in a chain.
type Member struct {
	// Name is the whole name of its function; the kernel cuts names at 15
	// bytes.
	Name    string
	Program hook.Program
	// Priority orders the members: lower runs first. libxdp counts from 0.
	Priority   int
	ContinueOn hook.VerdictSet
	Frags      bool // takes multi-buffer packets
	DevBound   bool // bound to the device
	// LinkID is the link by which the program replaces its stub.
	LinkID uint32
	Slot   int
	// Missing tells that the link is gone, so the stub runs nothing and the
	// chain continues with the next member. Program is then what the pins say,
	// if anything.
	Missing bool
}

// Find returns the member that ref names: by the name of its function, if no
// other member has the same name, by "id:PROGRAM" or by "link:ID". The error is
// fs.ErrNotExist when there is none.
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

// at runs fn with the opened device, and completes its error.
func (d Device) at(op string, fn func(*site) error) error {
	d.BPFFS = cmp.Or(d.BPFFS, kernel.DefaultBPFFS)
	ns, err := kernel.OpenNetNS(d.NetNS)
	if err == nil {
		defer ns.Close()
		err = fn(&site{d, ns})
	}
	return d.failed(op, err)
}

// failed adds to an error what was tried, and where.
func (d Device) failed(op string, err error) error {
	return kernel.Wrap(op, hook.XDP, d.Name, err)
}
