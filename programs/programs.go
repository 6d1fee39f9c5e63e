// Package programs holds five small BPF programs, compiled and embedded, so
// that they can be attached on a machine without a compiler:
//
//	count      counts packets and bytes per protocol
//	droplist   drops packets by source prefix
//	ratelimit  limits the packets a second from each source
//	redirect   sends connect(2) to another address and port
//	sample     copies the start of every Nth packet to a ring buffer
//
// A program can be for several hooks, see [Hooks]. Then it has a function for each
// kind of hook, see [Function]. The functions share the maps and constants.
//
// The programs load on Linux 5.10 and newer. They look through up to two VLAN tags,
// and pass packets that they cannot read. README.md beside this file describes the
// maps and constants; the types in this package are the maps' keys and values.
//
// On a device without Ethernet, set the constant ld_link_header to 0; package dispatcher
// does that by itself.
//
// To set a constant, change the spec before you load it:
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
	functions map[string][]hook.Hook
}

var tcHooks = []hook.Hook{hook.TCXIngress, hook.TCXEgress, hook.TCIngress, hook.TCEgress}

var builtins = map[string]builtin{
	"count": {
		"count packets and bytes per protocol", object.LoadCount,
		map[string][]hook.Hook{
			"count":        {hook.XDP},
			"count_tc":     tcHooks,
			"count_cgroup": {hook.CgroupSKBIngress, hook.CgroupSKBEgress},
		},
	},
	"droplist": {
		"drop packets by source prefix, IPv4 and IPv6", object.LoadDroplist,
		map[string][]hook.Hook{"droplist": {hook.XDP}, "droplist_tc": tcHooks},
	},
	"ratelimit": {
		"limit the packets a second from each source address", object.LoadRatelimit,
		map[string][]hook.Hook{"ratelimit": {hook.XDP}},
	},
	"redirect": {
		"send connect(2) to another address and port", object.LoadRedirect,
		map[string][]hook.Hook{"redirect4": {hook.CgroupConnect4}, "redirect6": {hook.CgroupConnect6}},
	},
	"sample": {
		"copy the start of every Nth packet to a ring buffer", object.LoadSample,
		map[string][]hook.Hook{"sample": {hook.XDP}},
	},
}

// Names lists the programs, sorted.
func Names() []string {
	return slices.Sorted(maps.Keys(builtins))
}

// Describe returns one line about what a program does. It is empty for an unknown name.
func Describe(name string) string {
	return builtins[name].describe
}

// Hooks lists the hooks that a program can run on, in the order of [hook.Hooks].
// It is empty for an unknown name.
func Hooks(name string) []hook.Hook {
	return slices.DeleteFunc(hook.Hooks(), func(h hook.Hook) bool { return Function(name, h) == "" })
}

// Function returns the name of the function that runs on a hook: its name in the
// spec's Programs, and in the kernel. It is empty if there is none.
func Function(name string, h hook.Hook) string {
	for function, hooks := range builtins[name].functions {
		if slices.Contains(hooks, h) {
			return function
		}
	}
	return ""
}

// Spec returns a program with its maps and constants, ready to be changed and
// loaded. Every call returns a new spec. It has a function for each kind of hook,
// and all functions use the same maps. This module loads only the function that
// fits the hook. If you load the spec by other means, delete the other functions
// from Programs first.
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
