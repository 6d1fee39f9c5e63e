package main

import (
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

func (a *app) holdersCommand() *cobra.Command {
	var (
		ref         hook.HolderRef
		noIterators bool
	)
	cmd := &cobra.Command{
		Use:   "holders {HOOK TARGET [MEMBER] | --link ID | --program ID | --map ID}",
		Short: "Show what keeps an attachment alive: processes, pins and kernel objects",
		Long: `Show what keeps an attachment alive: the processes that have it open and the
pins, in all pid, mount and network namespaces and in every bpffs, and the
objects in the kernel that refer to it. The holders command itself is not
listed.

The answer says how complete it is: how many of the references that the kernel
counts were found. A descriptor that is on its way through a unix socket, or in
an io_uring, cannot be found; the processes that may have it are named. Without
BPF iterators (Linux 5.8) the completeness is not known, and the answer says so.`,
		Example: `  dispatcher holders xdp eth0
  dispatcher holders tcx/ingress eth0 filter
  dispatcher holders --link 12 -j`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case ref.ID == 0:
				return words(1, "HOOK", "TARGET", "[MEMBER]")(cmd, args)
			case len(args) > 0:
				return usage(seeHelp(cmd), "give a hook and a target, or one of --link, --program and --map, not both")
			}
			return nil
		},
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets, a.offerMembers),
		RunE: func(cmd *cobra.Command, args []string) error {
			if ref.ID != 0 {
				h, err := dispatcher.HoldersOf(cmd.Context(), ref, dispatcher.HoldersOptions{NoIterators: noIterators})
				if err != nil {
					return err
				}
				return a.printHeld([]hook.Held{{What: string(ref.Kind), Holders: *h}})
			}
			args = withoutDev(args, 1)
			t, err := a.target(args[0], args[1])
			if err != nil {
				return err
			}
			var entry hook.Ref
			if len(args) == 3 {
				entry = hook.Ref(args[2])
			}
			held, err := dispatcher.HoldersOn(cmd.Context(), t, entry, dispatcher.HoldersOnOptions{NoIterators: noIterators, BPFFS: a.bpffs})
			if err != nil {
				return err
			}
			if len(held) == 0 {
				a.note("nothing is attached to %s %s", t.Hook, t.Name())
			}
			return a.printHeld(held)
		},
	}
	for kind, text := range map[hook.HolderKind]string{
		hook.HolderLink: "the link with this `ID`", hook.HolderProgram: "the program with this `ID`",
		hook.HolderMap: "the map with this `ID`",
	} {
		cmd.Flags().Func(string(kind), text, func(s string) error {
			id, err := parseID(s)
			if err == nil && ref.ID != 0 {
				err = fmt.Errorf("only one of --link, --program and --map")
			}
			ref = hook.HolderRef{Kind: kind, ID: id}
			return err
		})
	}
	cmd.Flags().BoolVar(&noIterators, "no-iterators", false, "search /proc only: slower, and without a check that all holders were found")
	return cmd
}

// printHeld prints the holders of some objects.
func (a *app) printHeld(held []hook.Held) error {
	if a.format == formatJSON {
		return a.printJSON(struct {
			Version int        `json:"version"`
			Held    []jsonHeld `json:"held"`
		}{schema, describeHeld(held)})
	}
	var b strings.Builder
	for i, h := range held {
		if i > 0 {
			b.WriteByte('\n')
		}
		b.WriteString(heldLine(h) + "\n")
		a.holders(&b, "  ", h.Holders, len(h.Objects))
	}
	return a.print(b.String())
}

func heldLine(h hook.Held) string {
	line := h.HolderRef.String()
	switch {
	case h.What == "slot":
		line = fmt.Sprintf("%s, the slot of %q", line, h.Member)
	case h.What == "link" && h.Member == "" && h.Kind != "":
		line += ", of the hook"
	case h.Member != "":
		line = fmt.Sprintf("%s, of %q (%s)", line, h.Member, h.Kind)
	}
	return line + ": " + complete(h.Holders)
}

// complete says how complete an answer is.
func complete(h hook.Holders) string {
	switch {
	case h.Verified:
		return fmt.Sprintf("%d of %d references found", h.Found, h.Counted)
	case h.Counted == 0:
		return fmt.Sprintf("%d references found, not verifiable: %s", h.Found, oneLine(h.Missing))
	}
	return fmt.Sprintf("%d of %d references found: %s", h.Found, h.Counted, oneLine(h.Missing))
}

