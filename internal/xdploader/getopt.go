package xdploader

import (
	"fmt"
	"io"
	"strings"
)

// getopt reads a command line like getopt_long(3) of the GNU C library: long
// names may be abbreviated, short ones combined, and options may follow other
// arguments unless posix is set. args[0] is the name in error messages, which
// are the C library's.
//
// getopt calls handle for each option in turn, with nil for a wrong option,
// until handle returns false. It returns the arguments that are not options.
func getopt(args []string, opts []option, posix bool, w io.Writer, handle func(o *option, arg string) bool) (rest []string, ok bool) {
	g := &scanner{name: args[0], args: args[1:], opts: opts, w: w, handle: handle}
	for len(g.args) > 0 {
		arg := g.next()
		switch {
		case arg == "--":
			return append(rest, g.args...), true
		case strings.HasPrefix(arg, "--"):
			ok = g.long(arg[2:])
		case len(arg) > 1 && arg[0] == '-':
			ok = g.cluster(arg[1:])
		case posix:
			return append([]string{arg}, g.args...), true
		default:
			rest, ok = append(rest, arg), true
		}
		if !ok {
			return nil, false
		}
	}
	return rest, true
}

type scanner struct {
	name   string
	args   []string // the remaining arguments
	opts   []option
	w      io.Writer
	handle func(o *option, arg string) bool
}

func (g *scanner) next() string {
	arg := g.args[0]
	g.args = g.args[1:]
	return arg
}

func (g *scanner) wrong(format string, args ...any) bool {
	fmt.Fprintf(g.w, "%s: "+format+"\n", append([]any{g.name}, args...)...)
	return g.handle(nil, "")
}

func (g *scanner) long(text string) bool {
	name, value, has := strings.Cut(text, "=")
	o, possible := g.find(name)
	switch {
	case len(possible) > 1:
		return g.wrong("option '--%s' is ambiguous; possibilities: '--%s'", text, strings.Join(possible, "' '--"))
	case o == nil:
		return g.wrong("unrecognized option '--%s'", text)
	case has && o.flag:
		return g.wrong("option '--%s' doesn't allow an argument", o.name)
	case !o.flag && !has:
		if len(g.args) == 0 {
			return g.wrong("option '--%s' requires an argument", o.name)
		}
		value = g.next()
	}
	return g.handle(o, value)
}

// find returns the option of that name, or else the last option that begins
// with it, with the names of all such options.
func (g *scanner) find(name string) (found *option, possible []string) {
	for i := range g.opts {
		o := &g.opts[i]
		if o.name == name {
			return o, nil
		}
		if strings.HasPrefix(o.name, name) {
			found = o
			possible = append(possible, o.name)
		}
	}
	return found, possible
}

func (g *scanner) cluster(letters string) bool {
	for letters != "" {
		o := g.letter(letters[0])
		if o == nil {
			return g.wrong("invalid option -- '%s'", letters[:1])
		}
		letters = letters[1:]
		value := ""
		if !o.flag {
			value, letters = letters, ""
			if value == "" {
				if len(g.args) == 0 {
					return g.wrong("option requires an argument -- '%c'", o.short)
				}
				value = g.next()
			}
		}
		if !g.handle(o, value) {
			return false
		}
	}
	return true
}

func (g *scanner) letter(c byte) *option {
	for i := range g.opts {
		if o := &g.opts[i]; o.short == c && c != 0 {
			return o
		}
	}
	return nil
}
