package rtnl

import (
	"cmp"
	"encoding/binary"
	"encoding/hex"
	"slices"

	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// Attributes of a bpf filter (linux/pkt_cls.h).
const (
	bpfFD    = 6
	bpfName  = 7
	bpfFlags = 8
	bpfTag   = 10
	bpfID    = 11 // Linux 4.13

	bpfDirectAction = 1 << 0 // of bpfFlags, Linux 4.4

	maxFilterName = 256 // CLS_BPF_NAME_LEN (net/sched/cls_bpf.c)
)

// A Filter is a filter of tc on a device.
type Filter struct {
	hook.Filter
	Kind    string // "bpf", or one of another kind, of which Name, Program and Tag are not there
	Block   uint32 // the block that qdiscs share; 0 if it belongs to its qdisc alone
	Actions []Action
	Name    string // as tc shows it: "file.o:[section]" where tc loaded it
	Program uint32 // id; 0 for classic BPF
	Tag     string // the program's tag in hex
	Qdisc   string // kind of the parent's qdisc: "clsact", "ingress", "htb"
}

// Hook returns the filter's hook. The old ingress qdisc runs its filters where
// clsact runs them. Its kind identifies it, because it accepts any parent.
func (f *Filter) Hook() hook.Hook {
	switch {
	case f.Qdisc == ingress, f.Qdisc == clsact && f.Parent == ClsactIngress:
		return hook.TCIngress
	case f.Qdisc == clsact && f.Parent == ClsactEgress:
		return hook.TCEgress
	}
	return hook.TCQdisc
}

// Filters returns the filters of a device, from all its qdiscs, their
// classes and the chains of tc. The filters of one parent and chain are in run
// order: by preference, and of equals the newest first. A block that qdiscs
// share (Linux 4.16) is read once for each of its parents.
func (c *Conn) Filters(index int) ([]Filter, error) {
	all, err := c.FiltersOf(&Device{Index: index})
	if err == nil && len(all) == 0 {
		// For a device that does not exist the kernel reports no filters.
		_, err = c.DeviceByIndex(index)
	}
	return all, err
}

// FiltersOf is Filters for a device that the caller has read. It needs fewer
// requests. If the device is gone meanwhile there are no filters.
func (c *Conn) FiltersOf(d *Device) ([]Filter, error) {
	all, err := c.atClsact(d.Index)
	// These qdiscs have neither classes nor filters, because they queue no
	// packets.
	if err == nil && d.Qdisc != "noqueue" && d.Qdisc != "noop" {
		var rest []Filter
		rest, err = c.elsewhere(d.Index)
		all = append(all, rest...)
	}
	if err != nil {
		return nil, c.refused("list filters", d.Index, err)
	}
	return all, nil
}

// atClsact returns the filters of the clsact or ingress qdisc.
func (c *Conn) atClsact(index int) ([]Filter, error) {
	if err := c.widen(); err != nil {
		return nil, err
	}
	kind := clsact
	all, err := c.filters(index, []uint32{ClsactIngress, ClsactEgress})
	if err != nil {
		return nil, err
	}
	if len(all) > 0 {
		// The ingress qdisc shows its one list of filters under any parent, and
		// clsact has none under this one. A reader should not request the qdisc
		// itself: the kernel sends the answer to all listeners (qdisc_get_notify,
		// net/sched/sch_api.c).
		old, err := c.filters(index, []uint32{ingressMajor})
		if err != nil {
			return nil, err
		}
		if len(old) > 0 {
			all, kind = old, ingress
		}
	}
	for i := range all {
		all[i].Qdisc = kind
	}
	return all, nil
}

// elsewhere returns the filters of the root qdisc and of all qdiscs and classes
// below it.
func (c *Conn) elsewhere(index int) ([]Filter, error) {
	parents, err := c.egressParents(index)
	if err != nil {
		return nil, err
	}
	rest, err := c.filters(index, parents)
	if err != nil || len(rest) == 0 {
		return nil, err
	}
	// This request comes last, because the kernel dumps the qdiscs of all
	// devices or of none.
	kinds, err := c.qdiscKinds(index)
	if err != nil {
		return nil, err
	}
	for i := range rest {
		rest[i].Qdisc = kinds[rest[i].Parent&majorMask]
	}
	return rest, nil
}

// egressParents returns all other parents that may have filters: the root
// qdisc, its classes, the classes' qdiscs, and so on.
func (c *Conn) egressParents(index int) ([]uint32, error) {
	msgs, err := c.dump(unix.RTM_GETTCLASS, tcmsg{index: index})
	if err != nil {
		return nil, err
	}
	parents := []uint32{0} // the root qdisc, whatever its handle
	for _, m := range msgs {
		class, _, err := parseTC(m.Data)
		if err != nil {
			return nil, err
		}
		parents = append(parents, class.handle)
		if class.info != 0 { // the class has a qdisc
			parents = append(parents, class.info)
		}
	}
	return parents, nil
}

// qdiscKinds returns the kinds of a device's qdiscs by handle.
func (c *Conn) qdiscKinds(index int) (map[uint32]string, error) {
	msgs, err := c.dump(unix.RTM_GETQDISC, tcmsg{})
	if err != nil {
		return nil, err
	}
	kinds := map[uint32]string{}
	for _, m := range msgs {
		qdisc, ad, err := parseTC(m.Data)
		if err != nil {
			return nil, err
		}
		// A qdisc that the kernel made has the handle 0. Only the root qdisc of
		// these can have filters.
		if qdisc.index != index || qdisc.handle == 0 && qdisc.parent != rootQdisc {
			continue
		}
		for ad.Next() {
			if ad.Type() == unix.TCA_KIND {
				kinds[qdisc.handle] = ad.String()
			}
		}
		if err := ad.Err(); err != nil {
			return nil, err
		}
	}
	return kinds, nil
}

// filters returns the filters of some parents. A parent that does not exist
// has no filters (tc_dump_tfilter, net/sched/cls_api.c).
func (c *Conn) filters(index int, parents []uint32) ([]Filter, error) {
	var list []Filter
	for _, parent := range parents {
		msgs, err := c.dump(unix.RTM_GETTFILTER, tcmsg{index: index, parent: parent})
		if err != nil {
			return nil, err
		}
		start := len(list)
		for _, m := range msgs {
			f, err := parseFilter(m.Data, parent)
			if err != nil {
				return nil, err
			}
			// The preference itself, with handle 0, comes before its filters.
			if f.Handle != 0 {
				list = append(list, *f)
			}
		}
		// The dump has the preferences in order, and the filters of a preference in
		// run order: cls_bpf_change puts a new filter at the head (list_add_rcu,
		// net/sched/cls_bpf.c). But the dump has the chains in the order of their
		// creation.
		slices.SortStableFunc(list[start:], func(a, b Filter) int { return cmp.Compare(a.Chain, b.Chain) })
	}
	return list, nil
}

// SharedBlock returns the number of the block that the qdiscs of several devices share
// instead of filters of their own at the parent (tc's ingress_block and egress_block, Linux
// 4.16); 0 if there is none.
func (c *Conn) SharedBlock(index int, parent uint32) (block uint32, err error) {
	at := uint16(unix.TCA_INGRESS_BLOCK)
	if parent == ClsactEgress {
		at = unix.TCA_EGRESS_BLOCK
	}
	msgs, err := c.dump(unix.RTM_GETQDISC, tcmsg{})
	if err != nil {
		return 0, c.refused("list qdiscs", index, err)
	}
	for _, m := range msgs {
		qdisc, ad, err := parseTC(m.Data)
		if err != nil {
			return 0, err
		}
		for qdisc.index == index && qdisc.handle == ingressMajor && ad.Next() {
			if ad.Type() == at {
				block = ad.Uint32()
			}
		}
		if err := ad.Err(); err != nil {
			return 0, err
		}
	}
	return block, nil
}

// parseFilter reads a filter. Of a filter that is not a bpf one it reads the address and
// the actions.
func parseFilter(b []byte, parent uint32) (*Filter, error) {
	m, ad, err := parseTC(b)
	if err != nil {
		return nil, err
	}
	f := &Filter{}
	if m.index == blockIndex {
		f.Block, m.parent = m.parent, parent // the message has the block's number here
	}
	f.Filter = hook.Filter{
		Parent:   m.parent,
		Handle:   m.handle,
		Pref:     uint16(m.info >> 16),
		Protocol: swapProtocol(uint16(m.info)),
	}
	for ad.Next() {
		switch ad.Type() {
		case unix.TCA_KIND:
			f.Kind = ad.String()
		case unix.TCA_CHAIN:
			f.Chain = ad.Uint32()
		case unix.TCA_OPTIONS:
			ad.Nested(f.parseOptions)
		}
	}
	return f, ad.Err()
}

func (f *Filter) parseOptions(ad *netlink.AttributeDecoder) error {
	for ad.Next() {
		if ad.Type() == actionsAt[f.Kind] {
			ad.Nested((*actions)(&f.Actions).parse)
		}
		if f.Kind != "bpf" { // other kinds number their options differently
			continue
		}
		switch ad.Type() {
		case bpfName:
			f.Name = ad.String()
		case bpfFlags:
			f.DirectAction = ad.Uint32()&bpfDirectAction != 0
		case bpfTag:
			f.Tag = hex.EncodeToString(ad.Bytes())
		case bpfID:
			f.Program = ad.Uint32()
		}
	}
	return nil
}

// address returns the part of a message that identifies one filter.
func address(index int, f hook.Filter) (tcmsg, *netlink.AttributeEncoder) {
	ae := netlink.NewAttributeEncoder()
	ae.String(unix.TCA_KIND, "bpf")
	if f.Chain != 0 { // Linux 4.13
		ae.Uint32(unix.TCA_CHAIN, f.Chain)
	}
	return tcmsg{
		index:  index,
		handle: f.Handle,
		parent: f.Parent,
		info:   uint32(f.Pref)<<16 | uint32(swapProtocol(f.Protocol)),
	}, ae
}

// swapProtocol is htons and ntohs.
func swapProtocol(p uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, p))
}
