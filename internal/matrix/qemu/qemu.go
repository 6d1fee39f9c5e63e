// Package qemu runs a job in a virtual machine and passes on the machine's
// reports.
package qemu

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/libdispatcher/dispatcher/internal/matrix/guest"
)

// Program is the program that runs virtual machines, from Debian's package qemu-system-x86.
const Program = "qemu-system-x86_64"

// A Machine describes a virtual machine to start.
type Machine struct {
	Kernel  string // path of the kernel
	Initrd  string
	Console string // file for the kernel's output
	Append  string // added to the kernel's command line
	Memory  int    // megabytes
	CPUs    int
	KVM     bool
	// Counted lets the machine's clock count the executed instructions of its one processor, so that
	// equal work takes equal time (tcg with -icount).
	Counted bool
}

// Handler gets the machine's reports, one call at a time.
type Handler struct {
	Ready  func(release string)
	Begin  func(step string)
	Output func(stderr bool, content []byte)
	End    func(guest.Result)
}

// quiet is how long a machine may be silent before it counts as hung. An emulated machine boots in 7 to
// 15 s on an idle computer, and reports every 5 s after that.
const (
	quietAtBoot = 3 * time.Minute
	quiet       = 2 * time.Minute
)

func (m Machine) args() []string {
	// Emulated processors take turns on one thread. With a thread for each, qemu 7.2 sometimes
	// executes an instruction that the kernel has just replaced on another processor, and the kernel
	// panics (int3 in bpf_dispatcher_xdp_func). Several threads are no faster either.
	accel := []string{"-accel", "tcg,thread=single"}
	if m.KVM {
		accel = []string{"-accel", "kvm", "-cpu", "host"}
	}
	if m.Counted {
		accel = []string{"-accel", "tcg,thread=single", "-icount", "shift=0,sleep=off"}
	}
	return append(accel,
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-m", strconv.Itoa(m.Memory), "-smp", strconv.Itoa(m.CPUs),
		"-serial", "file:"+m.Console,
		"-chardev", "stdio,id=results,signal=off", "-serial", "chardev:results",
		"-kernel", m.Kernel, "-initrd", m.Initrd,
		"-append", strings.TrimSpace("console=ttyS0 loglevel=5 panic=-1 oops=panic "+m.Append))
}

// Run boots the machine and returns when the machine has done its job. The error says what went wrong
// with the machine; the handler gets the results of the steps.
func (m Machine) Run(ctx context.Context, h Handler) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	cmd := exec.CommandContext(ctx, Program, m.args()...)
	// After "KVM internal error" the machine stands still.
	stderr := &watchedBuffer{word: "KVM internal error", found: func() { cancel(errors.New("KVM internal error")) }}
	cmd.Stderr = stderr
	// The machine ends with this process, and only this process handles Ctrl-C.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	runtime.LockOSThread() // Pdeathsig acts when the thread that started the process ends
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		return err
	}
	watchdog := time.AfterFunc(quietAtBoot, func() {
		cancel(fmt.Errorf("the machine hangs: it was silent for minutes"))
	})
	defer watchdog.Stop()

	done, receiveErr := receive(out, h, func() { watchdog.Reset(quiet) })
	if receiveErr != nil {
		cancel(receiveErr)
	}
	io.Copy(io.Discard, out)
	waitErr := cmd.Wait()
	switch {
	case done:
		return nil
	case context.Cause(ctx) != nil:
		return context.Cause(ctx)
	case waitErr != nil:
		return fmt.Errorf("%s: %w\n%s", Program, waitErr, strings.TrimSpace(stderr.String()))
	}
	return errors.New("the machine ended before it was done: the kernel panicked, or restarted")
}

// receive reads frames until the machine reports that it is done, or ends.
func receive(r io.Reader, h Handler, alive func()) (done bool, err error) {
	for {
		kind, content, err := guest.Receive(r)
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, os.ErrClosed) {
			return done, nil
		}
		if err != nil {
			return done, err
		}
		alive()
		switch kind {
		case guest.Ready:
			h.Ready(string(content))
		case guest.Begin:
			h.Begin(string(content))
		case guest.Stdout, guest.Stderr:
			h.Output(kind == guest.Stderr, content)
		case guest.End:
			var result guest.Result
			if err := json.Unmarshal(content, &result); err != nil {
				return false, err
			}
			h.End(result)
		case guest.Failed:
			return false, errors.New("in the machine: " + string(content))
		case guest.Bye:
			done = true
		}
	}
}

// watchedBuffer keeps what is written to it, and reports when it sees a word. Only the goroutine
// that copies the output writes to it, and the buffer is read after that goroutine has ended.
type watchedBuffer struct {
	strings.Builder
	word  string
	found func()
}

func (b *watchedBuffer) Write(p []byte) (int, error) {
	n, err := b.Builder.Write(p)
	if strings.Contains(b.String(), b.word) {
		b.found()
	}
	return n, err
}
