package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
)

const module = "github.com/libdispatcher/dispatcher"

// A testBinary is the test binary of a package.
type testBinary struct {
	Package string // its folder; . for the library's package
	Path    string
}

// goCommand returns a call of the go tool that builds for the machines.
func goCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64")
	return cmd
}

// moduleRoot is the folder of the project.
func moduleRoot(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, "go", "env", "GOMOD").Output()
	path := strings.TrimSpace(string(out))
	if err != nil || path == "" || path == os.DevNull {
		return "", errors.New("run this within the project: its tests are built from there")
	}
	return filepath.Dir(path), nil
}

// testPackages are the folders of the packages that have tests.
func testPackages(ctx context.Context, root string) ([]string, error) {
	cmd := goCommand(ctx, "list", "-json=ImportPath,TestGoFiles,XTestGoFiles", "./...")
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("go list: %w\n%s", err, stderr.Bytes())
	}
	var packages []string
	for d := json.NewDecoder(bytes.NewReader(out)); ; {
		var p struct {
			ImportPath                string
			TestGoFiles, XTestGoFiles []string
		}
		if err := d.Decode(&p); errors.Is(err, io.EOF) {
			return packages, nil
		} else if err != nil {
			return nil, err
		}
		if len(p.TestGoFiles)+len(p.XTestGoFiles) > 0 {
			packages = append(packages, folderOf(p.ImportPath))
		}
	}
}

func folderOf(importPath string) string {
	if importPath == module {
		return "."
	}
	return strings.TrimPrefix(importPath, module+"/")
}

// buildTests builds the packages' test binaries, two at a time, without symbols. Stack traces have names
// anyway.
func buildTests(ctx context.Context, root, to string, packages []string) ([]testBinary, error) {
	binaries := make([]testBinary, len(packages))
	errs := make([]error, len(packages))
	var wait sync.WaitGroup
	room := make(chan struct{}, 2)
	for i, p := range packages {
		binaries[i] = testBinary{Package: p, Path: filepath.Join(to, strings.ReplaceAll(strings.ReplaceAll(p, "/", "-"), ".", "library")+".test")}
		wait.Go(func() {
			room <- struct{}{}
			defer func() { <-room }()
			cmd := goCommand(ctx, "test", "-c", "-vet=off", "-ldflags=-s -w", "-o", binaries[i].Path, "./"+p)
			cmd.Dir = root
			if out, err := cmd.CombinedOutput(); err != nil {
				errs[i] = fmt.Errorf("build the tests of %s: %w\n%s", p, err, out)
			}
		})
	}
	wait.Wait()
	return binaries, errors.Join(errs...)
}

// buildCommand builds the command dispatcher.
func buildCommand(ctx context.Context, root, to string) error {
	cmd := goCommand(ctx, "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", to, "./cmd/dispatcher")
	cmd.Dir = root
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("build the command: %w\n%s", err, out)
	}
	return nil
}

// sources returns the files of the project, because tests read some of them: all files that are
// neither hidden nor built. They have the same paths in the machine.
func sources(root string) ([]file, error) {
	var files []file
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, path)
		if err != nil || rel == "." {
			return err
		}
		hidden := strings.HasPrefix(d.Name(), ".")
		if d.IsDir() {
			if hidden || rel == "bin" || rel == "dist" {
				return filepath.SkipDir
			}
			return nil
		}
		if !hidden && d.Type().IsRegular() && !strings.HasSuffix(rel, ".test") {
			files = append(files, file{here: path, there: path})
		}
		return nil
	})
	return files, err
}
