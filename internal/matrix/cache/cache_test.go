package cache

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/go-quicktest/qt"
)

func open(t *testing.T) *Cache {
	t.Helper()
	return &Cache{Dir: t.TempDir(), Say: func(format string, args ...any) { t.Logf(format, args...) }}
}

func put(content string) func(string) error {
	return func(dir string) error { return os.WriteFile(filepath.Join(dir, "x"), []byte(content), 0o644) }
}

func content(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(dir, "x"))
	qt.Assert(t, qt.IsNil(err))
	return string(b)
}

func TestGet(t *testing.T) {
	ctx := t.Context()
	c := open(t)
	failing := errors.New("no network")
	fails := func(string) error { return failing }

	_, err := c.Get(ctx, "kernels/7.2", "1", fails)
	qt.Assert(t, qt.ErrorIs(err, failing))
	first, err := c.Get(ctx, "kernels/7.2", "1", put("first"))
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(content(t, first), "first"))

	again, err := c.Get(ctx, "kernels/7.2", "1", fails)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(again, first))

	// Another recipe makes another thing, and the first one stays.
	_, err = c.Get(ctx, "kernels/7.2", "2", fails)
	qt.Check(t, qt.ErrorIs(err, failing))
	other, err := c.Get(ctx, "kernels/7.2", "2", put("other"))
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(content(t, other), "other"))
	qt.Check(t, qt.Equals(content(t, first), "first"))

	// An old thing is made again. If that fails, the old one is returned.
	old := time.Now().Add(-fresh - time.Hour)
	qt.Assert(t, qt.IsNil(os.Chtimes(first, old, old)))
	stale, err := c.Get(ctx, "kernels/7.2", "1", fails)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(stale, first))
	second, err := c.Get(ctx, "kernels/7.2", "1", put("second"))
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(content(t, second), "second"))
	qt.Check(t, qt.ErrorIs(func() error { _, err := os.Stat(first); return err }(), os.ErrNotExist))
	qt.Check(t, qt.Equals(content(t, other), "other"))
}

func TestGetGoroutines(t *testing.T) {
	c := open(t)
	var made atomic.Int32
	var wait sync.WaitGroup
	for range 8 {
		wait.Go(func() {
			dir, err := c.Get(t.Context(), "thing", "1", func(dir string) error {
				made.Add(1)
				time.Sleep(10 * time.Millisecond)
				return put("x")(dir)
			})
			qt.Check(t, qt.IsNil(err))
			if err == nil {
				_, err = os.Stat(filepath.Join(dir, "x"))
				qt.Check(t, qt.IsNil(err))
			}
		})
	}
	wait.Wait()
	qt.Check(t, qt.Equals(made.Load(), 1))
}

func TestMachine(t *testing.T) {
	c := open(t)
	one, err := c.Machine(t.Context(), 2)
	qt.Assert(t, qt.IsNil(err))
	two, err := c.Machine(t.Context(), 2)
	qt.Assert(t, qt.IsNil(err))
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	defer cancel()
	_, err = c.Machine(ctx, 2)
	qt.Assert(t, qt.ErrorIs(err, context.DeadlineExceeded))
	one()
	three, err := c.Machine(t.Context(), 2)
	qt.Assert(t, qt.IsNil(err))
	two()
	three()
}
