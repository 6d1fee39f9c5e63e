// Package programs holds four small XDP programs, compiled and embedded, so
// that they can be attached on a machine without a compiler:
//
//	droplist   drops packets by source prefix
//	ratelimit  limits the packets a second from each source
//	count      counts packets and bytes per protocol
//	sample     copies the start of every Nth packet to a ring buffer
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

	"github.com/libdispatcher/dispatcher/programs/internal/object"
)

type builtin struct {
	describe string
	load     func() (*ebpf.CollectionSpec, error)
}

var builtins = map[string]builtin{
	"count":     {"count packets and bytes per protocol", object.LoadCount},
	"droplist":  {"drop packets by source prefix, IPv4 and IPv6", object.LoadDroplist},
	"ratelimit": {"limit the packets a second from each source address", object.LoadRatelimit},
	"sample":    {"copy the start of every Nth packet to a ring buffer", object.LoadSample},
}

// Names lists the programs, sorted.
func Names() []string {
	return slices.Sorted(maps.Keys(builtins))
}

// Describe says in one line what a program does. It is empty for an unknown name.
func Describe(name string) string {
	return builtins[name].describe
}

// Spec returns a program with its maps and constants, ready to be changed and
// loaded. Every call returns a new one. The program in it has the same name.
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
