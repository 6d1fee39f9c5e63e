package attach

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"path/filepath"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/holders"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/links"
	"github.com/libdispatcher/dispatcher/internal/target"
)

// PlanAdopt tells what Adopt would change for others.
func PlanAdopt(ctx context.Context, t target.Target, req target.AdoptRequest) (*hook.Adoption, error) {
	c, err := Read(ctx, t)
	if err != nil {
		return nil, err
	}
	m, err := toAdopt(c, req.Entry)
	if err != nil {
		return nil, err
	}
	p := &adoption{Target: t, req: req, m: m}
	p.Program, p.Holders = m.Program, []hook.HolderProcess{}
	if err := p.findHolders(); err != nil {
		return nil, err
	}
	name := cmp.Or(req.Name, m.Name)
	switch {
	case t.Hook == hook.XDP:
		p.onXDP(c)
	case t.Hook.OnCgroup():
		err = p.onCgroup(ctx)
	case m.Filter == nil:
		p.effect("%s cannot take it off any more (EBUSY), nor attach it again (EEXIST); another copy that it loads and attaches runs as well: twice", p.who())
		p.back(kernel.Command(t.NetNS, t.BPFFS, nil, "detach", string(t.Hook), t.Name, name))
	default:
		err = p.onFilter(ctx, name)
	}
	return &p.Adoption, err
}

// toAdopt returns the entry that would be adopted.
func toAdopt(c *hook.Chain, ref hook.Ref) (found *hook.Member, err error) {
	for i := range c.Members {
		switch m := &c.Members[i]; {
		case ref != "" && !ref.Names(m), ref == "" && m.Kind != hook.KindLegacy && (c.Hook != hook.XDP || i > 0 || !c.Ours() || c.Protected()):
		case found != nil:
			return nil, hook.Because(hook.ErrUsage, "several programs have no link: choose one, %s or %s", hook.ProgramRef(found.Program.ID), hook.ProgramRef(m.Program.ID))
		default:
			found = m
		}
	}
	if found == nil {
		return nil, hook.Because(fs.ErrNotExist, "nothing is attached without a link that could be adopted")
	}
	return found, nil
}

// An adoption is what is planned for one entry.
type adoption struct {
	hook.Adoption
	target.Target
	req target.AdoptRequest
	m   *hook.Member
}

func (p *adoption) findHolders() error {
	f := holders.Open(holders.Options{})
	defer f.Close()
	view, err := f.Look(hook.HolderProgram)
	if err != nil {
		return err
	}
	h, err := view.Of(hook.HolderRef{Kind: hook.HolderProgram, ID: p.Program.ID})
	if errors.Is(err, fs.ErrNotExist) {
		return nil // gone meanwhile: the adoption says so
	}
	if err == nil {
		p.Holders = append(p.Holders, h.Processes...)
	}
	return err
}

// who says who attached the program, as far as that can be known: the kernel does not
// record it.
func (p *adoption) who() string {
	var names []string
	for _, h := range p.Holders {
		names = append(names, strings.TrimSpace(fmt.Sprintf("pid %d %s %s", h.PID, h.Comm, h.Exe)))
	}
	if len(names) == 0 {
		return "whoever attached it"
	}
	return fmt.Sprintf("whoever attached it (%s has it open)", strings.Join(names, ", "))
}

func (p *adoption) effect(format string, args ...any) {
	p.Effects = append(p.Effects, fmt.Sprintf(format, args...))
}

// back notes the commands that put the program back as it was: it is pinned, so that it
// outlives the member, detached by the second command, and attached by the last.
func (p *adoption) back(detach string, attach ...func(pin string) string) {
	if len(attach) == 0 {
		p.Back = append(p.Back, detach)
		return
	}
	pin := filepath.Join(p.BPFFS, fmt.Sprintf("adopted_%d", p.Program.ID))
	p.Back = append(p.Back, kernel.Shell("bpftool", "prog", "pin", "id", fmt.Sprint(p.Program.ID), pin), detach)
	for _, a := range attach {
		p.Back = append(p.Back, a(pin))
	}
	p.Back = append(p.Back, kernel.Shell("rm", pin))
}

