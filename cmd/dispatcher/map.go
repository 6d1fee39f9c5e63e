package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/mapdata"
	"github.com/libdispatcher/dispatcher/internal/typed"
)

// What "map" does, by the words for it: its own, and those of ip, nft and bpftool.
var mapVerbs = map[string]string{
	"list": "list", "show": "list", "ls": "list", "dump": "list",
	"get": "get", "lookup": "get",
	"add": "add", "create": "add",
	"set": "set", "update": "set", "replace": "set",
	"del": "del", "delete": "del", "rm": "del", "remove": "del",
}

func (a *app) mapCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "map HOOK TARGET MEMBER [MAP] [VERB [KEY] [VALUE]]",
		Short: "Show and change what is in the maps of a member",
		Long: `Show and change what is in the maps of a member, or of any other program on the
hook (link:ID, id:PROG). Without a verb and MAP, show which maps there are.

VERB is one of
  list             show all entries
  get KEY          show an entry
  add KEY [VALUE]  make a new entry; without VALUE it is zero
  set KEY VALUE    change an entry, or make it
  del KEY          delete an entry

MAP can be left out where only one map takes such a KEY.

KEY and VALUE are written as the type in the program says: numbers as in C,
addresses, prefixes (192.0.2.0/24), MAC addresses, names of enumerators. Of a
struct, write the fields: NAME=VALUE, or all of them in their order. The fields
that are not named keep their value; in a key and in a new entry they are zero.
Between a KEY that is a struct and VALUE stands the word "value". hex: and all
bytes in hexadecimal digits work for any type, and where the map has no type
information (BTF) also each byte as a word, as in bpftool.

Where each CPU has a value of its own, the sum is shown, and with -v also the
values. To set one sets the sum. Entries of arrays that are zero are shown only
with -v.`,
		Example: `  dispatcher map xdp eth0 droplist
  dispatcher map xdp eth0 droplist add 192.0.2.0/24
  dispatcher map xdp eth0 droplist list
  dispatcher map xdp eth0 droplist droplist_v4 list -j
  dispatcher map xdp eth0 droplist del 192.0.2.0/24
  dispatcher map cgroup/connect4 /sys/fs/cgroup/web.slice redirect add addr=192.0.2.1 port=80 value addr=127.0.0.1 port=8080`,
		Args: func(cmd *cobra.Command, args []string) error {
			args = withoutDev(args, 1)
			return words(1, "HOOK", "TARGET", "MEMBER")(cmd, args[:min(3, len(args))])
		},
		ValidArgsFunction: a.completeMap,
		RunE: a.withTarget(func(cmd *cobra.Command, t dispatcher.Target, args []string) error {
			maps, err := a.mapsOf(cmd.Context(), t, hook.Ref(args[0]))
			if err != nil {
				return err
			}
			defer mapdata.Close(maps)
			return a.mapVerb(maps, args[0], args[1:])
		}),
	}
}

// mapsOf opens the maps of an entry on a hook.
func (a *app) mapsOf(ctx context.Context, t dispatcher.Target, ref hook.Ref) ([]*mapdata.Map, error) {
	chain, err := dispatcher.Read(ctx, t, a.readOptions())
	if err != nil {
		return nil, err
	}
	names := make([]string, 0, len(chain.Members))
	for i := range chain.Members {
		m := &chain.Members[i]
		name := m.Ref()
		if m.Named() {
			name = hook.Ref(m.Name)
		}
		if ref != name && ref != m.Ref() && ref != hook.ProgramRef(m.Program.ID) {
			names = append(names, string(name))
			continue
		}
		if m.Program.ID == 0 {
			return nil, hook.Because(fs.ErrNotExist, "the slot of %q is empty: its owner is gone, and its program with it", m.Name)
		}
		return mapdata.Of(m.Program.ID)
	}
	return nil, hook.Because(fs.ErrNotExist, "there is no %q on %s %s (there are: %s)", ref, t.Hook, t.Name(), orNone(names)).
		Hint("%s", didYouMean(string(ref), names, "", ""))
}

