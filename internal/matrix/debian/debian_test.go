package debian

import (
	"testing"

	"github.com/go-quicktest/qt"
)

func TestChooseMirror(t *testing.T) {
	uri, err := chooseMirror(`bookworm-security main http://mirror.test/debian-security/
bookworm non-free http://mirror.test/debian/
nodistro main http://elsewhere.test/
bookworm main http://mirror.test/debian/
trixie main http://other.test/debian/
`)
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(uri, "http://mirror.test/debian/"))

	for _, targets := range []string{"", "noble main http://mirror.test/ubuntu/\n", "bookworm-updates main http://mirror.test/debian/\n"} {
		_, err = chooseMirror(targets)
		qt.Check(t, qt.ErrorMatches(err, "apt's sources have no mirror of Debian: set DEBIAN_MIRROR .*"), qt.Commentf("%q", targets))
	}
}

func TestChooseKernel(t *testing.T) {
	tests := map[string]struct {
		names    []string
		series   string
		packages []string
		release  string
	}{
		"the newest, by number": {
			[]string{"linux-image-6.1.0-9-amd64", "linux-image-6.1.0-50-amd64", "linux-image-6.1.0-47-amd64"},
			"6.1", []string{"linux-image-6.1.0-50-amd64"}, "6.1.0-50-amd64",
		},
		"no flavours": {
			[]string{
				"linux-image-5.10.0-32-amd64-unsigned", "linux-image-5.10.0-33-rt-amd64", "linux-image-5.10.0-33-cloud-amd64",
				"linux-image-5.10.0-33-amd64-dbg", "linux-image-5.10.0-30-amd64", "linux-image-amd64", "linux-image-5.10.0-33-arm64",
			},
			"5.10", []string{"linux-image-5.10.0-30-amd64"}, "5.10.0-30-amd64",
		},
		"6.12 does not match 6.1": {
			[]string{"linux-image-6.12.107+deb13-amd64", "linux-image-6.12.94+deb13-amd64"},
			"6.1", nil, "",
		},
		"6.12": {
			[]string{"linux-image-6.12.94+deb13-amd64", "linux-image-6.12.107+deb13-amd64"},
			"6.12", []string{"linux-image-6.12.107+deb13-amd64"}, "6.12.107+deb13-amd64",
		},
		"split into two": {
			[]string{
				"linux-image-7.2.13+deb14-amd64", "linux-modules-7.2.13+deb14-amd64",
				"linux-binary-7.2.13+deb14-amd64", "linux-binary-unsigned-7.2.13+deb14-amd64", "linux-image-7.1.9+deb14-amd64",
			},
			"7.2", []string{"linux-binary-7.2.13+deb14-amd64", "linux-modules-7.2.13+deb14-amd64"}, "7.2.13+deb14-amd64",
		},
		"nothing": {nil, "7.2", nil, ""},
	}
	for name, test := range tests {
		t.Run(name, func(t *testing.T) {
			packages, release := chooseKernel(test.names, test.series)
			qt.Check(t, qt.DeepEquals(packages, test.packages))
			qt.Check(t, qt.Equals(release, test.release))
		})
	}
}

func TestLibraries(t *testing.T) {
	uris := `'http://mirror.test/pool/g/gcc-14-base_14.2.0-19_amd64.deb' gcc-14-base_14.2.0-19_amd64.deb 49432 SHA256:00
'http://mirror.test/pool/g/libc6_2.41-12%2bdeb13u4_amd64.deb' libc6_2.41-12+deb13u4_amd64.deb 2846580 SHA256:00
'http://mirror.test/pool/z/zlib1g_1.3_amd64.deb' zlib1g_1%3a1.3_amd64.deb 88892 SHA256:00
'http://mirror.test/pool/d/debconf_1.5.91_all.deb' debconf_1.5.91_all.deb 121088 SHA256:00
'http://mirror.test/pool/i/iproute2_6.15.0-1_amd64.deb' iproute2_6.15.0-1_amd64.deb 1089184 SHA256:00

`
	qt.Check(t, qt.DeepEquals(libraries(uris, []string{"iproute2"}), []string{"libc6", "zlib1g", "iproute2"}))
	n, bytes := sizes(uris)
	qt.Check(t, qt.Equals(n, 5))
	qt.Check(t, qt.Equals(bytes, 49432+2846580+88892+121088+1089184))
}
