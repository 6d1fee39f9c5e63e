package main

import (
	"context"
	"fmt"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/cilium/ebpf"
	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/load"
	"github.com/libdispatcher/dispatcher/internal/typed"
	"github.com/libdispatcher/dispatcher/programs"
)

const noFiles = cobra.ShellCompDirectiveNoFileComp

// An offer returns what the shell offers for a word, after the given ones. When
// something fails it offers nothing, because the shell cannot show an error.
type offer func(ctx context.Context, given []string, word string) ([]string, cobra.ShellCompDirective)

// completeArgs offers words for the arguments of a verb, with one offer for
// each argument. before has the same meaning as in withoutDev.
func completeArgs(before int, offers ...offer) cobra.CompletionFunc {
	return func(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
		if len(given) > before && announces(given, before) {
			given = append(given[:before:before], given[before+1:]...)
		}
		if len(given) >= len(offers) {
			return nil, noFiles
		}
		return offers[len(given)](cmd.Context(), given, word)
	}
}

// completeFlag offers words for a flag.
func completeFlag(cmd *cobra.Command, flag string, words cobra.CompletionFunc) {
	if err := cmd.RegisterFlagCompletionFunc(flag, words); err != nil {
		panic(err) // there is no such flag: a mistake in this program
	}
}

func fixed(words ...string) cobra.CompletionFunc { return cobra.FixedCompletions(words, noFiles) }

func offerWords(words ...string) offer {
	return func(context.Context, []string, string) ([]string, cobra.ShellCompDirective) { return words, noFiles }
}

var (
	offerHooks  = offerWords(wordsOf(hook.Hooks())...)
	offerListed = offerWords(listedWords()...) // hooks and families
)

// offerTargets offers cgroups or devices, according to the hook.
func (a *app) offerTargets(ctx context.Context, given []string, word string) ([]string, cobra.ShellCompDirective) {
	if hook.Hook(given[0]).OnCgroup() {
		return offerCgroups(word)
	}
	return a.offerDevices(ctx, given, word)
}

// offerCgroups offers the cgroups at the level of the incomplete path, which may
// also be relative to the mount.
func offerCgroups(word string) ([]string, cobra.ShellCompDirective) {
	root, err := kernel.CgroupRoot()
	if err != nil {
		return nil, noFiles
	}
	if word != root && strings.HasPrefix(root, word) {
		return []string{root + "/"}, noFiles | cobra.ShellCompDirectiveNoSpace
	}
	dir, base := filepath.Split(word)
	at := dir
	if !strings.HasPrefix(dir, root) {
		at = filepath.Join(root, dir)
	}
	var names []string
	for _, e := range entriesOf(at, base) {
		if e.IsDir() {
			names = append(names, dir+e.Name())
		}
	}
	return names, noFiles | cobra.ShellCompDirectiveNoSpace
}

// entriesOf returns what is in a folder and begins with these letters.
func entriesOf(dir, letters string) []os.DirEntry {
	entries, _ := os.ReadDir(dir)
	return slices.DeleteFunc(entries, func(e os.DirEntry) bool { return !strings.HasPrefix(e.Name(), letters) })
}

// offerDevices offers the devices of the network namespace of --netns.
func (a *app) offerDevices(context.Context, []string, string) ([]string, cobra.ShellCompDirective) {
	var names []string
	_ = kernel.InNetNS(a.netns, func() error {
		devices, err := net.Interfaces()
		for _, d := range devices {
			names = append(names, d.Name)
		}
		return err
	})
	return names, noFiles
}

func (a *app) offerMembers(ctx context.Context, given []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.offerEntries(ctx, given, (*hook.Member).Named)
}

// offerLegacy offers the programs that can be adopted.
func (a *app) offerLegacy(ctx context.Context, given []string, _ string) ([]string, cobra.ShellCompDirective) {
	return a.offerEntries(ctx, given, func(m *hook.Member) bool { return m.Kind == hook.KindLegacy })
}

