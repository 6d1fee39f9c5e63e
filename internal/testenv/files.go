package testenv

import (
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"golang.org/x/sys/unix"
)

// CheckFiles runs fn with the garbage collector off, and fails the test if more files are open afterwards
// than before. [CheckLeaks] looks for them too, but at the end of the test, when the collector may have
// closed what nobody did.
func CheckFiles(t testing.TB, fn func()) {
	t.Helper()
	startPoller(t)
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	before := openFiles(t)
	fn()
	// What is to be closed a little later, as slots are, is given the time.
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		left := []string{}
		for target, fds := range openFiles(t) {
			if more := len(fds) - len(before[target]); more > 0 {
				left = append(left, fmt.Sprintf("%d more of %s, which now are %s", more, target, strings.Join(fds, ", ")))
			}
		}
		if len(left) == 0 {
			return
		}
		if time.Since(start) > time.Second {
			slices.Sort(left)
			t.Errorf("left open:\n\t%s", strings.Join(left, "\n\t"))
			return
		}
	}
}

// openFiles returns the descriptors of this process by what they lead to.
func openFiles(t testing.TB) map[string][]string {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	open := map[string][]string{}
	for _, e := range entries {
		// The folder's own is closed by now.
		if target, err := os.Readlink("/proc/self/fd/" + e.Name()); err == nil {
			// A link is called bpf_link for its maker, and bpf-link for others.
			target = strings.Replace(target, "bpf_link", "bpf-link", 1)
			open[target] = append(open[target], e.Name())
		}
	}
	return open
}

// EachLimit runs op again and again: the first time this process can open no file, then one more each time,
// until op succeeds. So op fails at each file that it opens. What it opens it must close, when it fails too.
// check looks, with no limit, at what a run has done.
func EachLimit(t testing.TB, op func() error, check func(err error)) {
	t.Helper()
	const most = 500 // far more than anything opens at once
	for n := range most {
		var err error
		CheckFiles(t, func() { WithFiles(t, n, func() { err = op() }) })
		check(err)
		if t.Failed() {
			t.Fatalf("with %d files: %v", n, err)
		}
		if err == nil {
			t.Logf("done with %d files", n)
			return
		}
	}
	t.Fatalf("not done with %d files", most)
}

// WithFiles runs fn while this process can have n more files open than it has now: the next one is EMFILE.
// Tests that run at the same time are not spared.
func WithFiles(t testing.TB, n int, fn func()) {
	t.Helper()
	startPoller(t)
	// cilium/ebpf reads a file for it once, and remembers a failure for good.
	if _, err := ebpf.PossibleCPU(); err != nil {
		t.Fatal(err)
	}
	taken := map[uint64]bool{}
	for _, fds := range openFiles(t) {
		for _, fd := range fds {
			number, _ := strconv.ParseUint(fd, 10, 64)
			taken[number] = true
		}
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	// The kernel takes the lowest number that is free, if it is below the limit.
	low := limit
	for low.Cur = 0; n > 0 || taken[low.Cur]; low.Cur++ {
		if !taken[low.Cur] {
			n--
		}
	}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &low); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
			t.Error(err)
		}
	}()
	fn()
}
