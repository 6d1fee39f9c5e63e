package xdploader

import (
	"context"
	"fmt"
	"path/filepath"

	"golang.org/x/sys/unix"
)

func (t *tool) clean(ctx context.Context, v *values) error {
	where := "all interfaces"
	if v.index != 0 {
		where = v.device
	}
	fmt.Fprintf(t.stdout, "Cleaning up detached XDP program links for %s\n", where)
	if !t.haveBPFFS() {
		return failed(unix.ENOENT, nil)
	}
	removed, err := t.handle(v.device).Clean(ctx)
	for _, folder := range removed {
		var index, prog int
		name := filepath.Base(folder)
		if _, err := fmt.Sscanf(name, "dispatch-%d-%d", &index, &prog); err == nil {
			t.libInfo("Prog id %d no longer attached on ifindex %d, removing pin directory %s", prog, index, name)
		}
	}
	t.detail(err)
	return err
}
