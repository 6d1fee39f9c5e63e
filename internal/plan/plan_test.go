package plan_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/plan"
)

const ours = "apply/x"

var eth0 = plan.Place{Hook: hook.XDP, Ifindex: 2, NetNS: 7}

// want is a wanted member on eth0 whose program has the mark "v1".
func want(name string, change ...func(*plan.Want)) plan.Want {
	w := plan.Want{
		Attachment: &declare.Attachment{Name: name, Hook: "xdp"}, File: "x.yaml", Owner: ours, Place: eth0, Target: "eth0", Program: "v1",
	}
	for _, c := range change {
		c(&w)
	}
	return w
}

func priority(n int) func(*plan.Want) { return func(w *plan.Want) { w.Order.Priority = n } }
func before(names ...string) func(*plan.Want) {
	return func(w *plan.Want) { w.Order.Before = names }
}

func after(names ...string) func(*plan.Want) {
	return func(w *plan.Want) { w.Order.After = names }
}

// is is a member of ours with program 1, as want has it.
func is(name string, change ...func(*hook.Member)) hook.Member {
	m := hook.Member{
		Name: name, Settings: hook.Settings{}.WithDefaults(), Program: hook.Program{ID: 1}, Kind: hook.KindMember, State: hook.StateRunning,
		Persistent: true, Owner: ours, Sealed: true,
	}
	for _, c := range change {
		c(&m)
	}
	return m
}

func theirs(m *hook.Member) { m.Owner = "somebody" }

func chain(members ...hook.Member) *plan.Observed {
	c := hook.Chain{Hook: hook.XDP, Target: "eth0", Ifindex: 2, NetNS: hook.NetNS{Inode: 7}, Mode: hook.ModeNative, Members: members}
	return &plan.Observed{Chains: []hook.Chain{c}, Marks: map[uint32]string{1: "v1"}, Unsealable: map[uint32]bool{9: true}}
}

// words is a plan in a line.
func words(p *plan.Plan) string {
	var all []string
	for _, i := range p.Items {
		text := fmt.Sprintf("%s %s", i.State, i.Name)
		if i.State == plan.Attach {
			text += fmt.Sprintf(" %d", i.Settings.Priority)
		}
		for _, d := range i.Differences {
			text += fmt.Sprintf(" %s %s>%s", d.What, d.From, d.To)
		}
		if i.Adopt != "" {
			text += " adopts " + string(i.Adopt)
		}
		if i.Err != nil {
			text += ": " + hook.Wrap("", "", "", i.Err).Error()
		}
		all = append(all, text)
	}
	if len(p.Seal) > 0 {
		all = append(all, "seal")
	}
	return strings.Join(all, "; ")
}