// completeRef offers references for --before and --after.
func (a *app) completeRef(cmd *cobra.Command, given []string, _ string) ([]string, cobra.ShellCompDirective) {
	if given = withoutDev(given, 1); len(given) < 2 {
		return nil, noFiles
	}
	return a.offerEntries(cmd.Context(), given, func(*hook.Member) bool { return true })
}

// offerEntries offers the wanted entries of a hook.
func (a *app) offerEntries(ctx context.Context, given []string, wanted func(*hook.Member) bool) ([]string, cobra.ShellCompDirective) {
	t, err := a.target(given[0], given[1])
	if err != nil {
		return nil, noFiles
	}
	chain, err := dispatcher.Read(ctx, t, a.readOptions())
	if err != nil {
		return nil, noFiles
	}
	var names []string
	for i := range chain.Members {
		if m := &chain.Members[i]; wanted(m) {
			names = append(names, cobra.CompletionWithDesc(string(m.Ref()), m.Program.Name))
		}
	}
	return names, noFiles
}

// offerPrograms offers the hook's built-in programs, and pins. The shell itself
// offers files.
func offerPrograms(_ context.Context, given []string, word string) ([]string, cobra.ShellCompDirective) {
	if path, ok := strings.CutPrefix(word, fromPin+":"); ok {
		return offerPins(path)
	}
	if word == "" { // files as well
		kinds := []string{fromBuiltin + ":", fromID + ":", fromPin + ":"}
		return kinds, cobra.ShellCompDirectiveDefault | cobra.ShellCompDirectiveNoSpace
	}
	if !strings.HasPrefix(word, fromBuiltin+":") && !strings.HasPrefix(fromBuiltin+":", word) {
		return nil, cobra.ShellCompDirectiveDefault
	}
	var names []string
	for _, name := range programs.Names() {
		if programs.Function(name, hook.Hook(given[0])) != "" {
			names = append(names, cobra.CompletionWithDesc(fromBuiltin+":"+name, programs.Describe(name)))
		}
	}
	return names, noFiles
}

func offerPins(path string) ([]string, cobra.ShellCompDirective) {
	dir, base := filepath.Split(path)
	var names []string
	for _, e := range entriesOf(dir, base) {
		name := fromPin + ":" + dir + e.Name()
		if e.IsDir() {
			name += "/"
		}
		names = append(names, name)
	}
	return names, noFiles | cobra.ShellCompDirectiveNoSpace
}

// completeGlobal offers the constants and variables of PROGRAM, which is the last word.
func completeGlobal(_ *cobra.Command, given []string, _ string) ([]string, cobra.ShellCompDirective) {
	if len(given) == 0 {
		return nil, noFiles
	}
	w, err := parseProgram(given[len(given)-1], isFile)
	if err != nil {
		return nil, noFiles
	}
	var spec *ebpf.CollectionSpec
	switch w.kind {
	case fromBuiltin:
		spec, err = programs.Spec(w.name)
	case fromFile:
		var b []byte
		if b, err = load.ReadFile(w.path); err == nil {
			spec, err = load.Parse(b)
		}
	}
	if err != nil || spec == nil {
		return nil, noFiles
	}
	var names []string
	for _, name := range slices.Sorted(maps.Keys(spec.Variables)) {
		v := spec.Variables[name]
		if v.Type != nil && !strings.HasPrefix(name, "ld_") { // those are set by the library
			names = append(names, cobra.CompletionWithDesc(name+"=", typed.Of(v.Type.Type, int(v.Size())).String()))
		}
	}
	return names, noFiles | cobra.ShellCompDirectiveNoSpace
}

// offerLinks offers the ids of all links.
func offerLinks(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	links, _ := kernel.AllLinks()
	var ids []string
	for _, l := range links {
		ids = append(ids, cobra.CompletionWithDesc(fmt.Sprint(l.ID), fmt.Sprintf("program %d", l.Program)))
	}
	return ids, noFiles
}

// netnsNames lists the named namespaces, like "ip netns".
func netnsNames(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
	var names []string
	for _, e := range entriesOf(kernel.NetNSDir, "") {
		names = append(names, e.Name())
	}
	return names, noFiles
}