func orNone(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// mapVerb does what the words after the member say.
func (a *app) mapVerb(maps []*mapdata.Map, member string, args []string) error {
	names := mapNames(maps)
	var named *mapdata.Map
	called := func(word string) *mapdata.Map {
		if i := slices.IndexFunc(maps, func(m *mapdata.Map) bool { return m.Called(word) }); i >= 0 {
			return maps[i]
		}
		return nil
	}
	if len(args) > 0 {
		// A map may have the name of a verb.
		verbFirst := mapVerbs[args[0]] != "" && (len(args) == 1 || mapVerbs[args[1]] == "" || called(args[0]) == nil)
		if !verbFirst {
			if named = called(args[0]); named == nil {
				return hook.Because(fs.ErrNotExist, "%q has no map %q (it has: %s)", member, args[0], orNone(names)).
					Hint("%s", didYouMean(args[0], append(names, "list", "get", "add", "set", "del"), "", "after MEMBER comes a map, or list, get, add, set or del"))
			}
			args = args[1:]
		}
	}
	chosen := maps
	if named != nil {
		chosen = []*mapdata.Map{named}
	}
	switch {
	case len(args) == 0 && named == nil:
		return a.printMaps(maps, false)
	case len(args) == 0:
		return a.printMaps(chosen, true)
	case mapVerbs[args[0]] == "":
		return usage(didYouMean(args[0], []string{"list", "get", "add", "set", "del"}, "", "the verbs are list, get, add, set and del"), "%q is no verb for a map", args[0])
	}
	verb, args := mapVerbs[args[0]], args[1:]
	switch {
	case verb == "list" && len(args) > 0:
		return usage("\"get\" shows one entry", "%q is one word too many", args[0])
	case verb == "list":
		return a.printMaps(chosen, true)
	case len(args) == 0:
		return usage("", "the key is missing: %s KEY", verb)
	}
	m, key, value, err := chooseMap(chosen, named != nil, verb, args)
	if err != nil {
		return err
	}
	return a.changeMap(m, verb, key, value)
}

func mapNames(maps []*mapdata.Map) []string {
	names := make([]string, len(maps))
	for i, m := range maps {
		names[i] = m.Name
	}
	return names
}

// chooseMap finds the map that takes the key, and returns it with the key and the words of
// the value.
func chooseMap(maps []*mapdata.Map, named bool, verb string, args []string) (chosen *mapdata.Map, key []byte, value []string, err error) {
	var fits, wrong []string
	for _, m := range maps {
		// The variables of a program are a map too, which nobody means without its name.
		if !named && (strings.Contains(m.Name, ".") || m.Key.Size() == 0) {
			continue
		}
		keyWords, valueWords := splitEntry(m, verb, args)
		k, parseErr := m.Key.Parse(keyWords, nil)
		if parseErr != nil {
			err = badWord("key", m, parseErr)
			wrong = append(wrong, fmt.Sprintf("%s: %v", m.Name, parseErr))
			continue
		}
		fits = append(fits, m.Name)
		chosen, key, value = m, k, valueWords
	}
	switch {
	case len(fits) == 1:
		return chosen, key, value, nil
	case len(fits) > 1:
		return nil, nil, nil, usage("", "several maps take such a key: name one of %s before %q", strings.Join(fits, ", "), verb)
	case len(wrong) == 1:
		return nil, nil, nil, err
	case len(wrong) == 0:
		return nil, nil, nil, hook.Because(fs.ErrNotExist, "there is no map with keys (the program has: %s)", orNone(mapNames(maps)))
	}
	return nil, nil, nil, usage("", "no map takes such a key: %s", strings.Join(wrong, "; "))
}

// splitEntry divides the words after a verb into those of the key and those of the value.
func splitEntry(m *mapdata.Map, verb string, args []string) (key, value []string) {
	if args[0] == "key" { // as in bpftool
		args = args[1:]
	}
	if verb != "add" && verb != "set" {
		return args, nil
	}
	if i := slices.Index(args, "value"); i >= 0 {
		return args[:i], args[i+1:]
	}
	if m.Key.Scalar() && len(args) > 0 {
		return args[:1], args[1:]
	}
	return args, nil
}

// badWord is the error for a key or a value that is not what the map has.
func badWord(what string, m *mapdata.Map, err error) error {
	hint := ""
	var unknown *typed.UnknownField
	if errors.As(err, &unknown) {
		hint = didYouMean(unknown.Name, unknown.Known, "", "")
	}
	return usage(hint, "the %s of map %s: %w", what, m.Name, err)
}

func (a *app) changeMap(m *mapdata.Map, verb string, key []byte, words []string) error {
	done := map[string]string{"add": "added", "set": "set", "del": "deleted"}[verb]
	switch verb {
	case "get":
		e, err := m.Get(key)
		if err != nil {
			return err
		}
		return a.printEntries([]shownMap{{Map: m, entries: []mapdata.Entry{e}}})
	case "del":
		if err := m.Delete(key); err != nil {
			return err
		}
	default:
		if len(words) == 0 && verb == "set" {
			return usage("", "the value is missing: set KEY VALUE, or set KEY value VALUE")
		}
		value := make([]byte, m.Value.Size())
		if len(words) > 0 {
			var old []byte
			if e, err := m.Get(key); verb == "set" && err == nil {
				old = e.Value
			}
			var err error
			if value, err = m.Value.Parse(words, old); err != nil {
				return badWord("value", m, err)
			}
		}
		if err := m.Put(key, value, verb == "add"); err != nil {
			return err
		}
	}
	if a.verbose {
		a.note("map %s (id %d): %s %s", m.Name, m.ID, done, typed.Words(m.Key.Value(key)))
	}
	return nil
}

// completeMap offers the words of "map".
func (a *app) completeMap(cmd *cobra.Command, given []string, word string) ([]string, cobra.ShellCompDirective) {
	given = withoutDev(given, 1)
	if len(given) < 3 {
		return completeArgs(1, offerHooks, a.offerTargets, a.offerMembers)(cmd, given, word)
	}
	if len(given) > 3 && mapVerbs[given[3]] != "" || len(given) > 4 {
		return nil, noFiles
	}
	offered := []string{"list", "get", "add", "set", "del"}
	if t, err := a.target(given[0], given[1]); err == nil && len(given) == 3 {
		if maps, err := a.mapsOf(cmd.Context(), t, hook.Ref(given[2])); err == nil {
			defer mapdata.Close(maps)
			for _, m := range maps {
				offered = append(offered, cobra.CompletionWithDesc(m.Name, m.Type.String()))
			}
		}
	}
	return offered, noFiles
}
