package debian

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// kernelImage matches the packages of Debian's ordinary signed kernels for amd64. The flavours (cloud,
// rt) and the unsigned and debug packages have other names. Since 7.x the kernel itself is in
// linux-binary and its modules are in linux-modules.
var kernelImage = regexp.MustCompile(`^linux-(?:image|binary)-(\d[0-9.]*(?:-\d+)?(?:\+[a-z0-9]+)?-amd64)$`)

// KernelPackages returns the packages of the newest kernel of a series, such as 6.12, and the
// kernel's release.
func (s *Suite) KernelPackages(ctx context.Context, series string) (packages []string, release string, err error) {
	var names []string
	for _, prefix := range []string{"linux-image-", "linux-binary-", "linux-modules-"} {
		found, err := s.Names(ctx, prefix)
		if err != nil {
			return nil, "", err
		}
		names = append(names, found...)
	}
	packages, release = chooseKernel(names, series)
	if len(packages) == 0 {
		return nil, "", fmt.Errorf("no kernel %s for amd64 in Debian %s at %s", series, s.Name, s.Mirror.URI)
	}
	return packages, release, nil
}

func chooseKernel(names []string, series string) (packages []string, release string) {
	for _, name := range names {
		match := kernelImage.FindStringSubmatch(name)
		if match == nil || !inSeries(match[1], series) {
			continue
		}
		if release == "" || compareReleases(match[1], release) > 0 {
			release = match[1]
		}
	}
	if release == "" {
		return nil, ""
	}
	binary, modules := "linux-binary-"+release, "linux-modules-"+release
	if slices.Contains(names, binary) && slices.Contains(names, modules) {
		return []string{binary, modules}, release
	}
	return []string{"linux-image-" + release}, release
}

// inSeries says whether a release belongs to a series: 6.12.107+deb13-amd64
// belongs to 6.12, not to 6.1.
func inSeries(release, series string) bool {
	rest, ok := strings.CutPrefix(release, series)
	return ok && rest != "" && strings.ContainsRune(".-+", rune(rest[0]))
}

var number = regexp.MustCompile(`\d+`)

// compareReleases compares the releases' numbers one after the other.
func compareReleases(a, b string) int {
	return slices.Compare(numbers(a), numbers(b))
}

func numbers(s string) []int {
	var all []int
	for _, digits := range number.FindAllString(s, -1) {
		n, _ := strconv.Atoi(digits)
		all = append(all, n)
	}
	return all
}
