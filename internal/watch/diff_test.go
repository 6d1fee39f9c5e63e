package watch

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/hook"
)

// look returns a Look at these chains.
func look(chains ...hook.Chain) *Look { return &Look{Chains: chains} }

// at returns a chain on a device, by default of index 2 in the namespace 100. parseEntry
// makes the entries.
func at(h hook.Hook, target string, entries ...string) hook.Chain {
	c := hook.Chain{Hook: h, Target: target, Ifindex: 2, NetNS: hook.NetNS{Inode: 4026531840, Cookie: 100}}
	if h.OnCgroup() {
		c.Ifindex, c.NetNS, c.CgroupID = 0, hook.NetNS{}, 77
	}
	for _, e := range entries {
		c.Members = append(c.Members, parseEntry(h, e))
	}
	return c
}

func on(c hook.Chain, change func(*hook.Chain)) hook.Chain {
	change(&c)
	return c
}

// byLink sets the link of an XDP chain.
func byLink(id uint32) func(*hook.Chain) { return func(c *hook.Chain) { c.LinkID = id } }

// parseEntry reads "name:priority/id=program", where id is the id of the link or slot. A
// star behind that means that the entry is pinned; a state follows in brackets. A name that
// begins with "legacy" or "foreign" is not a member's; a name with "filter" is a filter's.
func parseEntry(h hook.Hook, text string) hook.Member {
	m := hook.Member{Kind: hook.KindMember, State: hook.StateRunning}
	text, state, ok := strings.Cut(text, "(")
	if ok {
		m.State = hook.State(strings.TrimSuffix(state, ")"))
	}
	text, m.Persistent = strings.CutSuffix(text, "*")
	text, program, _ := strings.Cut(text, "=")
	fmt.Sscan(program, &m.Program.ID)
	text, id, _ := strings.Cut(text, "/")
	name, priority, _ := strings.Cut(text, ":")
	fmt.Sscan(priority, &m.Priority)
	m.Name = name
	switch {
	case strings.HasPrefix(name, "legacy"):
		m.Kind = hook.KindLegacy
	case strings.HasPrefix(name, "foreign"):
		m.Kind = hook.KindForeign
	}
	switch {
	case strings.Contains(name, "filter"):
		f := hook.Filter{Parent: 0xfffffff2, Handle: 1}
		fmt.Sscan(id, &f.Pref)
		m.Filter = &f
	case h == hook.XDP && m.Kind == hook.KindMember:
		fmt.Sscan(id, &m.SlotID)
	case h != hook.XDP:
		fmt.Sscan(id, &m.LinkID)
	}
	return m
}

func words(events []hook.Event) []string {
	list := []string{}
	for _, e := range events {
		s := string(e.Kind)
		switch {
		case e.Kind == hook.EventMoved:
			s += fmt.Sprintf(" %s %s>%s", e.Hook, e.From.Target, e.Target)
		case e.Entry == "":
			s += " " + string(e.Hook)
		default:
			s += fmt.Sprintf(" %s %d>%d/%d", e.Name, e.PositionBefore, e.PositionAfter, e.Entries)
		}
		if e.By != nil {
			s += " by " + e.By.Name
		}
		if e.Twin != nil {
			s += " as " + e.Twin.Name
		}
		list = append(list, s)
	}
	return list
}

const tcx, cg = hook.TCXIngress, hook.CgroupSKBIngress

