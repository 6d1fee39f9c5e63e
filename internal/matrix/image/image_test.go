package image

import (
	"testing"

	"github.com/go-quicktest/qt"
)

func TestUpstreamVersion(t *testing.T) {
	for version, want := range map[string]string{
		"1.5.4-1":           "1.5.4",
		"1.3.1-1":           "1.3.1",
		"1:1.6.3-2+b1":      "1.6.3",
		"1.6.3+ds-1~deb14":  "1.6.3",
		"2.0~rc1-1":         "2.0~rc1",
		"1.6.3":             "1.6.3",
		"1:1.3.dfsg+r1-1+b": "1.3.dfsg",
	} {
		qt.Check(t, qt.Equals(upstreamVersion(version), want), qt.Commentf("%s", version))
	}
}

func TestFindSeries(t *testing.T) {
	s, err := FindSeries("6.12")
	qt.Assert(t, qt.IsNil(err))
	qt.Check(t, qt.Equals(s.Suite, "trixie"))
	_, err = FindSeries("6.18")
	qt.Check(t, qt.ErrorMatches(err, `there is no kernel "6.18": there are 5.10, 6.1, 6.12, 7.2`))
}

func TestEveryProgramHasAPackage(t *testing.T) {
	qt.Check(t, qt.HasLen(packageOrder, len(programs)))
	for _, pkg := range packageOrder {
		qt.Check(t, qt.IsTrue(len(programs[pkg]) > 0), qt.Commentf("%s", pkg))
	}
}
