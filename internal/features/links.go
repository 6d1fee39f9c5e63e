package features

import (
	"errors"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/asm"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
)

// probeLinks tries the hooks on which each member has its own link or filter.
func probeLinks(add func(name, needs string, err error)) {
	var clsact error
	tcx := inNewNetNS(func() error {
		clsact = kernel.Explain(tryClsact())
		return kernel.Explain(tryTCX())
	})
	add("tcx-link", "Linux 6.6", tcx)
	add("tcx-move", "Linux 6.6 with the BPF JIT; a member is moved without a packet that misses it", tryMove(tcx))
	add("clsact", "Linux 4.5 with CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF", clsact)
	link, order := tryCgroup()
	add("cgroup-link", "Linux 5.7 with cgroup v2", link)
	add("cgroup-order", "Linux 6.17; a place among others on a cgroup", order)
}

// returning loads a program that only returns the verdict. The caller closes it.
func returning(h hook.Hook, verdict int32) (*ebpf.Program, error) {
	kind := kernel.KindOf(h)
	spec := &ebpf.ProgramSpec{
		Name: "ld_probe", Type: kind.Program, License: "Dual BSD/GPL",
		Instructions: asm.Instructions{asm.Mov.Imm(asm.R0, verdict), asm.Return()},
	}
	if h.OnCgroup() {
		spec.AttachType = kind.Attach
	}
	return ebpf.NewProgram(spec)
}

const loopback = 1 // its index, in every network namespace

func tryTCX() error {
	prog, err := returning(hook.TCXIngress, -1)
	if err != nil {
		return err
	}
	defer prog.Close()
	l, err := kernel.CreateLink(prog, loopback, ebpf.AttachTCXIngress, kernel.Neighbor{}, 0)
	if errors.Is(err, unix.EINVAL) {
		return kernel.Needs(hook.TCXIngress, err)
	}
	if err != nil {
		return err
	}
	return l.Close()
}

func tryMove(tcx error) error {
	if tcx != nil {
		return tcx
	}
	prog, err := returning(hook.TCXIngress, -1)
	if err != nil {
		return err
	}
	defer prog.Close()
	return links.TryStandIn(prog)
}

func tryClsact() error {
	conn, err := rtnl.Dial()
	if err != nil {
		return err
	}
	defer conn.Close()
	return conn.EnsureClsact(loopback)
}

// tryCgroup tries links on cgroups, and their order, but attaches nothing. A kernel that
// has such links refuses one on an invalid descriptor with EBADF. A kernel that orders
// them knows the revision of the root cgroup.
func tryCgroup() (link, order error) {
	prog, err := returning(hook.CgroupConnect4, 1)
	if err != nil {
		return kernel.Explain(err), kernel.Explain(err)
	}
	defer prog.Close()
	kind := kernel.KindOf(hook.CgroupConnect4)
	if _, link = kernel.CreateLink(prog, -1, kind.Attach, kernel.Neighbor{}, 0); errors.Is(link, unix.EBADF) {
		link = nil
	}
	root, err := kernel.OpenCgroup("/")
	if err != nil {
		return err, err
	}
	defer root.Close()
	q, err := kernel.QueryPrograms(root.FD(), kind.Attach, 0)
	if err != nil {
		return link, err
	}
	if q.Revision == 0 {
		order = errors.New("this kernel attaches behind all others")
	}
	return link, order
}
