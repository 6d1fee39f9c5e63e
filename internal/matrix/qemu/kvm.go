package qemu

import (
	"context"
	"fmt"
	"os"
	"runtime"
	"time"

	"github.com/libdispatcher/dispatcher/internal/matrix/guest"
)

// probeTime is how long a machine may take to boot with KVM. Usually it takes 1
// to 3 s.
const probeTime = 20 * time.Second

// CanOpenKVM returns an error if this user cannot use KVM at all.
func CanOpenKVM() error {
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("this machine is %s", runtime.GOARCH)
	}
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return f.Close()
}

// TryKVM boots the machine, which has no steps, with KVM. On some computers KVM can be opened but runs a
// kernel for some milliseconds only, for example when the computer is itself a virtual machine.
func (m Machine) TryKVM(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, probeTime, fmt.Errorf("no boot within %v", probeTime))
	defer cancel()
	m.KVM = true
	nothing := func(string) {}
	return m.Run(ctx, Handler{
		Ready: nothing, Begin: nothing, Output: func(bool, []byte) {}, End: func(guest.Result) {},
	})
}
