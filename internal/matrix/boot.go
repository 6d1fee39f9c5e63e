package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/libdispatcher/dispatcher/internal/matrix/cache"
	"github.com/libdispatcher/dispatcher/internal/matrix/guest"
	"github.com/libdispatcher/dispatcher/internal/matrix/image"
	"github.com/libdispatcher/dispatcher/internal/matrix/initramfs"
	"github.com/libdispatcher/dispatcher/internal/matrix/qemu"
)

// A file is a file or folder of this computer and its path in the machine.
type file struct{ here, there string }

// options describe a machine.
type options struct {
	files   []file
	tools   []string // versions of xdp-tools
	memory  int
	cpus    int
	append  string
	console string // a file for the kernel's output
	quiet   bool
	counted bool // see qemu.Machine
}

func (o *options) flags(f *flag.FlagSet) {
	f.IntVar(&o.memory, "memory", 2048, "`megabytes` of the machine")
	f.IntVar(&o.cpus, "cpus", 0, "`number` of the machine's processors (default 2 with KVM, 1 without: more would only take turns)")
	f.StringVar(&o.append, "append", "", "add these `words` to the kernel's command line")
	f.StringVar(&o.console, "console", "", "keep the kernel's output in this `file`")
	f.BoolVar(&o.quiet, "quiet", false, "print only the command's output")
}

// handler gets reports from the machine. Each function may be nil.
type handler struct {
	ready  func(release string, took time.Duration)
	begin  func(step string)
	output func(stderr bool, content []byte)
	end    func(guest.Result)
}

// maxMachines is how many machines a user may run at once. An emulated machine occupies a
// processor.
const maxMachines = 2

