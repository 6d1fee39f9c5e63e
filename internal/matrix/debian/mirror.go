package debian

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"slices"
	"strings"
)

// A Mirror is apt's source of Debian's packages.
type Mirror struct {
	URI     string
	Keyring string // empty: apt's usual keys
}

// MirrorVariable names the environment variable with the mirror to use when apt's own
// configuration has no mirror of Debian, for example on Ubuntu.
const MirrorVariable = "DEBIAN_MIRROR"

// releases are the names by which apt's sources call a release of Debian's main archive. Releases
// with -security and -updates are in other archives or contain less.
var releases = []string{
	"oldoldstable", "oldstable", "stable", "testing", "unstable",
	"buster", "bullseye", "bookworm", "trixie", "forky", "duke", "sid",
}

const debianKeyring = "/usr/share/keyrings/debian-archive-keyring.gpg"

// FindMirror finds the mirror in apt's configuration on this machine.
func FindMirror(ctx context.Context) (Mirror, error) {
	for _, name := range []string{"apt-get", "dpkg-deb"} {
		if _, err := exec.LookPath(name); err != nil {
			return Mirror{}, fmt.Errorf("%s is missing: the kernels are Debian's packages; install apt, dpkg and debian-archive-keyring", name)
		}
	}
	keyring := ""
	if _, err := os.Stat(debianKeyring); err == nil {
		keyring = debianKeyring
	}
	if uri := os.Getenv(MirrorVariable); uri != "" {
		return Mirror{URI: uri, Keyring: keyring}, nil
	}
	out, err := output(exec.CommandContext(ctx, "apt-get", "indextargets", "--format", "$(RELEASE) $(COMPONENT) $(REPO_URI)", "Identifier: Packages"))
	if err != nil {
		return Mirror{}, fmt.Errorf("read apt's configuration: %w", err)
	}
	uri, err := chooseMirror(string(out))
	return Mirror{URI: uri, Keyring: keyring}, err
}

// chooseMirror chooses from lines of release, component and address.
func chooseMirror(targets string) (string, error) {
	for line := range strings.Lines(targets) {
		fields := strings.Fields(line)
		if len(fields) == 3 && fields[1] == "main" && slices.Contains(releases, fields[0]) {
			return fields[2], nil
		}
	}
	return "", errors.New("apt's sources have no mirror of Debian: set " + MirrorVariable + " to the address of one (and install debian-archive-keyring)")
}
