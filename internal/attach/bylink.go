package attach

import (
	"context"
	"errors"
	"io/fs"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// onLink opens a link by its id, and a target with the link's hook, and runs fn with the
// lock held. The handle that fn returns takes over both.
func onLink(ctx context.Context, id uint32, bpffs string, fn func(*target.Opened, *state.Locked, kernel.RawLink, *kernel.LinkInfo) (target.Handle, error)) (h target.Handle, err error) {
	err = kernel.Retry(ctx, func() error {
		l, err := kernel.OpenLink(id)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			return hook.Because(fs.ErrNotExist, "there is no link with id %d", id)
		case err != nil:
			return kernel.Again(err)
		}
		o, err := target.Open(target.Target{Hook: hook.XDP, BPFFS: bpffs}, sweep)
		if err != nil {
			l.Close()
			return err
		}
		info, err := kernel.LinkInfoOf(l)
		if err == nil {
			o.Hook = info.Hook()
			err = o.Locked(ctx, func(locked *state.Locked) error {
				h, err = fn(o, locked, l, info)
				return err
			})
		}
		if err != nil || h == nil {
			l.Close()
			o.Close()
		}
		return err
	})
	return h, err
}

// DetachLink detaches a link by its id. Its holders keep the link, which does nothing
// any more. DetachLink detaches a link that is not ours only with force.
func DetachLink(ctx context.Context, id uint32, bpffs string, force bool) error {
	_, err := onLink(ctx, id, bpffs, func(o *target.Opened, locked *state.Locked, l kernel.RawLink, info *kernel.LinkInfo) (target.Handle, error) {
		return nil, detachLink(o, locked, l, info, force)
	})
	return err
}

func detachLink(o *target.Opened, locked *state.Locked, l kernel.RawLink, info *kernel.LinkInfo, force bool) error {
	names := links.OpenNames(o)
	defer names.Close()
	folder, ours := "", false
	switch info.Type {
	case link.XDPType:
		folder = state.ChainFolder(info.ID, 0)
		chain, err := chains.ChainOf(info.Program)
		if err != nil && !force { // force detaches a chain of a later version too
			return err
		}
		ours = chain != nil
	case link.TCXType, link.CgroupType:
		folder = state.LinkFolder(o.Hook, info.ID)
		member, err := names.IsMember(info)
		if err != nil && !force {
			return err
		}
		ours = member
	}
	if !ours && !force {
		return hook.Busy(&hook.Occupant{Kind: hook.KindForeign, Program: target.ProgramOf(info.Program), LinkID: info.ID}).
			Hint("--force detaches it all the same; its holder keeps a link that does nothing")
	}
	if locked != nil && folder != "" { // also for a displaced chain, which is not ours any more
		if err := locked.DropChain(folder); err != nil {
			return err
		}
	}
	kernel.Step("detach: unpinned")
	err := l.Detach()
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, ebpf.ErrNotSupported) {
		// bpf_link_ops.detach is missing (kernel/bpf/syscall.c).
		return hook.Because(ebpf.ErrNotSupported, "the kernel cannot detach a link of type %v", info.TypeName()).
			Hint("its holder has to close it: \"%s\" names the holder", o.CommandByLink("holders", info.ID))
	}
	if err != nil {
		return kernel.Errno("detach the link", err)
	}
	return names.Forget(info)
}

// AdoptLink makes what a link of another tool attaches a member. On XDP it updates
// the link, so that a chain replaces the link's program; on TCX and cgroups the link
// gets a name. A holder of the link can update it again. The caller closes the Handle.
func AdoptLink(ctx context.Context, id uint32, bpffs string, req target.Request) (h target.Handle, on hook.Hook, err error) {
	h, err = onLink(ctx, id, bpffs, func(o *target.Opened, locked *state.Locked, l kernel.RawLink, info *kernel.LinkInfo) (target.Handle, error) {
		if on = o.Hook; on == "" {
			return nil, info.NoHook()
		}
		if err := req.Check(o); err != nil {
			return nil, err
		}
		return adoptLink(o, locked, l, info, req)
	})
	if err != nil {
		return nil, "", err
	}
	h.ReleaseNetNS()
	return h, on, nil
}

func adoptLink(o *target.Opened, locked *state.Locked, l kernel.RawLink, info *kernel.LinkInfo, req target.Request) (target.Handle, error) {
	switch {
	case info.Gone():
		return nil, target.ErrGone
	case o.Hook == hook.XDP:
		return chains.AdoptLink(o, locked, l, info.ID, req)
	case info.Type == link.TCXType || info.Type == link.CgroupType && o.Hook != hook.LSMCgroup:
		return links.AdoptLink(o, locked, l, info, req)
	}
	return nil, hook.Because(ebpf.ErrNotSupported, "%s is only shown: there are no members on it", o.Hook)
}
