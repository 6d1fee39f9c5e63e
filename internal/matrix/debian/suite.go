package debian

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// maxAge is the age at which package lists are fetched again.
const maxAge = 7 * 24 * time.Hour

// A Suite is a release of Debian, such as trixie or sid.
type Suite struct {
	Name   string
	Mirror Mirror
	Say    func(format string, args ...any) // reports what takes long

	dir string
}

// NewSuite returns a suite that keeps its lists and downloads in dir. Only one process may use the
// folder at a time.
func NewSuite(name string, mirror Mirror, dir string, say func(format string, args ...any)) *Suite {
	return &Suite{Name: name, Mirror: mirror, Say: say, dir: dir}
}

// Refresh fetches the package lists if there are none, if they are old, or if force is set. If that
// fails it uses old lists.
func (s *Suite) Refresh(ctx context.Context, force bool) error {
	stamp := filepath.Join(s.dir, "fetched")
	info, err := os.Stat(stamp)
	if err == nil && !force && time.Since(info.ModTime()) < maxAge {
		return nil
	}
	for _, dir := range []string{"lists/partial", "cache/archives/partial", "debs"} {
		if err := os.MkdirAll(filepath.Join(s.dir, dir), 0o755); err != nil {
			return err
		}
	}
	signed := ""
	if s.Mirror.Keyring != "" {
		signed = "[signed-by=" + s.Mirror.Keyring + "] "
	}
	for name, content := range map[string]string{
		"sources.list": fmt.Sprintf("deb %s%s %s main\n", signed, s.Mirror.URI, s.Name),
		"status":       "", // this apt believes that nothing is installed
	} {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(content), 0o644); err != nil {
			return err
		}
	}
	s.Say("fetching the package lists of Debian %s", s.Name)
	_, updateErr := s.apt(ctx, "apt-get", "update", "-q", "-o", "APT::Update::Error-Mode=any")
	if updateErr == nil {
		return os.WriteFile(stamp, nil, 0o644)
	}
	if err == nil && !force {
		s.Say("continuing with Debian %s's package lists of %s: %v", s.Name, info.ModTime().Format(time.DateOnly), updateErr)
		return nil
	}
	return fmt.Errorf("fetch the package lists of Debian %s from %s: %w", s.Name, s.Mirror.URI, updateErr)
}

// Names returns the names of all packages that begin with prefix.
func (s *Suite) Names(ctx context.Context, prefix string) ([]string, error) {
	out, err := s.apt(ctx, "apt-cache", "pkgnames", prefix)
	return strings.Fields(string(out)), err
}

// Version returns the version of a package that apt would install. The error is [fs.ErrNotExist] if
// there is no such package.
func (s *Suite) Version(ctx context.Context, name string) (string, error) {
	out, err := s.apt(ctx, "apt-cache", "show", "--no-all-versions", name)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(out)) {
		if version, ok := strings.CutPrefix(line, "Version: "); ok {
			return strings.TrimSpace(version), nil
		}
	}
	return "", fmt.Errorf("package %s of Debian %s: %w", name, s.Name, fs.ErrNotExist)
}

// WithLibraries returns the given packages and the libraries that they need on a machine that has no
// packages.
func (s *Suite) WithLibraries(ctx context.Context, names ...string) ([]string, error) {
	args := append([]string{"install", "--print-uris", "-qq", "--no-install-recommends"}, names...)
	out, err := s.apt(ctx, "apt-get", args...)
	if err != nil {
		return nil, err
	}
	return libraries(string(out), names), nil
}

// libraries returns the wanted packages and the libraries among the lines of apt-get
// --print-uris: 'address' file size hash.
func libraries(uris string, wanted []string) []string {
	var found []string
	for line := range strings.Lines(uris) {
		fields := strings.Fields(line)
		if len(fields) < 2 {
			continue
		}
		name, _, _ := strings.Cut(fields[1], "_")
		if strings.HasPrefix(name, "lib") || name == "zlib1g" || slices.Contains(wanted, name) {
			found = append(found, name)
		}
	}
	return found
}

