package rtnl

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

// Parents of clsact's filters: TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS) and
// TC_H_MIN_EGRESS (linux/pkt_sched.h).
const (
	ClsactIngress uint32 = 0xfffffff2
	ClsactEgress  uint32 = 0xfffffff3
)

// EnsureClsact adds the clsact qdisc (Linux 4.5) if the device has none. The
// error is hook.ErrBusy when the device has the old ingress qdisc instead.
func (c *Conn) EnsureClsact(index int) error {
	const what = "add the clsact qdisc"
	for range tries {
		ae := netlink.NewAttributeEncoder()
		ae.String(unix.TCA_KIND, clsact)
		m := tcmsg{index: index, handle: ingressMajor, parent: ingressQdisc}
		_, err := c.tc(unix.RTM_NEWQDISC, netlink.Acknowledge|netlink.Create|netlink.Excl, m, ae)
		switch {
		case err == nil:
			return nil
		case errors.Is(err, unix.ENOENT): // no such kind of qdisc
			return fmt.Errorf("%s: %w (needs CONFIG_NET_SCH_INGRESS)", what, ebpf.ErrNotSupported)
		case !errors.Is(err, unix.EEXIST):
			return c.refused(what, index, err)
		}
		kinds, err := c.qdiscKinds(index)
		switch {
		case err != nil:
			return c.refused(what, index, err)
		case kinds[ingressMajor] == clsact:
			return nil
		case kinds[ingressMajor] == ingress:
			return hook.Because(hook.ErrBusy, "%s: the device has the old ingress qdisc instead, which has no egress side", what)
		}
		// The qdisc went away meanwhile, or the dump skipped it because a
		// device went away, see widen.
	}
	return fmt.Errorf("%s: %w", what, hook.ErrChanged)
}

// AddFilter adds a direct-action filter at the address f with the program of
// descriptor fd. The error is EEXIST when the address has a filter. It is
// EINVAL when another protocol or kind of filter uses the preference, or when
// the parent does not exist.
func (c *Conn) AddFilter(index int, f hook.Filter, fd int, name string) error {
	err := c.changeFilter(index, f, fd, name, netlink.Create|netlink.Excl)
	switch {
	case errors.Is(err, unix.ENOENT): // no such kind of filter
		return fmt.Errorf("add %s: %w (needs CONFIG_NET_CLS_BPF)", nameOf(f), ebpf.ErrNotSupported)
	case err != nil:
		return c.refused("add "+nameOf(f), index, err)
	}
	return nil
}

// ReplaceFilter changes the program and the name of the filter at the address
// f. The filter becomes direct-action and loses its class id. The error is
// fs.ErrNotExist when the filter is gone.
//
// A packet meets the old program or the new one: the kernel exchanges the
// filter by one list_replace_rcu (cls_bpf_change, net/sched/cls_bpf.c), so the
// order stays the same.
func (c *Conn) ReplaceFilter(index int, f hook.Filter, fd int, name string) error {
	// Without NLM_F_CREATE the kernel makes no filter when there is none. The
	// kernel ignores NLM_F_REPLACE (tc_new_tfilter, net/sched/cls_api.c).
	return c.gone("replace", index, f, c.changeFilter(index, f, fd, name, netlink.Replace))
}

// DeleteFilter removes the filter at the address f; the qdisc stays. The error
// is fs.ErrNotExist when the filter is gone.
func (c *Conn) DeleteFilter(index int, f hook.Filter) error {
	// Without a handle the kernel would delete the whole preference.
	if err := checkAddress(f); err != nil {
		return err
	}
	m, ae := address(index, f)
	_, err := c.tc(unix.RTM_DELTFILTER, netlink.Acknowledge, m, ae)
	return c.gone("delete", index, f, err)
}

// changeFilter sends RTM_NEWTFILTER. The kernel refuses it (EOPNOTSUPP) on a
// shared block, which other devices may use too: filters of shared blocks are
// only read here.
func (c *Conn) changeFilter(index int, f hook.Filter, fd int, name string, flags netlink.HeaderFlags) error {
	if err := checkAddress(f); err != nil {
		return err
	}
	if len(name) > maxFilterName || strings.Contains(name, "\x00") {
		return hook.Because(hook.ErrUsage, "the filter name %.40q has %d bytes; at most %d fit, and no zero", name, len(name), maxFilterName)
	}
	m, ae := address(index, f)
	ae.Nested(unix.TCA_OPTIONS, func(nae *netlink.AttributeEncoder) error {
		nae.Uint32(bpfFD, uint32(fd))
		nae.String(bpfName, name)
		nae.Uint32(bpfFlags, bpfDirectAction)
		return nil
	})
	_, err := c.tc(unix.RTM_NEWTFILTER, netlink.Acknowledge|flags, m, ae)
	return err
}

// gone turns an error that means "no such filter" into fs.ErrNotExist. EINVAL
// can mean that too: the qdisc or class is gone, or the preference now belongs
// to another protocol or kind.
func (c *Conn) gone(op string, index int, f hook.Filter, err error) error {
	missing := errors.Is(err, unix.ENOENT)
	if errors.Is(err, unix.EINVAL) {
		m, ae := address(index, f)
		_, get := c.tc(unix.RTM_GETTFILTER, 0, m, ae)
		missing = errors.Is(get, unix.ENOENT) || errors.Is(get, unix.EINVAL)
	}
	switch {
	case missing:
		return hook.Because(fs.ErrNotExist, "there is no %s", nameOf(f))
	case err != nil:
		return c.refused(op+" "+nameOf(f), index, err)
	}
	return nil
}

// refused adds what failed to an error. When the device is gone it returns
// DeviceByIndex's error.
func (c *Conn) refused(what string, index int, err error) error {
	if errors.Is(err, unix.ENODEV) {
		if _, gone := c.DeviceByIndex(index); gone != nil {
			return gone
		}
	}
	return fmt.Errorf("%s: %w", what, kernel.Explain(err))
}

// checkAddress refuses an address that lets the kernel choose a part, since the
// caller could not find its filter again, and an address of more than one
// filter.
func checkAddress(f hook.Filter) error {
	if f.Pref == 0 || f.Protocol == 0 || f.Handle == 0 {
		return hook.Because(hook.ErrUsage, "%s: preference, protocol and handle must not be 0", nameOf(f))
	}
	return nil
}

// nameOf names a filter as "tc filter show" does.
func nameOf(f hook.Filter) string {
	return fmt.Sprintf("bpf filter %#x of parent %x:%x, chain %d, protocol %#04x, pref %d",
		f.Handle, f.Parent>>16, f.Parent&0xffff, f.Chain, f.Protocol, f.Pref)
}
