package declare

import (
	"fmt"
	"net/netip"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/libdispatcher/dispatcher/hook"
)

// A Problem is something in a document that cannot be.
type Problem struct {
	// At is the key, as "attachments[0].order.priority".
	At   string
	Text string
}

// Check returns what is wrong in the document by itself, in the order of its keys.
func (d *Document) Check() []Problem {
	c := &checker{}
	type place struct{ hook, name string }
	first := map[place]int{}
	for i := range d.Attachments {
		a := &d.Attachments[i]
		c.at = fmt.Sprintf("attachments[%d]", i)
		c.attachment(a)
		at := place{a.Hook, a.Name}
		if n, twice := first[at]; twice && a.Name != "" {
			c.say("name", "%q is also the name of number %d in this document, on the same hook", a.Name, n+1)
		} else {
			first[at] = i
		}
	}
	return c.found
}

type checker struct {
	at    string
	found []Problem
}

func (c *checker) say(key, format string, args ...any) {
	c.found = append(c.found, Problem{strings.TrimSuffix(c.at+"."+key, "."), fmt.Sprintf(format, args...)})
}

func (c *checker) attachment(a *Attachment) {
	if err := hook.CheckName(a.Name); err != nil {
		c.say("name", "%v", err)
	}
	h, err := hook.Parse(a.Hook)
	if err != nil {
		c.say("hook", "%v", err)
		return // all the rest depends on it
	}
	c.match(h, &a.On)
	c.program(&a.Program)
	c.oneOf("maps.reuse", a.Maps.Reuse, Reuses)
	c.order(h, a)
	c.oneOf("mode", a.Mode, Modes)
	if a.Mode != "" && h != hook.XDP {
		c.say("mode", "only xdp has modes")
	}
	c.oneOf("onConflict", a.OnConflict, Conflicts)
	c.oneOf("onDrift", a.OnDrift, Drifts)
	if a.Confirm != nil {
		c.confirm(h, a.Confirm)
	}
}

func (c *checker) match(h hook.Hook, m *Match) {
	device := len(m.Names)+len(m.Driver)+len(m.Kind) > 0 || m.Role != ""
	switch {
	case h.OnCgroup() && m.Cgroup == "":
		c.say("on", "%s is a hook of a cgroup: say which, as in {cgroup: /system.slice}", h)
	case h.OnCgroup() && (device || m.NetNS != ""):
		c.say("on", "%s is a hook of a cgroup, which has no devices and no network namespace: leave all but cgroup out", h)
	case !h.OnCgroup() && m.Cgroup != "":
		c.say("on.cgroup", "%s is a hook of a device: say which, as in {names: [eth0]}", h)
	case !h.OnCgroup() && !device:
		c.say("on", "nothing says which devices; {names: [\"*\"]} is all of them")
	}
	for _, list := range []struct {
		key   string
		globs []string
	}{{"names", m.Names}, {"driver", m.Driver}, {"kind", m.Kind}} {
		for i, g := range list.globs {
			if _, err := path.Match(g, ""); err != nil || g == "" {
				c.say(fmt.Sprintf("on.%s[%d]", list.key, i), "%q is no pattern", g)
			}
		}
	}
	c.oneOf("on.role", m.Role, Roles)
}

func (c *checker) program(p *Program) {
	var set []string
	for _, s := range []struct{ key, value string }{{"file", p.File}, {"builtin", p.Builtin}, {"image", p.Image}, {"pin", p.Pin}} {
		if s.value != "" {
			set = append(set, s.key)
		}
	}
	switch {
	case len(set) == 0:
		c.say("program", "nothing says where it comes from: set one of file, builtin and pin")
	case len(set) > 1:
		c.say("program", "it comes from one place: leave %s out", strings.Join(set[1:], " and "))
	case p.Image != "":
		c.say("program.image", "images are not supported yet; set file, builtin or pin")
	case p.Pin != "" && (p.Entry != "" || len(p.Globals) > 0):
		c.say("program", "the program at a pin is loaded already: leave entry and globals out")
	case p.Builtin != "" && p.Entry != "":
		c.say("program.entry", "the hook chooses the function of a builtin program: leave it out")
	}
}

func (c *checker) order(h hook.Hook, a *Attachment) {
	s, err := a.Settings()
	if err != nil {
		c.say("order.continueOn", "%v", err)
	}
	if err := s.Check(); err != nil {
		c.say("order.priority", "%v", err)
	}
	c.oneOf("order.onMissing", a.Order.OnMissing, Missings)
	if h != hook.XDP && len(a.Order.ContinueOn) > 0 {
		c.say("order.continueOn", "on %s the program itself says with its return value whether the next one runs", h)
	}
	if h != hook.XDP && a.Order.OnMissing != "" {
		c.say("order.onMissing", "on %s there are no slots that could be empty", h)
	}
	for _, list := range []struct {
		key   string
		names []string
	}{{"before", a.Order.Before}, {"after", a.Order.After}} {
		for i, name := range list.names {
			key := fmt.Sprintf("order.%s[%d]", list.key, i)
			if err := hook.CheckName(name); err != nil {
				c.say(key, "%v", err)
			} else if name == a.Name {
				c.say(key, "%q is this member itself", name)
			}
		}
	}
}

func (c *checker) confirm(h hook.Hook, f *Confirm) {
	if h.Family() == "tc" {
		c.say("confirm", "on %s a program has no owner with whom it could leave; tcx/* has one", h)
	}
	if d, err := time.ParseDuration(f.Within); err != nil || d <= 0 || d > time.Hour {
		c.say("confirm.within", "%q: must be a time of at most an hour, as in 30s", f.Within)
	}
	if len(f.Probes) == 0 {
		c.say("confirm.probes", "without a probe nothing is confirmed")
	}
	for i, p := range f.Probes {
		key := fmt.Sprintf("confirm.probes[%d]", i)
		_, err := netip.ParseAddrPort(p.TCP)
		switch {
		case (p.TCP == "") == (len(p.Exec) == 0):
			c.say(key, "a probe has one of tcp and exec")
		case p.TCP != "" && err != nil:
			c.say(key+".tcp", "%q: must be an address and a port, as in \"192.0.2.1:179\"", p.TCP)
		}
	}
}

func (c *checker) oneOf(key, value string, known []string) {
	if value != "" && !slices.Contains(known, value) {
		c.say(key, "%q: must be %s", value, strings.Join(known, " or "))
	}
}

// Settings are the member's settings with all defaults: those of the priority as it is declared.
// The error is about the verdicts.
func (a *Attachment) Settings() (hook.Settings, error) {
	s := hook.Settings{Priority: a.Order.Priority}
	var err error
	if len(a.Order.ContinueOn) > 0 {
		s.ContinueOn, err = hook.ParseVerdictSet(strings.Join(a.Order.ContinueOn, ","))
	}
	if i := slices.Index(Missings, a.Order.OnMissing); i > 0 {
		s.OnMissing, _ = hook.ParseOnMissing(a.Order.OnMissing)
	}
	if a.Hook == string(hook.XDP) {
		return s.WithDefaults(), err
	}
	if s.Priority == 0 {
		s.Priority = hook.DefaultPriority
	}
	return s, err
}
