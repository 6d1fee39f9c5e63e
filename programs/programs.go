// Package programs holds five small BPF programs, compiled and embedded, so
// that they can be attached on a machine without a compiler:
//
//	count      counts packets and bytes per protocol
//	droplist   drops packets by source prefix
//	ratelimit  limits the packets a second from each source
//	redirect   has connect(2) go to another address and port
//	sample     copies the start of every Nth packet to a ring buffer
//
// Some are for several hooks, see [Hooks]. Then there is a function for each kind
// of hook, see [Function], and they have the same maps and constants.
//
// They load on Linux 5.10 and newer, look through up to two VLAN tags, and pass
// what they do not understand. README.md beside this file describes their maps
// and constants; the types in this package are the maps' keys and values.
//
// To set a constant, use the spec before it is loaded:
//
//	spec, err := programs.Spec("sample")
//	...
//	err = spec.Variables["every"].Set(uint32(100))
package programs

import (
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/cilium/ebpf"

	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/programs/internal/object"
)

type builtin struct {
	describe  string
	load      func() (*ebpf.CollectionSpec, error)
	functions map[hook.Hook]string
}

var builtins = map[string]builtin{
	"count": {
		"count packets and bytes per protocol", object.LoadCount,
		onHooks(map[string][]hook.Hook{
			"count":        {hook.XDP},
			"count_tc":     tcHooks,
			"count_cgroup": {hook.CgroupSKBIngress, hook.CgroupSKBEgress},
		}),
	},
	"droplist": {
		"drop packets by source prefix, IPv4 and IPv6", object.LoadDroplist,
		onHooks(map[string][]hook.Hook{
			"droplist":    {hook.XDP},
			"droplist_tc": tcHooks,
		}),
	},
	"ratelimit": {
		"limit the packets a second from each source address", object.LoadRatelimit,
		onHooks(map[string][]hook.Hook{"ratelimit": {hook.XDP}}),
	},
	"redirect": {
		"have connect(2) go to another address and port", object.LoadRedirect,
		onHooks(map[string][]hook.Hook{
			"redirect4": {hook.CgroupConnect4},
			"redirect6": {hook.CgroupConnect6},
		}),
	},
	"sample": {
		"copy the start of every Nth packet to a ring buffer", object.LoadSample,
		onHooks(map[string][]hook.Hook{"sample": {hook.XDP}}),
	},
}

var tcHooks = []hook.Hook{hook.TCXIngress, hook.TCXEgress, hook.TCIngress, hook.TCEgress}

func onHooks(functions map[string][]hook.Hook) map[hook.Hook]string {
	byHook := make(map[hook.Hook]string)
	for function, hooks := range functions {
		for _, h := range hooks {
			byHook[h] = function
		}
	}
	return byHook
}

// Names lists the programs, sorted.
func Names() []string {
	return slices.Sorted(maps.Keys(builtins))
}

// Describe says in one line what a program does. It is empty for an unknown name.
func Describe(name string) string {
	return builtins[name].describe
}

// Hooks lists the hooks that a program can run on, in the order of [hook.Hooks].
// It is empty for an unknown name.
func Hooks(name string) []hook.Hook {
	functions := builtins[name].functions
	return slices.DeleteFunc(hook.Hooks(), func(h hook.Hook) bool { return functions[h] == "" })
}

// Function returns which of the program's functions runs on a hook: the name in
// the spec's Programs, and in the kernel. It is empty if there is none.
func Function(name string, h hook.Hook) string {
	return builtins[name].functions[h]
}

// Spec returns a program with its maps and constants, ready to be changed and
// loaded. Every call returns a new one. It has a function for each kind of hook;
// whoever loads it all by other means than this module deletes the others from
// Programs first, or they are loaded as well. All functions use the same maps.
//
// The error for an unknown name wraps [fs.ErrNotExist].
func Spec(name string) (*ebpf.CollectionSpec, error) {
	b, ok := builtins[name]
	if !ok {
		return nil, fmt.Errorf("no built-in program %q (there are %s): %w",
			name, strings.Join(Names(), ", "), fs.ErrNotExist)
	}
	return b.load()
}
