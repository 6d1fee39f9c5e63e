package features

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"runtime"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/chains"
	"github.com/libdispatcher/dispatcher/internal/dispatch"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/target"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// Probe tries which features work on this kernel. If the target names a device, Probe also asks
// the kernel what the device can do. It tries links on the loopback device of a new namespace,
// and attaches nothing to cgroups. The error is about the target: a missing feature is not one.
func Probe(ctx context.Context, t target.Target) ([]hook.Feature, error) {
	var list []hook.Feature
	add := func(name, needs string, err error) {
		f := hook.Feature{Name: name, Needs: needs, Supported: err == nil}
		if err != nil {
			f.Detail = oneLine(err)
		}
		list = append(list, f)
	}
	if missing := kernel.MissingCapabilities(); len(missing) > 0 {
		return nil, hook.Because(hook.ErrPermission, "probing needs %s; run it as root", strings.Join(missing, " and "))
	}

	one := []hook.Settings{hook.Settings{}.WithDefaults()}
	add("xdp", "Linux 4.8", kernel.Explain(loads(nil)))
	add("slots", "Linux 5.10 with the BPF JIT", kernel.Explain(loads(one)))
	described, err := emptyChain()
	if err == nil {
		described.Close()
	}
	add("description", "Linux 5.10", kernel.Explain(err))
	linkErr, updateErr := tryLink()
	add("xdp-link", "Linux 5.9", linkErr)
	add("xdp-link-update", "Linux 5.9", updateErr)
	add("frags", "Linux 5.18", chains.FragsSupported())
	ns, err := kernel.OpenNetNS("")
	if err == nil {
		if ns.ID().Cookie == 0 {
			err = errors.New("SO_NETNS_COOKIE is not known here")
		}
		ns.Close()
	}
	add("netns-cookie", "Linux 5.14", err)
	probeLinks(add)
	add("freplace", "Linux 5.10, and no policy against it; needed for chains of libxdp only", libxdp.Supported())
	add("bpffs", "a bpffs at "+t.BPFFS+"; needed for persistent members", tryBPFFS(t.BPFFS))

	if t.Name == "" {
		return list, nil
	}
	device, err := probeDevice(t)
	return append(list, device...), err
}

func oneLine(err error) string {
	line, _, _ := strings.Cut(err.Error(), "\n")
	return line
}

// emptyChain loads the dispatcher of a chain without members. The caller closes it.
func emptyChain() (*state.Dispatcher, error) {
	return state.Build(&state.Chain{Plan: dispatch.Plan{Shape: dispatch.Plain}, Closed: true}, nil, nil)
}

func loads(members []hook.Settings) error {
	var slots []*ebpf.Map
	for range members {
		m, err := state.NewSlot("probe")
		if err != nil {
			return err
		}
		defer m.Close()
		slots = append(slots, m)
	}
	return state.Loads(dispatch.Plain, members, slots, nil)
}

// tryLink attaches and updates an XDP link in a namespace of its own.
func tryLink() (create, update error) {
	err := inNewNetNS(func() error {
		old, err := emptyChain()
		if err != nil {
			return err
		}
		defer old.Close()
		next, err := emptyChain()
		if err != nil {
			return err
		}
		defer next.Close()
		l, err := link.AttachXDP(link.XDPOptions{Program: old.Program, Interface: loopback})
		if err != nil {
			return err
		}
		raw, err := kernel.AsRaw(l)
		if err != nil {
			return err
		}
		defer raw.Close()
		update = kernel.Errno("update the link", raw.UpdateArgs(link.RawLinkUpdateOptions{New: next.Program, Old: old.Program, Flags: unix.BPF_F_REPLACE}))
		return nil
	})
	if err != nil {
		err = kernel.Explain(err)
		return err, err
	}
	return nil, update
}

// inNewNetNS runs fn on a thread in a new network namespace. The namespace ends with
// the thread.
func inNewNetNS(fn func() error) error {
	errs := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
			errs <- kernel.Errno("new network namespace", err)
			return
		}
		errs <- fn()
	}()
	return <-errs
}

func tryBPFFS(path string) error {
	switch err := kernel.FindBPFFS(path); {
	case err == nil && kernel.ReadOnly(path):
		return errors.New("read-only: nothing can be pinned there")
	case err == nil, !errors.Is(err, fs.ErrNotExist):
		return err
	}
	return fmt.Errorf("not mounted; %s", kernel.MountHint(path))
}

// probeDevice asks the kernel what XDP a device can do.
func probeDevice(t target.Target) ([]hook.Feature, error) {
	o, err := target.Open(t, nil)
	if err != nil {
		return nil, err
	}
	defer o.Close()
	var list []hook.Feature
	err = rtnl.In(o.NS, func(conn *rtnl.Conn) error {
		d, err := conn.Device(t.Name)
		if err != nil {
			return err
		}
		bits, err := rtnl.XDPFeatures(d.Index)
		for _, f := range []struct {
			name string
			bit  uint64
		}{
			{"native", rtnl.XDPBasic},
			{"native-redirect", rtnl.XDPRedirect},
			{"native-frags", rtnl.XDPFrags},
			{"offload", rtnl.XDPOffload},
		} {
			feature := hook.Feature{Name: "dev-" + f.name, Needs: "the driver of " + d.Name, Supported: bits&f.bit != 0}
			switch {
			case err != nil:
				feature.Unknown, feature.Detail = true, "cannot be told: "+oneLine(err)
			case !feature.Supported:
				feature.Detail = "not offered by the driver as it is set up now"
			}
			list = append(list, feature)
		}
		list = append(list, hook.Feature{Name: "dev-generic", Needs: "any device", Supported: true})
		return nil
	})
	return list, err
}
