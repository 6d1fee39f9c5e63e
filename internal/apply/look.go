package apply

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/plan"
	"github.com/libdispatcher/dispatcher/internal/rtnl"
	"github.com/libdispatcher/dispatcher/internal/state"
)

// A Document is what a source declares.
type Document struct {
	*declare.Document
	File  string
	Owner string // the label of its members
}

// Options say where and how. The zero value is useful.
type Options struct {
	plan.Options
	// NetNS is the network namespace of attachments that name none. Default: the caller's.
	NetNS string
	// BPFFS is as in dispatcher.Options.
	BPFFS string
	// Device is the only device to look at, in NetNS. Default: all, and all cgroups.
	Device string
}

// A run is one comparison of documents with the host.
type run struct {
	docs    []Document
	o       Options
	objects objects
}

// look reads what there is, once, and plans.
func (r *run) look(ctx context.Context) (*plan.Plan, error) {
	wants, err := r.wants()
	if err != nil {
		return nil, err
	}
	now := &plan.Observed{Marks: map[uint32]string{}, Unsealable: map[uint32]bool{}}
	if now.Chains, err = r.chains(ctx); err != nil {
		return nil, err
	}
	for i := range now.Chains {
		for j := range now.Chains[i].Members {
			if m := &now.Chains[i].Members[j]; slices.Contains(r.o.Owners, m.Owner) && m.Kind == hook.KindMember && m.Program.ID != 0 {
				if err := note(now, m, now.Chains[i].Hook == hook.XDP && !m.Sealed); err != nil {
					return nil, err
				}
			}
		}
	}
	return plan.Make(wants, now, r.o.Options), nil
}

// chains reads all hooks, or those of one device.
func (r *run) chains(ctx context.Context) (chains []hook.Chain, err error) {
	if r.o.Device == "" {
		return dispatcher.List(ctx, dispatcher.ListOptions{Hooks: hook.Hooks(), BPFFS: r.o.BPFFS})
	}
	for _, h := range hook.Hooks() {
		if h.OnCgroup() {
			continue
		}
		c, err := dispatcher.Read(ctx, dispatcher.On(h, r.o.Device).In(r.o.NetNS), dispatcher.ReadOptions{BPFFS: r.o.BPFFS})
		switch {
		case errors.Is(err, ebpf.ErrNotSupported):
		case errors.Is(err, fs.ErrNotExist):
			return nil, nil // it is gone again
		case err != nil:
			return nil, err
		default:
			c.NetNS.Name = r.o.NetNS // what is read alone has no name
			chains = append(chains, *c)
		}
	}
	return chains, nil
}

// note reads what a member's program says of itself.
func note(now *plan.Observed, m *hook.Member, unsealed bool) error {
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(m.Program.ID))
	if errors.Is(err, fs.ErrNotExist) {
		return nil // replaced meanwhile: unknown
	}
	if err != nil {
		return hook.Wrap("read", "", m.Name, kernel.Errno("the member's program", err))
	}
	defer prog.Close()
	if now.Marks[m.Program.ID], err = state.MarkOf(prog); err != nil {
		return hook.Wrap("read", "", m.Name, err)
	}
	if unsealed {
		code, _, err := state.CodeOf(prog)
		now.Unsealable[m.Program.ID] = err != nil || code.Refused != ""
	}
	return nil
}

// A namespace is a network namespace and its devices.
type namespace struct {
	id      uint64
	devices []rtnl.Device
	drivers map[string]string // by name, as far as they were asked for
	ns      *kernel.NetNS
	err     error
}

// wants returns all attachments on all of their targets.
func (r *run) wants() ([]plan.Want, error) {
	var wants []plan.Want
	spaces := map[string]*namespace{}
	defer func() {
		for _, s := range spaces {
			if s.ns != nil {
				s.ns.Close()
			}
		}
	}()
	for _, d := range r.docs {
		for i := range d.Attachments {
			a := &d.Attachments[i]
			if r.o.Device != "" && (a.On.Cgroup != "" || a.On.NetNS != "") {
				continue
			}
			w := plan.Want{Attachment: a, File: d.File, Owner: d.Owner}
			w.Program, w.Err = r.objects.mark(a, d.File)
			if hook.Hook(a.Hook).OnCgroup() {
				wants = append(wants, onCgroup(w))
				continue
			}
			w.NetNS = cmp.Or(a.On.NetNS, r.o.NetNS)
			if spaces[w.NetNS] == nil {
				spaces[w.NetNS] = open(w.NetNS)
			}
			on := onDevices(w, spaces[w.NetNS])
			if r.o.Device != "" {
				on = slices.DeleteFunc(on, func(w plan.Want) bool { return w.Target != r.o.Device })
			}
			wants = append(wants, on...)
		}
	}
	return wants, nil
}