func TestMake(t *testing.T) {
	no := false
	legacy := hook.Member{Kind: hook.KindLegacy, Program: hook.Program{ID: 5, Name: "old", Tag: "00"}}
	for name, test := range map[string]struct {
		wants []plan.Want
		now   *plan.Observed
		o     plan.Options
		plan  string
	}{
		"nothing":        {},
		"new":            {wants: []plan.Want{want("a")}, now: chain(), plan: "attach a 50; seal"},
		"new, no seal":   {wants: []plan.Want{want("a", func(w *plan.Want) { w.Seal = &no })}, now: chain(), plan: "attach a 50"},
		"no chain there": {wants: []plan.Want{want("a")}, now: &plan.Observed{}, plan: "attach a 50; seal"},
		"as declared":    {wants: []plan.Want{want("a")}, now: chain(is("a")), plan: "keep a"},
		"another program": {
			wants: []plan.Want{want("a", func(w *plan.Want) { w.Program = "v2" })}, now: chain(is("a")),
			plan: "change a program v1>v2; seal",
		},
		"a program by its id": {
			wants: []plan.Want{want("a", func(w *plan.Want) { w.Program = "id:1"; w.Attachment.Program.Pin = "/p" })}, now: chain(is("a")), plan: "keep a",
		},
		"replaced by hand": {
			wants: []plan.Want{want("a")}, now: chain(is("a", func(m *hook.Member) { m.Program.ID = 2 })), plan: "change a program unknown>v1; seal",
		},
		"settings": {
			wants: []plan.Want{want("a", priority(20), func(w *plan.Want) { w.Order.ContinueOn = []string{"any"}; w.Order.OnMissing = "drop" })},
			now:   chain(is("a")),
			plan:  "change a priority 50>20 continue_on pass>aborted,drop,pass,tx,redirect on_missing continue>drop",
		},
		"not sealed yet": {wants: []plan.Want{want("a")}, now: chain(is("a", func(m *hook.Member) { m.Sealed = false })), plan: "keep a; seal"},
		"not to be sealed": {
			wants: []plan.Want{want("a", func(w *plan.Want) { w.Program = "id:9"; w.Attachment.Program.Pin = "/p" })},
			now:   chain(is("a", func(m *hook.Member) { m.Sealed, m.Program.ID = false, 9 })), plan: "keep a",
		},
		"pin lost": {wants: []plan.Want{want("a")}, now: chain(is("a", func(m *hook.Member) { m.Persistent = false })), plan: "change a pinned no>yes; seal"},
		"held until it is confirmed": {
			wants: []plan.Want{want("a", func(w *plan.Want) { w.Confirm = &declare.Confirm{} })},
			now:   chain(is("a", func(m *hook.Member) { m.Persistent = false })),
			plan:  `blocked a: a process holds the member, which is not pinned: it is to be confirmed first; "dispatcher holders" says which process`,
		},
		"empty":       {wants: []plan.Want{want("a")}, now: chain(is("a", func(m *hook.Member) { m.State = hook.StateEmpty })), plan: "attach a 50; seal"},
		"others stay": {wants: []plan.Want{want("a")}, now: chain(is("b", theirs)), plan: "attach a 50"},
		"name taken": {
			wants: []plan.Want{want("a")}, now: chain(is("a", theirs)),
			plan: `blocked a: there is a member "a" already, of owner "somebody": this document did not make it, and leaves it alone; choose another name, or detach that member`,
		},
		"bypassed": {
			wants: []plan.Want{want("a")}, now: chain(is("a", func(m *hook.Member) { m.State = hook.StateBypassed })),
			plan: `blocked a: the member is bypassed: packets do not meet it; "dispatcher doctor" says what mends it`,
		},
		"undeclared": {wants: []plan.Want{want("a")}, now: chain(is("a"), is("b")), o: plan.Options{Owners: []string{ours}}, plan: "keep a; undeclared b"},
		"prune": {
			wants: []plan.Want{want("a")}, now: chain(is("a"), is("b"), is("c", theirs)),
			o:    plan.Options{Owners: []string{ours}, Prune: true},
			plan: "keep a; detach b",
		},
		"prune all":          {now: chain(is("b")), o: plan.Options{Owners: []string{ours}, Prune: true}, plan: "detach b"},
		"documents missing":  {now: chain(is("b")), o: plan.Options{Owners: []string{ours}, Prune: true, Partial: true}, plan: ""},
		"another's document": {now: chain(is("b")), o: plan.Options{Owners: []string{"apply/y"}, Prune: true}, plan: ""},
		"legacy": {
			wants: []plan.Want{want("a")}, now: chain(legacy),
			plan: "blocked a: held by a program without a link (program old, id 5, tag 00, native mode); onConflict: adopt makes it a member",
		},
		"legacy, adopted": {
			wants: []plan.Want{want("a", func(w *plan.Want) { w.OnConflict = "adopt" })}, now: chain(legacy), plan: "attach a 50 adopts id:5",
		},
		"foreign": {
			wants: []plan.Want{want("a", func(w *plan.Want) { w.OnConflict = "adopt" })},
			now:   chain(hook.Member{Kind: hook.KindForeign, LinkID: 3, Program: hook.Program{ID: 5, Name: "cil", Tag: "00"}}),
			plan:  "blocked a: held by link 3 (program cil, id 5, tag 00, native mode)",
		},
		"another mode": {
			wants: []plan.Want{want("a", func(w *plan.Want) { w.Mode = "generic" })}, now: chain(is("a")),
			plan: "blocked a: the chain is in native mode, not in generic mode, and a chain with members stays in its mode",
		},
		"no device": {
			wants: []plan.Want{want("a", func(w *plan.Want) { w.Place, w.Target = plan.Place{}, "names eth9" })}, now: chain(), plan: "no-device a",
		},
		"no file": {
			wants: []plan.Want{want("a", func(w *plan.Want) { w.Err = fmt.Errorf("no file") })}, now: chain(is("a")), plan: "blocked a: no file",
		},
		"before":              {wants: []plan.Want{want("a", before("b")), want("b", priority(20))}, now: chain(), plan: "attach a 19; attach b 20; seal"},
		"before, as it is":    {wants: []plan.Want{want("a", priority(5), before("b")), want("b", priority(20))}, now: chain(), plan: "attach a 5; attach b 20; seal"},
		"after":               {wants: []plan.Want{want("a", after("b")), want("b", priority(60))}, now: chain(), plan: "attach b 60; attach a 61; seal"},
		"said by both":        {wants: []plan.Want{want("a", before("b")), want("b", after("a"))}, now: chain(), plan: "attach a 49; attach b 50; seal"},
		"a line":              {wants: []plan.Want{want("a", before("b")), want("b", before("c")), want("c", after("a"))}, now: chain(), plan: "attach a 48; attach b 49; attach c 50; seal"},
		"before another's":    {wants: []plan.Want{want("a", before("b"))}, now: chain(is("b", theirs)), plan: "attach a 49"},
		"before who is away":  {wants: []plan.Want{want("a", before("b"))}, now: chain(), plan: "attach a 50; seal"},
		"before the first":    {wants: []plan.Want{want("a", before("b")), want("b", priority(1))}, now: chain(), plan: `attach b 1; blocked a: "b" has priority 1, and no priority is before that`},
		"between what is not": {wants: []plan.Want{want("a", after("c"), before("b")), want("b", priority(20)), want("c", priority(30))}, now: chain(), plan: `attach b 20; attach c 30; blocked a: no priority fits all that it is to be before and after ("a" has 31, "b" has 20)`},
		"a circle": {
			wants: []plan.Want{want("a", before("b")), want("b", before("a")), want("c")}, now: chain(),
			plan: `blocked a: before and after go in a circle: a, then b, then a; blocked b: before and after go in a circle: b, then a, then b; attach c 50`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			if test.now == nil {
				test.now = &plan.Observed{}
			}
			qt.Check(t, qt.Equals(words(plan.Make(test.wants, test.now, test.o)), test.plan))
		})
	}
}