// sizes counts the packages in lines of apt-get --print-uris, and adds up their
// sizes.
func sizes(uris string) (n int, bytes int64) {
	for line := range strings.Lines(uris) {
		if fields := strings.Fields(line); len(fields) > 2 {
			size, _ := strconv.ParseInt(fields[2], 10, 64)
			n, bytes = n+1, bytes+size
		}
	}
	return n, bytes
}

// Fetch downloads packages that are not there yet, and returns the paths of their files.
func (s *Suite) Fetch(ctx context.Context, names ...string) ([]string, error) {
	paths, err := s.fetch(ctx, names)
	if err == nil {
		return paths, nil
	}
	// The archive may have changed since the lists were fetched.
	if s.Refresh(ctx, true) == nil {
		paths, err = s.fetch(ctx, names)
	}
	return paths, err
}

func (s *Suite) fetch(ctx context.Context, names []string) ([]string, error) {
	uris, err := s.apt(ctx, "apt-get", append([]string{"download", "--print-uris", "-qq"}, names...)...)
	if err != nil {
		return nil, err
	}
	// apt neither lists nor downloads packages that the folder has.
	missing, err := s.aptIn(ctx, "debs", "apt-get", append([]string{"download", "--print-uris", "-qq"}, names...)...)
	if err != nil {
		return nil, err
	}
	if n, bytes := sizes(string(missing)); n > 0 {
		s.Say("downloading %d packages of Debian %s, %.1f MB", n, s.Name, float64(bytes)/1e6)
	}
	if _, err := s.aptIn(ctx, "debs", "apt-get", append([]string{"download", "-q"}, names...)...); err != nil {
		return nil, err
	}
	var paths []string
	for line := range strings.Lines(string(uris)) {
		if fields := strings.Fields(line); len(fields) > 1 {
			path := filepath.Join(s.dir, "debs", fields[1])
			if _, err := os.Stat(path); err != nil {
				return nil, fmt.Errorf("apt-get downloaded something else: %w", err)
			}
			paths = append(paths, path)
		}
	}
	if len(paths) != len(names) {
		return nil, fmt.Errorf("apt-get has %d of the %d packages %v", len(paths), len(names), names)
	}
	return paths, nil
}

// apt runs apt-get or apt-cache on the private folder. The rest of the machine's configuration, such as
// a proxy, applies.
func (s *Suite) apt(ctx context.Context, name string, args ...string) ([]byte, error) {
	return s.aptIn(ctx, ".", name, args...)
}

func (s *Suite) aptIn(ctx context.Context, dir, name string, args ...string) ([]byte, error) {
	options := []string{
		"Dir::Etc::sourcelist=" + filepath.Join(s.dir, "sources.list"),
		"Dir::Etc::sourceparts=-",
		"Dir::Etc::preferences=-",
		"Dir::Etc::preferencesparts=-",
		"Dir::State::lists=" + filepath.Join(s.dir, "lists"),
		"Dir::State::status=" + filepath.Join(s.dir, "status"),
		"Dir::State::extended_states=" + filepath.Join(s.dir, "extended"),
		"Dir::Cache=" + filepath.Join(s.dir, "cache"),
		"APT::Architecture=amd64",
		"APT::Architectures::=amd64",
		"APT::Default-Release=",
		"APT::Get::List-Cleanup=false",
		"Debug::NoLocking=true",
		"Acquire::Languages=none",
		"Acquire::Retries=3",
	}
	if os.Geteuid() == 0 {
		// The user _apt cannot read a folder below root's home.
		options = append(options, "APT::Sandbox::User=root")
	}
	var all []string
	for _, o := range options {
		all = append(all, "-o", o)
	}
	cmd := exec.CommandContext(ctx, name, append(all, args...)...)
	cmd.Dir = filepath.Join(s.dir, dir)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "DEBIAN_FRONTEND=noninteractive")
	return output(cmd)
}

// output returns the command's stdout. The error has the command's stderr.
func output(cmd *exec.Cmd) ([]byte, error) {
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return out, fmt.Errorf("%s: %w\n%s", filepath.Base(cmd.Path), err, bytes.TrimSpace(stderr.Bytes()))
	}
	return out, err
}
