package main

import (
	"os/exec"
	"strings"
	"testing"

	"github.com/go-quicktest/qt"
	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/libdispatcher/dispatcher"
	"github.com/libdispatcher/dispatcher/hook"
)

// Every verb and flag has a text in its help and in the manual page.
func TestHelp(t *testing.T) {
	a := &app{}
	root := a.rootCommand(nil)
	page := manPage(root)
	for _, c := range verbs(root) {
		t.Run(c.Name(), func(t *testing.T) {
			status, stdout, stderr := command(t, c.Name(), "--help")
			qt.Check(t, qt.Equals(status, 0))
			qt.Check(t, qt.Equals(stderr, ""))
			qt.Check(t, qt.StringContains(stdout, c.Short[:8]))
			qt.Check(t, qt.StringContains(page, `.SS "`+strings.ReplaceAll(c.Name(), "-", `\-`)))
			checkFlags(t, c, page)
		})
	}
	checkFlags(t, root, page)
}

func checkFlags(t *testing.T, c *cobra.Command, page string) {
	t.Helper()
	c.LocalFlags().VisitAll(func(f *pflag.Flag) {
		if f.Name == "help" || f.Name == "version" {
			return
		}
		value, text := pflag.UnquoteUsage(f)
		qt.Check(t, qt.Not(qt.Equals(text, "")), qt.Commentf("--%s", f.Name))
		// A word such as "func" or "stringArray" means nothing to users.
		qt.Check(t, qt.Equals(value, strings.ToUpper(value)), qt.Commentf("--%s", f.Name))
		qt.Check(t, qt.StringContains(page, strings.ReplaceAll("--"+f.Name, "-", `\-`)))
	})
}

func TestManPageFormats(t *testing.T) {
	groff, err := exec.LookPath("groff")
	if err != nil {
		t.Fatal("groff is needed: apt-get install groff-base")
	}
	cmd := exec.Command(groff, "-man", "-Tutf8", "-ww", "-z")
	cmd.Stdin = strings.NewReader(manPage((&app{}).rootCommand(nil)))
	out, err := cmd.CombinedOutput()
	qt.Assert(t, qt.IsNil(err))
	qt.Assert(t, qt.Equals(string(out), ""))
}

func TestRoffEscapes(t *testing.T) {
	var r roff
	r.text(".a \\ -b\n'c\n\nPROGRAM is\n  id:N   x\n  .y")
	qt.Assert(t, qt.Equals(r.String(), "\\&.a \\e \\-b\n\\&'c\n.PP\nPROGRAM is\n.PP\n.nf\n  id:N   x\n  .y\n.fi\n"))
}

func TestWithoutDev(t *testing.T) {
	for _, test := range []struct {
		args, want string
	}{
		{"xdp dev eth0 x.o", "xdp eth0 x.o"},
		{"xdp eth0 x.o", "xdp eth0 x.o"},
		{"xdp dev dev x.o", "xdp dev x.o"},
		{"xdp dev", "xdp dev"},
		{"xdp eth0 dev", "xdp eth0 dev"},
		{"xdp cgroup x.o", "xdp cgroup x.o"},
		{"cgroup/connect4 cgroup /a x.o", "cgroup/connect4 /a x.o"},
		{"cgroup/connect4 cgroup cgroup x.o", "cgroup/connect4 cgroup x.o"},
		{"cgroup/connect4 dev x.o", "cgroup/connect4 dev x.o"},
		{"cgroup cgroup /a", "cgroup /a"},
		{"sockops cgroup /a", "sockops /a"},
	} {
		qt.Check(t, qt.Equals(strings.Join(withoutDev(strings.Fields(test.args), 1), " "), test.want))
	}
}

func TestParseHooks(t *testing.T) {
	for name, want := range map[string]string{
		"xdp":            "xdp",
		"tcx":            "tcx/ingress tcx/egress",
		"tc":             "tc/ingress tc/egress tc/qdisc",
		"netkit":         "netkit/primary netkit/peer",
		"tcx/egress":     "tcx/egress",
		"netfilter":      "netfilter",
		"lsm_cgroup":     "lsm_cgroup",
		"sockops":        "sockops",
		"cgroup/sysctl":  "cgroup/sysctl",
		"flow_dissector": "flow_dissector",
	} {
		hooks, err := parseHooks(name)
		qt.Check(t, qt.IsNil(err))
		qt.Check(t, qt.Equals(strings.Join(wordsOf(hooks), " "), want))
	}
	hooks, err := parseHooks("cgroup")
	qt.Check(t, qt.IsNil(err))
	qt.Check(t, qt.HasLen(hooks, len(hook.CgroupHooks())+1)) // and lsm_cgroup
	for _, name := range []string{"", "eth0", "cgroup/", "TCX"} {
		_, err := parseHooks(name)
		qt.Check(t, qt.ErrorIs(err, dispatcher.ErrUsage))
	}
}
