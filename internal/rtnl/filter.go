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

// Parents of the filters of clsact: TC_H_MAKE(TC_H_CLSACT, TC_H_MIN_INGRESS)
// and its like (linux/pkt_sched.h).
const (
	ClsactIngress uint32 = 0xfffffff2
	ClsactEgress  uint32 = 0xfffffff3
)

// EnsureClsact adds the clsact qdisc (Linux 4.5) if the device has none. The
// error is hook.ErrBusy when the old ingress qdisc is in its place.
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
			return hook.Because(hook.ErrBusy, "%s: the old ingress qdisc is in its place; it has no egress side", what)
		}
		// It went away meanwhile, or was skipped when a device did, see widen.
	}
	return fmt.Errorf("%s: %w", what, hook.ErrChanged)
}

// AddFilter adds a filter with the program with descriptor fd, at the place
// that f names; it is always direct-action. The error is EEXIST when a filter
// is there, and EINVAL when the preference is in use for another protocol or
// another kind of filter, or when there is no such parent.
func (c *Conn) AddFilter(index int, f hook.Filter, fd int, name string) error {
	err := c.changeFilter(index, f, fd, name, netlink.Create|netlink.Excl)
	switch {
	case errors.Is(err, unix.ENOENT): // no such kind of filter
		return fmt.Errorf("add %s: %w (needs CONFIG_NET_CLS_BPF)", place(f), ebpf.ErrNotSupported)
	case err != nil:
		return c.refused("add "+place(f), index, err)
	}
	return nil
}

// ReplaceFilter puts another program and name into the filter at the place
// that f names, which becomes direct-action and loses a class of its own, if
// it had one. The error is fs.ErrNotExist when the filter is gone.
//
// Packets meet the old program or the new one: it is one list_replace_rcu
// (cls_bpf_change, net/sched/cls_bpf.c), and the filter keeps its turn.
func (c *Conn) ReplaceFilter(index int, f hook.Filter, fd int, name string) error {
	// It is the missing NLM_F_CREATE that keeps the kernel from making a filter
	// when there is none. NLM_F_REPLACE is never looked at (tc_new_tfilter,
	// net/sched/cls_api.c).
	return c.gone("replace", index, f, c.changeFilter(index, f, fd, name, netlink.Replace))
}

// DeleteFilter removes the filter at the place that f names, and leaves the
// qdisc. The error is fs.ErrNotExist when the filter is gone.
func (c *Conn) DeleteFilter(index int, f hook.Filter) error {
	// Without a handle the kernel would delete the whole preference.
	if err := checkPlace(f); err != nil {
		return err
	}
	m, ae := address(index, f)
	_, err := c.tc(unix.RTM_DELTFILTER, netlink.Acknowledge, m, ae)
	return c.gone("delete", index, f, err)
}

// changeFilter is the RTM_NEWTFILTER of tc. On a shared block, which other
// devices may have too, the kernel refuses it (EOPNOTSUPP): such filters are
// only read here.
func (c *Conn) changeFilter(index int, f hook.Filter, fd int, name string, flags netlink.HeaderFlags) error {
	if err := checkPlace(f); err != nil {
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

// gone tells an error that means that the filter does not exist from others.
// EINVAL may mean that: there is no qdisc or class, or the preference is now
// of another protocol or kind.
func (c *Conn) gone(op string, index int, f hook.Filter, err error) error {
	missing := errors.Is(err, unix.ENOENT)
	if errors.Is(err, unix.EINVAL) {
		m, ae := address(index, f)
		_, get := c.tc(unix.RTM_GETTFILTER, 0, m, ae)
		missing = errors.Is(get, unix.ENOENT) || errors.Is(get, unix.EINVAL)
	}
	switch {
	case missing:
		return hook.Because(fs.ErrNotExist, "there is no %s", place(f))
	case err != nil:
		return c.refused(op+" "+place(f), index, err)
	}
	return nil
}

// refused says what failed. When the device is gone the error is that of
// DeviceByIndex.
func (c *Conn) refused(what string, index int, err error) error {
	if errors.Is(err, unix.ENODEV) {
		if _, gone := c.DeviceByIndex(index); gone != nil {
			return gone
		}
	}
	return fmt.Errorf("%s: %w", what, kernel.Explain(err))
}

// checkPlace refuses what would let the kernel choose, so that the caller
// could not find its filter again, or stand for more than one filter.
func checkPlace(f hook.Filter) error {
	if f.Pref == 0 || f.Protocol == 0 || f.Handle == 0 {
		return hook.Because(hook.ErrUsage, "%s: preference, protocol and handle must not be 0", place(f))
	}
	return nil
}

// place names a filter as "tc filter show" does.
func place(f hook.Filter) string {
	return fmt.Sprintf("bpf filter %#x of parent %x:%x, chain %d, protocol %#04x, pref %d",
		f.Handle, f.Parent>>16, f.Parent&0xffff, f.Chain, f.Protocol, f.Pref)
}
