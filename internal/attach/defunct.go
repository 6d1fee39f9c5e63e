package attach

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/cilium/ebpf/link"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/links"
)

// Defunct returns the chains of members that a process or a pin still holds, although
// their device or cgroup is gone.
func (r *Reader) Defunct(ctx context.Context) []hook.Chain {
	var all []hook.Chain
	for _, li := range r.opened.Links {
		if !li.Gone() || !r.want(li.Hook()) {
			continue
		}
		var c *hook.Chain
		err := kernel.Retry(ctx, func() (err error) {
			switch li.Type {
			case link.XDPType:
				c, err = chains.Defunct(&r.opened, li)
			case link.TCXType, link.CgroupType:
				c, err = links.Defunct(&r.opened, li, r.names)
			}
			return err
		})
		switch {
		case errors.Is(err, fs.ErrNotExist): // gone meanwhile
		case err != nil:
			all = append(all, unread(hook.Chain{Hook: li.Hook()}, fmt.Errorf("link %d, of what is gone: %w", li.ID, err))...)
		case c != nil && len(c.Members) > 0:
			all = append(all, *c)
		}
	}
	return all
}
