package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/libdispatcher/dispatcher/internal/matrix/cache"
	"github.com/libdispatcher/dispatcher/internal/matrix/guest"
	"github.com/libdispatcher/dispatcher/internal/matrix/image"
)

// testsThere is the folder of the test binaries in a machine. The sources have the same path as here, so
// that failing tests can show lines of them.
const testsThere = "/tests"

// packageTimeout bounds the tests of one package, emulated on a busy machine.
const packageTimeout = 30 * time.Minute

// A kernelResult is the result of a run on one kernel.
type kernelResult struct {
	Series   string          `json:"series"`
	Release  string          `json:"release"`
	Features json.RawMessage `json:"features"` // from "dispatcher features -o json"
	Packages []packageResult `json:"packages"`
}

// A packageResult is the result of one package's tests.
type packageResult struct {
	Package string       `json:"package"`
	Status  int          `json:"status"`
	Seconds float64      `json:"seconds"`
	Tests   []testResult `json:"tests"`
}

const testUsage = `usage: matrix test [OPTION]... [PACKAGE]...

Runs the project's tests in virtual machines with Debian's kernels. A package is given by its folder.

`

// testCommand runs "matrix test".
func testCommand(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("test", flag.ContinueOnError)
	t := tester{show: os.Stdout}
	kernels := flags.String("kernel", "", "the `series` of the kernels, comma-separated (default all)")
	flags.BoolVar(&t.short, "short", false, "leave out tests that take long, see leftout.txt")
	flags.BoolVar(&t.verbose, "v", false, "show all output of the tests")
	flags.StringVar(&t.run, "run", "", "run only the tests that match this `pattern`")
	flags.StringVar(&t.results, "results", "bin/kernels", "the `folder` for results, logs and consoles")
	flags.IntVar(&t.jobs, "jobs", maxMachines, "`number` of machines at once")
	t.options.flags(flags)
	flags.Usage = func() {
		fmt.Fprint(flags.Output(), testUsage)
		flags.PrintDefaults()
	}
	if err := flags.Parse(args); err != nil {
		return exitStatus(2)
	}
	for _, k := range slices.Backward(image.Kernels) { // the newest has the most to do
		if *kernels == "" || slices.Contains(strings.Split(*kernels, ","), k.Name) {
			t.kernels = append(t.kernels, k.Name)
		}
	}
	if *kernels != "" && len(t.kernels) != len(strings.Split(*kernels, ",")) {
		_, err := image.FindSeries(*kernels)
		return err
	}
	for _, p := range flags.Args() {
		t.packages = append(t.packages, filepath.Clean(p))
	}
	return t.all(ctx)
}

// A tester runs tests on kernels.
type tester struct {
	options
	kernels  []string
	packages []string // empty: all
	short    bool
	verbose  bool
	jobs     int
	run      string
	results  string
	show     io.Writer

	mu       sync.Mutex
	leftOut  []leftOut
	root     string // the folder of the project
	binaries []testBinary
}

// say prints lines, each with the kernel in front. Lines of one call stay together.
func (t *tester) say(kernel, format string, args ...any) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for line := range strings.Lines(fmt.Sprintf(format, args...)) {
		fmt.Fprintf(t.show, "%-5s %s\n", kernel, strings.TrimRight(line, "\r\n"))
	}
}

