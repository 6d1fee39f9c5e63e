package testenv

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const (
	helperEnv = "LDT_HELPER"

	// patience bounds how long a test waits for a helper: longer than any normal delay on a busy or
	// emulated machine, and short enough that a test does not seem to hang.
	patience = time.Minute
)

var helpers = map[string]func(args []string){}

// RegisterHelper names a function that [StartHelper] runs in a new process. Call it before
// [Main], from an init function or from TestMain.
func RegisterHelper(name string, fn func(args []string)) {
	if _, taken := helpers[name]; taken {
		panic("testenv: two helpers are named " + name)
	}
	helpers[name] = fn
}

// Main runs the tests, or the helper that this process was started for. Call it from TestMain. A helper
// that returns exits with 0; one that panics exits with 2.
func Main(m *testing.M) {
	name, helping := os.LookupEnv(helperEnv)
	if !helping {
		os.Exit(m.Run())
	}
	os.Unsetenv(helperEnv)
	helper, known := helpers[name]
	if !known {
		fmt.Fprintf(os.Stderr, "testenv: no helper is named %q\n", name)
		os.Exit(2)
	}
	if err := dieWithParent(); err != nil {
		fmt.Fprintf(os.Stderr, "testenv: %v\n", err)
		os.Exit(2)
	}
	kernel.RaiseMemlock()
	helper(os.Args[1:])
	os.Exit(0)
}

// dieWithParent ends this process when its parent process ends. The kernel's own signal for that comes
// when the thread ends that started the process (PR_SET_PDEATHSIG), and Go ends threads that have been in
// a namespace.
func dieWithParent() error {
	if os.Getppid() == 0 {
		return nil // the parent is in another pid namespace, and looks after this process itself
	}
	parent, err := unix.PidfdOpen(os.Getppid(), 0)
	if err != nil {
		return fmt.Errorf("open the parent's pidfd: %w", err)
	}
	go func() {
		for fds := []unix.PollFd{{Fd: int32(parent), Events: unix.POLLIN}}; fds[0].Revents == 0; {
			_, _ = unix.Poll(fds, -1)
		}
		_ = unix.Kill(os.Getpid(), unix.SIGKILL)
	}()
	return nil
}

// Proc is a helper process.
type Proc struct {
	Pid int

	name   string
	cmd    *exec.Cmd
	stdin  io.WriteCloser
	stdout output
	stderr output
	done   chan struct{} // closed when the process has ended and err is set
	err    error
}

// StartHelper runs a registered helper in a new process: this test binary, executed again. Inside
// [NetNS.Do] it starts in that namespace. It is killed at the end of the test, and when the test binary
// dies.
func StartHelper(t testing.TB, name string, args ...string) *Proc {
	t.Helper()
	return startHelper(t, &syscall.SysProcAttr{}, name, args)
}

func startHelper(t testing.TB, attr *syscall.SysProcAttr, name string, args []string) *Proc {
	t.Helper()
	if helpers[name] == nil {
		t.Fatalf("no helper is named %q", name)
	}
	p := &Proc{name: name, done: make(chan struct{})}
	p.stdout.news = make(chan struct{}, 1)
	p.stderr.news = make(chan struct{}, 1)
	p.cmd = exec.Command("/proc/self/exe", args...)
	p.cmd.Env = append(os.Environ(), helperEnv+"="+name)
	p.cmd.Stdout, p.cmd.Stderr = &p.stdout, &p.stderr
	p.cmd.SysProcAttr = attr
	p.cmd.WaitDelay = time.Second // a grandchild may keep the output open
	stdin, err := p.cmd.StdinPipe()
	if err == nil {
		p.stdin, err = stdin, p.cmd.Start()
	}
	if err != nil {
		t.Fatalf("start helper %s: %v", name, err)
	}
	p.Pid = p.cmd.Process.Pid
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	t.Cleanup(p.Kill)
	return p
}

// Expect reads lines from the helper's stdout up to one that begins with prefix, and returns the rest of
// that line without surrounding space. It fails the test when the helper ends first, or after a minute.
func (p *Proc) Expect(t testing.TB, prefix string) string {
	t.Helper()
	rest, ended := p.ExpectOrEnd(t, prefix)
	if ended {
		t.Fatalf("helper %s ended (%v) without a line %q\n%s", p.name, p.err, prefix, p.output())
	}
	return rest
}

// ExpectOrEnd is [Proc.Expect] for a helper that may end first.
func (p *Proc) ExpectOrEnd(t testing.TB, prefix string) (rest string, ended bool) {
	t.Helper()
	timeout := time.After(patience)
	for {
		for {
			line, ok := p.stdout.line()
			if !ok {
				break
			}
			if rest, ok := strings.CutPrefix(line, prefix); ok {
				return strings.TrimSpace(rest), false
			}
		}
		if ended {
			return "", true
		}
		select {
		case <-p.stdout.news:
		case <-p.done: // check once more: its last lines may have come meanwhile
			ended = true
		case <-timeout:
			t.Fatalf("helper %s: no line %q within %s\n%s", p.name, prefix, patience, p.output())
		}
	}
}

// Send writes a line to the helper's stdin. If the helper has ended Send reports nothing; [Proc.Wait]
// does.
func (p *Proc) Send(line string) {
	io.WriteString(p.stdin, line+"\n")
}

// Kill kills the helper with SIGKILL if it still runs, and waits until it is gone.
func (p *Proc) Kill() {
	p.cmd.Process.Kill()
	<-p.done
}

// Wait waits until the helper ends by itself and returns its exit status as an error, as
// [exec.Cmd.Wait] does. After a minute it kills the helper.
func (p *Proc) Wait() error {
	select {
	case <-p.done:
	case <-time.After(patience):
		p.Kill()
		return fmt.Errorf("helper %s did not end within %s\n%s", p.name, patience, p.output())
	}
	if p.err != nil {
		return fmt.Errorf("helper %s: %w\n%s", p.name, p.err, p.output())
	}
	return nil
}

// Stop closes the helper's stdin, which asks the helper to end, and waits for it as
// [Proc.Wait] does.
func (p *Proc) Stop() error {
	p.stdin.Close()
	return p.Wait()
}

func (p *Proc) output() string {
	return fmt.Sprintf("stdout:\n%s\nstderr:\n%s", p.stdout.all(), p.stderr.all())
}

// output collects what a process writes and returns it line by line.
type output struct {
	mu   sync.Mutex
	text []byte
	read int // bytes returned so far
	news chan struct{}
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	o.text = append(o.text, b...)
	o.mu.Unlock()
	select {
	case o.news <- struct{}{}:
	default:
	}
	return len(b), nil
}

func (o *output) line() (string, bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	line, _, ok := bytes.Cut(o.text[o.read:], []byte("\n"))
	if !ok {
		return "", false
	}
	o.read += len(line) + 1
	return string(line), true
}

func (o *output) all() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return string(o.text)
}
