package guest

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// ModulesFile lists the modules to load, one path each line.
const ModulesFile = "/modules"

const (
	port       = "/dev/ttyS1"
	aliveEvery = 5 * time.Second
)

const memlock = 64 << 20

var environment = []string{
	"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"HOME=/root", "USER=root", "LOGNAME=root", "TERM=dumb", "LANG=C.UTF-8", "TMPDIR=/tmp",
}

// Init is the first process of the machine. It starts a second process for the work, and reaps
// orphans, as the first process must. It does not return.
func Init() {
	err := prepare()
	if err == nil {
		err = reap()
	}
	if err != nil {
		fmt.Println("init:", err)
		if f, openErr := openPort(); openErr == nil {
			NewSender(f).Send(Failed, []byte(err.Error()))
			unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1)
		}
	}
	unix.Sync()
	// A restart ends qemu (-no-reboot).
	unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	select {}
}

func reap() error {
	runner, err := os.StartProcess("/init", []string{"/init", "steps"}, &os.ProcAttr{
		Env: environment, Files: []*os.File{os.Stdin, os.Stdout, os.Stderr},
	})
	if err != nil {
		return err
	}
	for {
		var status unix.WaitStatus
		pid, err := unix.Wait4(-1, &status, 0, nil)
		switch {
		case err == unix.EINTR:
		case err != nil:
			return fmt.Errorf("wait: %w", err)
		case pid == runner.Pid && status.ExitStatus() != 0:
			return fmt.Errorf("the process that runs the steps ended: %v", status)
		case pid == runner.Pid:
			return nil
		}
	}
}

// Steps is the second process: it runs the steps of the job.
func Steps() error {
	f, err := openPort()
	if err != nil {
		return err
	}
	out := NewSender(f)
	content, err := os.ReadFile(JobFile)
	if err != nil {
		return err
	}
	var job Job
	if err := json.Unmarshal(content, &job); err != nil {
		return fmt.Errorf("%s: %w", JobFile, err)
	}
	var name unix.Utsname
	if err := unix.Uname(&name); err != nil {
		return err
	}
	if err := out.Send(Ready, []byte(unix.ByteSliceToString(name.Release[:]))); err != nil {
		return err
	}
	go func() {
		for range time.Tick(aliveEvery) {
			out.Send(Alive, nil)
		}
	}()
	for _, step := range job.Steps {
		if err := run(out, step); err != nil {
			return err
		}
	}
	if err := out.Send(Bye, nil); err != nil {
		return err
	}
	return unix.IoctlSetInt(int(f.Fd()), unix.TCSBRK, 1) // wait until the output has been sent
}

func run(out *Sender, step Step) error {
	if err := out.Send(Begin, []byte(step.Name)); err != nil {
		return err
	}
	begin := time.Now()
	result := runCommand(step, out.Stream(Stdout), out.Stream(Stderr))
	result.Duration = time.Since(begin)
	content, err := json.Marshal(result)
	if err != nil {
		return err
	}
	return out.Send(End, content)
}

func runCommand(step Step, stdout, stderr io.Writer) Result {
	if len(step.Args) == 0 {
		return Result{Status: 127, Error: "no command"}
	}
	cmd := exec.Command(step.Args[0], step.Args[1:]...)
	cmd.Dir = step.Dir
	cmd.Env = append(cmd.Environ(), step.Env...)
	cmd.Stdout, cmd.Stderr = stdout, stderr
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true}
	// A process that the command left behind may hold the output open.
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		return Result{Status: 127, Error: err.Error()}
	}
	timedOut := make(chan struct{})
	if step.Timeout > 0 {
		timer := time.AfterFunc(step.Timeout, func() {
			close(timedOut)
			cmd.Process.Signal(unix.SIGQUIT) // a Go program then prints its stacks
			time.Sleep(10 * time.Second)
			unix.Kill(-cmd.Process.Pid, unix.SIGKILL)
		})
		defer timer.Stop()
	}
	err := cmd.Wait()
	result := Result{Status: status(cmd.ProcessState)}
	select {
	case <-timedOut:
		result.Error = fmt.Sprintf("did not end within %v", step.Timeout)
	default:
		if errors.Is(err, exec.ErrWaitDelay) {
			result.Error = "it ended, but a process that it left behind holds its output open"
		}
	}
	return result
}

func status(state *os.ProcessState) int {
	wait := state.Sys().(syscall.WaitStatus)
	if wait.Signaled() {
		return 128 + int(wait.Signal())
	}
	return wait.ExitStatus()
}

