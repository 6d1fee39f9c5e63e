// Package cache keeps downloads, and files made from downloads, for all processes of a
// user.
package cache

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// A Cache is a folder. Several processes may call its methods at once.
type Cache struct {
	Dir string
	Say func(format string, args ...any) // reports what a method waits for
}

// Open creates the folder below the user's cache folder.
func Open(say func(format string, args ...any)) (*Cache, error) {
	user, err := os.UserCacheDir()
	if err != nil {
		return nil, fmt.Errorf("the folder for downloads: %w", err)
	}
	dir := filepath.Join(user, "libdispatcher", "matrix")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("the folder for downloads: %w", err)
	}
	return &Cache{Dir: dir, Say: say}, nil
}

// Size returns how many bytes the files of the cache have.
func (c *Cache) Size() (size int64, err error) {
	err = filepath.WalkDir(c.Dir, func(_ string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		info, err := d.Info()
		if err == nil {
			size += info.Size()
		}
		return err
	})
	return size, err
}

const (
	fresh  = 7 * 24 * time.Hour // older things are made again, because there may be newer packages
	unused = 24 * time.Hour     // a replaced thing of this age is no longer in use
)

// Get returns the folder of a thing. It calls make with an empty folder unless the thing exists, was
// made by the same recipe, and is fresh. If make fails, Get returns a thing that is not fresh.
func (c *Cache) Get(ctx context.Context, name, recipe string, make func(dir string) error) (string, error) {
	top := filepath.Join(c.Dir, filepath.FromSlash(name))
	sum := sha256.Sum256([]byte(recipe))
	current := filepath.Join(top, "current-"+hex.EncodeToString(sum[:6]))
	if dir, age := resolve(current); dir != "" && age < fresh {
		return dir, nil
	}
	if err := os.MkdirAll(top, 0o755); err != nil {
		return "", err
	}
	unlock, err := c.Lock(ctx, name)
	if err != nil {
		return "", err
	}
	defer unlock()
	old, age := resolve(current)
	if old != "" && age < fresh {
		return old, nil
	}
	dir, err := os.MkdirTemp(top, time.Now().UTC().Format("20060102-150405-"))
	if err != nil {
		return "", err
	}
	os.Chmod(dir, 0o755)
	if err := make(dir); err != nil {
		os.RemoveAll(dir)
		if old != "" && ctx.Err() == nil {
			c.Say("continuing with %s of %s: %v", name, time.Now().Add(-age).Format(time.DateOnly), err)
			return old, nil
		}
		return "", err
	}
	next := current + ".next"
	os.Remove(next)
	if err := os.Symlink(filepath.Base(dir), next); err != nil {
		return "", err
	}
	if err := os.Rename(next, current); err != nil {
		return "", err
	}
	sweep(top, dir)
	return dir, nil
}

// resolve follows the link to the newest version. dir is empty if there is
// none.
func resolve(current string) (dir string, age time.Duration) {
	target, err := os.Readlink(current)
	if err != nil {
		return "", 0
	}
	dir = filepath.Join(filepath.Dir(current), target)
	info, err := os.Stat(dir)
	if err != nil {
		return "", 0
	}
	return dir, time.Since(info.ModTime())
}

// sweep removes older versions, unless a process may still use them.
func sweep(top, keep string) {
	used := map[string]bool{filepath.Base(keep): true}
	entries, _ := os.ReadDir(top)
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(top, e.Name())); err == nil {
			if info, err := os.Stat(filepath.Join(top, target)); err == nil && time.Since(info.ModTime()) < 2*fresh {
				used[target] = true
			}
		}
	}
	for _, e := range entries {
		if info, err := e.Info(); err == nil && e.IsDir() && !used[e.Name()] && time.Since(info.ModTime()) > unused {
			os.RemoveAll(filepath.Join(top, e.Name()))
		}
	}
}

// Lock waits until no other process has the lock of that name.
func (c *Cache) Lock(ctx context.Context, name string) (unlock func(), err error) {
	return c.lockAny(ctx, "another process to finish with "+name, filepath.FromSlash(name)+".lock")
}

// Machine waits until fewer than limit virtual machines run on this computer.
func (c *Cache) Machine(ctx context.Context, limit int) (unlock func(), err error) {
	var names []string
	for i := range limit {
		names = append(names, fmt.Sprintf("machine-%d.lock", i))
	}
	return c.lockAny(ctx, "another virtual machine to end", names...)
}

func (c *Cache) lockAny(ctx context.Context, what string, names ...string) (unlock func(), err error) {
	for try := 0; ; try++ {
		for _, name := range names {
			path := filepath.Join(c.Dir, name)
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return nil, err
			}
			f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o644)
			if err != nil {
				return nil, err
			}
			err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
			if err == nil {
				return func() { f.Close() }, nil
			}
			f.Close()
			if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
				return nil, &fs.PathError{Op: "lock", Path: path, Err: err}
			}
		}
		if try == 10 {
			c.Say("waiting for %s", what)
		}
		select {
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		case <-time.After(200 * time.Millisecond):
		}
	}
}
