package xdploader_test

import (
	"bytes"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"

	"github.com/libdispatcher/dispatcher/internal/testenv"
	"github.com/libdispatcher/dispatcher/internal/xdploader"
	"github.com/libdispatcher/dispatcher/libxdp"
)

// record writes the golden files from the xdp-loader that XDP_LOADER names,
// which must be version 1.6.3.
var record = flag.Bool("record", false, "record the golden files from $XDP_LOADER")

// objects is the folder of the test objects, in which commands run.
const objects = "../../test/testdata"

// An xdpLoader runs one command line.
type xdpLoader func(t *testing.T, env map[string]string, args ...string) (stdout, stderr string, exit int)

// packageLoader is this package.
func packageLoader(t *testing.T, env map[string]string, args ...string) (string, string, int) {
	var stdout, stderr bytes.Buffer
	exit := xdploader.Main(t.Context(), append([]string{"xdp-loader"}, args...), &stdout, &stderr, func(name string) string { return env[name] })
	return stdout.String(), stderr.String(), exit
}

// realLoader is the tool of xdp-tools at that path.
func realLoader(path string) xdpLoader {
	return func(t *testing.T, env map[string]string, args ...string) (string, string, int) {
		cmd := exec.CommandContext(t.Context(), path, args...)
		cmd.Env = os.Environ()
		for name, value := range env {
			cmd.Env = append(cmd.Env, name+"="+value)
		}
		var stdout, stderr bytes.Buffer
		cmd.Stdout, cmd.Stderr = &stdout, &stderr
		err := cmd.Run()
		var status *exec.ExitError
		if err != nil && !errors.As(err, &status) {
			t.Fatal(err)
		}
		return stdout.String(), stderr.String(), cmd.ProcessState.ExitCode()
	}
}

// A scene is a device for a script.
type scene struct {
	pair  *testenv.Pair
	bpffs string
	next  func() xdpLoader // for the next command
}

// play runs the commands of a script. It returns the script with the commands'
// output in place of the expected output:
//
//	# a comment
//	$ [NAME=VALUE] ARGUMENT...    xdp-loader with these arguments; {id:NAME} is the
//	                              id of the first program of that name in its status
//	1> ...                        what it prints to stdout
//	2> ...                        what it prints to stderr
//	= N                           its exit code, if it is not 0
//	% pins                        list the pins
//	% off DEVICE                  detach by netlink what is on the device
//	% forget                      remove the pins of libxdp
func (s *scene) play(t *testing.T, script string) string {
	var out strings.Builder
	for line := range strings.Lines(script) {
		line = strings.TrimSuffix(line, "\n")
		kind, rest, _ := strings.Cut(line, " ")
		switch kind {
		case "#":
			fmt.Fprintln(&out, line)
		case "$":
			fmt.Fprintln(&out, line)
			s.command(t, &out, rest)
		case "%":
			fmt.Fprintln(&out, line)
			s.directive(t, &out, strings.Fields(rest))
		}
	}
	return out.String()
}

func (s *scene) command(t *testing.T, out *strings.Builder, line string) {
	env := map[string]string{"LIBXDP_BPFFS": s.bpffs}
	args := strings.Fields(line)
	for len(args) > 0 && regexp.MustCompile(`^[A-Z_]+=`).MatchString(args[0]) {
		name, value, _ := strings.Cut(args[0], "=")
		env[name] = value
		args = args[1:]
	}
	for i, arg := range args {
		args[i] = regexp.MustCompile(`\{.*\}`).ReplaceAllStringFunc(arg, func(word string) string { return s.expand(t, word) })
		if arg == `""` {
			args[i] = ""
		}
	}
	stdout, stderr, exit := s.next()(t, env, args...)
	for i, text := range []string{stdout, stderr} {
		for line := range strings.Lines(s.normal(text)) {
			fmt.Fprintf(out, "%d> %s\n", i+1, strings.TrimSuffix(line, "\n"))
		}
	}
	if exit != 0 {
		fmt.Fprintf(out, "= %d\n", exit)
	}
}

func (s *scene) expand(t *testing.T, word string) string {
	word = strings.Trim(word, "{}")
	switch name, ok := strings.CutPrefix(word, "id:"); {
	case ok:
		status, _, _ := packageLoader(t, map[string]string{"LIBXDP_BPFFS": s.bpffs}, "status")
		id := memberID(status, name)
		qt.Assert(t, qt.Not(qt.Equals(id, "")), qt.Commentf("no %s in\n%s", name, status))
		return id
	case word == "bpffs":
		return s.bpffs
	case word == "otherorder": // an object for the other byte order
		return "../../programs/internal/object/count_" + otherOrder + ".o"
	}
	t.Fatalf("unknown {%s}", word)
	return ""
}

// memberID finds the first program of that name in the output of status.
func memberID(status, name string) string {
	m := regexp.MustCompile(`(?m) ` + name + ` .* (\d+) +[0-9a-f]{16}`).FindStringSubmatch(status)
	if m == nil {
		return ""
	}
	return m[1]
}