// onXDP: dev_xdp_attach and bpf_xdp_link_attach, net/core/dev.c.
func (p *adoption) onXDP(c *hook.Chain) {
	detach := p.Command(nil, "detach", string(hook.XDP), p.Name, cmp.Or(p.req.Name, p.m.Name))
	again := func(pin string) string {
		mode := map[hook.Mode]string{hook.ModeNative: "xdpdrv", hook.ModeGeneric: "xdpgeneric"}[c.Mode]
		return kernel.IPCommand(p.NetNS, "link", "set", "dev", p.Name, cmp.Or(mode, "xdp"), "pinned", pin)
	}
	if p.req.NoGap {
		p.effect("the chain has no link: %s replaces it with all its members by attaching again, and takes it off by detaching", p.who())
		p.back(detach, again)
		return
	}
	p.effect("packets on %s pass unfiltered for a short moment, before a link holds the device; --no-gap avoids that, but does not protect the chain", p.Name)
	if c.Ours() { // netlink carries the chain: no manager put it there
		p.effect("nothing is attached by netlink any more (EBUSY) as long as the chain has a member")
		return
	}
	p.effect("%s can neither replace it nor take it off any more, nor attach it again when it starts: as long as the chain has a member, all that attach by netlink get EBUSY (ip, AF_XDP sockets, DPDK, OVS)", p.who())
	p.back(detach, again)
}

// onCgroup: __cgroup_bpf_attach, __cgroup_bpf_detach and compute_effective_progs,
// kernel/bpf/cgroup.c.
func (p *adoption) onCgroup(ctx context.Context) error {
	flag := map[string]string{"allow-multi": "multi", "allow-override": "override"}[p.m.Detail]
	again := func(pin string) string {
		words := []string{"bpftool", "cgroup", "attach", p.Name, bpftoolName(p.Hook), "pinned", pin}
		if flag != "" {
			words = append(words, flag)
		}
		return kernel.Shell(words...)
	}
	p.back(p.Command(nil, "detach", string(p.Hook), p.Name, cmp.Or(p.req.Name, p.m.Name)), again)
	if flag == "multi" {
		p.effect("%s cannot take it off any more (ENOENT); what it attaches again runs as well: twice", p.who())
		return nil
	}
	if p.req.NoGap {
		return links.NeedsGap(p.m.Detail)
	}
	p.effect("no program runs on %s %s for the short moment in which a link replaces %s, which was attached without \"multi\" (%s)",
		p.Hook, p.Name, hook.ProgramRef(p.Program.ID), p.m.Detail)
	p.effect("%s cannot take it off any more (ENOENT), nor attach it again or replace it (EPERM), as long as the cgroup has a member", p.who())
	if flag == "" {
		p.effect("the cgroups below may have programs of their own on %s, which the kernel refuses them now", p.Hook)
		return nil
	}
	below, err := Effective(ctx, p.Target)
	if err != nil {
		return err
	}
	text := "it runs beside the programs of the cgroups below, which take its place now"
	var where []string
	for _, c := range below[1:] {
		for _, m := range c.Members {
			if m.State == hook.StateOverridden && m.Program.ID == p.Program.ID {
				where = append(where, c.Target)
			}
		}
	}
	if len(where) > 0 {
		const shown = 5
		text += ": also in " + strings.Join(where[:min(len(where), shown)], ", ")
		if len(where) > shown {
			text += fmt.Sprintf(" and %d more", len(where)-shown)
		}
	}
	p.effect("%s", text)
	return nil
}

// bpftoolName returns the attach type of a hook of cgroups as all versions of bpftool(8)
// understand it (bpf_attach_type_input_str, tools/bpf/bpftool/common.c).
func bpftoolName(h hook.Hook) string {
	switch h {
	case hook.CgroupDev:
		return "device"
	case hook.CgroupSockOps:
		return "sock_ops"
	}
	return path.Base(string(h))
}

// onFilter: on a kernel with TCX the filter goes, and the member has a link.
func (p *adoption) onFilter(ctx context.Context, name string) error {
	on := p.Target
	on.Hook = hook.Hook("tcx/" + path.Base(string(p.Hook)))
	f := p.m.Filter
	again := func(pin string) string {
		return kernel.TCCommand(p.NetNS, "filter", "add", "dev", p.Name, path.Base(string(p.Hook)), "pref", fmt.Sprint(f.Pref),
			"handle", fmt.Sprintf("%#x", f.Handle), "protocol", "all", "bpf", "direct-action", "object-pinned", pin)
	}
	switch _, err := Read(ctx, on); {
	case errors.Is(err, ebpf.ErrNotSupported):
		p.effect("the filter gets another label; %s can still remove or replace it, and then it is no member any more", p.who())
		p.back(p.Command(nil, "detach", string(p.Hook), p.Name, name), again)
	case err != nil:
		return err
	default:
		p.effect("its filter (preference %d) goes: %s finds it no more; a filter that is made again with it runs as well: twice", f.Pref, p.who())
		p.back(on.Command(nil, "detach", string(on.Hook), p.Name, name), again)
	}
	return nil
}