func open(spec string) *namespace {
	s := &namespace{drivers: map[string]string{}}
	if s.ns, s.err = kernel.OpenNetNS(spec); s.err != nil {
		return s
	}
	s.id = s.ns.ID().Inode
	s.err = rtnl.In(s.ns, func(conn *rtnl.Conn) (err error) {
		s.devices, err = conn.Devices()
		return err
	})
	return s
}

// driver returns the driver of a device; empty also for a device that is gone meanwhile.
func (s *namespace) driver(device string) (string, error) {
	if d, known := s.drivers[device]; known {
		return d, nil
	}
	err := s.ns.Do(func() (err error) {
		s.drivers[device], err = rtnl.Driver(device)
		return err
	})
	if errors.Is(err, unix.ENODEV) {
		err = nil
	}
	return s.drivers[device], err
}

// onCgroup returns the want with its cgroup.
func onCgroup(w plan.Want) plan.Want {
	w.Target = w.On.Cgroup
	cg, err := kernel.OpenCgroup(w.On.Cgroup)
	if errors.Is(err, fs.ErrNotExist) {
		w.Err = err
		return w
	}
	w.Place = plan.Place{Hook: hook.Hook(w.Hook)}
	if err != nil {
		w.Err = errors.Join(w.Err, err)
		return w
	}
	defer cg.Close()
	w.Place.CgroupID = cg.ID
	return w
}

// onDevices returns the want for each device that matches; without one, the want on nothing.
func onDevices(w plan.Want, s *namespace) []plan.Want {
	nowhere := w
	nowhere.Target = describe(&w.On)
	if s.err != nil {
		nowhere.Err = s.err
		return []plan.Want{nowhere}
	}
	var wants []plan.Want
	for i := range s.devices {
		d := &s.devices[i]
		on := w
		on.Place, on.Target = plan.Place{Hook: hook.Hook(w.Hook), Ifindex: d.Index, NetNS: s.id}, d.Name
		match := w.On
		match.Driver = nil
		is := plan.Device{Name: d.Name, AltNames: d.AltNames, Kind: d.Kind, Loopback: d.Type == unix.ARPHRD_LOOPBACK, Upper: s.upper(d)}
		if !plan.Matches(&match, &is) {
			continue
		}
		if len(w.On.Driver) > 0 {
			driver, err := s.driver(d.Name)
			if err != nil {
				on.Err = errors.Join(on.Err, err)
			} else if is.Driver = driver; !plan.Matches(&w.On, &is) {
				continue
			}
		}
		wants = append(wants, on)
	}
	if len(wants) == 0 {
		nowhere.Err = hook.Because(fs.ErrNotExist, "no device matches: %s", nowhere.Target)
		return []plan.Want{nowhere}
	}
	return wants
}

// upper tells whether a device is on top of d. Two that are each other's lower devices are a pair (veth).
func (s *namespace) upper(d *rtnl.Device) bool {
	return d.Master != 0 || slices.ContainsFunc(s.devices, func(on rtnl.Device) bool {
		return on.Lower == d.Index && d.Lower != on.Index
	})
}

// describe says in words what a match asks for.
func describe(m *declare.Match) string {
	var words []string
	for _, part := range []struct {
		key    string
		values []string
	}{{"names", m.Names}, {"driver", m.Driver}, {"kind", m.Kind}} {
		if len(part.values) > 0 {
			words = append(words, fmt.Sprintf("%s %s", part.key, strings.Join(part.values, ",")))
		}
	}
	if m.Role != "" {
		words = append(words, "role "+m.Role)
	}
	return strings.Join(words, ", ")
}
