package demo

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
	"github.com/libdispatcher/dispatcher/internal/kernel"
)

const (
	// prefix begins the name of everything that the demo makes; the process id
	// follows.
	prefix = "ld-demo-"
	device = "veth1"

	// patience bounds how long an operation may take that should take
	// milliseconds.
	patience = 10 * time.Second
)

// executable runs as the command "dispatcher": it is this process's own file.
var executable = "/proc/self/exe"

// A stage is where the demo plays: two network namespaces, a cgroup, a bpffs,
// the running processes, and the functions that undo all of it.
type stage struct {
	*transcript
	name    string            // begins all names here
	vars    map[string]string // in the commands
	bpffs   string
	net     *network
	tc      hook.Hook // the hook for incoming packets on TC, of TCX or of clsact
	cgroup  string    // empty while there is none
	watcher uint32    // id of the program that tc attaches
	other   io.Closer // the link of another tool
	missed  int       // acts that could not be played
	inPart  int       // acts of which a part could not be shown
	made    ledger
	undo    []func() error
	owners  map[string]*owner // by member
}

func newStage(t *transcript) *stage {
	name := fmt.Sprintf("%s%d", prefix, os.Getpid())
	bpffs := filepath.Join(os.TempDir(), name)
	return &stage{
		transcript: t,
		name:       name,
		bpffs:      bpffs,
		tc:         hook.TCXIngress,
		made:       newLedger(),
		owners:     map[string]*owner{},
		vars:       map[string]string{"CLIENT": name + "-client", "NS": name + "-server", "BPFFS": bpffs},
	}
}

// later adds a function to call at the end. They are called in reverse order.
func (s *stage) later(undo func() error) { s.undo = append(s.undo, undo) }

// strike removes everything that was made, whatever has happened, and checks
// that it is gone.
func (s *stage) strike() error {
	var errs []error
	for _, undo := range slices.Backward(s.undo) {
		errs = append(errs, undo())
	}
	s.undo = nil
	return errors.Join(append(errs, attempt(func() {
		s.gone(s.remains(), "nothing is left: no link, program, map, pin, namespace, cgroup or process of the demo")
	}))...)
}

func (s *stage) expand(line string) string {
	return os.Expand(line, func(name string) string { return s.vars[name] })
}

// command returns a call of what the line would run in a shell; the line has
// words and variables. The process ends with this one.
func (s *stage) command(ctx context.Context, line string) *exec.Cmd {
	words := strings.Fields(s.expand(line))
	path := words[0]
	if path == "dispatcher" {
		path = executable
	}
	cmd := exec.CommandContext(ctx, path, words[1:]...)
	cmd.Args[0] = words[0]
	// Only the demo handles Ctrl-C, and it ends its processes in order.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	return cmd
}

// quietly runs a command line and returns what it prints.
func (s *stage) quietly(ctx context.Context, line string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	return output(s.command(ctx, line))
}

func output(cmd *exec.Cmd) (string, error) {
	out, err := cmd.CombinedOutput()
	if err != nil {
		err = fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(out))
	}
	return string(out), err
}

// try shows a command line to the reader and runs it.
func (s *stage) try(ctx context.Context, line string) (string, error) {
	s.show(line)
	out, err := s.quietly(ctx, line)
	s.answer(out)
	return out, err
}

// run runs command lines that must succeed.
func (s *stage) run(ctx context.Context, lines ...string) {
	for _, line := range lines {
		value(s.try(ctx, line))
	}
}

// target returns the hook on veth1, or on the demo's cgroup.
func (s *stage) target(h hook.Hook) dispatcher.Target {
	if h.OnCgroup() {
		return dispatcher.On(h, s.cgroup)
	}
	return dispatcher.On(h, device).In(s.vars["NS"])
}

// list shows the chain on a hook of veth1.
func (s *stage) list(ctx context.Context, h hook.Hook) *hook.Chain {
	s.run(ctx, fmt.Sprintf(cli+"list %s veth1", h))
	return s.chain(ctx, h)
}

// chain reads the chain on a hook, and enters it in the ledger.
func (s *stage) chain(ctx context.Context, h hook.Hook) *hook.Chain {
	return s.chainOn(ctx, s.target(h))
}

func (s *stage) chainOn(ctx context.Context, t dispatcher.Target) *hook.Chain {
	c := value(dispatcher.Read(ctx, t, dispatcher.ReadOptions{BPFFS: s.bpffs}))
	s.made.addChain(c)
	return c
}

// An owner is a process that holds a member.
type owner struct {
	*exec.Cmd
	last bytes.Buffer // its output on stderr
}

// hold runs an "attach --hold" in the background and returns when the process
// holds its member.
func (s *stage) hold(ctx context.Context, line string) *owner {
	s.show(line + " &")
	o := &owner{Cmd: s.command(ctx, line)}
	o.Stderr = &o.last
	stdout := value(o.StdoutPipe())
	must(o.Start())
	s.later(o.kill)
	defer time.AfterFunc(patience, func() { _ = o.Process.Kill() }).Stop()
	words, _ := bufio.NewReader(stdout).ReadString('\n')
	if words == "" {
		_ = o.Wait()
		must(fmt.Errorf("%s: %v: %s", s.expand(line), o.ProcessState, strings.TrimSpace(o.last.String())))
	}
	s.answer(words)
	return o
}

// kill ends the process with SIGKILL.
func (o *owner) kill() error {
	_ = o.Process.Kill()
	_ = o.Wait()
	return nil
}

// words waits until the process ends by itself and returns its last output.
func (o *owner) words() string {
	late := time.AfterFunc(patience, func() { _ = o.Process.Kill() })
	_ = o.Wait()
	if !late.Stop() {
		must(fmt.Errorf("process %d did not end", o.Process.Pid))
	}
	return o.last.String()
}

// mountBPFFS gives the demo a bpffs of its own.
func (s *stage) mountBPFFS() {
	s.show("mkdir -m 0700 $BPFFS; mount -t bpf bpffs $BPFFS")
	// Mkdir does not follow a symbolic link that another user put into /tmp.
	must(os.Mkdir(s.bpffs, 0o700))
	s.later(func() error { return os.Remove(s.bpffs) })
	value(kernel.MountBPFFS(s.bpffs))
	s.later(func() error {
		err := whileBusy(func() error { return unix.Unmount(s.bpffs, 0) })
		if err != nil {
			err = fmt.Errorf("unmount %s: %w", s.bpffs, errors.Join(err, unix.Unmount(s.bpffs, unix.MNT_DETACH)))
		}
		return err
	})
}

// whileBusy repeats a removal for as long as processes that were killed just now may
// be in the way.
func whileBusy(remove func() error) error {
	for start := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if err := remove(); err != unix.EBUSY || time.Since(start) > time.Second {
			return err
		}
	}
}

// addNetNS makes a namespace. The demo removes it, with all that is in it, at
// the end.
func (s *stage) addNetNS(ctx context.Context, name string) {
	// The removal also works after an interrupted ip.
	s.later(func() error { return removeNetNS(filepath.Join(kernel.NetNSDir, s.expand(name))) })
	s.run(ctx, "ip netns add "+name)
}

// removeNetNS does what "ip netns delete" does.
func removeNetNS(path string) error {
	// EINVAL: the file exists, but nothing is mounted on it.
	if err := unix.Unmount(path, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
		return fmt.Errorf("unmount %s: %w", path, err)
	}
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}
