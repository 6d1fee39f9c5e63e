package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/programs"
)

const noFiles = cobra.ShellCompDirectiveNoFileComp

// An offer is what the shell offers for a word, given the ones before it. It
// offers nothing when something fails: there is no place to say so.
type offer func(ctx context.Context, given []string, word string) ([]string, cobra.ShellCompDirective)

// completeArgs offers words for the arguments of a verb, one offer for each.
// before is as for withoutDev.
func completeArgs(before int, offers ...offer) cobra.CompletionFunc {
	return func(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(given) > before && given[before] == "dev" {
			given = append(given[:before:before], given[before+1:]...)
		}
		if len(given) >= len(offers) {
			return nil, noFiles
		}
		return offers[len(given)](cmd.Context(), given, word)
	}
}

// completeFlag offers words for a flag.
func completeFlag(cmd *cobra.Command, flag string, words func() []string) {
	err := cmd.RegisterFlagCompletionFunc(flag, func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
		return words(), noFiles
	})
	if err != nil {
		panic(err) // there is no such flag: a slip in this program
	}
}

func fixed(words ...string) func() []string { return func() []string { return words } }

func offerHooks(context.Context, []string, string) ([]string, cobra.ShellCompDirective) {
	var names []string
	for _, h := range hook.Hooks() {
		names = append(names, string(h))
	}
	return names, noFiles
}

// offerDevices offers those of the network namespace of --netns.
func (a *app) offerDevices(context.Context, []string, string) ([]string, cobra.ShellCompDirective) {
	ns, err := kernel.OpenNetNS(a.netns)
	if err != nil {
		return nil, noFiles
	}
	defer ns.Close()
	var names []string
	_ = ns.Do(func() error {
		devices, err := net.Interfaces()
		for _, d := range devices {
			names = append(names, d.Name)
		}
		return err
	})
	return names, noFiles
}

func (a *app) offerMembers(ctx context.Context, given []string, _ string) ([]string, cobra.ShellCompDirective) {
	t, err := a.target(given[0], given[1])
	if err != nil {
		return nil, noFiles
	}
	chain, err := dispatcher.Read(ctx, t, a.readOptions())
	if err != nil {
		return nil, noFiles
	}
	var names []string
	for _, m := range chain.Members {
		if m.Kind == hook.KindMember {
			names = append(names, cobra.CompletionWithDesc(m.Name, m.Program.Name))
		}
	}
	return names, noFiles
}

// offerPrograms offers built-in programs and pins; files are up to the shell.
func offerPrograms(_ context.Context, _ []string, word string) ([]string, cobra.ShellCompDirective) {
	if path, ok := strings.CutPrefix(word, fromPin+":"); ok {
		return offerPins(path)
	}
	if word == "" || !strings.HasPrefix(word, fromBuiltin+":") && !strings.HasPrefix(fromBuiltin+":", word) {
		return nil, cobra.ShellCompDirectiveDefault
	}
	var names []string
	for _, name := range programs.Names() {
		names = append(names, cobra.CompletionWithDesc(fromBuiltin+":"+name, programs.Describe(name)))
	}
	return names, noFiles
}

func offerPins(path string) ([]string, cobra.ShellCompDirective) {
	dir, base := filepath.Split(path)
	entries, _ := os.ReadDir(dir)
	var names []string
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), base) {
			continue
		}
		name := fromPin + ":" + dir + e.Name()
		if e.IsDir() {
			name += "/"
		}
		names = append(names, name)
	}
	return names, noFiles | cobra.ShellCompDirectiveNoSpace
}

// netnsNames lists the namespaces that have a name, as "ip netns" does.
func netnsNames() []string {
	entries, _ := os.ReadDir("/run/netns")
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}