// boot starts a machine, and returns when the machine has finished the steps.
func boot(ctx context.Context, kernel string, o options, steps []guest.Step, h handler) error {
	say := func(format string, args ...any) {
		if !o.quiet {
			fmt.Fprintf(os.Stderr, "matrix: "+format+"\n", args...)
		}
	}
	series, err := image.FindSeries(kernel)
	if err != nil {
		return err
	}
	if _, err := exec.LookPath(qemu.Program); err != nil {
		return fmt.Errorf("%s is missing: install it (Debian: apt install qemu-system-x86)", qemu.Program)
	}
	c, err := cache.Open(say)
	if err != nil {
		return err
	}
	m := &image.Maker{Cache: c, Say: say}
	k, err := m.Kernel(ctx, series)
	if err != nil {
		return err
	}
	programs, err := m.Programs(ctx)
	if err != nil {
		return err
	}
	archives := []string{programs, k.Modules}
	if len(o.tools) > 0 {
		tools, err := m.XDPTools(ctx, o.tools...)
		if err != nil {
			return err
		}
		archives = append(archives, tools...)
	}

	unlock, err := c.Machine(ctx, maxMachines)
	if err != nil {
		return err
	}
	defer unlock()
	tmp, err := os.MkdirTemp("", "libdispatcher-matrix-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	initrd := filepath.Join(tmp, "initrd")
	if err := writeInitrd(ctx, initrd, archives, o.files, guest.Job{Steps: steps}); err != nil {
		return err
	}
	console := o.console
	if console == "" {
		console = filepath.Join(tmp, "console")
	}
	kvm := false
	if o.counted {
		o.cpus = 1
	} else if kvm, err = canUseKVM(ctx, c, k, archives, tmp, say); err != nil {
		return err
	}
	if o.cpus == 0 {
		o.cpus = 1
		if kvm {
			o.cpus = 2
		}
	}
	begin := time.Now()
	err = qemu.Machine{
		Kernel: k.Image, Initrd: initrd, Console: console, Append: o.append, Memory: o.memory, CPUs: o.cpus, KVM: kvm, Counted: o.counted,
	}.Run(ctx, qemu.Handler{
		Ready: func(release string) {
			os.Remove(initrd) // the machine has read it
			say("Linux %s is up after %.1f s", release, time.Since(begin).Seconds())
			if h.ready != nil {
				h.ready(release, time.Since(begin))
			}
		},
		Begin: func(step string) {
			if h.begin != nil {
				h.begin(step)
			}
		},
		Output: h.output,
		End:    h.end,
	})
	if err == nil || errors.Is(err, context.Canceled) {
		return err
	}
	if text, readErr := os.ReadFile(console); readErr == nil {
		return fmt.Errorf("kernel %s: %w; the end of its console:\n%s", kernel, err, lastLines(text, 60))
	}
	return fmt.Errorf("kernel %s: %w", kernel, err)
}

// canUseKVM tests KVM, once after each boot of this computer.
func canUseKVM(ctx context.Context, c *cache.Cache, k image.Kernel, archives []string, tmp string, say func(string, ...any)) (bool, error) {
	if err := qemu.CanOpenKVM(); err != nil {
		return false, nil
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return false, err
	}
	verdict := filepath.Join(c.Dir, "kvm-"+strings.TrimSpace(string(boot)))
	if known, err := os.ReadFile(verdict); err == nil {
		return string(known) == "yes", nil
	}
	initrd := filepath.Join(tmp, "initrd-kvm")
	if err := writeInitrd(ctx, initrd, archives, nil, guest.Job{}); err != nil {
		return false, err
	}
	defer os.Remove(initrd)
	err = qemu.Machine{Kernel: k.Image, Initrd: initrd, Console: os.DevNull, Memory: 1024, CPUs: 1}.TryKVM(ctx)
	if ctx.Err() != nil {
		return false, context.Cause(ctx)
	}
	answer := "yes"
	if err != nil {
		first, _, _ := strings.Cut(err.Error(), "\n")
		say("KVM does not work here (%s): continuing without it, at a tenth of the speed", first)
		answer = "no"
	}
	return err == nil, os.WriteFile(verdict, []byte(answer), 0o644)
}

// writeInitrd joins the archives, and adds an archive with the files of this run.
func writeInitrd(ctx context.Context, path string, archives []string, files []file, job guest.Job) error {
	out, err := os.Create(path)
	if err != nil {
		return err
	}
	defer out.Close()
	for _, archive := range archives {
		in, err := os.Open(archive)
		if err != nil {
			return err
		}
		_, err = io.Copy(out, in)
		in.Close()
		if err != nil {
			return err
		}
	}
	self, err := ownBinary(ctx, filepath.Dir(path))
	if err != nil {
		return err
	}
	w := initramfs.NewWriter(out)
	if err := w.Copy("/init", self); err != nil {
		return err
	}
	for _, f := range files {
		if err := w.Copy(f.there, f.here); err != nil {
			return err
		}
	}
	content, err := json.Marshal(job)
	if err != nil {
		return err
	}
	if err := w.File(guest.JobFile, 0o644, int64(len(content)), bytes.NewReader(content)); err != nil {
		return err
	}
	if err := w.Close(); err != nil {
		return err
	}
	return out.Close()
}

// ownBinary returns the path of this program in a form that can be a machine's first process. That is the
// running file, unless the file is linked dynamically or for another kind of processor.
func ownBinary(ctx context.Context, tmp string) (string, error) {
	self, err := os.Executable()
	if err != nil {
		return "", err
	}
	if libraries, interpreter, err := initramfs.Libraries("/", self); err == nil && len(libraries) == 0 && interpreter == "" && runtime.GOARCH == "amd64" {
		return self, nil
	}
	built := filepath.Join(tmp, "init")
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-o", built, "github.com/libdispatcher/dispatcher/internal/matrix")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build the machine's first process: %w\n%s", err, out)
	}
	return built, nil
}

func lastLines(text []byte, n int) string {
	lines := strings.Split(strings.TrimRight(strings.ReplaceAll(string(text), "\r", ""), "\n"), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
