package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
	"github.com/libdispatcher/dispatcher/internal/packet"
	"github.com/libdispatcher/dispatcher/internal/testenv"
)

// The scripts' object files, for little-endian machines.
//
//go:generate -command bpf clang-19 -O2 -g -target bpfel -mcpu=v3 -std=gnu11 -Wall -Wextra -Wno-unused-parameter -Werror -fdebug-compilation-dir=. -c -o
//go:generate bpf testdata/bpf/single.o testdata/bpf/single.c
//go:generate bpf testdata/bpf/several.o testdata/bpf/several.c
//go:generate bpf testdata/bpf/tailcall.o testdata/bpf/tailcall.c
//go:generate bpf testdata/bpf/refused.o testdata/bpf/refused.c
//go:generate bpf testdata/bpf/rewrite.o testdata/bpf/rewrite.c
//go:generate llvm-strip-19 -g testdata/bpf/single.o testdata/bpf/several.o testdata/bpf/tailcall.o testdata/bpf/refused.o testdata/bpf/rewrite.o

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"dispatcher": strictMain, xdpLoader: main, "othertool": otherTool})
}

// TestScripts runs each script in testdata/script against the real command, with its own network
// namespaces and bpffs. A script has:
//
//	$NS, $DEV    a namespace with a veth device, up
//	$PEER        the namespace of the other end
//	$PEERDEV     its device
//	$CGROUP      an empty cgroup, and $CHILD another one inside
//	$BPFFS       an empty bpffs
//	$BPF         the folder of object files (testdata/bpf)
//
//	fails N CMD...         run CMD, which must end with exit status N and say well why
//	await PATTERN CMD...   run CMD until its stdout matches
//	getenv VAR PATTERN     set VAR to what the group in PATTERN matches in stdout
//	capture FILE PACKET... write a pcap file of UDP packets: SRC:PORT>DST:PORT, with /N only N bytes
//	mask FILE              replace what differs from run to run by words
//	arrive N               of ten datagrams from PEER N arrive in NS
//	clean                  nothing is attached, and no chain has a pin
//	othertool ...          do what other tools do; see below
//	[FEATURE]              this kernel has a feature of "dispatcher features"
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
			cgroup := testenv.NewCgroup(t)
			testscript.RunT(scriptT{t}, testscript.Params{
				Files:              []string{script},
				RequireUniqueNames: true,
				UpdateScripts:      *update,
				Condition:          condition,
				Setup: func(env *testscript.Env) error {
					env.Setenv("NS", pair.Server.Name)
					env.Setenv("NSPATH", pair.Server.Path())
					env.Setenv("DEV", pair.ServerDev)
					env.Setenv("PEER", pair.Client.Name)
					env.Setenv("PEERDEV", pair.ClientDev)
					env.Setenv("CGROUP", cgroup.Path)
					env.Setenv("CHILD", cgroup.Child(t, "child").Path)
					env.Setenv("BPFFS", bpffs)
					env.Setenv("BPF", objects)
					return nil
				},
				Cmds: map[string]func(*testscript.TestScript, bool, []string){
					"fails":   fails,
					"await":   await,
					"getenv":  getenv,
					"mask":    mask,
					"clean":   clean,
					"capture": capture,
					"arrive": func(ts *testscript.TestScript, neg bool, args []string) {
						if neg || len(args) != 1 {
							ts.Fatalf("usage: arrive N")
						}
						if n := pair.Passed(t, 7000, 10); strconv.Itoa(n) != args[0] {
							ts.Fatalf("%d datagrams of 10 arrived, want %s", n, args[0])
						}
					},
				},
			})
		})
	}
}

// features returns what "dispatcher features" reports.
var features = sync.OnceValues(func() (map[string]bool, error) {
	kernel.RaiseMemlock() // as main does
	list, err := dispatcher.Features(context.Background(), dispatcher.Target{Hook: hook.XDP}, dispatcher.ReadOptions{})
	supported := map[string]bool{}
	for _, f := range list {
		supported[f.Name] = f.Supported
	}
	return supported, err
})