// mostObjects is how many kernel objects list shows for an entry. A program may be attached to
// hundreds of cgroups, and each of them would be listed with each.
const mostObjects = 8

// holders writes a line for each holder, but for at most that many objects of the kernel.
func (a *app) holders(b *strings.Builder, indent string, h hook.Holders, most int) {
	var rows [][]cell
	add := func(kind cell, name, where string) {
		row := []cell{kind, {text: name}}
		if where != "" {
			row = append(row, cell{text: where})
		}
		rows = append(rows, row)
	}
	for _, p := range h.Processes {
		add(cell{text: "process"}, processName(p), processWhere(p))
	}
	for _, p := range h.Pins {
		add(cell{text: "pin"}, p.String(), pinAlias(p))
	}
	for i, o := range h.Objects {
		if i == most {
			add(cell{text: "kernel"}, fmt.Sprintf("%d more, which \"dispatcher holders\" shows", len(h.Objects)-most), "")
			break
		}
		name := o.How
		if o.ID != 0 {
			name = o.HolderRef.String() + " " + o.How
		}
		add(cell{text: "kernel"}, name, "")
	}
	for _, s := range h.Suspects {
		add(cell{text: "maybe", color: yellow}, fmt.Sprintf("pid %d %s", s.PID, oneLine(s.Comm)), s.Why)
	}
	a.table(b, indent, rows)
}

func processName(p hook.HolderProcess) string {
	fds := make([]string, len(p.FDs))
	for i, fd := range p.FDs {
		fds[i] = strconv.Itoa(fd)
	}
	name := fmt.Sprintf("pid %d %s", p.PID, oneLine(p.Comm))
	if p.TID != 0 {
		name += fmt.Sprintf(" (thread %d)", p.TID)
	}
	return name + ", fd " + strings.Join(fds, ",")
}

func processWhere(p hook.HolderProcess) string {
	parts := []string{orDash(oneLine(p.Exe))}
	switch {
	case p.Container != "":
		parts = append(parts, "container "+p.Container)
	case p.Unit != "":
		parts = append(parts, p.Unit)
	case p.Cgroup != "":
		parts = append(parts, "cgroup "+p.Cgroup)
	}
	return strings.Join(parts, "  ")
}

// pinAlias says under which other names the bpffs has a pin.
func pinAlias(p hook.HolderPin) string {
	if p.Path == "" || len(p.Names) < 2 {
		return ""
	}
	return "the same as " + strings.Join(p.Names[1:], ", ")
}

type jsonHeld struct {
	What       string               `json:"what"`
	Member     string               `json:"member,omitempty"`
	Kind       hook.Kind            `json:"kind,omitempty"`
	ID         uint32               `json:"id"`
	Holders    []any                `json:"holders"` // jsonProcess, jsonPin, jsonObject
	References jsonReferences       `json:"references"`
	Suspects   []hook.HolderSuspect `json:"suspects"`
}

type jsonReferences struct {
	Found    int    `json:"found"`
	Counted  int    `json:"counted"` // 0 when it is not known
	Verified bool   `json:"verified"`
	Missing  string `json:"missing,omitempty"`
}

type jsonProcess struct {
	Kind string `json:"kind"`
	hook.HolderProcess
}

type jsonPin struct {
	Kind string `json:"kind"`
	hook.HolderPin
	MountNS uint64 `json:"mount_ns,omitempty"`
}

type jsonObject struct {
	Kind string `json:"kind"`
	hook.HolderObject
}

func describeHeld(held []hook.Held) []jsonHeld {
	list := make([]jsonHeld, 0, len(held))
	for _, h := range held {
		j := jsonHeld{
			What: h.What, Member: h.Member, Kind: h.Kind, ID: h.ID, Holders: []any{},
			References: jsonReferences{h.Found, h.Counted, h.Verified, h.Missing}, Suspects: append([]hook.HolderSuspect{}, h.Suspects...),
		}
		for _, p := range h.Processes {
			j.Holders = append(j.Holders, jsonProcess{"process", p})
		}
		for _, p := range h.Pins {
			pin := jsonPin{Kind: "pin", HolderPin: p}
			if len(p.Mounts) > 0 {
				pin.MountNS = p.Mounts[0].NS
			}
			j.Holders = append(j.Holders, pin)
		}
		for _, o := range h.Objects {
			j.Holders = append(j.Holders, jsonObject{"object", o})
		}
		list = append(list, j)
	}
	return list
}
