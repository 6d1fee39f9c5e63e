package main

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// styleFlags choose the style of a chain.
type styleFlags struct {
	style   hook.Style
	version uint8
}

func (s *styleFlags) add(cmd *cobra.Command, text string) {
	flags := cmd.Flags()
	flags.Func("style", text, func(word string) (err error) {
		s.style, err = hook.ParseStyle(word)
		return err
	})
	flags.Func("config-version", "libxdp: version `N` of the chain's configuration, 1 (libxdp up to 1.2), 2 (up to 1.5) or 3: which versions of libxdp can change the chain (default: the version of the libxdp on this machine)", func(word string) error {
		n, err := strconv.ParseUint(word, 10, 8)
		if err != nil || n < 1 || n > libxdp.MaxVersion {
			return fmt.Errorf("must be a number from 1 to %d", libxdp.MaxVersion)
		}
		s.version = uint8(n)
		return nil
	})
	completeFlag(cmd, "style", fixed(string(hook.StyleOwned), string(hook.StyleLibxdp)))
	completeFlag(cmd, "config-version", fixed("1", "2", "3"))
}

// isLibxdp tells whether a program would join a libxdp chain, which keeps no
// names of its own.
func (a *app) isLibxdp(ctx context.Context, t dispatcher.Target, asked hook.Style) bool {
	if t.Hook != hook.XDP || asked == hook.StyleLibxdp {
		return t.Hook == hook.XDP
	}
	c, err := dispatcher.Read(ctx, t, a.readOptions())
	return err == nil && c.Style == hook.StyleLibxdp
}

func (a *app) convertCommand() *cobra.Command {
	var (
		style    styleFlags
		programs []string
		noGap    bool
		owner    string
	)
	cmd := &cobra.Command{
		Use:   "convert xdp TARGET --style STYLE",
		Short: "Move all members of a libxdp chain to an owned chain, or back",
		Long: `Move all members of the chain on a device to a chain of the other style, with
their order, continue sets and maps.

--style owned moves the members of a libxdp chain (xdp-loader), which anyone may
replace, to a chain that a link protects. Programs that use libxdp can no longer
join it.

--style libxdp moves them back: at most 10 members, all of them persistent.

If the kernel allows a member's loaded program behind the other dispatcher, the
program is moved as it is. If not, give its file with --program; it keeps the
maps of the loaded program.

For a moment nothing is attached, and packets pass unfiltered: the kernel does
not let a link replace a program that netlink attached, nor the reverse. With
--no-gap an owned chain comes without a gap, but also without a link: it is not
protected until "adopt" gives it one.`,
		Example: `  dispatcher convert xdp eth0 --style owned
  dispatcher convert xdp eth0 --style owned --program xdp_filter=filter.o --program id:41=other.o:main
  dispatcher convert xdp eth0 --style libxdp --config-version 2`,
		Args:              words(1, "HOOK", "TARGET"),
		ValidArgsFunction: completeArgs(1, offerHooks, a.offerTargets),
		RunE: a.withTarget(func(cmd *cobra.Command, t dispatcher.Target, _ []string) error {
			if style.style == "" {
				return usage("--style owned protects the chain, --style libxdp shares it with C programs", "--style is missing")
			}
			o := dispatcher.ConvertOptions{NoGap: noGap, ConfigVersion: style.version, BPFFS: a.bpffs, Programs: map[hook.Ref]dispatcher.Source{}}
			if style.style == hook.StyleOwned || cmd.Flags().Changed("owner") {
				o.Owner = owner
			}
			for _, text := range programs {
				member, word, ok := strings.Cut(text, "=")
				ref := hook.Ref(member)
				if !ok {
					return usage("as in --program xdp_filter=filter.o", "--program %s: must be MEMBER=PROGRAM", text)
				}
				if err := ref.Check(); err != nil {
					return usage("", "--program %s: %w", text, err)
				}
				from, err := (&programFlags{}).source(a, t.Hook, word)
				if err != nil {
					return err
				}
				defer from.release()
				o.Programs[ref] = from.Source
			}
			if err := a.needBPFFS(true); err != nil {
				return err
			}
			if !noGap {
				a.warnOfConversion(cmd.Context(), t, style.style)
			}
			c, err := dispatcher.Convert(cmd.Context(), t, style.style, o)
			if err != nil {
				return err
			}
			if c.Style == hook.StyleOwned {
				a.warnUnprotected(t, c)
			}
			if a.verbose {
				a.note("%d members are now in %s chain", len(c.Members), map[hook.Style]string{hook.StyleOwned: "an owned", hook.StyleLibxdp: "a libxdp"}[c.Style])
			}
			return nil
		}),
	}
	style.add(cmd, "`STYLE` of the new chain: owned or libxdp")
	flags := cmd.Flags()
	flags.StringArrayVar(&programs, "program", nil, "load a member from a file, or take another program: `MEMBER=PROGRAM`, where MEMBER is a name or id:N and PROGRAM is as for \"attach\" (repeatable)")
	flags.BoolVar(&noGap, "no-gap", false, "owned: let no packet pass unfiltered; the chain is then not protected")
	flags.StringVar(&owner, "owner", "dispatcher", "owned: `LABEL` that names the members' owner")
	return cmd
}

// warnOfConversion says what the conversion costs before it is done.
func (a *app) warnOfConversion(ctx context.Context, t dispatcher.Target, to hook.Style) {
	c, err := dispatcher.Read(ctx, t, a.readOptions())
	if err == nil && len(c.Members) > 0 && c.Style != to && (c.Style == hook.StyleLibxdp || c.Style == hook.StyleOwned && c.Protected()) {
		a.warn("packets on %s pass unfiltered for the short moment in which one chain replaces the other", t.Name())
	}
}
