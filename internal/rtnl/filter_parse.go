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

// A Filter is a bpf filter of tc on a device.
type Filter struct {
	hook.Filter
	Name    string // as tc shows it: "file.o:[section]" where tc loaded it
	Program uint32 // id, 0 for classic BPF
	Tag     string // of the program, hex
	Qdisc   string // kind of the qdisc that the parent belongs to: "clsact", "ingress", "htb"
}

// Hook tells on which hook the filter is. The old ingress qdisc runs its
// filters where clsact does; it is told by its kind, since it takes any parent.
func (f *Filter) Hook() hook.Hook {
	switch {
	case f.Qdisc == ingress, f.Qdisc == clsact && f.Parent == ClsactIngress:
		return hook.TCIngress
	case f.Qdisc == clsact && f.Parent == ClsactEgress:
		return hook.TCEgress
	}
	return hook.TCQdisc
}

// Filters returns the bpf filters of a device: of all its qdiscs, their
// classes and the chains of tc. Those of a parent and chain are in the order in
// which they run: by preference, and of equals the newest first. A block that
// qdiscs share (Linux 4.16) is read through each of its parents.
func (c *Conn) Filters(index int) ([]Filter, error) {
	all, err := c.FiltersOf(&Device{Index: index})
	if err == nil && len(all) == 0 {
		// A device that does not exist has none either, says the kernel.
		_, err = c.DeviceByIndex(index)
	}
	return all, err
}

// FiltersOf returns the same of a device that was found, with less to ask for. If
// it is gone meanwhile it has none.
func (c *Conn) FiltersOf(d *Device) ([]Filter, error) {
	all, err := c.atClsact(d.Index)
	// These qdiscs have neither classes nor filters: they take no packets.
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

// atClsact returns those of the clsact or ingress qdisc.
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
		// The ingress qdisc has its one list of filters under any parent, and clsact
		// none under this one. To get the qdisc itself is not for readers: the answer
		// goes to everybody who watches (qdisc_get_notify, net/sched/sch_api.c).
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

// elsewhere returns those of the root qdisc and what is below it.
func (c *Conn) elsewhere(index int) ([]Filter, error) {
	parents, err := c.egressParents(index)
	if err != nil {
		return nil, err
	}
	rest, err := c.filters(index, parents)
	if err != nil || len(rest) == 0 {
		return nil, err
	}
	// Only now: the kernel dumps the qdiscs of all devices or of none.
	kinds, err := c.qdiscKinds(index)
	if err != nil {
		return nil, err
	}
	for i := range rest {
		rest[i].Qdisc = kinds[rest[i].Parent&majorMask]
	}
	return rest, nil
}

// egressParents returns what else may have filters: the root qdisc, its
// classes, their qdiscs, and so on.
func (c *Conn) egressParents(index int) ([]uint32, error) {
	msgs, err := c.dump(unix.RTM_GETTCLASS, tcmsg{index: index})
	if err != nil {
		return nil, err
	}
	parents := []uint32{0} // the root qdisc, whatever its handle is
	for _, m := range msgs {
		class, _, err := parseTC(m.Data)
		if err != nil {
			return nil, err
		}
		parents = append(parents, class.handle)
		if class.info != 0 { // the qdisc of the class
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
		// A qdisc that the kernel made has the handle 0. Of these only the root can
		// have filters.
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

// filters returns the bpf filters of some parents. One that does not exist (any
// more) has none (tc_dump_tfilter, net/sched/cls_api.c).
func (c *Conn) filters(index int, parents []uint32) ([]Filter, error) {
	var list []Filter
	for _, parent := range parents {
		msgs, err := c.dump(unix.RTM_GETTFILTER, tcmsg{index: index, parent: parent})
		if err != nil {
			return nil, err
		}
		start := len(list)
		for _, m := range msgs {
			f, kind, err := parseFilter(m.Data, parent)
			if err != nil {
				return nil, err
			}
			// The preference itself comes before its filters, with handle 0.
			if kind == "bpf" && f.Handle != 0 {
				list = append(list, *f)
			}
		}
		// The dump has the preferences in order, and within one the filters as they
		// run: cls_bpf_change puts a new one at the head (list_add_rcu,
		// net/sched/cls_bpf.c). But the chains are in the order of their making.
		slices.SortStableFunc(list[start:], func(a, b Filter) int { return cmp.Compare(a.Chain, b.Chain) })
	}
	return list, nil
}

// OtherBefore returns the kind of a filter that is not a bpf one and that runs
// before f: "flower", "matchall"; "" when there is none.
func (c *Conn) OtherBefore(index int, f hook.Filter) (string, error) {
	msgs, err := c.dump(unix.RTM_GETTFILTER, tcmsg{index: index, parent: f.Parent})
	if err != nil {
		return "", c.refused("list filters", index, err)
	}
	for _, m := range msgs {
		other, kind, err := parseFilter(m.Data, f.Parent)
		if err != nil {
			return "", err
		}
		if kind != "bpf" && other.Chain == f.Chain && other.Pref < f.Pref {
			return kind, nil
		}
	}
	return "", nil
}

// parseFilter reads a filter and its kind; of other kinds than bpf the place only.
func parseFilter(b []byte, parent uint32) (*Filter, string, error) {
	m, ad, err := parseTC(b)
	if err != nil {
		return nil, "", err
	}
	if m.index == blockIndex {
		m.parent = parent // here it is the number of the block
	}
	f := &Filter{Filter: hook.Filter{
		Parent:   m.parent,
		Handle:   m.handle,
		Pref:     uint16(m.info >> 16),
		Protocol: swapProtocol(uint16(m.info)),
	}}
	var kind string
	for ad.Next() {
		switch ad.Type() {
		case unix.TCA_KIND:
			kind = ad.String()
		case unix.TCA_CHAIN:
			f.Chain = ad.Uint32()
		case unix.TCA_OPTIONS:
			if kind == "bpf" { // other kinds number their options differently
				ad.Nested(f.parseOptions)
			}
		}
	}
	return f, kind, ad.Err()
}

func (f *Filter) parseOptions(ad *netlink.AttributeDecoder) error {
	for ad.Next() {
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

// address is the part of a message that names one filter.
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

// swapProtocol is htons, and ntohs.
func swapProtocol(p uint16) uint16 {
	return binary.NativeEndian.Uint16(binary.BigEndian.AppendUint16(nil, p))
}
