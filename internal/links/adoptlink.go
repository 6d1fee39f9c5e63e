package links

import (
	"io/fs"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// AdoptLink gives a name to a link on TCX or on a cgroup. On success the handle owns
// the link, and the caller closes the handle; on an error the link stays the caller's.
// The error is fs.ErrExist for a member.
func AdoptLink(o *target.Opened, locked *state.Locked, l kernel.RawLink, info *kernel.LinkInfo, req target.Request) (target.Handle, error) {
	names := OpenNames(o)
	defer names.Close()
	switch rec, err := names.Record(info); {
	case err != nil:
		return nil, err
	case rec != nil:
		return nil, hook.Because(fs.ErrExist, "link %d is a member already", info.ID)
	}
	prog, err := kernel.OpenProgram(info.Program, "the program")
	if err != nil {
		return nil, err
	}
	defer prog.Close()
	called, pinned, err := names.pin(o.Hook, info.ID)
	if err != nil {
		return nil, err
	}
	if req.Name == "" {
		req.Name = called
	}
	h := &handle{Base: target.Base{Opened: o}, link: l, id: info.ID}
	err = h.withOrder(&current{names: names, info: info}, func(op *opened, list *order) error {
		i := list.WithLink(info.ID)
		if i < 0 {
			return kernel.ErrAgain
		}
		rec, err := op.recordAt(list, i, &load.Loaded{Name: target.ProgramOf(info.Program).Name}, req)
		if err != nil {
			return err
		}
		h.rec = *rec
		return nil
	})
	if err != nil {
		return nil, err
	}
	records, err := names.put(prog, h.id, &h.rec)
	if err != nil {
		return nil, err
	}
	h.hold(prog, records)
	if req.Persistent {
		if err := pinNamed(locked, h, called, pinned); err != nil {
			records.Close()
			return nil, kernel.Undo(err, names.Forget(info))
		}
	}
	return h, nil
}

// pinNamed pins a member under its name. If the link is pinned as called already, its
// pins move.
func pinNamed(locked *state.Locked, h *handle, called string, pinned bool) error {
	if pinned && called == h.rec.Name {
		return nil
	}
	if err := h.pin(locked, nil); err != nil || !pinned {
		return err
	}
	return kernel.Join(locked.MoveMaps(h.folder(), called, h.folder(), h.rec.Name), locked.Remove(h.folder(), called))
}
