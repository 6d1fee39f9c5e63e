package xdploader

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/hook"
)

// An option is an option or an argument of a command.
type option struct {
	name       string
	short      byte
	metavar    string // the name of its value in the help
	help       string
	choices    []string // valid values, for the help
	flag       bool     // takes no value
	positional bool
	required   bool
	many       bool                                         // may be repeated
	set        func(t *tool, v *values, value string) error // nil: values.given is enough
}

// values are the values on the command line.
type values struct {
	given   map[string]string // options and arguments by name
	device  string
	index   int // of the device; 0 when no device was named
	files   []string
	mode    hook.Mode
	prio    uint32
	actions hook.VerdictSet // 0 when not given
	id      uint32
}

// has tells whether an option or an argument was given.
func (v *values) has(name string) bool { _, ok := v.given[name]; return ok }

var loadOptions = []option{
	{name: "mode", short: 'm', metavar: "<mode>", help: "Load XDP program in <mode>; default native", choices: modeNames,
		set: func(_ *tool, v *values, s string) error {
			i := slices.Index(modeNames, s)
			if i < 0 {
				return unix.EINVAL
			}
			v.mode = modes[i]
			return nil
		}},
	{name: "pin-path", short: 'p', help: "Path to pin maps under (must be in bpffs)."},
	{name: "section", short: 's', metavar: "<section>", help: "ELF section name of program to load (default: first in file)."},
	{name: "prog-name", short: 'n', metavar: "<prog_name>", help: "BPF program name of program to load (default: first in file)."},
	device("Load on device <ifname>", "<ifname>", true),
	{name: "filenames", metavar: "<filenames>", help: "Load programs from <filenames>", positional: true, required: true, many: true,
		set: func(_ *tool, v *values, s string) error { v.files = append(v.files, s); return nil }},
	{name: "prio", short: 'P', help: "Set run priority of program",
		set: func(_ *tool, v *values, s string) (err error) { v.prio, err = parseU32(s); return err }},
	{name: "actions", short: 'A', metavar: "<actions>", help: "Chain call actions (default: XDP_PASS). e.g. XDP_PASS,XDP_DROP", choices: actionNames[:],
		set: func(_ *tool, v *values, s string) (err error) { v.actions, err = parseActions(s); return err }},
}

var unloadOptions = []option{
	device("Unload from device <ifname>", "<ifname>", false),
	{name: "id", short: 'i', metavar: "<id>", help: "Unload program with id <id>",
		set: func(_ *tool, v *values, s string) (err error) { v.id, err = parseU32(s); return err }},
	{name: "all", short: 'a', help: "Unload all programs from interface", flag: true},
}

var statusOptions = []option{device("Show status for device [ifname] (default all interfaces)", "[ifname]", false)}

var cleanOptions = []option{device("Clean up detached program links for [ifname] (default all interfaces)", "[ifname]", false)}

var featuresOptions = []option{device("Show XDP features for device <ifname>", "<ifname>", true)}

func device(help, metavar string, required bool) option {
	return option{name: "dev", metavar: metavar, help: help, positional: true, required: required,
		set: func(t *tool, v *values, s string) error {
			index, err := ifindex(s)
			if err != nil {
				t.warn("Couldn't find network interface '%s'.", s)
				return unix.ENOENT
			}
			v.device, v.index = s, index
			return nil
		}}
}

// ifindex looks up a device in the namespace of the calling thread, like
// if_nametoindex(3): it also finds alternative names, if they are short.
func ifindex(name string) (int, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return 0, err
	}
	defer unix.Close(fd)
	req, err := unix.NewIfreq(name)
	if err != nil {
		return 0, err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFINDEX, req); err != nil {
		return 0, err
	}
	return int(req.Uint32()), nil
}

// common are the options of every command, in this order, before its own
// options.
var common = []option{{name: "help", short: 'h', flag: true}, {name: "verbose", short: 'v', flag: true}, {name: "version", flag: true}}

// parse reads the command line of a command. It returns false when the line is
// wrong or only asks for help or the version. args[0] is the command as it was
// typed.
func (t *tool) parse(c *command, args []string) (*values, bool) {
	v := &values{given: map[string]string{}, mode: hook.ModeNative}
	opts := slices.DeleteFunc(slices.Concat(common, c.options), func(o option) bool { return o.positional })
	rest, ok := getopt(args, opts, t.getenv("POSIXLY_CORRECT") != "", t.w, func(o *option, arg string) bool {
		switch {
		case o == nil:
			t.usage(c, false)
			return false
		case o.name == "help":
			t.usage(c, true)
			return false
		case o.name == "version":
			fmt.Fprintln(t.stdout, versionLine())
			return false
		case o.name == "verbose":
			t.louder()
			return true
		}
		return t.set(c, v, o, arg)
	})
	if !ok {
		return nil, false
	}
	for _, arg := range rest {
		i := slices.IndexFunc(c.options, func(o option) bool { return o.positional && (o.many || !v.has(o.name)) })
		if i < 0 {
			t.usage(c, false)
			return nil, false
		}
		if !t.set(c, v, &c.options[i], arg) {
			return nil, false
		}
	}
	for _, o := range c.options {
		if o.required && !v.has(o.name) {
			t.warn("Missing required parameter %s", o.metavar)
			t.usage(c, false)
			return nil, false
		}
	}
	return v, true
}

// set sets an option.
func (t *tool) set(c *command, v *values, o *option, value string) bool {
	if o.set != nil {
		if err := o.set(t, v, value); err != nil {
			if err != unix.ENOENT { // the error has been explained
				t.warn("Couldn't parse option %s: %s.", o.name, words(err))
			}
			t.usage(c, false)
			return false
		}
	}
	v.given[o.name] = value
	return true
}

func (t *tool) usage(c *command, full bool) {
	w := t.stdout
	fmt.Fprintf(w, "\nUsage: %s %s [options]", t.name, c.name)
	required := 0
	for _, o := range c.options {
		if o.positional {
			fmt.Fprintf(w, " %s", o.metavar)
		}
		if o.required {
			required++
		}
	}
	fmt.Fprintln(w)
	if !full {
		fmt.Fprintln(w, "Use --help (or -h) to see full option list.")
		return
	}
	fmt.Fprintf(w, "\n %s\n\n", c.doc)
	if required > 0 {
		fmt.Fprintln(w, "Required parameters:")
		list(w, c.options, true)
		fmt.Fprintln(w)
	}
	fmt.Fprintln(w, "Options:")
	list(w, c.options, false)
	fmt.Fprint(w, ` -v, --verbose                    Enable verbose logging (-vv: more verbose)
     --version                    Display version information
 -h, --help                       Show this help

`)
}

func list(w io.Writer, options []option, required bool) {
	for _, o := range options {
		if o.required != required {
			continue
		}
		if o.positional {
			fmt.Fprintf(w, "  %-30s", cmp.Or(o.metavar, o.name))
		} else {
			name := " --" + o.name
			if o.metavar != "" {
				name += " " + o.metavar
			}
			fmt.Fprintf(w, " -%c,%-28s", o.short, name)
		}
		fmt.Fprintf(w, "  %s", o.help)
		if len(o.choices) > 0 {
			fmt.Fprintf(w, " (valid values: %s)", strings.Join(o.choices, ","))
		}
		fmt.Fprintln(w)
	}
}
