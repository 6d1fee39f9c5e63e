package attach

import (
	"context"
	"io/fs"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// adopt makes a filter that somebody else made a member: on a kernel with TCX
// one with a link, which runs where the first filter did, just before all of
// them; else the same filter with our name.
func (filters) adopt(ctx context.Context, s *site, req AdoptRequest) (Handle, error) {
	var h Handle
	err := kernel.Retry(ctx, func() error {
		return s.locked(ctx, func(l *state.Locked) error {
			return s.lane(s.byName, func(conn *rtnl.Conn, ln *lane) (err error) {
				i, err := ln.adoptable(req.Entry)
				if err != nil {
					return err
				}
				prog, err := real(ln.list[i].Program)
				if err != nil {
					return err
				}
				defer prog.Close()
				if h, err = s.adoptFilter(l, conn, ln, i, prog, req); unsupported(err) {
					h, err = ln.rename(conn, i, prog, req)
				}
				return err
			})
		})
	})
	if err != nil {
		return nil, err
	}
	s.ns.Release()
	return h, nil
}

// adoptable finds the filter to adopt.
func (ln *lane) adoptable(ref hook.Ref) (int, error) {
	i := -1
	if ref != "" {
		var err error
		if i, err = ln.find(ref); err != nil {
			return 0, err
		}
	} else {
		for j, e := range ln.list {
			if e.ours {
				continue
			}
			if i >= 0 {
				return 0, hook.Because(hook.ErrUsage, "there are several filters: choose one, id:%d or id:%d", ln.list[i].Program, e.Program)
			}
			i = j
		}
		if i < 0 {
			return 0, hook.Because(fs.ErrNotExist, "there is no filter that could be adopted")
		}
	}
	switch f := ln.list[i]; {
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
func (ln *lane) rename(conn *rtnl.Conn, i int, prog *ebpf.Program, req AdoptRequest) (Handle, error) {
	if ln.list[i].ours {
		return nil, hook.Because(fs.ErrExist, "%q is a member already", ln.list[i].label.Name)
	}
	others := ln.without(i)
	loaded, err := load.Program{Program: prog}.Load(load.Want{Hook: ln.site.Hook})
	if err != nil {
		return nil, err
	}
	_, lb, err := others.settle(loaded, req.Request)
	if err != nil {
		return nil, err
	}
	if lb.Priority, err = dispatch.Fit(others.ranks(), i, req.Priority); err != nil {
		return nil, err
	}
	f := ln.list[i].Filter.Filter
	if err := conn.ReplaceFilter(ln.dev.Index, f, prog.FD(), lb.String()); err != nil {
		return nil, kernel.Again(err)
	}
	return &filterHandle{unowned: unowned{site: ln.site}, name: lb.Name, index: ln.dev.Index}, nil
}

// filterIncumbent is a filter whose place a link takes.
type filterIncumbent struct {
	conn  *rtnl.Conn
	index int
	rtnl.Filter
}

func (filterIncumbent) id() uint32 { return 0 }

func (filterIncumbent) carries(*ebpf.Program) *ebpf.Program { return nil }

func (f filterIncumbent) exchange(next, _ *ebpf.Program) error {
	return kernel.Again(f.conn.ReplaceFilter(f.index, f.Filter.Filter, next.FD(), f.Name))
}

func (f filterIncumbent) remove(*ebpf.Program) error {
	return f.conn.DeleteFilter(f.index, f.Filter.Filter)
}

// adoptFilter puts a TCX link in the place of the filter at i.
func (s *site) adoptFilter(l *state.Locked, conn *rtnl.Conn, ln *lane, i int, prog *ebpf.Program, req AdoptRequest) (Handle, error) {
	to := *s
	to.Hook = s.owned()
	names, err := to.namesToWrite(l)
	if err != nil {
		return nil, err
	}
	defer names.close()
	sp := &spot{hook: to.Hook, kind: kernel.KindOf(to.Hook), name: ln.dev.Name, index: ln.dev.Index, ns: s.ns, asked: s.Place}
	list, err := sp.list(names, nil)
	if err != nil {
		return nil, err
	}
	kind, err := conn.OtherBefore(ln.dev.Index, ln.list[i].Filter.Filter)
	switch {
	case err != nil:
		return nil, err
	case kind != "":
		return nil, hook.Because(hook.ErrUsage, "all of TCX runs before the filters of clsact, and a filter of kind %s would be passed over", kind)
	case i > 0:
		return nil, hook.Because(hook.ErrUsage, "all of TCX runs before the filters of clsact, and filter id:%d would be passed over", ln.list[i-1].Program).
			Hint("adopt that one first (id:%d)", ln.list[0].Program)
	}
	loaded, err := load.Program{Program: prog}.Load(load.Want{Hook: to.Hook})
	if err != nil {
		return nil, err
	}
	req.Position = hook.Position{Last: true}
	if req.Name == "" && ln.list[i].ours {
		req.Name = ln.list[i].label.Name
	}
	_, rec, err := list.place(&to, loaded, req.Request)
	if err != nil {
		return nil, err
	}
	rec.LastSeen = sp.home()
	var h *linkHandle
	create := func(p *ebpf.Program) (rawLink, error) { return sp.create(p, kernel.Neighbor{}, list) }
	keep := func(link rawLink) (err error) {
		kept := to
		if h, err = kept.newLinkHandle(link, rec); err != nil {
			return err
		}
		h.made = true
		if err := names.reg.Put(h.id, rec); err != nil {
			return err
		}
		if req.Persistent {
			return h.pin(l, nil)
		}
		return nil
	}
	link, err := sp.takePlace(l, filterIncumbent{conn, ln.dev.Index, ln.list[i].Filter}, prog, true, create, keep)
	if err != nil {
		if link != nil && h != nil {
			err = kernel.Undo(err, h.link.Close())
		}
		return nil, err
	}
	return h, nil
}