func TestMatches(t *testing.T) {
	eth := plan.Device{Name: "eth0", AltNames: []string{"enp3s0", "uplink"}, Driver: "mlx5_core"}
	port := plan.Device{Name: "eth1", Driver: "e1000", Upper: true}
	veth := plan.Device{Name: "veth1", Kind: "veth", Driver: "veth"}
	lo := plan.Device{Name: "lo", Loopback: true}
	for _, test := range []struct {
		m       declare.Match
		matches string
	}{
		{declare.Match{}, "eth0 eth1 veth1 lo"},
		{declare.Match{Names: []string{"eth*"}}, "eth0 eth1"},
		{declare.Match{Names: []string{"up*"}}, "eth0"},
		{declare.Match{Names: []string{"veth?", "lo"}}, "veth1 lo"},
		{declare.Match{Names: []string{"eth[1-3]"}}, "eth1"},
		{declare.Match{Driver: []string{"mlx5_*"}}, "eth0"},
		{declare.Match{Kind: []string{"physical"}}, "eth0 eth1"},
		{declare.Match{Kind: []string{"veth", "loopback"}}, "veth1 lo"},
		{declare.Match{Kind: []string{"physical"}, Role: "leaf"}, "eth0"},
		{declare.Match{Names: []string{"eth*"}, Driver: []string{"veth"}}, ""},
	} {
		var got []string
		for _, d := range []plan.Device{eth, port, veth, lo} {
			if plan.Matches(&test.m, &d) {
				got = append(got, d.Name)
			}
		}
		qt.Check(t, qt.Equals(strings.Join(got, " "), test.matches), qt.Commentf("%+v", test.m))
	}
}