func TestDiff(t *testing.T) {
	extension := []hook.Extension{{LinkID: 30}}
	replaced := func(c *hook.Chain) { c.Members[0].Extensions = extension }
	bypassed := func(c *hook.Chain) { c.Extensions = extension }
	elsewhere := func(c *hook.Chain) { c.NetNS.Cookie, c.Ifindex = 101, 5 }
	gone := func(c *hook.Chain) { c.Target, c.Ifindex, c.CgroupID, c.NetNS = "", 0, 0, hook.NetNS{} }
	for name, test := range map[string]struct {
		before, after *Look
		want          []string
	}{
		"nothing":         {look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "a:10/1=1")), nil},
		"attached":        {look(), look(at(tcx, "eth0", "a:10/1=1")), []string{"attached a 0>1/1"}},
		"attached before": {look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "b:5/2=2", "a:10/1=1")), []string{"attached b 0>1/2"}},
		"by age": {
			look(), look(at(tcx, "eth0", "c:1/30=3", "a:2/10=1", "b:3/20=2")),
			[]string{"attached a 0>2/3", "attached b 0>3/3", "attached c 0>1/3"},
		},
		"left":       {look(at(tcx, "eth0", "a:10/1=1", "b:20/2=2")), look(at(tcx, "eth0", "b:20/2=2")), []string{"left a 1>0/1"}},
		"the last":   {look(at(tcx, "eth0", "a:10/1=1")), look(), []string{"left a 1>0/0"}},
		"updated":    {look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "a:10/1=2")), []string{"updated a 1>1/1"}},
		"pinned":     {look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "a:10/1=1*")), []string{"pinned a 1>1/1"}},
		"unpinned":   {look(at(tcx, "eth0", "a:10/1=1*")), look(at(tcx, "eth0", "a:10/1=1")), []string{"unpinned a 1>1/1"}},
		"set":        {look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "a:11/1=1")), []string{"set a 1>1/1"}},
		"set, moved": {look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "a:11/3=1")), []string{"set a 1>1/1"}},
		"reordered by a new link": {
			look(at(tcx, "eth0", "a:10/1=1", "b:20/2=2")), look(at(tcx, "eth0", "b:20/2=2", "a:30/3=1")),
			[]string{"reordered a 1>2/2"},
		},
		"reordered up": {
			look(at(tcx, "eth0", "a:10/1=1", "b:20/2=2", "c:30/3=3")), look(at(tcx, "eth0", "c:5/4=3", "a:10/1=1", "b:20/2=2")),
			[]string{"reordered c 3>1/3"},
		},
		"new link, same place":  {look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "a:10/3=1")), []string{"attached a 1>1/1"}},
		"same name, another":    {look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "a:10/3=2")), []string{"left a 1>0/1", "attached a 0>1/1"}},
		"named":                 {look(at(tcx, "eth0", "foreign/1=1")), look(at(tcx, "eth0", "a:10/1=1")), []string{"named a 1>1/1"}},
		"not named any more":    {look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "foreign/1=1")), []string{"named foreign 1>1/1"}},
		"updated and pinned":    {look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "a:10/1=2*")), []string{"updated a 1>1/1", "pinned a 1>1/1"}},
		"others do not reorder": {look(at(tcx, "eth0", "a:1/1=1", "b:2/2=2")), look(at(tcx, "eth0", "x:0/9=9", "b:2/2=2")), []string{"left a 1>0/2", "attached x 0>1/2"}},
		"overtaken": {
			look(at(tcx, "eth0", "a:10/1=1", "b:20/2=2")), look(at(tcx, "eth0", "foreign/9=9", "a:10/1=1", "b:20/2=2")),
			[]string{"attached foreign 0>1/3", "overtaken a 1>2/3 by foreign"},
		},
		"overtaken in the middle": {
			look(at(tcx, "eth0", "a:10/1=1", "b:20/2=2")), look(at(tcx, "eth0", "a:10/1=1", "legacy=9", "b:20/2=2")),
			[]string{"attached legacy 0>2/3", "overtaken b 2>3/3 by legacy"},
		},
		"overtaken by one that was behind": {
			look(at(tcx, "eth0", "a:10/1=1", "b:20/2=2", "foreign/9=9")), look(at(tcx, "eth0", "foreign/9=9", "a:10/1=1", "b:20/2=2")),
			[]string{"reordered foreign 3>1/3", "overtaken a 1>2/3 by foreign"},
		},
		"put back beside its member": {
			look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "a:10/1=1"), at(hook.TCIngress, "eth0", "legacyfilter/7=1")),
			[]string{"attached legacyfilter 0>1/1 as a"},
		},
		"two members of one program": {look(at(cg, "/c", "a:10/1=1")), look(at(cg, "/c", "a:10/1=1", "b:20/2=1")), []string{"attached b 0>2/2"}},
		"the same on another device": {
			look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "a:10/1=1"), on(at(tcx, "eth1", "foreign/7=1"), elsewhere)),
			[]string{"attached foreign 0>1/1"},
		},
		"behind is not overtaken":  {look(at(tcx, "eth0", "a:10/1=1")), look(at(tcx, "eth0", "a:10/1=1", "foreign/9=9")), []string{"attached foreign 0>2/2"}},
		"new behind a foreign one": {look(at(tcx, "eth0", "foreign/9=9")), look(at(tcx, "eth0", "foreign/9=9", "a:10/1=1")), []string{"attached a 0>2/2"}},
		"renamed": {
			look(at(tcx, "eth0", "a:10/1=1", "b:20/2=2")), look(at(tcx, "wan", "a:10/1=1", "b:20/2=2")),
			[]string{"moved tcx/ingress eth0>wan"},
		},
		"to another namespace": {
			look(at(tcx, "eth0", "a:10/1=1", "b:20/2=2")), look(on(at(tcx, "eth0", "a:10/1=1", "b:20/2=2"), elsewhere)),
			[]string{"moved tcx/ingress eth0>eth0"},
		},
		"moved and changed": {
			look(at(tcx, "eth0", "a:10/1=1", "b:20/2=2")), look(on(at(tcx, "wan", "a:10/1=5", "c:9/3=3"), elsewhere)),
			[]string{"moved tcx/ingress eth0>wan", "left b 2>0/0", "updated a 1>1/2", "attached c 0>2/2"},
		},
		"another name of the namespace": {
			look(at(tcx, "eth0", "a:10/1=1")), look(on(at(tcx, "eth0", "a:10/1=1"), func(c *hook.Chain) { c.NetNS.Name = "blue" })), nil,
		},
		"filters go with the namespace": {
			look(at(hook.TCIngress, "eth0", "legacy filter/7=1")), look(on(at(hook.TCIngress, "eth0", "legacy filter/7=1"), elsewhere)),
			[]string{"left legacy filter 1>0/0", "attached legacy filter 0>1/1"},
		},
		"defunct": {
			look(at(tcx, "eth0", "a:10/1=1")), &Look{Links: map[uint32]LinkState{1: LinkDefunct}},
			[]string{"defunct a 1>0/0"},
		},
		"defunct and shown": {
			look(at(tcx, "eth0", "a:10/1=1")),
			&Look{Chains: []hook.Chain{on(at(tcx, "", "a:10/1=1(defunct)"), gone)}, Links: map[uint32]LinkState{1: LinkDefunct}},
			[]string{"defunct a 1>0/0"},
		},
		"detached and still held":  {look(at(tcx, "eth0", "a:10/1=1")), look(on(at(tcx, "", "a:10/1=1(defunct)"), gone)), []string{"left a 1>0/0"}},
		"defunct, and let go":      {look(on(at(tcx, "", "a:10/1=1(defunct)"), gone)), look(), nil},
		"defunct all the time":     {look(), look(on(at(tcx, "", "a:10/1=1(defunct)"), gone)), nil},
		"out of sight":             {look(at(tcx, "eth0", "a:10/1=1", "b:1/2=2")), &Look{Links: map[uint32]LinkState{1: LinkElsewhere, 2: LinkElsewhere}}, []string{"moved tcx/ingress eth0>"}},
		"legacy replaced":          {look(at(cg, "/a", "legacy=1", "b:1/2=2")), look(at(cg, "/a", "legacy=3", "b:1/2=2")), []string{"updated legacy 1>1/2"}},
		"legacy of TCX adopted":    {look(at(tcx, "eth0", "legacy=1")), look(at(tcx, "eth0", "a:1/1=1")), []string{"adopted a 1>1/1"}},
		"a filter adopted":         {look(at(hook.TCIngress, "eth0", "legacy filter/7=1")), look(at(tcx, "eth0", "a:1/1=1")), []string{"adopted a 1>1/1"}},
		"a filter updated":         {look(at(hook.TCIngress, "eth0", "legacy filter/7=1")), look(at(hook.TCIngress, "eth0", "legacy filter/7=2")), []string{"updated legacy filter 1>1/1"}},
		"a filter reordered":       {look(at(hook.TCIngress, "eth0", "filter a:7/7=1", "filter b:9/9=2")), look(at(hook.TCIngress, "eth0", "filter b:9/9=2", "filter a:20/20=1")), []string{"reordered filter a 1>2/2"}},
		"a cgroup twice":           {look(at(cg, "/a", "a:1/1=1")), look(at(cg, "/a", "a:1/1=1", "b:2/2=1")), []string{"attached b 0>2/2"}},
		"a cgroup of another id":   {look(at(cg, "/a", "legacy=1")), look(on(at(cg, "/a", "legacy=1"), func(c *hook.Chain) { c.CgroupID = 78 })), []string{"left legacy 1>0/0", "attached legacy 0>1/1"}},
		"extended":                 {look(at(tcx, "eth0", "a:10/1=1")), look(on(at(tcx, "eth0", "a:10/1=1(bypassed)"), replaced)), []string{"extended a 1>1/1"}},
		"extended from the start":  {look(), look(on(at(tcx, "eth0", "a:10/1=1(bypassed)"), replaced)), []string{"attached a 0>1/1", "extended a 0>1/1"}},
		"extended all the time":    {look(on(at(tcx, "eth0", "a:10/1=1(bypassed)"), replaced)), look(on(at(tcx, "eth0", "a:10/1=1(bypassed)"), replaced)), nil},
		"restored":                 {look(on(at(tcx, "eth0", "a:10/1=1(bypassed)"), replaced)), look(at(tcx, "eth0", "a:10/1=1")), []string{"restored a 1>1/1"}},
		"restored by an update":    {look(on(at(tcx, "eth0", "a:10/1=1(bypassed)"), replaced)), look(at(tcx, "eth0", "a:10/1=2")), []string{"updated a 1>1/1", "restored a 1>1/1"}},
		"extended and left":        {look(on(at(tcx, "eth0", "a:10/1=1(bypassed)"), replaced)), look(), []string{"left a 1>0/0"}},
		"XDP extended":             {look(at(hook.XDP, "eth0", "a:1/5=1", "b:2/6=2")), look(on(at(hook.XDP, "eth0", "a:1/5=1(bypassed)", "b:2/6=2(bypassed)"), bypassed)), []string{"extended xdp"}},
		"XDP restored by a change": {look(on(at(hook.XDP, "eth0", "b:2/6=2(bypassed)"), bypassed)), look(at(hook.XDP, "eth0", "a:1/5=1", "b:2/6=2")), []string{"attached a 0>1/2", "restored xdp"}},
		"XDP extended at once":     {look(), look(on(at(hook.XDP, "eth0", "a:1/5=1(bypassed)", "b:2/6=2(bypassed)"), bypassed)), []string{"attached a 0>1/2", "attached b 0>2/2", "extended xdp"}},
		"XDP emptied and extended": {look(at(hook.XDP, "eth0", "a:1/5=1")), look(on(at(hook.XDP, "eth0", "a:1/5=0(empty)"), bypassed)), []string{"emptied a 1>1/1", "extended xdp"}},
		"XDP attached":             {look(), look(on(at(hook.XDP, "eth0", "a:1/5=1"), byLink(3))), []string{"attached a 0>1/1"}},
		"XDP emptied":              {look(at(hook.XDP, "eth0", "a:1/5=1")), look(at(hook.XDP, "eth0", "a:1/5=0(empty)")), []string{"emptied a 1>1/1"}},
		"XDP left empty":           {look(at(hook.XDP, "eth0", "a:1/5=0(empty)", "b:2/6=1")), look(at(hook.XDP, "eth0", "b:2/6=1")), []string{"left a 1>0/1"}},
		"XDP door opened":          {look(at(hook.XDP, "eth0", "a:1/5=0(empty)")), look(at(hook.XDP, "eth0", "a:1/7=1")), []string{"attached a 1>1/1"}},
		"XDP reordered":            {look(at(hook.XDP, "eth0", "a:1/5=1", "b:2/6=2")), look(at(hook.XDP, "eth0", "b:2/6=2", "a:3/5=1")), []string{"reordered a 1>2/2"}},
		"XDP both set":             {look(at(hook.XDP, "eth0", "a:1/5=1", "b:2/6=2")), look(at(hook.XDP, "eth0", "a:3/5=1", "b:4/6=2")), []string{"set a 1>1/2", "set b 2>2/2"}},
		"XDP legacy updated":       {look(at(hook.XDP, "eth0", "legacy=1")), look(at(hook.XDP, "eth0", "legacy=2")), []string{"updated legacy 1>1/1"}},
		"XDP legacy moved":         {look(at(hook.XDP, "eth0", "legacy=1")), look(on(at(hook.XDP, "eth0", "legacy=1"), elsewhere)), []string{"moved xdp eth0>eth0"}},
		"XDP legacy renamed":       {look(at(hook.XDP, "eth0", "legacy=1")), look(at(hook.XDP, "wan", "legacy=1")), []string{"moved xdp eth0>wan"}},
		"XDP adopted":              {look(at(hook.XDP, "eth0", "legacy=1")), look(on(at(hook.XDP, "eth0", "a:1/5=1"), byLink(3))), []string{"adopted a 1>1/1"}},
		"XDP foreign to chain":     {look(on(at(hook.XDP, "eth0", "foreign=1"), byLink(2))), look(on(at(hook.XDP, "eth0", "a:1/5=2"), byLink(3))), []string{"left foreign 1>0/1", "attached a 0>1/1"}},
		"XDP foreign updated":      {look(on(at(hook.XDP, "eth0", "foreign=1"), byLink(2))), look(on(at(hook.XDP, "eth0", "foreign=9"), byLink(2))), []string{"updated foreign 1>1/1"}},
		"XDP foreign by another":   {look(on(at(hook.XDP, "eth0", "foreign=1"), byLink(2))), look(on(at(hook.XDP, "eth0", "foreign=9"), byLink(3))), []string{"left foreign 1>0/1", "attached foreign 0>1/1"}},
		"XDP moved":                {look(on(at(hook.XDP, "eth0", "a:1/5=1"), byLink(3))), look(on(on(at(hook.XDP, "eth0", "a:1/5=1"), byLink(3)), elsewhere)), []string{"moved xdp eth0>eth0"}},
		"XDP defunct":              {look(on(at(hook.XDP, "eth0", "a:1/5=1", "b:2/6=2"), byLink(3))), &Look{Links: map[uint32]LinkState{3: LinkDefunct}}, []string{"defunct a 1>0/0", "defunct b 2>0/0"}},
		"XDP displaced":            {look(on(at(hook.XDP, "eth0", "a:1/5=1*"), byLink(3))), look(on(at(hook.XDP, "eth0", "foreign=7", "a/5=1*(displaced)"), byLink(3))), []string{"displaced a 1>2/2", "attached foreign 0>1/2"}},
		"XDP back in its place":    {look(on(at(hook.XDP, "eth0", "foreign=7", "a/5=1*(displaced)"), byLink(3))), look(on(at(hook.XDP, "eth0", "a:1/5=1*"), byLink(3))), []string{"left foreign 1>0/1", "attached a 2>1/1"}},
		"two devices, one program": {look(at(hook.XDP, "eth0", "legacy=1")), look(at(hook.XDP, "eth0", "legacy=1"), on(at(hook.XDP, "eth0", "legacy=1"), elsewhere)), []string{"attached legacy 0>1/1"}},
	} {
		t.Run(name, func(t *testing.T) {
			if test.want == nil {
				test.want = []string{}
			}
			Settle(test.before, test.after)
			qt.Check(t, qt.DeepEquals(words(Diff(test.before, test.after)), test.want))
		})
	}
}

