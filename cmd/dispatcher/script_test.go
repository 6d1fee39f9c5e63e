package main

import (
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/cilium/ebpf/link"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// The scripts' object files, for little-endian machines.
//
//go:generate -command bpf clang-19 -O2 -g -target bpfel -mcpu=v3 -std=gnu11 -Wall -Wextra -Wno-unused-parameter -Werror -fdebug-compilation-dir=. -c -o
//go:generate bpf testdata/bpf/single.o testdata/bpf/single.c
//go:generate bpf testdata/bpf/several.o testdata/bpf/several.c
//go:generate bpf testdata/bpf/tailcall.o testdata/bpf/tailcall.c
//go:generate bpf testdata/bpf/refused.o testdata/bpf/refused.c
//go:generate llvm-strip-19 -g testdata/bpf/single.o testdata/bpf/several.o testdata/bpf/tailcall.o testdata/bpf/refused.o

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"dispatcher": main, "othertool": otherTool})
}

// TestScripts runs each script in testdata/script against the real command, in
// network namespaces and with a bpffs of its own. What a script finds:
//
//	$NS, $DEV    a namespace with a veth device, up
//	$PEER        the namespace of the other end
//	$BPFFS       a bpffs, empty
//	$BPF         the folder of object files (testdata/bpf)
//
//	fails N CMD...         run CMD, which must end with exit status N
//	await PATTERN CMD...   run CMD until its stdout matches
//	getenv VAR PATTERN     set VAR to what the group in PATTERN matches in stdout
//	mask FILE              put words in the place of what differs from run to run
//	clean                  nothing is attached, and no chain has a pin
//	othertool ...          do what other tools do; see below
//
// Every script ends with clean.
func TestScripts(t *testing.T) {
	scripts, err := filepath.Glob("testdata/script/*.txt")
	if err != nil || len(scripts) == 0 {
		t.Fatalf("no scripts: %v", err)
	}
	objects, err := filepath.Abs("testdata/bpf")
	if err != nil {
		t.Fatal(err)
	}
	for _, script := range scripts {
		t.Run(strings.TrimSuffix(filepath.Base(script), ".txt"), func(t *testing.T) {
			testenv.CheckLeaks(t)
			pair, bpffs := testenv.NewPair(t), testenv.BPFFS(t)
			testscript.RunT(scriptT{t}, testscript.Params{
				Files:              []string{script},
				RequireUniqueNames: true,
				UpdateScripts:      *update,
				Setup: func(env *testscript.Env) error {
					env.Setenv("NS", pair.Server.Name)
					env.Setenv("NSPATH", pair.Server.Path())
					env.Setenv("DEV", pair.ServerDev)
					env.Setenv("PEER", pair.Client.Name)
					env.Setenv("BPFFS", bpffs)
					env.Setenv("BPF", objects)
					return nil
				},
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"fails":  fails,
					"await":  await,
					"getenv": getenv,
					"mask":   mask,
					"clean":  clean,
				},
			})
		})
	}
}

// scriptT runs a script within the test that made its namespaces.
type scriptT struct{ *testing.T }

func (t scriptT) Parallel()                             {}
func (t scriptT) Verbose() bool                         { return testing.Verbose() }
func (t scriptT) Run(_ string, fn func(t testscript.T)) { fn(t) }

func fails(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: fails STATUS COMMAND [ARG...]")
	}
	err := ts.Exec(args[1], args[2:]...)
	var exit *exec.ExitError
	switch {
	case err == nil:
		ts.Fatalf("exit status 0, want %s", args[0])
	case !errors.As(err, &exit) || strconv.Itoa(exit.ExitCode()) != args[0]:
		ts.Fatalf("%v, want exit status %s", err, args[0])
	}
}

func await(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: await PATTERN COMMAND [ARG...]")
	}
	pattern := regexp.MustCompile("(?m)" + args[0])
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		err := ts.Exec(args[1], args[2:]...)
		if err == nil && pattern.MatchString(ts.ReadFile("stdout")) {
			return
		}
		if time.Now().After(deadline) {
			ts.Fatalf("stdout never matched %q (%v)", args[0], err)
		}
	}
}