func openPort() (*os.File, error) {
	// The port is opened for blocking use: reads and writes wait in the kernel.
	fd, err := unix.Open(port, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", port, err)
	}
	// Output must pass unchanged.
	termios, err := unix.IoctlGetTermios(fd, unix.TCGETS)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", port, err)
	}
	termios.Iflag, termios.Oflag, termios.Lflag = 0, 0, 0
	termios.Cflag = unix.CS8 | unix.CREAD | unix.CLOCAL | unix.B115200
	if err := unix.IoctlSetTermios(fd, unix.TCSETS, termios); err != nil {
		return nil, fmt.Errorf("%s: %w", port, err)
	}
	return os.NewFile(uintptr(fd), port), nil
}

// mounts are what a system has before its services start. There is no bpffs: tests mount their own.
var mounts = []struct{ kind, path, options string }{
	{"proc", "/proc", ""},
	{"sysfs", "/sys", ""},
	{"devtmpfs", "/dev", ""},
	{"devpts", "/dev/pts", "mode=0620,ptmxmode=0666"},
	{"tmpfs", "/dev/shm", "mode=1777"},
	{"tmpfs", "/run", "mode=0755"},
	{"tmpfs", "/tmp", "mode=1777"},
	{"securityfs", "/sys/kernel/security", ""},
	{"debugfs", "/sys/kernel/debug", ""},
	{"tracefs", "/sys/kernel/tracing", ""},
	{"cgroup2", "/sys/fs/cgroup", ""},
}

func prepare() error {
	for _, m := range mounts {
		// The project may be in /tmp, and its files have the same paths here.
		if found, err := os.ReadDir(m.path); m.kind == "tmpfs" && err == nil && len(found) > 0 {
			if err := os.Chmod(m.path, 0o777|os.ModeSticky); err != nil {
				return err
			}
			continue
		}
		if !strings.HasPrefix(m.path, "/sys/") {
			if err := os.MkdirAll(m.path, 0o755); err != nil {
				return err
			}
		}
		if err := unix.Mount(m.kind, m.path, m.kind, 0, m.options); err != nil {
			return fmt.Errorf("mount %s on %s: %w", m.kind, m.path, err)
		}
	}
	for link, target := range map[string]string{
		"/dev/fd": "/proc/self/fd", "/dev/stdin": "fd/0", "/dev/stdout": "fd/1", "/dev/stderr": "fd/2", "/etc/mtab": "/proc/self/mounts",
	} {
		if err := os.Symlink(target, link); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	if err := unix.Sethostname([]byte("matrix")); err != nil {
		return err
	}
	if out, err := exec.Command("/usr/bin/busybox", "--install", "-s", "/bin").CombinedOutput(); err != nil {
		return fmt.Errorf("busybox --install: %w: %s", err, out)
	}
	// Before Linux 5.11 BPF memory counts towards this limit. The kernel's default of 64 KB is less
	// than systems set.
	if err := unix.Setrlimit(unix.RLIMIT_MEMLOCK, &unix.Rlimit{Cur: memlock, Max: memlock}); err != nil {
		return fmt.Errorf("set the limit of locked memory: %w", err)
	}
	// Else each network namespace has devices for tunnels from the beginning (net_has_fallback_tunnels,
	// linux/netdevice.h).
	if err := os.WriteFile("/proc/sys/net/core/fb_tunnels_only_for_init_net", []byte("2"), 0o644); err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	return loopbackUp()
}

// moduleOptions keep modules from creating devices when they load.
var moduleOptions = map[string]string{"dummy.ko": "numdummies=0", "ifb.ko": "numifbs=0", "bonding.ko": "max_bonds=0"}

func loadModules() error {
	list, err := os.ReadFile(ModulesFile)
	if err != nil {
		return err
	}
	for path := range strings.Lines(string(list)) {
		path = strings.TrimSpace(path)
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), moduleOptions[filepath.Base(path)], 0)
		f.Close()
		if err != nil && err != unix.EEXIST {
			return fmt.Errorf("load %s: %w", path, err)
		}
	}
	return nil
}

func loopbackUp() error {
	if lo, err := net.InterfaceByName("lo"); err == nil && lo.Flags&net.FlagUp != 0 {
		return nil
	}
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	request, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	request.SetUint16(unix.IFF_UP)
	return unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, request)
}