// An entry that could not be read did not leave. The failure is reported once.
func TestUnreadable(t *testing.T) {
	broken := errors.New("broken")
	ns := hook.NetNS{Inode: 4026531840, Cookie: 100}
	eth0, group := at(tcx, "eth0", "a:10/1=1"), at(cg, "/a", "b:10/2=2")
	for name, unread := range map[string]hook.Chain{
		"hook":      {Hook: tcx, Target: "eth0", Ifindex: 2, NetNS: ns, Err: broken},
		"namespace": {NetNS: ns, Err: broken},
		"cgroup":    {Hook: "cgroup", Target: "/a", Err: broken},
		"cgroups":   {Err: broken},
	} {
		t.Run(name, func(t *testing.T) {
			first := look(eth0, group)
			var rest []hook.Chain
			if !strings.HasPrefix(name, "cgroup") {
				rest = append(rest, group)
			} else {
				rest = append(rest, eth0)
			}
			second, third := look(append(rest, unread)...), look(append(rest, unread)...)
			Settle(first, second)
			events := Diff(first, second)
			qt.Assert(t, qt.HasLen(events, 1))
			qt.Check(t, qt.Equals(events[0].Kind, hook.EventUnreadable))
			qt.Check(t, qt.Equals(events[0].Err, "broken"))
			Settle(second, third)
			qt.Check(t, qt.HasLen(Diff(second, third), 0))
			fourth := look(eth0, group)
			Settle(third, fourth)
			qt.Check(t, qt.HasLen(Diff(third, fourth), 0))
		})
	}
}

