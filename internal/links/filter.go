package links

import (
	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// filterIncumbent is a filter that is replaced by a link.
type filterIncumbent struct {
	conn  *rtnl.Conn
	index int
	rtnl.Filter
}

func (filterIncumbent) id() uint32 { return 0 }

func (filterIncumbent) carries(*ebpf.Program) *ebpf.Program { return nil }

func (f filterIncumbent) replaceProgram(next, _ *ebpf.Program) error {
	return kernel.Again(f.conn.ReplaceFilter(f.index, f.Filter.Filter, next.FD(), f.Name))
}

func (f filterIncumbent) remove(*ebpf.Program) error {
	return f.conn.DeleteFilter(f.index, f.Filter.Filter)
}

// ReplaceFilter replaces a filter by a link on the target, the TCX hook at the same
// side. The filter must be the first of all: first returns the reason if it is not.
// The caller closes the handle. The error is ErrNotSupported where there is no TCX.
func ReplaceFilter(o *target.Opened, l *state.Locked, conn *rtnl.Conn, f rtnl.Filter, prog *ebpf.Program, req target.AdoptRequest, first func() error) (h target.Handle, err error) {
	err = withOrder(o, func(op *opened, list *order) error {
		if err := first(); err != nil {
			return err
		}
		loaded, err := load.Program{Program: prog}.Load(load.Want{Hook: o.Hook})
		if err != nil {
			return err
		}
		req.Position = hook.Position{Last: true}
		_, name, priority, err := list.Join(loaded, req.Request)
		if err != nil {
			return err
		}
		next := &successor{op: op, l: l, prog: prog, rec: op.newRecord(name, req.Owner, priority), persistent: req.Persistent}
		create := func(p *ebpf.Program) (kernel.RawLink, error) { return op.create(p, kernel.Neighbor{}, list) }
		h, err = next.replace(filterIncumbent{conn, op.index, f}, create)
		return err
	})
	return h, err
}
