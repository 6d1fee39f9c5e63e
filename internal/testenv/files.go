package testenv

import (
	"maps"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// CheckFiles runs fn with the garbage collector off, and fails the test if files are open afterwards that
// were not before. [CheckLeaks] looks for them too, but at the end of the test, when the collector may have
// closed what nobody did.
func CheckFiles(t testing.TB, fn func()) {
	t.Helper()
	startPoller(t)
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	before, after := things{}, things{}
	if err := files(before); err != nil {
		t.Fatal(err)
	}
	fn()
	// What is to be closed a little later, as slots are, is given the time.
	for start := time.Now(); ; time.Sleep(time.Millisecond) {
		clear(after)
		if err := files(after); err != nil {
			t.Fatal(err)
		}
		maps.DeleteFunc(after, func(fd, _ string) bool { _, known := before[fd]; return known })
		if len(after) == 0 || time.Since(start) > time.Second {
			break
		}
	}
	if len(after) > 0 {
		t.Errorf("left open:\n\t%s", strings.Join(slices.Sorted(maps.Values(after)), "\n\t"))
	}
}

// WithFiles runs fn while this process can have n more files open than it has now: the next one is EMFILE.
// Tests that run at the same time are not spared.
func WithFiles(t testing.TB, n int, fn func()) {
	t.Helper()
	startPoller(t)
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	open := map[string]bool{}
	for _, e := range entries {
		// The folder's own is closed by now.
		if _, err := os.Lstat("/proc/self/fd/" + e.Name()); err == nil {
			open[e.Name()] = true
		}
	}
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &limit); err != nil {
		t.Fatal(err)
	}
	// The kernel takes the lowest number that is free, if it is below the limit.
	low := limit
	for low.Cur = 0; n > 0 || open[strconv.FormatUint(low.Cur, 10)]; low.Cur++ {
		if !open[strconv.FormatUint(low.Cur, 10)] {
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