// A link stays where it was while its place is not found.
func TestUnsettled(t *testing.T) {
	before := look(on(at(hook.XDP, "eth0", "a:1/5=1"), byLink(3)), at(tcx, "eth0", "b:1/4=1"))
	homeless := func(h hook.Hook, entry string, link uint32) hook.Chain {
		return hook.Chain{Hook: h, Ifindex: 2, LinkID: link, Members: []hook.Member{parseEntry(h, entry)}, Err: errors.New("not found")}
	}
	now := look(homeless(hook.XDP, "foreign=2", 3), homeless(tcx, "foreign/4=1", 0))
	qt.Check(t, qt.DeepEquals(before.Missing(now), []uint32{3, 4}))
	now.Links = map[uint32]LinkState{3: LinkUnsettled, 4: LinkUnsettled}
	Settle(before, now)
	qt.Check(t, qt.DeepEquals(words(Diff(before, now)), []string{}))
	later := &Look{Links: map[uint32]LinkState{3: LinkDefunct, 4: LinkDefunct}}
	Settle(now, later)
	qt.Check(t, qt.DeepEquals(words(Diff(now, later)), []string{"defunct a 1>0/0", "defunct b 1>0/0"}))
}

// A hook that changed during the look counts as unchanged until the next look.
func TestDoubtful(t *testing.T) {
	before := look(at(cg, "/a", "a:1/1=1"))
	now := look(at(cg, "/a", "a:1/1=1", "legacy=2"))
	now.Doubtful = []hook.EventTarget{now.Chains[0].At()}
	Settle(before, now)
	qt.Check(t, qt.HasLen(Diff(before, now), 0))
}

// Of n entries in any order, those that are not reported as moved are in rising order.
func TestUnmoved(t *testing.T) {
	none := func(int) bool { return false }
	for _, test := range []struct {
		order   []int
		suspect func(int) bool
		want    []bool
	}{
		{nil, none, []bool{}},
		{[]int{1, 2, 3}, none, []bool{true, true, true}},
		{[]int{3, 1, 2}, none, []bool{false, true, true}},
		{[]int{2, 3, 1}, none, []bool{true, true, false}},
		{[]int{2, 1}, func(i int) bool { return i == 0 }, []bool{false, true}},
		{[]int{2, 1}, func(i int) bool { return i == 1 }, []bool{true, false}},
		{[]int{1, 2}, func(int) bool { return true }, []bool{true, true}},
		{[]int{2, 1}, func(int) bool { return true }, []bool{true, false}},
	} {
		got := append([]bool{}, unmoved(test.order, test.suspect)...)
		qt.Check(t, qt.DeepEquals(got, test.want), qt.Commentf("%v", test.order))
	}
}
