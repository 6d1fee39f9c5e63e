package filters

import (
	"errors"
	"io/fs"
	"slices"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// Adopt makes a filter of another tool a member. On a kernel with TCX the member gets
// a link, and runs just before all filters: so only the first filter can be adopted.
// On older kernels the filter stays, and gets a label. The caller closes the handle.
// The error is fs.ErrNotExist when there is no such filter, ErrUsage when the choice
// is open or another filter would be passed over, ErrIncompatible for a filter that
// is no direct-action filter for all packets, and, on older kernels, fs.ErrExist for
// a member.
func (Family) Adopt(o *target.Opened, l *state.Locked, req target.AdoptRequest) (h target.Handle, err error) {
	err = withSide(o, byName(o), func(conn *rtnl.Conn, sd *side) error {
		i, err := sd.adoptable(req.Entry)
		if err != nil {
			return err
		}
		prog, err := links.OpenProgram(sd.list[i].Entry.Program)
		if err != nil {
			return err
		}
		defer prog.Close()
		if h, err = sd.replace(l, conn, i, prog, req); errors.Is(err, ebpf.ErrNotSupported) {
			h, err = sd.rename(conn, i, prog, req)
		}
		return err
	})
	return h, err
}

// adoptable returns the index of the filter to adopt.
func (sd *side) adoptable(ref hook.Ref) (int, error) {
	i, err := sd.list.Choose(ref, func(e entry) bool { return !e.ours() }, "there are several filters")
	if err != nil {
		return 0, err
	}
	if i < 0 {
		return 0, hook.Because(fs.ErrNotExist, "there is no filter that could be adopted")
	}
	switch f := sd.list[i]; {
	case !f.DirectAction:
		return 0, hook.Because(hook.ErrIncompatible, "the filter is not in direct-action mode (da): what its program returns is a class, not a verdict")
	case f.Protocol != unix.ETH_P_ALL:
		return 0, hook.Because(hook.ErrIncompatible, "the filter is for one protocol (%#04x), and a member sees all packets", f.Protocol)
	case f.Chain != 0:
		return 0, hook.Because(hook.ErrIncompatible, "the filter is in chain %d of tc, where only some packets come", f.Chain)
	}
	return i, nil
}

// rename makes the filter at i a member by giving it a label.
func (sd *side) rename(conn *rtnl.Conn, i int, prog *ebpf.Program, req target.AdoptRequest) (target.Handle, error) {
	if sd.list[i].ours() {
		return nil, hook.Because(fs.ErrExist, "%q is a member already", sd.list[i].Entry.Name)
	}
	others := sd.without(i)
	loaded, err := load.Program{Program: prog}.Load(load.Want{Hook: sd.opened.Hook})
	if err != nil {
		return nil, err
	}
	_, lb, err := others.settle(loaded, req.Request)
	if err != nil {
		return nil, err
	}
	if lb.Priority, err = others.list.Fit(i, req.Priority); err != nil {
		return nil, err
	}
	f := sd.list[i].Filter.Filter
	if err := conn.ReplaceFilter(sd.dev.Index, f, prog.FD(), lb.String()); err != nil {
		return nil, kernel.Again(err)
	}
	return sd.handle(lb.Name), nil
}

// replace puts a TCX link in the place of the filter at i.
func (sd *side) replace(l *state.Locked, conn *rtnl.Conn, i int, prog *ebpf.Program, req target.AdoptRequest) (target.Handle, error) {
	to := *sd.opened
	to.Hook = withLinks(to.Hook)
	if req.Name == "" {
		req.Name = sd.list[i].Entry.Name
	}
	return links.ReplaceFilter(&to, l, conn, sd.list[i].Filter, prog, req, func() error {
		f := sd.list[i].Filter
		before := slices.IndexFunc(sd.others, func(other rtnl.Filter) bool { return other.Chain == f.Chain && other.Pref < f.Pref })
		switch {
		case before >= 0:
			return hook.Because(hook.ErrUsage, "all of TCX runs before the filters of clsact, and a filter of kind %s would be passed over", sd.others[before].Kind)
		case i > 0:
			return hook.Because(hook.ErrUsage, "all of TCX runs before the filters of clsact, and filter id:%d would be passed over", sd.list[i-1].Entry.Program).
				Hint("adopt that one first (id:%d)", sd.list[0].Entry.Program)
		}
		return nil
	})
}