// condition tells whether a condition of a script is true: a feature of the
// kernel. TestFeaturesAgree checks that the features are reported correctly.
func condition(name string) (bool, error) {
	supported, err := features()
	if err != nil {
		return false, err
	}
	has, known := supported[name]
	if !known {
		return false, fmt.Errorf("unknown condition %q: no feature has that name", name)
	}
	return has, nil
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
	if args[1] == "dispatcher" {
		if err := checkSaid(ts.ReadFile("stderr"), exit.ExitCode()); err != nil {
			ts.Fatalf("%v", err)
		}
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

func capture(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 1 {
		ts.Fatalf("usage: capture FILE [PACKET...]")
	}
	word := binary.LittleEndian.AppendUint32
	b := word(word(word(word(word(word(nil, 0xa1b2c3d4), 2|4<<16), 0), 0), 65535), 1)
	for _, text := range args[1:] {
		text, cut, isCut := strings.Cut(text, "/")
		from, to, _ := strings.Cut(text, ">")
		src, dst := netip.MustParseAddrPort(from), netip.MustParseAddrPort(to)
		p, err := packet.Build(packet.Spec{
			From: src.Addr(), FromPort: src.Port(), To: dst.Addr(), ToPort: dst.Port(), FromMAC: somebody, ToMAC: somebody,
		})
		ts.Check(err)
		size := len(p)
		if isCut {
			n, err := strconv.Atoi(cut)
			ts.Check(err)
			p = p[:n]
		}
		b = append(word(word(word(word(b, 0), 0), uint32(len(p))), uint32(size)), p...)
	}
	ts.Check(os.WriteFile(ts.MkAbs(args[0]), b, 0o600))
}

// masks match what differs from run to run, in JSON and in tables, which have
// columns as wide as their texts.
var masks = []struct{ pattern, word string }{
	{`("(?:ifindex|inode|cookie|link_id|dispatcher_id|slot_id|id|program_id|cgroup_id|revision)": )[0-9]+`, "${1}0"},
	{`("(?:elapsed_ns|clock_ns|runs|time_ns|runs_per_second|ns_per_run|pass)": )[0-9]+`, "${1}0"}, // in the JSON of top
	{`("time": )"[-0-9T:.]+Z"`, `${1}"TIME"`},
	{`("tag": )"[0-9a-f]{16}"`, `${1}"TAG"`},
	{`("loaded_at": )"[-0-9T:]+Z"`, `${1}"TIME"`},
	{`/(xdp|tcx|cgroup)_[0-9]+/`, "/${1}_0/"},
	{`sha256\.[0-9a-f]{32}`, "sha256.HASH"},
	{`\(ifindex [0-9]+\)`, "(ifindex 0)"},
	{`\b(link|dispatcher|netns|revision|map|program|pid) [0-9]+`, "$1 0"},
	{`(\S)   +`, "$1  "},
	{`(?m)^(  [-0-9]+  \S+  \S+  )[0-9]+  `, "${1}ID  "},
	{`  ID  [0-9]+  `, "  ID  LINK  "},
	{`  [0-9a-f]{16}  [0-9]{4}-[-+Z0-9:T]+  `, "  TAG  TIME  "},
	{`  TIME  ([0-9]+)  [0-9]+  `, "  TIME  $1  ID  "},
}

func mask(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: mask FILE")
	}
	text := ts.ReadFile(args[0])
	for _, name := range []string{"BPFFS", "CGROUP", "PEER", "NS", "WORK"} {
		text = regexp.MustCompile(regexp.QuoteMeta(ts.Getenv(name))+`\b`).ReplaceAllLiteralString(text, "$"+name)
	}
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
	for _, cgroup := range []string{ts.Getenv("CGROUP"), ts.Getenv("CHILD")} {
		ts.Check(ts.Exec("dispatcher", "-q", "list", "cgroup", cgroup))
		if out := ts.ReadFile("stdout"); out != "" {
			ts.Fatalf("left attached:\n%s", out)
		}
	}
	pins, err := os.ReadDir(filepath.Join(ts.Getenv("BPFFS"), "libdispatcher"))
	if err == nil && len(pins) > 0 {
		ts.Fatalf("left pinned: %v", pins)
	}
	// The folder may have other files too: ip and tc make it a link to theirs.
	if dispatchers, _ := filepath.Glob(filepath.Join(ts.Getenv("BPFFS"), "xdp", "dispatch-*")); len(dispatchers) > 0 {
		ts.Fatalf("left pinned by libxdp's protocol: %v", dispatchers)
	}
}
