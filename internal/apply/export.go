package apply

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/declare"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/programs"
)

// Export returns the members on chains as a document that declares them. The kernel does not tell from which
// file a program was loaded: such attachments name a file that is to be filled in, and the comments, by
// the attachments' indexes, say so. The error is ErrUsage if one document cannot declare them all.
func Export(ctx context.Context, chains []hook.Chain) (*declare.Document, map[int]string, error) {
	d, comments := &declare.Document{Attachments: []declare.Attachment{}}, map[int]string{}
	objects := objects{}
	for i := range chains {
		c := &chains[i]
		for j := range c.Members {
			m := &c.Members[j]
			if m.Kind != hook.KindMember || m.Program.ID == 0 || c.Target == "" {
				continue
			}
			if err := ctx.Err(); err != nil {
				return nil, nil, err
			}
			a, comment := exported(c, m, objects)
			n := slices.IndexFunc(d.Attachments, func(b declare.Attachment) bool { return b.Hook == a.Hook && b.Name == a.Name })
			switch {
			case n < 0:
				if comment != "" {
					comments[len(d.Attachments)] = comment
				}
				d.Attachments = append(d.Attachments, a)
			case sameBut(&d.Attachments[n], &a):
				d.Attachments[n].On.Names = append(d.Attachments[n].On.Names, a.On.Names...)
			default:
				return nil, nil, hook.Because(hook.ErrUsage, "member %q on %s is not the same on %s as elsewhere, and a document has a name once", m.Name, c.Hook, c.Target).
					Hint("export one target at a time")
			}
		}
	}
	return d, comments, nil
}

// exported declares a member.
func exported(c *hook.Chain, m *hook.Member, objects objects) (a declare.Attachment, comment string) {
	a = declare.Attachment{Name: m.Name, Hook: string(c.Hook), On: declare.Match{Names: []string{c.Target}, NetNS: c.NetNS.Name}}
	if c.Hook.OnCgroup() {
		a.On = declare.Match{Cgroup: c.Target}
	}
	a.Order.Priority = m.Priority
	if c.Hook == hook.XDP {
		a.Order.ContinueOn = strings.Split(m.ContinueOn.String(), ",")
		a.Order.OnMissing = cmp.Or(map[bool]string{true: m.OnMissing.String()}[m.OnMissing != 0], "continue")
		if c.Mode == hook.ModeGeneric {
			a.Mode = c.Mode.String()
		}
	}
	mark, _ := dispatcher.MarkOf(m.Program.ID)
	for _, name := range programs.Names() {
		a.Program = declare.Program{Builtin: name}
		if is, err := objects.mark(&a, ""); err == nil && is == mark {
			return a, ""
		}
	}
	a.Program = declare.Program{File: "FILE.o", Entry: m.Program.Name}
	return a, fmt.Sprintf("The kernel does not tell the file, nor the globals, of program %s (tag %s): fill it in.", m.Program.Name, m.Program.Tag)
}

// sameBut tells whether two attachments differ in the names of their devices only.
func sameBut(a, b *declare.Attachment) bool {
	return len(a.On.Names) > 0 && len(b.On.Names) > 0 && a.On.NetNS == b.On.NetNS && a.Program.Builtin == b.Program.Builtin &&
		a.Program.Entry == b.Program.Entry && a.Mode == b.Mode && a.Order.Priority == b.Order.Priority &&
		a.Order.OnMissing == b.Order.OnMissing && slices.Equal(a.Order.ContinueOn, b.Order.ContinueOn)
}
