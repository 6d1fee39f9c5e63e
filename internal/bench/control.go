package main

import (
	"fmt"

	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cilium/ebpf"

	"github.com/cilium/ebpf/link"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/state"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

const controlRounds = 20

// operations are timed in this order.
var operations = []string{"attach", "update", "set", "list", "holders", "detach"}

// A contender can do some of the operations on a device.
type contender struct {
	name string
	do   map[string]func()
	// after runs at the end, and is not timed.
	after func()
}

// controlSection times operations on a device.
func controlSection(b *bench, s *Section) {
	s.Title = "Control"
	s.About = []string{
		"Each contender in turn attaches a loaded program to the same veth device, replaces it with another one, changes " +
			"its priority, lists what is on the device and which processes hold it, and detaches it. Commands are whole " +
			"processes, from fork to exit.",
		"The row of system calls has only the calls that every tool must make: BPF_LINK_CREATE for attach, " +
			"BPF_LINK_UPDATE for update, the load of a dispatcher and BPF_LINK_UPDATE for set, the walk over all links by id " +
			"for list, and the close of the last descriptor for detach. In several of them the kernel waits for an RCU grace " +
			"period, which takes most of their time.",
		"ip, bpftool and xdp-loader attach by netlink: their programs have no owner, and with ip and bpftool there is " +
			"room for one program. xdp-loader and its drop-in, dispatcher xdp-loader, also load the program from its object " +
			"file. Where the kernel refuses freplace, with which libxdp builds its chains, both attach the program alone.",
	}
	p := newPlayground(b)
	t := s.table(Table{Name: "operations", Title: "One member on one device", Unit: "ms", Labels: operations})
	samples := map[string]map[string][]float64{}
	contenders := p.contenders()
	rounds := b.rounds(controlRounds)
	for round := range rounds {
		b.progress("operations, round %d of %d", round+1, rounds)
		for _, c := range contenders {
			if samples[c.name] == nil {
				samples[c.name] = map[string][]float64{}
			}
			for _, op := range operations {
				if fn := c.do[op]; fn != nil {
					samples[c.name][op] = append(samples[c.name][op], milliseconds(elapsed(fn)))
				}
			}
			if c.after != nil {
				c.after()
			}
		}
	}
	for _, c := range contenders {
		for i, op := range operations {
			if all := samples[c.name][op]; len(all) > 0 {
				t.put(c.name, i, statOf(all))
			}
		}
	}
	p.growingChain(s.table(Table{Name: "chain", Title: "A chain that grows, in the library", Unit: "ms", Axis: "members before", Plot: true}))
	p.manyWriters(s.table(Table{Name: "writers", Title: "Many writers of one chain, in the library", Unit: "changes/s", Axis: "writers"}))
}

func milliseconds(d time.Duration) float64 { return float64(d) / float64(time.Millisecond) }

// A playground is a device, a bpffs, and two programs to attach.
type playground struct {
	*bench
	*testenv.Pair
	bpffs    string
	target   dispatcher.Target
	one, two *ebpf.Program
	pins     [2]string
	bpftool  string
}

func newPlayground(b *bench) *playground {
	p := &playground{bench: b, Pair: testenv.NewPair(b.scope), bpffs: testenv.BPFFS(b.scope)}
	p.target = dispatcher.XDP(p.ServerDev).In(p.Server.Name)
	p.one = testenv.VerdictProgram(b.scope, "ldt_one", testenv.XDPPass)
	p.two = testenv.VerdictProgram(b.scope, "ldt_two", testenv.XDPPass)
	for i, prog := range []*ebpf.Program{p.one, p.two} {
		p.pins[i] = filepath.Join(p.bpffs, fmt.Sprint("program", i))
		b.must(prog.Pin(p.pins[i]))
	}
	p.bpftool, _ = exec.LookPath("bpftool")
	return p
}

func (p *playground) contenders() []contender {
	all := []contender{p.rawCalls(), p.library(), p.command(), p.ip()}
	if p.bpftool != "" {
		all = append(all, p.bpftoolNet())
	}
	all = append(all, p.loader("dispatcher xdp-loader", p.tool, "xdp-loader"))
	if loader := xdpLoader(); loader != "" {
		all = append(all, p.loader("xdp-loader", loader))
	}
	return all
}

func (p *playground) options() dispatcher.Options {
	return dispatcher.Options{BPFFS: p.bpffs, Name: "member"}
}

func (p *playground) library() contender {
	var l *dispatcher.Link
	look := dispatcher.ReadOptions{BPFFS: p.bpffs}
	return contender{
		name: "library",
		do: map[string]func(){
			"attach": func() {
				var err error
				l, err = dispatcher.Attach(p.ctx, p.target, dispatcher.Program(p.one), p.options())
				p.must(err)
			},
			"update": func() { p.must(l.Update(p.ctx, dispatcher.Program(p.two))) },
			"set":    func() { p.must(l.Set(p.ctx, hook.Settings{Priority: 60})) },
			"list": func() {
				_, err := dispatcher.Read(p.ctx, p.target, look)
				p.must(err)
			},
			"holders": func() {
				_, err := dispatcher.HoldersOn(p.ctx, p.target, "member", dispatcher.HoldersOnOptions{BPFFS: p.bpffs})
				p.must(err)
			},
			"detach": func() { p.must(l.Detach(p.ctx)) },
		},
		after: func() { l.Close() },
	}
}

func (p *playground) command() contender {
	call := func(args ...string) func() {
		return p.process(p.tool, append([]string{"-n", p.Server.Name, "--bpffs", p.bpffs}, args...)...)
	}
	return contender{name: "dispatcher, the command", do: map[string]func(){
		"attach":  call("attach", "xdp", p.ServerDev, "pin:"+p.pins[0], "--name", "member"),
		"update":  call("replace", "xdp", p.ServerDev, "member", "pin:"+p.pins[1]),
		"set":     call("set", "xdp", p.ServerDev, "member", "--priority", "60"),
		"list":    call("list", "xdp", p.ServerDev),
		"holders": call("holders", "xdp", p.ServerDev),
		"detach":  call("detach", "xdp", p.ServerDev, "member"),
	}}
}

func (p *playground) rawCalls() contender {
	var l link.Link
	chain, slots := p.emptyChain(1)
	return contender{name: "system calls alone", do: map[string]func(){
		"attach": func() {
			p.Server.Do(p.scope, func() {
				var err error
				l, err = link.AttachXDP(link.XDPOptions{Program: p.one, Interface: p.ServerIfindex})
				p.must(err)
			})
		},
		"update": func() { p.must(l.Update(p.two)) },
		"set": func() {
			prog, err := state.Build(chain, slots, nil)
			p.must(err)
			p.must(l.Update(prog.Program))
			prog.Close()
		},
		"list": func() {
			it := new(link.Iterator)
			defer it.Close()
			for it.Next() {
				_, err := it.Link.Info()
				p.must(err)
			}
			p.must(it.Err())
		},
		"detach": func() { l.Close() },
	}}
}

func (p *playground) ip() contender {
	ip := func(args ...string) func() { return p.process("ip", append([]string{"-n", p.Server.Name}, args...)...) }
	return contender{name: "ip link", do: map[string]func(){
		"attach": ip("link", "set", "dev", p.ServerDev, "xdp", "pinned", p.pins[0]),
		"update": ip("-force", "link", "set", "dev", p.ServerDev, "xdp", "pinned", p.pins[1]),
		"list":   ip("link", "show", "dev", p.ServerDev),
		"detach": ip("link", "set", "dev", p.ServerDev, "xdp", "off"),
	}}
}

func (p *playground) bpftoolNet() contender {
	call := func(args ...string) func() {
		fn := p.process(p.bpftool, args...)
		return func() { p.Server.Do(p.scope, fn) }
	}
	return contender{name: "bpftool net", do: map[string]func(){
		"attach": call("net", "attach", "xdp", "pinned", p.pins[0], "dev", p.ServerDev),
		"update": call("net", "attach", "xdp", "pinned", p.pins[1], "dev", p.ServerDev, "overwrite"),
		"list":   call("net", "show", "dev", p.ServerDev),
		"detach": call("net", "detach", "xdp", "dev", p.ServerDev),
	}}
}

// loader is xdp-loader, or a command that is called in the same way.
func (p *playground) loader(name, command string, first ...string) contender {
	object := filepath.Join(p.TempDir(), "members.o")
	p.must(os.WriteFile(object, _MembersBytes, 0o600))
	call := func(args ...string) func() {
		return func() {
			cmd := exec.Command(command, append(first, args...)...)
			cmd.Env = append(os.Environ(), "LIBXDP_BPFFS="+p.bpffs)
			p.Server.Do(p.scope, func() { p.run(cmd) })
		}
	}
	return contender{name: name, do: map[string]func(){
		"attach": call("load", "--mode", "native", "--prog-name", "alone_empty", p.ServerDev, object),
		"list":   call("status", p.ServerDev),
		"detach": call("unload", "--all", p.ServerDev),
	}}
}

// process returns a function that runs a command, which must succeed.
func (s *scope) process(name string, args ...string) func() {
	return func() { s.run(exec.Command(name, args...)) }
}

func (s *scope) run(cmd *exec.Cmd) {
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Run(); err != nil {
		s.Fatalf("%s: %v\n%s", strings.Join(cmd.Args, " "), err, out.String())
	}
}

// lengths are the lengths of the chains on which operations are timed.
var lengths = []int{0, 1, 3, 7, 15, 31}

// growingChain times operations on the last member of a chain.
func (p *playground) growingChain(t *Table) {
	samples := map[string]map[int][]float64{}
	rounds := p.rounds(6)
	for round := range rounds {
		p.progress("chain, round %d of %d", round+1, rounds)
		var links []*dispatcher.Link
		for n := range hook.MaxMembers {
			var l *dispatcher.Link
			o := dispatcher.Options{BPFFS: p.bpffs, Name: fmt.Sprint("m", n)}
			steps := []struct {
				name string
				do   func() error
			}{
				{"attach", func() (err error) {
					l, err = dispatcher.Attach(p.ctx, p.target, dispatcher.Program(p.one), o)
					return err
				}},
				{"update", func() error { return l.Update(p.ctx, dispatcher.Program(p.two)) }},
				{"set", func() error { return l.Set(p.ctx, hook.Settings{Priority: 60}) }},
				{"list", func() error {
					_, err := dispatcher.Read(p.ctx, p.target, dispatcher.ReadOptions{BPFFS: p.bpffs})
					return err
				}},
				{"detach", func() error { return l.Detach(p.ctx) }},
			}
			if !slices.Contains(lengths, n) {
				p.must(steps[0].do())
				links = append(links, l)
				continue
			}
			for _, s := range steps {
				took := elapsed(func() { p.must(s.do()) })
				if samples[s.name] == nil {
					samples[s.name] = map[int][]float64{}
				}
				samples[s.name][n] = append(samples[s.name][n], milliseconds(took))
			}
			l.Close()
			if n < hook.MaxMembers-1 {
				p.must(steps[0].do())
				links = append(links, l)
			}
		}
		p.must(dispatcher.DetachAll(p.ctx, p.target, dispatcher.DetachOptions{BPFFS: p.bpffs}))
		for _, l := range links {
			l.Close()
		}
	}
	for _, op := range []string{"attach", "update", "set", "list", "detach"} {
		for _, n := range lengths {
			t.put(op, n, statOf(samples[op][n]))
		}
	}
}

// writers is how many change one chain at once.
var writers = []int{1, 4, 20}

// manyWriters counts the changes that writers make together: each attaches a member and detaches it, again and again. Another
// member is there all the time, so that each change needs a new dispatcher.
func (p *playground) manyWriters(t *Table) {
	rounds := p.rounds(6)
	attach := func(name string) *dispatcher.Link {
		l, err := dispatcher.Attach(p.ctx, p.target, dispatcher.Program(p.one), dispatcher.Options{BPFFS: p.bpffs, Name: name})
		p.must(err)
		return l
	}
	stays := attach("stays")
	defer stays.Close()
	samples := map[int][]float64{}
	for round := range rounds {
		p.progress("writers, round %d of %d", round+1, rounds)
		for _, n := range writers {
			var changes atomic.Int64
			var all sync.WaitGroup
			took := elapsed(func() {
				end := time.Now().Add(time.Second)
				for i := range n {
					all.Go(func() {
						for time.Now().Before(end) {
							l := attach(fmt.Sprint("m", i))
							p.must(l.Detach(p.ctx))
							p.must(l.Close())
							changes.Add(2)
						}
					})
				}
				all.Wait()
			})
			samples[n] = append(samples[n], float64(changes.Load())/took.Seconds())
		}
	}
	for _, n := range writers {
		t.put("attach and detach", n, statOf(samples[n]))
	}
}