func (t *tester) all(ctx context.Context) error {
	begin := time.Now()
	var err error
	if t.leftOut, err = parseLeftOut(leftOutFile); err != nil {
		return err
	}
	if t.root, err = moduleRoot(ctx); err != nil {
		return err
	}
	if err := os.MkdirAll(t.results, 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp("", "libdispatcher-tests-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	if err := t.build(ctx, tmp); err != nil {
		return err
	}

	room := make(chan struct{}, max(t.jobs, 1))
	failures := make([]error, len(t.kernels))
	var wait sync.WaitGroup
	for i, kernel := range t.kernels {
		room <- struct{}{}
		if ctx.Err() != nil {
			break
		}
		wait.Go(func() {
			defer func() { <-room }()
			failures[i] = t.kernel(ctx, kernel)
		})
	}
	wait.Wait()
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	t.sayLeftOut()
	var failed []string
	for i, err := range failures {
		if err != nil {
			failed = append(failed, t.kernels[i])
			fmt.Fprintf(t.show, "FAIL  %s: %v\n", t.kernels[i], err)
		} else {
			fmt.Fprintf(t.show, "ok    %s\n", t.kernels[i])
		}
	}
	fmt.Fprintf(t.show, "%d kernels, %.0f s; logs are in %s; %s\n", len(t.kernels), time.Since(begin).Seconds(), t.results, cached())
	if len(failed) > 0 {
		return exitStatus(1)
	}
	return nil
}

// cached says what the machines keep on this computer.
func cached() string {
	c, err := cache.Open(nil)
	if err != nil {
		return err.Error()
	}
	size, err := c.Size()
	if err != nil {
		return err.Error()
	}
	return fmt.Sprintf("%s has %d MB of kernels and tools", c.Dir, size>>20)
}

// build builds the files for the machines.
func (t *tester) build(ctx context.Context, tmp string) error {
	packages := t.packages
	if len(packages) == 0 {
		var err error
		if packages, err = testPackages(ctx, t.root); err != nil {
			return err
		}
	}
	packages = slices.DeleteFunc(packages, func(p string) bool {
		return !slices.ContainsFunc(t.kernels, func(k string) bool {
			whole, _ := skipping(t.leftOut, k, p, t.short)
			return !whole
		})
	})
	t.say("all", "building the tests of %d packages", len(packages))
	var err error
	if t.binaries, err = buildTests(ctx, t.root, tmp, packages); err != nil {
		return err
	}
	command := filepath.Join(tmp, "dispatcher")
	if err := buildCommand(ctx, t.root, command); err != nil {
		return err
	}
	if t.files, err = sources(t.root); err != nil {
		return err
	}
	goTool := filepath.Join(tmp, "go")
	if err := os.WriteFile(goTool, []byte(goStandIn), 0o755); err != nil {
		return err
	}
	t.files = append(t.files, file{command, "/usr/local/bin/dispatcher"}, file{goTool, "/usr/local/bin/go"})
	for _, b := range t.binaries {
		t.files = append(t.files, file{b.Path, testsThere + "/" + filepath.Base(b.Path)})
	}
	t.tools = []string{"all"}
	return nil
}

// goStandIn is the command "go" in the machines. Some tests build the command dispatcher, which the
// machine has already. For anything else goStandIn fails.
const goStandIn = `#!/bin/sh
[ "$1" = build ] || { echo "go $*: there is no Go in this machine" >&2; exit 1; }
while [ $# -gt 1 ]; do
	[ "$1" = -o ] && out=$2
	shift
done
case $1 in
*/cmd/dispatcher) exec cp /usr/local/bin/dispatcher "$out" ;;
esac
echo "go build $1: there is no Go in this machine" >&2
exit 1
`

const featuresStep = "features"

// featuresScript runs "dispatcher features" with a bpffs, as on an ordinary system, and unmounts it:
// tests mount their own.
const featuresScript = `mount -t bpf bpf /sys/fs/bpf
ip link add probe0 type veth peer name probe1
dispatcher features probe0 -o json
ip link del probe0
umount /sys/fs/bpf`

// steps returns the steps of a machine, and the names of their packages.
func (t *tester) steps(kernel string) []guest.Step {
	steps := []guest.Step{{
		Name:    featuresStep,
		Args:    []string{"sh", "-ec", featuresScript},
		Timeout: time.Minute,
	}}
	for _, b := range t.binaries {
		whole, pattern := skipping(t.leftOut, kernel, b.Package, t.short)
		if whole {
			continue
		}
		args := []string{testsThere + "/" + filepath.Base(b.Path), "-test.v=test2json", "-test.timeout=" + packageTimeout.String()}
		if pattern != "" {
			args = append(args, "-test.skip="+pattern)
		}
		if t.run != "" {
			args = append(args, "-test.run="+t.run)
		}
		steps = append(steps, guest.Step{
			Name: b.Package, Args: args, Dir: filepath.Join(t.root, b.Package), Timeout: packageTimeout + time.Minute,
		})
	}
	return steps
}

// kernel runs the tests on one kernel.
func (t *tester) kernel(ctx context.Context, kernel string) error {
	raw, err := os.Create(filepath.Join(t.results, kernel+".log"))
	if err != nil {
		return err
	}
	defer raw.Close()
	o := t.options
	o.quiet = true
	o.console = filepath.Join(t.results, kernel+".console")
	r := &recorder{tester: t, raw: raw, kernelResult: kernelResult{Series: kernel}}
	t.say(kernel, "booting")
	if err := boot(ctx, kernel, o, t.steps(kernel), handler{ready: r.ready, begin: r.begin, output: r.output, end: r.end}); err != nil {
		if r.log != nil {
			r.log.Close()
			err = fmt.Errorf("%w\nin the tests of %s, which had said:\n%s", err, r.step, r.log.Failures())
		}
		return err
	}
	if console, err := os.ReadFile(o.console); err == nil {
		for _, line := range complaints(string(console)) {
			t.say(kernel, "the kernel said: %s", line)
		}
	}
	content, err := json.MarshalIndent(r.kernelResult, "", "  ")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(t.results, kernel+".json"), append(content, '\n'), 0o644); err != nil {
		return err
	}
	return r.verdict()
}