func getenv(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: getenv VAR PATTERN")
	}
	found := regexp.MustCompile("(?m)" + args[1]).FindStringSubmatch(ts.ReadFile("stdout"))
	if len(found) != 2 {
		ts.Fatalf("stdout does not match %q", args[1])
	}
	ts.Setenv(args[0], found[1])
}

// masks are what differs from run to run, in JSON and in tables, whose columns
// are as wide as what is in them.
var masks = []struct{ pattern, word string }{
	{`("(?:ifindex|inode|cookie|link_id|dispatcher_id|slot_id|id)": )[0-9]+`, "${1}0"},
	{`("tag": )"[0-9a-f]{16}"`, `${1}"TAG"`},
	{`("loaded_at": )"[-0-9T:]+Z"`, `${1}"TIME"`},
	{`/xdp_[0-9]+/`, "/xdp_0/"},
	{`\(ifindex [0-9]+\)`, "(ifindex 0)"},
	{`\b(link|dispatcher|netns) [0-9]+`, "$1 0"},
	{`(\S)   +`, "$1  "},
	{`(?m)^(  [0-9]+  \S+  \S+  )[0-9]+  `, "${1}ID  "},
	{`  [0-9a-f]{16}  [0-9]{4}-[-+Z0-9:T]+  [0-9]+  `, "  TAG  TIME  ID  "},
}

func mask(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: mask FILE")
	}
	text := strings.ReplaceAll(ts.ReadFile(args[0]), ts.Getenv("BPFFS"), "$BPFFS")
	for _, m := range masks {
		text = regexp.MustCompile(m.pattern).ReplaceAllString(text, m.word)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), []byte(text), 0o600))
}

func clean(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) > 0 {
		ts.Fatalf("usage: clean")
	}
	for _, ns := range []string{ts.Getenv("NS"), ts.Getenv("PEER")} {
		ts.Check(ts.Exec("dispatcher", "-q", "-n", ns, "list"))
		if out := ts.ReadFile("stdout"); out != "" {
			ts.Fatalf("left attached:\n%s", out)
		}
	}
	pins, err := os.ReadDir(filepath.Join(ts.Getenv("BPFFS"), "libdispatcher"))
	if err == nil && len(pins) > 0 {
		ts.Fatalf("left pinned: %v", pins)
	}
}

// otherTool stands for programs that know nothing of chains:
//
//	othertool link NETNS DEVICE PIN   attach a program by a link, and pin the link
//	othertool pin ID PIN              pin a program
func otherTool() {
	var err error
	switch args := os.Args[1:]; {
	case len(args) == 4 && args[0] == "link":
		err = linkOther(args[1], args[2], args[3])
	case len(args) == 3 && args[0] == "pin":
		err = pinProgram(args[1], args[2])
	default:
		err = fmt.Errorf("bad arguments %q", args)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "othertool:", err)
		os.Exit(1)
	}
}

func linkOther(netns, device, pin string) error {
	ns, err := kernel.OpenNetNS(netns)
	if err != nil {
		return err
	}
	defer ns.Close()
	prog, err := ebpf.NewProgram(testenv.VerdictSpec("ldt_other", testenv.XDPPass))
	if err != nil {
		return err
	}
	defer prog.Close()
	return ns.Do(func() error {
		dev, err := net.InterfaceByName(device)
		if err != nil {
			return err
		}
		l, err := link.AttachXDP(link.XDPOptions{Program: prog, Interface: dev.Index})
		if err != nil {
			return err
		}
		defer l.Close()
		return l.Pin(pin)
	})
}

func pinProgram(id, pin string) error {
	n, err := strconv.ParseUint(id, 10, 32)
	if err != nil {
		return err
	}
	prog, err := ebpf.NewProgramFromID(ebpf.ProgramID(n))
	if err != nil {
		return err
	}
	defer prog.Close()
	return prog.Pin(pin)
}