func (s *scene) directive(t *testing.T, out *strings.Builder, words []string) {
	switch words[0] {
	case "pins":
		var paths []string
		qt.Assert(t, qt.IsNil(filepath.WalkDir(s.bpffs, func(path string, _ fs.DirEntry, err error) error {
			paths = append(paths, strings.TrimPrefix(path, s.bpffs))
			return err
		})))
		slices.Sort(paths)
		for _, path := range paths {
			// The kernel has files of its own in a bpffs, and creates the folder
			// itself at its own time.
			if path != "" && path != "/xdp" && !strings.HasSuffix(path, ".debug") {
				fmt.Fprintf(out, "1> %s\n", s.normal(path))
			}
		}
	case "off":
		s.pair.Server.IP(t, "link", "set", "dev", words[1], "xdp", "off")
	case "forget":
		folders, err := filepath.Glob(s.bpffs + "/xdp/dispatch-*")
		qt.Assert(t, qt.IsNil(err))
		qt.Assert(t, qt.IsTrue(len(folders) > 0))
		for _, f := range folders {
			qt.Assert(t, qt.IsNil(os.RemoveAll(f)))
		}
	default:
		t.Fatalf("unknown directive %q", words)
	}
}

var (
	idAndTag     = regexp.MustCompile(`( (?:native|skb|hw)? +)\b\d+ +([0-9a-f]{16})\b`)
	dispatcherID = regexp.MustCompile(`(xdp_dispatcher +\w+ +# )[0-9a-f]{16}`)
	otherNumbers = regexp.MustCompile(`\b(ID|id|ifindex) \d+\b`)
	folder       = regexp.MustCompile(`dispatch-\d+-\d+`)
	// The limit of the test's process, the mounts of bpffs, and messages that
	// xdp-loader does not have.
	leftOut = regexp.MustCompile(`(?m)^(Current rlimit .*|Could not find BPF working dir .*| ?libdispatcher: .*)\n`)
)

// normal removes from the output what differs from run to run.
func (s *scene) normal(text string) string {
	text = strings.ReplaceAll(text, s.bpffs, "BPFFS")
	text = leftOut.ReplaceAllString(text, "")
	text = idAndTag.ReplaceAllString(text, "${1}# $2")
	text = dispatcherID.ReplaceAllString(text, "${1}TAG")
	text = otherNumbers.ReplaceAllString(text, "$1 N")
	return folder.ReplaceAllString(text, "dispatch-I-N")
}

// perform plays a script on a new device.
func perform(t *testing.T, next func() xdpLoader, script string) (result string) {
	s := &scene{pair: testenv.NewPair(t), bpffs: testenv.BPFFS(t), next: next}
	s.pair.Server.Do(t, func() { result = s.play(t, script) })
	return result
}

func scripts(t *testing.T) []string {
	testenv.CheckLeaks(t)
	names := []string{"arguments", "legacy", "fallback"}
	if libxdp.Supported() == nil {
		names[2] = "chain"
	}
	return names
}

// portable also removes what depends on the kernel: its tags, and its drivers'
// features.
func portable(text string) string {
	text = regexp.MustCompile(`# [0-9a-f]{16}`).ReplaceAllString(text, "# TAG")
	return regexp.MustCompile(`(NETDEV_XDP_ACT_\w+:\t+)(?:yes|no)`).ReplaceAllString(text, "${1}yes or no")
}

// The golden files are the output of xdp-loader 1.6.3, on Linux 6.18 and, for
// the chain, on 7.2.
func TestGolden(t *testing.T) {
	for _, name := range scripts(t) {
		path, err := filepath.Abs("testdata/" + name + ".txt")
		qt.Assert(t, qt.IsNil(err))
		golden, err := os.ReadFile(path)
		qt.Assert(t, qt.IsNil(err))
		t.Run(name, func(t *testing.T) {
			t.Chdir(objects)
			if *record {
				text := portable(perform(t, always(realLoader(os.Getenv("XDP_LOADER"))), string(golden)))
				qt.Assert(t, qt.IsNil(os.WriteFile(path, []byte(text), 0o666)))
				return
			}
			qt.Assert(t, qt.Equals(portable(perform(t, always(packageLoader), string(golden))), string(golden)))
		})
	}
}

// Where xdp-loader 1.6.3 is installed, both do the same, side by side and in
// turns: each changes and detaches what the other attached.
func TestWithTheRealOne(t *testing.T) {
	path, err := findReal()
	if err != nil {
		t.Skip("no xdp-loader 1.6.3 here ($XDP_LOADER or xdp-loader-1.6.3): runs in the kernel matrix")
	}
	for _, name := range append(scripts(t), "varies") {
		script, err := os.ReadFile("testdata/" + name + ".txt")
		qt.Assert(t, qt.IsNil(err))
		t.Run(name, func(t *testing.T) {
			t.Chdir(objects)
			want := perform(t, always(realLoader(path)), string(script))
			for how, run := range map[string]func() xdpLoader{
				"alone":    always(packageLoader),
				"in turns": inTurn(packageLoader, realLoader(path)),
				"before":   inTurn(realLoader(path), packageLoader),
			} {
				qt.Check(t, qt.Equals(perform(t, run, string(script)), want), qt.Commentf("%s", how))
			}
		})
	}
}

func always(run xdpLoader) func() xdpLoader { return func() xdpLoader { return run } }

func inTurn(first, second xdpLoader) func() xdpLoader {
	return func() xdpLoader {
		first, second = second, first
		return second
	}
}

func findReal() (string, error) {
	if path := os.Getenv("XDP_LOADER"); path != "" {
		return path, nil
	}
	return exec.LookPath("xdp-loader-" + xdploader.Version)
}
